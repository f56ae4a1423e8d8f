"""Facts about a video file, read from its header and packets before it is given to a decoder.

One pass over the packets, without decoding more than the first picture. Times are presentation times:
pts × time base, in seconds, as the file states them (its clock may not start at 0).
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from gare.data.decode.clock import WRAPS
from gare.data.decode.containers import (
    ACCEPTED,
    DEMUXERS,
    head_of,
    is_pattern,
    names_other_files,
    still_demuxer,
)
from gare.data.decode.encryption import is_encrypted
from gare.data.decode.file_kind import broken_link, container_of_head, file_kind
from gare.data.decode.mov_tracks import mov_tracks
from gare.data.decode.orientation import Orientation
from gare.data.decode.packets import (
    ErrorLog,
    explain_error,
    extend_last_picture,
    missing_end,
    scan_packets,
    time_base_of,
)
from gare.errors import DataError

#: Containers whose headers state a duration that was measured when the file was written.
_EXACT_HEADERS = frozenset({"mov", "matroska", "avi"})
#: Most pictures per second of a track of thumbnails.
TIMELINE_FPS = 2.0


@dataclass(frozen=True, eq=False)
class Probe:
    """Facts about the first video stream that is not a cover picture.

    Attributes:
        path: the file.
        container: short name of the container: mov, matroska, avi, gif, …
        codec: FFmpeg's name of the codec: h264, hevc, av1, …
        pixel_format: FFmpeg's name of the pixel format, empty if unknown.
        width: pixels of the upright picture.
        height: pixels of the upright picture.
        orientation: rotation or mirroring that makes a stored picture upright.
        fps: average frames per second by the header, None if unknown.
        duration_s: seconds of the file by its header, None if unknown.
        num_frames: frames of the stream by its header, None if unknown.
        stream_index: index of the stream in the file.
        num_video_streams: number of video streams without cover pictures.
        time_base_s: seconds of one pts tick.
        origin_s: presentation time that a player shows as 0.
        pts: ticks of the pictures to be shown by the packets, sorted, each once.
        key_pts: ticks of the keyframes, which need no pictures before them.
        end_pts: tick at which the last picture ends.
        interlaced: True if a picture may come as two fields.
        is_intra_only: True if each picture of the codec decodes by itself.
        traits: names of properties for which seeking decoders go wrong, see ``packets.scan_packets``; also
            ``path like a pattern``: they would take the path for many pictures.
        fault: reason why the file seems damaged; empty if it does not.
        has_moved_end: True if rules of version 1 took another time for the end of the film.
        remark: remark for a person about an undamaged file; empty if there is none.
        block_times: position in the file → ticks, for packets with times that PyAV does not report.
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
    is_intra_only: bool
    traits: frozenset[str]
    fault: str
    remark: str = ""
    has_moved_end: bool = False
    block_times: Mapping[int, int] = field(default_factory=dict)

    @property
    def wraps(self) -> int:
        """Ticks after which the container's clock starts at 0 again; 0 for never."""
        return WRAPS.get(self.container, 0)


def probe(path: str | Path) -> Probe:
    """Reads the header and all packets of a video file.

    Raises:
        DataError: if the file cannot be opened or has no video stream that can be decoded.
    """
    path = str(Path(path).absolute())  # absolute: FFmpeg takes "a:b.mp4" for a protocol
    _check_kind(path)
    with ErrorLog() as log, open_container(path) as container:
        stream, num_video_streams = _main_stream(container, path)
        scan = scan_packets(container, stream, log)
        if not scan.num_packets and _is_external(path, stream):
            what = "has its pictures in other files (data references), which are not opened"
            raise DataError(what, where=path, accepted=ACCEPTED)
        context = stream.codec_context
        name = container.format.name.split(",")[0]
        if name == "avi":
            extend_last_picture(scan, path, stream)
        frames = stream.frames or None
        time_base_s = time_base_of(stream)
        duration_s = container.duration / av.time_base if container.duration else None
        start_s = (container.start_time or 0) / av.time_base
        missing = missing_end(scan, name, frames, duration_s, start_s) if name in _EXACT_HEADERS else ""
        if is_pattern(path):
            scan.traits.add("path like a pattern")
        fault = scan.stopped_early or missing or scan.damage
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
            time_base_s=time_base_s,
            origin_s=_origin(name, start_s, scan.pts, time_base_s),
            pts=np.unique(np.array(scan.pts, dtype=np.int64)),
            key_pts=np.unique(np.array(scan.key_pts, dtype=np.int64)),
            end_pts=scan.end_pts,
            interlaced=context.field_order > 1,  # 0: unknown, 1: progressive
            is_intra_only=context.codec.intra_only,
            traits=frozenset(scan.traits),
            fault=fault,
            remark=scan.remark,
            has_moved_end=scan.has_moved_end,
            block_times=scan.block_times,
        )


