"""The pixels of augmented clips, in both places: against Pillow, against each other, and clip by clip."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from gare.config import AugmentConfig
from gare.data.decode.clip import decode_clip
from gare.train.input import augment_batch as batch_place
from gare.train.input import augment_cpu as cpu_place
from gare.train.input.augment_batch import augment_batch
from gare.train.input.augment_cpu import augment_clip
from gare.train.input.randaugment import OPERATIONS, Operation, draw_operations
from tests.helpers.pillow_reference import by_pillow

EVERYTHING = AugmentConfig(operations=8, probability=0.8, crop_scale=0.3, flip=0.5)
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
HIGHEST = (30, 0.3, 0.3, 0.45, 0.45)

#: Frames (F, H, W, 3) and operations to the frames after them, by augment_clip or by augment_batch.
Place = Callable[[np.ndarray, Sequence[Operation]], np.ndarray]


@pytest.fixture(params=["cpu", "batch"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    module = {"cpu": cpu_place, "batch": batch_place}[request.param]

    def carry_out(frames: np.ndarray, operations: Sequence[Operation]) -> np.ndarray:
        with monkeypatch.context() as patch:
            patch.setattr(module, "draw_operations", lambda config, seed: tuple(operations))
            if module is cpu_place:
                return augment_clip(frames, AugmentConfig(), 0)
            return augment_batch(torch.from_numpy(frames[None].copy()), AugmentConfig(), [0])[0].numpy()

    return carry_out


@pytest.fixture(scope="module")
def natural(shared: Path) -> list[np.ndarray]:
    """Clips of two frames, short side 224: high, wide and square."""
    clips = []
    for name, square in (("cat.mp4", True), ("bikes.mp4", False), ("coffee.mp4", False), ("bear.mp4", True)):
        frames = []
        for frame in decode_clip(shared / "data" / "videos" / name, num_frames=2).frames:
            image = Image.fromarray(frame)
            scale = 224 / min(image.size)
            size = (224, 224) if square else tuple(round(side * scale) for side in image.size)
            frames.append(np.asarray(image.resize(size, Image.Resampling.BICUBIC)))
        clips.append(np.stack(frames))
    clips[1] = np.ascontiguousarray(clips[1].swapaxes(1, 2))
    assert len({clip.shape[1] > clip.shape[2] for clip in clips}) == 2
    return clips


def odd_clips(rng: np.random.Generator) -> list[np.ndarray]:
    """Noise, little contrast, flat pictures, one grey beside another, and pictures with hardly a pixel."""
    noise = rng.integers(0, 256, (3, 37, 23, 3), dtype=np.uint8)
    flat = rng.integers(0, 256, (4, 1, 1, 3), dtype=np.uint8).repeat(9, axis=1).repeat(5, axis=2)
    two = flat.copy()
    two[:, 0, 0] += 1
    small = [
        rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        for height, width in ((1, 1), (1, 7), (2, 3), (16, 16), (15, 17))
    ]
    return [noise, noise // 8 + 90, np.sort(noise, axis=1), flat, two, *small]


def still_clips(rng: np.random.Generator, clips: int, frames: int) -> torch.Tensor:
    """Clips whose frames are all equal, each with its own picture."""
    pictures = rng.integers(0, 256, (clips, 1, 20, 28, 3), dtype=np.uint8)
    return torch.from_numpy(pictures.repeat(frames, axis=1))


def eroded(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask that are at least four pixels away from its border and from the picture's."""
    kernel = np.ones((7, 7), dtype=np.uint8)
    return cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0).astype(
        bool
    )


def assert_close(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Equal but for a grey level at few pixels, and for more where contrast is high along both axes."""
    difference = np.abs(actual.astype(int) - expected)
    # Of a shift by nearly whole pixels Pillow truncates nearly whole values.
    assert difference.mean() <= 1, what
    assert np.quantile(difference, 0.99) <= 1, what
    assert np.quantile(difference, 0.9999) <= 8, what


def arguments_of(name: str, rng: np.random.Generator) -> list[tuple[float, ...]]:
    """The range of an operation's arguments: all of them where they are few."""
    match name:
        case "PosterizeIncreasing":
            return [(bits,) for bits in range(5)]
        case "SolarizeIncreasing":
            return [(threshold,) for threshold in (0, 1, 77, 128, 255, 256)]
        case "SolarizeAdd":
            return [(summand,) for summand in (0, 1, 77, 110)]
        case "ColorIncreasing" | "ContrastIncreasing" | "BrightnessIncreasing" | "SharpnessIncreasing":
            return [(factor,) for factor in (0.1, 0.37, 1.0, 1.63, 1.9, *rng.uniform(0.1, 1.9, 6))]
    return [()]


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in GEOMETRIC])
def test_tone_is_exactly_pillows(
    name: str, place: Place, natural: list[np.ndarray], rng: np.random.Generator
) -> None:
    """The paper's model saw Pillow's pictures."""
    for clip in [natural[0][:, ::2, ::3], natural[1], *odd_clips(rng)]:
        for arguments in arguments_of(name, rng):
            operations = [Operation(name, arguments)]
            np.testing.assert_array_equal(
                place(np.ascontiguousarray(clip), operations), by_pillow(clip, operations), f"{arguments}"
            )


