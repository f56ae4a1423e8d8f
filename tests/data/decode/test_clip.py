"""Decoding: the right pictures of whatever people have, or an error; never others, never zeros."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from gare.data.decode import backend_pyav as from_start
from gare.data.decode.backend_decord import unfit_for_decord
from gare.data.decode.backend_pyav import decode_from_start, least_effort
from gare.data.decode.backend_torchcodec import unfit_for_torchcodec
from gare.data.decode.clip import decode_clip
from gare.data.decode.decoded_clip import DecodedClip
from gare.data.decode.probe import probe
from gare.data.images import prepare_frame
from gare.errors import DataError

#: Real clips on which decord cannot be trusted; the others are decoded by it.
PYAV = {
    "100_0306.AVI": "container avi",
    "3qqEKTPxLNs_1_15.avi": "container avi",  # decord gives wrong pictures, silently
    "UXs3eq68ZjE_250_255.avi": "container avi",  # the same
    "klteYv1Uv9A_27_33.avi": "container avi",  # the same
    "apply_eye_makeup.avi": "container avi",
    "TZ860P4iTaM_15_28.gif": "container gif",
    "newtonscradle.gif": "container gif",
    "pigs_in_a_polka.gif": "container gif",
    "test_card_av1.mkv": "codec av1",
    "test_pattern_321x241_vp9.mp4": "odd size 321x241",  # decord's colours are off
    "fire2.mp4": "rotated or mirrored",
    "ftyp3gp5.mp4": "rotated or mirrored",
    "video_90.mov": "rotated or mirrored",
    "nasa_13013.mp4": "2 video streams",
    "foreman-hevc-384.mp4": "open GOP",  # decord gives wrong pictures, silently
    "stream-of-water.webm": "shared timestamps",  # decord counts five frames too many
}
NOT_VIDEOS = {
    "audio_only.mp4": "no video stream",
    "text_renamed.mp4": "cannot be opened",
    "truncated_70pct_index_last.mp4": "cannot be opened",
    "zero_byte.mp4": "cannot be opened",
    "zero_duration.mp4": "no frame decodes",
}
DAMAGED = {
    "corrupted.mp4": "damaged packets or frames",
    "flipped_200_bytes.mp4": "damaged packets or frames",
    "truncated_30pct_index_first.mp4": "88 of the 300 frames",
    "truncated_50pct.webm": "its data end at 2.45 s",
}


def small(rgb: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return prepare_frame(rgb, 64)


def upright(frame: av.VideoFrame) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90 % 4))


@dataclass
class Reference:
    """A plain decode from the start: what is shown when, and the pictures that some clip holds."""

    times_s: list[float]
    end_s: float
    keys_s: list[float]
    pictures: dict[int, np.ndarray[Any, Any]]

    @classmethod
    def of(cls, path: Path, clips: Sequence[DecodedClip], until_s: float = np.inf) -> Reference:
        found = cls([], 0.0, [], {})
        wanted = {int(i) for clip in clips for i in clip.frame_idx}
        keys = []
        with av.open(str(path)) as container:
            for i, frame in enumerate(container.decode(video=0)):
                if frame.time > until_s:
                    break
                found.times_s.append(frame.time)
                found.end_s = max(found.end_s, frame.time + float(frame.duration * frame.time_base))
                if frame.key_frame:
                    keys.append(i)
                if i in wanted:
                    found.pictures[i] = small(upright(frame))
        # A decoder gives pictures in the order in which they are shown, whatever their packets' times.
        found.times_s.sort()
        found.keys_s = [found.times_s[i] for i in keys]
        return found

    def moments(self, sampling: str, start_s: float, end_s: float) -> list[float]:
        """When the frames of a clip must be shown, by the policies written out by hand."""
        shown = sorted(self.times_s)
        start_s, end_s = max(start_s, shown[0]), min(end_s, self.end_s)
        if sampling == "keyframes":
            inside = [t for t in sorted(self.keys_s) if start_s - 1e-6 <= t < end_s - 1e-6]
            middle = (start_s + end_s) / 2
            expected = inside or [min(self.keys_s, key=lambda t: abs(t - middle))]
        else:
            seconds = (
                np.arange(start_s, end_s - 1e-6)
                if sampling == "released"
                else [start_s + (k + 0.5) / 12 * (end_s - start_s) for k in range(12)]
            )
            expected = [max(t for t in shown if t <= second + 1e-6) for second in seconds]
        if len(expected) > 12:
            expected = [expected[i] for i in np.linspace(0, len(expected) - 1, 12).astype(int)]
        return expected

    def faults(self, clip: DecodedClip, start_s: float = -np.inf, end_s: float = np.inf) -> list[str]:
        """Compares each frame by index, time and pixels, and the moments chosen."""
        faults = []
        for i, rgb, time_s in zip(clip.frame_idx.tolist(), clip.frames, clip.time_s, strict=True):
            if i not in self.pictures:
                faults.append(f"frame {i} does not exist")
            elif abs(self.times_s[i] - time_s) > 1e-6:
                faults.append(f"frame {i} at {self.times_s[i]}, not {time_s}")
            elif (self.pictures[i] != rgb).any():
                faults.append(f"frame {i} is another picture")
        expected = self.moments(clip.sampling, start_s, end_s)
        if len(clip.time_s) != len(expected) or not np.allclose(clip.time_s, expected):
            faults.append(f"times {clip.time_s} instead of {expected}")
        return [f"{clip.sampling} by {clip.decoder}: {fault}" for fault in faults]


def faults_of(clip: DecodedClip, path: Path) -> list[str]:
    """Compares one clip of a whole file with a plain decode from the start."""
    return Reference.of(path, [clip]).faults(clip)


def faults_by_policy(path: Path, rng: np.random.Generator) -> list[str]:
    """Decodes a clip in all ways, whole and from a second to a second within it, and compares."""
    # The long one is decoded from the start up to here only, to keep the test short.
    end_s = 8.0 if path.name == "slides_talk.mp4" else np.inf
    source = probe(path)
    asked: dict[str, Any] = {"end_s": end_s if np.isfinite(end_s) else None, "prepare": small}
    clip = decode_clip(path, **asked)
    keys = decode_clip(path, sampling="keyframes", **asked)
    lasts_s = min(end_s, clip.duration_s)
    a, b = float(rng.uniform(0, 0.5) * lasts_s), float(rng.uniform(0.6, 1) * lasts_s)
    asked = {"start_s": a, "end_s": b, "prepare": small}
    inner = decode_clip(path, sampling="uniform", decoder="pyav", **asked)
    inner_keys = decode_clip(path, sampling="keyframes", **asked)
    reference = Reference.of(path, [clip, keys, inner, inner_keys], until_s=end_s)
    found = reference.faults(clip, end_s=end_s) + reference.faults(keys, end_s=end_s)
    for one in (inner, inner_keys):
        found += reference.faults(one, source.origin_s + a, source.origin_s + b)
    reason = PYAV.get(path.name, "")
    if unfit_for_decord(source) != reason or clip.decoder != ("pyav" if reason else "decord"):
        found.append(f"decoded by {clip.decoder}")
    if not clip.complete or clip.note:
        found.append(f"called damaged: {clip.note}")
    return found


def test_all_real_clips_equal_a_decode_from_the_start(shared: Path, rng: np.random.Generator) -> None:
    """Lost otherwise: right pictures, silently: seeking decoders return others on many real files.

    Every policy that says at which moments it looks, by every decoder that may be asked, on whole files and
    from a second to a second within them.
    """
    files = sorted((shared / "data/videos").iterdir())
    assert len(files) == 58
    faults = {path.name: found for path in files if (found := faults_by_policy(path, rng))}
    assert not faults


@pytest.mark.parametrize(
    ("name", "width", "height"),
    [("fire2.mp4", 1280, 720), ("ftyp3gp5.mp4", 720, 1280), ("video_90.mov", 320, 568)],
)
def test_rotated_clips_stand_upright(shared: Path, name: str, width: int, height: int) -> None:
    """Lost otherwise: what most phones record; towers trained upright see people lying."""
    path = shared / "data/videos" / name
    clip = decode_clip(path, num_frames=1)
    assert (clip.width, clip.height) == (width, height)
    assert clip.frames[0].shape == (height, width, 3)
    with av.open(str(path)) as container:
        assert (clip.frames[0] == upright(next(container.decode(video=0)))).all()


@pytest.mark.parametrize("name", sorted(NOT_VIDEOS))
def test_what_is_no_video_is_an_error(shared: Path, name: str) -> None:
    """Lost otherwise: the knowledge that this file needs a look."""
    with pytest.raises(DataError, match=NOT_VIDEOS[name]) as caught:
        decode_clip(shared / "data/broken" / name)
    assert caught.value.where.endswith(name)


def test_other_odd_files_give_real_pictures(shared: Path) -> None:
    """Lost otherwise: what is left of a damaged file, or the truth about it."""
    left = {p.name for p in (shared / "data/broken").iterdir()} - set(NOT_VIDEOS) - {"README.md"}
    assert set(DAMAGED) < left
    for name in sorted(left):
        clip = decode_clip(shared / "data/broken" / name, prepare=small)
        assert clip.complete == (name not in DAMAGED), name
        assert DAMAGED.get(name, "") in clip.note
        assert len(set(clip.frame_idx)) == len(clip.frames)
        for rgb in clip.frames:
            assert rgb.any(), name
            assert rgb.std() > (0 if clip.complete else 20), name
        if clip.complete and name != "no_duration.webm":
            assert not faults_of(clip, shared / "data/broken" / name), name


def test_nearly_black_is_what_the_file_holds(shared: Path) -> None:
    """Lost otherwise: the difference between a dark picture and a failed one."""
    path = shared / "data/broken/no_duration.webm"
    assert not faults_of(decode_clip(path, prepare=small), path)


def test_truncated_clip_is_sampled_over_what_is_left(shared: Path) -> None:
    """Lost otherwise: half a clip, or its last picture twelve times."""
    clip = decode_clip(shared / "data/broken/truncated_30pct_index_first.mp4")
    assert clip.time_s.tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"starts at 8 s, the video lasts 3.52 s \(cut off"):
        decode_clip(shared / "data/broken/truncated_30pct_index_first.mp4", start_s=8)


def copied(source: Path, target: Path, shift_s: float) -> Path:
    """A stream copy whose first ``shift_s`` seconds lie before zero, as cutting tools make it."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        shift = int(shift_s / old.streams.video[0].time_base)
        for packet in old.demux(video=0):
            if packet.size:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = stream
                new.mux(packet)
    return target


