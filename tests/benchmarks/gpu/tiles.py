"""The fused kernels by tile size: scores and steps of the head, and their errors.

As a command, ``python -m tests.benchmarks.gpu.tiles TEXTS WARPS`` compiles the kernels for one size. The part
starts it for all sizes at once, since compiling takes seconds a kernel, and finds them in Triton's cache.
"""

from __future__ import annotations

import subprocess
import sys
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
PREPARED = head.Form("fused, prepared", prepared=True)
SCORES, STEPS = 10_000, (128, 1024, 4096)
#: Number of pairs with which kernels are compiled.
FEW = 64
#: Seconds that all compilers have.
COMPILING_S = 60.0


def measure(bench: Bench) -> Row:
    """Measures milliseconds of scores and steps for each tile size, and errors against the plain form."""
    model = bench.config.model
    num_weights = model.increment_heads * model.max_frames
    if reason := why_unavailable(num_weights, torch.float32, bench.device):
        say(f"  left out: {reason}")
        return {"left_out": reason}
    _compile_all()
    plain = head.scores_of(bench, FEW, head.PLAIN)()
    exact = head.frame_gradients(bench, FEW, head.PLAIN, torch.float64)
    rows = []
    for tiles in TILES:
        if not bench.left_s():
            break
        with using(tiles):
            rows.append({"texts": tiles.texts, "warps": tiles.warps} | _row(bench, plain, exact))
        say("  " + ", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()))
    return {"rows": rows}


def _row(bench: Bench, plain: torch.Tensor, exact: torch.Tensor) -> Row:
    scores = head.scores_of(bench, FEW, PREPARED)()
    gradients = head.frame_gradients(bench, FEW, head.FUSED, torch.float32)
    row = {
        "score_error": float((scores - plain).norm() / plain.norm()),
        "gradient_error": float((gradients - exact).norm() / exact.norm()),
        f"scores_{SCORES}_ms": _ms(bench, head.scores_of(bench, SCORES, PREPARED)),
    }
    return row | {f"step_{size}_ms": _ms(bench, head.make_step(bench, size, head.FUSED)) for size in STEPS}


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


def _compile_all() -> None:
    commands = [
        [sys.executable, "-m", "tests.benchmarks.gpu.tiles", str(tiles.texts), str(tiles.warps)]
        for tiles in TILES
    ]
    compilers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    for one in compilers:
        try:
            one.wait(COMPILING_S)
        except subprocess.TimeoutExpired:  # it is compiled later, in the time of its measurement
            one.kill()
            one.wait()


def _compile(tiles: Tiles) -> None:
    from gare.config import load_config

    bench = Bench(torch.device("cuda:0"), False, 0, load_config("msrvtt", ["cluster.train_workers=1"]))
    with using(tiles):
        for form in (head.FUSED, PREPARED):
            head.scores_of(bench, FEW, form)()
        head.make_step(bench, FEW, head.FUSED)()


if __name__ == "__main__":
    _compile(Tiles(int(sys.argv[1]), int(sys.argv[2])))
