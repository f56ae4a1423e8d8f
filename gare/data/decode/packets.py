"""One pass over the packets of a file: times, keyframes, and signs of damage, without decoding.

Only the first picture is decoded, for its orientation.
"""

from __future__ import annotations

import re
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import av
import numpy as np
from numpy.typing import NDArray

from gare.data.decode.avi_chunks import avi_chunks
from gare.data.decode.clock import WRAPS, Clock
from gare.data.decode.mkv_blocks import times_below_zero
from gare.data.decode.orientation import Orientation, orientation_of

#: Trait of streams with times that rise in decoding order, though pictures are shown in another order.
DECODING_ORDER = "times in decoding order"
#: Trait of streams with pictures that are shown when decoded, whatever their packets' times.
DECODING_TIMES = "shown when decoded"
#: Seconds of a gap that counts as lost: between pictures of an MP4, or in all streams of a Matroska.
LOST_S = 0.3
#: Errors in the metadata of a JPEG; its pixels are right all the same.
_ABOUT_METADATA = re.compile(r"exif|tiff|app\b|app:|app fields|colorspace|icc|comment", re.IGNORECASE)
#: Held while the level of FFmpeg's log, which the whole process shares, is changed.
_LOG = threading.Lock()


@dataclass
class Packets:
    """Times, keyframes and signs of damage of a video stream, from one pass over its packets.

    Attributes:
        pts: ticks of pictures to be shown, in the order of the file.
        key_places: positions of keyframes in ``pts``.
        end_pts: tick at which the last picture ends.
        end_s: seconds at which the last packet of any stream ends.
        num_packets: number of packets of the stream.
        orientation: rotation or mirroring that makes a stored picture upright.
        traits: properties for which seeking decoders go wrong, see ``scan_packets``.
        stopped_early: reason why reading stopped early; empty if it did not.
        remark: remark for a person; empty if there is none.
        errors: error messages of the demuxer.
        num_corrupt: number of packets that the demuxer marks as damaged.
        num_joins: number of times that the clock started anew.
        dts: decoding times of the pictures in ``pts``, as far as packets state them.
        last_duration: duration of the last packet in ticks.
        lost_s: seconds not covered by a picture of a fragmented MP4, or in which all streams of a Matroska
            pause.
        key_dts: decoding times of the keyframes, as the file states them.
        has_moved_end: True if the film ends elsewhere than the longest-lasting packet says.
        jump_s: seconds of the longest jump ahead of an MPEG clock during which no other stream goes on.
        num_held: number of an AVI's chunks without data, during which the picture before is still shown.
        block_times: position in the file → true time, for packets of a Matroska with times below zero.
    """

    pts: list[int] = field(default_factory=list)
    key_places: list[int] = field(default_factory=list)
    end_pts: int = 0
    end_s: float = 0.0
    num_packets: int = 0
    orientation: Orientation = field(default_factory=Orientation)
    traits: set[str] = field(default_factory=set)
    stopped_early: str = ""
    remark: str = ""
    errors: list[str] = field(default_factory=list)
    num_corrupt: int = 0
    num_joins: int = 0
    dts: list[int] = field(default_factory=list)
    last_duration: int = 0
    lost_s: float = 0.0
    jump_s: float = 0.0
    key_dts: set[int | None] = field(default_factory=set)
    has_moved_end: bool = False
    num_held: int = 0
    block_times: dict[int, int] = field(default_factory=dict)

    @property
    def key_pts(self) -> list[int]:
        """Times of the keyframes."""
        return [self.pts[place] for place in self.key_places]

    @property
    def damage(self) -> str:
        """Description of the first sign of damage in what was read; empty if there is none."""
        if self.errors:
            return f"its container is damaged: {self.errors[0]}"
        if self.jump_s:
            return f"its clock jumps {self.jump_s:.1f} s ahead, or a picture is held; nothing tells which"
        if self.lost_s:
            return f"{self.lost_s:.2f} s are missing between its pictures"
        if self.num_corrupt > self.num_joins:  # a joint of streams looks like a lost packet
            return f"{self.num_corrupt} of its packets are damaged"
        return ""


def time_base_of(stream: av.VideoStream) -> float:
    """Returns the seconds of a tick of a stream."""
    return float(stream.time_base or 0) or 1 / av.time_base


