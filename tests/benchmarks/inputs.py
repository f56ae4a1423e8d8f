"""Heads of full width with tiny towers, and features of a batch."""

from __future__ import annotations

from typing import Any

import torch

from gare.config import ClipConfig, ModelConfig
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE

D, F, W = 512, 12, 32


def head(**settings: Any) -> GARE:
    """Builds a model whose head has the size of ViT-B/32's."""
    torch.manual_seed(0)
    clip = ClipConfig(
        image_size=32,
        patch_size=32,
        vision_width=64,
        vision_layers=1,
        vision_heads=1,
        text_width=64,
        text_layers=1,
        text_heads=1,
        vocab_size=64,
        embed_dim=D,
    )
    return GARE(ModelConfig(clip=clip, temporal_layers=0, max_words=64, max_frames=64, **settings))


def features(
    num_texts: int, num_videos: int, *, num_frames: int = F, num_words: int = 0
) -> tuple[TextFeatures, VideoFeatures]:
    """Draws features without padding; words only if asked for."""
    words = torch.randn(num_texts, num_words, D) if num_words else None
    text_mask = torch.ones(num_texts, max(num_words, 1), dtype=torch.bool)
    text = TextFeatures(torch.randn(num_texts, D), words, text_mask)
    frames = torch.randn(num_videos, num_frames, D)
    return text, VideoFeatures(frames, torch.ones(num_videos, num_frames, dtype=torch.bool))
