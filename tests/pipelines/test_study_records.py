"""Trainings of other studies: what counts as the same, and what must not be taken."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.layout import Layout, layout
from gare.config import Config
from gare.data.splits import read_splits, split_hash_of
from gare.storage.files import delete_file, write_json
from gare.storage.run_folder import RunFolder
from gare.study.plan import StudyFile, StudyPlan, plan_study
from pipelines import study_records
from pipelines.study_records import StudyRecords, training_of
from tests.helpers.pipelines import tiny

FILE = {
    "title": "Increment",
    "factors": {"model": {"baseline": {"model.increment": False}, "gare": {}}},
    "reference": {"factor": "model", "level": "baseline"},
    "start": {"model.increment": False},
    "seeds": [0, 1],
}


def plan(name: str, *overrides: str, **changes: object) -> StudyPlan:
    file = StudyFile.model_validate(FILE | changes)
    return plan_study(tiny(*overrides), name, file, checkpoint_of=lambda one: folder_of(one).best)


def folder_of(config: Config) -> RunFolder:
    return RunFolder(layout(config).run(config.train.run))


def any_precision(config: Config) -> str:
    return ""


@pytest.fixture
def studies(
    benchmark: dict[str, Any], places: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The folder of all studies, in a root of its own with the tiny benchmark's data."""
    monkeypatch.setenv("GARE_ROOT", str(tmp_path))
    copy = layout(tiny())
    shutil.copytree(places.frames, copy.frames)
    shutil.copy(places.manifest, copy.manifest)
    return str(tmp_path / "studies")


@pytest.fixture
def records(studies: str) -> StudyRecords:
    """The first study, all of whose runs are done."""
    records, copy = StudyRecords(studies, "first"), layout(tiny())
    splits = read_splits(copy.manifest, copy.frames, tiny().extract)
    split_hash = split_hash_of(splits.test)
    for number, run in enumerate((*(first := plan("first")).starts, *first.runs)):
        folder = folder_of(run.config)
        settings = {"train": {"precision": "float32"}}
        record = {"settings": settings, "mlflow_run_id": str(number), **splits.identity()}
        write_json(folder.record, record)
        evaluation = layout(run.config).evaluation(run.name, "test")
        metrics = {"t2v/R1": float(number)}
        write_json(f"{evaluation}/result.json", {"metrics": metrics, "split_hash": split_hash})
        result = {"evaluation": evaluation, "metrics": metrics, "seconds": 1.0, "mlflow_run_id": str(number)}
        records.add(run, result)
    return records


def taken(studies: str, planned: StudyPlan, precision: str = "") -> dict[str, str]:
    """Takes what another study can, its starts first; returns the trainings by run."""
    others = StudyRecords(studies, planned.name)
    for runs in (planned.starts, planned.runs):
        for run, record in others.find_same(runs, lambda _: precision):
            others.take(run, record)
    done = [run for run in (*planned.starts, *planned.runs) if others.is_done(run)]
    return {run.name: others.read(run)["taken_from"] for run in done}


def test_the_same_settings_under_other_names_are_taken_with_their_start(
    records: StudyRecords, studies: str
) -> None:
    found = taken(studies, planned := plan("second"))
    assert found == {
        run.name: run.name.replace("second", "first") for run in (*planned.starts, *planned.runs)
    }
    others = StudyRecords(studies, "second")
    start = planned.runs[0].start
    assert start is not None
    assert training_of(others.read(start)).uri == folder_of(plan("first").starts[0].config).uri
    assert others.left_of(planned.runs) == []
    assert others.seconds(planned.runs) == []  # they say nothing of how long a training takes
    assert "taken_from" not in records.read(plan("first").runs[0])


@pytest.mark.parametrize(
    "override",
    [
        "train.lr=0.5",
        "train.epochs=1",
        "train.batch_size=4",
        "model.temporal=none",
        "loss.radii_weight=0.5",
        "model.method=direct",
        "train.micro_batch=2",
        "train.diagnostics_every=7",
        "data.num_train=12",
        "train.precision=bf16",
    ],
)
def test_any_other_setting_is_another_training(records: StudyRecords, studies: str, override: str) -> None:
    """Also one of how it is computed: a study may be about just that."""
    assert taken(studies, plan("second", override)) == {}


def test_settings_of_other_things_do_not_count(records: StudyRecords, studies: str) -> None:
    overrides = ("cluster.train_workers=1", "study.parallel=1", "train.overwrite=true", "tracking.uri=x.db")
    assert len(taken(studies, plan("second", *overrides))) == 6


