"""What a video file says about itself, before anything of it is trusted to a decoder.

One pass over the packets, without decoding more than the first picture. Times are presentation times:
pts × time base, in seconds, as the file states them (its clock may not start at 0).
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from gare.data.containers import ACCEPTED, DEMUXERS, head_of, names_other_files, still_demuxer
from gare.data.encryption import is_encrypted
from gare.data.file_kind import begins_as, broken_link, file_kind
from gare.data.mov_tracks import mov_tracks
from gare.errors import DataError

#: Containers whose headers state a duration that was measured when the file was written.
_EXACT_HEADERS = frozenset({"mov", "matroska", "avi"})


class Orientation(NamedTuple):
    """How stored pictures are turned upright: transpose first, then the flips."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    def apply(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The upright picture, (H, W, 3), contiguous."""
        if self.transpose:
            rgb = rgb.transpose(1, 0, 2)
        return np.ascontiguousarray(rgb[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1])


#: What turns a picture upright by its rotation alone, in quarters counterclockwise.
_QUARTER_TURNS = (
    Orientation(),
    Orientation(transpose=True, flip_y=True),
    Orientation(flip_x=True, flip_y=True),
    Orientation(transpose=True, flip_x=True),
)


@dataclass(frozen=True, eq=False)
class Probe:
    """Facts about the first video stream that is not a cover picture.

    Attributes:
        path: the file.
        container: short name of the container: mov, matroska, avi, gif, …
        codec: FFmpeg's name of the codec: h264, hevc, av1, …
        pixel_format: FFmpeg's name of it, empty if unknown.
        width: pixels of the upright picture.
        height: pixels of the upright picture.
        orientation: what turns a stored picture upright.
        fps: average frames per second by the header, None if unknown.
        duration_s: of the file by its header, None if unknown.
        num_frames: of the stream by its header, None if unknown.
        stream_index: of the stream in the file.
        num_video_streams: cover pictures left out.
        time_base_s: seconds of one pts tick.
        origin_s: presentation time that a player shows as 0.
        pts: ticks of the pictures to be shown by the packets, sorted, each once.
        key_pts: those of them that start anew, without the pictures before.
        end_pts: tick at which the last of them ends.
        interlaced: whether a picture may come as two fields.
        traits: what makes seeking decoders go wrong, by name; see ``scan`` below.
        fault: why the file seems damaged, empty if it does not.
    """

    path: str
    container: str
    codec: str
    pixel_format: str
    width: int
    height: int
    orientation: Orientation
    fps: float | None
    duration_s: float | None
    num_frames: int | None
    stream_index: int
    num_video_streams: int
    time_base_s: float
    origin_s: float
    pts: NDArray[np.int64]
    key_pts: NDArray[np.int64]
    end_pts: int
    interlaced: bool
    traits: frozenset[str]
    fault: str


def probe(path: str | Path) -> Probe:
    """Reads the header and all packets of a video file.

    Raises:
        DataError: if the file cannot be opened or has no video stream that can be decoded.
    """
    path = str(Path(path).absolute())  # absolute: FFmpeg takes "a:b.mp4" for a protocol
    _check_kind(path)
    with open_container(path) as container:
        stream, num_video_streams = _main_stream(container, path)
        scan = _scan(container, stream)
        if not scan.num_packets and _is_external(path, stream):
            what = "has its pictures in other files (data references), which are not opened"
            raise DataError(what, where=path, accepted=ACCEPTED)
        context = stream.codec_context
        name = container.format.name.split(",")[0]
        frames = stream.frames or None
        duration_s = container.duration / av.time_base if container.duration else None
        start_s = (container.start_time or 0) / av.time_base
        fault = scan.fault
        if not fault and name in _EXACT_HEADERS:
            fault = _missing_end(scan, frames, duration_s, start_s)
        width, height = context.width, context.height
        if scan.orientation.transpose:
            width, height = height, width
        return Probe(
            path=path,
            container=name,
            codec=context.codec.canonical_name,
            pixel_format=context.pix_fmt or "",
            width=width,
            height=height,
            orientation=scan.orientation,
            fps=float(stream.average_rate) if stream.average_rate else None,
            duration_s=duration_s,
            num_frames=frames,
            stream_index=stream.index,
            num_video_streams=num_video_streams,
            time_base_s=float(stream.time_base or 0) or 1 / av.time_base,
            # Encoder delay can put the first sound before 0; players do not count that.
            origin_s=max(start_s, 0.0),
            pts=np.unique(np.array(scan.pts, dtype=np.int64)),
            key_pts=np.unique(np.array(scan.key_pts, dtype=np.int64)),
            end_pts=scan.end_pts,
            interlaced=context.field_order > 1,  # 0: unknown, 1: progressive
            traits=frozenset(scan.traits),
            fault=fault,
        )


