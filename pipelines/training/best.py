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

MEND = "the run's train command makes best/ again from its checkpoint; or evaluate.checkpoint=FOLDER"


def copy_best(checkpoints: Checkpoints, best: str, source: TrainInput) -> Entry:
    """Copies the run's best checkpoint that is as it was written; one that is not is named and left out.

    Args:
        checkpoints: of the run.
        best: where to.
        source: input of the run.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: where none can be used.
        DataError: where the storage does not answer.
        GareError: where there is none.
    """
    faults: list[CheckpointError] = []
    for entry in checkpoints.ranked():
        try:
            source.copy_best(checkpoints.location(entry), best, entry.sha256)
        except CheckpointError as fault:
            logger.warning("a checkpoint is left out: %s", fault)
            faults.append(fault)
            continue
        if faults:
            logger.warning("the best checkpoint that can be used is that of step %d", entry.step)
            for one in checkpoints.ranked():
                if one.name == entry.name:
                    break
                checkpoints.forget(one)
        return entry
    if faults:
        raise faults[0]
    raise GareError("training ended without a checkpoint", where=checkpoints.uri)


def mend_best(checkpoints: Checkpoints, best: str, source: TrainInput, result: Mapping[str, Any]) -> None:
    """Makes ``best`` of a finished run again where a file of it is not as it was written.

    Args:
        checkpoints: of the run.
        best: the copy; a folder that is missing stays so.
        source: input of the run.
        result: of the run, which names the checkpoint that it was copied from.

    Raises:
        DamagedError: where that checkpoint is missing or damaged as well.
        DataError: where the storage does not answer.
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
        check_checkpoint(location)  # else both would be lost, of which each may lack another bit
        source.copy_best(location, best, entry.sha256)
    except CheckpointError as error:
        raise DamagedError(f"{fault.what}; and {error}", where=fault.where, accepted=accepted) from error
    logger.warning("%s; best/ is made again from %s", fault, location)


@contextmanager
def tells_how_to_mend(is_best: bool) -> Iterator[None]:
    """Has the fault of a damaged ``best`` say what to do.

    Args:
        is_best: True if the checkpoint that is read is the run's best.
    """
    try:
        yield
    except DamagedError as error:
        if not is_best:
            raise
        raise DamagedError(error.what, where=error.where, accepted=MEND) from error
