"""The generated benchmark: what a user's first run trains and is scored on."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from instant_clip_tokenizer import Tokenizer

from gare.data.synthetic import (
    Claims,
    ObjectClaim,
    PlannedClip,
    Scene,
    SceneObject,
    SyntheticBenchmark,
    ambiguous_fraction,
    caption_is_true,
    generate_benchmark,
    plan_benchmark,
    render_frame,
)
from gare.data.synthetic import encode as encode_module
from gare.data.synthetic.benchmark_plan import GENERATOR_VERSION
from gare.data.synthetic.captions import MAX_WORDS, MIN_WORDS, NUM_CAPTIONS
from gare.data.synthetic.scene import (
    BACKGROUND_COLORS,
    FRAME_RATES,
    FRAME_SIZES,
    LONGEST_S,
    MOTIONS,
    OBJECT_COLORS,
    SHAPES,
    SHORTEST_S,
)
from gare.errors import ConfigError, DataError

ALWAYS = (0.0, float("inf"))


def _object(color: str, shape: str = "circle", motion: str = "still", **others: object) -> SceneObject:
    thing = SceneObject(
        color=color,
        shape=shape,
        size="large",
        motion=motion,
        start_xy=(0.5, 0.5),
        end_xy=(0.5, 0.5),
        start_radius=0.2,
        end_radius=0.2,
        visible_s=ALWAYS,
        active_s=(0.0, 4.0),
    )
    return replace(thing, **others)  # type: ignore[arg-type]


def _scene(*objects: SceneObject, background: str = "black") -> Scene:
    return Scene(96, 72, 10, 40, background, "plain", 0, objects)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> SyntheticBenchmark:
    folder = tmp_path_factory.mktemp("synthetic")
    return generate_benchmark(folder, num_train=6, num_val=2, num_test=4, seed=3, processes=1)


def _digests(benchmark: SyntheticBenchmark) -> list[str]:
    return [hashlib.sha256(clip.path.read_bytes()).hexdigest() for clip in benchmark.clips]


def test_same_seed_gives_the_same_benchmark(benchmark: SyntheticBenchmark, tmp_path: Path) -> None:
    """Otherwise two people with one seed train on different data; two processes cover the parallel way."""
    calls: list[tuple[int, int]] = []
    again = generate_benchmark(
        tmp_path / "new" / "folder",
        num_train=6,
        num_val=2,
        num_test=4,
        seed=3,
        processes=2,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert _digests(again) == _digests(benchmark)
    for clip, other in zip(benchmark.clips, again.clips, strict=True):
        assert replace(clip, path=other.path) == other
    assert calls[0] == (0, 12)
    assert calls[-1] == (12, 12)
    assert sorted(calls) == calls


def test_another_seed_and_longer_splits(seed: int) -> None:
    """A seed that changes nothing, or a small split unlike the start of a large one, misleads a study."""
    small = plan_benchmark(num_train=3, num_val=2, num_test=4, seed=seed)
    large = plan_benchmark(num_train=5, num_val=3, num_test=9, seed=seed)
    for split in ("train", "val", "test"):
        few = [clip for clip in small if clip.split == split]
        assert few == [clip for clip in large if clip.split == split][: len(few)]
    other = plan_benchmark(num_train=3, num_val=2, num_test=4, seed=seed + 1)
    assert all(a.scene != b.scene and a.video_id != b.video_id for a, b in zip(small, other, strict=True))


def test_a_changed_plan_has_a_new_version() -> None:
    """Files are kept by name: with an old name, a new scene's captions would describe the old video."""
    facts = []
    for clip in plan_benchmark(num_train=20, num_val=10, num_test=10, seed=0):
        scene = clip.scene
        facts.append(
            (scene.width, scene.height, scene.fps, scene.num_frames, scene.background, scene.texture)
        )
        for thing in scene.objects:
            numbers = (*thing.start_xy, *thing.end_xy, thing.end_radius, *thing.visible_s, *thing.active_s)
            facts.append((thing.color, thing.shape, thing.motion, *(f"{n:.4f}" for n in numbers)))
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    assert (GENERATOR_VERSION, digest) == (2, "b7a990b107179a61"), "raise the version, then pin the digest"