def _check_kind(path: str) -> None:
    """Refuses what is no file. A named pipe may pass: whoever reads one has a deadline."""
    try:
        mode = Path(path).stat().st_mode
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or socket"
        fault = "" if stat.S_ISREG(mode) or stat.S_ISFIFO(mode) else f"it is {kind}"
    except (OSError, ValueError) as error:
        link = broken_link(path)
        fault = f"it is {link}" if link else explain(error)
    if fault:
        raise DataError(f"cannot be opened as a video: {fault}", where=path, accepted=ACCEPTED)


def open_container(path: str) -> av.container.InputContainer:
    """Opens a local file for reading, and no other file that it may name.

    Raises:
        DataError: if it cannot be opened, or is read by opening others.
    """
    head = head_of(path)
    fault = names_other_files(head or b"", path)
    if fault:
        raise DataError(f"cannot be opened as a video: it is {fault}", where=path, accepted=ACCEPTED)
    try:
        return av.open(
            path,
            format=still_demuxer(head or b"", path),
            options={"protocol_whitelist": "file", "format_whitelist": ",".join(sorted(DEMUXERS))},
            metadata_errors="replace",
        )
    except MemoryError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        what = f"cannot be opened as a video: {_reason(error, head)}"
        raise DataError(what, where=path, accepted=ACCEPTED) from error


def _reason(error: Exception, head: bytes | None) -> str:
    """Why a file cannot be opened, by its first bytes where they tell more than FFmpeg's error."""
    if head is None:
        return explain(error)
    kind, container = file_kind(head), begins_as(head)
    if kind:
        return f"it is {kind}"
    if container:
        return f"it begins as {container}, but is cut off, not finished or damaged ({explain(error)})"
    if isinstance(error, av.error.ArgumentError):  # FFmpeg's answer to what is not in its list
        return "it is of a kind that is not read"
    return explain(error)


