"""The writer of a frame store's parts from rows of the manifest, including failures."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from gare.config import ExtractConfig
from gare.data.decode.clip_request import ClipRequest
from gare.data.decode.decoded_clip import DecodedClip
from gare.data.decode.process import DecodeProcess, DecoderCrashError
from gare.data.store.contents import FAILURE_SCHEMA, IDENTITY, RULES, frame_schema
from gare.data.store.parts import PartEncoder, encode_part, part_name_of_group, put_part, table_of
from gare.data.videos import LocalVideo, LocalVideos, VideoSource, check_readable
from gare.errors import DataError, FetchError, GoneError, without_secrets

logger = logging.getLogger(__name__)

#: Number of slowest videos of a part, and of a run, that are reported with their seconds.
SLOWEST = 10


#: Bytes of frames, about, that a part holds at most, since its writer has it in memory.
PART_BYTES = 192 * 10**6
#: Clips whose frames are encoded together.
_AT_ONCE = 16
#: Bytes of pixels for each byte of a JPEG file, about.
_JPEG_RATIO = 10


def clips_per_part(extract: ExtractConfig) -> int:
    """Returns the most clips of a part, by their number and by the bytes of their frames."""
    pixels = 3 * extract.num_frames * extract.image_size**2
    clip = pixels if extract.encoding == "raw" else pixels // _JPEG_RATIO
    return max(1, min(extract.videos_per_part, PART_BYTES // max(1, clip)))


def cut_into_parts(
    rows: Sequence[Mapping[str, Any]], workers: int, limit: int
) -> list[list[Mapping[str, Any]]]:
    """Divides rows into parts in the best order to begin them: large files first, small parts last.

    Args:
        rows: with ``source_bytes``, None if unknown.
        workers: number of workers, which take parts as they become free and should end at about the same
            time.
        limit: most rows of a part.
    """
    left = sorted(rows, key=lambda row: -(row["source_bytes"] or 0))
    parts: list[list[Mapping[str, Any]]] = []
    first = 0
    while first < len(left):
        size = min(limit, math.ceil((len(left) - first) / (3 * workers)))
        parts.append(left[first : first + size])
        first += size
    return parts


class OutdatedFrameFinder:
    """Finder of files from which an earlier version may have taken wrong frames, in a child process.

    Args:
        extract: settings of the store.
        source: fetches the videos.
    """

    def __init__(self, extract: ExtractConfig, source: VideoSource) -> None:
        self.extract, self.source = extract, source
        self.process = DecodeProcess()

    def find(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Checks the files of rows of ``StoreUpdate.decoded_before``.

        Returns:
            ``traits``: of files that have one, by id; ``unknown``: why others could not be checked, by id;
            ``written``: number of rows.
        """
        traits: dict[str, str] = {}
        unknown: dict[str, str] = {}
        for row in rows:
            try:
                with self.source.open(row["uri"]) as video:
                    if (video.size_bytes, video.version) != (row["source_bytes"], row["source_version"]):
                        continue  # a changed file is made again in any case
                    trait = self.process.find_outdated_traits(
                        video.path,
                        sampling=self.extract.sampling,
                        complete=row["complete"],
                        deadline_s=self.extract.deadline_s,
                        memory_mb=self.extract.memory_mb,
                    )
            except DataError as error:
                unknown[row["video_id"]] = error.what
            else:
                traits |= {row["video_id"]: trait} if trait else {}
        return {"traits": traits, "unknown": unknown, "written": len(rows)}

    def close(self) -> None:
        """Ends the child process."""
        self.process.close()


