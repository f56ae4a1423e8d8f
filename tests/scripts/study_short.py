"""``make study-short``: two settings × two seeds of the embedded benchmark by one command, checked.

The command is run as a person types it, killed after its first run is done, and run again: that run stays,
the rest follows, and the table and the figure are of all four. Small sizes: the numbers mean nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT = REPOSITORY / "build" / "study-short"
ARGUMENTS = [
    *("pipelines/study.py", "--config", "conf/demo.yaml", "--study", "short", "name=short"),
    *("data.num_train=192", "data.num_val=24", "data.num_test=48", "train.epochs=3", "train.batch_size=32"),
    *("cluster.train_workers=1", "cluster.cpus_per_worker=0.5", "cluster.loaders_per_worker=0"),
]
STUDY = ROOT / "studies" / "short" / "short"


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    started = time.monotonic()
    kill_after_the_first_run()
    [first] = (STUDY / "runs").iterdir()
    before = first.read_bytes()
    result = run()
    check(first.read_bytes() == before, "a run that was done has been repeated")
    check((result["done"], result["missing"]) == (4, []), f"not all is done: {result}")
    [comparison] = result["comparisons"]
    low, high = comparison["interval"]
    check(low <= comparison["difference"] <= high, f"the difference is not in its interval: {comparison}")
    table, figure = Path(result["table"]).read_text(), Path(result["figure"]).read_bytes()
    for words in ("| baseline | 2 |", "| gare | 2 |", "| gare | baseline |", "seeds and other videos"):
        check(words in table, f"the table lacks {words!r}:\n{table}")
    check(figure.startswith(b"\x89PNG") and len(figure) > 10_000, "the figure is no picture")
    again = run()
    check(again["comparisons"] == result["comparisons"], "a study that is done changes when it is run again")
    sys.stderr.write(table + f"study-short: {time.monotonic() - started:.0f} s\n")


def kill_after_the_first_run() -> None:
    """Starts the study and kills all of it by the time that one run is recorded."""
    process = subprocess.Popen([sys.executable, *ARGUMENTS], **options(), start_new_session=True)
    try:
        while process.poll() is None and not list(STUDY.glob("runs/*.json")):
            time.sleep(0.2)
        check(process.poll() is None, "the study ended before it could be killed")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run() -> dict[str, Any]:
    """Runs the study to its end; returns its result."""
    done = subprocess.run([sys.executable, *ARGUMENTS], **options(), stdout=subprocess.PIPE, text=True)
    check(done.returncode == 0, f"status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def options() -> dict[str, Any]:
    return {"cwd": REPOSITORY, "env": os.environ | {"GARE_ROOT": str(ROOT)}}


def check(holds: bool, message: str) -> None:
    if not holds:
        sys.exit(f"study-short: {message}")


if __name__ == "__main__":
    main()