def test_edit_list(shared: Path, tmp_path: Path) -> None:
    """Lost otherwise: every clip that was cut without re-encoding; decord shows other seconds of it."""
    source = shared / "data/videos/video7014.mp4"
    cut = copied(source, tmp_path / "cut.mp4", 1.0)
    assert unfit_for_decord(probe(cut)) == "edit list"
    clip, whole = decode_clip(cut, num_frames=64), decode_clip(source, start_s=1, num_frames=64)
    assert len(clip.frames) == 11
    assert clip.time_s.tolist() == (whole.time_s - 1).tolist()
    assert all((a == b).all() for a, b in zip(clip.frames, whole.frames, strict=True))


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a video whose picture k is a plain grey of 8·k, with two marked corners."""

    def make(
        ticks: Sequence[int], name: str = "made.mp4", matrix: Callable[[Any], None] | None = None
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream(
                "libx264", rate=10, options={"g": "5", "bf": "0", "crf": "5", "sc_threshold": "0"}
            )
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 10)
            if matrix:
                matrix(stream)
            for k, tick in enumerate(ticks):
                rgb = np.full((48, 64, 3), 8 * k, np.uint8)
                rgb[:24, :32], rgb[24:, :32] = (255, 0, 0), (0, 0, 255)  # red above blue, at the left
                frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
                frame.pts, frame.time_base = tick, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return make


def greys(clip: DecodedClip) -> list[int]:
    return [round(float(rgb[20:28, 60:].mean()) / 8) for rgb in clip.frames]


def test_variable_frame_rate(write: Write) -> None:
    """Lost otherwise: the moments of phone and screen recordings, by counting frames instead of time."""
    path = write([0, 1, 2, 3, 35, 36, 50, 51])
    clip = decode_clip(path)
    assert greys(clip) == [0, 3, 3, 3, 5, 6]
    assert clip.time_s.tolist() == pytest.approx([0, 0.3, 0.3, 0.3, 3.6, 5.0])


def test_start_and_end(write: Write) -> None:
    """Lost otherwise: the annotated moment of a long video."""
    path = write(range(30))
    assert greys(decode_clip(path, start_s=1.0, end_s=2.5, sample_fps=2)) == [10, 15, 20]
    assert greys(decode_clip(path, end_s=0.5)) == [0]
    assert greys(decode_clip(path, sample_fps=10, num_frames=3)) == [0, 14, 29]
    beyond = decode_clip(path, start_s=2.0, end_s=9.0)
    assert greys(beyond) == [20]
    assert beyond.note == "end_s 9 lies beyond the video's 3.00 s"
    assert beyond.complete


def test_uniform_sampling(write: Write) -> None:
    """Lost otherwise: frames spread over the whole clip, F of them however short it is."""
    path = write(range(30))
    assert greys(decode_clip(path, sampling="uniform", num_frames=3)) == [5, 15, 25]
    inner = decode_clip(path, sampling="uniform", start_s=1.0, end_s=2.0, num_frames=2)
    assert greys(inner) == [12, 17]
    assert inner.sampling == "uniform"
    assert greys(decode_clip(path, sampling="uniform", end_s=0.2, num_frames=4)) == [0, 0, 1, 1]


def test_keyframes_alone(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: the speed that the policy is for, or the word that no keyframe lies in the clip."""
    path = write(range(30))  # a keyframe every 5 pictures
    seen = []
    monkeypatch.setattr("gare.data.decode.backend_pyav._frames", noting(seen))
    clip = decode_clip(path, sampling="keyframes")
    assert greys(clip) == [0, 5, 10, 15, 20, 25] == clip.frame_idx.tolist()
    assert (clip.sampling, clip.decoder, clip.note) == ("keyframes", "pyav", "")
    assert len(seen) == 6  # packets that were decoded
    assert greys(decode_clip(path, sampling="keyframes", num_frames=3)) == [0, 10, 25]
    assert greys(decode_clip(path, sampling="keyframes", start_s=0.5, end_s=1.5)) == [5, 10]
    between = decode_clip(path, sampling="keyframes", start_s=1.1, end_s=1.4)
    assert greys(between) == [10]
    assert between.note == "no keyframe inside the clip, the nearest is taken"


