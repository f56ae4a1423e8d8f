"""The sampled frames of a clip: decord where it is right, PyAV from the start of the file where it is not.

The probe's packets say which frames exist and when they are shown; a decoder that sees others is not
believed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
from numpy.typing import NDArray

from gare.data.file_kind import file_kind, read_head
from gare.data.from_start import Found, Picture, decode_from_start, least_effort
from gare.data.probe import probe
from gare.data.sampling import Sampling
from gare.data.selection import Request, Selection, UnfitError
from gare.data.with_decord import decode_with_decord, unfit_for_decord
from gare.data.with_torchcodec import decode_with_torchcodec, unfit_for_torchcodec
from gare.errors import DataError

log = logging.getLogger(__name__)

#: Who decodes; auto: decord where it is right, else PyAV. Keyframes alone are always PyAV's.
Decoder = Literal["auto", "pyav", "torchcodec"]


@dataclass(frozen=True, eq=False)
class DecodedClip:
    """The sampled frames of a clip, in order of time.

    Attributes:
        frames: upright RGB pictures (H, W, 3), uint8, or what ``prepare`` made of them.
        frame_idx: position of each among the video's pictures, from 0.
        time_s: presentation time of each: pts × time base, as the file states it.
        sampling: policy by which they were chosen.
        container: short name of the file's container: mov, matroska, avi, …
        codec: FFmpeg's name of the codec.
        decoder: ``decord``, ``pyav`` or ``torchcodec``.
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
    sampling: str
    container: str
    codec: str
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
    sampling: Sampling = "released",
    sample_fps: float = 1.0,
    num_frames: int = 12,
    decoder: Decoder = "auto",
    prepare: Callable[[Picture], Picture] | None = None,
) -> DecodedClip:
    """Samples a clip and keeps at most ``num_frames`` frames, see ``gare.data.sampling``.

    Frames are taken by presentation time. Seconds count from the file's zero, as in a player; the clip ends
    with the video where ``end_s`` lies beyond it. Of a damaged file the frames that really decode count: the
    clip is sampled over those, no frame twice, and marked as not ``complete``. A file that changes while it
    is read is refused: its pictures may be of two files.

    Args:
        path: a local video file.
        start_s: start of the clip; None: the first picture.
        end_s: end of the clip; None: the end of the last picture.
        sampling: policy, see ``gare.data.sampling``.
        sample_fps: samples per second of the policy ``released``.
        num_frames: F, most frames to keep.
        decoder: who decodes; where another than PyAV is not right, PyAV does.
        prepare: applied to each frame as soon as it is decoded, so that no more than the small results are
            held; None keeps the frames as they are.

    Raises:
        DataError: if the file is no video, no frame of the clip decodes, the clip starts beyond its end, or
            the file changed meanwhile.
        ConfigError: if the decoder is not installed.
        MemoryError: if a picture does not fit into this process's memory.
    """
    before = _state(path)
    try:
        clip = _decode(
            Request(probe(path), start_s, end_s, sampling, sample_fps, num_frames, prepare or np.asarray),
            decoder,
        )
    except DataError as error:
        _check_unchanged(path, before, error)
        raise
    _check_unchanged(path, before)
    return clip


def _state(path: str | Path) -> tuple[int, ...] | None:
    """What tells whether a file is still the same; None where there is none (``probe`` says why)."""
    try:
        stat = Path(path).stat()
    except (OSError, ValueError):
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _check_unchanged(
    path: str | Path, before: tuple[int, ...] | None, cause: BaseException | None = None
) -> None:
    if _state(path) != before:
        raise DataError(
            "changed while it was read",
            where=str(Path(path).absolute()),
            accepted="a file that nobody is writing; the next run tries it again",
        ).passing() from cause


def _decode(request: Request, decoder: Decoder) -> DecodedClip:
    source = request.source
    reason, decode = "", decode_with_decord
    if decoder == "pyav" or request.sampling == "keyframes":
        reason = "as asked"
    elif decoder == "torchcodec":
        reason, decode = unfit_for_torchcodec(source), decode_with_torchcodec
    else:
        reason = unfit_for_decord(source)
    if not reason:
        try:
            selection, frames, version = decode(request)
            name = "torchcodec" if decoder == "torchcodec" else "decord"
            return _clip(request, selection, frames, selection.idx, name, version)
        except UnfitError as unfit:
            reason = str(unfit)
    log.debug("%s: decoded with PyAV: %s", source.path, reason)
    return _decode_with_pyav(request)


def _clip(
    request: Request,
    selection: Selection,
    frames: list[Picture],
    frame_idx: NDArray[np.int64],
    decoder: str,
    version: str,
    *,
    complete: bool = True,
) -> DecodedClip:
    source = request.source
    return DecodedClip(
        frames=frames,
        frame_idx=frame_idx,
        time_s=(selection.pts * source.time_base_s).astype(np.float64),
        sampling=request.sampling,
        container=source.container,
        codec=source.codec,
        decoder=decoder,
        decoder_version=version,
        width=source.width,
        height=source.height,
        fps=source.fps or 0.0,
        duration_s=selection.duration_s,
        complete=complete,
        note=selection.note,
    )


def _decode_with_pyav(request: Request) -> DecodedClip:
    """The packets name the frames; where they do not, or not truly, a first pass finds what decodes."""
    source = request.source
    if len(source.pts) and not source.fault and "no timestamps" not in source.traits:
        selection = request.select(source.pts, source.key_pts, source.end_pts)
        effort = least_effort(source, keyframes=request.sampling == "keyframes")
        found = decode_from_start(source, selection.ticks, request.prepare, effort)
        if not found.damage and found.has_all(selection.ticks):
            idx = _places(found, selection) if effort == "all" else selection.idx
            return _pyav_clip(request, selection, found, idx)
    seen = decode_from_start(source, set(), request.prepare)
    damage = source.fault or seen.damage
    if not seen.order:
        kind = file_kind(read_head(source.path) or b" ")
        reason = damage or "its video stream is empty"
        what = f"no frame decodes: it is {kind} ({reason})" if kind else f"no frame decodes: {reason}"
        raise DataError(what, where=source.path, accepted="a video with at least one whole frame")
    pts, key_pts = (np.array(sorted(ticks), dtype=np.int64) for ticks in (seen.order, seen.keys))
    selection = request.select(pts, key_pts, seen.end_pts, damage)
    found = decode_from_start(source, selection.ticks, request.prepare)
    if not found.has_all(selection.ticks):
        raise DataError("decodes differently each time", where=source.path)
    return _pyav_clip(request, selection, found, _places(found, selection), complete=not damage)


def _places(found: Found, selection: Selection) -> NDArray[np.int64]:
    return np.array([found.order[tick] for tick in selection.pts.tolist()], dtype=np.int64)


def _pyav_clip(
    request: Request,
    selection: Selection,
    found: Found,
    frame_idx: NDArray[np.int64],
    *,
    complete: bool = True,
) -> DecodedClip:
    frames = [found.kept[tick] for tick in selection.pts.tolist()]
    return _clip(request, selection, frames, frame_idx, "pyav", av.__version__, complete=complete)
