"""Part of evaluate: features of a split and ranks of its queries, by actors for large splits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.runtime.actors import ActorPool
from cluster.runtime.resources import num_cpus, usable_gpus, wants_gpus
from gare.config import Config
from gare.data.manifest import ManifestRow
from gare.errors import DataError
from pipelines.evaluating.subject import Subject

if TYPE_CHECKING:
    from gare.retrieval.ranking.ranks import Ranks

#: Number of pairs below which actors would take longer to load than to score.
PAIRS_ALONE = 1_000_000
#: Number of encoding tasks up to which the same holds on CPUs: one of clips, a short one of captions.
TASKS_ALONE = 2


def encode(
    config: Config, subject: Subject, rows: Sequence[ManifestRow], train: Sequence[ManifestRow]
) -> dict[str, np.ndarray]:
    """Encodes a split.

    Args:
        config: configuration of the evaluation.
        subject: the model, and the store of the clips.
        rows: rows of the split.
        train: rows of the training split, whose captions make the query bank.

    Returns:
        ``video/…`` of the clips, ``text/…`` of all their captions in the order of the rows, ``bank/…``.

    Raises:
        DataError: for a query bank without captions, or if clips cannot be read.
    """
    bank = _bank(config, train)
    if subject.settings is not None:
        return _encode_stored(config, subject, rows, bank)
    return _encode_frames(config, subject, rows, bank)


def _bank(config: Config, train: Sequence[ManifestRow]) -> list[str]:
    """Returns training captions for query-bank normalisation; an empty list if it is off."""
    if not config.evaluate.qbnorm:
        return []
    captions = [caption for row in train for caption in row.captions]
    if not captions:
        raise DataError(
            "there is no training caption for the query bank",
            where="evaluate.qbnorm",
            accepted="a manifest with a train split, or evaluate.qbnorm=false",
        )
    rng = np.random.default_rng(config.evaluate.seed)
    size = min(config.evaluate.qbnorm_bank, len(captions))
    return [captions[at] for at in sorted(rng.choice(len(captions), size, replace=False))]


def _encode_stored(
    config: Config, subject: Subject, rows: Sequence[ManifestRow], bank: Sequence[str]
) -> dict[str, np.ndarray]:
    """Encodes from stored features, here: the work after the towers is too small to distribute."""
    from gare.data.store.feature_reader import FeatureReader
    from gare.retrieval.ranking.encode import CAPTIONS, Encoder, encode_stored, encoding_tasks, join_encoded

    model = subject.model
    reader = FeatureReader(subject.store, words=model.scorer.needs_words, cache_mb=config.features.cache_mb)
    features = encode_stored(model, reader, [row.video_id for row in rows], batch=CAPTIONS)
    encoder = Encoder(model, subject.store)
    tasks = encoding_tasks([], [], bank)
    return features | join_encoded(
        (name for name, *_ in tasks), (encoder.captions(items) for *_, items in tasks)
    )


def _encode_frames(
    config: Config, subject: Subject, rows: Sequence[ManifestRow], bank: Sequence[str]
) -> dict[str, np.ndarray]:
    from gare.retrieval.ranking.encode import Encoder, encoding_tasks, join_encoded

    load_model, store, device = subject.load, subject.store, device_of(config)

    def load() -> Encoder:
        return Encoder(load_model(), store, device)

    captions = [caption for row in rows for caption in row.captions]
    tasks = encoding_tasks([row.video_id for row in rows], captions, bank)
    names = [name for name, *_ in tasks]
    if device == "cpu" and len(tasks) <= TASKS_ALONE:
        here = Encoder(subject.model, store)
        return join_encoded(names, (getattr(here, method)(items) for _, method, items in tasks))
    with pool_of(config, load) as pool:
        return join_encoded(names, pool.map(task[1:] for task in tasks))


def device_of(config: Config) -> str:
    """Returns the device on which actors compute."""
    return "cuda" if wants_gpus(config.cluster) else "cpu"


def pool_of(config: Config, load: Callable[[], Any]) -> ActorPool:
    """Returns a pool of actors on all free GPUs, else on all CPUs.

    Args:
        config: configuration of the evaluation.
        load: makes the object whose methods the tasks call, by name and arguments.
    """

    def load_methods() -> Callable[..., Any]:
        loaded = load()
        return lambda method, *arguments: getattr(loaded, method)(*arguments)

    gpus = usable_gpus(config.cluster)
    return ActorPool(load_methods, count=gpus or num_cpus(), num_cpus=0 if gpus else 1, num_gpus=min(gpus, 1))


def rank(
    config: Config, subject: Subject, rows: Sequence[ManifestRow], features: dict[str, np.ndarray]
) -> dict[str, Ranks]:
    """Ranks the queries for each variant; actors share the pairs, or for few pairs it is done here.

    Args:
        config: configuration of the evaluation.
        subject: the model.
        rows: rows of the split.
        features: result of ``encode``.

    Raises:
        DataError: for a score that is not finite.
    """
    from gare.retrieval.ranking.worker import RankWorker, rank_by_workers
    from gare.retrieval.results.files import processing_of
    from gare.retrieval.results.queries import owners_of

    owners, processing = owners_of(rows), processing_of(config.evaluate)
    here = RankWorker(subject.model, features, owners, processing)
    if len(owners) * len(rows) <= PAIRS_ALONE:

        def call(tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
            return (getattr(here, method)(*arguments) for method, *arguments in tasks)

        return rank_by_workers(here, call)
    import ray

    held: Any = ray.put(features)
    load_model, device = subject.load, device_of(config)

    def load() -> Any:
        return RankWorker(load_model(), ray.get(held), owners, processing, device)

    with pool_of(config, load) as pool:
        return rank_by_workers(here, pool.map, share_once=ray.put)
