"""The gallery that a served model searches: encoded clips in one safetensors file.

M videos, F frames, D embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from gare.errors import DataError
from gare.model.encoders.tokenizer import tokenize
from gare.model.factorized.prepared import PreparedVideo
from gare.model.features import VideoFeatures
from gare.model.gare import GARE
from gare.storage.files import write_atomically

#: Name of the file, in an evaluation's folder and beside a served model's weights.
FILE = "gallery.safetensors"
_IDS = "video_ids"
#: Clips that are prepared together: each needs some 400 kB meanwhile, and keeps 30 kB.
PREPARED_AT_ONCE = 512


@dataclass(frozen=True)
class Gallery:
    """Encoded clips that captions are ranked against.

    Attributes:
        video_ids: M names.
        features: of the clips.
        parts: consecutive clips to search, encoded or prepared.
    """

    video_ids: tuple[str, ...]
    features: VideoFeatures
    parts: tuple[VideoFeatures | PreparedVideo, ...]

    @torch.inference_mode()
    def prepared(self, model: GARE) -> Gallery:
        """Prepares the gallery: computes, once for all searches with a model, all that needs no captions."""
        if model.scorer.path() == "direct":
            return self
        parts = (model.prepare_video(some, lean=True) for some in self.features.split(PREPARED_AT_ONCE))
        return replace(self, parts=tuple(parts))


def write_gallery(uri: str, video_ids: Sequence[str], frames: np.ndarray, mask: np.ndarray) -> None:
    """Writes a gallery, whole or not at all.

    Args:
        uri: the file.
        video_ids: M names.
        frames: (M, F, D) float32.
        mask: (M, F) bool.
    """
    # The names are JSON bytes in an array, because not every reader of the format returns its metadata.
    ids = np.frombuffer(json.dumps(list(video_ids)).encode(), np.uint8)
    content = {"frames": np.ascontiguousarray(frames), "mask": np.ascontiguousarray(mask), _IDS: ids}
    write_atomically(uri, save(content))


def gallery_of(data: bytes, uri: str) -> Gallery:
    """Reads the gallery from a file's content.

    Args:
        data: the content.
        uri: the file, for messages.

    Raises:
        DataError: if it is not a gallery.
    """
    try:
        content = load(data)
        ids = tuple(str(one) for one in json.loads(content[_IDS].tobytes()))
        features = VideoFeatures(torch.from_numpy(content["frames"]), torch.from_numpy(content["mask"]))
        if features.frames.shape[:2] != features.mask.shape or len(ids) != len(features):
            raise ValueError(f"{len(ids)} names, frames {tuple(features.frames.shape)}")
    except (SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"is no gallery: {error}", where=uri, accepted="one that evaluate wrote") from error
    return Gallery(ids, features, (features,))


@torch.inference_mode()
def search(model: GARE, gallery: Gallery, captions: Sequence[str], top: int) -> list[list[tuple[str, float]]]:
    """Finds the best videos of each caption with their scores, the best first.

    Args:
        model: the trained model.
        gallery: the gallery to search; prepared with this model, or not.
        captions: queries.
        top: largest number of videos for each caption.
    """
    token_ids, token_mask = tokenize(captions, model.config.max_words)
    text = model.encode_text(token_ids, token_mask)
    scores: Tensor = torch.cat([model.score(text, part).float() for part in gallery.parts], dim=1)
    best = scores.topk(min(top, len(gallery.video_ids)), dim=1)
    return [
        [(gallery.video_ids[video], score) for video, score in zip(videos, values, strict=True)]
        for videos, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
