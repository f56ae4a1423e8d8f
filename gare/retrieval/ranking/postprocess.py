"""Post-processing of scores by other queries' scores: dual softmax and query-bank normalisation.

Their metrics have names of their own (``dsl/…``, ``qbnorm/…``) and are no substitute for those of the scores
themselves: they use more than the query and the gallery. N texts, M videos, B bank queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gare.errors import DataError
from gare.retrieval.ranking import top
from gare.retrieval.ranking.survey import Survey, SurveyRequest


class Variant(Protocol):
    """A rule that turns a model's scores into the scores to rank by."""

    @property
    def name(self) -> str:
        """Prefix of the metrics' names; empty for the plain scores."""
        ...

    def by_text(self, scores: Tensor, places: Tensor, videos: Tensor) -> Tensor:
        """Returns the scores by which each text ranks videos.

        Args:
            scores: of pairs, any shape.
            places: the pairs' texts as places of the grid, of a shape that broadcasts with the scores'.
            videos: the pairs' videos, likewise.
        """
        ...

    def by_video(self, scores: Tensor, places: Tensor, videos: Tensor) -> Tensor | None:
        """Returns the scores by which each video ranks texts, or None if the rule has none."""
        ...


@dataclass(frozen=True)
class Plain:
    """Rule that ranks by the scores themselves."""

    name: str = ""

    def by_text(self, scores: Tensor, places: Tensor, videos: Tensor) -> Tensor:
        """Returns them unchanged."""
        return scores

    def by_video(self, scores: Tensor, places: Tensor, videos: Tensor) -> Tensor | None:
        """Returns them unchanged."""
        return scores


@dataclass(frozen=True)
class DualSoftmax:
    """Each score times a softmax over the queries of the other direction, with all test queries at hand.

    Text → video: s_ij · softmax_i(κ s_ij), a prior over the N texts that compete for video j. Video → text:
    s_ij · softmax_j(κ s_ij), over the M videos that compete for text i. The factor N or M of some code is
    left out: it changes no rank.

    Attributes:
        scale: κ, the inverse temperature; 100, the scale of CLIP's logits, is usual with cosines.
        text_sums: (N,) log Σ_j exp(κ s_ij).
        video_sums: (M,) log Σ_i exp(κ s_ij).

    Source: Cheng et al., Improving Video-Text Retrieval by Multi-Stream Corpus Alignment and Dual Softmax
    Loss, arXiv 2109.04290, the prior applied at test time.
    """

    scale: float
    text_sums: Tensor
    video_sums: Tensor
    name: str = "dsl"

    def by_text(self, scores: Tensor, places: Tensor, videos: Tensor) -> Tensor:
        """Returns s_ij · softmax over the texts of each video."""
        return self._weighted(scores, self.video_sums.to(scores.device)[videos])

    def by_video(self, scores: Tensor, places: Tensor, videos: Tensor) -> Tensor | None:
        """Returns s_ij · softmax over the videos of each text."""
        return self._weighted(scores, self.text_sums.to(scores.device)[places])

    def _weighted(self, scores: Tensor, sums: Tensor) -> Tensor:
        exact = scores.double()
        # Rounded once, at the end: equal pairs stay equal.
        return (exact * (self.scale * exact - sums).exp()).to(scores.dtype)


@dataclass(frozen=True)
class QueryBank:
    """Query-bank normalisation with the dynamic inverted softmax; text → video only.

    A bank of B captions of the training split is scored against the gallery. Videos that come first for one
    of them are activated: they are hubs. A query whose best video is activated ranks by
    exp(β s_ij) / Σ_b exp(β s_bj), here in logarithms, every other query by its scores as they are. No test
    query sees another. Video → text would need a bank of videos and is left out.

    Attributes:
        scale: β, the inverse temperature; the paper's is 20.
        bank_sums: (M,) log Σ_b exp(β s_bj).
        normalised: (N,) bool, whether the text at each place is such a query.

    Source: Bogolin et al., Cross Modal Retrieval with Querybank Normalisation, CVPR 2022, arXiv 2112.12777,
    dynamic inverted softmax with activation by the first rank (k = 1). Of videos that tie for a query's first
    rank the first one counts.
    """

    scale: float
    bank_sums: Tensor
    normalised: Tensor
    name: str = "qbnorm"

    @classmethod
    def of(cls, scale: float, bank: Survey, texts: Survey) -> QueryBank:
        """Builds it from the surveys of the bank and of the split, both with ``bank_survey_request``."""
        assert bank.best is not None
        assert texts.best is not None
        activated = torch.unique(top.unpack_keys(bank.best)[0])
        return cls(scale, bank.video_sums[scale], torch.isin(top.unpack_keys(texts.best)[0][:, 0], activated))

    def by_text(self, scores: Tensor, places: Tensor, videos: Tensor) -> Tensor:
        """Returns the logarithm of the inverted softmax if the query is normalised, else the score."""
        sums = self.bank_sums.to(scores.device)[videos]
        inverted = (self.scale * scores.double() - sums).to(scores.dtype)
        return torch.where(self.normalised.to(scores.device)[places], inverted, scores)

    def by_video(self, scores: Tensor, places: Tensor, videos: Tensor) -> Tensor | None:
        """Returns None: the rule has no video → text scores."""
        return None


@dataclass(frozen=True)
class PostProcessing:
    """Post-processed metrics to compute besides the plain ones.

    Attributes:
        dsl_scale: κ of dual softmax; None to leave it out.
        qbnorm_scale: β of query-bank normalisation; None to leave it out.
    """

    dsl_scale: float | None = None
    qbnorm_scale: float | None = None

    @property
    def survey_request(self) -> SurveyRequest:
        """The request of the split's survey."""
        scales = () if self.dsl_scale is None else (self.dsl_scale,)
        return SurveyRequest(scales, scales, best=self.qbnorm_scale is not None)

    @property
    def bank_survey_request(self) -> SurveyRequest | None:
        """The request of the bank's survey; None without a bank."""
        return None if self.qbnorm_scale is None else SurveyRequest((), (self.qbnorm_scale,), best=True)

    def variants(self, seen: Survey, bank: Survey | None = None) -> list[Variant]:
        """Builds the rules, the plain one first.

        Raises:
            DataError: for query-bank normalisation without the survey of a bank.
        """
        rules: list[Variant] = [Plain()]
        if self.dsl_scale is not None:
            rules.append(
                DualSoftmax(self.dsl_scale, seen.text_sums[self.dsl_scale], seen.video_sums[self.dsl_scale])
            )
        if self.qbnorm_scale is not None:
            if bank is None:
                raise DataError("query-bank normalisation has no bank", where="evaluation")
            rules.append(QueryBank.of(self.qbnorm_scale, bank, seen))
        return rules
