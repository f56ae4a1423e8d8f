"""``make fuzz``: hundreds of damaged files through the decoding process, counted by how they end.

A file that crashes the decoder, hangs it or gives an empty picture is named; the exit status is then 1.
Each ends as a clip or as a failure with its reason, which is what extraction writes to ``data`` or
``failures``. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from gare.data.decode_process import DecodeProcess
from tests.fuzz import damaged_files, outcome, table

#: Outcomes that need a look.
BAD = ("DecoderCrashError", "DecodeTimeoutError", "empty picture")


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=None, help="that of an earlier run, to repeat it")
    parser.add_argument("--keep", type=Path, help="folder that keeps the files that need a look")
    options = parser.parse_args()
    seed = secrets.randbits(31) if options.seed is None else options.seed
    shared = Path(os.environ.get("GARE_SHARED") or Path(__file__).resolve().parents[3] / "shared")
    clips = sorted((shared / "data" / "videos").iterdir())
    outcomes: Counter[str] = Counter()
    by_damage: Counter[str] = Counter()
    faults = []
    started, slowest = time.perf_counter(), (0.0, "")
    with tempfile.TemporaryDirectory() as folder, DecodeProcess() as process:
        for what, path in damaged_files(np.random.default_rng(seed), clips, options.count, Path(folder)):
            began = time.perf_counter()
            ended = outcome(process, path)
            slowest = max(slowest, (time.perf_counter() - began, what))
            outcomes[ended] += 1
            by_damage[f"{what.split()[0]}: {'clip' if ended in ('whole', 'damaged') else 'failure'}"] += 1
            if ended.startswith(BAD):
                faults.append(f"{what}: {ended}")
                if options.keep:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    (options.keep / path.name).write_bytes(path.read_bytes())
    seconds = time.perf_counter() - started
    sys.stderr.write(f"{options.count} files, seed {seed}, {seconds:.0f} s; slowest {slowest}\n")
    sys.stderr.write(f"{table(outcomes)}\n\n{table(by_damage)}\n" + "\n".join(faults) + "\n")
    sys.stdout.write(json.dumps({"seed": seed, "outcomes": outcomes, "faults": faults}) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
