"""What a run that learns from stored features does otherwise than one that learns from frames.

Its workers hold no towers: the driver leaves them the initial model without, and gives the best checkpoint
its towers in the end, so that whoever loads it can encode new captions and videos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gare.config import Config
from gare.data.feature_store import feature_settings
from gare.data.features import FeatureReader
from gare.train.input.loader import ClipLoader, FeatureLoader
from gare.train.input.plan import Plan


def settings_of(config: Config) -> dict[str, Any] | None:
    """What the run's feature store must have been made with; None for a run that learns from frames.

    Raises:
        CheckpointError: for weights that cannot be used.
        ConfigError: where ``model.clip`` has other sizes than they.
    """
    if config.train.input == "frames":
        return None
    from gare.model.clip import towers_sha256
    from gare.train.start import initial_model

    return feature_settings(config, towers_sha256(initial_model(config).towers))


def write_start(config: Config, uri: str) -> None:
    """Writes the initial model without its towers, for ``read_start``."""
    from gare.train.start import initial_model
    from gare.train.state import write_model

    model = initial_model(config)
    model.drop_towers()
    write_model(uri, model)


def attach_towers(config: Config, checkpoint: str) -> None:
    """Adds the run's towers to a checkpoint, which is then like that of a run on frames.

    Raises:
        CheckpointError: for a checkpoint of another model.
    """
    from gare.train.start import initial_model
    from gare.train.state import complete_checkpoint

    complete_checkpoint(checkpoint, initial_model(config))


def loader_of(
    config: Config, store: str, ids: Sequence[Sequence[str]], plan: Plan, *, words: bool
) -> Callable[[], ClipLoader | FeatureLoader]:
    """What makes the loader of a worker's batches, of either kind of store.

    Args:
        config: of the run.
        store: that it learns from.
        ids: video ids of each batch of the plan.
        plan: of the worker.
        words: whether the model needs word features.
    """
    if config.train.input == "frames":
        return lambda: ClipLoader(store, ids)
    captions = [batch.captions.tolist() for batch in plan.batches]
    cache_mb = config.features.cache_mb
    return lambda: FeatureLoader(FeatureReader(store, words=words, cache_mb=cache_mb), ids, captions)
