"""Stores, runs and a database that commit b34487e wrote, whole and as a kill left them, with today's code.

``tests/written_by/b34487e`` holds them and says how they were made. Everything here works on a copy.
"""

from __future__ import annotations

import json
import lzma
import sqlite3
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from cluster.tracking import resolve_tracking_uri
from cluster.tracking.client import client
from gare.config import Config, parse_config
from gare.data.manifest import read_manifest
from gare.data.store.contents import Store
from gare.data.store.feature_reader import FeatureReader
from gare.data.store.frame_reader import FrameReader
from gare.storage import claims
from gare.storage.files import list_files
from gare.storage.generations import generation_of, newest_number
from gare.train.checkpoint import sums
from gare.train.checkpoint.history import History
from gare.train.checkpoint.index import Checkpoints
from pipelines import evaluate, extract, prepare, train
from tests.helpers.pipelines import losses, snapshot
from tests.helpers.stores import stored_values

pytestmark = pytest.mark.usefixtures("ray_local")

#: Where make.py had its outputs: the paths in what it wrote begin so.
MADE_AT = "/data/gare"
TEXT = {".json", ".jsonl", ".yaml"}
SPOILT = "synthetic2-s0-test-00000"


class Written:
    """A copy of the outputs, as if that commit had written them here.

    Args:
        root: where to; it must not exist.
        archive: of the outputs.
    """

    def __init__(self, root: Path, archive: Path) -> None:
        self.root = root
        with lzma.open(archive) as packed, tarfile.open(fileobj=packed) as tar:
            tar.extractall(root, filter="data")
        for path in root.rglob("*"):
            if path.suffix in TEXT:
                path.write_text(path.read_text().replace(MADE_AT, str(root)))
        database = root / "mlflow.db"
        with sqlite3.connect(database) as made:
            dump = "\n".join(made.iterdump()).replace(MADE_AT, str(root))
        made.close()
        database.unlink()
        with sqlite3.connect(database) as moved:
            moved.executescript(dump)
        moved.close()
        self._settings = yaml.safe_load((root / "gare.yaml").read_text())

    def config(self, *overrides: str) -> Config:
        """The settings of that commit, with overrides."""
        return parse_config(self._settings, overrides)

    def data(self, name: str) -> Path:
        """The folder of a data set."""
        return self.root / name

    def json(self, name: str) -> Any:
        """The content of a JSON file."""
        return json.loads((self.root / name).read_text())

    def tracking(self) -> Any:
        """A client of the database."""
        return client(resolve_tracking_uri("sqlite:///mlflow.db", str(self.root)))


@pytest.fixture
def written(tmp_path: Path, repository: Path) -> Written:
    return Written(tmp_path / "written", repository / "tests/written_by/b34487e/root.tar.xz")


def ids_of(written: Written) -> list[str]:
    """Of the clips that are in the stores."""
    rows = read_manifest(str(written.data("whole") / "manifest.parquet")).rows
    return [row.video_id for row in rows if row.video_id != SPOILT]


def features_of(store: Path, ids: Sequence[str]) -> dict[str, np.ndarray]:
    reader = FeatureReader(str(store))
    assert reader.places.keys() == set(ids)
    return reader.read(list(ids))


def test_there_is_nothing_to_do(written: Written) -> None:
    """Else the upgrade decodes a collection of years anew, or refuses it for settings that nobody changed."""
    data = written.data("whole")
    before = {name: snapshot(data / name) for name in ("frames", "features")}
    fingerprint = written.json("whole/prepare/result.json")["fingerprint"]
    assert prepare.run(written.config())["fingerprint"] == fingerprint
    result = extract.run(written.config("extract.store=both"))
    for one in (result, result["features"]):
        counts = [one[key] for key in ("new", "changed", "unchanged", "gone", "attempted")]
        assert counts == [0, 0, 20, 0, 0]
    assert set(result["failed"]) == {SPOILT}
    checked = extract.run(written.config("extract.store=both", "upkeep.task=verify"))
    assert (checked["sound"], checked["videos"]) == (True, 19)
    assert (checked["features"]["sound"], checked["features"]["videos"]) == (True, 19)
    assert {name: snapshot(data / name) for name in before} == before


