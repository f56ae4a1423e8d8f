"""The head of a step on a device without numbers, PyTorch's meta: it may ask that device for none."""

from __future__ import annotations

import pytest
import torch

from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.train.loss.objective import StepRandomness, loss_terms, sharded_terms
from tests.helpers.tiny import tiny_config

SAMPLED = ("loss.direction_over=sample", "loss.direction_texts=3")
VARIANTS = (
    (),
    ("model.increment_heads=2",),
    ("model.corrected_side=video", "loss.kl_normalised=true"),
    ("model.context=words",),
    ("model.query=text",),
    ("model.pooling=mean", "model.increment=false"),
    ("loss.positives=video", "loss.direction_form=orthogonality"),
    SAMPLED,
    (*SAMPLED, "model.context=words", "model.memory_mb=1"),
    (*SAMPLED, "loss.bottleneck_anchor=text"),
)


@pytest.mark.parametrize("form", ["direct", "factorized"])
@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda overrides: " ".join(overrides) or "default")
def test_the_head_asks_the_device_nothing(form: str, overrides: tuple[str, ...]) -> None:
    """A number that the host waits for lets a GPU run dry in each step, and cannot be in a CUDA graph.

    Numbers that are left on the host fail here, too, where a step would fail on a GPU alone.
    """
    config, device = tiny_config("model.increment_dropout=0.1", *overrides), torch.device("meta")
    model = GARE(config.model, towers=False).train().to(device)
    width, frames, pairs, words = config.model.clip.embed_dim, config.model.max_frames, 8, 5

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, requires_grad=True)

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bool, device=device)

    text = TextFeatures(empty(pairs, width), empty(pairs, words, width), ones(pairs, words))
    video = VideoFeatures(empty(pairs, frames, width), ones(pairs, frames))
    draws = StepRandomness.of_step(model.scorer, config.loss, pairs, seed=0)
    assert (draws.sample is not None) == ("loss.direction_over=sample" in overrides)
    ids = (
        torch.zeros(pairs, dtype=torch.int64, device=device) if "loss.positives=video" in overrides else None
    )
    compute = loss_terms if form == "direct" else sharded_terms
    terms = compute(model, text, video, config.loss, draws, ids)
    terms.objective.backward()
    assert text.embedding.grad is not None
    assert video.frames.grad is not None
    assert all(value.device == device for value in terms.named().values())
