"""gare/data/decode/containers.py: files that hold their pictures are read, files that name others never."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from gare.data.decode import probe as probing
from gare.data.decode.backend_decord import unfit_for_decord
from gare.data.decode.backend_torchcodec import unfit_for_torchcodec
from gare.data.decode.clip import decode_clip
from gare.data.decode.containers import DEMUXERS, head_of, names_other_files
from gare.data.decode.mov_tracks import mov_tracks
from gare.data.decode.probe import probe
from gare.errors import DataError

M3U8 = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\nprivate.ts\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile private.ts\n"
MPD = (
    '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" mediaPresentationDuration="PT1S"><Period>'
    '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="9" codecs="avc1">'
    "<BaseURL>private.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>\n"
)
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
IMF = '<?xml version="1.0"?>\n<CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016"/>\n'
ID3 = "ID3\3\0\0\0\0\0\x14" + 20 * "\0"  # FFmpeg leaves a tag of MP3 out before it looks
#: What names other files, by FFmpeg's or a person's name for it.
TEXTS = {
    "HLS": (M3U8, "an HLS or M3U playlist"),
    "HLS behind a tag": (ID3 + M3U8, "an HLS or M3U playlist"),
    "HLS behind a mark": ("\ufeff" + M3U8, "an HLS or M3U playlist"),
    "concat": (CONCAT, "a script for joining files"),
    "concat without a header": ("# mine\nfile 'private.ts'\n", "a script for joining files"),
    "DASH": (MPD, "a DASH manifest"),
    "DASH far away": (f"<!--{'-' * 100_000}-->{MPD}", "a DASH manifest"),
    "SDP": (SDP, "a network stream"),
    "SDP far away": ("a=x\n" * 30_000 + SDP, "a network stream"),
    "IMF": (IMF, "a playlist"),
    "VobSub": ("# VobSub index file, v7\nid: en, index: 0\n", "an index of subtitles"),
    "PLS": ("[playlist]\nFile1=private.ts\n", "a playlist"),
    "ASX": ('<ASX version="3"><Entry><Ref href="private.ts"/></Entry></ASX>', "a playlist"),
    "XSPF": ('<?xml version="1.0"?>\n<playlist version="1"/>', "a playlist"),
    "QuickTime": ("RTSPtext\nrtsp://127.0.0.1/private\n", "a link to a network stream"),
}
NAMES = (
    "list.m3u8",
    "list.ffconcat",
    "list.mpd",
    "list.sdp",
    "list.mp4",
    "list.mkv",
    "list.ts",
    "list.xyz",
    "list",
)
DECODERS = ("auto", "pyav", "torchcodec")


def write_video(
    path: Path, codec: str, pix_fmt: str = "yuv420p", size: tuple[int, int] = (64, 48), rate: int = 25
) -> Path:
    """Five pictures; the container is told from the name."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        for k in range(5):
            rgb = np.full((size[1], size[0], 3), 40 * k, np.uint8)
            rgb[: size[1] // 2] = 255
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A folder with videos and pictures that nobody has asked for."""
    for name in ("private.ts", "private.mp4"):
        write_video(tmp_path / name, "libx264")
    for k in range(3):
        Image.new("RGB", (64, 48), (255, 80 * k, 0)).save(tmp_path / f"frame00{k}.jpg")
    return tmp_path


def refused(path: Path, kind: str) -> None:
    """Asserts that neither the probe nor any decoder gives anything, and that all say the same."""
    kept: list[Any] = []

    def keep(rgb: Any) -> Any:
        kept.append(rgb)
        return rgb

    messages = set()
    with pytest.raises(DataError, match=f"cannot be opened as a video: it is .*{kind}") as caught:
        probe(path)
    messages.add(str(caught.value))
    for decoder in DECODERS:
        with pytest.raises(DataError) as caught:
            decode_clip(path, decoder=decoder, prepare=keep)  # type: ignore[arg-type]
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert not kept
    assert "MP4" in caught.value.accepted
    assert caught.value.where == str(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_playlist_is_refused_by_name(private: Path, name: str) -> None:
    """Lost otherwise: every private video of the machine, to 90 bytes of text from a stranger's server."""
    path = private / name
    for text, kind in TEXTS.values():
        path.write_bytes(text.encode())
        refused(path, f"{kind}.*, which names other files")


@pytest.mark.parametrize("name", ["frame%03d.jpg", "frame%d.JPEG", "frame%*.png", "frame%03d.gif"])
@pytest.mark.parametrize("content", ["JPEG", "GIF", "MP4"])
def test_a_name_is_no_pattern(private: Path, name: str, content: str) -> None:
    """Lost otherwise: pictures of other files, in place of those of a file with a percent sign."""
    path = private / name
    if content == "MP4":
        path.write_bytes((private / "private.mp4").read_bytes())
    else:
        Image.new("RGB", (64, 48), (0, 255, 0)).save(path, format=content)
    refused(path, "named like a sequence of pictures in other files")


@pytest.mark.parametrize("folder", ["50%done", "a%03db", "x%*y", "x%%dy", "50%d %d"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "APNG", "WebP", "BMP", "TIFF", "GIF"])
def test_a_folder_named_like_a_pattern_can_hold_pictures(tmp_path: Path, folder: str, kind: str) -> None:
    """Lost otherwise: all GIFs below a folder such as 50%done, or pictures of another in their place."""
    others = [folder.replace(part, number) for part in ("%d", "%03d") for number in ("1", "001")]
    for name in (*others, folder):
        (tmp_path / name).mkdir(exist_ok=True)
        rgb = (0, 255, 0) if name == folder else (255, 0, 0)
        path = tmp_path / name / f"a.{kind.lower().removeprefix('a')}"
        picture = Image.new("RGB", (64, 48), rgb)
        asked = {"save_all": True, "append_images": [Image.new("RGB", (64, 48), (0, 200, 0))]}
        picture.save(path, format=kind.removeprefix("A"), **(asked if kind in ("APNG", "GIF") else {}))
    source = probe(path)
    assert source.container == {"GIF": "gif", "APNG": "apng"}.get(kind, f"{kind.lower()}_pipe")
    assert len(source.pts) == (2 if kind in ("APNG", "GIF") else 1)
    assert unfit_for_decord(source)
    assert unfit_for_torchcodec(source) == "path like a pattern"
    for decoder in DECODERS:
        (frame,) = decode_clip(path, num_frames=1, decoder=decoder).frames  # type: ignore[arg-type]
        assert frame[20, 20].argmax() == 1


@pytest.mark.parametrize("content", ["MP4", "nothing", "HLS"])
def test_what_is_no_picture_is_not_read_below_such_a_folder(private: Path, content: str) -> None:
    """Lost otherwise: pictures of another folder, in place of a film that is named like a picture."""
    data = {"MP4": (private / "private.mp4").read_bytes(), "nothing": b"", "HLS": M3U8.encode()}[content]
    path = private / "50%done" / "a.gif"
    path.parent.mkdir()
    path.write_bytes(data)
    refused(path, "named like a sequence of pictures in other files")


@pytest.mark.parametrize("name", ["a.m3u8", "a.ffconcat", "a.mp4", "frame%03d.jpg"])
@pytest.mark.parametrize("text", [M3U8, CONCAT, SDP], ids=["HLS", "concat", "SDP"])
def test_the_list_holds_where_the_first_bytes_are_not_understood(
    private: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    """Lost otherwise: the second lock: a kind of playlist that the reading of first bytes does not know."""
    path = private / name
    path.write_text(text)
    monkeypatch.setattr(probing, "names_other_files", lambda head, path: "")
    with pytest.raises(DataError, match="cannot be opened as a video"):
        probe(path)


def test_without_the_list_they_are_followed(private: Path) -> None:
    """Lost otherwise: the sense of the tests above, if PyAV no longer followed playlists by itself."""
    for name, text in (("a.m3u8", M3U8), ("a.ffconcat", CONCAT)):
        (private / name).write_text(text)
        with av.open(str(private / name), options={"protocol_whitelist": "file"}) as container:
            assert len(list(container.decode(video=0))) == 5
        with pytest.raises(av.error.ArgumentError):  # the option reaches FFmpeg
            av.open(str(private / name), options={"format_whitelist": "mov"})
    with av.open(str(private / "frame%03d.jpg")) as container:
        assert len(list(container.decode(video=0))) == 3


def test_no_listed_demuxer_opens_other_files() -> None:
    """Lost otherwise: the point of the list, to a name that somebody adds."""
    followers = (
        "hls applehttp dash concat image2 image2pipe sdp rtsp rtp sap imf vobsub lavfi avisynth vapoursynth "
        "dvdvideo mlv webm_dash_manifest tty"
    )
    assert not DEMUXERS & set(followers.split())
    assert {name for name in DEMUXERS if "," in name} == set()


def polyglots() -> dict[str, bytes]:
    """Starts of files that one FFmpeg may take for a video and another for a playlist."""
    mpd = b"<MPD urn:mpeg:dash:profile:isoff-live:2011 "
    return {
        "a box named free whose size is text": mpd[:4] + b"free" + mpd[4:] + b"\0" * 99,
        "a void element of text": b"\x1aE\xdf\xa3\xff\xec\x40" + mpd + b"\0" * 99,
        "a line of text between bytes": b"\x1aE\xdf\xa3\xff\xec\nc=IN IP4 127.0.0.1\n" + b"\0" * 99,
    }


@pytest.mark.parametrize("name", sorted(polyglots()))
def test_a_file_of_two_kinds_reaches_no_decoder(private: Path, name: str) -> None:
    """Lost otherwise: decord and torchcodec, without a list, follow what PyAV takes for a film."""
    path = private / "both.mp4"
    path.write_bytes(polyglots()[name])
    refused(path, "which names other files")


def test_text_in_a_video_is_not_a_playlist(private: Path) -> None:
    """Lost otherwise: videos whose title mentions a playlist."""
    path = private / "titled.mp4"
    with av.open(str(private / "private.mp4")) as old, av.open(str(path), "w") as new:
        new.metadata["title"] = f"{M3U8}{MPD}{SDP}"
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    assert decode_clip(path).complete
    assert not names_other_files(head_of(str(path)) or b"", "/50%d off/a 100%.mp4")


@pytest.mark.parametrize(
    ("name", "codec", "asked"),
    [
        ("a.mp4", "libx264", {}),
        ("a.mov", "mpeg4", {}),
        ("a.3gp", "mpeg4", {}),
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx", {}),
        ("a.avi", "mpeg4", {}),
        ("a.ts", "libx264", {}),
        ("a.mpg", "mpeg1video", {}),
        ("a.vob", "mpeg2video", {}),
        ("a.flv", "flv1", {}),
        ("a.wmv", "wmv2", {}),
        ("a.ogv", "libvpx", {}),
        ("a.mxf", "mpeg2video", {}),
        ("a.nut", "mpeg4", {}),
        ("a.rm", "rv10", {}),
        ("a.dv", "dvvideo", {"size": (720, 576), "pix_fmt": "yuv420p"}),
        ("a.ivf", "libvpx", {}),
        ("a.y4m", "wrapped_avframe", {}),
        ("a.h264", "libx264", {}),
        ("a.hevc", "libx265", {}),
        ("a.m4v", "mpeg4", {}),
        ("a.m2v", "mpeg2video", {}),
        ("a.mjpeg", "mjpeg", {"pix_fmt": "yuvj420p"}),
        ("a.gif", "gif", {"pix_fmt": "rgb8"}),
        ("a.apng", "apng", {"pix_fmt": "rgb24"}),
        ("a.swf", "flv1", {}),
        ("a.wtv", "mpeg2video", {}),
    ],
)
@pytest.mark.parametrize("renamed", [False, True])
def test_containers_that_people_have_are_read(
    tmp_path: Path, name: str, codec: str, asked: dict[str, Any], renamed: bool
) -> None:
    """Lost otherwise: whole collections, to a list that forgets a container."""
    try:
        path = write_video(tmp_path / name, codec, **asked)
    except (ValueError, av.error.FFmpegError, av.codec.codec.UnknownCodecError) as error:
        pytest.skip(f"this FFmpeg does not write {name}: {error}")
    if renamed:
        path = path.rename(tmp_path / "a.mp4")
    clip = decode_clip(path, sampling="uniform", num_frames=5)
    assert len(clip.frames) == 5
    assert clip.frames[0].any()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "BMP", "TIFF", "PPM", "GIF"])
