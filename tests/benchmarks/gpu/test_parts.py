"""``make bench-gpu`` on a CPU, in tiny sizes, so that its first run is not on a lent GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gare.config import Config
from gare.data.batch import Batch
from gare.model.factorized.pairs import ScoringRule
from gare.model.fused import tile_sizes
from gare.model.fused.blocks import FusedRequest, constants_of
from gare.model.fused.tile_sizes import Tiles, tiles_of
from gare.model.gare import GARE
from gare.train.optim.optimizer import build_optimizer
from tests.benchmarks.gpu import figure, head, step, tiles
from tests.benchmarks.gpu.__main__ import build_parser, main
from tests.benchmarks.gpu.bench import Bench, Row
from tests.benchmarks.gpu.figure import FORMS
from tests.benchmarks.gpu.parts import PARTS
from tests.benchmarks.gpu.training import summary
from tests.benchmarks.gpu.variants import VARIANTS, LoopingBertAdam
from tests.helpers.tiny import tiny_config

TINY = ("--tiny", "--device", "cpu", "--minutes", "10")
MEASURED = [part.name for part in PARTS if part.name != "training"]
#: Packages of the project that a machine set up for torch is likely to lack.
LIKELY_ABSENT = (
    *("av", "boto3", "decord", "ftfy", "instant_clip_tokenizer", "cv2", "mlflow", "ray", "simplejpeg"),
)
#: Numbers that may be 0: a remainder, an error, a choice.
MAY_BE_ZERO = {
    "device_ms",
    "other",
    "direct",
    "plain",
    "fused",
    "fused, prepared",
    "fused, tf32",
    "fused, bf16",
    "seed",
}

WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from tests.benchmarks.gpu.__main__ import main
sys.exit(main({arguments}))
"""


