"""All figures of an evaluation, from its ranks and features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from gare.data.manifest import ManifestRow
from gare.data.store.frame_reader import FrameReader, GreyPictures
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from gare.report.examples import choose_examples
from gare.report.figures import SHOWN, rank_histogram, similarity_matrix
from gare.report.pictures import retrieval_picture
from gare.retrieval.ranking.ranks import Ranks
from gare.retrieval.ranking.scoring import score_split
from gare.retrieval.results.queries import owners_of


def figures_of(
    model: GARE,
    features: Mapping[str, np.ndarray],
    rows: Sequence[ManifestRow],
    ranks: Ranks,
    reader: FrameReader | GreyPictures,
    *,
    count: int,
    title: str,
) -> dict[str, bytes]:
    """Draws PNGs by name: ``ranks``, ``similarity``, and ``best-and-worst``, the queries so ranked.

    Args:
        model: the trained model, which is moved to the CPU.
        features: as in ``worker.Features``.
        rows: the gallery.
        ranks: of its captions and videos.
        reader: for thumbnails.
        count: queries with thumbnails.
        title: start of the headings.
    """
    owners = owners_of(rows)
    by_direction = {"t2v": ranks.t2v.rank.numpy()}
    if ranks.v2t is not None:
        by_direction["v2t"] = ranks.v2t.rank.numpy()
    texts = [caption for row in rows for caption in row.captions]
    examples = choose_examples(ranks.t2v, owners, texts, rows, reader, count, "best and worst")
    return {
        "ranks": rank_histogram(by_direction, f"{title}: ranks"),
        "similarity": similarity_matrix(
            _sample(model, features, owners, len(rows)), len(rows), f"{title}: scores"
        ),
        "best-and-worst": retrieval_picture(examples, f"{title}: best and worst"),
    }


def _sample(
    model: GARE, features: Mapping[str, np.ndarray], owners: torch.Tensor, num_videos: int
) -> np.ndarray:
    """Computes the scores (S, S) of some videos with the first caption of each."""
    chosen = np.unique(np.linspace(0, num_videos - 1, min(SHOWN, num_videos)).astype(int))
    first = np.searchsorted(owners.numpy(), chosen)
    words = features.get("text/words")
    text = TextFeatures(
        torch.from_numpy(features["text/embedding"][first]),
        None if words is None else torch.from_numpy(words[first]),
        torch.from_numpy(features["text/mask"][first]),
    )
    video = VideoFeatures(
        torch.from_numpy(features["video/frames"][chosen]), torch.from_numpy(features["video/mask"][chosen])
    )
    return score_split(model.cpu().eval(), text, video).numpy()