class ErrorLog:
    """A collection of FFmpeg's messages at level error, which are the only sign of some damage.

    Enter it before a file is opened: FFmpeg reads the first packets then, to find the codecs.
    """

    def __enter__(self) -> Self:
        """Sets the level of FFmpeg's log until the exit."""
        with ExitStack() as stack:
            stack.enter_context(_LOG)
            stack.callback(av.logging.set_skip_repeated, av.logging.get_skip_repeated())
            stack.callback(av.logging.set_level, av.logging.get_level())
            av.logging.set_level(av.logging.ERROR)
            # Otherwise a message that repeats the last file's is only counted and not logged for this file.
            av.logging.set_skip_repeated(False)
            capture = av.logging.Capture()
            self._said: list[tuple[int, str, str]] = capture.__enter__()
            stack.callback(capture.__exit__, None, None, None)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Restores the log's settings."""
        self._stack.close()

    @property
    def num_messages(self) -> int:
        """Number of messages up to now, of any part of FFmpeg."""
        return len(self._said)

    def reports_damage(self, first: int) -> bool:
        """Returns True if a message from ``first`` on is about pictures, not about metadata."""
        return any(not _ABOUT_METADATA.search(message) for _, _, message in self._said[first:])

    def errors(self, container: av.container.InputContainer, first: int = 0) -> list[str]:
        """Lists the messages of a file's demuxer, from message ``first`` on."""
        # For raw streams, demuxer and codec have the same name.
        names = set(container.format.name.split(",")) - {
            stream.codec_context.name for stream in container.streams.video if stream.codec_context
        }
        return [
            " ".join(message.split())[:200]
            for _, name, message in self._said[first:]
            if names & set(name.split(","))
        ]


def scan_packets(container: av.container.InputContainer, stream: av.VideoStream, log: ErrorLog) -> Packets:
    """Demuxes the whole file.

    Traits: ``edit list`` (packets that are decoded but not shown), ``no timestamps``, ``shared timestamps``
    (packets without a picture of their own), ``open GOP`` (pictures shown before the keyframe that precedes
    them, lost after a seek), ``no keyframe first``, ``joined clocks`` (times that start anew), ``wrapped
    clock`` (its bits wrapped around), ``times in decoding order`` (though pictures are shown in another),
    ``shown when decoded``, ``negative times``, ``other keyframes`` (than an MP4's table lists: a damaged
    picture that looks like a keyframe).
    """
    # MP4 and MOV have an index: errors in it when they are opened are not damage of the pictures.
    first = log.num_messages if container.format.name.startswith("mov") else 0
    scan = _PacketReader(container, stream).read()
    scan.errors = log.errors(container, first)
    if container.format.name.startswith("mov"):
        listed = {entry.timestamp for entry in stream.index_entries if entry.is_keyframe}
        if listed != scan.key_dts:
            scan.traits.add("other keyframes")
    return scan


