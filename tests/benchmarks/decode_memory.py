"""Memory of a decoding worker over thousands of decodes: of the parent, and of the child that decodes.

The real clips in a cycle, with a line every hundred decodes. The last column is the most that either held
after a decode; the exit status is 1 where one of them passes ``--limit-mb``. ``--renew 500`` is extraction's
way, a fresh child every 500 videos; ``--renew 0`` keeps one child for all. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from itertools import cycle, islice
from pathlib import Path

import psutil

from gare.data.decode.clip_request import ClipRequest
from gare.data.decode.process import DecodeProcess


def main() -> int:
    """Runs the benchmark and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--renew", type=int, default=500, help="videos of one child; 0: one child for all")
    parser.add_argument("--largest-kb", type=float, default=1e9, help="leave out larger clips, to be quick")
    parser.add_argument("--limit-mb", type=float, default=600.0)
    options = parser.parse_args()
    shared = Path(os.environ.get("GARE_SHARED") or Path(__file__).resolve().parents[3] / "shared")
    clips = [
        str(path)
        for path in sorted((shared / "data" / "videos").iterdir())
        if path.stat().st_size <= 1000 * options.largest_kb
    ]
    rows = []
    most = {"parent": 0.0, "child": 0.0}
    started = time.perf_counter()
    with DecodeProcess(max_videos=options.renew or sys.maxsize) as process:
        for number, clip in enumerate(islice(cycle(clips), options.count), 1):
            process.extract(ClipRequest(clip))
            now = {"parent": held_mb(os.getpid()), "child": held_mb(process.pid or 0)}
            most = {name: max(most[name], mb) for name, mb in now.items()}
            if number % 100 == 0:
                rows.append({"decodes": number, **now})
                seconds = time.perf_counter() - started
                sys.stderr.write(
                    f"{number:6d} decodes, {seconds:6.0f} s: parent {now['parent']:4.0f} MB, child "
                    f"{now['child']:4.0f} MB; at most {most['parent']:4.0f} and {most['child']:4.0f} MB\n"
                )
                sys.stderr.flush()
    sys.stdout.write(json.dumps({"clips": len(clips), "rows": rows, "most_mb": most}) + "\n")
    return 1 if max(most.values()) > options.limit_mb else 0


def held_mb(pid: int) -> float:
    """Returns the resident memory of a process, MB."""
    return psutil.Process(pid).memory_info().rss / 1e6


if __name__ == "__main__":
    sys.exit(main())
