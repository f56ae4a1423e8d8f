"""The model that a run starts from, and the towers that make features."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from gare.config import Config, ModelConfig
from gare.errors import CheckpointError, ConfigError
from gare.model.encoders.clip import ClipTowers
from gare.model.gare import GARE
from gare.model.importing.weights import import_clip, published_sizes
from gare.storage.files import exists, join
from gare.train.checkpoint.files import CONFIG, load_checkpoint, load_model, new_model, read_config

logger = logging.getLogger(__name__)


def initial_model(config: Config) -> GARE:
    """Builds a new model with the run's seed, with the weights that ``train`` names to start from.

    A run that learns from features starts with the towers that made them; imported ones have none.

    Raises:
        CheckpointError: for weights that cannot be used.
        ConfigError: where ``model.clip`` has other sizes than they, or ``train.start_from`` another part.
    """
    model = _new_model(config)
    if config.train.start_from:
        made_features = config.has_towers and config.train.input == "features"
        _take_weights(model, config.train.start_from, towers=not made_features)
    if config.train.increment_start == "zero" and model.increment is not None:
        model.increment.start_at_zero()
    return model


def _new_model(config: Config) -> GARE:
    if not config.has_towers:
        torch.manual_seed(config.train.seed)
        return new_model(config)
    if config.train.input == "features":
        return feature_model(config)
    return _start(config, config.train.clip_weights)


def _take_weights(model: GARE, uri: str, *, towers: bool) -> None:
    """Copies the parts that a checkpoint shares with a model: towers, temporal transformer, adapters, ψ.

    Args:
        model: to copy into.
        uri: checkpoint folder.
        towers: whether to take the towers too; the logit scale is taken in any case.

    Raises:
        CheckpointError: for a checkpoint that cannot be read.
        ConfigError: if a part has other sizes, or none is shared.
    """
    source = load_checkpoint(uri)
    taken, new = [], []
    for name, part in model.named_children():
        if name == "towers" and not (towers and isinstance(part, ClipTowers)):
            continue
        given = getattr(source, name)
        if given is None or (name == "towers" and not isinstance(given, ClipTowers)):
            new.append(name)
            continue
        mine, theirs = part.state_dict(), given.state_dict()
        if {key: one.shape for key, one in mine.items()} != {key: one.shape for key, one in theirs.items()}:
            raise ConfigError(
                f"{name} has other sizes than that of train.start_from",
                where=uri,
                accepted="the model settings of that run",
            )
        part.load_state_dict(theirs)
        taken.append(name)
    if not taken:
        raise ConfigError(
            "shares no part with this model",
            where=uri,
            accepted="a checkpoint with towers, a temporal transformer, adapters or an increment",
        )
    with torch.no_grad():
        model.logit_scale.copy_(source.logit_scale)
    logger.info("start from %s: %s%s", uri, ", ".join(taken), f"; new: {', '.join(new)}" if new else "")


def feature_model(config: Config) -> GARE:
    """Builds a new model with the towers of ``features.weights``, by default of ``train.clip_weights``.

    Raises:
        CheckpointError: for weights that cannot be used.
        ConfigError: where ``model.clip`` has other sizes than they.
    """
    weights = config.features.weights or config.train.clip_weights
    if not weights:
        logger.warning(
            "features of random towers, of train.seed %d: set features.weights or train.clip_weights",
            config.train.seed,
        )
    return _start(config, weights)


def sizes_of_weights(config: Config) -> dict[str, int]:
    """Reads ``model.clip`` from ``features.weights``, or else from ``train.clip_weights``.

    Raises:
        CheckpointError: for weights that cannot be read.
        ConfigError: if neither is set.
    """
    weights = config.features.weights or config.train.clip_weights
    if not weights:
        raise ConfigError(
            "auto takes the sizes of the weights, and none are named",
            where="model.clip",
            accepted="train.clip_weights=FILE, or features.weights=FILE",
        )
    if _is_checkpoint(weights):
        return read_config(weights).model.clip.model_dump()
    return published_sizes(weights)


def _is_checkpoint(weights: str) -> bool:
    return exists(weights) and exists(join(weights, CONFIG))


def zero_shot_model(config: Config) -> GARE:
    """Builds the towers of ``features.weights``, by default of ``train.clip_weights``, for zero-shot scores.

    Raises:
        CheckpointError: for weights that cannot be used.
        ConfigError: if no weights are named, or if ``model.clip`` has other sizes than the weights.
    """
    if not (config.features.weights or config.train.clip_weights):
        raise ConfigError(
            "no weights are named, and random towers have no zero-shot score",
            where="evaluate.zero_shot",
            accepted="features.weights or train.clip_weights",
        )
    return feature_model(config.model_copy(update={"model": config.model.zero_shot()})).eval()


def fault_of_zero_shot(weights: str) -> str:
    """Returns why the towers' score is not that of published weights; empty if it is.

    Args:
        weights: a file or folder of CLIP, or a checkpoint folder; its training may have changed the towers or
            started from another checkpoint.

    Raises:
        CheckpointError: for a checkpoint that cannot be read.
    """
    seen = set()
    while weights not in seen and _is_checkpoint(weights):
        seen.add(weights)
        trained = read_config(weights)
        train, name = trained.train, f"the training {trained.name}/{trained.train.run}"
        if train.towers_learn:
            return f"{name} changed them"
        weights = train.start_from or train.clip_weights
        if train.input == "features":
            weights = trained.features.weights or weights
        if not weights:
            return f"{name} left them random"
    return ""


def read_initial_model(uri: str, config: ModelConfig, *, sums: Mapping[str, str] | None = None) -> GARE:
    """Reads the initial model of a run that learns from features, without towers, written by its driver.

    Raises:
        CheckpointError: if it is missing or of another model.
        DamagedError: if a file was changed; in a checkpoint of such a run, also compared with ``sums``.
    """
    model = GARE(config, towers=False)
    load_model(uri, model, sums=sums)
    return model.train()


def _start(config: Config, weights: str) -> GARE:
    torch.manual_seed(config.train.seed)
    if not weights:
        return GARE(config.model)
    if _is_checkpoint(weights):
        source = load_checkpoint(weights)
        if not isinstance(source.towers, ClipTowers):
            raise CheckpointError(
                "was learned from imported features and has no towers",
                where=weights,
                accepted="CLIP, or a checkpoint of a run on videos",
            )
        _require_sizes(config, source, weights)
        model = GARE(config.model)
        model.towers.load_state_dict(source.towers.state_dict())
        model.start_temporal()
        return model
    settings = config.model.model_dump(exclude={"clip"})
    model = import_clip(weights, **settings)
    _require_sizes(config, model, weights)
    return model.train()


def _require_sizes(config: Config, model: GARE, weights: str) -> None:
    wanted, found = (one.clip.model_dump() for one in (config.model, model.config))
    if wanted != found:
        raise ConfigError(
            "model.clip has other sizes than the weights",
            where=weights,
            accepted=", ".join(
                f"model.clip.{name}={size}" for name, size in found.items() if size != wanted[name]
            ),
        )