def noting(seen: list[Any]) -> Callable[..., Any]:
    """``_frames``, noting the packets that reach the decoder."""
    frames = from_start._frames

    def noted(packets: Any, *rest: Any) -> Any:
        return frames((seen.append(packet) or packet if packet.size else packet for packet in packets), *rest)

    return noted


def test_pyav_leaves_out_what_no_picture_refers_to(shared: Path) -> None:
    """Lost otherwise: a third of the time on phone videos; that pixels stay is shown on all real clips."""
    source = probe(shared / "data/videos/video7014.mp4")
    assert least_effort(source, keyframes=False) == "needed"
    assert least_effort(source, keyframes=True) == "alone"
    wanted = {int(source.pts[0]), int(source.pts[-1])}
    every, needed = (
        decode_from_start(source, wanted, small, effort)
        for effort in ("all", "needed")  # type: ignore[arg-type]
    )
    assert 2 <= len(needed.order) < 0.8 * len(every.order)
    assert all((needed.kept[tick] == every.kept[tick]).all() for tick in wanted)
    # Where B-frames share a packet, one packet is not one picture.
    assert least_effort(probe(shared / "data/videos/apply_eye_makeup.avi"), keyframes=False) == "all"
    assert least_effort(probe(shared / "data/videos/newtonscradle.gif"), keyframes=True) == "all"
    assert least_effort(dataclasses.replace(source, interlaced=True), keyframes=False) == "all"


