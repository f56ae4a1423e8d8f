"""Turning rows of the manifest into parts of a frame store, failures included."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from gare.config import ExtractConfig
from gare.data.decode.process import DecodeProcess, DecoderCrashError, ExtractedClip
from gare.data.store.contents import FAILURE_SCHEMA, IDENTITY, RULES, frame_schema
from gare.data.store.parts import encode_part, name_of, put_part, table_of
from gare.data.videos import LocalVideo, LocalVideos, VideoSource, check_readable
from gare.errors import DataError, FetchError, GoneError, shown

logger = logging.getLogger(__name__)

#: So many videos of a part, and of a run, are named with their seconds.
SLOWEST = 10


def cut_into_parts(
    rows: Sequence[Mapping[str, Any]], workers: int, limit: int
) -> list[list[Mapping[str, Any]]]:
    """Rows as parts in the order in which they are best begun: large files first, small parts last.

    Args:
        rows: with ``source_bytes``, None where that is not known.
        workers: that take parts as they get free; at the end all should have work for about as long.
        limit: rows of a part at most.
    """
    left = sorted(rows, key=lambda row: -(row["source_bytes"] or 0))
    parts = []
    while left:
        size = min(limit, math.ceil(len(left) / (3 * workers)))
        parts.append(left[:size])
        left = left[size:]
    return parts


class MendedFinder:
    """Looks in a child process for files of which an earlier version may have taken other frames.

    Args:
        extract: settings of the store.
        source: brings the videos here.
    """

    def __init__(self, extract: ExtractConfig, source: VideoSource) -> None:
        self.extract, self.source = extract, source
        self.process = DecodeProcess()

    def find(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Looks at the files of rows of ``StoreUpdate.decoded_before``.

        Returns:
            ``traits``: those of files that show one, by id; ``unknown``: why others could not be looked at;
            ``written``: how many were.
        """
        traits: dict[str, str] = {}
        unknown: dict[str, str] = {}
        for row in rows:
            try:
                with self.source.open(row["uri"]) as video:
                    if (video.size_bytes, video.version) != (row["source_bytes"], row["source_version"]):
                        continue  # a changed file is made again in any case
                    trait = self.process.look(
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
    """Decodes clips in a child process and writes each group of them as one part.

    Args:
        uri: the store.
        extract: its settings.
        source: brings the videos here.
        run: what tells this run's parts from those of others, such as an earlier one over the same clips.
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
        # Both take seconds at first, which the first video need not wait for.
        self.process.start()
        table_of([], self.schema)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Extracts rows of ``gare.extract.comparison.compare``; the part appears after the last of them.

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
        for row in rows:
            started = time.perf_counter()
            try:
                good.append(self._extract(row, seconds))
            except DataError as error:
                bad.append(_failure(row, error))
                logger.warning("%s: %s", row["video_id"], bad[-1]["message"])
            took.append((row["video_id"], time.perf_counter() - started))
        # Failures first: a kill between the two writes leaves the good ones pending, never a video that is
        # neither here nor there.
        name = name_of([self.run, *(row["video_id"] for row in rows)], self.generation)
        for folder, ended, schema in (("failures", bad, FAILURE_SCHEMA), ("data", good, self.schema)):
            if ended:
                started = time.perf_counter()
                part = encode_part(folder, name, table_of(ended, schema))
                encoded = time.perf_counter()
                put_part(self.uri, folder, name, part)
                seconds["parquet"] += encoded - started
                seconds["write"] += time.perf_counter() - encoded
        return {
            "written": len(good),
            "failed": len(bad),
            "frames": sum(row["num_frames"] for row in good),
            "bytes": sum(row["source_bytes"] for row in good),
            "seconds": dict(seconds),
            "began": began,
            "slowest": sorted(took, key=lambda one: -one[1])[:SLOWEST],
        }

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
            "uri": shown(row["uri"]),
            "start_s": row["start_s"],
            "end_s": row["end_s"],
            # Of the file as it was opened: one that changes meanwhile is another version to the next run.
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

    def _checked(self, row: Mapping[str, Any], video: LocalVideo) -> ExtractedClip:
        """The clip; what a disk did not give is never taken for a fault or the end of the file."""
        try:
            clip = self._decode(row, video)
        except DataError as error:
            if not error.may_pass:
                check_readable(video.path)
            raise
        if not clip.complete:
            check_readable(video.path)
        return clip

    def _decode(self, row: Mapping[str, Any], video: LocalVideo) -> ExtractedClip:
        extract = self.extract

        def once() -> ExtractedClip:
            return self.process.extract(
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
                deadline_s=extract.deadline_s,
                memory_mb=extract.memory_mb,
            )

        try:
            return once()
        except DecoderCrashError as error:
            # Somebody may have killed it, as the system does when memory is short: no fault of the file
            # until it happens to it again.
            logger.warning("%s: %s; trying once more", row["video_id"], error.what)
            try:
                return once()
            except DecoderCrashError as second:
                # The content alone is to blame where it has brought down the decoder both times.
                raise second.passing() if error.may_pass else second from second.__cause__

    def close(self) -> None:
        """Ends the child process."""
        self.process.close()


def _failure(row: Mapping[str, Any], error: DataError) -> dict[str, Any]:
    return {
        "video_id": row["video_id"],
        "uri": shown(row["uri"]),
        **{key: row[key] for key in IDENTITY},
        "stage": "fetch" if isinstance(error, FetchError) else "decode",
        "error_type": type(error.__cause__ or error).__name__,
        "message": error.what,
        "attempts": row["attempts"] + 1,
        "rules": RULES,
        # What was there when the run began and then was not may be back as it was, of a disk that was
        # unmounted for an hour.
        "transient": error.may_pass or (isinstance(error, GoneError) and row["source_version"] is not None),
    }
