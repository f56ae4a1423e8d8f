"""Choice of a clip's pictures: a sampling policy over the times at which they are shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gare.data.decode.backend_pyav import Picture
from gare.data.decode.probe import Probe
from gare.data.decode.sampling import (
    Sampling,
    equally_spaced,
    frames_on_screen,
    keyframes_within,
    sample_times,
    uniform_times,
)
from gare.errors import DataError


class UnfitError(Exception):
    """A decoder that disagrees with the packets or fails; another decoder may still read the file."""


@dataclass(frozen=True, eq=False)
class FrameSelection:
    """The frames to keep, as positions in a list of frames and as ticks, each possibly more than once.

    Attributes:
        idx: positions in the given list of frames.
        pts: their presentation times in ticks.
        duration_s: seconds from the file's zero to the end of the last picture.
        note: remark about the clip for a person; empty if there is none.
    """

    idx: NDArray[np.int64]
    pts: NDArray[np.int64]
    duration_s: float
    note: str

    @property
    def ticks(self) -> set[int]:
        """Set of the ticks."""
        return set(self.pts.tolist())


@dataclass(frozen=True)
class FrameRequest:
    """A clip to be decoded; the fields are ``decode_clip``'s arguments.

    Attributes:
        source: facts about the file.
        start_s: start of the clip, seconds from the file's zero.
        end_s: end of the clip, likewise.
        sampling: policy.
        sample_fps: samples per second of the policy ``released``.
        num_frames: F.
        prepare: applied to each frame.
    """

    source: Probe
    start_s: float | None
    end_s: float | None
    sampling: Sampling
    sample_fps: float
    num_frames: int
    prepare: Callable[[Picture], Picture]

    def select(
        self,
        pts: NDArray[np.int64],
        key_pts: NDArray[np.int64],
        end_pts: int,
        damage: str = "",
        remark: str = "",
    ) -> FrameSelection:
        """Chooses the clip's frames among a video's pictures.

        Args:
            pts: ticks at which its pictures are first shown, increasing.
            key_pts: ticks of the keyframes.
            end_pts: tick at which the last picture ends.
            damage: why pictures may be missing; empty if none are.
            remark: further remark for a person; empty if there is none.

        Raises:
            DataError: if the clip lies outside the video, or keyframes are wanted and there are none.
        """
        times_s = (pts * self.source.time_base_s).astype(np.float64)
        video_end_s = max(end_pts * self.source.time_base_s, float(times_s[-1]))
        start_s, end_s = self._bounds(float(times_s[0]), video_end_s, damage)
        notes = [damage, remark, self.source.remark]
        if self.sampling == "keyframes":
            idx = np.searchsorted(pts, self._keyframes(key_pts, start_s, end_s))
            if not start_s - 1e-3 <= times_s[idx[0]] <= end_s:
                notes.append("no keyframe inside the clip, the nearest is taken")
        else:
            idx = frames_on_screen(times_s, self._moments(start_s, end_s))
            if damage:  # otherwise one frame would replace the lost ones after it
                idx = np.unique(idx)
            idx = idx[equally_spaced(len(idx), self.num_frames)]
        duration_s = video_end_s - self.source.origin_s
        if self.end_s is not None and self.source.origin_s + self.end_s > video_end_s + 1e-3:
            notes.append(f"end_s {self.end_s:g} lies beyond the video's {duration_s:.2f} s")
        return FrameSelection(idx, pts[idx], duration_s, "; ".join(filter(None, notes)))

    def _moments(self, start_s: float, end_s: float) -> NDArray[np.float64]:
        if self.sampling == "uniform":
            return uniform_times(start_s, end_s, self.num_frames)
        return sample_times(start_s, end_s, self.sample_fps)

    def _keyframes(self, key_pts: NDArray[np.int64], start_s: float, end_s: float) -> NDArray[np.int64]:
        if not len(key_pts):
            raise DataError(
                "no keyframe decodes", where=self.source.path, accepted="extract.sampling released or uniform"
            )
        times_s = (key_pts * self.source.time_base_s).astype(np.float64)
        return key_pts[keyframes_within(times_s, start_s, end_s, self.num_frames)]

    def _bounds(self, first_s: float, last_s: float, damage: str) -> tuple[float, float]:
        """Returns start and end of the clip in seconds on the file's clock."""
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
