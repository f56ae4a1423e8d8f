"""The fused kernels by tile size: scores and steps of the head, and their errors.

As a command, ``python -m tests.benchmarks.gpu.tiles TEXTS WARPS`` compiles the kernels for one size. The part
starts it for all sizes at once, since compiling takes seconds a kernel, and finds them in Triton's cache.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from gare.model.fused import tile_sizes
from gare.model.fused.tile_sizes import Tiles, why_unavailable
from tests.benchmarks.gpu import head
from tests.benchmarks.gpu.bench import Bench, Row, say, seconds_of

TILES = tuple(
    Tiles(*one) for one in ((32, 8), (16, 2), (16, 4), (32, 2), (32, 4), (64, 4), (64, 8), (128, 8))
)
#: Number of pairs with which kernels are compiled, and errors measured.
FEW = head.COMPARED
#: Seconds after which compilers are ended; what they have not done is done in the time of its measurement.
COMPILING_S = 60.0


def measure(bench: Bench) -> Row:
    """Measures milliseconds of scores and steps for each tile size, and errors against the plain form."""
    model = bench.config.model
    num_weights = model.increment_heads * model.max_frames
    if reason := why_unavailable(num_weights, torch.float32, bench.device):
        say(f"  left out: {reason}")
        return {"left_out": reason}
    compile_all()
    plain = head.scores_of(bench, FEW, head.PLAIN)()
    exact = head.frame_gradients(bench, FEW, head.PLAIN, torch.float64)
    rows = []
    for tiles in TILES:
        if not bench.left_s():
            break
        row: Row = {"texts": tiles.texts, "warps": tiles.warps}
        try:
            with using(tiles):
                row |= _measured(bench, plain, exact)
        except Exception as error:  # of a compiler, or a size that does not fit the device; others may
            row["left_out"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        say("  " + ", ".join(f"{name} {_shown(value)}" for name, value in row.items()))
    return {"rows": rows}


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _measured(bench: Bench, plain: torch.Tensor, exact: torch.Tensor) -> Row:
    scores = head.scores_of(bench, FEW, head.PREPARED)()
    gradients = head.frame_gradients(bench, FEW, head.FUSED, torch.float32)
    scored = head.scores_of(bench, head.MANY_SCORES, head.PREPARED)
    row = {
        "score_error": head.relative_error(scores, plain),
        "gradient_error": head.relative_error(gradients, exact),
        f"scores_{head.MANY_SCORES}_ms": _ms(bench, scored),
    }
    steps = {size: head.make_step(bench, size, head.FUSED) for size in head.FEW_STEPS}
    return row | {f"step_{size}_ms": _ms(bench, step) for size, step in steps.items()}


def _ms(bench: Bench, call: Callable[[], object]) -> float:
    return 1e3 * seconds_of(bench, call, budget_s=0.5, most=5).seconds


@contextmanager
def using(tiles: Tiles) -> Iterator[None]:
    """Has the kernels use another tile size."""
    original = tile_sizes.tiles_of
    tile_sizes.tiles_of = lambda num_weights: tiles
    try:
        yield
    finally:
        tile_sizes.tiles_of = original


def compile_all() -> None:
    """Compiles the kernels for all sizes, each in a process of its own."""
    commands = [
        [sys.executable, "-m", "tests.benchmarks.gpu.tiles", str(tiles.texts), str(tiles.warps)]
        for tiles in TILES
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # the measurement says what fails
    compilers = [subprocess.Popen(command, **quiet) for command in commands]
    ends_at = time.perf_counter() + COMPILING_S
    for one in compilers:
        try:
            one.wait(max(ends_at - time.perf_counter(), 0.0))
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()


def _compile(tiles: Tiles) -> None:
    from gare.config import load_config

    bench = Bench(torch.device("cuda:0"), False, 0, load_config("msrvtt", ["cluster.train_workers=1"]))
    with using(tiles):
        for form in (head.FUSED, head.PREPARED):
            head.scores_of(bench, FEW, form)()
        head.make_step(bench, FEW, head.FUSED)()


if __name__ == "__main__":
    _compile(Tiles(int(sys.argv[1]), int(sys.argv[2])))