class Extractor:
    """Extractor of clips: decodes them in a child process and writes each group as one part.

    Args:
        uri: the store.
        extract: its settings.
        source: fetches the videos.
        run: mark that makes the names of this run's parts differ from those of other runs over the same
            clips.
        generation: of the lock that the run holds, see ``gare.storage.generations``.
    """

    def __init__(
        self,
        uri: str,
        extract: ExtractConfig,
        source: VideoSource | None = None,
        run: str = "",
        generation: int = 0,
    ) -> None:
        self.uri = uri
        self.extract = extract
        self.run, self.generation = run, generation
        self.schema = frame_schema(extract)
        self.process = DecodeProcess()
        self.source = source or LocalVideos()
        # Both take seconds the first time; the first video should not wait for them.
        self.process.start()
        table_of([], self.schema)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Extracts rows of ``gare.extract.comparison.compare``, and writes the part after the last of them.

        Returns:
            ``written``, ``failed``, ``frames``, ``bytes`` (of the videos read), ``seconds`` by stage, the
            ``slowest`` videos, each with its seconds, and ``began``, the time by this machine's clock.

        Raises:
            DataError: if the store cannot be written.
        """
        began = time.time()
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        seconds: dict[str, float] = defaultdict(float)
        took: list[tuple[str, float]] = []
        done = dict.fromkeys(("written", "frames", "bytes"), 0)
        encoder = PartEncoder("data", self.schema)

        def encode() -> None:
            started = time.perf_counter()
            encoder.add(table_of(good, self.schema))
            done["written"] += len(good)
            done["frames"] += sum(row["num_frames"] for row in good)
            done["bytes"] += sum(row["source_bytes"] for row in good)
            good.clear()  # encoded, they take less memory
            seconds["parquet"] += time.perf_counter() - started

        for row in rows:
            started = time.perf_counter()
            try:
                good.append(self._extract(row, seconds))
            except DataError as error:
                bad.append(_failure(row, error))
                logger.warning("%s: %s", row["video_id"], bad[-1]["message"])
            took.append((row["video_id"], time.perf_counter() - started))
            if len(good) == _AT_ONCE:
                encode()
        encode()
        # Failures first: a kill between the two writes leaves the good videos pending, and loses none.
        name = part_name_of_group([self.run, *(row["video_id"] for row in rows)], self.generation)
        if bad:
            failures = encode_part("failures", name, table_of(bad, FAILURE_SCHEMA))
            self._put("failures", name, failures, seconds)
        if done["written"]:
            started = time.perf_counter()
            part = encoder.finish(name)
            seconds["parquet"] += time.perf_counter() - started
            self._put("data", name, part, seconds)
        return {
            **done,
            "failed": len(bad),
            "seconds": dict(seconds),
            "began": began,
            "slowest": sorted(took, key=lambda one: -one[1])[:SLOWEST],
        }

    def _put(self, folder: str, name: str, part: memoryview, seconds: dict[str, float]) -> None:
        started = time.perf_counter()
        put_part(self.uri, folder, name, part)
        seconds["write"] += time.perf_counter() - started

    def _extract(self, row: Mapping[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
        extract = self.extract
        started = time.perf_counter()
        with self.source.open(row["uri"]) as video:
            opened = time.perf_counter()
            clip = self._checked(row, video)
            seconds["decode"] += time.perf_counter() - opened
            seconds["fetch"] += opened - started
        frames: Any = clip.frames
        if extract.encoding == "raw":
            missing = extract.num_frames - len(clip.frames)
            frames = b"".join(clip.frames) + bytes(missing * extract.image_size**2 * 3)
        return {
            "video_id": row["video_id"],
            "uri": without_secrets(row["uri"]),
            "start_s": row["start_s"],
            "end_s": row["end_s"],
            # Of the file as it was opened: if it changes meanwhile, the next run sees another version.
            "source_bytes": video.size_bytes,
            "source_version": video.version,
            "num_frames": len(clip.frames),
            "frames": frames,
            "frame_idx": clip.frame_idx,
            "frame_time_s": clip.time_s,
            "width_px": clip.width,
            "height_px": clip.height,
            "fps": clip.fps,
            "duration_s": clip.duration_s,
            "sampling": clip.sampling,
            "container": clip.container,
            "codec": clip.codec,
            "decoder": clip.decoder,
            "decoder_version": clip.decoder_version,
            "complete": clip.complete,
            "note": clip.note,
            "rules": RULES,
        }

    def _checked(self, row: Mapping[str, Any], video: LocalVideo) -> DecodedClip[bytes]:
        """Decodes a clip, and makes sure that a disk failure is not taken for a fault or end of the file."""
        try:
            clip = self._decode(row, video)
        except DataError as error:
            if not error.is_transient:
                check_readable(video.path)
            raise
        if not clip.complete:
            check_readable(video.path)
        return clip

    def _decode(self, row: Mapping[str, Any], video: LocalVideo) -> DecodedClip[bytes]:
        extract = self.extract

        request = ClipRequest(
            video.path,
            start_s=row["start_s"],
            end_s=row["end_s"],
            sampling=extract.sampling,
            sample_fps=extract.sample_fps,
            num_frames=extract.num_frames,
            decoder=extract.decoder,
            image_size=extract.image_size,
            crop=extract.crop,
            encoding=extract.encoding,
            jpeg_quality=extract.jpeg_quality,
        )

        def decode() -> DecodedClip[bytes]:
            return self.process.extract(request, deadline_s=extract.deadline_s, memory_mb=extract.memory_mb)

        try:
            return decode()
        except DecoderCrashError as error:
            # It may have been killed from outside, as when memory is short: not a fault of the file unless it
            # happens again.
            logger.warning("%s: %s; trying once more", row["video_id"], error.what)
            try:
                return decode()
            except DecoderCrashError as second:
                # The content is at fault only if the decoder crashed by itself both times.
                raise second.as_transient() if error.is_transient else second from second.__cause__

    def close(self) -> None:
        """Ends the child process."""
        self.process.close()


def _failure(row: Mapping[str, Any], error: DataError) -> dict[str, Any]:
    return {
        "video_id": row["video_id"],
        "uri": without_secrets(row["uri"]),
        **{key: row[key] for key in IDENTITY},
        "stage": "fetch" if isinstance(error, FetchError) else "decode",
        "error_type": type(error.__cause__ or error).__name__,
        "message": error.what,
        "attempts": row["attempts"] + 1,
        "rules": RULES,
        # A file that vanished during the run may come back, such as one on a disk that was unmounted for an
        # hour.
        "transient": error.is_transient
        or (isinstance(error, GoneError) and row["source_version"] is not None),
    }
