"""What trains and how: optimisers, frozen parts, precision, and where a run stops that cannot go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gare.errors import ConfigError, GareError
from gare.model.gare import GARE
from gare.train.checkpoint.initial_model import initial_model
from gare.train.loss.objective import Objective
from gare.train.optim.bert_adam import BertAdam
from gare.train.optim.optimizer import rate_factor_released, set_learning_rate
from gare.train.step import Learner, build_learner, train_step
from tests.helpers.tiny import tiny_batch, tiny_config
from tests.model.importing.test_weights import SMALL, OpenAIClip, published


def learner_of(*overrides: str) -> Learner:
    config = tiny_config(*overrides)
    return build_learner(initial_model(config), config, 10, torch.device("cpu"))


def test_bert_adam_is_its_formula(seed: int) -> None:
    """Written out in numpy, with a gradient longer than 1 and one shorter."""
    rng = np.random.default_rng(seed)
    for scale in (0.01, 10.0):
        theta = rng.standard_normal(5)
        parameter = torch.nn.Parameter(torch.tensor(theta))
        optimizer = BertAdam([parameter], lr=0.1, weight_decay=0.2)
        mean, square = np.zeros(5), np.zeros(5)
        for _ in range(4):
            grad = scale * rng.standard_normal(5)
            parameter.grad = torch.tensor(grad)
            optimizer.step()
            grad = grad * min(1.0, 1.0 / (np.linalg.norm(grad) + 1e-6))
            mean, square = 0.9 * mean + 0.1 * grad, 0.98 * square + 0.02 * grad**2
            theta = theta - 0.1 * (mean / (np.sqrt(square) + 1e-6) + 0.2 * theta)
        np.testing.assert_allclose(parameter.detach().numpy(), theta, rtol=1e-9)


def test_released_schedule() -> None:
    """The first rate is 0; the cosine runs over the whole run and is not restarted after the warm-up."""
    factors = [rate_factor_released(step, 20, 0.1) for step in range(20)]
    assert factors[:2] == [0.0, pytest.approx(0.5)]
    assert factors[2] == pytest.approx(0.5 * (1 + np.cos(0.1 * np.pi)))
    assert factors[10] == pytest.approx(0.5)


def test_the_released_schedule_rises_again_after_five_epochs() -> None:
    """ActivityNet's ten epochs were trained so: a run whose rate falls over all ten is another recipe."""
    settings = ["train.optimizer=bert_adam", "train.epochs=10", "train.warmup_fraction=0.1"]
    released = learner_of(*settings, "train.schedule_epochs=5")
    whole = learner_of(*settings)
    steps = range(40)  # 4 an epoch, and so 20 in five
    factors = [set_learning_rate(released.optimizer, step, 40, released.config.train) for step in steps]
    cosine = {4: 0.90451, 8: 0.65451, 10: 0.5, 12: 0.34549, 16: 0.09549}
    expected = {0: 0.0, 1: 0.5, 2: 0.97553, **cosine, 20: 0.0}
    expected |= {40 - step: value for step, value in cosine.items()}
    assert {step: round(factors[step], 5) for step in expected} == expected
    assert factors[39] == pytest.approx(0.99384, abs=1e-5)
    assert factors[:20] == [rate_factor_released(step, 20, 0.1) for step in range(20)]
    over_all = [set_learning_rate(whole.optimizer, step, 40, whole.config.train) for step in steps]
    assert over_all == [rate_factor_released(step, 40, 0.1) for step in steps]
    peaks = {group["peak_lr"]: group["lr"] for group in released.optimizer.param_groups}
    assert all(rate == peak * factors[39] for peak, rate in peaks.items())


def test_a_schedule_that_has_no_effect_is_refused() -> None:
    """AdamW's schedule is over the whole run, whatever the key says."""
    with pytest.raises(ConfigError, match="schedule_epochs would change nothing"):
        learner_of("train.schedule_epochs=5")


def test_bert_adam_brings_its_schedule(rng: np.random.Generator) -> None:
    """Optimiser and schedule are one recipe; the first step of the released training moves nothing."""
    learner = learner_of("train.optimizer=bert_adam")
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    batch = tiny_batch(learner.config, rng)
    assert train_step(learner, batch)["train/lr_factor"] == 0
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())
    train_step(learner, batch)
    stayed = [name for name, value in learner.model.state_dict().items() if torch.equal(value, before[name])]
    assert stayed == ["increment.layers.0.key.bias"]  # whose true gradient is zero


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ("none", ()),
        ("auto", ()),
        ("patch_conv", ("vision_model.embeddings.patch_embedding.weight",)),
        ("image", ("vision_model.", "visual_projection.")),
        ("text", ("text_model.", "text_projection.")),
        ("towers", ("vision_model.", "visual_projection.", "text_model.", "text_projection.")),
    ],
)
def test_what_is_frozen_stays(freeze: str, frozen: tuple[str, ...], rng: np.random.Generator) -> None:
    """And everything else moves, the logit scale too."""
    overrides = [f"train.freeze={freeze}", "train.weight_decay=0.5"]
    if freeze in ("image", "text", "towers"):
        overrides.append("train.clip_weights=some.pt")  # what is frozen has to know something
    config = tiny_config(*overrides)
    learner = build_learner(GARE(config.model), config, 10, torch.device("cpu"))
    before = {name: value.clone() for name, value in learner.model.named_parameters()}
    for _ in range(2):
        train_step(learner, tiny_batch(learner.config, rng))
    prefixes = tuple(f"towers.clip.{name}" for name in frozen)
    for name, value in learner.model.named_parameters():
        # The true gradient of the keys' bias is zero: no softmax sees it.
        stays = name.startswith(prefixes or ("-",)) or name == "increment.layers.0.key.bias"
        assert torch.equal(value, before[name]) == stays, name