def test_files_are_as_promised(benchmark: SyntheticBenchmark) -> None:
    """A file that does not decode, or not at its stated rate, size or length, breaks the first run."""
    for clip in benchmark.clips:
        with av.open(str(clip.path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert stream.codec_context.name == "h264"
            assert stream.pix_fmt == "yuv420p"
            assert stream.average_rate == Fraction(clip.scene.fps)
            assert (stream.width, stream.height) == (clip.scene.width, clip.scene.height)
            assert stream.duration is not None
            assert stream.time_base is not None
            assert float(stream.duration * stream.time_base) == pytest.approx(clip.scene.duration_s, abs=0.01)
        assert len(frames) == clip.scene.num_frames
        assert SHORTEST_S <= clip.scene.duration_s <= LONGEST_S
        # What is in the file is what was drawn, at the right time.
        for index in (0, len(frames) // 2, len(frames) - 1):
            drawn = render_frame(clip.scene, index / clip.scene.fps)
            assert np.abs(frames[index].astype(int) - drawn).mean() < 6


def test_splits_are_disjoint_and_complete(benchmark: SyntheticBenchmark) -> None:
    """A test video that was trained on makes every score worthless."""
    assert [clip.split for clip in benchmark.clips] == ["train"] * 6 + ["val"] * 2 + ["test"] * 4
    assert len({clip.video_id for clip in benchmark.clips}) == 12
    assert len({clip.path for clip in benchmark.clips}) == 12
    assert len({clip.scene for clip in benchmark.clips}) == 12
    assert len(set(_digests(benchmark))) == 12


def test_rerun_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted generation must go on where it stopped, and never offer half a video as a whole one."""
    counts = {"num_train": 2, "num_val": 1, "num_test": 1, "seed": 0, "processes": 1}
    done = generate_benchmark(tmp_path, **counts)  # type: ignore[arg-type]
    digests = _digests(done)
    lost = done.clips[1].path
    lost.unlink()
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    def interrupted(scene: Scene, path: Path) -> None:
        path.write_bytes(b"half a video")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "_encode", interrupted)
        with pytest.raises(DataError, match=r"No space left.*writable folder"):
            generate_benchmark(tmp_path, **counts)  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == set(times)

    # What a killed run leaves behind.
    (tmp_path / f".{lost.stem}.0.partial").write_bytes(b"half a video")
    calls: list[tuple[int, int]] = []
    again = generate_benchmark(tmp_path, on_progress=lambda *call: calls.append(call), **counts)  # type: ignore[arg-type]
    assert _digests(again) == digests
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in times} == times
    assert calls == [(3, 4), (4, 4)]
    assert len(list(tmp_path.glob("*.mp4"))) == 4


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    """A mistyped count or an unusable folder must be named, not end in a traceback from numpy."""
    with pytest.raises(ConfigError, match="num_test is -1"):
        plan_benchmark(num_train=0, num_val=0, num_test=-1, seed=0)
    with pytest.raises(ConfigError, match="seed is -2"):
        plan_benchmark(num_train=0, num_val=0, num_test=0, seed=-2)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be created"):
        generate_benchmark(tmp_path / "file", num_train=1, num_val=0, num_test=0, seed=0, processes=1)


@pytest.fixture(scope="module")
def plan() -> tuple[PlannedClip, ...]:
    return plan_benchmark(num_train=300, num_val=40, num_test=256, seed=0)


def _slowly_true(claims: Claims, scene: Scene) -> bool:
    """caption_is_true again, from object indices and without shortcuts."""
    if claims.background and claims.background != scene.background:
        return False
    if claims.num_objects and claims.num_objects != len(scene.objects):
        return False
    found = False
    for idx in itertools.product(range(len(scene.objects)), repeat=len(claims.objects)):
        things = [scene.objects[i] for i in idx]
        holds = len(set(idx)) == len(idx)
        for claim, thing in zip(claims.objects, things, strict=True):
            for key in ("color", "shape", "size", "motion"):
                said, is_ = getattr(claim, key), getattr(thing, key)
                holds &= said is None or said == is_ or (key == "size" and is_ == "changing")
        for name, i, j in claims.relations:
            one, other = things[i], things[j]
            both_move = one.motion != "still" and other.motion != "still"
            holds &= {
                "moves_before": both_move and one.active_s[1] <= other.active_s[0],
                "appears_before": one.visible_s[0] < other.visible_s[0],
                "leaves_before": one.visible_s[1] < other.visible_s[1],
                "while": max(one.active_s[0], other.active_s[0]) < min(one.active_s[1], other.active_s[1]),
            }[name]
        found |= holds
    return found


def test_few_test_captions_fit_another_video(plan: tuple[PlannedClip, ...]) -> None:
    """A caption that fits two videos makes a right answer count as wrong: at most 2 % of them may."""
    for split in ("val", "test"):
        clips = [clip for clip in plan if clip.split == split]
        share = ambiguous_fraction(clips)
        assert share <= 0.02
        slow = [
            any(_slowly_true(caption.claims, other.scene) for other in clips if other is not clip)
            for clip in clips[:40]
            for caption in clip.captions
        ]
        assert sum(slow) <= share * len(clips) * NUM_CAPTIONS


def test_ambiguous_captions_are_counted() -> None:
    """If the count missed a double, the printed share would be a false promise."""
    first, second = plan_benchmark(num_train=0, num_val=0, num_test=2, seed=0)
    assert ambiguous_fraction([first, second]) == 0
    assert ambiguous_fraction([first, replace(second, scene=first.scene)]) == 0.5
    assert ambiguous_fraction([]) == 0


def test_captions_are_true_and_differently_worded(plan: tuple[PlannedClip, ...]) -> None:
    """Wrong captions teach nonsense; equal ones teach nothing about language; long ones are cut off."""
    tokenizer = Tokenizer()
    openings = set()
    for clip in plan:
        texts = [caption.text for caption in clip.captions]
        assert len(set(texts)) == len(texts) == NUM_CAPTIONS
        assert len({tuple(sorted(text.split())) for text in texts}) >= 4
        for caption in clip.captions:
            assert _slowly_true(caption.claims, clip.scene), (caption, clip.scene)
            assert caption.text == caption.text.lower().strip()
            assert "  " not in caption.text
            assert MIN_WORDS <= len(caption.text.split()) <= MAX_WORDS
            assert len(tokenizer.encode(caption.text)) + 2 <= 32, caption.text
            openings.add(" ".join(caption.text.split()[:3]))
    assert len(openings) > 100


def test_benchmark_has_variety(plan: tuple[PlannedClip, ...]) -> None:
    """A colour, shape, motion or format that never occurs is one that no first run exercises."""
    scenes = [clip.scene for clip in plan]
    things = [thing for scene in scenes for thing in scene.objects]
    assert {scene.background for scene in scenes} == set(BACKGROUND_COLORS)
    assert {scene.fps for scene in scenes} == set(FRAME_RATES)
    assert {(scene.width, scene.height) for scene in scenes} == set(FRAME_SIZES)
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
    assert {thing.color for thing in things} == set(OBJECT_COLORS)
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.motion for thing in things} == set(MOTIONS)
    relations = {
        name for clip in plan for caption in clip.captions for name, _, _ in caption.claims.relations
    }
    assert relations == {"moves_before", "appears_before", "leaves_before", "while"}


def test_objects_stay_in_the_centre_square(plan: tuple[PlannedClip, ...]) -> None:
    """Frames are cropped to their centre: what leaves it cannot be found by its caption."""
    for clip in plan:
        for thing in clip.scene.objects:
            seen = 0
            for time_s in np.linspace(0, clip.scene.duration_s, 20, endpoint=False):
                x, y, radius, opacity = thing.state(float(time_s))
                assert min(x, y) >= radius - 1e-9
                assert max(x, y) <= 1 - radius + 1e-9
                assert 0.2 <= 2 * radius <= 0.5
                seen += opacity > 0
            assert seen >= 8, "most of the clip, or its whole second part"


def _nearest(pixel: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.abs(np.subtract(names[name], pixel)).sum()))


def test_colours_are_the_named_ones(plan: tuple[PlannedClip, ...]) -> None:
    """A 'red circle' that is not red is a caption nobody can learn."""
    checked = 0
    for clip in plan[:150]:
        scene, time_s = clip.scene, clip.scene.duration_s * 0.75
        frame = render_frame(scene, time_s).astype(int)
        assert frame.shape == (scene.height, scene.width, 3)
        side = min(scene.width, scene.height)
        corner = np.array([(scene.width - side) / 2, (scene.height - side) / 2])
        for thing in scene.objects:
            x, y, radius, opacity = thing.state(time_s)
            # The middle of a ring is empty: look at its band.
            spot = np.array([x + (0.73 * radius if thing.shape == "ring" else 0), y])
            hidden = any(
                np.hypot(*(spot - other.state(time_s)[:2])) < 1.3 * other.state(time_s)[2]
                for other in scene.objects
                if other is not thing
            )
            if opacity == 1 and not hidden:
                column, row = (corner + spot * side).astype(int)
                assert _nearest(frame[row, column], OBJECT_COLORS) == thing.color, (clip.video_id, thing)
                checked += 1
        plain = replace(scene, objects=())
        ground = np.median(render_frame(plain, 0).reshape(-1, 3), axis=0)
        assert _nearest(ground, BACKGROUND_COLORS) == scene.background
    assert checked > 150


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_drawn_upright(shape: str) -> None:
    """Shapes must differ from each other and fill the size that captions call large."""
    frame = render_frame(_scene(_object("white", shape, start_radius=0.25, end_radius=0.25)), 0)
    covered = frame[..., 1] > 128
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    assert 0.75 * 36 <= np.ptp(rows) <= 1.15 * 36
    assert 0.75 * 36 <= np.ptp(columns) <= 1.15 * 36
    middle = covered[36, 48]
    assert middle == (shape != "ring")
    share = covered.sum() / (np.ptp(rows) + 1) / (np.ptp(columns) + 1)
    low, high = {
        "circle": (0.74, 0.83),
        "square": (0.97, 1.0),
        "triangle": (0.45, 0.58),
        "star": (0.3, 0.42),
        "ring": (0.5, 0.7),
        "cross": (0.5, 0.6),
    }[shape]
    assert low <= share <= high


@pytest.mark.parametrize(
    ("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)]
)
def test_motions_go_where_they_say(plan: tuple[PlannedClip, ...], motion: str, axis: int, sign: int) -> None:
    """'Moves left' must be seen as a move to the left in the pixels."""
    things = [t for clip in plan for t in clip.scene.objects if t.motion == motion]
    assert len(things) > 10
    for thing in things[:10]:
        alone = _scene(replace(thing, color="white", visible_s=ALWAYS))
        centres = []
        for time_s in thing.active_s:
            rows, columns = np.nonzero(render_frame(alone, time_s)[..., 1] > 128)
            centres.append((columns.mean(), rows.mean()))
        moved = (np.array(centres[1]) - centres[0]) / 72
        assert moved[axis] * sign > 0.35
        assert abs(moved[1 - axis]) < 0.02


def test_truth_of_hand_made_captions() -> None:
    """The ambiguity count is only as good as this: each rule on a scene made for it."""
    red, blue = ObjectClaim(color="red", shape="circle"), ObjectClaim(color="blue", shape="square")
    together = _scene(_object("red", motion="left"), _object("blue", "square", motion="up"))
    turns = _scene(
        _object("red", motion="left", active_s=(0.0, 1.9)),
        _object("blue", "square", motion="up", active_s=(2.0, 4.0)),
    )
    arrives = _scene(_object("red"), _object("blue", "square", visible_s=(2.0, float("inf"))))
    leaves = _scene(_object("red", visible_s=(0.0, 2.5)), _object("blue", "square"))
    for scene in (together, turns, arrives, leaves):
        assert caption_is_true(Claims((red, blue)), scene)
        assert caption_is_true(Claims((blue, red), background="black", num_objects=2), scene)
        assert not caption_is_true(Claims((red, blue), background="navy"), scene)
        assert not caption_is_true(Claims((red,), num_objects=1), scene)
        assert not caption_is_true(Claims((red, red)), scene), "two red circles need two of them"
        assert not caption_is_true(Claims((replace(red, color="blue"),)), scene), "colours do not mix"
        assert not caption_is_true(Claims((replace(red, size="small"),)), scene)
    order = {"moves_before": turns, "appears_before": arrives, "leaves_before": leaves}
    for name, scene in order.items():
        for other in (together, turns, arrives, leaves):
            assert caption_is_true(Claims((red, blue), relations=((name, 0, 1),)), other) == (other is scene)
            assert not caption_is_true(Claims((blue, red), relations=((name, 0, 1),)), other)
    assert caption_is_true(Claims((red, blue), relations=(("while", 0, 1),)), together)
    assert not caption_is_true(Claims((red, blue), relations=(("while", 0, 1),)), turns)
    assert caption_is_true(Claims((ObjectClaim(motion="left"),)), together)
    assert not caption_is_true(Claims((ObjectClaim(color="blue", motion="left"),)), together)
    growing = _scene(_object("red", motion="grow", size="changing"))
    assert caption_is_true(Claims((replace(red, size="small"),)), growing)
    assert caption_is_true(Claims((replace(red, size="large"),)), growing)


def test_truth_agrees_with_the_slow_version(seed: int) -> None:
    """A shortcut in the fast version that skips a true pairing would hide ambiguous captions."""
    clips = plan_benchmark(num_train=80, num_val=0, num_test=0, seed=seed)
    rng = np.random.default_rng(seed)
    outcomes = []
    for clip, other in itertools.product(clips, repeat=2):
        claims = clip.captions[int(rng.integers(NUM_CAPTIONS))].claims
        # Weaker captions, so that many are true of other videos.
        weak = tuple(
            ObjectClaim(**{key: getattr(claim, key) if rng.random() < 0.3 else None for key in vars(claim)})
            for claim in claims.objects
        )
        claims = Claims(weak, relations=claims.relations)
        outcomes.append(caption_is_true(claims, other.scene))
        assert outcomes[-1] == _slowly_true(claims, other.scene)
    assert 0.05 < np.mean(outcomes) < 0.95
