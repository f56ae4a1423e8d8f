"""The whole model, its losses and four steps of the released optimiser equal the authors' released code."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from gare import GARE, import_released
from gare.config import LossConfig
from gare.train.loss.objective import LossTerms, loss_terms
from gare.train.optim.bert_adam import BertAdam
from gare.train.optim.optimizer import rate_factor_released
from tests.helpers.golden import GOLDEN, draw, draw_weight


def released_state_dict(seed: int) -> dict[str, torch.Tensor]:
    """psi.* are the same tensors as agent.psi.*, drawn under the latter's names."""
    names = json.loads((GOLDEN / "released_state_dict.json").read_text("utf-8"))
    return {
        name: draw_weight(f"agent.{name}" if name.startswith("psi.") else name, tuple(shape), seed)
        for name, shape in names
    }


def ours_to_released(model: GARE, state_dict: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """Our parameter names for each released one, found by importing tensors that are numbered."""
    groups: dict[str, list[str]] = {}
    numbered = {
        name: torch.full_like(tensor, float(number))
        for number, (name, tensor) in enumerate(state_dict.items())
    }
    for name in numbered:
        if name.startswith("psi."):
            numbered[name] = numbered[f"agent.{name}"]
    names = list(state_dict)
    for ours, parameter in import_released(numbered).named_parameters():
        groups.setdefault(names[int(parameter.flatten()[0])], []).append(ours)
    return groups


@pytest.fixture(params=[0, 1])
def golden_seed(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def golden_losses(model: GARE, golden: dict[str, np.ndarray], frames: torch.Tensor) -> LossTerms:
    text = model.encode_text(torch.from_numpy(golden["token_ids"]), torch.from_numpy(golden["token_mask"]))
    video = model.encode_video(frames, torch.ones(frames.shape[:2], dtype=torch.bool))
    return loss_terms(model, text, video, LossConfig())


def test_features_equal_released_code(golden_seed: int) -> None:
    """An encoder that is a little off makes every imported checkpoint a little worse, silently."""
    golden = dict(np.load(GOLDEN / f"model_seed{golden_seed}.npz"))
    model = import_released(released_state_dict(golden_seed))
    frames = torch.from_numpy(draw("frames", (4, 1, 1, 6, 3, 64, 64), golden_seed, 1.0)).reshape(
        4, 6, 3, 64, 64
    )
    with torch.no_grad():
        text = model.encode_text(
            torch.from_numpy(golden["token_ids"]).reshape(4, -1),
            torch.from_numpy(golden["token_mask"]).reshape(4, -1),
        )
        video = model.encode_video(frames, torch.ones(4, 6))
    assert text.words is not None
    for name, value in {
        "text_embedding": text.embedding,
        "word_features_norm": text.words.norm(dim=-1),
        "frame_features": video.frames,
    }.items():
        np.testing.assert_allclose(value, golden[name].reshape(value.shape), rtol=0, atol=2e-5, err_msg=name)


def test_four_steps_equal_released_training(golden_seed: int) -> None:
    """Model, losses, gradients, optimiser, schedule and clamp together, as the authors train."""
    golden = dict(np.load(GOLDEN / f"model_seed{golden_seed}.npz"))
    golden["token_ids"] = golden["token_ids"].reshape(4, -1)
    golden["token_mask"] = golden["token_mask"].reshape(4, -1)
    state_dict = released_state_dict(golden_seed)
    model = import_released(state_dict, increment_dropout=0.0)
    names = ours_to_released(model, state_dict)
    frames = torch.from_numpy(draw("frames", (4, 1, 1, 6, 3, 64, 64), golden_seed, 1.0)).reshape(
        4, 6, 3, 64, 64
    )
    parameters = dict(model.named_parameters())
    parameters["towers.clip.vision_model.embeddings.patch_embedding.weight"].requires_grad_(False)
    groups = []
    for released, ours in names.items():
        peak = 1e-4 if released.startswith("clip.") else 1e-3
        decay = 0.0 if "bias" in released else 0.2
        groups.append({"params": [parameters[name] for name in ours], "peak_lr": peak, "weight_decay": decay})
    optimizer = BertAdam(groups)
    for step in range(4):
        optimizer.zero_grad()
        terms = golden_losses(model, golden, frames)
        np.testing.assert_allclose(
            terms.total.item(), golden["losses"][step], rtol=1e-3, err_msg=f"step {step}"
        )
        nce = (terms.nce_t2v + terms.nce_v2t).item() / 2
        np.testing.assert_allclose(nce, golden["nce"][step], rtol=1e-3, err_msg=f"step {step}")
        terms.total.backward()
        total = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        np.testing.assert_allclose(float(total), golden[f"total_gradnorm/{step}"], rtol=1e-3)
        if step == 0:
            known = {name.removeprefix("gradnorm/") for name in golden if name.startswith("gradnorm/")}
            unmatched = {name for name in known - names.keys() if not np.isnan(golden[f"gradnorm/{name}"])}
            assert not unmatched, "gradients of the released code without a counterpart"
            for released, ours in names.items():
                expected = golden[f"gradnorm/{released}"]
                grads = [parameters[name].grad for name in ours]
                if np.isnan(expected):
                    assert all(grad is None for grad in grads), released
                    continue
                norm = torch.stack([grad.norm() for grad in grads if grad is not None]).norm()
                np.testing.assert_allclose(
                    norm, expected, rtol=1e-3, atol=1e-6 * float(total), err_msg=released
                )
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate_factor_released(step, 20, 0.1)
        optimizer.step()
        model.towers.clamp_logit_scale()
    for released in (name.removeprefix("paramnorm_after/") for name in golden if "paramnorm_after/" in name):
        ours = names[released]
        norm = torch.stack([parameters[name].detach().norm() for name in ours]).norm()
        np.testing.assert_allclose(norm, golden[f"paramnorm_after/{released}"], rtol=1e-3, err_msg=released)
    np.testing.assert_allclose(model.logit_scale.item(), golden["logit_scale_after"], rtol=1e-5)
