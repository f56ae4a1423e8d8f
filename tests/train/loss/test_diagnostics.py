"""Measures logged while training, against what autograd and plain loops say; and the trust-region step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from gare.config import LossConfig
from gare.errors import ConfigError
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.model.pooling import pool, unit_mean
from gare.train.checkpoint.initial_model import initial_model
from gare.train.loss.diagnostics import diagnose
from gare.train.loss.losses import info_nce
from gare.train.loss.objective import StepRandomness, sharded_terms
from gare.train.loss.trust_region import trust_region_step
from gare.train.step import build_learner, train_step
from tests.helpers.heads import features, head
from tests.helpers.tiny import tiny_batch, tiny_config

N = 6


def measured(model: GARE, text: TextFeatures, video: VideoFeatures, num_texts: int = N) -> dict[str, float]:
    terms = sharded_terms(model, text, video, LossConfig(), StepRandomness(), watched=True)
    assert terms.seen is not None
    return diagnose(model.scorer, terms.seen, num_texts)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"corrected_side": "video"},
        {"context": "words"},
        {"context": "words", "corrected_side": "video"},
        {"query": "text"},
    ],
    ids=lambda given: " ".join(map(str, given.values())) or "default",
)
def test_measures_are_those_of_the_increments(variant: dict[str, Any], seed: int) -> None:
    """Every measure from the increments themselves, and the tension from autograd."""
    torch.manual_seed(seed)
    model = head(32, **variant)
    text, video = features(N, N, 4, 5, 32, torch.float64)
    found = measured(model, text, video)
    with torch.no_grad():
        delta = model.scorer.deltas(text, video)
        pooled = pool(text.embedding, video, 3.0)
        scale = model.logit_scale.exp()
    assert delta is not None
    expected = {}
    t, mean = text.embedding, video.mean
    for name, shift in (("", delta), ("_before", torch.zeros_like(delta))):
        left = t.unsqueeze(1).expand(-1, N, -1).clone()
        right = pooled.clone()
        if model.config.corrected_side == "text":
            left = left + shift
        else:
            right = right + shift
        left.requires_grad_()
        rows, columns = info_nce(functional.cosine_similarity(left, right, dim=2), scale)
        (gradient,) = torch.autograd.grad((rows + columns) / 2, left)
        net, gross = gradient.sum(dim=1).norm(dim=1), gradient.norm(dim=2).sum(dim=1)
        expected |= {
            f"tension/net{name}": net.mean(),
            f"tension/gross{name}": gross.mean(),
            f"tension/cancelled{name}": 1 - (net / gross).mean(),
        }
    gap = mean.unsqueeze(0) - t.unsqueeze(1)
    moved = gap - delta if model.config.corrected_side == "text" else gap + delta
    numbers = {
        "cos_gap": functional.cosine_similarity(delta, gap, dim=2),
        "cos_text": functional.cosine_similarity(delta, t.unsqueeze(1), dim=2),
        "norm": delta.norm(dim=2),
        "distance_before": gap.norm(dim=2),
        "distance": moved.norm(dim=2),
    }
    if model.config.corrected_side == "text":
        numbers["text_norm"] = (t.unsqueeze(1) + delta).norm(dim=2)
    positive = torch.eye(N, dtype=torch.bool)
    expected["delta/text_norm_before"] = t.norm(dim=1).mean()
    for name, values in numbers.items():
        expected[f"delta/{name}_positive"] = values[positive].mean()
        expected[f"delta/{name}_negative"] = values[~positive].mean()
    expected["delta/sigma"] = delta.std(dim=0).mean()
    expected["gap/modality"] = (t.mean(0) - mean.mean(0)).norm()
    unit_t, unit_v = functional.normalize(t, dim=1), functional.normalize(mean, dim=1)
    expected["gap/alignment"] = (unit_t - unit_v).norm(dim=1).square().mean()
    for name, unit in (("text", unit_t), ("video", unit_v)):
        apart = torch.pdist(unit).square()
        expected[f"gap/uniformity_{name}"] = (-2 * apart).exp().mean().log()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-6, abs=1e-9), name


def test_the_baseline_is_measured_too(seed: int) -> None:
    """The paper's figures start from the tension without increments."""
    torch.manual_seed(seed)
    text, video = features(N, N, 4, 5, 32, torch.float64)
    for pooling in ("text_conditioned", "mean"):
        model = head(32, increment=False, pooling=pooling)
        found = measured(model, text, video)
        assert not {name for name in found if name.startswith("delta/")}
        left = text.embedding.unsqueeze(1).expand(-1, N, -1).clone().requires_grad_()
        pooled = pool(text.embedding, video, 3.0)
        if pooling == "mean":
            pooled = unit_mean(video).expand(N, -1, -1)
        scores = functional.cosine_similarity(left, pooled, dim=2)
        rows, columns = info_nce(scores, model.logit_scale.exp())
        (gradient,) = torch.autograd.grad((rows + columns) / 2, left)
        net, gross = gradient.sum(dim=1).norm(dim=1), gradient.norm(dim=2).sum(dim=1)
        assert found["tension/net_before"] == pytest.approx(float(net.mean()))
        assert found["tension/cancelled_before"] == pytest.approx(float(1 - (net / gross).mean()))
        gap = text.embedding.mean(dim=0) - video.mean.mean(dim=0)
        assert found["gap/modality"] == pytest.approx(float(gap.norm()))


