"""Decoding of a clip's sampled frames: with decord if it is right for the file, else with PyAV.

The probe's packets determine the frames and their times; a decoder that sees other frames is not trusted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Set
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from gare.data.decode.backend_decord import decode_with_decord, unfit_for_decord
from gare.data.decode.backend_pyav import DecodeResult, Picture, decode_from_start, least_effort
from gare.data.decode.backend_torchcodec import decode_with_torchcodec, unfit_for_torchcodec
from gare.data.decode.clip_request import Decoder
from gare.data.decode.decoded_clip import DecodedClip
from gare.data.decode.file_kind import file_kind, read_head
from gare.data.decode.frame_request import FrameRequest, FrameSelection, UnfitError
from gare.data.decode.packets import DECODING_ORDER
from gare.data.decode.probe import Probe, probe
from gare.data.decode.sampling import Sampling
from gare.errors import DataError

log = logging.getLogger(__name__)

#: Seconds at the start that may fail to decode without a fault: many cameras begin with an open GOP.
LATE_START_S = 0.5


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
) -> DecodedClip[Picture]:
    """Samples a clip and keeps at most ``num_frames`` frames, see ``gare.data.decode.sampling``.

    Frames are taken by presentation time. Seconds count from the file's zero, as in a player; the clip ends
    with the video if ``end_s`` lies beyond it. A clip of a damaged file is sampled over the frames that
    really decode, no frame twice, and marked as not ``complete``. A file that changes while it is read is
    refused: its pictures may belong to two files.

    Args:
        path: a local video file.
        start_s: start of the clip; None: the first picture.
        end_s: end of the clip; None: the end of the last picture.
        sampling: policy, see ``gare.data.decode.sampling``.
        sample_fps: samples per second of the policy ``released``.
        num_frames: F, most frames to keep.
        decoder: decoder to use; PyAV replaces another one that is not right for the file.
        prepare: applied to each frame as soon as it is decoded, so that only the small results are held; None
            keeps the frames as they are.

    Raises:
        DataError: if the file is not a video, no frame of the clip decodes, the clip starts beyond its end,
            or the file changed meanwhile.
        ConfigError: if the decoder is not installed.
        MemoryError: if a picture does not fit into this process's memory.
    """
    before = _state(path)
    try:
        clip = _decode(
            FrameRequest(
                probe(path), start_s, end_s, sampling, sample_fps, num_frames, prepare or np.asarray
            ),
            decoder,
        )
    except DataError as error:
        _check_unchanged(path, before, error)
        raise
    _check_unchanged(path, before)
    return clip


def _state(path: str | Path) -> tuple[int, ...] | None:
    """Reads a file's inode, size and time of change; None if there is no file (``probe`` reports why)."""
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
        ).as_transient() from cause


def _decode(request: FrameRequest, decoder: Decoder) -> DecodedClip[Picture]:
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
    request: FrameRequest,
    selection: FrameSelection,
    frames: list[Picture],
    frame_idx: NDArray[np.int64],
    decoder: str,
    version: str,
    *,
    complete: bool = True,
) -> DecodedClip[Picture]:
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


def _decode_with_pyav(request: FrameRequest) -> DecodedClip[Picture]:
    """Decodes the frames named by the packets; if these are wrong, a first pass finds what decodes."""
    source = request.source
    seen: DecodeResult | None = None
    if len(source.pts) and not source.fault and "no timestamps" not in source.traits:
        late = _LateStart(request)
        selection = request.select(source.pts, source.key_pts, source.end_pts)
        effort = least_effort(source, keyframes=request.sampling == "keyframes")
        times = dict(enumerate(source.pts.tolist())) if DECODING_ORDER in source.traits else None
        found = decode_from_start(
            source,
            selection.ticks,
            request.prepare,
            effort,
            times=times,
            by_packets=True,
            choose_again=late.select,
        )
        selection = late.selection or selection
        if not (found.damage or found.runs_backwards) and found.has_all(selection.ticks):
            idx = _places(source, found, selection, alone=effort == "alone")
            return _pyav_clip(request, selection, found, idx, complete=not late.is_long)
        if found.at_end and effort == "all" and times is None:
            seen = found
    return _decode_what_decodes(request, seen)


