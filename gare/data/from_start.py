"""Decoding a video from its start with PyAV: slower than seeking, and right on whatever FFmpeg decodes."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any, cast

import av
import numpy as np
from numpy.typing import NDArray

from gare.data.probe import Probe, explain, open_container

Picture = NDArray[np.uint8]


@dataclass
class Found:
    """What one decode from the start gave. Ticks are presentation times in the stream's time base.

    Attributes:
        order: tick of each whole picture → its position in decoding order, from 0.
        kept: tick → picture, of the wanted ones.
        end_pts: tick at which the last picture ends.
        num_bad: packets that do not decode and pictures that the decoder marks as corrupt, all left out.
        error: the last error, short; empty if there was none.
        at_end: False if it stopped early because all wanted pictures were there.
    """

    order: dict[int, int] = field(default_factory=dict)
    kept: dict[int, Picture] = field(default_factory=dict)
    end_pts: int = 0
    num_bad: int = 0
    error: str = ""
    at_end: bool = False

    def has_all(self, wanted: Set[int]) -> bool:
        """Whether every wanted picture is there."""
        return wanted <= self.kept.keys()

    @property
    def damage(self) -> str:
        """What went wrong, empty if nothing did."""
        if not self.num_bad:
            return self.error
        detail = f" ({self.error})" if self.error else ""
        return f"{self.num_bad} damaged packets or frames are left out{detail}"


def decode_from_start(source: Probe, wanted: Set[int], prepare: Callable[[Picture], Picture]) -> Found:
    """Decodes until all wanted pictures are there; with none wanted, the whole video, keeping no picture.

    Args:
        source: facts about the file.
        wanted: presentation times in ticks of the pictures to keep.
        prepare: applied to each kept picture, upright RGB (H, W, 3), at once.

    Raises:
        DataError: if the file cannot be opened.
    """
    found = Found()
    ticks_per_frame = 1 / ((source.fps or 25.0) * source.time_base_s)
    with open_container(source.path) as container:
        stream = cast(av.VideoStream, container.streams[source.stream_index])
        stream.codec_context.thread_count = 1
        position = 0
        for frame in _frames(container, stream, found):
            tick = round(position * ticks_per_frame) if frame.pts is None else int(frame.pts)
            position += 1
            if frame.is_corrupt:
                found.num_bad += 1
                continue
            found.order.setdefault(tick, position - 1)
            found.end_pts = max(found.end_pts, tick + round(frame.duration or ticks_per_frame))
            if tick in wanted and tick not in found.kept:
                rgb = frame.to_ndarray(format="rgb24")
                found.kept[tick] = prepare(source.orientation.apply(rgb))
                if len(found.kept) == len(wanted):
                    return found
    found.at_end = True
    return found


def _frames(container: av.container.InputContainer, stream: av.VideoStream, found: Found) -> Any:
    """Yields all frames that come, past packets that do not decode; notes the errors."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (av.error.FFmpegError, OSError) as error:
            found.error = explain(error)
            return
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            found.error, found.num_bad = explain(error), found.num_bad + 1
            continue
        yield from frames
