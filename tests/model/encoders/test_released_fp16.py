"""The precision of the released training, against a plain restatement of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.nn import functional

from gare.config import Config
from gare.data.batch import Batch
from gare.errors import ConfigError
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.train.checkpoint.files import load_checkpoint, restore_learner, save_checkpoint
from gare.train.checkpoint.initial_model import initial_model
from gare.train.loss.gather import rank, world_size
from gare.train.loss.objective import StepRandomness, loss_terms
from gare.train.step import Learner, build_learner, compute_gradients, train_step
from tests.helpers.tiny import share, tiny_batch, tiny_config

NUM_STEPS = 30
RELEASED = (
    *("train.precision=fp16_released", "train.optimizer=bert_adam", "model.increment_dropout=0"),
    *("model.method=direct", "train.clip_lr=1e-6", "train.lr=1e-3", "train.diagnostics_every=0"),
)


def learner_of(*overrides: str) -> Learner:
    config = tiny_config(*RELEASED, *overrides)
    return build_learner(initial_model(config), config, NUM_STEPS, torch.device("cpu"))


class Released:
    """The released step, written out: towers, divided gradient, clipping, BertAdam, schedule.

    What follows the towers is float32 in both and taken from the project.
    """

    def __init__(self, model: GARE, config: Config) -> None:
        self.config = config
        self.clip = {}
        for name, value in model.towers.clip.state_dict().items():
            half = "embed" not in name and "norm" not in name and "layrnorm" not in name
            half = half or "patch_embedding" in name
            value = value.half() if half and name != "logit_scale" else value.clone()
            self.clip[name] = value.requires_grad_()
        self.rest = copy.deepcopy(model)
        self.head = {
            name: value for name, value in self.rest.named_parameters() if not name.startswith("towers.")
        }
        self.all = [*self.clip.values(), *self.head.values()]
        self.moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in self.all]
        self.done = 0

    def norm(self, hidden: Tensor, name: str) -> Tensor:
        weight, bias = self.clip[f"{name}.weight"], self.clip[f"{name}.bias"]
        return functional.layer_norm(hidden.float(), weight.shape, weight, bias, 1e-5).half()

    def linear(self, hidden: Tensor, name: str) -> Tensor:
        return functional.linear(hidden, self.clip[f"{name}.weight"], self.clip.get(f"{name}.bias"))

    def tower(self, hidden: Tensor, name: str, layers: int, heads: int, *, causal: bool) -> Tensor:
        for layer in range(layers):
            block = f"{name}.encoder.layers.{layer}"
            normed = self.norm(hidden, f"{block}.layer_norm1")
            query, key, value = (
                self.linear(normed, f"{block}.self_attn.{letter}_proj")
                .unflatten(-1, (heads, -1))
                .transpose(1, 2)
                for letter in "qkv"
            )
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
            hidden = hidden + self.linear(mixed.transpose(1, 2).flatten(2), f"{block}.self_attn.out_proj")
            inner = self.linear(self.norm(hidden, f"{block}.layer_norm2"), f"{block}.mlp.fc1")
            inner = inner * torch.sigmoid(1.702 * inner)
            hidden = hidden + self.linear(inner, f"{block}.mlp.fc2")
        return hidden

    def images(self, images: Tensor) -> Tensor:
        sizes, name = self.config.model.clip, "vision_model.embeddings"
        conv = self.clip[f"{name}.patch_embedding.weight"]
        patches = functional.conv2d(images.half(), conv, stride=sizes.patch_size).flatten(2).transpose(1, 2)
        first = self.clip[f"{name}.class_embedding"].half().expand(len(images), 1, -1)
        hidden = torch.cat([first, patches], dim=1) + self.clip[f"{name}.position_embedding.weight"].half()
        hidden = self.norm(hidden, "vision_model.pre_layrnorm")
        hidden = self.tower(hidden, "vision_model", sizes.vision_layers, sizes.vision_heads, causal=False)
        return self.linear(
            self.norm(hidden[:, 0], "vision_model.post_layernorm"), "visual_projection"
        ).float()

    def words(self, token_ids: Tensor) -> Tensor:
        sizes, name = self.config.model.clip, "text_model.embeddings"
        tokens = functional.embedding(token_ids, self.clip[f"{name}.token_embedding.weight"]).half()
        hidden = tokens + self.clip[f"{name}.position_embedding.weight"][: token_ids.shape[1]].half()
        hidden = self.tower(hidden, "text_model", sizes.text_layers, sizes.text_heads, causal=True)
        return self.linear(self.norm(hidden, "text_model.final_layer_norm"), "text_projection").float()

    def step(self, batch: Batch) -> None:
        train = self.config.train
        for value in self.all:
            value.grad = None
        ends = batch.token_mask.sum(dim=1) - 1
        words = self.words(batch.token_ids[:, : int(ends.max()) + 1])
        text = words[torch.arange(len(ends)), ends]
        mask = batch.frame_mask.bool()
        frames = words.new_zeros(*mask.shape, words.shape[-1])
        frames[mask] = self.images(batch.frames[mask])
        frames = self.rest.temporal(frames, mask)
        for features in (text, frames):
            features.register_hook(lambda gradient: gradient / 4)
        # The rest has its scale from its own towers, which must be the one that learns here.
        self.rest.towers.clip.logit_scale = torch.nn.Parameter(self.clip["logit_scale"].detach())
        text_features = TextFeatures(text, None, batch.token_mask.bool())
        terms = loss_terms(
            self.rest, text_features, VideoFeatures(frames, mask), self.config.loss, StepRandomness()
        )
        terms.total.backward()  # type: ignore[no-untyped-call]
        self.clip["logit_scale"].grad = self.rest.logit_scale.grad
        torch.nn.utils.clip_grad_norm_(self.all, train.max_grad_norm)
        done = self.done / NUM_STEPS
        factor = done / 0.1 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * done))
        rates = [train.clip_lr * factor] * len(self.clip) + [train.lr * factor] * len(self.head)
        names = [*self.clip, *self.head]
        with torch.no_grad():
            for name, value, (mean, square), rate in zip(names, self.all, self.moments, rates, strict=True):
                if value.grad is None:
                    continue
                torch.nn.utils.clip_grad_norm_(value, 1.0)
                mean.mul_(0.9).add_(value.grad, alpha=1 - 0.9)
                square.mul_(0.98).addcmul_(value.grad, value.grad, value=1 - 0.98)
                update = mean / (square.sqrt() + 1e-6)
                if not name.endswith("bias"):
                    update += train.weight_decay * value
                value.sub_(rate * update)
            self.clip["logit_scale"].clamp_(max=math.log(100))
        self.done += 1

    def state(self) -> Mapping[str, Tensor]:
        return {f"towers.clip.{name}": value for name, value in self.clip.items()} | dict(self.head)


def test_thirty_steps_are_the_released_ones(rng: np.random.Generator) -> None:
    """Else "the paper's recipe" would be a name: fp16 moments decide how far CLIP moves at all."""
    learner = learner_of()
    config = tiny_config(*RELEASED)
    released = Released(initial_model(config), config)
    begun = {name: value.detach().clone() for name, value in released.state().items()}
    for _ in range(NUM_STEPS):
        batch = tiny_batch(config, rng)
        train_step(learner, batch)
        released.step(batch)
    ours = dict(learner.model.named_parameters())
    assert ours.keys() == released.state().keys()
    for name, value in released.state().items():
        assert torch.equal(ours[name], value), name
        assert ours[name].dtype == value.dtype, name
        if value.dtype == torch.float16:
            assert learner.optimizer.state[ours[name]]["exp_avg"].dtype == torch.float16
    moved = [name for name, value in released.state().items() if not torch.equal(value, begun[name])]
    # The true gradient of the keys' biases is zero; rounding alone moves them, or not.
    assert len(moved) >= len(begun) - 7


def test_what_is_half_and_what_is_not() -> None:
    """Fewer halves would be another recipe; more would break where CLIP needs range."""
    learner = learner_of()
    kinds = {name: value.dtype for name, value in learner.model.named_parameters()}
    singles = {name for name, kind in kinds.items() if kind == torch.float32 and name.startswith("towers.")}
    assert {name for name, kind in kinds.items() if kind == torch.float16} == {
        name for name in kinds if name.startswith("towers.") and name not in singles
    }
    assert all(
        "norm" in name or "layrnorm" in name or "embedding" in name or name.endswith("logit_scale")
        for name in singles
    )
    clip = "towers.clip."
    assert kinds[f"{clip}vision_model.embeddings.patch_embedding.weight"] == torch.float16
    assert kinds[f"{clip}text_projection.weight"] == kinds[f"{clip}visual_projection.weight"] == torch.float16
    assert clip + "vision_model.embeddings.class_embedding" in singles


def test_a_run_goes_on_bit_for_bit_and_is_read_in_float32(tmp_path: Path, rng: np.random.Generator) -> None:
    """A restart that rounded moments otherwise would be another run; evaluation takes any checkpoint."""
    straight, stopped = learner_of(), learner_of()
    batches = [tiny_batch(straight.config, rng) for _ in range(6)]
    for batch in batches[:3]:
        train_step(straight, batch)
        train_step(stopped, batch)
    uri = str(tmp_path / "checkpoint")
    save_checkpoint(uri, stopped, epoch=0)
    continued = learner_of()
    restore_learner(uri, continued)
    for batch in batches[3:]:
        train_step(straight, batch)
        train_step(continued, batch)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(continued.model.state_dict()[name], value), name
    read = load_checkpoint(uri)
    for name, value in stopped.model.state_dict().items():
        assert read.state_dict()[name].dtype == torch.float32
        assert torch.equal(read.state_dict()[name], value.float()), name


def test_the_encoders_gradient_is_divided(rng: np.random.Generator) -> None:
    """Without loss scaling and with moments in fp16 it decides how far CLIP moves; ψ's stays as it is."""
    whole, divided = learner_of("train.encoder_gradient_divisor=1"), learner_of()
    batch = tiny_batch(whole.config, rng)
    for learner in (whole, divided):
        learner.objective(batch, 0).objective.backward()
    names = ["temporal.blocks.layers.1.mlp.fc2.weight", "increment.mean.weight"]
    for name, divisor in zip(names, (4, 1), strict=True):
        one, other = (dict(learner.model.named_parameters())[name].grad for learner in (whole, divided))
        assert one is not None
        assert other is not None
        torch.testing.assert_close(other * divisor, one)