def test_training_starts_from_clip(tmp_path: Path, rng: np.random.Generator) -> None:
    """Real runs start from OpenAI's weights; the patch convolution then stays as it is, as released."""
    clip = OpenAIClip(**SMALL)
    torch.save(published(clip), tmp_path / "clip.pt")
    sizes = [
        f"model.clip.{name}={size}"
        for name, size in {
            "image_size": 32, "patch_size": 16, "vision_width": 128, "vision_heads": 2, "text_width": 64,
            "text_layers": 4, "text_heads": 1, "vocab_size": 100, "max_positions": 77, "embed_dim": 64,
        }.items()
    ]  # fmt: skip
    overrides = [*sizes, "extract.image_size=32", f"train.clip_weights={tmp_path / 'clip.pt'}"]
    learner = learner_of(*overrides)
    text_projection = learner.model.state_dict()["towers.clip.text_projection.weight"]
    assert torch.equal(text_projection, clip.text_projection.T)
    conv = "towers.clip.vision_model.embeddings.patch_embedding.weight"
    train_step(learner, tiny_batch(learner.config, rng))
    assert torch.equal(learner.model.state_dict()[conv], clip.visual.conv1.weight)
    with pytest.raises(ConfigError, match=r"sizes.*model\.clip\.vision_layers=2"):
        learner_of(*overrides, "model.clip.vision_layers=1")


def test_bf16_encodes_in_bf16_and_scores_in_float32(rng: np.random.Generator) -> None:
    """Half the memory of the towers; cosines and exponentials in bf16 would round R@1 away."""
    seen: list[torch.dtype] = []
    learner = learner_of("train.precision=bf16")
    learner.model.towers.clip.vision_model.encoder.layers[0].mlp.fc1.register_forward_hook(
        lambda *call: seen.append(call[2].dtype)
    )
    batch = tiny_batch(learner.config, rng)
    terms = learner.objective(batch)
    assert seen == [torch.bfloat16]
    assert all(value.dtype == torch.float32 for value in vars(terms).values() if value is not None)
    # Near the loss in float32, but not it.
    exact = learner_of()
    exact.model.load_state_dict(learner.model.state_dict())
    torch.manual_seed(0)
    rough = learner.objective(batch).total.item()
    torch.manual_seed(0)
    fine = exact.objective(batch).total.item()
    assert rough == pytest.approx(fine, rel=0.1)
    assert rough != fine
    assert train_step(learner, batch)["train/grad_norm"] > 0
    assert all(parameter.dtype == torch.float32 for parameter in learner.model.parameters())


def test_a_loss_that_is_not_finite_names_step_term_and_videos(rng: np.random.Generator) -> None:
    """After hours on a cluster, "nan" alone helps nobody; the weights must be as they were."""
    learner = learner_of("train.batch_size=4")
    batch = tiny_batch(learner.config, rng)
    train_step(learner, batch)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    narrow = replace(learner, config=tiny_config("train.batch_size=4", "loss.prior_std=1e-25"))
    narrow.objective = Objective(learner.model, narrow.config.loss, narrow.config.train)
    with pytest.raises(
        GareError, match=r"step 1: the loss is not finite: loss/bottleneck is inf; .*a, b, c, d"
    ):
        train_step(narrow, batch, ["a", "b", "c", "d"])
    bad = torch.where(torch.arange(4)[:, None, None, None, None] == 2, torch.nan, batch.frames)
    with pytest.raises(GareError, match=r"loss/nce_t2v is nan.*videos of the batch: a, b, c, d"):
        train_step(
            learner, type(batch)(batch.token_ids, batch.token_mask, bad, batch.frame_mask), list("abcd")
        )
    assert learner.step == 1
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())


def test_initial_model_follows_the_seed() -> None:
    """Two seeds of a study must be two models, and one seed one."""
    one, same, other = (initial_model(tiny_config(f"train.seed={seed}")) for seed in (1, 1, 2))
    assert isinstance(one, GARE)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.increment.mean.weight, other.increment.mean.weight)  # type: ignore[union-attr]
