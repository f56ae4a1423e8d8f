"""Part of train and evaluate: the copy of a run's best checkpoint in its folder ``best``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gare.errors import CheckpointError, DamagedError, GareError
from gare.train.checkpoint.index import Checkpoints, Entry

if TYPE_CHECKING:
    from gare.train.input.inputs import TrainInput

logger = logging.getLogger(__name__)

REPAIR_ADVICE = "the run's train command makes best/ again from its checkpoint; or evaluate.checkpoint=FOLDER"


def copy_best(checkpoints: Checkpoints, best: str, source: TrainInput) -> Entry:
    """Copies the run's best undamaged checkpoint; logs and skips damaged ones.

    Args:
        checkpoints: checkpoints of the run.
        best: destination.
        source: input of the run.

    Returns:
        The entry of the copied checkpoint.

    Raises:
        CheckpointError: if none can be used.
        DataError: if the storage does not answer.
        GareError: if there is none.
    """
    faults: list[CheckpointError] = []
    for entry in checkpoints.ranked():
        try:
            source.copy_best(checkpoints.location(entry), best, entry.sha256)
        except CheckpointError as fault:
            logger.warning("skipping a damaged checkpoint: %s", fault)
            faults.append(fault)
            continue
        if faults:
            logger.warning("using the best undamaged checkpoint, that of step %d", entry.step)
            for one in checkpoints.ranked():
                if one.name == entry.name:
                    break
                checkpoints.remove_from_index(one)
        return entry
    if faults:
        raise faults[0]
    raise GareError("training ended without a checkpoint", where=checkpoints.uri)


def mend_best(checkpoints: Checkpoints, best: str, source: TrainInput, result: Mapping[str, Any]) -> None:
    """Copies ``best`` of a finished run again if one of its files is damaged.

    Args:
        checkpoints: checkpoints of the run.
        best: the copy; a missing folder stays missing.
        source: input of the run.
        result: result of the run, which names the checkpoint that was copied.

    Raises:
        DamagedError: if that checkpoint is missing or damaged as well.
        DataError: if the storage does not answer.
    """
    from gare.train.checkpoint.files import check_checkpoint

    try:
        check_checkpoint(best)
    except DamagedError as error:
        fault = error
    else:
        return
    accepted = "train.overwrite=true, which trains the run again"
    entry = checkpoints.best()
    if entry is None or entry.epoch != result["best_epoch"]:
        raise DamagedError(
            f"{fault.what}; the checkpoint that it was copied from is not kept",
            where=fault.where,
            accepted=accepted,
        )
    location = checkpoints.location(entry)
    try:
        check_checkpoint(location)  # else both copies would be lost, although their damage may differ
        source.copy_best(location, best, entry.sha256)
    except CheckpointError as error:
        raise DamagedError(f"{fault.what}; and {error}", where=fault.where, accepted=accepted) from error
    logger.warning("%s; copying best/ again from %s", fault, location)


@contextmanager
def add_repair_advice(is_best: bool) -> Iterator[None]:
    """Adds advice to the error of a damaged ``best``.

    Args:
        is_best: True if the checkpoint being read is the run's best.
    """
    try:
        yield
    except DamagedError as error:
        if not is_best:
            raise
        raise DamagedError(error.what, where=error.where, accepted=REPAIR_ADVICE) from error