def _decode_what_decodes(request: FrameRequest, seen: DecodeResult | None) -> DecodedClip[Picture]:
    """Samples a clip over the frames that really decode.

    Args:
        request: the clip.
        seen: result of decoding the whole file; None if that is still to be done.
    """
    source = request.source
    seen = seen or decode_from_start(source, set(), request.prepare)
    damage = source.fault or seen.damage
    heeds_log = bool(seen.order) or not source.is_intra_only
    if not heeds_log:  # rather all pictures, as damaged, than none
        seen = decode_from_start(source, set(), request.prepare, heeds_log=False)
    if not seen.order:
        kind = file_kind(read_head(source.path) or b" ")
        reason = damage or "its video stream is empty"
        what = f"no frame decodes: it is {kind} ({reason})" if kind else f"no frame decodes: {reason}"
        raise DataError(what, where=source.path, accepted="a video with at least one whole frame")
    pts, key_pts = (np.array(sorted(ticks), dtype=np.int64) for ticks in (seen.order, seen.keys))
    remark = ""
    if not damage and len(source.pts):
        remark = _late_by(source, int(pts[0]))
    selection = request.select(pts, key_pts, seen.end_pts, damage, remark)
    times = None
    if seen.runs_backwards and not _has_hole(pts):
        times = dict(zip(sorted(seen.order.values()), pts.tolist(), strict=True))
    found = decode_from_start(source, selection.ticks, request.prepare, times=times, heeds_log=heeds_log)
    if not found.has_all(selection.ticks):
        raise DataError("decodes differently each time", where=source.path)
    idx = _places(source, found, selection)
    return _pyav_clip(request, selection, found, idx, complete=not (damage or remark))


def _has_hole(pts: NDArray[np.int64]) -> bool:
    """True if pictures seem to be lost, after which decoders return some out of presentation order."""
    steps = np.diff(pts)
    return bool(len(steps) and steps.max() > 10 * np.median(steps))


def _late_by(source: Probe, first: int) -> str:
    """Describes how much is missing before the first picture that decodes; empty if it is negligible."""
    missing_s = (first - int(source.pts[0])) * source.time_base_s
    return f"its first {missing_s:.2f} s do not decode" if missing_s > LATE_START_S else ""


class _LateStart:
    """A new choice of frames for files with first pictures that do not decode.

    Args:
        request: the clip.

    Attributes:
        selection: the new choice among pictures that decode; None if the first picture decodes.
        is_long: True if so much is missing that a person should know.
    """

    def __init__(self, request: FrameRequest) -> None:
        self.request = request
        self.selection: FrameSelection | None = None
        self.is_long = False

    def select(self, first: int, wanted: Set[int]) -> set[int] | None:
        """Samples the video from its first picture that decodes, if the clip begins before it.

        Args:
            first: its tick.
            wanted: the frames that were chosen.

        Returns:
            Ticks of the frames to keep instead; None if nothing changes.
        """
        source = self.request.source
        note = _late_by(source, first)
        if min(wanted) >= first and not (note and self._begins_before(first)):
            return None
        self.is_long = bool(note)
        pts, key_pts = (ticks[ticks >= first] for ticks in (source.pts, source.key_pts))
        self.selection = self.request.select(pts, key_pts, source.end_pts, remark=note)
        return self.selection.ticks

    def _begins_before(self, first: int) -> bool:
        # Keyframes are decoded alone, so the first one says nothing about other pictures.
        request, source = self.request, self.request.source
        starts_s = -np.inf if request.start_s is None else source.origin_s + request.start_s
        return request.sampling != "keyframes" and starts_s < first * source.time_base_s


def _places(
    source: Probe, found: DecodeResult, selection: FrameSelection, *, alone: bool = False
) -> NDArray[np.int64]:
    """Returns positions among the video's pictures: by its packets if each is a picture, else as decoded.

    Pictures that were decoded alone have no position in decoding order.
    """
    unclear = source.interlaced or {"no timestamps", "shared timestamps"} & source.traits
    if len(source.pts) and (alone or not unclear):
        return np.searchsorted(source.pts, selection.pts).astype(np.int64)
    return np.array([found.order[tick] for tick in selection.pts.tolist()], dtype=np.int64)


def _pyav_clip(
    request: FrameRequest,
    selection: FrameSelection,
    found: DecodeResult,
    frame_idx: NDArray[np.int64],
    *,
    complete: bool = True,
) -> DecodedClip[Picture]:
    frames = [found.kept[tick] for tick in selection.pts.tolist()]
    return _clip(request, selection, frames, frame_idx, "pyav", av.__version__, complete=complete)
