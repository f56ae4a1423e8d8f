"""The scorer beside its model: names of tensors, copies, modes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gare.model.scorer
from gare.model.gare import GARE
from gare.model.streaming import stream_scores
from gare.train.optim.optimizer import build_optimizer
from tests.helpers.heads import features, head
from tests.helpers.tiny import tiny_config

LAYER = [
    *(
        f"{part}.{kind}"
        for part in ("query", "key", "value", "out", "residual")
        for kind in ("weight", "bias")
    ),
    *(f"norm{number}.{kind}" for number in (1, 2, 3) for kind in ("weight", "bias")),
]


def increment_names(layers: int = 1) -> set[str]:
    names = {f"increment.layers.{layer}.{name}" for layer in range(layers) for name in LAYER}
    return names | {"increment.mean.weight", "increment.mean.bias"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), increment_names()),
        (("model.increment_layers=2",), increment_names(2)),
        (("model.context=words", "model.corrected_side=video"), increment_names()),
        (("model.query=text",), increment_names() | {"radius.coefficient", "radius.bias"}),
        (("model.increment=false",), set()),
        (("model.adapters=true",), increment_names() | {"adapters.text.weight", "adapters.video.weight"}),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, tuple) else "",
)
def test_tensors_keep_their_names_and_are_listed_once(overrides: tuple[str, ...], expected: set[str]) -> None:
    """Every checkpoint there is would be refused; a parameter that is listed twice would be moved twice."""
    config = tiny_config(*overrides)
    model = GARE(config.model)
    names = list(model.state_dict())
    assert {name for name in names if not name.startswith(("towers.", "temporal."))} == expected
    assert {name for name, _ in model.named_parameters(remove_duplicate=False)} == set(names)
    optimized = [
        id(one) for group in build_optimizer(model, config.train).param_groups for one in group["params"]
    ]
    assert sorted(optimized) == sorted(id(one) for one in model.parameters() if one.requires_grad)


def saved(model: GARE) -> GARE:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, GARE)
    return loaded


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("query", ["gap", "text"])
def test_the_scorer_of_a_copy_is_the_copys(query: str, copied: Callable[[GARE], GARE], seed: int) -> None:
    """A model kept for comparison would else score with what the other has learned since."""
    torch.manual_seed(seed)
    model = head(32, query=query)
    text, video = features(4, 5, 3, 2, 32, torch.float64)
    before = model.score(text, video)
    other = copied(model)
    assert other.scorer.increment is other.increment
    assert other.scorer.increment is not model.increment
    assert other.scorer.radius is other.radius
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert torch.equal(other.score(text, video), before)
    assert not torch.allclose(model.score(text, video), before)


def test_modes_and_moves_of_the_model_reach_its_scorer(seed: int) -> None:
    """Else dropout would stay on in an evaluation, or ψ would stay in another precision than its features."""
    torch.manual_seed(seed)
    model = head(32, increment_dropout=0.5)
    assert not model.scorer.has_dropout
    assert model.train().scorer.has_dropout
    assert model.scorer.draw_dropout(3) is not None
    assert model.eval().scorer.draw_dropout(3) is None
    paired = head(32, increment_dropout=0.5, increment_dropout_per="pair")
    assert [paired.scorer.path(), paired.train().scorer.path(), paired.eval().scorer.path()] == [
        *("factorized", "direct", "factorized")
    ]
    assert head(32, increment=False).train().scorer.path() == "factorized"
    text, video = features(4, 5, 3, 2, 32, torch.float32)
    assert model.float().score(text, video).dtype == torch.float32
    assert torch.equal(stream_scores(model.scorer, text, video), model.score(text, video))


@pytest.mark.parametrize(
    ("device", "num_pairs", "settings", "expected"),
    [
        ("cuda", 256, {"kernel": "plain"}, "direct"),
        ("cuda", 257, {"kernel": "plain"}, "factorized"),
        ("cuda", 256, {"kernel": "plain", "method": "factorized"}, "factorized"),
        ("cuda", 256, {"context": "words"}, "direct"),
        ("cuda", 256, {"context": "words", "memory_mb": 10.0}, "factorized"),
        ("cuda", 256, {}, "factorized"),
        ("cuda", 256, {"increment": False}, "factorized"),
        ("cpu", 256, {}, "factorized"),
    ],
)
def test_auto_takes_the_faster_of_the_exact_forms(
    monkeypatch: pytest.MonkeyPatch, device: str, num_pairs: int, settings: dict[str, Any], expected: str
) -> None:
    """Small steps of variants without kernels took four times as long on a GPU as they had to."""
    monkeypatch.setattr(gare.model.scorer, "why_unavailable", lambda *_: "")
    scorer = head(32, **{"memory_mb": 1000.0} | settings).train().scorer
    frames = SimpleNamespace(
        shape=(num_pairs, 12, 32), dtype=torch.float32, device=torch.device(device), is_cuda=device == "cuda"
    )
    assert scorer.path_of_step(frames) == expected  # type: ignore[arg-type]


def test_a_checkpoint_is_computed_as_the_machine_has_it(seed: int) -> None:
    """One that a GPU has trained is evaluated on a CPU, and one of an earlier version has no auto."""
    torch.manual_seed(seed)
    model = head(32, kernel="triton", memory_mb=256.0, corrected_side="video")
    here = head(32, memory_mb=1, products="tf32").config
    before = model.config.identity()
    model.take_compute_settings(here)
    assert (model.config.kernel, model.config.memory_mb) == ("auto", 1)
    assert model.config.corrected_side == "video"
    assert model.scorer.config is model.config
    assert model.config.identity() == before | {"products": "tf32"}
    text, video = features(4, 5, 3, 2, 32, torch.float64)
    assert model.score(text, video).shape == (4, 5)
    assert head(32, kernel="triton").config.zero_shot().kernel == "auto"
    assert head(32, kernel="triton").config.baseline().kernel == "auto"
