"""Files of an evaluation: metrics with their intervals, and a table of queries for each variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gare.config import EvaluateConfig
from gare.data.manifest import ManifestRow
from gare.retrieval.gallery import FILE as GALLERY
from gare.retrieval.ranking.bootstrap import Interval, metric_intervals
from gare.retrieval.ranking.postprocess import PostProcessing
from gare.retrieval.ranking.ranks import Ranks
from gare.retrieval.results.queries import owners_of, query_table, write_queries
from gare.storage.files import delete_file, join, list_files
from gare.storage.run_folder import RESULT


def processing_of(config: EvaluateConfig) -> PostProcessing:
    """Returns the post-processing that a configuration asks for."""
    return PostProcessing(
        config.dsl_scale if config.dsl else None, config.qbnorm_scale if config.qbnorm else None
    )


def intervals_of(
    ranks: Ranks, video_of_text: Any, prefix: str, *, resamples: int, seed: int
) -> dict[str, Interval]:
    """Computes 95 % intervals of all metrics of a variant, by metric name.

    Args:
        ranks: of the variant.
        video_of_text: (N,) the video of each text.
        prefix: of the metrics' names, empty for the plain ones.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    found: dict[str, Interval] = {}
    for direction, ranking in (("t2v", ranks.t2v), ("v2t", ranks.v2t)):
        if ranking is not None:
            videos = video_of_text if direction == "t2v" else ranking.query
            name = f"{prefix}/{direction}" if prefix else direction
            found |= metric_intervals(
                ranking.rank.numpy(), videos.numpy(), name, resamples=resamples, seed=seed
            )
    return found


def delete_results(folder: str) -> None:
    """Deletes an earlier evaluation's files in the folder, its result first.

    With other settings or another checkpoint, not all files would be written again, and old ones would be
    taken for current. Files of other names stay.

    Raises:
        DataError: if they cannot be deleted.
    """
    # Without a result there is no evaluation: if killed in between, nothing left looks like one.
    delete_file(join(folder, RESULT))
    for location in list_files(folder):
        name = location.rsplit("/", 1)[-1]
        if name == GALLERY or (name.startswith("ranks") and name.endswith(".parquet")):
            delete_file(location)


def write_results(
    folder: str,
    ranks: Mapping[str, Ranks],
    rows: Sequence[ManifestRow],
    about: Mapping[str, Any],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Writes ``ranks.parquet``, and ``ranks-VARIANT.parquet`` for post-processed ones, into the folder.

    Args:
        folder: of the evaluation.
        ranks: by variant, the plain ones under the empty name.
        rows: the gallery, with the captions that were the texts.
        about: facts about the evaluation, kept with the tables.
        config: resamples and seed.

    Returns:
        ``metrics`` by name, ``intervals`` as [low, high] by name, and ``ranks``, the table's location by
        variant with ``plain`` for the empty name.
    """
    delete_results(folder)
    owners = owners_of(rows)
    metrics: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    files: dict[str, str] = {}
    for variant, found in ranks.items():
        metrics |= found.metrics(variant)
        if config.resamples:
            ranges = intervals_of(found, owners, variant, resamples=config.resamples, seed=config.seed)
            intervals |= {name: [interval.low, interval.high] for name, interval in ranges.items()}
        name = variant or "plain"
        files[name] = join(folder, f"ranks-{variant}.parquet" if variant else "ranks.parquet")
        write_queries(query_table(found, rows, {**about, "variant": name}), files[name])
    return {"metrics": metrics, "intervals": intervals, "ranks": files}