def test_stores_without_generations_are_compacted(written: Written) -> None:
    """Parts of before generations are never fenced, so merging them must neither lose nor double a row."""
    data, ids = written.data("whole"), ids_of(written)
    frames, features = stored_values(str(data / "frames")), features_of(data / "features", ids)
    assert frames.keys() == set(ids)
    for name in ("frames", "features"):
        assert newest_number(str(data / name)) == 0
        assert {generation_of(part) for part in list_files(f"{data / name}/data")} == {0}
    result = extract.run(written.config("extract.store=both", "upkeep.task=compact"))
    assert (result["parts_after"], result["features"]["parts_after"]) == (1, 1)
    for name in ("frames", "features"):
        assert {generation_of(part) for part in list_files(f"{data / name}/data")} == {1}
    assert stored_values(str(data / "frames")) == frames
    again = features_of(data / "features", ids)
    assert again.keys() == features.keys()
    assert all(np.array_equal(again[name], values) for name, values in features.items())
    checked = extract.run(written.config("extract.store=both", "upkeep.task=verify"))
    assert (checked["sound"], checked["features"]["sound"]) == (True, True)
    prepare.run(written.config())  # the videos are elsewhere now
    unchanged = extract.run(written.config("extract.store=both"))
    assert (unchanged["attempted"], unchanged["features"]["attempted"]) == (0, 0)