@pytest.mark.parametrize("ending", [None, "mp4"])
def test_one_picture_is_a_video_of_one_picture(tmp_path: Path, kind: str, ending: str | None) -> None:
    """Lost otherwise: what was read before, and photos with EXIF, whose data PyAV does not know by name."""
    rgb = np.zeros((48, 64, 3), np.uint8)
    rgb[:24] = (255, 0, 0)
    exif = Image.Exif()
    exif[274] = 6  # a quarter turned
    path = tmp_path / f"a 50% (1).{ending or kind.lower()}"
    Image.fromarray(rgb).save(path, format=kind, **({"exif": exif} if kind == "JPEG" else {}))
    (frame,) = decode_clip(path, num_frames=1).frames
    upright = np.rot90(rgb, -1) if kind == "JPEG" else rgb
    assert frame.shape == upright.shape
    assert np.abs(frame.astype(int) - upright).mean() < 8


Make = Callable[[bytes], bytes]


def boxed(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content) + 8) + name + content


def replaced(data: bytes, path: tuple[bytes, ...], make: Make) -> bytes:
    """MP4 boxes with one box in a box in … made anew, and all sizes around it."""
    out, at = b"", 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        name, content = data[at + 4 : at + 8], data[at + 8 : at + size]
        if name == path[0]:
            content = replaced(content, path[1:], make) if len(path) > 1 else make(content)
        out, at = out + boxed(name, content), at + size
    return out


