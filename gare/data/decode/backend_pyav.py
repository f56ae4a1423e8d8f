"""Decoding with PyAV from the start of the file: no seeking, and right for all that FFmpeg decodes.

Packets that no wanted picture needs may be left undecoded, which changes no pixel of the wanted ones.
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
from gare.data.decode.packets import DECODING_ORDER, DECODING_TIMES, ErrorLog, explain_error
from gare.data.decode.probe import Probe, open_container

Picture = NDArray[np.uint8]
#: Packets that are decoded: all; all but unwanted pictures that no other refers to; or only the wanted ones,
#: for keyframes.
Effort = Literal["all", "needed", "alone"]

#: Pictures after the last wanted one that are checked for times that run backwards.
LOOK_AHEAD = 4
#: Codecs with pictures that state if others refer to them, and containers with a packet for each picture.
_SPARING_CODECS = frozenset({"h264", "hevc"})
_SPARING_CONTAINERS = frozenset({"mov", "matroska"})
#: Codecs with keyframes that decode by themselves (a GIF's depend on the pictures before).
_ALONE_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg"})


def least_effort(source: Probe, *, keyframes: bool) -> Effort:
    """Returns the least effort that gives the right pictures of this file, if it is undamaged."""
    if source.fault or source.interlaced or "no timestamps" in source.traits:
        return "all"
    if keyframes:
        return "alone" if source.codec in _ALONE_CODECS else "all"
    if DECODING_ORDER in source.traits:  # pictures get their times by position
        return "all"
    one_packet_each = source.container in _SPARING_CONTAINERS and "shared timestamps" not in source.traits
    return "needed" if one_packet_each and source.codec in _SPARING_CODECS else "all"


@dataclass
class DecodeResult:
    """Pictures and faults of one decode from the start. Ticks are presentation times.

    Attributes:
        order: tick of each whole picture → its position among the decoded ones, from 0.
        keys: ticks of the keyframes among them.
        kept: tick → picture, for the wanted ones.
        end_pts: tick at which the last picture ends.
        num_bad: number of packets that do not decode and of pictures marked as corrupt, all left out.
        error: the last error, short; empty if there was none.
        at_end: False if decoding stopped early because all wanted pictures were found.
        first: tick of the first picture; None without pictures.
        runs_backwards: True if a picture had an earlier time than the one before it, unless after damage.
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
        """Returns True if every wanted picture was found."""
        return wanted <= self.kept.keys()

    @property
    def damage(self) -> str:
        """Description of the damage; empty if there was none."""
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
) -> DecodeResult:
    """Decodes until all wanted pictures are there; with none wanted, the whole video, keeping no picture.

    Args:
        source: facts about the file.
        wanted: presentation times in ticks of the pictures to keep.
        prepare: applied to each kept picture, upright RGB (H, W, 3), at once.
        effort: the packets that are decoded.
        times: tick of each picture by its position among the decoded ones; None: the pictures' own.
        by_packets: True if pictures were chosen by the packets' times. ``times`` are then those of all
            packets, the first of which may give no picture, and decoding stops if times run backwards.
        choose_again: called with the tick of the first picture that decodes and the wanted ticks; returns the
            ticks to keep instead, or None.
        heeds_log: True to leave out pictures for which the decoder of an intra-only codec logs an error.

    Pictures come in the order in which they are shown. If their own times run backwards (see
    ``DecodeResult.runs_backwards``), the times are in another order: the n-th picture is shown at the n-th
    smallest time.

    Raises:
        DataError: if the file cannot be opened.
        MemoryError: if a picture does not fit into this process's memory.
    """
    found, wanted = DecodeResult(), set(wanted)
    ticks_per_frame = 1 / ((source.fps or 25.0) * source.time_base_s)
    with ExitStack() as stack:
        # If no picture refers to another one, an error damages only its own picture.
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
                    # Packets before it gave no picture: its own time identifies its packet.
                    skipped = next((place for place, one in times.items() if one == tick), 0)
                tick = times.get(skipped + position, tick)
            found.runs_backwards = found.runs_backwards or (tick < last and not found.num_bad)
            if found.runs_backwards and by_packets:
                return found
            # Stop after a few more pictures: one of them might have had an earlier time.
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
    """Returns True for a picture that was never filled: all zeros of luma and chroma, a green frame.

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
    found: DecodeResult,
) -> Iterator[av.Packet[Any]]:
    """Yields the packets to decode, on one clock; tells the decoder before each if it may skip it.

    Until the first picture, nothing is skipped (except for keyframes): other pictures may then be wanted.
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
        # Another packet may share a keyframe's time, and does not decode by itself.
        if effort == "alone" and (skippable or (packet.size > 0 and not packet.is_keyframe)):
            continue
        if effort == "needed" and found.first is not None and skippable != skipping:
            skipping = skippable
            context.skip_frame = "NONREF" if skipping else "DEFAULT"
        yield packet


def _frames(
    packets: Iterator[av.Packet[Any]], found: DecodeResult, log: ErrorLog | None
) -> Iterator[av.VideoFrame]:
    """Yields all frames, skips packets that do not decode, and records the errors.

    With a log, frames for which the decoder reports an error are left out, too.
    """
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except MemoryError:
            raise
        except (av.error.FFmpegError, OSError) as error:
            found.error = explain_error(error)
            return
        before = log.num_messages if log else 0
        try:
            frames = packet.decode()
        except MemoryError:
            raise
        except av.error.FFmpegError as error:
            found.error, found.num_bad = explain_error(error), found.num_bad + 1
            continue
        if log and log.reports_damage(before):
            found.num_bad += max(1, len(frames))
            continue
        yield from frames
