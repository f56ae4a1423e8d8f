"""One worker of test_parity; run as a process: ``python -m tests.helpers.parity RANK SEED FOLDER``.

The test itself calls the same functions as a single worker with the whole batch. With more arguments, the
process is one of two workers with these options, in float64.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import gare.train.loss.objective
from gare.config import Config
from gare.errors import GareError
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.train.input.tokens import CaptionTokens
from gare.train.loss.gather import (
    PendingGather,
    Rows,
    exchange_row_counts,
    gather,
    gather_unequal,
    rank,
    start_gather,
    world_size,
)
from gare.train.step import Learner, build_learner, compute_gradients, train_step
from gare.train.validation import Validation
from tests.helpers.tiny import share, tiny_batch, tiny_config, tiny_feature_batch

WORLDS = (2, 3)
#: Options that have their own sums over the workers, or their own random draws.
OPTIONS = (
    "model.context=words",
    "model.context=words model.method=direct",
    "model.context=words loss.bottleneck_anchor=text loss.direction_over=sample loss.direction_texts=3",
    "model.increment_dropout_per=pair",
    "model.increment_dropout=0.5 loss.direction_over=sample loss.direction_texts=2",
    "model.corrected_side=video loss.bottleneck_anchor=text loss.kl_normalised=true",
    "model.query=text loss.radii_bound_form=smooth loss.radii_bound=0.5",
    "loss.positives=video loss.direction_form=orthogonality",
    "train.micro_batch=1 model.memory_mb=1",
    "model.increment=false loss.positives=video",
    "model.increment=false loss.false_negatives=0.1",
    "loss.dropout_spread=0.3",
    "model.increment=false model.pooling=mean train.micro_batch=1",
    "model.temporal=none model.temporal_layers=4 model.temporal_heads=0",
    "model.padding=released train.micro_batch=1",
    "train.input=features model.adapters=true train.micro_batch=1",
)
#: Batches that neither two nor three workers can share equally.
UNEVEN = tuple(f"train.batch_size=7 {option}" for option in ("train.micro_batch=2", *OPTIONS))
STEPS = 2


@dataclass
class Outcome:
    """Results of one worker.

    Attributes:
        terms: loss terms by name.
        gradients: gradients by parameter name, after ``compute_gradients``.
        weights: weights by parameter name, after all train steps from the start.
        moved: weights minus the initial weights.
        losses: total loss of each train step.
        strided: True for each tensor that entered a gather, and each gradient returned, in transposed layout.
    """

    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    moved: dict[str, Tensor]
    losses: list[float]
    strided: list[bool]


@cache
def config(*overrides: str) -> Config:
    return tiny_config(*overrides)


def run(
    seed: int,
    dtype: torch.dtype = torch.float32,
    gatherer: Callable[[Tensor, Rows], Tensor] = gather,
    *overrides: str,
    steps: int = STEPS,
    moved_by: int | None = None,
) -> Outcome:
    """Computes this worker's gradients of one batch, then its weights after some steps.

    Features enter the gather transposed in memory, and their gradients return so, as a fused kernel may leave
    them.

    Args:
        seed: of batches and weights.
        dtype: of weights, frames and all that follows.
        gatherer: in place of the gather of the loss.
        overrides: settings.
        steps: number of train steps.
        moved_by: a seed by which the first weights are moved by up to float32's rounding; None: they are not.
    """
    rng = np.random.default_rng(seed)
    draw = tiny_batch if config(*overrides).train.input == "frames" else tiny_feature_batch
    batches = [share(draw(config(), rng), rank(), world_size()) for _ in range(max(steps, 1))]
    batches = [replace(batch, frames=batch.frames.to(dtype)) for batch in batches]
    seen: list[bool] = []

    def come_back_strided(grad: Tensor) -> Tensor:
        grad = _transposed(grad)
        seen.append(not grad.is_contiguous())
        return grad

    class Watched:
        def __init__(self, local: Tensor, rows: Rows) -> None:
            if local.requires_grad:
                seen.append(not local.is_contiguous())
            self.wait_once = (
                start_gather(local, rows).wait if gatherer is gather else lambda: gatherer(local, rows)
            )

        def wait(self) -> Tensor:
            gathered = self.wait_once()
            if gathered.requires_grad:
                gathered.register_hook(come_back_strided)
            return gathered

    def watched(local: Tensor, rows: Rows) -> Tensor:
        return Watched(local, rows).wait()

    original = gare.train.loss.objective.gather, gare.train.loss.objective.start_gather
    gare.train.loss.objective.gather, gare.train.loss.objective.start_gather = watched, Watched  # type: ignore[assignment]
    try:
        learner = _learner(seed, dtype, *overrides)
        if moved_by is not None:
            _move_by_rounding(learner.model, moved_by)
        start = {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}
        terms = compute_gradients(learner, batches[0]).named()
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in learner.model.named_parameters()
            if parameter.grad is not None
        }
        # The gradients have changed no weights, and draws depend on the step alone.
        losses = [train_step(learner, batch)["loss/total"] for batch in batches[:steps]]
    finally:
        gare.train.loss.objective.gather, gare.train.loss.objective.start_gather = original
    weights = {name: parameter.detach() for name, parameter in learner.model.named_parameters()}
    moved = {name: weights[name] - start[name] for name in weights}
    return Outcome(terms, gradients, weights, moved, losses, seen)


def run_together(commands: Sequence[Sequence[str]], folder: Path, timeout_s: float, **options: Any) -> None:
    """Runs the processes of several workers; if one fails, ends all and raises its output.

    Args:
        commands: one command for each worker.
        folder: folder for their output.
        timeout_s: time limit for each, seconds.
        options: options of ``subprocess.Popen``.
    """
    said = [folder / f"said-{rank}.txt" for rank in range(len(commands))]
    processes = []
    try:
        for command, file in zip(commands, said, strict=True):
            with file.open("w") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, **options))
        for process, file in zip(processes, said, strict=True):
            assert process.wait(timeout=timeout_s) == 0, file.read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()


def nothing_to_do() -> str:
    """Returns the message to this worker if the first one has no pair."""
    try:
        exchange_row_counts(rank(), torch.device("cpu"))
    except GareError as error:
        return str(error)
    return "nothing"


def _learner(seed: int, dtype: torch.dtype, *overrides: str) -> Learner:
    torch.manual_seed(seed)
    model = GARE(config(*overrides).model)
    if config(*overrides).train.input == "features":
        model.drop_towers()
        assert model.adapters is not None
        for parameter in model.adapters.parameters():  # with zeros their gradient would be that of the start
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype)
    _give_strided_features(model)
    learner = build_learner(model, config(*overrides), num_steps=10, device=torch.device("cpu"))
    model.train()
    return learner


def _move_by_rounding(model: GARE, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            share = torch.empty(parameter.shape, dtype=parameter.dtype).uniform_(-1, 1, generator=generator)
            parameter.mul_(1 + torch.finfo(torch.float32).eps * share)


def _give_strided_features(model: GARE) -> None:
    text_from_towers, video_from_towers = model.text_from_towers, model.video_from_towers

    def strided_text(tower_text: TextFeatures) -> TextFeatures:
        text = text_from_towers(tower_text)
        assert text.words is not None
        return TextFeatures(_transposed(text.embedding), _transposed(text.words), text.mask)

    def strided_video(frames: Tensor, frame_mask: Tensor) -> VideoFeatures:
        video = video_from_towers(frames, frame_mask)
        return VideoFeatures(_transposed(video.frames), video.mask)

    model.text_from_towers, model.video_from_towers = strided_text, strided_video


def _transposed(features: Tensor) -> Tensor:
    strided = features.transpose(0, -1).contiguous().transpose(0, -1)
    assert len(features) == 1 or not strided.is_contiguous()
    return strided


def torch_gather(local: Tensor, rows: Rows) -> Tensor:
    """Gathers with PyTorch's differentiable gather, which permutes non-contiguous gradients (2.13, gloo)."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(local, group=dist.group.WORLD))


