"""An encrypted video is a failure with that reason, never garbage in a store."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from gare.data.decode import mov_tracks as reading
from gare.data.decode.clip import decode_clip
from gare.data.decode.mov_tracks import mov_tracks
from gare.errors import DataError
from tests.data.decode.test_containers import boxed, replaced, write_video

KEY = "00112233445566778899aabbccddeeff"
ENCRYPTED = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": KEY, "encryption_kid": KEY}


def write_mp4(path: Path, rng: np.random.Generator, options: dict[str, str]) -> Path:
    """Ten noisy pictures, so that there is something to encrypt."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(10):
            rgb = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("layout", [{}, {"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"}])
@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_an_encrypted_mp4_is_refused(
    tmp_path: Path,
    rng: np.random.Generator,
    layout: dict[str, str],
    decoder: str,
) -> None:
    """Lost otherwise: garbage among the frames of a training set, from a film that was bought or rented."""
    path = write_mp4(tmp_path / "bought.mp4", rng, {**ENCRYPTED, **layout})
    with pytest.raises(DataError, match=r"is encrypted \(DRM\)"):
        decode_clip(path, decoder=decoder)  # type: ignore[arg-type]
    plain = write_mp4(tmp_path / "plain.mp4", rng, layout)
    assert len(decode_clip(plain, sample_fps=10).frames) == 10
    assert [track.entries for track in mov_tracks(str(plain))] == [{b"mp4v"}]


def test_apples_entry_is_known_too(tmp_path: Path) -> None:
    """Lost otherwise: the reason, for what is bought from Apple."""
    path = write_video(tmp_path / "bought.m4v.mp4", "libx264")
    where = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
    data = replaced(path.read_bytes(), where, lambda entries: entries.replace(b"avc1", b"drmi", 1))
    path.write_bytes(data)
    with pytest.raises(DataError, match="is encrypted"):
        decode_clip(path)


def test_an_encrypted_track_beside_a_plain_one(tmp_path: Path) -> None:
    """Lost otherwise: a clip whose pictures are plain, for the sake of another track."""
    path = write_video(tmp_path / "a.mp4", "libx264")

    def with_second(moov: bytes) -> bytes:
        at = moov.index(b"trak") - 4
        trak = moov[at : at + int.from_bytes(moov[at : at + 4], "big")]
        header = trak.index(b"tkhd") + 4
        second = trak[: header + 12] + struct.pack(">I", 9) + trak[header + 16 :]
        return moov + second.replace(b"avc1", b"encv", 1)

    path.write_bytes(replaced(path.read_bytes(), (b"moov",), with_second))
    assert [(track.track_id, track.entries) for track in mov_tracks(str(path))] == [
        (1, {b"avc1"}),
        (9, {b"encv"}),
    ]
    assert len(decode_clip(path).frames) == 1