def explain(error: BaseException) -> str:
    """A decoder's error in one short line, without the path that the caller adds."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    log = getattr(error, "log", None)
    if log and log[2].strip():
        text = f"{text} ({log[2].strip()})"
    return " ".join(text.split())[:300]


def _main_stream(container: av.container.InputContainer, path: str) -> tuple[av.VideoStream, int]:
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        what = f"has no video stream, {_content(container)}"
        raise DataError(what, where=path, accepted="a file with moving pictures")
    if is_encrypted(path, container.format.name.split(",")[0], streams[0]):
        raise DataError("is encrypted (DRM)", where=path, accepted="a video that plays without a key")
    # A stream whose codec this FFmpeg does not know has no context, whatever the type says.
    if getattr(streams[0], "codec_context", None) is None:
        raise DataError("has a video stream whose codec is unknown", where=path)
    streams[0].codec_context.thread_count = 1
    return streams[0], len(streams)


def _content(container: av.container.InputContainer) -> str:
    """What a file without moving pictures holds."""
    names = {"audio": "sound", "video": "a cover picture", "subtitle": "subtitles"}
    kinds = {stream.type for stream in container.streams}
    held = [name for kind, name in names.items() if kind in kinds]
    return f"only {' and '.join(held)}" if held else "nor any other that is known"


def _is_external(path: str, stream: av.VideoStream) -> bool:
    return any(track.track_id == stream.id and track.is_external for track in mov_tracks(path))


@dataclass
class _Scan:
    pts: list[int] = field(default_factory=list)
    key_pts: list[int] = field(default_factory=list)
    end_pts: int = 0
    end_s: float = 0.0
    num_packets: int = 0
    orientation: Orientation = field(default_factory=Orientation)
    traits: set[str] = field(default_factory=set)
    fault: str = ""


def _scan(container: av.container.InputContainer, stream: av.VideoStream) -> _Scan:
    """Demuxes the whole file.

    Traits: ``edit list`` (packets that are decoded but not shown), ``no timestamps``, ``shared timestamps``
    (packets without a picture of their own), ``open GOP`` (pictures shown before the keyframe that precedes
    them, lost after a seek), ``no keyframe first``.
    """
    scan = _Scan()
    key_pts: int | None = None
    looking = True
    ends: dict[int, int] = {}
    try:
        for packet in container.demux():
            if packet.size == 0:
                continue
            pts, index = packet.pts, packet.stream_index  # each look at a packet's attribute takes its time
            end_pts = 0 if pts is None else pts + (packet.duration or 0)
            ends[index] = max(ends.get(index, 0), end_pts)
            if index != stream.index:
                continue
            looking = looking and not _read_orientation(packet, scan)
            scan.num_packets += 1
            if scan.num_packets == 1 and not packet.is_keyframe:
                scan.traits.add("no keyframe first")
            if pts is None:
                scan.traits.add("no timestamps")
                continue
            is_key = packet.is_keyframe
            if is_key:
                key_pts = pts
            elif key_pts is not None and pts < key_pts:
                scan.traits.add("open GOP")
            if packet.is_discard:
                scan.traits.add("edit list")
                continue
            scan.pts.append(pts)
            if is_key:
                scan.key_pts.append(pts)
            scan.end_pts = max(scan.end_pts, end_pts)
    except MemoryError:
        raise
    except (av.error.FFmpegError, OSError) as error:
        scan.fault = f"reading stops early: {explain(error)}"
    for index, end in ends.items():
        scan.end_s = max(scan.end_s, end * float(container.streams[index].time_base or 0))
    if len(set(scan.pts)) < len(scan.pts):
        scan.traits.add("shared timestamps")
    return scan


def _read_orientation(packet: av.Packet[Any], scan: _Scan) -> bool:
    """Decodes until there is a picture, which carries the display matrix; True when there was one."""
    try:
        frames = packet.decode()
    except MemoryError:
        raise
    except av.error.FFmpegError:
        return False
    for frame in frames:
        try:
            side_data = list(getattr(frame, "side_data", ()))
        except ValueError:  # PyAV does not know all kinds of it: EXIF of photos, views of spatial videos
            scan.orientation = _QUARTER_TURNS[round(frame.rotation / 90) % 4]
            continue
        for item in side_data:
            if item.type.name == "DISPLAYMATRIX":
                scan.orientation = _orientation(np.frombuffer(bytes(item), dtype="<i4"))
    return bool(frames)


def _orientation(matrix: NDArray[np.int32]) -> Orientation:
    """The nearest right angle, mirrored or not: x' = a·x + c·y, y' = b·x + d·y."""
    a, b, c, d = (int(matrix[place]) for place in (0, 1, 3, 4))
    if abs(a) >= abs(b):
        return Orientation(False, a < 0, d < 0)
    return Orientation(True, c < 0, b < 0)


def _missing_end(scan: _Scan, frames: int | None, duration_s: float | None, start_s: float) -> str:
    if frames and scan.num_packets < frames:
        return f"cut off: {scan.num_packets} of the {frames} frames that its header promises"
    ends_s = scan.end_s - start_s
    if duration_s and duration_s - ends_s > max(0.5, 0.02 * duration_s):
        return f"cut off: its header promises {duration_s:.2f} s, its data end at {ends_s:.2f} s"
    return ""