def bench(repository: Path, *arguments: str, absent: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Runs the benchmark as a command, on a machine that lacks some packages."""
    code = WITHOUT.format(absent=set(absent), arguments=list(arguments))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=500
    )


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def refused(arguments: Sequence[str]) -> int | str | None:
    """Returns the exit status of a command that measures nothing, run in this process."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


def numbers(tree: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yields all numbers of a JSON, each with its nearest key."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from numbers(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from numbers(value, name)
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        yield name, tree


def test_all_parts_measure_something(repository: Path, seed: int) -> None:
    """A broken part wastes minutes of a lent GPU, and its numbers are missing."""
    done = bench(repository, *TINY, "--seed", str(seed), "--parts", ",".join(MEASURED))
    result = result_of(done)
    parts = result["parts"]
    assert list(parts) == MEASURED
    assert result["missing"] == {}
    for name, value in numbers(result):
        assert math.isfinite(value)
        assert value > 0 or (name in MAY_BE_ZERO and value == 0), name
    assert parts["ceilings"]["tflops"].keys() == {"bf16", "tf32", "float32"}
    rows = parts["step"]["rows"]
    assert [(row["model"], row["precision"]) for row in rows[:2]] == [
        ("baseline", "float32"),
        ("baseline", "bf16"),
    ]
    assert {row["model"] for row in rows} == {"baseline", "gare"}
    assert [row["variant"] for row in rows if "variant" in row] == [one.name for one in VARIANTS]
    assert parts["step"]["ratios"].keys() == {
        "step_new_over_old",
        "step_bert_adam_over_adamw",
        "step_checkpointed_over_new",
        "gb_checkpointed_over_new",
    }
    assert all(("cold_start_s" in row) == (row["compile"] == "towers") for row in rows)
    assert "new_over_old" in parts["encode"]
    assert "cold_start_s" in parts["encode"]["rows"][-1]
    for row in rows:
        assert row["stages_ms"].keys() >= {"towers", "head", "backward", "optimizer", "other"}
        assert row["share_of_ceiling"].keys() == parts["ceilings"]["tflops"].keys()
    for row in parts["head"]["scores"] + parts["head"]["steps"]:
        assert ("ms" in row) != (row["form"] == "fused, graph")
    assert max(parts["head"]["relative_error"].values()) < 1e-5
    assert max(parts["head"]["gradient_error"].values()) < 1e-4
    assert parts["head"]["operations"]["dot products"] < parts["head"]["operations"]["direct"]
    assert parts["loader"]["clips_per_s"].keys() == {"plain", "augmented"}
    assert all(rates["all_cpus"] for rates in parts["loader"]["clips_per_s"].values())
    assert "uint8_copy_and_normalise" in parts["transfer"]["ms_per_clip"]
    assert "Triton" in parts["tiles"]["left_out"]
    assert all(row["operations"] for name, row in parts["kernels"].items() if name != "seconds")


def test_parts_on_request_are_measured_if_they_are_named() -> None:
    usual = build_parser().parse_args([]).parts
    assert usual == [part.name for part in PARTS if part.name not in ("tiles", "kernels")]
    assert build_parser().parse_args(["--parts", "tiles"]).parts == ["tiles"]


def test_another_tile_size_reaches_the_kernels() -> None:
    """Otherwise all rows would be of the same kernel."""
    rule, request = ScoringRule("text", 3.0, None), FusedRequest()
    arguments = (rule, request, 512, 12, 1, torch.float32, False)
    before = constants_of(*arguments)
    with tiles.using(Tiles(64, 4)):
        found = constants_of(*arguments)
    assert (found["BN"], found["num_warps"]) == (64, 4)
    assert constants_of(*arguments) == before
    assert tiles.TILES[0] == tiles_of(12) == Tiles(before["BN"], before["num_warps"])


def test_a_tile_size_that_fails_costs_itself_alone(
    seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A size may take more shared memory than a card has, and the time on it is lent."""
    score = head.scores_of

    def fail_for_one(run: Bench, size: int, form: head.Form) -> Callable[[], torch.Tensor]:
        if tile_sizes.tiles_of(12) == Tiles(16, 2):
            raise RuntimeError("out of resource: shared memory")
        return score(run, size, form)

    monkeypatch.setattr(head, "scores_of", fail_for_one)
    monkeypatch.setattr(head, "MANY_SCORES", 4)
    monkeypatch.setattr(head, "FEW_STEPS", (4,))
    monkeypatch.setattr(tiles, "TILES", (Tiles(32, 8), Tiles(16, 2), Tiles(32, 4)))
    monkeypatch.setattr(tiles, "why_unavailable", lambda *about: "")
    monkeypatch.setattr(tiles, "compile_all", lambda: None)
    first, failed, last = tiles.measure(Bench(torch.device("cpu"), True, seed, tiny_config()))["rows"]
    assert failed == {"texts": 16, "warps": 2, "left_out": "RuntimeError: out of resource: shared memory"}
    assert first.keys() == last.keys() >= {"score_error", "gradient_error", "scores_4_ms", "step_4_ms"}
    assert "shared memory" in capsys.readouterr().err


def test_missing_packages_cost_their_parts_alone(repository: Path) -> None:
    """A machine with torch and without Ray must measure what it can, and list what it could not."""
    done = bench(repository, *TINY, "--parts", "step,loader,training", absent=LIKELY_ABSENT)
    result = result_of(done)
    parts = result["parts"]
    assert {name for name, found in parts.items() if "skipped" in found} == {"loader", "training"}
    assert "ray" in parts["training"]["skipped"]
    assert result["missing"]["ray"] == ["training"]
    assert result["missing"]["cv2"] == ["loader (some of it)", "training"]
    assert "simplejpeg: loader, training" in done.stderr
    assert len(parts["step"]["rows"]) >= 4


def test_without_pydantic_one_message_says_so(repository: Path) -> None:
    """Otherwise the first part that reads the configuration ends in a traceback from deep inside."""
    done = bench(repository, *TINY, absent=["pydantic"])
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: pydantic must be installed: feed, step, encode, head, evaluation, loader, training"
    )
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.endswith("--parts ceilings,transfer\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parts", "step,heads"), "no part heads; known: ceilings"),
        (("--device", "cpu"), "--device cpu runs with --tiny alone"),
        (("--minutes", "0"), "accepted: more than 0"),
        ((*TINY, "--set", "train.batch=3"), "nearest: train.batch_size"),
    ],
)
def test_what_cannot_run_is_refused(
    arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt word must not start minutes of measuring something else."""
    assert refused(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_step_that_does_not_fit_is_tried_with_fewer_pairs(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a smaller card gives no number, or one that does not say for how many pairs it is."""
    config = tiny_config("train.batch_size=8")
    run = Bench(torch.device("cpu"), True, seed, config)
    real = step._steps

    def of_a_small_card(
        run: Bench, model: GARE, config: Config, batch: Batch, budget_s: float, **how: Any
    ) -> Row:
        if len(batch.frames) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return real(run, model, config, batch, budget_s, **how)

    monkeypatch.setattr(step, "_steps", of_a_small_card)
    monkeypatch.setattr(step, "VARIANTS", ())
    row = step.measure(run)["rows"][0]
    assert row["pairs"] == 4
    assert "8 pairs do not fit" in row["note"]


def test_the_old_steps_optimizer_is_bert_adam(seed: int) -> None:
    """A speed-up over something else than the old step would say nothing about the gain."""
    config = tiny_config("train.optimizer=bert_adam", "train.lr=1e-2", "train.clip_lr=1e-2")
    torch.manual_seed(seed)
    models = [GARE(config.model) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(model, config.train) for model in models]
    for optimizer in (optimizers[0], LoopingBertAdam(optimizers[1])):
        torch.manual_seed(seed + 1)
        for _ in range(3):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_sizes_of_the_head_that_cost_too_much_are_left_out_and_said(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise one size that takes minutes costs all numbers after it."""
    run = Bench(torch.device("cpu"), True, seed, tiny_config(), ends_at=time.perf_counter() + 1000)
    monkeypatch.setattr(head, "TINY_STEPS", (4, 10**9))
    rows = [row for row in head.measure(run)["steps"] if row["form"] != "fused, graph"]
    forms = len(head.STEP_FORMS) - 1
    assert [("ms" in row, row["size"]) for row in rows] == [(True, 4)] * forms + [(False, 10**9)] * forms
    assert all("s left" in row["left_out"] for row in rows[forms:])
    before = head.Before(size=100, seconds=1e-9, peak_bytes=1e9)
    monkeypatch.setattr(Bench, "memory_bytes", lambda self: 5 * 10**9)
    assert before.reason_against(run, 200, "direct step") == ""
    assert before.reason_against(run, 300, "direct step") == "it needs about 9 GB"
    assert before.reason_against(run, 300, "fused step") == ""


@pytest.mark.parametrize("error", [0.0, 0.01])
def test_a_graph_that_computes_something_else_is_not_measured(
    seed: int, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    """A wrong graph must not be measured; the stand-in for it is the head, with or without an error."""

    def stand_in(module: torch.nn.Module, sample: Any, **options: Any) -> Any:
        assert all(one.is_leaf for one in sample)
        return lambda *arguments: module(*arguments) * (1 + error)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    run = Bench(torch.device("cpu"), True, seed, tiny_config())
    form = head.Form("fused, graph", graph=True)
    if error:
        with pytest.raises(RuntimeError, match="something else"):
            head.make_step(run, 4, form)
    else:
        head.make_step(run, 4, form)()


def test_the_heads_figure_has_a_line_for_each_form(tmp_path: Path) -> None:
    """A missing line would look like a form that was not measured."""
    steps = [
        {"size": size, "form": form, "ms": size * (number + 1), "peak_gb": 1.0 + number}
        for size in (128, 256)
        for number, (form, _, _) in enumerate(FORMS)
    ]
    steps += [{"size": 512, "form": "direct", "left_out": "it needs more memory than the device has"}]
    files = []
    for name in ("NVIDIA H100", "NVIDIA H200"):
        files.append(tmp_path / f"{name}.json")
        machine = {"gpu": name, "cpus": 16}
        files[-1].write_text(
            "a line\n" + json.dumps({"machine": machine, "parts": {"head": {"steps": steps}}})
        )
    figure.main([*map(str, files), str(tmp_path / "steps.png")])
    image = np.asarray(Image.open(tmp_path / "steps.png").convert("RGB")).reshape(-1, 3)
    for _, label, colour in FORMS:
        wanted = np.array([int(colour[first : first + 2], 16) for first in (1, 3, 5)])
        assert (np.abs(image.astype(int) - wanted).max(axis=1) <= 2).sum() > 300, label


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_message_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers of a CPU must not pass for those of a GPU."""
    assert refused(()) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: no GPU that torch can use: torch")
    assert len(said.err.splitlines()) == 1
    assert not said.out


def test_help_lists_the_parts_without_torch(repository: Path) -> None:
    """A user who tries a new machine must first learn what can be measured."""
    done = bench(repository, "--help", absent=["torch", "pydantic", "numpy"])
    assert done.returncode == 0
    assert all(f"\n  {part.name} " in done.stdout for part in PARTS)


def test_the_wait_for_data_is_part_of_a_training_step() -> None:
    """A step timed without its wait hides that the GPU is starved."""
    record = {
        "time/step_s": [(step, 9.0 if step < 6 else 1.0) for step in range(1, 11)],
        "time/data_wait_s": [(step, 3.0) for step in range(1, 11)],
        "loss/total": [(1, 5.0)],
    }
    found = summary(record, batch_size=8)
    assert (found["steps"], found["steps_left_out"]) == (5, 5)
    assert found["wall_ms"] == 4000
    assert found["pairs_per_s"] == 2
    assert found["data_wait_share"] == 0.75
    assert found["ms"] == {"step": 1000, "data_wait": 3000}
