"""CLIP's towers in the released training's mixture of half and single precision.

B images or texts, P patches, W words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gare.model.encoders.clip import ClipTowers


def convert_to_released_fp16(towers: ClipTowers) -> None:
    """Turns linear layers, attention, convolution and both projections into float16, in place.

    LayerNorms, embeddings and the logit scale keep float32. Activations are float16: a LayerNorm computes in
    float32 and rounds its output, embeddings are rounded before they are added. Features leave the
    projections as float32. Names of parameters stay.

    Source: OpenAI's ``convert_weights``, as the released code applies it.
    """
    clip = towers.clip
    for module in list(clip.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.half()
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, _RoundedLayerNorm(child))
    clip.vision_model.embeddings = _RoundedImageEmbeddings(clip.vision_model.embeddings)
    clip.text_model.embeddings = _RoundedTextEmbeddings(clip.text_model.embeddings)
    clip.visual_projection = _WideningProjection(clip.visual_projection)
    clip.text_projection = _WideningProjection(clip.text_projection)


class _RoundedLayerNorm(nn.LayerNorm):
    """LayerNorm in float32 with float16 input and output."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps)
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, width) float16 → the same."""
        return super().forward(hidden.float()).to(hidden.dtype)


class _RoundedImageEmbeddings(nn.Module):
    """Patches, class token and positions of the image tower, rounded to float16 before they are added."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.class_embedding = embeddings.class_embedding
        self.patch_embedding = embeddings.patch_embedding
        self.position_embedding = embeddings.position_embedding

    def forward(self, pixel_values: Tensor, **unused: object) -> Tensor:
        """Images (B, 3, H, W) → (B, 1 + P, width) float16."""
        del unused
        patches_BPD: Tensor = self.patch_embedding(pixel_values.half()).flatten(2).transpose(1, 2)
        class_B1D: Tensor = self.class_embedding.half().expand(len(patches_BPD), 1, -1)
        positions_XD: Tensor = self.position_embedding.weight.half()
        return torch.cat([class_B1D, patches_BPD], dim=1) + positions_XD


class _RoundedTextEmbeddings(nn.Module):
    """Tokens and positions of the text tower, each rounded to float16 before they are added."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.token_embedding = embeddings.token_embedding
        self.position_embedding = embeddings.position_embedding

    def forward(self, input_ids: Tensor, **unused: object) -> Tensor:
        """Tokens (B, W) → (B, W, width) float16."""
        del unused
        positions_WD = self.position_embedding.weight[: input_ids.shape[1]].half()
        hidden_BWD: Tensor = self.token_embedding(input_ids).half() + positions_WD
        return hidden_BWD


class _WideningProjection(nn.Linear):
    """A projection that computes in float16 and returns float32."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__(projection.in_features, projection.out_features, bias=False)
        self.weight = projection.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, width) float16 → (…, D) float32."""
        return super().forward(hidden).float()
