"""The sampled frames of a clip: decord where it is right, PyAV from the start of the file where it is not.

decord is fast because it seeks, and silently returns other pictures than the wanted ones on edit lists, open
GOPs, AVI and packets without a picture of their own. ``unfit_for_decord`` sends those to PyAV; decord's own
list of frames must agree with the packets, too. This is the only module that imports decord.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from gare.data.from_start import Picture, decode_from_start
from gare.data.probe import Probe, explain, probe
from gare.data.sampling import choose, sample_times, shown_at
from gare.errors import DataError

log = logging.getLogger(__name__)

#: Containers, codecs and pixel formats on which decord 0.6 gave the pictures of a decode from the start.
_DECORD_CONTAINERS = frozenset({"mov", "matroska"})
_DECORD_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "mpeg4"})
_DECORD_PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p"})
#: decord hands out whole batches; this bounds what one holds beside the wanted frames.
_BATCH_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class DecodedClip:
    """The sampled frames of a clip, in order of time.

    Attributes:
        frames: upright RGB pictures (H, W, 3), uint8, or what ``prepare`` made of them.
        frame_idx: position of each in the video, counted in decoding order from 0.
        time_s: presentation time of each: pts × time base, as the file states it.
        decoder: ``decord`` or ``pyav``.
        decoder_version: version of it.
        width: pixels of the upright source picture.
        height: pixels of the upright source picture.
        fps: average frames per second by the header, 0 if unknown.
        duration_s: seconds from the file's zero to the end of the last picture (not of the clip).
        complete: False if the file is damaged, so that some sampled frames may be missing.
        note: what a person should know about the clip; empty if there is nothing.
    """

    frames: list[Picture]
    frame_idx: NDArray[np.int64]
    time_s: NDArray[np.float64]
    decoder: str
    decoder_version: str
    width: int
    height: int
    fps: float
    duration_s: float
    complete: bool = True
    note: str = ""


def decode_clip(
    path: str | Path,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    sample_fps: float = 1.0,
    num_frames: int = 12,
    prepare: Callable[[Picture], Picture] | None = None,
) -> DecodedClip:
    """Samples a clip at ``sample_fps`` and keeps at most ``num_frames`` frames, see ``gare.data.sampling``.

    Frames are taken by presentation time. Seconds count from the file's zero, as in a player; the clip ends
    with the video where ``end_s`` lies beyond it. Of a damaged file the frames that really decode count: the
    clip is sampled over those, no frame twice, and marked as not ``complete``.

    Args:
        path: a local video file.
        start_s: start of the clip; None: the first picture.
        end_s: end of the clip; None: the end of the last picture.
        sample_fps: samples per second.
        num_frames: F, most frames to keep.
        prepare: applied to each frame as soon as it is decoded, so that no more than the small results are
            held; None keeps the frames as they are.

    Raises:
        DataError: if the file is no video, no frame of the clip decodes, or the clip starts beyond its end.
    """
    source = probe(path)
    request = _Request(source, start_s, end_s, sample_fps, num_frames, prepare or np.asarray)
    reason = unfit_for_decord(source)
    if not reason:
        try:
            return _decode_with_decord(request)
        except _Unfit as unfit:
            reason = str(unfit)
    log.debug("%s: decoded with PyAV: %s", source.path, reason)
    return _decode_with_pyav(request)


def unfit_for_decord(source: Probe) -> str:
    """Why decord cannot be trusted with this file; empty if it can."""
    if source.container not in _DECORD_CONTAINERS:
        return f"container {source.container}"
    if source.codec not in _DECORD_CODECS:
        return f"codec {source.codec}"
    if source.pixel_format not in _DECORD_PIXEL_FORMATS:
        return f"pixel format {source.pixel_format or 'unknown'}"
    if source.width % 2 or source.height % 2:
        return f"odd size {source.width}x{source.height}"
    if any(source.orientation):
        return "rotated or mirrored"
    if source.num_video_streams > 1:
        return f"{source.num_video_streams} video streams"
    if source.traits or source.fault:
        return ", ".join([*sorted(source.traits), source.fault]).strip(", ")
    return "" if len(source.pts) else "no packets"


class _Unfit(Exception):  # noqa: N818  no fault of the input
    """decord disagrees with the packets or fails."""


@dataclass(frozen=True, eq=False)
class _Selection:
    """The frames to keep, as positions in a list of frames and as ticks, each possibly more than once."""

    idx: NDArray[np.int64]
    pts: NDArray[np.int64]
    duration_s: float
    note: str


@dataclass(frozen=True)
class _Request:
    source: Probe
    start_s: float | None
    end_s: float | None
    sample_fps: float
    num_frames: int
    prepare: Callable[[Picture], Picture]

    def select(self, pts: NDArray[np.int64], end_pts: int, damage: str) -> _Selection:
        """Samples a video whose pictures are shown from the given ticks on, the last until ``end_pts``."""
        times_s = (pts * self.source.time_base_s).astype(np.float64)
        video_end_s = max(end_pts * self.source.time_base_s, float(times_s[-1]))
        start_s, end_s = self._bounds(float(times_s[0]), video_end_s, damage)
        candidates = shown_at(times_s, sample_times(start_s, end_s, self.sample_fps))
        if damage:  # one frame would otherwise stand in for the lost ones that follow it
            candidates = np.unique(candidates)
        idx = candidates[choose(len(candidates), self.num_frames)]
        duration_s = video_end_s - self.source.origin_s
        short = self.end_s is not None and self.source.origin_s + self.end_s > video_end_s + 1e-3
        note = f"end_s {self.end_s:g} lies beyond the video's {duration_s:.2f} s" if short else ""
        return _Selection(idx, pts[idx], duration_s, "; ".join(text for text in (damage, note) if text))

    def _bounds(self, first_s: float, last_s: float, damage: str) -> tuple[float, float]:
        """Start and end of the clip on the file's clock."""
        origin_s, path = self.source.origin_s, self.source.path
        lasts = f"the video lasts {last_s - origin_s:.2f} s" + (f" ({damage})" if damage else "")
        start_s, end_s = first_s, last_s
        if self.start_s is not None:
            start_s = max(first_s, origin_s + self.start_s)
            if start_s >= last_s and start_s > first_s:
                what = f"the clip starts at {self.start_s:g} s, {lasts}"
                raise DataError(what, where=path, accepted="start_s below the duration")
        if self.end_s is not None:
            end_s = min(last_s, origin_s + self.end_s)
            if end_s <= start_s and start_s < last_s:
                what = f"the clip ends at {self.end_s:g} s, no picture is shown before that; {lasts}"
                raise DataError(what, where=path, accepted="end_s above start_s")
        return start_s, end_s


