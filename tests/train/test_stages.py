"""Where the seconds of a step go: all of them are told once, and telling changes nothing."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gare.report.pictures import LINES
from gare.train.profile import picture, table
from gare.train.stages import STAGES, stage, start_recording, stop_recording
from tests.benchmarks.cost import NETWORKS, Parts, Shape, loss_traffic, step_of
from tests.benchmarks.cost import table as cost_table
from tests.helpers.pictures import count_colour, pixels_of
from tests.helpers.staged import FORMS, STEPS, train
from tests.helpers.tiny import tiny_config


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> list[dict[str, Any]]:
    """What two worker processes found."""
    folder = tmp_path_factory.mktemp("staged")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.staged", str(rank), str(folder)],
            cwd=repository,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [process.wait(300) for process in processes] == [0, 0]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


def test_a_stage_inside_another_counts_once() -> None:
    """Seconds told twice make a table whose sum is longer than the step."""
    recorder = start_recording(torch.device("cpu"))
    clock = iter([0.0, 1.0, 3.0, 7.0, 8.0, 9.0, 20.0, 21.0, 22.0, 32.0])
    recorder.now = lambda: next(clock)  # type: ignore[method-assign]
    try:
        with stage("head"), stage("communication"):
            pass
        with stage("backward"):
            with stage("towers"):
                pass
            recorder.gradients_ready()
    finally:
        stop_recording()
    # head 0-7 with 1-3 inside; backward 8-22 with 9-20 inside, the gradients there at 21.
    assert recorder.take() == {
        "head": 5.0,
        "communication": 2.0,
        "towers_again": 11.0,
        "gradients": 1.0,
        "backward": 2.0,
    }
    assert recorder.take() == {}


def test_off_nothing_is_measured() -> None:
    """A mark that costs time when nobody asked for it slows every run."""
    assert stage("head") is stage("backward")
    with stage("head"), stage("head"):
        pass


@pytest.mark.parametrize("override", ["train.micro_batch=0", "train.micro_batch=2"])
def test_a_profile_of_real_steps(override: str, tmp_path: Path) -> None:
    """The sum of the stages is the step, and the numbers that are trained are those of an unwatched run."""
    losses, _, _ = train(override)
    trace = tmp_path / "trace.json.gz"
    profiled, found, seconds = train(override, profiled=True, trace=str(trace))
    assert profiled == losses
    assert len(found["by_step"]) == STEPS
    for step, took in zip(found["by_step"], seconds, strict=True):
        assert step.keys() <= STAGES.keys()
        assert step.keys() >= {"towers", "head", "backward", "optimizer", "other", "data_wait"}
        assert sum(step.values()) == pytest.approx(took + 0.25)
        assert ("towers_again" in step) == (override == "train.micro_batch=2")
    assert found["workers"] == 1
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"towers", "head", "backward", "optimizer"} <= names
    text = table(found)
    assert "towers" in text
    assert text.isascii()
    drawn = pixels_of(picture(found, "tiny/first: stages"))
    assert min(count_colour(drawn, colour) for colour in LINES[:3]) > 50


def test_the_picture_shows_how_long_each_stage_took() -> None:
    """Areas are compared by eye; one drawn over another would hide the stage to look at."""
    stages = list(STAGES)[:2]
    drawn = pixels_of(picture({"by_step": [dict(zip(stages, (1.0, 3.0), strict=True))] * 20}, "a title"))
    legend = [count_colour(drawn[:, -200:], colour) for colour in LINES[:2]]
    areas = [count_colour(drawn[:, :-200], colour) for colour in LINES[:2]]
    assert min(legend) > 50
    assert areas[1] / areas[0] == pytest.approx(3, rel=0.05)
    assert areas[0] > 10_000


def test_two_workers_say_what_they_wait_for(of_two: list[dict[str, Any]]) -> None:
    """Communication must not be taken for computing; the slowest worker is named."""
    for worker in of_two:
        assert worker["losses"] == worker["plain"]
        profile = worker["profile"]
        assert (profile["workers"], len(profile["mean_s"])) == (2, 2)
        assert profile["mean_s"] == of_two[0]["profile"]["mean_s"]
        for mean in profile["mean_s"]:
            assert mean["communication"] > 0
            assert mean["gradients"] > 0
    made = {"workers": 2, "steps": 3, "left_out": [0], "by_step": []}
    means = [{"towers": 0.1, "head": 0.3}, {"towers": 0.5, "head": 0.1}]
    text = table(made | {"mean_s": means})
    assert "towers            0.3000  60.0 %  0.5000 (1)" in text
    assert "head              0.2000  40.0 %  0.3000 (0)" in text


@pytest.mark.parametrize("form", list(FORMS))
def test_the_cost_models_bytes_are_those_of_a_step(form: str, of_two: list[dict[str, Any]]) -> None:
    """A model of what moves that nobody has held against the program is a guess."""
    model = tiny_config(*FORMS[form]).model
    shape = Shape(
        pairs_per_gpu=4,
        frames=model.max_frames,
        words=model.max_words,
        width=model.clip.embed_dim,
        heads=model.increment_heads,
    )
    expected = loss_traffic(form, 8, shape)  # type: ignore[arg-type]
    for worker in of_two:
        assert worker["traffic"][form] == vars(expected)


def test_the_cost_model_holds_what_it_says() -> None:
    """Rows that are shared out cost a GPU b·N pairs, and everything everywhere N²."""
    parts, shape = Parts(towers_s=1e-3, head_s=1e-7, optimizer_s=1e-3), Shape()
    network = NETWORKS["400 Gb/s InfiniBand"]
    sharded, everything = (step_of(form, 64, network, parts, shape) for form in ("sharded", "everything"))  # type: ignore[arg-type]
    assert everything.head == pytest.approx(64 * sharded.head)
    assert sharded.head == pytest.approx(32 * 64 * 32 * 1e-7)
    assert everything.towers == sharded.towers == pytest.approx(32e-3)
    assert step_of("sharded", 8, network, parts, shape).gradients < sharded.gradients
    slow = step_of("sharded", 64, NETWORKS["100 Gb/s Ethernet"], parts, shape)
    assert slow.loss_traffic > 3 * sharded.loss_traffic
    lines = cost_table(parts, shape).splitlines()
    assert len(lines) == 9
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
