"""Precision of a training run, resolved by its driver before the run begins."""

from __future__ import annotations

import logging
from typing import Any

from gare.config import Config
from gare.errors import ConfigError
from gare.storage.run_folder import RunFolder

logger = logging.getLogger(__name__)

#: Released learning rate of the towers, meant for weights and moments in fp16.
RELEASED_CLIP_LR = 1e-7


def with_saved_precision(config: Config, folder: RunFolder) -> Config:
    """Replaces auto by the precision that the run in a folder began with."""
    saved = folder.read_record().get("settings", {}).get("train", {}).get("precision")
    return _changed(config, precision=saved) if saved and config.train.precision == "auto" else config


def with_precision(config: Config, *, have_bf16: bool | None) -> Config:
    """Replaces auto by the precision that suits the devices of a new run.

    Args:
        config: configuration of the run, with its cluster resolved.
        have_bf16: True if all its GPUs compute bf16 in hardware; None if unknown.

    Raises:
        ConfigError: for a precision that the devices lack, or for auto if it is unknown what they have.
    """
    from gare.train.optim.precision import resolve_precision

    asked, on_gpus = config.train.precision, bool(config.cluster.use_gpu)
    if on_gpus and have_bf16 is None:
        if asked == "auto":
            # It would be chosen for the whole run by chance.
            raise ConfigError(
                "is auto, and the GPUs could not be checked",
                where="train.precision",
                accepted="bf16 for GPUs that have it in hardware, float32 for others",
            )
        return config  # each worker checks its own device
    precision = resolve_precision(asked, on_gpus=on_gpus, have_bf16=bool(have_bf16))
    if asked == "auto":
        logger.info("train.precision auto: %s", precision)
    elif asked != "float32" and not on_gpus:
        logger.warning("train.precision %s on CPUs is slow: they compute it by way of float32", asked)
    return _changed(config, precision=precision)


def warn_of_towers_that_stay(config: Config, num_steps: int) -> None:
    """Warns if the towers' learning rate is too small, or with fp16_released too large, for the precision.

    Args:
        config: configuration of the run, with its precision resolved.
        num_steps: number of steps of the run.
    """
    from gare.train.optim.optimizer import EPS, reach_of_towers

    train = config.train
    if not train.towers_learn:
        return
    if train.precision == "fp16_released":
        if train.clip_lr > 5 * RELEASED_CLIP_LR:
            logger.warning(
                "train.clip_lr %g with train.precision fp16_released: a step there is about %g times the "
                "gradient, not one of Adam; the released rate is 1e-7, and rates from 1e-6 on are meant for "
                "float32 and bf16",
                train.clip_lr,
                train.clip_lr / EPS,
            )
    elif 0 < train.clip_lr <= RELEASED_CLIP_LR:
        logger.warning(
            "train.clip_lr %g with train.precision %s: in the %d steps of this run a weight of the towers, "
            "about 0.02 large, can move by about %.1e, so that they stay almost as they are; take 1e-6 to "
            "1e-5, or train.precision=fp16_released, for which that rate is meant",
            train.clip_lr,
            train.precision,
            num_steps,
            reach_of_towers(train, num_steps),
        )


def _changed(config: Config, **train: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})
