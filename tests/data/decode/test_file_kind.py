"""gare/data/decode/file_kind.py: a failure says what the file is."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import wave
import zipfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gare.data.decode.clip import decode_clip
from gare.data.decode.file_kind import HEAD_BYTES, container_of_head, file_kind, leading_text, read_head
from gare.data.decode.probe import probe
from gare.errors import DataError
from tests.data.decode.test_containers import write_video


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("clip.mp4", b"video")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("clip.mp4"))
    return buffer.getvalue()


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), buffer)
    return buffer.getvalue()


def scrambled() -> bytes:
    return b"".join(b"\x47\x01\x00\xd0" + bytes([k % 251]) * 184 for k in range(40))


S3_ERROR = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>NoSuchKey</Code><Key>a.mp4</Key></Error>'
#: What lies in folders of videos and is none, and what the message says of it.
OTHERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "spaces": (b" \n\n", "empty but for spaces"),
    "zeros": (bytes(100_000), "nothing but zeros at its start"),
    "HTML": (b"\n<!DOCTYPE html>\n<html><body>Please log in</body></html>", "an HTML page"),
    "HTML by a mark": ("\ufeff<HTML><title>404 été</title>".encode(), "an HTML page"),
    "XHTML": (b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"/>', "an HTML page"),
    "S3": (S3_ERROR.encode(), "the error of a storage server (NoSuchKey)"),
    "XML": (b"<?xml version='1.0'?><annotation/>", "text (XML)"),
    "LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a Git LFS pointer; fetch the content with git lfs pull",
    ),
    "annex": (
        b"/annex/objects/SHA256E-s1--0.mp4\n",
        "a git-annex pointer; fetch the content with git annex get",
    ),
    "gzip": (gzip.compress(b"video"), "compressed with gzip"),
    "xz": (lzma.compress(b"video"), "compressed with xz"),
    "zstd": (pa.compress(b"video" * 99, codec="zstd", asbytes=True), "compressed with zstd"),
    "zip": (zipped(), "a ZIP archive"),
    "tar": (tarred(), "a tar archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(99), "a 7-Zip archive"),
    "RAR": (b"Rar!\x1a\x07\x01\x00" + bytes(99), "a RAR archive"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document"),
    "Parquet": (parquet(), "a Parquet table"),
    "JSON": (b'{"videos": [1]}', "text (JSON)"),
    "text": ("A page of café notes.\n".encode(), "it is text"),
    "text in UTF-16": ("A page of notes.\n".encode("utf-16"), "it is text"),
    "one letter": (b"x", "it is text"),
    "subtitles": (b"WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n", "subtitles"),
    "AppleDouble": (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(99), "metadata of macOS"),
    "torrent": (b"d8:announce9:localhoste", "a BitTorrent file"),
    "OpenSSL": (b"Salted__" + bytes(range(200)), "encrypted with OpenSSL"),
    "scrambled": (scrambled(), "encrypted (a scrambled MPEG-TS"),
    "half a JPEG": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", "a JPEG picture"),
    "half an MP4": (
        b"\0\0\0\x18ftypmp42" + bytes(12) + b"\0\1\0\0mdat" + bytes(range(256)),
        "it begins as MP4/MOV",
    ),
    "half a Matroska": (b"\x1aE\xdf\xa3\x93\x42\x82\x88matr", "it begins as Matroska/WebM"),
}


@pytest.mark.parametrize("name", sorted(OTHERS))
@pytest.mark.parametrize("ending", [".mp4", ".txt", ".mkv"])
def test_a_failure_says_what_the_file_is(tmp_path: Path, name: str, ending: str) -> None:
    """Lost otherwise: hours: "Invalid data found" says the same of a login page and of a damaged film."""
    content, kind = OTHERS[name]
    path = tmp_path / f"clip{ending}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        decode_clip(path)
    assert kind in str(caught.value)
    assert caught.value.where == str(path)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_sound_and_covers_are_named(tmp_path: Path, shared: Path) -> None:
    """Lost otherwise: the hint that the folder holds songs, whose covers look like a video."""
    clip = shared / "data/videos/chaplin.mp4"
    cover = io.BytesIO()
    Image.new("RGB", (64, 48), (255, 0, 0)).save(cover, format="JPEG")
    paths = {}
    for name, with_cover in (("only sound", False), ("only sound and a cover picture", True)):
        paths[name] = tmp_path / f"{with_cover}.mp4"
        with av.open(str(clip)) as old, av.open(str(paths[name]), "w") as new:
            sound = new.add_stream_from_template(old.streams.audio[0])
            if with_cover:
                picture = new.add_stream("mjpeg", rate=1)
                picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
                picture.disposition = av.stream.Disposition.attached_pic
            for packet in old.demux(audio=0):
                if packet.size:
                    packet.stream = sound
                    new.mux(packet)
            if with_cover:
                packet = av.Packet(cover.getvalue())
                packet.stream, packet.pts, packet.dts = picture, 0, 0
                new.mux(packet)
    paths["only sound"] = tmp_path / "tone.mp4"
    with wave.open(str(paths["only sound"]), "wb") as tone:
        tone.setparams((1, 2, 8000, 0, "NONE", ""))
        tone.writeframes(bytes(16000))
    for expected, path in paths.items():
        with pytest.raises(DataError, match=f"has no video stream, {expected} "):
            probe(path)
    with pytest.raises(DataError, match="only sound"):
        probe(shared / "data/broken/audio_only.mp4")


def test_an_animated_picture_that_does_not_decode_is_named(tmp_path: Path) -> None:
    """Lost otherwise: the reason, where opening goes well and no frame comes."""
    path = tmp_path / "moving.mp4"
    pictures = [Image.new("RGB", (64, 48), (80 * k, 0, 0)) for k in range(3)]
    pictures[0].save(path, format="WEBP", save_all=True, append_images=pictures[1:])
    with pytest.raises(DataError, match="no frame decodes: it is a WebP picture"):
        decode_clip(path)


def test_videos_are_not_called_something_else(shared: Path, tmp_path: Path) -> None:
    """Lost otherwise: the true reason of a damaged video, to a signature that fits too much."""
    names = {}
    for path in sorted((shared / "data/videos").iterdir()):
        head = read_head(str(path)) or b""
        assert file_kind(head) == "", path
        names[path.suffix.lower()] = container_of_head(head)
    assert names == {
        ".mp4": "MP4/MOV",
        ".mov": "MP4/MOV",
        ".mkv": "Matroska/WebM",
        ".webm": "Matroska/WebM",
        ".avi": "AVI",
        ".gif": "GIF",
    }
    for name, codec in {"a.ts": "libx264", "a.mpg": "mpeg1video", "a.flv": "flv1", "a.wmv": "wmv2"}.items():
        head = read_head(str(write_video(tmp_path / name, codec))) or b""
        assert file_kind(head) == ""
        assert container_of_head(head) in ("MPEG-TS", "MPEG-PS", "FLV", "ASF/WMV")


@pytest.mark.parametrize(
    ("brand", "kind"),
    [
        *((brand, "a HEIF picture") for brand in ("heic", "heix", "heim", "heis", "mif1")),
        *(("avif", "an AVIF picture"), ("avis", "an AVIF picture"), ("msf1", "a HEIF sequence of pictures")),
        *((brand, "") for brand in ("hev1", "hevc", "hvc1", "isom", "mp42", "qt  ")),
    ],
)
def test_brands_of_videos_are_not_those_of_pictures(brand: str, kind: str) -> None:
    """Lost otherwise: the reason why a film in HEVC cannot be opened, to "a HEIF picture"."""
    head = b"\0\0\0\x18ftyp" + brand.encode() + bytes(12)
    assert file_kind(head) == kind
    assert container_of_head(head) == "MP4/MOV"


class _Counted(bytes):
    """Bytes that count how many of them are copied."""

    num_copied = 0

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        if isinstance(part, int):
            return part
        _Counted.num_copied += len(part)
        return _Counted(part)


def test_tags_are_passed_in_one_go() -> None:
    """Lost otherwise: an hour for a file of a megabyte that is nothing but empty tags of MP3."""
    tag, text = b"ID3\3\0\0\0\0\0\0", b"#EXTM3U\n"
    _Counted.num_copied = 0
    head = _Counted(tag * 3000 + text)
    assert leading_text(head) == text
    assert _Counted.num_copied < 4 * len(head)
    assert leading_text(tag[:9] + b"\5" + b"\0" * 5 + text) == text
    assert leading_text(tag[:5] + b"\x10" + tag[6:] + b"\0" * 10 + text) == text
    assert leading_text(tag[:6] + b"\x7f" * 4 + text) == b""
    assert leading_text(b"  a\0b") == b"a"


def test_any_bytes_have_a_kind_or_none(rng: np.random.Generator) -> None:
    """Lost otherwise: the reason of a failure, to an error of the code that looks for it."""
    starts = [content for content, _ in OTHERS.values()]
    for _ in range(300):
        head = bytearray(starts[rng.integers(len(starts))][: int(rng.integers(1, 400))])
        head += rng.integers(0, 256, int(rng.integers(0, 50)), dtype=np.uint8).tobytes()
        if head:
            head[int(rng.integers(len(head)))] = int(rng.integers(256))
        for found in (file_kind(bytes(head)), container_of_head(bytes(head))):
            assert isinstance(found, str)
        assert b"\0" not in leading_text(bytes(head))


def test_only_ordinary_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: a pipe's first bytes, or the night, waiting for a device."""
    assert read_head("/dev/zero") is None
    assert read_head(str(tmp_path)) is None
    assert read_head(str(tmp_path / "gone")) is None
    assert read_head("a\0b") is None
    large = tmp_path / "large"
    large.write_bytes(bytes(2 * HEAD_BYTES))
    assert len(read_head(str(large)) or b"") == HEAD_BYTES


def test_a_reason_holds_nothing_of_the_content(tmp_path: Path) -> None:
    """Lost otherwise: a line of a private file, in a store's failures and in MLflow."""
    path = tmp_path / "a.mp4"
    asked: dict[str, Any] = {"match": "it is text"}
    path.write_text("root:secret:0:0\n")
    with pytest.raises(DataError, **asked) as caught:
        decode_clip(path)
    assert "secret" not in str(caught.value)
