"""Generation of the benchmark: renders and encodes planned videos in parallel, and keeps existing ones."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from gare.config.cpus import usable_cpus
from gare.data.synthetic.benchmark_plan import PlannedClip, ambiguous_fraction, plan_benchmark
from gare.data.synthetic.caption_truth import Claims
from gare.data.synthetic.encode import encode_video
from gare.data.synthetic.scene import Scene
from gare.errors import DataError

_log = logging.getLogger(__name__)

# Enough work in a task to outweigh sending it to another process.
_CLIPS_PER_TASK = 8


@dataclass(frozen=True)
class SyntheticClip:
    """A generated video.

    Attributes:
        video_id: unique in the benchmark; also the stem of the file name.
        path: the mp4 file.
        split: "train", "val" or "test".
        captions: several wordings.
        claims: claims of each caption, in the same order.
        scene: the scene that the video shows.
    """

    video_id: str
    path: Path
    split: str
    captions: tuple[str, ...]
    claims: tuple[Claims, ...]
    scene: Scene


@dataclass(frozen=True)
class SyntheticBenchmark:
    """The generated benchmark.

    Attributes:
        clips: all clips: train, then val, then test.
        ambiguous_test_captions: share of the test captions that are also true of another test video.
    """

    clips: tuple[SyntheticClip, ...]
    ambiguous_test_captions: float


def generate_benchmark(
    folder: Path,
    *,
    num_train: int,
    num_val: int,
    num_test: int,
    seed: int,
    processes: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> SyntheticBenchmark:
    """Writes the videos that do not exist yet and returns the whole benchmark.

    The same arguments give the same files, byte for byte on one machine. An interrupted call can be
    repeated: a video appears under its name only when it is complete.

    Args:
        folder: folder of the mp4 files; created if missing.
        num_train: videos of the train split.
        num_val: videos of the val split.
        num_test: videos of the test split.
        seed: of scenes and captions, 0 or more.
        processes: encoding processes; 0: one for each CPU.
        on_progress: called with (videos done, videos in all), kept ones included.

    Raises:
        ConfigError: for a negative count or seed.
        DataError: if the folder cannot be written or videos cannot be encoded.
    """
    planned = plan_benchmark(num_train=num_train, num_val=num_val, num_test=num_test, seed=seed)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot be created: {error}", where=str(folder), accepted="a folder") from error
    clips = tuple(_clip(folder, plan) for plan in planned)
    missing = [clip for clip in clips if not clip.path.is_file()]
    report = on_progress or (lambda done, total: None)
    report(len(clips) - len(missing), len(clips))
    _encode_all(missing, processes, lambda done: report(len(clips) - len(missing) + done, len(clips)))
    _log.info("generated benchmark in %s: %d videos, %d of them new", folder, len(clips), len(missing))
    return SyntheticBenchmark(
        clips=clips,
        ambiguous_test_captions=ambiguous_fraction([plan for plan in planned if plan.split == "test"]),
    )


def _clip(folder: Path, plan: PlannedClip) -> SyntheticClip:
    return SyntheticClip(
        video_id=plan.video_id,
        path=folder / f"{plan.video_id}.mp4",
        split=plan.split,
        captions=tuple(caption.text for caption in plan.captions),
        claims=tuple(caption.claims for caption in plan.captions),
        scene=plan.scene,
    )


def _encode_all(clips: Sequence[SyntheticClip], processes: int, report: Callable[[int], None]) -> None:
    tasks = [
        [(clip.scene, clip.path) for clip in clips[start : start + _CLIPS_PER_TASK]]
        for start in range(0, len(clips), _CLIPS_PER_TASK)
    ]
    num_processes = min(processes or usable_cpus(), len(tasks))
    done = 0
    if num_processes <= 1:
        for task in tasks:
            done += _encode_some(task)
            report(done)
        return
    # spawn, not fork: the caller may hold threads (Ray, torch) that do not survive a fork.
    pool = ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        pending = {pool.submit(_encode_some, task) for task in tasks}
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                done += future.result()
                report(done)
    except BrokenProcessPool as error:
        raise DataError(
            "an encoding process died", where="generated benchmark", accepted="more memory, or processes=1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_some(task: Sequence[tuple[Scene, Path]]) -> int:
    for scene, path in task:
        encode_video(scene, path)
    return len(task)