@pytest.mark.parametrize("names", [OPERATIONS[:3], OPERATIONS[4:11]])
def test_tone_after_tone_is_exactly_pillows(
    names: Sequence[str], place: Place, natural: list[np.ndarray], rng: np.random.Generator
) -> None:
    """Tables that are joined into one must do what both did, in their order."""
    for _ in range(10):
        operations = []
        for name in rng.choice(names, size=5):
            options = arguments_of(name, rng)
            operations.append(Operation(name, options[rng.integers(len(options))]))
        np.testing.assert_array_equal(
            place(natural[0], operations), by_pillow(natural[0], operations), f"{operations}"
        )


@pytest.mark.parametrize(("name", "highest"), list(zip(GEOMETRIC, HIGHEST, strict=True)))
def test_warps_are_pillows_on_natural_pictures(
    name: str, highest: float, place: Place, natural: list[np.ndarray], rng: np.random.Generator
) -> None:
    """Else shapes would be moved, blurred or sharpened otherwise than in the paper's training."""
    for clip in natural:
        for share in (-1, 1, *rng.uniform(-1, 1, 2)):
            operations = [Operation(name, (share * highest,))]
            assert_close(place(clip, operations), by_pillow(clip, operations), str(operations))


def test_a_crop_is_pillows_on_natural_pictures(place: Place, natural: list[np.ndarray]) -> None:
    """A crop that is off by half a pixel would move every clip."""
    for clip in natural:
        operations = [Operation("Crop", (0.21, 0.13, 0.62))]
        assert_close(place(clip, operations), by_pillow(clip, operations), "crop")


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (48, 48)])
def test_joined_warps_are_one_after_the_other(
    shape: tuple[int, int], place: Place, rng: np.random.Generator
) -> None:
    """What the first of two warps moves out of the frame must not come back with the second."""
    height, width = shape
    y, x = np.mgrid[:height, :width][..., None]
    phases = rng.uniform(0, 6, (2, 3))
    waves = 127 + 60 * np.sin(x / 11 + phases[0]) + 60 * np.cos(y / 13 + phases[1])
    smooth = waves.round().astype(np.uint8)[None]
    # Not white, where the kernel's overshoot would be cut off and not be seen.
    plain = np.full_like(smooth, 200)
    seen_fill = 0
    for _ in range(25):
        operations = [
            Operation(GEOMETRIC[idx], (float(rng.uniform(-1, 1)) * HIGHEST[idx],))
            for idx in rng.integers(5, size=rng.integers(2, 5))
        ]
        if rng.random() < 0.5:
            operations.insert(0, Operation("Flip"))
        # Pillow mixes fill into the pixels beside it, once an operation, and repeats the border of each
        # picture between: pixels away from both are compared.
        reference = by_pillow(plain, operations)[0, ..., 0]
        inside, outside = eroded(reference == 200), eroded(reference == 128)
        seen_fill += outside.sum()
        masked = place(plain, operations)[0]
        assert np.isin(masked, (128, 200)).all(), operations
        assert (masked[inside] == 200).all(), operations
        assert (masked[outside] == 128).all(), operations
        difference = place(smooth, operations).astype(int) - by_pillow(smooth, operations)
        # Pillow truncates once an operation, the joined warp once; and Pillow repeats the border after each
        # operation, where the joined warp still sees the picture beyond.
        far = np.abs(difference[0][inside]) > 1 + len(operations)
        assert far.sum() <= 0.02 * far.size + 6, operations
    assert seen_fill


def test_what_comes_in_from_outside_is_grey(place: Place, rng: np.random.Generator) -> None:
    """Black or repeated borders are another augmentation."""
    frames = rng.integers(0, 100, (2, 20, 30, 3), dtype=np.uint8)
    out = place(frames, [Operation("TranslateXRel", (0.4,))])
    assert (out[:, :, 18:] == 128).all()
    np.testing.assert_array_equal(out[:, :, :18], frames[:, :, 12:])


def test_both_places_agree_on_whole_policies(natural: list[np.ndarray], rng: np.random.Generator) -> None:
    """Where a clip is augmented is a matter of speed alone."""
    config = AugmentConfig(operations=4, probability=0.5, crop_scale=0.6, flip=0.5)
    without_crop = AugmentConfig(operations=4, probability=0.5, flip=0.5)
    far = []
    for clip in natural:
        for seed in rng.integers(2**62, size=20).tolist():
            settings = without_crop if seed % 2 else config
            operations = draw_operations(settings, seed)
            one = augment_clip(clip, settings, seed).astype(int)
            other = augment_batch(torch.from_numpy(clip[None].copy()), settings, [seed])[0].numpy()
            difference = np.abs(one - other)
            if not {operation.name for operation in operations} & {"Crop", *GEOMETRIC}:
                assert not difference.any(), operations
            # A warp differs by a level here and there, and now and then a later operation makes more of it:
            # posterization 64 of one, contrast the step to another mean grey, a level at all pixels.
            elif difference.mean() > 0.1 or (difference > 1).mean() > 0.02:
                far.append((operations, difference.mean()))
    assert len(far) <= 8, far


