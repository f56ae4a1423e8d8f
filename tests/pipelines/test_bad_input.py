"""What bad input gets: one clear message, the right exit status, nothing half-written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.layout import Layout, layout
from gare.config import Config
from pipelines import evaluate, extract, prepare, train
from tests.helpers.pipelines import Answer, command, in_process, snapshot, tiny

Step = Callable[[Config], Mapping[str, Any]]
Run = Callable[..., Answer]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tiny_yaml: str) -> Run:
    """Runs a step with the tiny file and overrides."""

    def call(step: Step, *overrides: str, config: str = tiny_yaml) -> Answer:
        return in_process(capsys, step, "--config", config, *overrides)

    return call


@pytest.fixture
def own(root: Path, tmp_path: Path) -> dict[str, Any]:
    """A folder of two videos by name and its captions file; overrides for them."""
    videos, captions = tmp_path / "videos", tmp_path / "captions.csv"
    videos.mkdir()
    for name in ("cat.mp4", "dog.mp4"):
        (videos / name).write_bytes(b"not looked into by prepare")
    overrides = ("name=own", "data.benchmark=folder", f"data.videos={videos}", f"data.captions={captions}")
    return {"videos": videos, "captions": captions, "overrides": overrides}


def test_unknown_and_mistyped_keys_are_all_named(repository: Path, root: Path, tiny_yaml: str) -> None:
    """Faults one at a time cost a start each."""
    answer = command(
        repository,
        "train",
        ["--config", tiny_yaml, "train.epoch=3", "train.batch_size=many", "trian.lr=1", "extract.num_frames"],
    )
    answer.refused(2, "4 faults", "nearest: train.epochs", "train.batch_size: got 'many'", "nearest: train")
    assert "extract.num_frames" in answer.stderr
    assert answer.stderr.startswith("error: "), "nothing but the message"


@pytest.mark.parametrize("step", [prepare, extract, train, evaluate])
def test_missing_configuration_file(step: Any, run: Run, root: Path) -> None:
    """The first typing mistake of all."""
    run(step.run, config="conf/none.yaml").refused(2, "conf/none.yaml", "conf/demo.yaml")


def test_steps_out_of_order(run: Run, root: Path) -> None:
    """Each step must say which one comes before it."""
    run(extract.run, "name=fresh").refused(3, "there is no manifest", "run pipelines/prepare.py first")
    run(train.run, "name=fresh").refused(3, "there is no manifest")
    run(evaluate.run, "name=fresh").refused(3, "there is no checkpoint", "run pipelines/train.py first")
    assert not (root / "fresh").exists()


def test_missing_captions_file(run: Run, own: dict[str, Any], root: Path) -> None:
    """A wrong path must be shown as it was given."""
    run(prepare.run, *own["overrides"]).refused(3, str(own["captions"]), "No such file")
    assert not (root / "own").exists()


def test_neither_videos_nor_captions_named(run: Run) -> None:
    """A first run without any key has to learn both of them."""
    run(prepare.run, "data.benchmark=folder").refused(2, "data.videos and data.captions are empty")


def test_videos_without_captions(run: Run, own: dict[str, Any], root: Path) -> None:
    """They can be prepared and extracted; what needs captions says so once, and nothing else first."""
    settings = (*own["overrides"], "name=silent", "data.captions=")
    answer = run(prepare.run, *settings)
    assert answer.status == 0
    assert "data.captions is empty" in answer.stderr
    assert json.loads(answer.stdout)["counts"]["train"] == {"videos": 2, "captions": 0}
    for step in (train, evaluate):
        run(step.run, *settings).refused(3, "manifest.parquet", "have no captions", "data.captions=FILE")
    assert [path.name for path in (root / "silent").iterdir() if path.name != "prepare"] == [
        "manifest.parquet"
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.csv", 'video,caption\ncat.mp4,"a cat\ndog.mp4,a dog of 5"\n', ("line 2", "holds line 3")),
        ("c.csv", "video,captions\ncat.mp4,\"['a' 'b']\"\n", ("not a list of texts", "line 2")),
        ("c.json", '{"video": ["cat.mp4"], "caption": ["x", "y"]}', ("with other rows (1 and 2)",)),
        ("c.csv", "video,caption\ncat.mp4,\u200b\n", ("blank caption", "line 2")),
        ("c.csv", "video,caption\ncat.mp4,tr\xe8s\n".encode("cp1252"), ("not UTF-8", "0xe8", "line 2")),
    ],
)
def test_captions_that_could_be_misread(
    name: str, content: str | bytes, words: tuple[str, ...], run: Run, own: dict[str, Any], root: Path
) -> None:
    """Each gave other captions than were meant, with exit status 0."""
    captions = own["captions"].with_name(name)
    captions.write_bytes(content if isinstance(content, bytes) else content.encode())
    run(prepare.run, *own["overrides"], f"data.captions={captions}").refused(3, name, *words)
    assert not (root / "own").exists()


def test_empty_folder(run: Run, own: dict[str, Any], root: Path) -> None:
    """A mount that did not come up looks like this."""
    own["captions"].write_text("video,caption\ncat.mp4,a cat\n")
    for file in own["videos"].iterdir():
        file.unlink()
    run(prepare.run, *own["overrides"]).refused(3, str(own["videos"]), "is empty")
    assert not (root / "own").exists()


def test_caption_without_video(run: Run, own: dict[str, Any], root: Path) -> None:
    """What was asked for cannot be done; the row and the nearest name help to find why."""
    own["captions"].write_text("video,caption\ncat.mp4,a cat\ndgo.mp4,a dog\n")
    run(prepare.run, *own["overrides"]).refused(3, "'dgo.mp4'", "line 3", "nearest: 'dog.mp4'")
    assert not (root / "own").exists()


def test_video_without_caption_is_a_warning(run: Run, own: dict[str, Any], root: Path) -> None:
    """People caption a part of a folder; they must be told, not stopped."""
    own["captions"].write_text("video,caption,split\ncat.mp4,a cat,train\n")
    answer = run(prepare.run, *own["overrides"], "name=partly")
    assert answer.status == 0
    assert '"left_out": 1' in answer.stdout
    assert "dog.mp4" in answer.stderr


def test_duplicate_ids(run: Run, own: dict[str, Any], root: Path) -> None:
    """Two videos of one name must not get each other's captions."""
    for folder in ("one", "two"):
        (own["videos"] / folder).mkdir()
        (own["videos"] / folder / "bird.mp4").write_bytes(b"a bird")
    own["captions"].write_text("video,caption\nbird,a bird\n")
    run(prepare.run, *own["overrides"]).refused(3, "'bird'", "one/bird.mp4", "two/bird.mp4")
    assert not (root / "own").exists()


