"""Sampling of a clip: moments in seconds, and the frames on screen then. Pure functions.

Three policies, by name:

- ``released``, the released code's rule: one frame per second from the start of the clip; when that gives
  more than F, F of them at equal steps, first and last included, positions truncated to integers.
- ``uniform``: the centres of F equal segments of the clip.
- ``keyframes``: F of the clip's keyframes at equal steps; fast, because nothing else is decoded, and only
  approximate, because the encoder chose the moments.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Sampling = Literal["released", "uniform", "keyframes"]

#: Frame times are multiples of a time base, sampled times of 1/fps: both round. A microsecond covers it.
TOLERANCE_S = 1e-6


def sample_times(start_s: float, end_s: float, fps: float) -> NDArray[np.float64]:
    """Returns times ``start_s + k / fps`` for k = 0, 1, … before ``end_s``; at least ``start_s``.

    Args:
        start_s: start of the clip, seconds, included.
        end_s: end of the clip, seconds, excluded.
        fps: samples per second, above 0.

    Returns:
        Increasing times in seconds, at least one.

    Raises:
        ValueError: if ``fps`` is not a positive number or the clip ends before it starts.
    """
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"fps is {fps}, accepted: a number above 0")
    if not end_s >= start_s:
        raise ValueError(f"the clip ends at {end_s} s, before it starts at {start_s} s")
    count = math.ceil((end_s - start_s - TOLERANCE_S) * fps)
    return start_s + np.arange(max(count, 1), dtype=np.float64) / fps


def uniform_times(start_s: float, end_s: float, num_frames: int) -> NDArray[np.float64]:
    """Returns centres of F equal segments: ``start_s + (k + ½) · (end_s - start_s) / F``, k = 0 … F - 1.

    Args:
        start_s: start of the clip, seconds.
        end_s: end of the clip, seconds.
        num_frames: F.

    Returns:
        F times in seconds; if the clip has fewer pictures, several times show the same one.

    Raises:
        ValueError: if F is below 1 or the clip ends before it starts.
    """
    if num_frames < 1 or not end_s >= start_s:
        raise ValueError(
            f"{num_frames} frames from {start_s} s to {end_s} s; accepted: 1 or more, with start before end"
        )
    centres = np.arange(num_frames, dtype=np.float64) + 0.5
    return start_s + centres * ((end_s - start_s) / num_frames)


def keyframes_within(
    key_times_s: NDArray[np.float64], start_s: float, end_s: float, num_frames: int
) -> NDArray[np.int64]:
    """Returns positions of F of the keyframes in [``start_s``, ``end_s``), by ``equally_spaced``.

    Args:
        key_times_s: presentation times of the keyframes, increasing, at least one.
        start_s: start of the clip, seconds, included.
        end_s: end of the clip, seconds, excluded.
        num_frames: F.

    Returns:
        At most F positions in ``key_times_s``; if no keyframe lies inside, the one nearest to the middle.
    """
    inside = np.flatnonzero((key_times_s >= start_s - TOLERANCE_S) & (key_times_s < end_s - TOLERANCE_S))
    if not len(inside):
        return np.array([np.abs(key_times_s - (start_s + end_s) / 2).argmin()], dtype=np.int64)
    return inside[equally_spaced(len(inside), num_frames)]


def equally_spaced(num_candidates: int, num_frames: int) -> NDArray[np.int64]:
    """Returns positions of the candidates to keep: all, or ``num_frames`` of them at equal steps.

    With more than ``num_frames`` candidates: ``linspace(0, num_candidates - 1, num_frames)`` truncated to
    integers, so the first and the last are included (``num_frames`` = 1 keeps the first).

    Source: "Training and evaluation settings" of the paper's released code.

    Raises:
        ValueError: if either number is below 1.
    """
    if num_candidates < 1 or num_frames < 1:
        raise ValueError(f"{num_candidates} candidates, {num_frames} frames; accepted: 1 or more of each")
    if num_candidates <= num_frames:
        return np.arange(num_candidates, dtype=np.int64)
    return np.linspace(0, num_candidates - 1, num_frames).astype(np.int64)


def frames_on_screen(frame_times_s: NDArray[np.float64], times_s: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns the frame on screen at each time: the last frame with a presentation time not after it.

    A frame is on screen from its presentation time until the next one's. Times before the first frame give
    the first, times after the last frame the last.

    Args:
        frame_times_s: presentation times, increasing, at least one.
        times_s: times to look at.

    Returns:
        For each time a position in ``frame_times_s``.
    """
    found = np.searchsorted(frame_times_s, times_s + TOLERANCE_S, side="right") - 1
    return np.clip(found, 0, len(frame_times_s) - 1).astype(np.int64)