def test_another_start_is_another_training(records: StudyRecords, studies: str) -> None:
    """The path of the start is other in each study; what it was trained with is what counts."""
    assert taken(studies, plan("second", start={"model.increment": False, "train.lr": 0.5})) == {}


def test_what_is_scored_otherwise_is_taken_as_a_start_alone(records: StudyRecords, studies: str) -> None:
    found = taken(studies, plan("second", split="val"))
    assert found == {f"second-start-seed{seed}": f"first-start-seed{seed}" for seed in (0, 1)}


def test_a_factor_of_any_section_makes_other_trainings(records: StudyRecords, studies: str) -> None:
    workers = {"one": {"cluster.train_workers": 1}, "two": {"cluster.train_workers": 2}}
    other = {"factors": {"workers": workers}, "reference": {"factor": "workers", "level": "one"}}
    assert set(taken(studies, plan("second", **other))) == {f"second-start-seed{seed}" for seed in (0, 1)}


def test_weights_that_were_replaced_are_other_weights(
    records: StudyRecords, studies: str, tmp_path: Path
) -> None:
    """Their path is the same, and so are all settings."""
    weights = tmp_path / "mine" / "model.safetensors"
    write_json(str(weights), {"weights": 1})
    override = f"train.start_from={weights.parent}"
    done = StudyRecords(studies, "third")
    for run in plan("third", override, start=None).runs:
        source = records.read(plan("first").runs[0])
        done.add(run, {key: source[key] for key in ("evaluation", "metrics", "seconds", "mlflow_run_id")})
    assert len(taken(studies, plan("fourth", override, start=None))) == 4
    write_json(str(weights), {"weights": 22})
    assert taken(studies, plan("fifth", override, start=None)) == {}


def test_another_split_is_scored_anew(
    records: StudyRecords, studies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when clips of test that had failed were extracted since."""
    monkeypatch.setattr(study_records, "split_hash_of", lambda rows: "other")
    assert set(taken(studies, plan("second"))) == {f"second-start-seed{seed}" for seed in (0, 1)}


def test_auto_is_the_precision_that_it_stands_for(records: StudyRecords, studies: str) -> None:
    assert taken(studies, plan("second"), "bf16") == {}
    assert len(taken(studies, plan("second"), "float32")) == 6


def trained_anew(folder: RunFolder, evaluation: str) -> None:
    write_json(folder.record, folder.read_record() | {"mlflow_run_id": "other"})


def scored_no_more(folder: RunFolder, evaluation: str) -> None:
    delete_file(f"{evaluation}/result.json")


def damaged(folder: RunFolder, evaluation: str) -> None:
    Path(folder.record).write_bytes(b"{")


def damaged_in_form(folder: RunFolder, evaluation: str) -> None:
    write_json(folder.record, [1])


def scored_otherwise(folder: RunFolder, evaluation: str) -> None:
    write_json(f"{evaluation}/result.json", {"metrics": {"t2v/R1": 99.0}})


@pytest.mark.parametrize("change", [trained_anew, scored_no_more, damaged, damaged_in_form, scored_otherwise])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_was_trained_anew_or_is_gone_is_not_taken(
    records: StudyRecords, studies: str, change: Any, when: str
) -> None:
    """By train.overwrite, a run of the same name may have become another one since."""
    other, planned = plan("first").runs[1], plan("second")
    if when == "after":
        assert len(taken(studies, planned)) == 6
    change(folder_of(other.config), records.read(other)["evaluation"])
    assert sorted(taken(studies, planned)) == sorted(
        run.name for run in (*planned.starts, *planned.runs) if run.name != "second-gare-seed0"
    )
    assert [run.name for run in StudyRecords(studies, "second").left_of(planned.runs)] == [
        "second-gare-seed0"
    ]


def test_a_run_that_has_begun_is_continued(records: StudyRecords, studies: str) -> None:
    planned = plan("third")
    folder = folder_of(planned.runs[1].config)
    write_json(folder.record, {})
    assert "third-gare-seed0" not in taken(studies, planned)


def test_damaged_and_earlier_records_are_left_out(records: StudyRecords, studies: str) -> None:
    for name, content in (("a", b"{"), ("b", b"[1]"), ("c", b'{"digest": "", "evaluation": "x"}')):
        path = Path(studies) / "odd" / "runs" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert len(taken(studies, plan("second"))) == 6


def test_nothing_is_taken_before_the_data_are_there(records: StudyRecords, studies: str) -> None:
    planned = plan("second", "name=nowhere")
    assert StudyRecords(studies, "second").find_same(planned.starts, any_precision) == []