def alias(target: Path) -> bytes:
    """An entry of QuickTime's data references: the absolute path of another file."""
    name = str(target).encode()
    record = (
        bytes(10) + bytes(28) + bytes(12) + bytes([len(target.name)]) + target.name.encode().ljust(63, b"\0")
    )
    record += bytes(16) + struct.pack(">hh", 1, 1) + bytes(16)
    record += struct.pack(">HH", 2, len(name)) + name + bytes(len(name) % 2) + struct.pack(">hH", -1, 0)
    return bytes(4) + struct.pack(">I", 1) + boxed(b"alis", bytes(4) + record)


def test_a_movie_cannot_take_its_pictures_from_another_file(private: Path) -> None:
    """Lost otherwise: private videos again: QuickTime's references are like a playlist."""
    target = private / "private.mp4"
    path = private / "refers.mov"
    where = (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref")
    path.write_bytes(replaced(target.read_bytes(), where, lambda _: alias(target)))
    assert [track.is_external for track in mov_tracks(str(path))] == [True]
    assert [track.is_external for track in mov_tracks(str(target))] == [False]
    for decoder in DECODERS:
        with pytest.raises(DataError, match="has its pictures in other files"):
            decode_clip(path, decoder=decoder)  # type: ignore[arg-type]
    asked = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(str(path), options=asked) as container:  # what is off by default
        assert len(list(container.decode(video=0))) == 5
