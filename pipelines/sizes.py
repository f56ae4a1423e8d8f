"""Part of every step: resolves ``model.clip: auto`` from the weights that the settings name."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.layout import absolute, layout
from gare.config import Config
from gare.errors import ConfigError
from gare.storage.files import exists
from pipelines.training.best import add_repair_advice


def sizes_of_weights(config: Config) -> Mapping[str, int]:
    """Calls ``gare.train.checkpoint.initial_model.sizes_of_weights``, which loads torch."""
    from gare.train.checkpoint.initial_model import sizes_of_weights

    return sizes_of_weights(config)


def sizes_for_evaluation(config: Config) -> Mapping[str, int] | None:
    """Returns the sizes of ``evaluate.checkpoint``, else of the named weights, else of the run's best.

    None if no model is needed. With ``evaluate.zero_shot`` there is no run, so only the weights count.

    Raises:
        CheckpointError: if the checkpoint or the weights cannot be read.
        ConfigError: if there is none of them.
    """
    chosen = config.evaluate
    if chosen.compare or chosen.suite or chosen.sync:
        return None
    if chosen.zero_shot:
        return sizes_of_weights(config)
    from gare.train.checkpoint.files import read_config

    best = layout(config).checkpoint(config.train.run)
    named = config.features.weights or config.train.clip_weights
    checkpoint = absolute(chosen.checkpoint) or ("" if named or not exists(best) else best)
    if checkpoint:
        with add_repair_advice(checkpoint == best):
            return read_config(checkpoint).model.clip.model_dump()
    try:
        return sizes_of_weights(config)
    except ConfigError as error:
        accepted = f"{error.accepted}, or a run that has ended: there is no {best}"
        raise ConfigError(error.what, where=error.where, accepted=accepted) from error
