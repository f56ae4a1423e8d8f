"""``make bench-gpu``: speed and memory on a GPU, part by part, with this machine's own Python and packages.

Tables go to stderr as parts end; the last line of stdout is the result as JSON. Nothing is downloaded or
installed; a part whose packages are missing is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from gare.errors import GareError
from tests.benchmarks.gpu.parts import CONFIGURATION, PARTS, Part, is_there, lacking, missing_packages

LEAST_TORCH, LEAST_PYTHON = (2, 11), (3, 11)
REPOSITORY = Path(__file__).resolve().parents[3]
#: Share of the time that is reserved for shutting down.
RESERVE = 0.05
#: Exit statuses: a part failed; the machine or the command line does not allow a run.
FAILED, REFUSED = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the requested parts; returns the exit status."""
    options = build_parser().parse_args(arguments)
    parts = [part for part in PARTS if part.name in options.parts]
    if reason := _refusal(options, parts):
        sys.stderr.write(f"error: {reason}\n")
        return REFUSED
    try:
        configuration = _configuration(options) if any(part.needs_configuration for part in parts) else None
    except GareError as error:
        sys.stderr.write(f"error: {error}\n")
        return REFUSED
    result = _run(options, parts, configuration)
    sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")
    return FAILED if any("error" in found for found in result["parts"].values()) else 0


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line."""
    width = max(len(part.name) for part in PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts:\n"
        + "\n".join(
            f"  {part.name:<{width}}  {part.about}{' (only if named)' * part.on_request}" for part in PARTS
        ),
    )
    parser.add_argument("--parts", type=_names, default=_usual(), metavar="A,B")
    parser.add_argument("--minutes", type=_positive, default=6.0, help="for all parts together (default 6)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with --tiny alone")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test, whose numbers mean nothing")
    parser.add_argument("--seed", type=int, default=0, help="of random data and weights (default 0)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="changes a key of conf/msrvtt.yaml, such as train.batch_size=64; may be given again",
    )
    return parser


def _usual() -> list[str]:
    return [part.name for part in PARTS if not part.on_request]


def _names(text: str) -> list[str]:
    known = [part.name for part in PARTS]
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"is {text}; accepted: more than 0")
    return value


def _refusal(options: argparse.Namespace, parts: Sequence[Part]) -> str:
    """Returns the reason why nothing can be measured here, or an empty text."""
    if sys.version_info < LEAST_PYTHON:
        return f"this is Python {platform.python_version()}; 3.11 or newer is needed: GPU_PYTHON=python3.12"
    if not is_there("torch"):
        return f"{sys.executable} has no torch; give one that has: make bench-gpu GPU_PYTHON=/path/to/python"
    import torch

    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < LEAST_TORCH:
        return f"torch {torch.__version__} is too old; 2.11 or newer is needed"
    if options.device == "cpu" and not options.tiny:
        return "--device cpu runs with --tiny alone: a CPU would take hours for the other sizes"
    if options.device == "cuda" and not torch.cuda.is_available():
        why = "it was built without CUDA" if torch.version.cuda is None else "it finds no driver or no device"
        return (
            f"no GPU that torch can use: torch {torch.__version__}, {why}; "
            "--tiny --device cpu tries the parts without one"
        )
    absent = [package for package in CONFIGURATION if not is_there(package)]
    if absent and (costly := [part.name for part in parts if part.needs_configuration]):
        free = ",".join(part.name for part in PARTS if not part.needs_configuration)
        return (
            f"{' and '.join(absent)} must be installed: {', '.join(costly)} read the configuration; "
            f"without: --parts {free}"
        )
    return ""


def _run(options: argparse.Namespace, parts: Sequence[Part], configuration: Any) -> dict[str, Any]:
    import torch

    from tests.benchmarks.gpu.bench import Bench, OutOfTimeError, say

    began = time.perf_counter()
    bench = Bench(
        torch.device("cuda:0" if options.device == "cuda" else "cpu"),
        options.tiny,
        options.seed,
        configuration,
    )
    machine = _machine(options.device)
    say(", ".join(f"{name} {value}" for name, value in machine.items()))
    missing = missing_packages(parts)
    if missing:
        costs = "; ".join(f"{package}: {', '.join(names)}" for package, names in missing.items())
        say(f"packages that are not installed, and the parts that they cost: {costs}")
    # Work that a part has not finished at its deadline, and shutting down, need some of the time.
    deadline = began + 60 * options.minutes * (1 - RESERVE)
    runnable = [part for part in parts if not lacking(part, missing)]
    for part in parts:
        if absent := lacking(part, missing):
            bench.found[part.name] = {"skipped": f"not installed: {', '.join(absent)}"}
            say(f"{part.name}: skipped, not installed: {', '.join(absent)}")
            continue
        started = time.perf_counter()
        shares = [one.share for one in runnable[runnable.index(part) :]]
        bench.ends_at = started + max(deadline - started, 0.0) * shares[0] / sum(shares)
        say(f"{part.name}: {bench.left_s():.0f} s at most")
        if started >= deadline:
            bench.found[part.name] = {"left_out": "the parts before it took all of the time"}
            say(f"{part.name}: left out, the parts before it took all of the time")
            continue
        try:
            found = import_module(f"tests.benchmarks.gpu.{part.module}").measure(bench)
        except OutOfTimeError as error:
            found = {"left_out": str(error)}
            say(f"  left out: {error}")
        except Exception as error:  # the following parts are measured anyway
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        bench.found[part.name] = found | {"seconds": time.perf_counter() - started}
        bench.reset_peak()
    elapsed_s = time.perf_counter() - began
    say(f"{elapsed_s:.0f} s in all")
    return {
        "machine": machine,
        "tiny": options.tiny,
        "seed": options.seed,
        "minutes": options.minutes,
        "elapsed_s": elapsed_s,
        "missing": missing,
        "parts": bench.found,
    }


def _configuration(options: argparse.Namespace) -> Any:
    if options.tiny:
        from gare.config import parse_config
        from tests.helpers.tiny import TREE

        # Settings that some parts need in addition: augmented clips, the configured optimiser.
        changes = ["augment.operations=4", "train.optimizer=bert_adam", *options.set]
        return parse_config(TREE, changes)
    from gare.config import load_config

    return load_config(REPOSITORY / "conf" / "msrvtt.yaml", ["cluster.train_workers=1", *options.set])


def _machine(device: str) -> dict[str, Any]:
    import torch

    machine: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    machine["cpus"] = len(os.sched_getaffinity(0))
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine |= {"gpu": properties.name, "gpu_memory_gb": properties.total_memory / 1e9}
        machine["cuda"] = torch.version.cuda
    return machine


if __name__ == "__main__":
    sys.exit(main())
