"""Models with a head of any size and features for it, for tests of the factorised form.

N texts, M videos, F frames, W words, D embedding width.
"""

from __future__ import annotations

from typing import Any

import torch

from gare.config import ClipConfig, ModelConfig
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE


def head(width: int, *, spread: float = 0.2, dtype: torch.dtype = torch.float64, **settings: Any) -> GARE:
    """Builds a model with tiny towers; ``spread`` moves its head away from the initial weights."""
    clip = ClipConfig(
        image_size=16,
        patch_size=16,
        vision_width=16,
        vision_layers=1,
        vision_heads=1,
        text_width=16,
        text_layers=1,
        text_heads=1,
        vocab_size=64,
        embed_dim=width,
    )
    config = {"temporal_layers": 0, "max_words": 64, "max_frames": 64, "increment_dropout": 0.0, **settings}
    model = GARE(ModelConfig(clip=clip, **config))
    with torch.no_grad():
        for module in (model.increment, model.radius):
            for parameter in [] if module is None else module.parameters():
                parameter.add_(spread * torch.randn_like(parameter))
    return model.to(dtype).eval()


def features(
    num_texts: int, num_videos: int, num_frames: int, num_words: int, width: int, dtype: torch.dtype
) -> tuple[TextFeatures, VideoFeatures]:
    """Draws random features with padded frames and words."""
    word_mask = torch.arange(num_words) < torch.randint(1, num_words + 1, (num_texts, 1))
    frame_mask = torch.arange(num_frames) < torch.randint(1, num_frames + 1, (num_videos, 1))
    words = torch.randn(num_texts, num_words, width, dtype=dtype) * word_mask.unsqueeze(-1)
    frames = torch.randn(num_videos, num_frames, width, dtype=dtype) * frame_mask.unsqueeze(-1)
    text = TextFeatures(torch.randn(num_texts, width, dtype=dtype), words, word_mask)
    return text, VideoFeatures(frames, frame_mask)


def clip_like(
    num_pairs: int, num_frames: int, num_words: int, width: int, *, least_frames: int = 3
) -> tuple[TextFeatures, VideoFeatures]:
    """Draws features like CLIP's: a modality gap, items near their mean, similar frames in a clip.

    Clips have at least ``least_frames`` frames.
    """
    text_mean, video_mean = 0.35 * torch.randn(width), 0.35 * torch.randn(width)
    text = 0.25 * torch.randn(num_pairs, width) + text_mean
    video = 0.25 * torch.randn(num_pairs, 1, width) + 0.15 * text.unsqueeze(1) + video_mean
    frames = video + 0.08 * torch.randn(num_pairs, num_frames, width)
    words = 0.5 * text.unsqueeze(1) + 0.2 * torch.randn(num_pairs, num_words, width)
    word_mask = torch.arange(num_words) < torch.randint(2, num_words + 1, (num_pairs, 1))
    frame_mask = torch.arange(num_frames) < torch.randint(least_frames, num_frames + 1, (num_pairs, 1))
    return (
        TextFeatures(text, words * word_mask.unsqueeze(-1), word_mask),
        VideoFeatures(frames * frame_mask.unsqueeze(-1), frame_mask),
    )


def held_bytes(value: object) -> int:
    """Returns the bytes of all tensors that an object holds, counting each storage once."""
    storages: dict[int, int] = {}

    def look(some: object) -> None:
        if isinstance(some, torch.Tensor):
            storage = some.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        else:
            for one in vars(some).values() if hasattr(some, "__dict__") else ():
                look(one)

    look(value)
    return sum(storages.values())
