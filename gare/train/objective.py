"""The training objective: encode a worker's share of the batch, gather, score all pairs, add up the terms.

b pairs on this worker, N = R·b pairs over all R workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gare.config import LossConfig
from gare.data.batch import Batch
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.train.gather import gather
from gare.train.losses import bottleneck, direction, info_nce, orthogonality, radii


@dataclass(frozen=True)
class LossTerms:
    """The loss of the global batch and its parts, scalars; the regularisers are unweighted.

    Attributes:
        total: L = ½(nce_t2v + nce_v2t) + β·bottleneck + λ_ε·radii + λ_dir·direction.
        nce_t2v: InfoNCE over rows.
        nce_v2t: InfoNCE over columns.
        bottleneck: L_IB, zero for the baseline.
        radii: L_ε, zero for the baseline.
        direction: L_dir, zero for the baseline.
        scale: κ.
    """

    total: Tensor
    nce_t2v: Tensor
    nce_v2t: Tensor
    bottleneck: Tensor
    radii: Tensor
    direction: Tensor
    scale: Tensor

    def named(self) -> dict[str, Tensor]:
        """The terms by the names they are logged under, detached."""
        return {f"loss/{name}": value.detach() for name, value in vars(self).items() if name != "scale"} | {
            "train/scale": self.scale.detach()
        }


def loss_terms(model: GARE, text: TextFeatures, video: VideoFeatures, config: LossConfig) -> LossTerms:
    """All terms over a batch in which text i belongs to video i."""
    pairs = model.pairs(text, video)
    scale = model.logit_scale.exp()
    nce_t2v, nce_v2t = info_nce(pairs.scores, scale)
    total = (nce_t2v + nce_v2t) / 2
    zero = torch.zeros_like(total)
    if pairs.delta is None:
        return LossTerms(total, nce_t2v, nce_v2t, zero, zero, zero, scale)
    terms = (
        bottleneck(
            pairs.delta,
            config.prior_std,
            config.kl_reduction,
            normalised=config.kl_normalised,
            anchor=config.bottleneck_anchor,
        ),
        radii(pairs.delta, config.radii_bound, config.radii_bound_form),
        orthogonality(pairs.delta)
        if config.direction_form == "orthogonality"
        else direction(pairs.delta, config.direction_alpha),
    )
    weights = (config.bottleneck_weight, config.radii_weight, config.direction_weight)
    for weight, term in zip(weights, terms, strict=True):
        # A term that is off must not turn its 0 · inf into nan.
        total = total + weight * term if weight else total
    return LossTerms(total, nce_t2v, nce_v2t, *terms, scale)


class Objective(nn.Module):
    """The model and its loss as one module, so that DDP wraps the whole of it.

    Every worker computes the loss of the whole batch from gathered features. The gather's backward sums the
    workers' gradients and DDP averages them, which is the gradient of one worker with the whole batch.
    In bf16 the encoders run under autocast; features are float32 from there on, so scores and losses are.
    """

    def __init__(
        self, model: GARE, config: LossConfig, precision: Literal["float32", "bf16"] = "float32"
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.precision = precision

    def forward(self, batch: Batch) -> LossTerms:
        """Loss of the global batch; ``batch`` is this worker's share of it."""
        with torch.autocast(batch.frames.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            text = self.model.encode_text(batch.token_ids, batch.token_mask)
            video = self.model.encode_video(batch.frames, batch.frame_mask)
        if self.precision == "bf16":
            text, video = text.float(), video.float()
        # Words are large; they travel only where ψ attends to them.
        words = gather(text.words) if text.words is not None and self.model.needs_words else None
        text = TextFeatures(gather(text.embedding), words, gather(text.mask))
        video = VideoFeatures(gather(video.frames), gather(video.mask))
        return loss_terms(self.model, text, video, self.config)
