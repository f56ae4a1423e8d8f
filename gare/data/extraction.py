"""Turning rows of the manifest into parts of a frame store, failures included."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gare.config import ExtractConfig
from gare.data.decode_process import DecodeProcess
from gare.data.manifest import Manifest
from gare.data.sources import LocalVideos, VideoSource
from gare.data.store import FAILURE_SCHEMA, frame_schema, ids_in_parts, read_failures, write_part
from gare.errors import DataError, FetchError, shown

logger = logging.getLogger(__name__)


def pending_rows(manifest: Manifest, uri: str, *, retry_failed: bool) -> list[dict[str, Any]]:
    """Rows of the manifest that the store does not hold yet, with the attempts made so far.

    Args:
        manifest: what the store should hold.
        uri: the store.
        retry_failed: whether failed videos are tried again.
    """
    stored = ids_in_parts(uri, "data")
    failures = read_failures(uri, stored)
    rows = []
    for row in manifest.rows:
        failed = failures.get(row.video_id)
        if row.video_id in stored or (failed and not retry_failed):
            continue
        rows.append(
            {
                "video_id": row.video_id,
                "uri": row.uri,
                "start_s": row.start_s,
                "end_s": row.end_s,
                "attempts": int(failed["attempts"]) if failed else 0,
            }
        )
    return rows


def part_size(num_rows: int, workers: int, limit: int) -> int:
    """Videos a part: the limit, or less where the workers would not all have work to the end."""
    return max(1, min(limit, math.ceil(num_rows / (4 * workers))))


class Extractor:
    """Decodes clips in a child process and writes each group of them as one part.

    Args:
        uri: the store.
        extract: its settings.
        source: brings the videos here.
    """

    def __init__(self, uri: str, extract: ExtractConfig, source: VideoSource | None = None) -> None:
        self.uri = uri
        self.extract = extract
        self.source = source or LocalVideos()
        self.schema = frame_schema(extract)
        self.process = DecodeProcess()

    def write(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Extracts rows of ``pending_rows``; the part appears after the last of them.

        Returns:
            Numbers of videos written, videos failed and frames written.

        Raises:
            DataError: if the store cannot be written.
        """
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for row in rows:
            try:
                good.append(self._extract(row))
            except DataError as error:
                bad.append(_failure(row, error))
                logger.warning("%s: %s", row["video_id"], bad[-1]["message"])
        # Failures first: a kill between the two writes leaves the good ones pending, never a video that is
        # neither here nor there.
        group = [row["video_id"] for row in rows]
        if bad:
            write_part(self.uri, "failures", bad, FAILURE_SCHEMA, group)
        if good:
            write_part(self.uri, "data", good, self.schema, group)
        return {"written": len(good), "failed": len(bad), "frames": sum(row["num_frames"] for row in good)}

    def _extract(self, row: Mapping[str, Any]) -> dict[str, Any]:
        extract = self.extract
        with self.source.open(row["uri"]) as video:
            clip = self.process.extract(
                video.path,
                start_s=row["start_s"],
                end_s=row["end_s"],
                sampling=extract.sampling,
                sample_fps=extract.sample_fps,
                num_frames=extract.num_frames,
                decoder=extract.decoder,
                image_size=extract.image_size,
                encoding=extract.encoding,
                jpeg_quality=extract.jpeg_quality,
                deadline_s=extract.deadline_s,
                memory_mb=extract.memory_mb,
            )
        frames: Any = clip.frames
        if extract.encoding == "raw":
            missing = extract.num_frames - len(clip.frames)
            frames = b"".join(clip.frames) + bytes(missing * extract.image_size**2 * 3)
        return {
            "video_id": row["video_id"],
            "uri": shown(row["uri"]),
            "start_s": row["start_s"],
            "end_s": row["end_s"],
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
        }

    def close(self) -> None:
        """Ends the child process."""
        self.process.close()


def _failure(row: Mapping[str, Any], error: DataError) -> dict[str, Any]:
    return {
        "video_id": row["video_id"],
        "uri": shown(row["uri"]),
        "stage": "fetch" if isinstance(error, FetchError) else "decode",
        "error_type": type(error.__cause__ or error).__name__,
        "message": error.what,
        "attempts": row["attempts"] + 1,
    }