@pytest.mark.parametrize("max_values", [1, 3 * 5 * 20 * 28 * 3, 10**9])
def test_a_clip_depends_on_its_seed_alone(
    max_values: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of workers decides who augments a clip and beside which others; it must not show."""
    frames = still_clips(rng, 24, 5)
    seeds = rng.integers(2**62, size=24).tolist()
    out = augment_batch(frames, EVERYTHING, seeds)
    monkeypatch.setattr(batch_place, "MAX_VALUES", max_values)
    chosen = rng.permutation(24)[:13].tolist()
    again = augment_batch(frames[chosen], EVERYTHING, [seeds[idx] for idx in chosen])
    assert torch.equal(again, out[chosen])
    alone = augment_batch(frames[chosen[:1]], EVERYTHING, [seeds[chosen[0]]])
    assert torch.equal(alone, out[chosen[:1]])
    assert not torch.equal(augment_batch(frames, EVERYTHING, seeds[1:] + seeds[:1]), out)


@pytest.mark.parametrize(
    "config",
    [EVERYTHING, AugmentConfig(operations=4), AugmentConfig(crop_scale=0.5), AugmentConfig(flip=0.5)],
)
def test_all_frames_of_a_clip_change_alike(
    config: AugmentConfig, rng: np.random.Generator, seed: int
) -> None:
    """Else augmentation would add a flicker that no video has, and hide what moves."""
    frames = still_clips(rng, 1, 4).repeat(20, 1, 1, 1, 1)
    before = frames.clone()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    seeds = range(seed, seed + 20)
    by_batch = augment_batch(frames, config, seeds)
    by_clip = np.stack(
        [augment_clip(clip.numpy(), config, one) for clip, one in zip(frames, seeds, strict=True)]
    )
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers moved"
    assert np.array_equal(np.random.get_state()[1], numpy_state), "the caller's random numbers moved"
    assert torch.equal(frames, before), "the caller's frames changed"
    for out in (by_batch, torch.from_numpy(by_clip)):
        assert out.shape == frames.shape
        assert out.dtype == torch.uint8
        assert (out == out[:, :1]).all()
        assert len({clip[0].numpy().tobytes() for clip in out}) > 1, "all clips got the same transform"


def test_nothing_by_default(rng: np.random.Generator) -> None:
    """Scores of a run that asked for no augmentation must not depend on it."""
    frames = still_clips(rng, 2, 3)
    assert augment_batch(frames, AugmentConfig(), [1, 2]) is frames
    clip = frames[0].numpy()
    assert augment_clip(clip, AugmentConfig(), 1) is clip


def test_a_flip_is_a_mirror(place: Place, rng: np.random.Generator) -> None:
    """And no other change, also beside a warp that moves nothing."""
    frames = rng.integers(0, 256, (2, 14, 19, 3), dtype=np.uint8)
    mirrored = frames[:, :, ::-1]
    np.testing.assert_array_equal(place(frames, [Operation("Flip")]), mirrored)
    np.testing.assert_array_equal(place(frames, [Operation("Flip"), Operation("Rotate", (0.0,))]), mirrored)
    flip = AugmentConfig(flip=1.0)
    np.testing.assert_array_equal(augment_clip(frames, flip, 0), mirrored)


def test_clips_that_nobody_may_write_to(rng: np.random.Generator, seed: int) -> None:
    """Arrays from Ray's object store are read-only, and slices of a batch are not contiguous."""
    frames = still_clips(rng, 1, 6)[0].numpy()
    frames.setflags(write=False)
    for one in range(seed, seed + 30):
        expected = augment_clip(frames[::2].copy(), EVERYTHING, one)
        np.testing.assert_array_equal(augment_clip(frames[::2], EVERYTHING, one), expected)


def test_opencv_takes_one_core() -> None:
    """Loaders run side by side, one on each core; with all cores each they would wait for each other."""
    code = """
import cv2, numpy as np
from gare.config import AugmentConfig
from gare.train.input.augment_cpu import augment_clip
cv2.setNumThreads(2)
augment_clip(np.zeros((1, 8, 8, 3), np.uint8), AugmentConfig(flip=1.0), 0)
assert cv2.getNumThreads() == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_missing_seed_is_refused(rng: np.random.Generator) -> None:
    """Clips without a seed must not pass unchanged."""
    with pytest.raises(ValueError, match="1 seeds for 2 clips"):
        augment_batch(still_clips(rng, 2, 1), EVERYTHING, [1])
