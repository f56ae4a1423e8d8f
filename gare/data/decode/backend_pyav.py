"""Reading a video from its start with PyAV: no seeking, and right on whatever FFmpeg decodes.

What no wanted picture needs may be left undecoded, which changes no pixel of the wanted ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import av
import numpy as np
from numpy.typing import NDArray

from gare.data.decode.clock import Clock
from gare.data.decode.packets import DECODING_ORDER, DECODING_TIMES, ErrorLog, explain
from gare.data.decode.probe import Probe, open_container

Picture = NDArray[np.uint8]
#: Which packets are decoded: all; all but unwanted pictures that no other refers to; or the wanted ones
#: alone, for keyframes.
Effort = Literal["all", "needed", "alone"]

#: Pictures beyond the last wanted one that are looked at for times that run backwards.
LOOK_AHEAD = 4
#: Codecs whose pictures say whether others refer to them, and containers that give each picture a packet.
_SPARING_CODECS = frozenset({"h264", "hevc"})
_SPARING_CONTAINERS = frozenset({"mov", "matroska"})
#: Codecs of which a keyframe decodes by itself (a GIF's draws upon the pictures before).
_ALONE_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg"})


def least_effort(source: Probe, *, keyframes: bool) -> Effort:
    """The least that gives the right pictures of this file, if it is whole."""
    if source.fault or source.interlaced or "no timestamps" in source.traits:
        return "all"
    if keyframes:
        return "alone" if source.codec in _ALONE_CODECS else "all"
    if DECODING_ORDER in source.traits:  # pictures get their times by their places
        return "all"
    one_packet_each = source.container in _SPARING_CONTAINERS and "shared timestamps" not in source.traits
    return "needed" if one_packet_each and source.codec in _SPARING_CODECS else "all"


@dataclass
class Found:
    """Pictures and faults of one decode from the start. Ticks are presentation times.

    Attributes:
        order: tick of each whole picture → its position among the decoded ones, from 0.
        keys: ticks of the keyframes among them.
        kept: tick → picture, of the wanted ones.
        end_pts: tick at which the last picture ends.
        num_bad: packets that do not decode and pictures that the decoder marks as corrupt, all left out.
        error: the last error, short; empty if there was none.
        at_end: False if it stopped early because all wanted pictures were there.
        first: tick of the first picture; None: there was none.
        runs_backwards: whether a picture had an earlier time than the one before it, damage aside.
    """

    order: dict[int, int] = field(default_factory=dict)
    keys: set[int] = field(default_factory=set)
    kept: dict[int, Picture] = field(default_factory=dict)
    end_pts: int = 0
    num_bad: int = 0
    error: str = ""
    at_end: bool = False
    first: int | None = None
    runs_backwards: bool = False

    def has_all(self, wanted: Set[int]) -> bool:
        """Returns True if every wanted picture is there."""
        return wanted <= self.kept.keys()

    @property
    def damage(self) -> str:
        """The damage that was met; empty if there was none."""
        if not self.num_bad:
            return self.error
        detail = f" ({self.error})" if self.error else ""
        return f"{self.num_bad} damaged packets or frames are left out{detail}"


def decode_from_start(
    source: Probe,
    wanted: Set[int],
    prepare: Callable[[Picture], Picture],
    effort: Effort = "all",
    *,
    times: Mapping[int, int] | None = None,
    by_packets: bool = False,
    choose_again: Callable[[int, Set[int]], Set[int] | None] | None = None,
    heeds_log: bool = True,
) -> Found:
    """Decodes until all wanted pictures are there; with none wanted, the whole video, keeping no picture.

    Args:
        source: facts about the file.
        wanted: presentation times in ticks of the pictures to keep.
        prepare: applied to each kept picture, upright RGB (H, W, 3), at once.
        effort: which packets are decoded.
        times: tick of each picture by its position among those that are decoded; None: their own.
        by_packets: whether pictures were chosen by the packets' times: ``times`` are then those of all
            packets, of which the first may give no picture, and it stops where times run backwards.
        choose_again: gets the tick of the first picture that decodes, and what is wanted; gives what is to be
            kept instead, or None.
        heeds_log: whether pictures are left out of which the decoder of a codec of single pictures says that
            something is wrong.

    Pictures come in the order in which they are shown. Where their own times run backwards, which is told by
    ``Found.runs_backwards``, the times are of another order: the n-th picture is shown at the n-th of them.

    Raises:
        DataError: if the file cannot be opened.
        MemoryError: if a picture does not fit into this process's memory.
    """
    found, wanted = Found(), set(wanted)
    ticks_per_frame = 1 / ((source.fps or 25.0) * source.time_base_s)
    with ExitStack() as stack:
        # Of pictures that no other one refers to, an error is damage of its own.
        log = stack.enter_context(ErrorLog()) if source.is_intra_only and heeds_log else None
        container = stack.enter_context(open_container(source.path))
        stream = cast(av.VideoStream, container.streams[source.stream_index])
        stream.codec_context.thread_count = 1
        position, skipped, last, ahead = 0, 0, -(2**63), -1
        packets = _packets(container, stream, source, wanted, effort, found)
        for frame in _frames(packets, found, log):
            tick = round(position * ticks_per_frame) if frame.pts is None else int(frame.pts)
            if times is not None:
                if position == 0 and by_packets and frame.key_frame:
                    # Packets before it gave no picture: its own time tells which one it is.
                    skipped = next((place for place, one in times.items() if one == tick), 0)
                tick = times.get(skipped + position, tick)
            found.runs_backwards = found.runs_backwards or (tick < last and not found.num_bad)
            if found.runs_backwards and by_packets:
                return found
            # Past a few pictures more, of which one might have had an earlier time.
            ahead -= ahead > 0
            if ahead == 0:
                return found
            last = tick
            position += 1
            if frame.is_corrupt or _is_empty(frame, damaged=found.num_bad > 0):
                found.num_bad += 1
                continue
            if found.first is None:
                found.first = tick
                if choose_again and (chosen := choose_again(tick, wanted)) is not None:
                    wanted.clear()
                    wanted.update(chosen)
            found.order.setdefault(tick, position - 1)
            if frame.key_frame:
                found.keys.add(tick)
            found.end_pts = max(found.end_pts, tick + round(frame.duration or ticks_per_frame))
            if tick in wanted and tick not in found.kept:
                rgb = cast(Picture, frame.to_ndarray(format="rgb24", threads=1))
                found.kept[tick] = prepare(source.orientation.apply(rgb))
                if len(found.kept) == len(wanted):
                    ahead = LOOK_AHEAD
                    if effort == "alone":
                        return found
    found.at_end = True
    return found


def _is_empty(frame: av.VideoFrame, *, damaged: bool) -> bool:
    """Returns True for memory that was never filled: zeros of luma and chroma, a green no camera sees.

    After damage any flat picture is taken for one whose reference is lost.
    """
    if not frame.format.name.startswith("yuv") or len(frame.planes) < 3:
        return False
    for place in (1, 2, 0):  # chroma first: it is smaller and decides for most
        plane = frame.planes[place]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[:, : plane.width]
        if (rows[0] != rows[0, 0]).any() or (rows[0, 0] and not damaged) or (rows != rows[0, 0]).any():
            return False
    return True


def _packets(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    source: Probe,
    wanted: Set[int],
    effort: Effort,
    found: Found,
) -> Iterator[av.Packet[Any]]:
    """The packets to decode, on one clock; the decoder is told before each what it may leave out.

    Until there is a picture nothing is left out but for keyframes alone: others may then be wanted.
    """
    context, skipping = stream.codec_context, False
    takes_dts = DECODING_TIMES in source.traits
    clock = Clock(source.time_base_s, source.wraps)
    for packet in container.demux(stream):
        if takes_dts and packet.dts is not None:
            packet.pts = packet.dts
        if source.block_times:
            packet.pts = source.block_times.get(packet.pos or 0, packet.pts)
        if packet.size and (offset := clock.offset(packet.dts, packet.duration or 0)):
            packet.dts = None if packet.dts is None else packet.dts + offset
            packet.pts = None if packet.pts is None else packet.pts + offset
        skippable = packet.size > 0 and packet.pts not in wanted
        # Another picture may share a keyframe's time, which alone is no picture.
        if effort == "alone" and (skippable or (packet.size > 0 and not packet.is_keyframe)):
            continue
        if effort == "needed" and found.first is not None and skippable != skipping:
            skipping = skippable
            context.skip_frame = "NONREF" if skipping else "DEFAULT"
        yield packet


def _frames(packets: Iterator[av.Packet[Any]], found: Found, log: ErrorLog | None) -> Iterator[av.VideoFrame]:
    """Yields all frames that come, past packets that do not decode; notes the errors.

    With a log, frames are left out as well whose decoder says that something is wrong with them.
    """
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except MemoryError:
            raise
        except (av.error.FFmpegError, OSError) as error:
            found.error = explain(error)
            return
        before = log.num_said if log else 0
        try:
            frames = packet.decode()
        except MemoryError:
            raise
        except av.error.FFmpegError as error:
            found.error, found.num_bad = explain(error), found.num_bad + 1
            continue
        if log and log.speaks_of_damage(before):
            found.num_bad += max(1, len(frames))
            continue
        yield from frames
