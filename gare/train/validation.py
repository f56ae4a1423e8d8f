"""Retrieval metrics of a split whose clips are spread over the workers.

M clips and N captions on this worker, F frames, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gare.data.images import normalise
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.retrieval.ranking.encode import from_stored
from gare.retrieval.ranking.ranks import rank_split
from gare.train.loss.gather import gather_unequal


@dataclass
class Validation:
    """Validation that collects this worker's encoded clips and captions, then scores those of all workers.

    Attributes:
        model: to encode and score with.
        device: that the model is on.
    """

    model: GARE
    device: torch.device
    _frames: list[Tensor] = field(default_factory=list)
    _masks: list[Tensor] = field(default_factory=list)
    _videos: list[Tensor] = field(default_factory=list)
    _texts: list[Tensor] = field(default_factory=list)
    _words: list[Tensor] = field(default_factory=list)
    _text_masks: list[Tensor] = field(default_factory=list)
    _owners: list[Tensor] = field(default_factory=list)

    @torch.inference_mode()
    def add(self, videos: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Encodes clips with all their captions.

        Args:
            videos: position of each clip in the split.
            tensors: as ``FrameLoader`` loads them.
        """
        self.model.eval()
        frames, mask = tensors["frames"].to(self.device), tensors["frame_mask"].to(self.device)
        encoded = self.model.encode_video(normalise(frames), mask)
        text = self.model.encode_text(
            tensors["token_ids"].to(self.device).long(), tensors["token_mask"].to(self.device)
        )
        self._keep(videos, tensors["caption_counts"].tolist(), text, encoded)

    @torch.inference_mode()
    def add_features(self, videos: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Adds clips with all their captions from stored features.

        Args:
            videos: position of each clip in the split.
            tensors: as ``FeatureReader.read`` returns them.
        """
        self.model.eval()
        text, video = from_stored(self.model, tensors, self.device)
        self._keep(videos, tensors["caption_mask"].sum(dim=1).tolist(), text, video)

    def _keep(
        self, videos: Sequence[int], counts: Sequence[int], text: TextFeatures, video: VideoFeatures
    ) -> None:
        self._frames.append(video.frames)
        self._masks.append(video.mask)
        self._videos.append(torch.tensor(videos))
        self._texts.append(text.embedding)
        self._text_masks.append(text.mask)
        if self.model.scorer.needs_words and text.words is not None:
            self._words.append(text.words)
        self._owners.append(torch.tensor(videos).repeat_interleave(torch.tensor(counts)))

    @torch.inference_mode()
    def metrics(self) -> dict[str, float]:
        """Computes metrics over all workers' clips, the same on each, then clears these. All must call it."""
        self.model.eval()  # a worker without clips has not called add
        width, num_frames = self.model.config.clip.embed_dim, self.model.config.max_frames
        nothing = torch.empty(0, device=self.device)
        frames = _gather(self._frames, nothing.reshape(0, num_frames, width))
        mask = _gather(self._masks, nothing.reshape(0, num_frames).bool())
        videos = _gather(self._videos, nothing.long())
        num_words = self.model.config.max_words
        text = TextFeatures(
            _gather(self._texts, nothing.reshape(0, width)),
            _gather(self._words, nothing.reshape(0, num_words, width))
            if self.model.scorer.needs_words
            else None,
            _gather(self._text_masks, nothing.reshape(0, num_words).bool()),
        )
        owners = _gather(self._owners, nothing.long())
        for held in vars(self).values():
            if isinstance(held, list):
                held.clear()
        if not len(videos):
            return {}
        column_of = torch.empty(int(videos.max()) + 1, dtype=torch.int64)
        column_of[videos.cpu()] = torch.arange(len(videos))
        video = VideoFeatures(frames, mask)
        return rank_split(self.model, text, video, column_of[owners.cpu()]).metrics()


def _gather(parts: list[Tensor], nothing: Tensor) -> Tensor:
    local = torch.cat([part.to(nothing.device) for part in parts]) if parts else nothing
    return gather_unequal(local)
