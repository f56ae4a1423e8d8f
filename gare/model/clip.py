"""The CLIP towers: Hugging Face's CLIPModel, built from our configuration.

N texts, M images, W words, D embedding width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gare.config import ClipConfig

#: ln(1/0.07), where CLIP starts its learned logit scale.
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
#: The logit scale is clamped so that κ = exp(logit_scale) stays at most 100.
MAX_LOGIT_SCALE = math.log(100)


class ClipTowers(nn.Module):
    """Image and text tower with their projections and the logit scale."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        self.clip: Any = CLIPModel(
            CLIPConfig(
                text_config={
                    "vocab_size": config.vocab_size,
                    "hidden_size": config.text_width,
                    "intermediate_size": 4 * config.text_width,
                    "num_hidden_layers": config.text_layers,
                    "num_attention_heads": config.text_heads,
                    "max_position_embeddings": config.max_positions,
                    "projection_dim": config.embed_dim,
                    "pad_token_id": None,
                    "bos_token_id": config.vocab_size - 2,
                    "eos_token_id": config.vocab_size - 1,
                },
                vision_config={
                    "hidden_size": config.vision_width,
                    "intermediate_size": 4 * config.vision_width,
                    "num_hidden_layers": config.vision_layers,
                    "num_attention_heads": config.vision_heads,
                    "image_size": config.image_size,
                    "patch_size": config.patch_size,
                    "projection_dim": config.embed_dim,
                },
                projection_dim=config.embed_dim,
                logit_scale_init_value=INITIAL_LOGIT_SCALE,
            )
        )

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the scale κ, a scalar parameter."""
        scale: nn.Parameter = self.clip.logit_scale
        return scale

    def clamp_logit_scale(self) -> None:
        """Holds κ at 100 or below; called after each optimiser step."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    def encode_tokens(self, token_ids: Tensor) -> Tensor:
        """Hidden states (N, W, text width) after the final LayerNorm.

        The tower is causal, so padding after the end marker changes nothing before it.
        """
        hidden: Tensor = self.clip.text_model(input_ids=token_ids).last_hidden_state
        return hidden

    def project_text(self, hidden: Tensor) -> Tensor:
        """Text projection (…, text width) → (…, D)."""
        projected: Tensor = self.clip.text_projection(hidden)
        return projected

    def encode_images(self, images: Tensor) -> Tensor:
        """Class token after the visual projection: (M, 3, H, W) normalised → (M, D)."""
        pooled: Tensor = self.clip.vision_model(pixel_values=images).pooler_output
        projected: Tensor = self.clip.visual_projection(pooled)
        return projected
