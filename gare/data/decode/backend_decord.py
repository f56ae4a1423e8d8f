"""Decoding with decord, which is fast because it seeks. This is the only module that imports decord.

For edit lists, open GOPs, AVI and packets without a picture of their own, decord silently returns wrong
pictures. ``unfit_for_decord`` recognises such files, and decord's list of frames must agree with the packets,
too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gare.data.decode.backend_pyav import Picture, decode_from_start
from gare.data.decode.frame_request import FrameRequest, FrameSelection, UnfitError
from gare.data.decode.packets import explain_error
from gare.data.decode.probe import Probe
from gare.errors import DataError

#: Containers, codecs and pixel formats on which decord 0.6 gave the pictures of a decode from the start.
_DECORD_CONTAINERS = frozenset({"mov", "matroska"})
_DECORD_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "mpeg4"})
_DECORD_PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p"})
#: Bytes of a batch of decord's, which are held beside the wanted frames.
_BATCH_BYTES = 64 * 2**20


def unfit_for_decord(source: Probe) -> str:
    """Returns why decord cannot be trusted with this file; empty if it can."""
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


def decode_with_decord(request: FrameRequest) -> tuple[FrameSelection, list[Picture], str]:
    """Returns the sampled frames, the prepared pictures in the same order, and decord's version.

    Raises:
        UnfitError: if decord cannot be trusted with this file after all.
        MemoryError: if a picture does not fit into this process's memory.
    """
    source = request.source
    selection = request.select(source.pts, source.key_pts, source.end_pts)
    unique, inverse = np.unique(selection.idx, return_inverse=True)
    try:
        import decord
    except (ImportError, OSError) as error:
        raise UnfitError(f"decord cannot be loaded: {error}") from error
    # decord reports concealed damage only on stderr, where ``DecodeProcess`` looks for it.
    decord.logging.set_level(decord.logging.INFO)
    kept: list[Picture] = []
    flat: list[int] = []
    reader = None
    try:
        reader = decord.VideoReader(source.path, num_threads=1)
        _check_agreement(reader, source)
        step = max(1, _BATCH_BYTES // (source.width * source.height * 3))
        for first in range(0, len(unique), step):
            batch = reader.get_batch(unique[first : first + step]).asnumpy()
            kept += [request.prepare(rgb) for rgb in batch]
            flat += [int(source.pts[unique[first + k]]) for k, rgb in enumerate(batch) if _is_flat(rgb)]
    except (UnfitError, DataError, MemoryError, BlockingIOError):
        raise
    except Exception as error:  # decord's errors have no common base class
        raise UnfitError(f"decord: {explain_error(error)}") from error
    finally:
        del reader  # an idle reader keeps decoding and holds memory
    if flat:
        _check_flat(source, frozenset(flat))
    return selection, [kept[place] for place in inverse], decord.__version__


def _is_flat(rgb: Picture) -> bool:
    """Returns True if all pixels are the same: zeros, or the grey of a picture with a lost reference."""
    return bool((rgb[0] == rgb[0, 0]).all() and (rgb == rgb[0, 0]).all())


def _check_flat(source: Probe, flat: frozenset[int]) -> None:
    """Checks with PyAV if flat pictures are in the file or silently made by decord from damage."""
    found = decode_from_start(source, flat, lambda rgb: np.array([not _is_flat(rgb)], dtype=np.uint8))
    if found.damage or not found.has_all(flat) or any(seen.any() for seen in found.kept.values()):
        raise UnfitError("decord gives flat pictures that are not in the file")


def _check_agreement(reader: Any, source: Probe) -> None:
    """Checks that the reader sees the frames of the packets, at their times (its clock starts at 0)."""
    if len(reader) != len(source.pts):
        raise UnfitError(f"decord counts {len(reader)} frames, the packets are {len(source.pts)}")
    times_s = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
    expected_s = source.pts * source.time_base_s
    off_s = np.abs((times_s - times_s[0]) - (expected_s - expected_s[0])).max()
    # decord's times are float32, which grow coarse in a long video.
    if not off_s <= 1e-3 + 1e-6 * float(expected_s[-1] - expected_s[0]):
        raise UnfitError(f"decord's times differ from the packets' by up to {off_s:g} s")