def _origin(container: str, start_s: float, pts: Sequence[int], time_base_s: float) -> float:
    """Returns the time that a player shows as 0.

    Encoder delay can put the first sound below 0, which players ignore. If clocks wrap, times below 0 are
    before the wrap, and count; so do pictures below 0.
    """
    first_s = min(pts) * time_base_s if pts else 0.0
    if container in WRAPS:
        return start_s
    return min(max(start_s, 0.0), first_s) if first_s < 0 else max(start_s, 0.0)


def _check_kind(path: str) -> None:
    """Raises an error for a path that is not a file; allows a named pipe, since its reader has a deadline."""
    try:
        mode = Path(path).stat().st_mode
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or socket"
        fault = "" if stat.S_ISREG(mode) or stat.S_ISFIFO(mode) else f"it is {kind}"
    except (OSError, ValueError) as error:
        link = broken_link(path)
        fault = f"it is {link}" if link else explain_error(error)
    if fault:
        raise DataError(f"cannot be opened as a video: {fault}", where=path, accepted=ACCEPTED)


def open_container(path: str) -> av.container.InputContainer:
    """Opens a local file for reading, but no other file that it may name.

    Raises:
        DataError: if it cannot be opened, or reading it would open other files.
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
    """Explains why a file cannot be opened, by its first bytes if they tell more than FFmpeg's error."""
    if head is None:
        return explain_error(error)
    kind, container = file_kind(head), container_of_head(head)
    if kind:
        return f"it is {kind}"
    if container:
        return f"it begins as {container}, but is cut off, not finished or damaged ({explain_error(error)})"
    if isinstance(error, av.error.ArgumentError):  # FFmpeg's error for formats that are not in its list
        return "it is of a kind that is not read"
    return explain_error(error)


def _main_stream(container: av.container.InputContainer, path: str) -> tuple[av.VideoStream, int]:
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        what = f"has no video stream, {_content(container)}"
        raise DataError(what, where=path, accepted="a file with moving pictures")
    stream = _shown(streams)
    if is_encrypted(path, container.format.name.split(",")[0], stream):
        raise DataError("is encrypted (DRM)", where=path, accepted="a video that plays without a key")
    # If this FFmpeg does not know the codec, the stream has no context, whatever the type says.
    if getattr(stream, "codec_context", None) is None:
        raise DataError("has a video stream whose codec is unknown", where=path)
    stream.codec_context.thread_count = 1
    return stream, len(streams)


def _shown(streams: Sequence[av.VideoStream]) -> av.VideoStream:
    """Returns the track that players show: the first default one, else the first, without thumbnails."""
    flags = av.stream.Disposition
    aside = flags.timed_thumbnails | flags.still_image | flags.dependent
    areas, rates = ([size(stream) for stream in streams] for size in (_area, _rate))
    # A small and slow track beside another holds timeline pictures; some writers mark it as default, too.
    sizes = zip(areas, rates, strict=True)
    small = [
        4 * area <= max(areas) and 0 < rate <= TIMELINE_FPS and 4 * rate <= max(rates) for area, rate in sizes
    ]

    def rank(place: int) -> tuple[bool, bool, int]:
        kinds = streams[place].disposition
        return bool(kinds & aside) or small[place], not kinds & flags.default, place

    return streams[min(range(len(streams)), key=rank)]


def _area(stream: av.VideoStream) -> int:
    context = getattr(stream, "codec_context", None)
    return 0 if context is None else context.width * context.height


def _rate(stream: av.VideoStream) -> float:
    return float(stream.average_rate or 0)


def _content(container: av.container.InputContainer) -> str:
    """Describes the content of a file without moving pictures."""
    names = {"audio": "sound", "video": "a cover picture", "subtitle": "subtitles"}
    kinds = {stream.type for stream in container.streams}
    held = [name for kind, name in names.items() if kind in kinds]
    return f"only {' and '.join(held)}" if held else "nor any other that is known"


def _is_external(path: str, stream: av.VideoStream) -> bool:
    return any(track.track_id == stream.id and track.is_external for track in mov_tracks(path))