def _clip(request: _Request, selection: _Selection, **rest: Any) -> DecodedClip:
    source = request.source
    return DecodedClip(
        time_s=(selection.pts * source.time_base_s).astype(np.float64),
        width=source.width,
        height=source.height,
        fps=source.fps or 0.0,
        duration_s=selection.duration_s,
        note=selection.note,
        **rest,
    )


def _decode_with_decord(request: _Request) -> DecodedClip:
    source = request.source
    selection = request.select(source.pts, source.end_pts, "")
    unique, inverse = np.unique(selection.idx, return_inverse=True)
    try:
        import decord
    except (ImportError, OSError) as error:
        raise _Unfit(f"decord cannot be loaded: {error}") from error
    decord.logging.set_level(decord.logging.QUIET)
    kept: list[Picture] = []
    empty: list[int] = []
    reader = None
    try:
        reader = decord.VideoReader(source.path, num_threads=1)
        _check_agreement(reader, source)
        step = max(1, _BATCH_BYTES // (source.width * source.height * 3))
        for first in range(0, len(unique), step):
            batch = reader.get_batch(unique[first : first + step]).asnumpy()
            kept += [request.prepare(rgb) for rgb in batch]
            empty += [int(source.pts[unique[first + k]]) for k, rgb in enumerate(batch) if not rgb.any()]
    except (_Unfit, DataError):
        raise
    except Exception as error:  # decord's errors have no base of their own
        raise _Unfit(f"decord: {explain(error)}") from error
    finally:
        del reader  # an idle reader keeps decoding and holds memory
    if empty:
        _check_black(source, frozenset(empty))
    return _clip(
        request,
        selection,
        frames=[kept[place] for place in inverse],
        frame_idx=selection.idx,
        decoder="decord",
        decoder_version=decord.__version__,
    )


def _check_black(source: Probe, empty: frozenset[int]) -> None:
    """Pictures of zeros: a fade from black, or buffers that decord never filled. PyAV tells which."""
    found = decode_from_start(source, empty, lambda rgb: np.array([rgb.any()], dtype=np.uint8))
    if not found.has_all(empty) or any(seen.any() for seen in found.kept.values()):
        raise _Unfit("decord gives pictures of zeros that are not black")


def _check_agreement(reader: Any, source: Probe) -> None:
    """The reader must see the frames that the packets announce, at their times (its clock starts at 0)."""
    if len(reader) != len(source.pts):
        raise _Unfit(f"decord counts {len(reader)} frames, the packets are {len(source.pts)}")
    times_s = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
    expected_s = source.pts * source.time_base_s
    off_s = np.abs((times_s - times_s[0]) - (expected_s - expected_s[0])).max()
    # decord's times are float32, which grow coarse in a long video.
    if not off_s <= 1e-3 + 1e-6 * float(expected_s[-1] - expected_s[0]):
        raise _Unfit(f"decord's times differ from the packets' by up to {off_s:g} s")


def _decode_with_pyav(request: _Request) -> DecodedClip:
    """The packets name the frames; where they do not, or not truly, a first pass finds what decodes."""
    source = request.source
    selection = None
    if len(source.pts) and "no timestamps" not in source.traits:
        selection = request.select(source.pts, source.end_pts, source.fault)
    found = decode_from_start(source, _ticks(selection), request.prepare)
    if selection is None or found.damage or not found.has_all(_ticks(selection)):
        damage = source.fault or found.damage
        if not found.order:
            what = f"no frame decodes: {damage or 'its video stream is empty'}"
            raise DataError(what, where=source.path, accepted="a video with at least one whole frame")
        if not found.at_end:
            found = decode_from_start(source, set(), request.prepare)
        pts = np.array(sorted(found.order), dtype=np.int64)
        selection = request.select(pts, found.end_pts, damage)
        found = decode_from_start(source, _ticks(selection), request.prepare)
        if not found.has_all(_ticks(selection)):
            raise DataError("decodes differently each time", where=source.path)
    return _clip(
        request,
        selection,
        frames=[found.kept[tick] for tick in selection.pts.tolist()],
        frame_idx=np.array([found.order[tick] for tick in selection.pts.tolist()], dtype=np.int64),
        decoder="pyav",
        decoder_version=av.__version__,
        complete=not (source.fault or found.damage),
    )


def _ticks(selection: _Selection | None) -> set[int]:
    return set(selection.pts.tolist()) if selection else set()