def test_a_finished_run_is_done_and_scores_the_same(
    written: Written, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A table in a paper must come out again after an upgrade, of the same checkpoint and MLflow run."""
    monkeypatch.setattr(sums, "noted_folders", set())
    folder = written.data("whole") / "runs/first"
    before = snapshot(folder)
    assert [entry.sha256 for entry in Checkpoints(f"{folder}/checkpoints").entries()] == [{}, {}]
    result = written.json("whole/runs/first/result.json")
    assert train.run(written.config()) == result
    assert snapshot(folder) == before
    assert [step for step, _ in losses(folder)["loss/total"]] == list(range(1, 7))

    scores = written.json("whole/runs/first/evaluation-test/result.json")
    scored = evaluate.run(written.config())
    assert scored["metrics"].keys() >= scores["metrics"].keys()
    for name, value in scores["metrics"].items():
        assert scored["metrics"][name] == pytest.approx(value, abs=1e-4), name
    # A guarantee is missing, and that is said.
    assert caplog.text.count("a changed bit in its files would not be seen") == 1
    run = written.tracking().get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/t2v/R1"] == scored["metrics"]["t2v/R1"]
    points = written.tracking().get_metric_history(run.info.run_id, "loss/total")
    assert {point.step for point in points} <= {step for step, _ in losses(folder)["loss/total"]}
    assert points


def test_features_are_learned_from(written: Written) -> None:
    """Features of millions of clips take days; a run on them is done, and the next one starts from them."""
    learned = ("train.input=features", "model.adapters=true")
    result = written.json("whole/runs/from-features/result.json")
    assert train.run(written.config(*learned, "train.run=from-features")) == result
    new = train.run(written.config(*learned, "train.run=new", "train.epochs=1"))
    assert np.isfinite(new["loss"])
    assert new["mlflow_run_id"] != result["mlflow_run_id"]
    scored = evaluate.run(written.config(*learned, "train.run=from-features"))
    assert scored["num_texts"] > 0


def test_a_killed_run_is_resumed(written: Written) -> None:
    """The upgrade comes while runs of weeks wait for a machine: they go on, under their name in MLflow."""
    folder = written.data("whole") / "runs/killed"
    checkpoints = Checkpoints(f"{folder}/checkpoints")
    (entry,) = checkpoints.entries()
    assert entry.sha256 == {}
    unfinished = {path.name for path in Path(checkpoints.uri).iterdir() if path.is_dir()} - {entry.name}
    assert len(unfinished) == 1
    earlier = History.read(f"{folder}/history.json", step=entry.step, epoch=entry.epoch).steps
    run_id = written.json("whole/runs/killed/run.json")["mlflow_run_id"]
    assert written.tracking().get_run(run_id).info.status == "RUNNING"

    # The killed process had its lock on another machine: its silence alone tells that it is gone.
    result = train.run(written.config("train.run=killed", "train.epochs=20", "upkeep.stale_s=1"))

    assert result["mlflow_run_id"] == run_id
    history = History.read(f"{folder}/history.json")
    assert history.resumed == [entry.step]
    for name, points in earlier.items():
        assert history.steps[name][: len(points)] == points, name
    assert [step for step, _ in history.steps["loss/total"]] == list(range(1, result["steps"] + 1))
    assert result["steps"] > entry.step
    # What is written now has its SHA-256, whatever it was copied from.
    assert sums.SummedFolder(result["checkpoint"]).sums
    newest = checkpoints.entries()[-1]
    assert newest.step == result["steps"]
    assert newest.sha256
    client = written.tracking()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    waited = client.get_metric_history(run_id, "loss/waited")
    assert [(point.step, point.value) for point in waited] == [(1, 0.5), (2, 1.0)]


def test_what_waited_for_mlflow_is_delivered(written: Written, caplog: pytest.LogCaptureFixture) -> None:
    """Curves of a night without MLflow wait in a file that the next version has to understand."""
    run_id = written.json("whole/runs/killed/run.json")["mlflow_run_id"]
    pending = written.data("whole") / "mlflow-pending.jsonl"
    torn = pending.read_bytes().splitlines()[-1]
    result = evaluate.run(written.config("evaluate.sync=true"))
    assert (result["metrics"], result["tags"], result["runs"]) == (2, 1, [run_id])
    assert pending.read_bytes() == b""
    assert caplog.text.count("skipping an incomplete entry") == 1
    assert pending.with_name("mlflow-pending.jsonl.damaged").read_bytes() == torn + b"\n"
    client = written.tracking()
    assert [point.step for point in client.get_metric_history(run_id, "loss/waited")] == [1, 2]
    assert client.get_run(run_id).data.tags["waited"] == "yes"
    assert evaluate.run(written.config("evaluate.sync=true"))["metrics"] == 0


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_half_written_stores_are_continued(where: str, written: Written) -> None:
    """A night's extraction that the upgrade ended goes on: what is there stays, what is missing is made."""
    half, whole, ids = written.data("half"), written.data("whole"), ids_of(written)
    stores = [half / "frames", half / "features"]
    parts = {path: path.read_bytes() for store in stores for path in store.glob("data/*.parquet")}
    claim_files = [path for store in stores for path in store.glob("lock/*.json")]
    leftovers = [store / "data/.gare-0123456789abcdef.tmp" for store in stores]
    assert len(claim_files) == 2
    assert all(path.exists() for path in leftovers)
    # Of a process of this machine that is gone, or of another machine: then its silence alone tells.
    stale_s = 60 if where == "here" else 1
    if where == "here":
        gone = next(pid for pid in range(2**22 - 1, 2**21, -1) if not psutil.pid_exists(pid))
        for path in claim_files:
            claim = json.loads(path.read_text()) | {"machine": claims._machine(), "pid": gone}
            path.write_text(json.dumps(claim))
    prepare.run(written.config("name=half"))  # the videos are elsewhere now
    result = extract.run(written.config("name=half", "extract.store=both", f"upkeep.stale_s={stale_s}"))
    for one in (result, result["features"]):
        assert 0 < one["attempted"] < 20
        assert one["videos"] == 19
    assert set(result["failed"]) == {SPOILT}
    assert {path: path.read_bytes() for path in parts} == parts
    assert not [path for path in leftovers if path.exists()]
    for store in stores:
        assert list_files(f"{store}/lock") == []
        assert Store(str(store)).read_meta().complete
        # What was there is of no generation, what was added is of the first.
        assert {generation_of(part) for part in list_files(f"{store}/data")} == {0, 1}
    frames, known = (FrameReader(str(folder / "frames")) for folder in (half, whole))
    assert all(np.array_equal(*both) for both in zip(frames.read(ids), known.read(ids), strict=True))
    features = features_of(half / "features", ids)
    for name, values in features_of(whole / "features", ids).items():
        assert np.allclose(features[name], values, atol=2e-3), name
    assert set(Store(str(half / "frames")).read_failures(set(ids))) == {SPOILT}
    checked = extract.run(written.config("name=half", "extract.store=both", "upkeep.task=verify"))
    assert (checked["sound"], checked["features"]["sound"]) == (True, True)