def shared_gradient() -> Tensor:
    """Returns the gradient of a tensor added to a gathered one, so that both get one gradient tensor."""
    local = torch.ones(2, 3, requires_grad=True)
    other = torch.zeros(2 * world_size(), 3, requires_grad=True)
    doubled = 2 * other  # made before the gather, so that its backward runs after the gather's
    summed = gather(local, exchange_row_counts(2, torch.device("cpu"))) + doubled
    (summed * (1 + rank())).sum().backward()
    assert other.grad is not None
    assert local.grad is not None
    return torch.cat([other.grad, local.grad])


def features_left() -> int:
    """Counts gathered features of finished steps whose memory was not released."""
    alive: list[weakref.ref[Tensor]] = []
    gc.collect()
    gc.disable()
    try:
        for number in range(5):
            local = (torch.ones(2, 3, requires_grad=True) * number).clone()
            alive.append(weakref.ref(local))
            gathered = gather(local, exchange_row_counts(2, torch.device("cpu")))
            if number % 2:
                gathered.sum().backward()
            del local, gathered
        # gloo's own thread holds what it has sent for a moment after it has said so; a cycle stays for good.
        until = time.monotonic() + 10
        while (left := sum(one() is not None for one in alive)) and time.monotonic() < until:
            os.sched_yield()
        return left
    finally:
        gc.enable()


