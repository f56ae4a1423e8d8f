"""Files that refer to other files, with a readable clip next to them: each must be refused.

A reader that follows such a reference stores pictures of a file that nobody listed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.films.clocks import one_of
from tests.films.film import FITS, Film, draw_track, jpeg, write

_ENDINGS = ("mp4", "ts", "mkv", "avi", "webm", "txt", "jpg", "")


def hls(rng: np.random.Generator, path: Path) -> Film:
    """An HLS playlist, of segments or of other playlists."""
    clip = _beside(rng, path, "mpegts" if rng.random() < 0.7 else "mp4")
    entry = f"#EXTINF:4.0,\n{_name(rng, clip)}\n"
    if clip.suffix == ".mp4":
        entry = f'#EXT-X-MAP:URI="{clip.name}"\n{entry}'
    text = f"#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:8\n{entry}#EXT-X-ENDLIST\n"
    if rng.random() < 0.3:
        inner = clip.with_name("inner.m3u8")
        inner.write_text(text, encoding="utf-8")
        text = f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=100000\n{inner.name}\n"
    return _link(rng, path, text, "m3u8")


def concat(rng: np.random.Generator, path: Path) -> Film:
    """A list of FFmpeg's concat demuxer."""
    clip = _beside(rng, path, one_of(rng, "mp4", "mpegts", "matroska"))
    entry = f"file '{_name(rng, clip)}'\n"
    if rng.random() < 0.3:
        entry += "inpoint 0.5\noutpoint 1.5\n"
    return _link(rng, path, f"ffconcat version 1.0\n{entry * int(rng.integers(1, 3))}", "ffconcat")


def dash(rng: np.random.Generator, path: Path) -> Film:
    """A manifest of MPEG-DASH."""
    clip = _beside(rng, path, "mp4")
    text = f"""<?xml version="1.0" encoding="utf-8"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"
 type="static" mediaPresentationDuration="PT4S" minBufferTime="PT1S"><Period><AdaptationSet
 mimeType="video/mp4" contentType="video"><Representation id="0" bandwidth="100000" width="64" height="64">
<BaseURL>{_name(rng, clip)}</BaseURL><SegmentBase/></Representation></AdaptationSet></Period></MPD>
"""
    return _link(rng, path, text, "mpd")


def sdp(rng: np.random.Generator, path: Path) -> Film:
    """An SDP session description, which names an address to listen at."""
    port = int(rng.integers(20_000, 60_000)) * 2 % 65_536
    payload, codec = ("33", "MP2T/90000") if rng.random() < 0.5 else ("96", "H264/90000")
    text = (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=film\nc=IN IP4 127.0.0.1\nt=0 0\n"
        f"m=video {port} RTP/AVP {payload}\na=rtpmap:{payload} {codec}\n"
    )
    return _link(rng, path, text, "sdp")


def images(rng: np.random.Generator, path: Path) -> Film:
    """A file whose name is FFmpeg's pattern for a series of pictures, next to such a series."""
    pattern, ending = one_of(rng, "%d", "%03d", "frame%02d"), one_of(rng, "jpg", "jpeg")
    for number in range(int(rng.integers(2, 9))):
        path.with_name(f"{pattern % number}.{ending}").write_bytes(jpeg(number, 64, 64))
    link = path.with_name(f"{pattern}.{ending}")
    link.write_bytes(jpeg(999, 64, 64) if rng.random() < 0.5 else b"")
    return Film(link, f"{link.name}, {link.stat().st_size} bytes, beside such pictures", ())


def _beside(rng: np.random.Generator, path: Path, container: str) -> Path:
    """Writes a clip into the same folder, which anyone can read."""
    clip = path.with_name(f"private.{FITS[container][1]}")
    # FFmpeg's HLS demuxer accepts only fragmented MP4; whole files are for the others.
    options = {"movflags": "frag_keyframe+empty_moov"} if container == "mp4" else None
    write(clip, container, [draw_track(rng, container, two_way=False, length_s=(1.0, 2.0))], options)
    return clip


def _name(rng: np.random.Generator, clip: Path) -> str:
    """Returns a name by which a list may refer to a clip."""
    return (clip.name, clip.name, str(clip.absolute()), clip.absolute().as_uri())[int(rng.integers(4))]


def _link(rng: np.random.Generator, path: Path, text: str, ending: str) -> Film:
    ending = ending if rng.random() < 0.4 else one_of(rng, *_ENDINGS)
    link = path.with_name(f"{path.name}.{ending}" if ending else path.name)
    link.write_text(text, encoding="utf-8")
    return Film(link, f"{link.name}: {' '.join(text.split())[:160]}", ())
