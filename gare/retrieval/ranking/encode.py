"""Encoding of captions and clips with a trained model, in any process.

N captions, M clips, F frames, W words, D embedding width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch

from gare.data.images import normalise
from gare.data.store.feature_reader import FeatureReader
from gare.data.store.frame_reader import FrameReader
from gare.model.encoders.tokenizer import tokenize
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE

#: Clips and captions that are encoded at once.
CLIPS, CAPTIONS = 32, 512


class Encoder:
    """Encoder of clips and captions with a model's towers.

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
        """The store's reader, opened by the first clip; captions do not need it."""
        return FrameReader(self.store)

    @torch.inference_mode()
    def clips(self, video_ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Encodes clips: ``frames`` (M, F, D) float32 frame features and ``mask`` (M, F) bool."""
        frames, mask = self.reader.read(video_ids)
        encoded = self.model.encode_video(
            normalise(torch.from_numpy(frames).to(self.device)), torch.from_numpy(mask).to(self.device)
        )
        return {"frames": encoded.frames.cpu().numpy(), "mask": mask}

    @torch.inference_mode()
    def captions(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Encodes: ``embedding`` (N, D) float32, ``mask`` (N, W) bool, ``words`` (N, W, D) if needed."""
        token_ids, token_mask = tokenize(captions, self.model.config.max_words)
        encoded = self.model.encode_text(token_ids.to(self.device), token_mask.to(self.device))
        features = {"embedding": encoded.embedding.cpu().numpy(), "mask": encoded.mask.cpu().numpy()}
        if self.model.scorer.needs_words and encoded.words is not None:
            features["words"] = encoded.words.cpu().numpy()
        return features


def encoding_tasks(
    video_ids: Sequence[str], captions: Sequence[str], bank: Sequence[str] = ()
) -> list[tuple[str, str, Sequence[str]]]:
    """Lists the calls of an ``Encoder`` that encode a split: (name of the input, method, argument).

    Args:
        video_ids: the clips, ``video``.
        captions: all of them, ``text``.
        bank: captions of a query bank, ``bank``.
    """
    return [
        (name, method, items[first : first + size])
        for name, method, items, size in (
            ("video", "clips", video_ids, CLIPS),
            ("text", "captions", captions, CAPTIONS),
            ("bank", "captions", bank, CAPTIONS),
        )
        for first in range(0, len(items), size)
    ]


def join_encoded(names: Iterable[str], results: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins the results of ``encoding_tasks`` to arrays ``video/frames``, ``text/embedding`` and so on.

    Args:
        names: name of each result's input.
        results: in the order of the tasks.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for name, result in zip(names, results, strict=True):
        for kind, array in result.items():
            parts.setdefault(f"{name}/{kind}", []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def text_of(arrays: Mapping[str, np.ndarray], name: str = "text", device: str = "cpu") -> TextFeatures:
    """Returns text features from arrays of ``join_encoded``; name ``bank`` gives those of a query bank."""
    words = arrays.get(f"{name}/words")
    return TextFeatures(
        _tensor(arrays[f"{name}/embedding"], device),
        None if words is None else _tensor(words, device),
        _tensor(arrays[f"{name}/mask"], device),
    )


def video_of(arrays: Mapping[str, np.ndarray], device: str = "cpu") -> VideoFeatures:
    """Returns video features from the arrays of ``join_encoded``."""
    return VideoFeatures(_tensor(arrays["video/frames"], device), _tensor(arrays["video/mask"], device))


def _tensor(array: np.ndarray, device: str) -> torch.Tensor:
    # Arrays that processes share are read-only, which PyTorch does not support; nothing writes to them here.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array).to(device)


def from_stored(
    model: GARE, arrays: Mapping[str, np.ndarray] | Mapping[str, torch.Tensor], device: str | torch.device
) -> tuple[TextFeatures, VideoFeatures]:
    """Encodes stored features of clips, and of all their captions in order.

    Args:
        model: a model whose towers made the features, or one without towers.
        arrays: from ``FeatureReader.read``, or the same as tensors.
        device: where to compute.
    """
    held = {name: torch.as_tensor(array).to(device) for name, array in arrays.items()}
    real = held["caption_mask"]
    words = held["words"][real].float() if "words" in held else None
    text = TextFeatures(held["text"][real].float(), words, held["token_mask"][real])
    frames, mask = held["frames"].float(), held["frame_mask"]
    return model.text_from_towers(text), model.video_from_towers(frames, mask)


@torch.inference_mode()
def encode_stored(
    model: GARE, reader: FeatureReader, video_ids: Sequence[str], *, batch: int, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Encodes clips and all their captions from a feature store, like ``Encoder`` from frames.

    Args:
        model: the trained model.
        reader: of the store.
        video_ids: M clips.
        batch: clips at a time.
        device: where to compute.

    Returns:
        ``video/frames``, ``video/mask``, ``text/embedding``, ``text/mask`` and, where scores need them,
        ``text/words``.
    """
    model = model.to(device).eval()
    parts: dict[str, list[np.ndarray]] = {}
    for first in range(0, len(video_ids), batch):
        text, video = from_stored(model, reader.read(video_ids[first : first + batch]), device)
        found = {"video/frames": video.frames, "video/mask": video.mask}
        found |= {"text/embedding": text.embedding, "text/mask": text.mask}
        if model.scorer.needs_words and text.words is not None:
            found["text/words"] = text.words
        for name, tensor in found.items():
            parts.setdefault(name, []).append(tensor.cpu().numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