class _PacketReader:
    """Reader of all streams' packets, in the order of the file, that records facts about one stream.

    Reading an attribute of a packet is slow, so each is read once.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream) -> None:
        self.container, self.stream, self.scan = container, stream, Packets()
        name = container.format.name
        self.is_fragmented = name.startswith("mov") and not stream.frames
        self.is_matroska = name.startswith("matroska")
        self.time_base_s = time_base_of(stream)
        self.clock = Clock(self.time_base_s, WRAPS.get(name.split(",")[0], 0))
        sounds = container.streams.audio if self.is_matroska else ()
        self.sound_bases_s = {sound.index: float(sound.time_base or 0) for sound in sounds}
        self.silences: dict[int, list[tuple[float, float]]] = {index: [] for index in self.sound_bases_s}
        #: Seconds at which other streams of an MPEG file have packets.
        self.heard_s: set[int] = set()
        #: Stream → tick at which its packets read so far end.
        self.ends: dict[int, int] = {}
        self.key_pts: int | None = None
        self.due: int | None = None
        self.last_pts = -(2**63)
        self.has_orientation = False

    def read(self) -> Packets:
        """Reads the file to its end, or to where reading stops."""
        own = self.stream.index
        try:
            for packet in self.container.demux():
                if packet.size == 0:
                    continue
                if (index := packet.stream_index) == own:
                    self._read_own(packet)
                else:
                    self._read_other(packet, index)
        except MemoryError:
            raise
        except (av.error.FFmpegError, OSError) as error:
            self.scan.stopped_early = f"reading stops early: {explain_error(error)}"
        self._note_ends_and_gaps()
        self._note_clock()
        self._note_order()
        return self.scan

    def _read_other(self, packet: av.Packet[Any], index: int) -> None:
        pts = packet.pts
        if pts is None:
            return
        if self.clock.is_mpeg:
            self.heard_s.add(int(pts * float(packet.time_base or 0)))
        elif index in self.silences:
            end, base_s = self.ends.get(index, pts), self.sound_bases_s[index]
            if (pts - end) * base_s > LOST_S:
                self.silences[index].append((end * base_s, pts * base_s))
        self.ends[index] = max(self.ends.get(index, 0), pts + (packet.duration or 0))

    def _read_own(self, packet: av.Packet[Any]) -> None:
        scan, pts, dts, duration = self.scan, packet.pts, packet.dts, packet.duration or 0
        if self.is_matroska and scan.num_packets == 0 and (pts is None or pts < 0):
            scan.block_times = times_below_zero(self.container.name)
        if scan.block_times:
            pts = scan.block_times.get(packet.pos or 0, pts)
        offset = self.clock.offset(dts, duration)
        end_pts = 0 if pts is None else pts + offset + duration
        self.ends[self.stream.index] = max(self.ends.get(self.stream.index, 0), end_pts)
        if not self.has_orientation:
            self.has_orientation = _read_orientation(packet, scan)
        is_key = packet.is_keyframe
        scan.num_packets += 1
        scan.num_corrupt += packet.is_corrupt
        if scan.num_packets == 1 and not is_key:
            scan.traits.add("no keyframe first")
        if pts is None:
            scan.traits.add("no timestamps")
            return
        pts += offset
        if is_key:
            self.key_pts = pts
            scan.key_dts.add(dts)
        elif self.key_pts is not None and pts < self.key_pts:
            scan.traits.add("open GOP")
        if packet.is_discard:
            scan.traits.add("edit list")
            return
        self._add_picture(pts, dts, offset, duration, is_key=is_key)

    def _add_picture(self, pts: int, dts: int | None, offset: int, duration: int, *, is_key: bool) -> None:
        scan = self.scan
        scan.pts.append(pts)
        if dts is not None:
            scan.dts.append(dts + offset)
            if self.is_fragmented:
                # Its tables state how long each picture lasts: time that no picture covers was lost.
                lost_s = 0.0 if self.due is None else (dts - self.due) * self.time_base_s
                scan.lost_s += lost_s if lost_s > LOST_S else 0.0
                self.due = dts + duration
        if is_key:
            scan.key_places.append(len(scan.pts) - 1)
        scan.last_duration = duration
        if pts >= self.last_pts:
            self.last_pts, scan.end_pts = pts, pts + duration

    def _note_ends_and_gaps(self) -> None:
        scan, streams = self.scan, self.container.streams
        for index, end in self.ends.items():
            scan.end_s = max(scan.end_s, end * float(streams[index].time_base or 0))
        if self.is_matroska:
            beside = [spans for index, spans in self.silences.items() if index in self.ends]
            scan.lost_s = _stands_still_s(np.unique(scan.pts) * self.time_base_s, beside)

    def _note_clock(self) -> None:
        scan, clock = self.scan, self.clock
        for first_s, last_s in clock.jumps:
            # Sound goes on beside a picture that is held.
            if not any(first_s + 1 < one < last_s - 1 for one in self.heard_s):
                scan.jump_s = max(scan.jump_s, last_s - first_s)
        scan.num_joins = clock.num_joins
        if clock.num_joins:
            scan.traits.add("joined clocks")
            scan.remark = f"its clock starts anew {clock.num_joins} times; the parts follow each other"
        if clock.num_wraps:
            scan.traits.add("wrapped clock")

    def _note_order(self) -> None:
        scan = self.scan
        is_avi, is_sorted = self.container.format.name == "avi", scan.pts == sorted(scan.pts)
        if len(set(scan.pts)) < len(scan.pts):
            scan.traits.add("shared timestamps")
        elif scan.pts and scan.pts[-1] != self.last_pts:
            # Durations of such packets are in decoding order; the last one's is that of a picture.
            end_pts = self.last_pts + scan.last_duration
            scan.has_moved_end, scan.end_pts = end_pts != scan.end_pts, end_pts
        elif self.stream.codec_context.has_b_frames and len(scan.pts) > 1 and is_sorted:
            scan.traits.add(DECODING_ORDER)
        elif is_avi and len(scan.dts) == len(scan.pts) and is_sorted:
            _take_decoding_times(scan)
        if scan.pts and min(scan.pts) < 0:
            scan.traits.add("negative times")


def _stands_still_s(times_s: NDArray[np.float64], silences: list[list[tuple[float, float]]]) -> float:
    """Returns the seconds in which neither pictures nor sound go on, though both do elsewhere.

    A picture may be held, and sound may pause; if they only do so together, a part of the file is lost.

    Args:
        times_s: times of the pictures, increasing.
        silences: for each sound stream, (from, to) in seconds of its pauses.
    """
    steps_s = np.diff(times_s)
    usual_s = float(np.median(steps_s)) if len(steps_s) else 0.0
    (places,) = np.nonzero(steps_s > max(LOST_S, 10 * usual_s))
    still_s = 0.0
    for nth, place in enumerate(places.tolist()):
        first_s, last_s = float(times_s[place]) + usual_s, float(times_s[place + 1])
        for pauses in silences:
            if len(pauses) != len(places):
                return 0.0
            first_s, last_s = max(first_s, pauses[nth][0]), min(last_s, pauses[nth][1])
        if not silences or last_s - first_s <= LOST_S:
            return 0.0
        still_s += last_s - first_s
    return still_s


def _take_decoding_times(scan: Packets) -> None:
    """Uses decoding times as presentation times for an AVI in which some pictures are held.

    AVI states when each chunk is decoded. FFmpeg guesses when it is shown: without reordering, the guess is
    one chunk too late, so that another picture would be held beside chunks without data.
    """
    if scan.pts == scan.dts or scan.dts[-1] - scan.dts[0] < len(scan.dts):
        return
    scan.traits.add(DECODING_TIMES)
    scan.end_pts += scan.dts[-1] - scan.pts[-1]
    scan.pts = scan.dts


def _read_orientation(packet: av.Packet[Any], scan: Packets) -> bool:
    """Decodes a packet to read the display matrix of its picture; returns True if there was a picture."""
    try:
        frames = packet.decode()
    except MemoryError:
        raise
    except av.error.FFmpegError:
        return False
    for frame in frames:
        scan.orientation = orientation_of(frame) or scan.orientation
    return bool(frames)


def missing_end(
    scan: Packets, container: str, frames: int | None, duration_s: float | None, start_s: float
) -> str:
    """Describes how much is missing from what the header promises; empty if nothing is missing."""
    held = scan.num_held
    if container == "avi" and len(scan.pts) == scan.num_packets > 0:
        # Chunks without data, which this demuxer leaves out: the picture before is still shown.
        held = max(held, max(scan.pts) - min(scan.pts) + 1 - scan.num_packets)
    # Durations count from 0 if the first picture comes later.
    ends_s = scan.end_s - min(start_s, 0.0)
    is_short = bool(duration_s and duration_s - ends_s > max(0.5, 0.02 * duration_s))
    if frames and scan.num_packets + held < frames:
        # An edit list of MP4 cuts off pictures that its table counts.
        if container != "mov" or is_short:
            return f"cut off: {scan.num_packets} of the {frames} frames that its header promises"
    elif is_short and not (frames and container == "mov"):  # all pictures of its table are there
        return f"cut off: its header promises {duration_s:.2f} s, its data end at {ends_s:.2f} s"
    return ""


def extend_last_picture(scan: Packets, path: str, stream: av.VideoStream) -> None:
    """Extends the last picture of an AVI over the chunks without data after it.

    The demuxer returns no packets for them, so that the file looks cut off. Its chunks are counted instead:
    they must be as many as its header promises.
    """
    if scan.num_packets >= stream.frames:
        return
    chunks = avi_chunks(path, stream.index)
    if chunks.num_full != scan.num_packets or chunks.num_full + chunks.num_empty < stream.frames:
        return
    scan.num_held = chunks.num_empty
    scan.end_pts += chunks.num_held
    scan.end_s = max(scan.end_s, scan.end_pts * time_base_of(stream))


def explain_error(error: BaseException) -> str:
    """Formats a decoder's error as one short line, without the path that the caller adds."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    log = getattr(error, "log", None)
    if log and log[2].strip():
        text = f"{text} ({log[2].strip()})"
    return " ".join(text.split())[:300]