@pytest.mark.parametrize("num_boxes", [1001, 20_000])
def test_an_index_behind_many_boxes_is_found(tmp_path: Path, num_boxes: int) -> None:
    """Lost otherwise: what a recorder wrote in fragments, with its index behind them: garbage of its key."""
    path = write_video(tmp_path / "bought.mp4", "libx264")
    data = path.read_bytes()
    at = data.index(b"mdat") - 4
    fragments = (boxed(b"moof", boxed(b"mfhd", bytes(8))) + boxed(b"mdat", b"")) * (num_boxes // 2)
    mdat = data[at : at + int.from_bytes(data[at : at + 4], "big")]
    moov = data[at + len(mdat) :]
    path.write_bytes(data[:at] + mdat + fragments + moov)
    assert [(track.track_id, track.entries) for track in mov_tracks(str(path))] == [(1, {b"avc1"})]
    path.write_bytes(data[:at] + mdat + fragments + moov.replace(b"avc1", b"encv", 1))
    with pytest.raises(DataError, match="is encrypted"):
        decode_clip(path)


def test_boxes_beyond_counting_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: a file made to hide its index, whose key would not be asked for."""
    path = tmp_path / "a.mp4"
    path.write_bytes(boxed(b"free", b"") * 50)
    assert mov_tracks(str(path)) == []
    monkeypatch.setattr(reading, "MAX_BOXES", 49)
    with pytest.raises(DataError, match="more than 49 boxes before its index"):
        mov_tracks(str(path))


def element(name: str, content: bytes) -> bytes:
    """An EBML element with a length of eight bytes."""
    return bytes.fromhex(name) + struct.pack(">Q", len(content) | 1 << 56) + content


@pytest.mark.parametrize("encrypted", [True, False])
def test_an_encrypted_webm_is_refused(tmp_path: Path, encrypted: bool) -> None:
    """Lost otherwise: garbage, or "damaged", of what a browser has saved."""
    with av.open(str(write_video(tmp_path / "plain.webm", "libvpx"))) as old:
        packets = [bytes(packet) for packet in old.demux(video=0) if packet.size]
    encryption = element("5035", element("47E1", b"\5") + element("47E2", b"0123456789abcdef"))
    encodings = element("6D80", element("6240", element("5033", b"\1") + encryption))
    track = element("D7", b"\1") + element("73C5", b"\1") + element("83", b"\1") + element("86", b"V_VP8")
    track += element("E0", element("B0", b"\x40") + element("BA", b"\x30")) + encodings * encrypted
    blocks = [
        element("A3", b"\x81" + struct.pack(">h", 40 * k) + (b"\x80" if k == 0 else b"\0") + packet)
        for k, packet in enumerate(packets)
    ]
    segment = element("1549A966", element("2AD7B1", b"\x0f\x42\x40")) + element(
        "1654AE6B", element("AE", track)
    )
    segment += element("1F43B675", element("E7", b"\0") + b"".join(blocks))
    path = tmp_path / "saved.webm"
    path.write_bytes(element("1A45DFA3", element("4282", b"webm")) + element("18538067", segment))
    if encrypted:
        with pytest.raises(DataError, match="is encrypted"):
            decode_clip(path)
    else:
        assert len(decode_clip(path).frames) == 1


def test_an_encrypted_wmv_is_refused(tmp_path: Path) -> None:
    """Lost otherwise: garbage of what was bought before 2010."""
    path = write_video(tmp_path / "a.wmv", "wmv2")
    assert decode_clip(path).frames
    data = path.read_bytes()
    size, count = struct.unpack("<QI", data[16:28])
    drm = bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e") + struct.pack("<Q", 40) + bytes(16)
    header = data[:16] + struct.pack("<QI", size + len(drm), count + 1) + data[28:30] + drm + data[30:size]
    path.write_bytes(header + data[size:])
    with pytest.raises(DataError, match="is encrypted"):
        decode_clip(path)


def test_odd_boxes_are_no_tracks(tmp_path: Path, rng: np.random.Generator) -> None:
    """Lost otherwise: the reason of a damaged file, to an error of the code that looks into it."""
    path = write_video(tmp_path / "a.mp4", "libx264")
    good = path.read_bytes()
    assert len(mov_tracks(str(path))) == 1
    short = boxed(b"dinf", boxed(b"dref", bytes(8) + boxed(b"url ", b"\0")))
    short = boxed(b"moov", boxed(b"trak", boxed(b"mdia", boxed(b"minf", short))))
    for data in (b"", b"\0", short, boxed(b"moov", b""), boxed(b"moov", boxed(b"trak", b"\0")), bytes(99)):
        path.write_bytes(data)
        assert all(not track.entries for track in mov_tracks(str(path)))
    for _ in range(200):
        data = bytearray(good)
        for at in rng.integers(0, len(data), 30):
            data[at] = int(rng.integers(256))
        path.write_bytes(data[: int(rng.integers(1, len(data) + 1))])
        assert isinstance(mov_tracks(str(path)), list)
    assert mov_tracks(str(tmp_path / "gone")) == mov_tracks(str(tmp_path)) == mov_tracks("a\0b") == []
