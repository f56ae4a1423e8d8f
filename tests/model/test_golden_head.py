"""The pair score, its losses and gradients equal the authors' released code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gare.config import LossConfig
from gare.model.features import VideoFeatures
from gare.model.gare import GARE
from gare.model.increment import Increment
from gare.model.pooling import pool
from gare.train.loss.losses import bottleneck, direction, info_nce, radii
from tests.helpers.golden import GOLDEN, draw_weight, head_inputs

D = 512
NAMES = {
    "layers.0.query": "layers.0.cross_attn.q_proj",
    "layers.0.key": "layers.0.cross_attn.k_proj",
    "layers.0.value": "layers.0.cross_attn.v_proj",
    "layers.0.out": "layers.0.cross_attn.out_proj",
    "layers.0.residual": "layers.0.linear1",
    "layers.0.norm1": "layers.0.layer_norm1",
    "layers.0.norm2": "layers.0.layer_norm2",
    "layers.0.norm3": "layers.0.layer_norm3",
    "mean": "mean_proj",
}


def released_increment(seed: int) -> tuple[Increment, dict[str, torch.nn.Parameter]]:
    increment = Increment(D, heads=1, dropout=0.0)
    by_released_name = {}
    for name, parameter in increment.named_parameters():
        module, _, kind = name.rpartition(".")
        released = f"{NAMES[module]}.{kind}"
        by_released_name[released] = parameter
        parameter.data.copy_(draw_weight(f"psi.{released}", tuple(parameter.shape), seed))
    return increment, by_released_name


@pytest.mark.parametrize("case_seed", [0, 1])
@pytest.mark.parametrize(
    ("case", "shape", "temperature"),
    [
        ("square", (8, 8, 12), 3.0),
        ("rect", (5, 9, 4), 3.0),
        ("long", (6, 6, 64), 5.0),
    ],
)
def test_head_equals_released_code(
    case: str, shape: tuple[int, int, int], temperature: float, case_seed: int
) -> None:
    """Without this, a score of ours could not be compared with a score of the paper's."""
    golden = np.load(GOLDEN / f"head_{case}_seed{case_seed}.npz")
    increment, parameters = released_increment(case_seed)
    text, frames = head_inputs(*shape, D, case_seed)
    text.requires_grad_()
    frames.requires_grad_()
    video = VideoFeatures(frames, torch.ones(frames.shape[:2], dtype=torch.bool))

    pooled = pool(text, video, temperature)
    delta = increment(video.mean.unsqueeze(0) - text.unsqueeze(1), frames, video.mask)
    scores = torch.cosine_similarity(text.unsqueeze(1) + delta, pooled, dim=-1)

    def close(name: str, value: torch.Tensor, tolerance: float = 2e-5) -> None:
        np.testing.assert_allclose(value.detach().numpy(), golden[name], rtol=0, atol=tolerance, err_msg=name)

    def relative(name: str, value: torch.Tensor, floor: float = 0.0) -> None:
        np.testing.assert_allclose(value.detach().numpy(), golden[name], rtol=1e-3, atol=floor, err_msg=name)

    close("logits", scores)
    close("delta_first", delta[0, 0])
    close("delta_last", delta[-1, -1])
    close("pooled_first", pooled[0, 0])
    relative("delta_norm", delta.norm(dim=-1))
    config = LossConfig()
    terms = {"kl": bottleneck(delta), "norm_variance": radii(delta), "direction_diversity": direction(delta)}
    for name, term in terms.items():
        relative(name, term, 1e-7)
    regularizer = (
        config.bottleneck_weight * terms["kl"]
        + config.radii_weight * terms["norm_variance"]
        + config.direction_weight * terms["direction_diversity"]
    )
    relative("regularizer", regularizer)
    if "loss" not in golden.files:
        return
    rows, columns = info_nce(scores, torch.tensor(100.0))
    relative("nce_t2v", rows)
    relative("nce_v2t", columns)
    loss = (rows + columns) / 2 + regularizer
    relative("loss", loss)
    loss.backward()
    total = torch.stack([p.grad.norm() for p in parameters.values()] + [text.grad.norm()]).norm()
    floor = 1e-6 * float(total)
    np.testing.assert_allclose(text.grad, golden["grad_text"], rtol=1e-3, atol=1e-3 * text.grad.abs().max())
    relative("grad_video_norm", frames.grad.norm(dim=-1), floor)
    for name, parameter in parameters.items():
        relative(f"gradnorm/{name}", parameter.grad.norm(), floor)


def test_score_is_the_head_on_features() -> None:
    """The model's own score must be the composition that the test above compares."""
    torch.manual_seed(0)
    from gare.config import ClipConfig, ModelConfig

    tiny = ClipConfig(
        image_size=16,
        patch_size=8,
        vision_width=32,
        vision_layers=1,
        vision_heads=2,
        text_width=32,
        text_layers=1,
        text_heads=2,
        vocab_size=100,
        max_positions=16,
        embed_dim=32,
    )
    config = ModelConfig(clip=tiny, max_words=8, max_frames=4, temporal_heads=1, temporal_layers=1)
    model = GARE(config).eval()
    from gare.model.features import TextFeatures

    text = TextFeatures(torch.randn(3, 32), None, torch.ones(3, 8, dtype=torch.bool))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    video = VideoFeatures(torch.randn(2, 4, 32), mask)
    assert model.increment is not None
    delta = model.increment(video.mean[None] - text.embedding[:, None], video.frames, mask)
    expected = torch.cosine_similarity(
        text.embedding[:, None] + delta, pool(text.embedding, video, 3.0), dim=-1
    )
    torch.testing.assert_close(model.score(text, video), expected)