def test_few_texts_are_of_all(seed: int) -> None:
    """Looking at fewer texts estimates the same means."""
    torch.manual_seed(seed)
    model = head(32)
    text, video = features(N, N, 4, 5, 32, torch.float64)
    assert measured(model, text, video, 2).keys() == measured(model, text, video, 100).keys()


def test_a_worker_of_one_pair_measures_no_spread(seed: int) -> None:
    """The infinite logarithm of an empty mean is no number of JSON, and would end the run that logs it."""
    torch.manual_seed(seed)
    model = head(32)
    text, video = features(N, N, 4, 5, 32, torch.float64)
    seen = sharded_terms(model, text, video, LossConfig(), StepRandomness(), watched=True).seen
    assert seen is not None
    sides = replace(seen.sides, others=seen.sides.others[torch.tensor([2])], own=slice(2, 3))
    found = diagnose(model.scorer, replace(seen, sides=sides), N)
    assert "gap/alignment" in found
    assert not any(name.startswith("gap/uniformity") or name == "delta/sigma" for name in found)
    assert np.isfinite(list(found.values())).all()


@pytest.mark.parametrize("side", ["text", "video"])
@pytest.mark.parametrize("start", ["coupled", "learned"])
def test_small_steps_do_what_they_predict(side: str, start: Any, seed: int) -> None:
    """To first order; twice the radius, four times the error."""
    torch.manual_seed(seed)
    model = head(32, corrected_side=side)
    text, video = features(N, N, 4, 5, 32, torch.float64)
    with torch.no_grad():
        delta = model.scorer.deltas(text, video)
    assert delta is not None
    reach = 0.0 if start == "coupled" else float(delta.norm(dim=2).max())
    errors = []
    for small in (1e-3, 5e-4, 2.5e-4):
        step = trust_region_step(
            model, text, video, max(reach, small) if start == "coupled" else small, start
        )
        if start == "learned":
            assert step.outside == 1  # every learned increment is longer than this radius
            assert step.real == step.predicted == 0
            continue
        assert step.outside == 0
        assert step.predicted > 0
        torch.testing.assert_close(step.delta.norm(dim=2), torch.full((N, N), small, dtype=torch.float64))
        errors.append(abs(step.real / step.predicted - 1))
    if start == "coupled":
        assert errors[0] < 0.05
        assert errors[2] < errors[1] < errors[0]
    else:
        step = trust_region_step(model, text, video, 1.01 * reach, start)
        assert step.outside == 0
        torch.testing.assert_close(
            step.delta.norm(dim=2), torch.full((N, N), 1.01 * reach, dtype=torch.float64)
        )


def test_a_step_without_sense_is_refused(seed: int) -> None:
    """The baseline has nothing to compare with."""
    torch.manual_seed(seed)
    text, video = features(N, N, 4, 5, 32, torch.float64)
    with pytest.raises(ConfigError, match="no increments"):
        trust_region_step(head(32, increment=False), text, video, 1.0)
    with pytest.raises(ConfigError, match="more than 0"):
        trust_region_step(head(32), text, video, 0.0)


def test_training_logs_them_when_asked(rng: np.random.Generator) -> None:
    """Every so many steps, beside the losses; and they change nothing of the training."""
    overrides = ("train.diagnostics_every=2", "train.trust_region_radius=0.1")
    configs = [tiny_config(*overrides), tiny_config("train.diagnostics_every=0")]
    batch = tiny_batch(configs[0], rng)
    runs = []
    for config in configs:
        learner = build_learner(initial_model(config), config, 10, torch.device("cpu"))
        runs.append(([train_step(learner, batch) for _ in range(3)], learner.model.state_dict()))
    (watched, weights), (plain, same) = runs
    extra = ("tension/", "delta/", "gap/", "trust_region/")
    assert [any(name.startswith(extra) for name in values) for values in watched] == [True, False, True]
    assert {name.split("/")[0] for name in watched[0]} >= {"tension", "delta", "gap", "trust_region"}
    assert not any(name.startswith(extra) for values in plain for name in values)
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_the_last_step_is_measured(rng: np.random.Generator) -> None:
    """A training of few steps has no other measure of its end."""
    config = tiny_config("train.diagnostics_every=50")
    learner = build_learner(initial_model(config), config, 3, torch.device("cpu"))
    steps = [train_step(learner, tiny_batch(config, rng)) for _ in range(3)]
    assert ["delta/sigma" in values for values in steps] == [True, False, True]


def test_the_direct_form_is_measured_too(rng: np.random.Generator, caplog: pytest.LogCaptureFixture) -> None:
    """The paper's files drop out pair by pair, which only the direct form can; their runs need the curves."""
    batch = tiny_batch(tiny_config(), rng)
    found = []
    for option in ("model.increment_dropout_per=pair", "model.increment_dropout=0"):
        learner = build_learner(
            initial_model(tiny_config(option)), tiny_config(option), 10, torch.device("cpu")
        )
        values = train_step(learner, batch)
        found.append(
            {name: value for name, value in values.items() if name.startswith(("ten", "del", "gap"))}
        )
        assert learner.model.training
    assert len(found[0]) > 10
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)
    assert not caplog.text.count("not measured")
    layers = tiny_config("model.increment_layers=2")
    train_step(build_learner(initial_model(layers), layers, 10, torch.device("cpu")), batch)
    assert "are not measured: increment_layers 2" in caplog.text
