"""``make fuzz``: hundreds of files of each kind through the decoding process, counted by how they end.

Most kinds are films made here, so that it is known which picture belongs to which time, see
``tests.films``; ``real`` are real clips with damaged bytes, of which only crashes, hangs and empty pictures
can be told. The table has a row for each kind:

- right: the whole clip, each picture at its time
- said: marked as incomplete or with a note, each picture at its time
- garbled: marked, with pictures that show no number
- mistimed: marked, with pictures of overwritten files under times that are not theirs
- failed: refused with a reason
- unseen: wrong, but neither FFmpeg's log nor the clock tells
- wrong: silently; also crashes and hangs
- needless: said or failed (counted there) although nothing is wrong with the file

Each wrong file is named with what makes it again; the exit status is then 1. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gare.data.decode.process import DecodeProcess
from tests.films.judge import ENDINGS, Ending, Verdict, draw_ask, judge
from tests.films.kinds import KINDS, folder_of, generator, make_film
from tests.helpers.fuzz import damaged_file, outcome, real_clips

REAL = "real"
#: Outcomes of damaged real clips that must be investigated.
BAD = ("DecoderCrashError", "DecodeTimeoutError", "empty picture")
#: Outcomes of damaged real clips that are clips, with their ending.
_CLIPS: dict[str, Ending] = {"whole": "right", "damaged": "said"}
#: Number of wrong files of a kind listed on stderr; the JSON line has all.
_NAMED = 5


def one_file(process: DecodeProcess, kind: str, seed: int, number: int, folder: Path) -> tuple[str, Verdict]:
    """Makes and decodes one file; returns its description and its verdict."""
    rng = generator(seed, kind, number)
    if kind != REAL:
        film = make_film(kind, rng, folder, number)
        ask = draw_ask(rng, film)
        return f"{film.what} | {ask}", judge(process, film, ask)
    shared = Path(os.environ.get("GARE_SHARED") or Path(__file__).resolve().parents[3] / "shared")
    own = folder_of(folder, kind, number)
    own.mkdir(parents=True, exist_ok=True)
    what, path = damaged_file(rng, real_clips(shared / "data" / "videos"), number, own)
    ended = outcome(process, path)
    return what, Verdict("wrong" if ended.startswith(BAD) else _CLIPS.get(ended, "failed"), ended)


def table(rows: dict[str, Counter[str]]) -> str:
    """Formats one line for each kind."""
    columns = (*ENDINGS, "needless")
    lines = [f"{'':12s}" + "".join(f"{name:>9s}" for name in columns)]
    for kind, counts in rows.items():
        lines.append(f"{kind:12s}" + "".join(f"{counts[name] or '.':>9}" for name in columns))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the fuzzer and returns the exit status."""
    known = [REAL, *KINDS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kinds", default=",".join(known), help=f"some of: {', '.join(known)}")
    parser.add_argument("--count", type=int, default=500, help="files of each kind")
    parser.add_argument("--seed", type=int, default=None, help="that of an earlier run, to repeat it")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one file of a run, with --seed")
    parser.add_argument("--keep", type=Path, help="folder that keeps the wrong files, or the one of --only")
    options = parser.parse_args(arguments)
    seed = secrets.randbits(31) if options.seed is None else options.seed
    kinds, numbers = options.kinds.split(","), range(options.count)
    if options.only:
        kind, _, number = options.only.partition(":")
        kinds, numbers = [kind], range(int(number), int(number) + 1)
    if unknown := set(kinds) - set(known):
        parser.error(f"unknown kinds {', '.join(sorted(unknown))}; accepted: {', '.join(known)}")
    rows: dict[str, Counter[str]] = {}
    faults: list[str] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary, DecodeProcess() as process:
        # Made in its final folder, because a file may refer to others by absolute path.
        folder = options.keep.absolute() if options.keep else Path(temporary)
        for kind in kinds:
            counts = rows[kind] = Counter[str]()
            for number in numbers:
                what, verdict = one_file(process, kind, seed, number, folder)
                counts[verdict.ending] += 1
                counts["needless"] += verdict.is_needless
                line = f"{kind}:{number} {verdict.ending}: {verdict.why}\n    {what}"
                if verdict.ending == "wrong":
                    faults.append(line)
                if options.only or (verdict.ending == "wrong" and counts["wrong"] <= _NAMED):
                    sys.stderr.write(f"{line}\n")
                if not options.keep or not (options.only or verdict.ending == "wrong"):
                    shutil.rmtree(folder_of(folder, kind, number))
            sys.stderr.write(f"{kind}: {dict(counts)}, {time.perf_counter() - started:.0f} s\n")
            sys.stderr.flush()
    sys.stderr.write(f"{len(numbers)} files of each kind, seed {seed}\n{table(rows)}\n")
    if faults:
        again = f"python -m tests.benchmarks.fuzz --seed {seed} --only KIND:NUMBER --keep FOLDER"
        sys.stderr.write(f"{len(faults)} silently wrong; one of them again: {again}\n")
    sys.stdout.write(json.dumps({"seed": seed, "table": rows, "faults": faults}) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