def test_torchcodec(shared: Path) -> None:
    """Lost otherwise: the right moments, for those who decode with it."""
    decoders = pytest.importorskip("torchcodec.decoders", exc_type=(ImportError, OSError, RuntimeError))
    assert decoders
    faults, by = {}, {}
    for path in sorted((shared / "data/videos").iterdir())[::4]:
        clip = decode_clip(path, end_s=4.0, decoder="torchcodec", prepare=small)
        plain = decode_clip(path, end_s=4.0, decoder="pyav", prepare=small)
        by[path.suffix] = clip.decoder
        assert clip.frame_idx.tolist() == plain.frame_idx.tolist(), path
        assert clip.time_s.tolist() == plain.time_s.tolist(), path
        off = np.abs(np.stack(clip.frames).astype(int) - np.stack(plain.frames)).mean()
        if off > 2:  # it has a conversion to RGB of its own
            faults[path.name] = off
    assert not faults
    assert by[".mp4"] == by[".webm"] == "torchcodec"
    assert unfit_for_torchcodec(probe(shared / "data/videos/fire2.mp4")) == "rotated or mirrored"


@pytest.mark.parametrize(
    ("start_s", "end_s", "message"),
    [
        (3.0, None, "starts at 3 s, the video lasts 3.00 s"),
        (50, 60, "starts at 50 s, the video lasts 3.00 s"),
        (2.0, 1.0, "ends at 1 s, no picture is shown before that; the video lasts 3.00 s"),
        (None, 0.0, "ends at 0 s"),
    ],
)
def test_clips_outside_the_video(
    write: Write, start_s: float | None, end_s: float | None, message: str
) -> None:
    """Lost otherwise: the hint that annotation and video do not belong together."""
    with pytest.raises(DataError, match=re.escape(message)):
        decode_clip(write(range(30)), start_s=start_s, end_s=end_s)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_all_eight_orientations(write: Write, degrees: int, mirrored: bool) -> None:
    """Lost otherwise: selfies and whatever way up a phone was held."""
    path = write([0, 1], matrix=lambda s: s.set_display_rotation(degrees, hflip=mirrored))
    plain = decode_clip(write([0, 1], name="plain.mp4"), num_frames=1).frames[0]
    turned = np.rot90(plain, degrees // 90)
    expected = turned[:, ::-1] if mirrored else turned
    (rgb,) = decode_clip(path, num_frames=1).frames
    assert rgb.shape == expected.shape
    assert np.abs(rgb.astype(int) - expected).mean() < 1


def test_black_is_not_taken_for_a_failure(write: Write) -> None:
    """Lost otherwise: every video that fades in from black."""
    clip = decode_clip(write(range(20)), prepare=lambda rgb: rgb[:, 40:])
    assert clip.decoder == "decord"
    assert clip.frames[0].max() == 0


def test_names_that_mean_something_to_a_decoder(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost otherwise: files whose names hold a colon, a percent sign, a dash in front or an emoji."""
    for name in ("-i.mp4", "http:clip.mp4", "50%d off.mp4", "naïve 日本語 🎬 (1).mp4"):
        path = (
            write(range(3), name=name)
            if ":" not in name
            else write(range(3)).rename(write([0]).parent / name)
        )
        monkeypatch.chdir(path.parent)
        assert len(decode_clip(name).frames) == 1


def test_a_playlist_cannot_reach_out(tmp_path: Path) -> None:
    """Lost otherwise: a safe folder: a text file named .mp4 would make the machine fetch what it names."""
    path = tmp_path / "list.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(DataError):
        decode_clip(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    """Lost otherwise: the name of the missing file."""
    for path in (tmp_path / "gone.mp4", tmp_path):
        with pytest.raises(DataError, match="cannot be opened") as caught:
            decode_clip(path)
        assert caught.value.where == str(path)


def test_frames_are_prepared_one_by_one(shared: Path) -> None:
    """Lost otherwise: gigabytes, on 4K video with many frames."""
    clip = decode_clip(shared / "data/broken/uhd_4k_1s.mp4", sample_fps=8, num_frames=8, prepare=small)
    assert {rgb.shape for rgb in clip.frames} == {(64, 64, 3)}
    assert (clip.width, clip.height) == (3840, 2160)


@pytest.mark.parametrize("library", ["decord", "torchcodec"])
def test_decoders_have_one_importer(repository: Path, library: str) -> None:
    """Lost otherwise: the checks in front of it, and start-up time wherever the import happens."""
    users = [
        path.relative_to(repository).as_posix()
        for folder in ("gare", "cluster", "pipelines")
        for path in (repository / folder).rglob("*.py")
        if re.search(rf"^\s*(import|from) {library}\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert users == [f"gare/data/decode/backend_{library}.py"]
