"""Runs the model of the store's writers for a long time, round by round, each from a seed of its own.

``make model MINUTES=60 WHERE=local`` does so. The first fault ends it, with the shortest history that has it
and the command that repeats the round.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import secrets
import time

from tests.writers.machine import STEPS, run_machine
from tests.writers.storage import S3Server, serve

STORAGES = ("local", *S3Server.KINDS)


def main() -> None:
    """Parses the command line and runs the model test."""
    parser = argparse.ArgumentParser(prog="make model", description=__doc__)
    parser.add_argument("--where", choices=["all", "s3", *STORAGES], default="all", help="storages, in turn")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="no round but the first begins after that"
    )
    parser.add_argument("--examples", type=int, default=50, help="histories a round")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="of the first round; then + 1")
    words = parser.parse_args()
    logging.disable(logging.CRITICAL)  # histories provoke errors on purpose
    storages = {"all": STORAGES, "s3": S3Server.KINDS}.get(words.where, (words.where,))
    started, histories = time.monotonic(), 0
    for number, storage in zip(itertools.count(words.seed), itertools.cycle(storages)):
        with contextlib.ExitStack() as stack:
            server = None if storage == "local" else stack.enter_context(serve(storage))
            try:
                run_machine(number, words.examples, server)
            except BaseException:
                again = f"WHERE={storage} SEED={number} EXAMPLES={words.examples} MINUTES=0"
                print(f"to repeat: GARE_MODEL_STEPS={STEPS} make model {again}", flush=True)
                raise
        histories += words.examples
        minutes = (time.monotonic() - started) / 60
        print(f"{minutes:6.1f} min: seed {number}, {storage}: nothing found; {histories} in all", flush=True)
        if minutes > words.minutes:
            break


if __name__ == "__main__":
    main()
