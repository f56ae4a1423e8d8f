"""The plan of a benchmark: scenes and captions of all its videos, without rendering them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gare.data.synthetic.caption_truth import caption_is_true
from gare.data.synthetic.captions import Caption, write_captions
from gare.data.synthetic.scene import Scene, draw_scene
from gare.errors import ConfigError

#: Part of every file name; raise it whenever the same seed gives other videos or captions than before.
GENERATOR_VERSION = 2
_MAX_REDRAWS = 50


@dataclass(frozen=True)
class PlannedClip:
    """A video that is not rendered yet.

    Attributes:
        video_id: unique in the benchmark; also the stem of the file name.
        split: "train", "val" or "test".
        scene: the scene that the video shows.
        captions: several, all true of the scene.
    """

    video_id: str
    split: str
    scene: Scene
    captions: tuple[Caption, ...]


def plan_benchmark(*, num_train: int, num_val: int, num_test: int, seed: int) -> tuple[PlannedClip, ...]:
    """Draws all scenes and captions; the first k of a split do not depend on the split's size.

    Scenes of val and test are redrawn until no caption of the split is true of another of its videos.

    Raises:
        ConfigError: for a negative count or seed.
    """
    wanted = {"num_train": num_train, "num_val": num_val, "num_test": num_test, "seed": seed}
    for name, value in wanted.items():
        if value < 0:
            raise ConfigError(f"{name} is {value}", where="generated benchmark", accepted="0 or more")
    return (
        *(_draw_clip("train", index, 0, seed) for index in range(num_train)),
        *_plan_apart("val", num_val, seed),
        *_plan_apart("test", num_test, seed),
    )


def ambiguous_fraction(clips: Sequence[PlannedClip]) -> float:
    """Returns the share of captions that are also true of another clip; 0 without captions."""
    captions = [(clip, caption) for clip in clips for caption in clip.captions]
    ambiguous = sum(
        any(caption_is_true(caption.claims, other.scene) for other in clips if other is not clip)
        for clip, caption in captions
    )
    return ambiguous / max(len(captions), 1)


def _plan_apart(split: str, count: int, seed: int) -> list[PlannedClip]:
    kept: list[PlannedClip] = []
    for index in range(count):
        for attempt in range(_MAX_REDRAWS):
            clip = _draw_clip(split, index, attempt, seed)
            if not _confused(clip, kept):
                break
        # If a large split leaves no unambiguous scene, the last draw is kept; ambiguous_fraction counts it.
        kept.append(clip)
    return kept


def _confused(clip: PlannedClip, others: Iterable[PlannedClip]) -> bool:
    return any(
        any(caption_is_true(caption.claims, other.scene) for caption in clip.captions)
        or any(caption_is_true(caption.claims, clip.scene) for caption in other.captions)
        for other in others
    )


def _draw_clip(split: str, index: int, attempt: int, seed: int) -> PlannedClip:
    rng = np.random.default_rng([zlib.crc32(split.encode()), seed, index, attempt])
    scene = draw_scene(rng)
    return PlannedClip(
        video_id=f"synthetic{GENERATOR_VERSION}-s{seed}-{split}-{index:05d}",
        split=split,
        scene=scene,
        captions=write_captions(scene, rng),
    )