def _gradients(seed: int) -> dict[str, Tensor]:
    """Of this worker's share of a batch, after they were averaged."""
    learner = learner_of()
    batch = tiny_batch(learner.config, np.random.default_rng(seed))
    compute_gradients(learner, share(batch, rank(), world_size()))
    return {
        name: value.grad.clone() for name, value in learner.model.named_parameters() if value.grad is not None
    }


def _work(rank_: int, seed: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank_, world_size=2)
    torch.set_num_threads(1)
    try:
        torch.save(_gradients(seed), f"{folder}/{rank_}.pt")
    finally:
        dist.destroy_process_group()


def test_two_workers_have_the_gradient_of_one(seed: int, tmp_path: Path) -> None:
    """DDP has to exchange halves and singles beside each other, and to average both."""
    torch.multiprocessing.spawn(_work, (seed, str(tmp_path)), nprocs=2)
    alone = _gradients(seed)
    both = [torch.load(tmp_path / f"{rank_}.pt", weights_only=True) for rank_ in (0, 1)]
    for name, value in alone.items():
        assert torch.equal(both[0][name], both[1][name]), name
        assert both[0][name].dtype == value.dtype
    for part, bound in {"towers.clip.text": 3e-2, "towers.clip.vis": 3e-2, "increment": 1e-2}.items():
        ours, theirs = (
            torch.cat([one[name].float().flatten() for name in alone if name.startswith(part)])
            for one in (both[0], alone)
        )
        assert float((ours - theirs).norm() / theirs.norm()) < bound, part


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.optimizer=adamw"], "precision fp16_released needs optimizer bert_adam, not adamw"),
        (
            ["train.precision=bf16", "train.encoder_gradient_divisor=2"],
            "would change nothing: precision is bf16",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    """Each would be another recipe than its name says."""
    with pytest.raises(ConfigError, match=message):
        tiny_config(*RELEASED, *overrides)
