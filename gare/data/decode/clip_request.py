"""Request for a clip in the form of the frame store, as the parent sends it to the decoding child."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gare.data.decode.sampling import Sampling
from gare.data.images import Crop

#: Names of decoders; auto: decord if it is right for the file, else PyAV. Keyframes are always decoded by
#: PyAV.
Decoder = Literal["auto", "pyav", "torchcodec"]


@dataclass(frozen=True)
class ClipRequest:
    """A clip to decode, resize, crop and encode.

    Attributes:
        path: local path or ``file://`` URI.
        start_s: see ``decode_clip`` for this and all up to ``decoder``.
        end_s: end of the clip, seconds.
        sampling: policy.
        sample_fps: samples per second.
        num_frames: F.
        decoder: decoder to use.
        image_size: pixels of the short side.
        crop: center, or none for whole pictures (JPEG only).
        encoding: of the frames.
        jpeg_quality: 1 to 100.
    """

    path: str
    start_s: float | None = None
    end_s: float | None = None
    sampling: Sampling = "released"
    sample_fps: float = 1.0
    num_frames: int = 12
    decoder: Decoder = "auto"
    image_size: int = 224
    crop: Crop = "center"
    encoding: Literal["jpeg", "raw"] = "jpeg"
    jpeg_quality: int = 95
