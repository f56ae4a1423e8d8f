"""Callbacks, the one way to follow a training run or to add to it."""

from __future__ import annotations


class Callback:
    """Follower of the training loop of one worker; does nothing unless a subclass says otherwise.

    The loop calls its callbacks in the order of their list at each step and epoch, and in the reverse order
    at the end: the last to see a step is the first to finish. They share ``values`` and ``metrics``, so that
    a callback may add some for those after it. Methods that communicate must be called by all workers in the
    same order.
    """

    def on_step(self, step: int, values: dict[str, float]) -> None:
        """Follows an optimiser step.

        Args:
            step: steps done.
            values: of the step by metric name, such as ``loss/total`` and ``time/step_s``.
        """

    def on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Follows an epoch and its validation.

        Args:
            epoch: epochs done.
            metrics: on val, such as ``val/t2v/R1``; empty without val.
        """

    def on_finish(self) -> None:
        """Ends the work after the last step of the run; not called if an error ends the run."""
