"""A decoded clip: its sampled frames, and facts about them and their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

#: Form of a frame: a picture (H, W, 3), or the bytes of an encoded one.
Frame = TypeVar("Frame")


@dataclass(frozen=True, eq=False)
class DecodedClip(Generic[Frame]):
    """The sampled frames of a clip, in order of time.

    Attributes:
        frames: from ``decode_clip``: upright RGB pictures (H, W, 3), uint8, or results of ``prepare``; from
            ``DecodeProcess``: JPEGs of one size, or size × size × 3 raw RGB bytes each.
        frame_idx: position of each frame among the video's pictures, from 0.
        time_s: presentation time of each frame: pts × time base, as the file states it.
        sampling: policy by which the frames were chosen.
        container: short name of the file's container: mov, matroska, avi, …
        codec: FFmpeg's name of the codec.
        decoder: ``decord``, ``pyav`` or ``torchcodec``.
        decoder_version: version of it.
        width: pixels of the upright source picture.
        height: pixels of the upright source picture.
        fps: average frames per second by the header, 0 if unknown.
        duration_s: seconds from the file's zero to the end of the last picture (not of the clip).
        complete: False if the file is damaged, so that some sampled frames may be missing.
        note: remark about the clip for a person; empty if there is none.
    """

    frames: list[Frame]
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

    def facts(self) -> dict[str, Any]:
        """Returns all but the frames, as values of JSON."""
        facts = {name: value for name, value in vars(self).items() if name != "frames"}
        return {**facts, "frame_idx": self.frame_idx.tolist(), "time_s": self.time_s.tolist()}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], frames: list[Frame]) -> Self:
        """Returns the clip of ``facts`` with these frames."""
        arrays: dict[str, Any] = {
            "frame_idx": np.array(facts["frame_idx"], dtype=np.int64),
            "time_s": np.array(facts["time_s"], dtype=np.float64),
        }
        return cls(frames=frames, **{**facts, **arrays})