def test_checkpoint_of_another_model(
    run: Run, trained: dict[str, Any], places: Layout, tmp_path: Path
) -> None:
    """Scores of a model that is not the configured one would be reported under its name."""
    before = snapshot(places.run("first"))
    run(evaluate.run, "model.temporal_layers=2").refused(
        3, trained["checkpoint"], "model.temporal_layers was 1, is 2"
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(trained["checkpoint"]).iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[:2000])
    (broken / "config.yaml").write_bytes(Path(trained["checkpoint"], "config.yaml").read_bytes())
    run(evaluate.run, f"evaluate.checkpoint={broken}").refused(3, str(broken / "model.safetensors"))
    run(evaluate.run, f"evaluate.checkpoint={tmp_path}").refused(3, "is not a checkpoint", "trainer.pt")
    assert snapshot(places.run("first")) == before


def test_more_workers_than_the_cluster_has(run: Run, benchmark: dict[str, Any], places: Layout) -> None:
    """Ray would wait for a machine that never comes."""
    started = time.monotonic()
    answer = run(
        train.run,
        "train.run=many",
        "cluster.train_workers=64",
        "train.batch_size=64",
        "train.captions_per_video=0",
    )
    answer.refused(2, "cluster.train_workers", "64 workers of 0.5 CPU", "48 CPU, the cluster has 2")
    assert time.monotonic() - started < 60, "it waited"
    assert not Path(places.run("many")).exists()


def test_cpus_that_other_jobs_hold(run: Run, benchmark: dict[str, Any], places: Layout) -> None:
    """A shared cluster that is full must be told apart from one that is too small."""
    import ray  # not above: collecting must not fix its environment

    @ray.remote(num_cpus=1.5)
    class Other:
        def here(self) -> bool:
            return True

    other = Other.remote()
    assert ray.get(other.here.remote())
    try:
        answer = run(train.run, "train.run=late", "cluster.wait_s=0")
    finally:
        ray.kill(other)
    answer.refused(4, "other jobs hold", "CPU", "cluster.wait_s")
    assert not Path(places.run("late")).exists()


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_tracking_server_that_does_not_answer(
    overwrite: str, run: Run, trained: dict[str, Any], places: Layout
) -> None:
    """It must fail before the work, not after it, and take nothing of an earlier run with it."""

    def outputs() -> dict[str, tuple[bytes, int]]:
        """All but the record of who had the locks."""
        found = snapshot(places.data).items()
        return {
            name: file for name, file in found if not name.startswith(("run-locks/", "evaluation-locks/"))
        }

    before = outputs()
    name = "train.run=untracked" if overwrite == "false" else "train.run=first"
    answer = run(train.run, name, "tracking.uri=http://127.0.0.1:9", f"train.overwrite={overwrite}")
    answer.refused(4, "tracking.uri", "127.0.0.1:9", "start the server")
    answer = run(train.run, name, "tracking.uri=http://user:secret@127.0.0.1:9")
    answer.refused(2, "tracking.uri", "http://***@127.0.0.1:9", "MLFLOW_TRACKING_PASSWORD")
    assert "secret" not in answer.stderr
    run(evaluate.run, "tracking.uri=http://127.0.0.1:9").refused(4, "127.0.0.1:9")
    assert outputs() == before


def test_fewer_pairs_than_a_batch(run: Run, benchmark: dict[str, Any], places: Layout) -> None:
    """Found before workers are started."""
    run(train.run, "train.run=large", "train.batch_size=512").refused(3, "24 text-video pairs", "512")
    assert not Path(places.run("large")).exists()


def test_split_without_videos(run: Run, benchmark: dict[str, Any]) -> None:
    """An empty gallery has no scores."""
    assert layout(tiny()).manifest  # the benchmark is there
    run(evaluate.run, "evaluate.checkpoint=/nowhere").refused(3, "/nowhere", "there is no checkpoint")