def order_of_a_step(seed: int) -> list[str]:
    """Returns the order of events in a step: sending of frames and encoding of texts, both passes."""
    seen: list[str] = []
    learner = _learner(seed, torch.float32)
    encode_text = learner.model.encode_text

    def encode(*arguments: Tensor) -> TextFeatures:
        seen.append("text forward")
        text = encode_text(*arguments)
        text.embedding.register_hook(lambda grad: seen.append("text backward"))
        return text

    class Watched(PendingGather):
        def send(self, local: Tensor) -> None:
            self.is_frames = local.is_floating_point()
            seen.extend(["frames leave"] * self.is_frames)
            super().send(local)

        def receive(self) -> Tensor:
            seen.extend(["frames arrive"] * self.is_frames)
            return super().receive()

        def send_back(self, grad: Tensor) -> None:
            seen.append("gradients leave")
            super().send_back(grad)

        def receive_back(self) -> Tensor:
            seen.append("gradients arrive")
            return super().receive_back()

    original, learner.model.encode_text = gare.train.loss.objective.start_gather, encode  # type: ignore[method-assign]
    gare.train.loss.objective.start_gather = Watched
    try:
        batch = share(tiny_batch(config(), np.random.default_rng(seed)), rank(), world_size())
        compute_gradients(learner, batch)
    finally:
        gare.train.loss.objective.start_gather = original
    return seen


def validate(seed: int, num_videos: int) -> dict[str, float]:
    """Returns the metrics of clips shared out like the plan; the model was in training mode before."""
    torch.manual_seed(seed)
    model = GARE(tiny_config("model.clip.vocab_size=49408", "model.increment_dropout=0.9").model).train()
    assert model.increment is not None
    with torch.no_grad():
        model.increment.mean.weight.mul_(50)  # so that active dropout would change the ranks
    validation = Validation(model, torch.device("cpu"))
    rng = np.random.default_rng(seed)
    frames = torch.from_numpy(rng.integers(0, 256, (num_videos, 4, 16, 16, 3), dtype=np.uint8))
    mask = torch.arange(4) < torch.from_numpy(rng.integers(1, 5, (num_videos, 1)))
    captions = [[f"clip {video} take {take}" for take in range(1 + video % 3)] for video in range(num_videos)]
    tokens = CaptionTokens.of(captions, model.config.max_words)
    for video in range(rank(), num_videos, world_size()):
        arrays = tokens.of_videos(np.array([video]))
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        clip = {"frames": frames[video : video + 1], "frame_mask": mask[video : video + 1]}
        validation.add([video], tensors | clip)
    model.train()  # as on a worker that got no clip
    return validation.metrics()


def main() -> None:
    own_rank, seed, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if chosen := sys.argv[4:]:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=own_rank, world_size=2)
        outcomes = {option: vars(run(seed, torch.float64, gather, *option.split())) for option in chosen}
        torch.save(outcomes, folder / f"found-{own_rank}.pt")
        dist.destroy_process_group()
        return
    for world in WORLDS:
        if own_rank >= world:
            continue
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet-{world}", rank=own_rank, world_size=world
        )
        found = {
            "float32": vars(run(seed)),
            "float64": vars(run(seed, torch.float64)),
            "options": {
                option: {
                    "float32": vars(run(seed, torch.float32, gather, *option.split(), steps=1)),
                    "float64": vars(run(seed, torch.float64, gather, *option.split(), steps=0)),
                }
                for option in OPTIONS + UNEVEN
            },
            "nothing_to_do": nothing_to_do(),
            "torch": vars(run(seed, gatherer=torch_gather)),
            "shared_gradient": shared_gradient(),
            "order": order_of_a_step(seed),
            "features_left": features_left(),
            "validation": {count: validate(seed, count) for count in (2, 7)},
            "unequal": gather_unequal(torch.full((own_rank, 2), float(own_rank))),
        }
        torch.save(found, folder / f"found-{world}-{own_rank}.pt")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
