"""Decoding with torchcodec, an optional extra. This is the only module that imports it."""

from __future__ import annotations

from typing import Any

import numpy as np

from gare.data.decode.backend_pyav import Picture
from gare.data.decode.frame_request import FrameRequest, FrameSelection, UnfitError
from gare.data.decode.packets import explain_error
from gare.data.decode.probe import Probe
from gare.errors import ConfigError

#: Bytes of frames decoded at once; they are held in full size until they are prepared.
_BATCH_BYTES = 64 * 2**20


def unfit_for_torchcodec(source: Probe) -> str:
    """Returns why the packets do not determine the frames or their orientation; empty if they do."""
    if any(source.orientation):
        return "rotated or mirrored"
    if source.traits or source.fault:
        return ", ".join([*sorted(source.traits), source.fault]).strip(", ")
    return "" if len(source.pts) else "no packets"


def decode_with_torchcodec(request: FrameRequest) -> tuple[FrameSelection, list[Picture], str]:
    """Returns the sampled frames, the prepared pictures in the same order, and torchcodec's version.

    Raises:
        ConfigError: if torchcodec or FFmpeg's libraries are not installed.
        UnfitError: if it fails on this file or sees other frames than the packets state.
    """
    try:
        import torchcodec
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"torchcodec cannot be loaded: {explain_error(error)}",
            where="extract.decoder",
            accepted="pip install 'gare[torchcodec]' and FFmpeg's shared libraries, or decoder auto or pyav",
        ) from error
    source = request.source
    selection = request.select(source.pts, source.key_pts, source.end_pts)
    unique, inverse = np.unique(selection.idx, return_inverse=True)
    kept: list[Picture] = []
    try:
        reader = VideoDecoder(
            source.path, stream_index=source.stream_index, dimension_order="NHWC", num_ffmpeg_threads=1
        )
        if len(reader) != len(source.pts):
            raise UnfitError(f"torchcodec counts {len(reader)} frames, the packets are {len(source.pts)}")
        step = max(1, _BATCH_BYTES // (source.width * source.height * 3))
        for first in range(0, len(unique), step):
            wanted = unique[first : first + step]
            batch = reader.get_frames_at(wanted.tolist())
            _check_times(batch.pts_seconds.numpy(), source.pts[wanted] * source.time_base_s)
            kept += [request.prepare(rgb) for rgb in batch.data.numpy()]
    except (RuntimeError, ValueError, IndexError) as error:
        raise UnfitError(f"torchcodec: {explain_error(error)}") from error
    return selection, [kept[place] for place in inverse], torchcodec.__version__


def _check_times(times_s: Any, expected_s: Any) -> None:
    off_s = float(np.abs(times_s - expected_s).max())
    if not off_s <= 1e-3:
        raise UnfitError(f"torchcodec's times differ from the packets' by up to {off_s:g} s")
