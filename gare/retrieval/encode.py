"""Encoding captions and clips with a trained model, in whatever process has the time.

N captions, M clips, F frames, W words, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from gare.data.frames import FrameReader
from gare.data.images import normalise
from gare.model.gare import GARE
from gare.model.tokenizer import tokenize


class Encoder:
    """A model's towers.

    Args:
        model: the trained model.
        store: frame store that holds the clips.
        device: where to compute.
    """

    def __init__(self, model: GARE, store: str, device: str = "cpu") -> None:
        self.model = model.to(device).eval()
        self.device = device
        self.store = store

    @cached_property
    def reader(self) -> FrameReader:
        """Opened by the first clip; captions do not need it."""
        return FrameReader(self.store)

    @torch.inference_mode()
    def clips(self, video_ids: Sequence[str]) -> dict[str, np.ndarray]:
        """``frames`` (M, F, D) float32 frame features and ``mask`` (M, F) bool."""
        frames, mask = self.reader.read(video_ids)
        encoded = self.model.encode_video(
            normalise(torch.from_numpy(frames).to(self.device)), torch.from_numpy(mask).to(self.device)
        )
        return {"frames": encoded.frames.cpu().numpy(), "mask": mask}

    @torch.inference_mode()
    def captions(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """``embedding`` (N, D) float32, ``mask`` (N, W) bool, ``words`` (N, W, D) where scores need them."""
        token_ids, token_mask = tokenize(captions, self.model.config.max_words)
        encoded = self.model.encode_text(token_ids.to(self.device), token_mask.to(self.device))
        features = {"embedding": encoded.embedding.cpu().numpy(), "mask": encoded.mask.cpu().numpy()}
        if self.model.needs_words and encoded.words is not None:
            features["words"] = encoded.words.cpu().numpy()
        return features
