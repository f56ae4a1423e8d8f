"""The model that a run starts from."""

from __future__ import annotations

import torch

from gare.config import Config
from gare.errors import ConfigError
from gare.model.gare import GARE
from gare.model.weights import import_clip


def initial_model(config: Config) -> GARE:
    """A new model with the run's seed, its towers from ``train.clip_weights`` where that is set.

    Raises:
        CheckpointError: for weights that cannot be used.
        ConfigError: where ``model.clip`` has other sizes than they.
    """
    torch.manual_seed(config.train.seed)
    if not config.train.clip_weights:
        return GARE(config.model)
    settings = config.model.model_dump(exclude={"clip"})
    model = import_clip(config.train.clip_weights, **settings)
    wanted, found = (one.clip.model_dump() for one in (config.model, model.config))
    if wanted != found:
        raise ConfigError(
            "model.clip has other sizes than the weights",
            where=config.train.clip_weights,
            accepted=", ".join(
                f"model.clip.{name}={size}" for name, size in found.items() if size != wanted[name]
            ),
        )
    return model.train()
