"""The loop of one worker, on a real store and real captions, from first step to last and after a restart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gare.config import Config
from gare.data.manifest import Manifest, read_manifest, write_manifest
from gare.data.splits import StoredSplits, read_splits
from gare.data.store.contents import FAILURE_SCHEMA, write_part
from gare.errors import DataError, GareError
from gare.model.gare import GARE
from gare.storage.files import read_json, write_json
from gare.train.callback import Callback
from gare.train.checkpoint import history as history_module
from gare.train.checkpoint.files import restore_learner, save_checkpoint
from gare.train.checkpoint.history import MAX_PARTS, History
from gare.train.input.feed import Feed
from gare.train.input.inputs import FrameInput
from gare.train.input.loader import WorkerBatches
from gare.train.input.plan import plan_run
from gare.train.loop import run_loop
from gare.train.step import Learner, build_learner
from gare.train.validation import Validation
from tests.helpers.manifests import rows_of_splits
from tests.helpers.stores import describe_store, failure_row, write_store
from tests.helpers.tiny import tiny_config


@dataclass
class Places:
    """A data set: 9 videos for training, 3 for val and 2 for test, the first of test not in the store."""

    config: Config
    manifest: str
    store: str

    def splits(self) -> StoredSplits:
        return read_splits(self.manifest, self.store, self.config.extract)


@pytest.fixture
def places(tmp_path: Path, rng: np.random.Generator, seed: int) -> Places:
    config = tiny_config("model.clip.vocab_size=49408", f"train.seed={seed}")
    rows = rows_of_splits({"train": 9, "val": 3, "test": 2})
    manifest, store = str(tmp_path / "manifest.parquet"), str(tmp_path / "frames")
    write_manifest(Manifest(rows, benchmark="folder", protocol="own"), manifest)
    write_store(store, config.extract, [row.video_id for row in rows if row.video_id != "test0"], rng)
    write_part(store, "failures", [failure_row("test0")], FAILURE_SCHEMA)
    return Places(config, manifest, store)


@dataclass
class Seen(Callback):
    """Follower that keeps what the loop reported, and saves the checkpoints that are wanted."""

    learner: Learner
    folder: Path
    first_epoch: int
    wanted: frozenset[str] = frozenset()
    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    epochs: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def on_step(self, step: int, values: dict[str, float]) -> None:
        assert {"time/step_s", "time/data_wait_s", "time/data_jpeg_s", "train/grad_norm"} <= values.keys()
        self.steps.append(step)
        self.losses.append(values["loss/total"])
        self.save(f"step{step}", self.first_epoch + len(self.epochs))

    def on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        self.epochs.append((epoch, metrics))
        self.save(str(epoch), epoch)

    def save(self, name: str, epoch: int) -> None:
        if name in self.wanted:
            save_checkpoint(str(self.folder / name), self.learner, epoch)


class Ordered(Callback):
    """Follower that notes who was called, and counts the callbacks before it in the shared values."""

    def __init__(self, calls: list[tuple[str, str, float]], name: str) -> None:
        self.calls, self.name = calls, name

    def note(self, event: str, shared: dict[str, float]) -> None:
        self.calls.append((event, self.name, shared.get("before", 0)))
        shared["before"] = shared.get("before", 0) + 1

    def on_step(self, step: int, values: dict[str, float]) -> None:
        self.note("step", values)

    def on_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        self.note("epoch", metrics)

    def on_finish(self) -> None:
        self.note("finish", {})


def train(
    places: Places,
    seed: int,
    folder: Path,
    start: str = "",
    clips: int | None = None,
    more: Sequence[Callback] = (),
    saved: Iterable[str] = (),
) -> Seen:
    """Runs the loop; saves the named checkpoints; starts from one, or stops the stream early."""
    splits, config = places.splits(), places.config
    rows = {"train": splits.train, "val": splits.val}
    plan = plan_run([len(row.captions) for row in splits.train], 3, config.train, rank=0, world_size=1)
    torch.manual_seed(seed)
    learner = build_learner(GARE(config.model), config, plan.num_steps, torch.device("cpu"))
    epoch = restore_learner(start, learner) if start else 0
    first = plan.position(epoch, learner.step)
    listed = WorkerBatches(plan, {split: [row.video_id for row in some] for split, some in rows.items()})
    source, device = FrameInput(config, places.store), torch.device("cpu")
    loader = source.loader(listed, source.shared_data(splits), device, learner.model)()
    sizes = [len(batch.videos) for batch in plan.batches]
    seen = Seen(learner, folder, epoch, frozenset(saved))

    def stream() -> Iterator[dict[str, np.ndarray]]:
        for number in range(first, len(sizes))[:clips]:
            # In chunks, as several loaders share a batch.
            for start in range(0, sizes[number], 4):
                yield loader(number, start, min(start + 4, sizes[number]))

    feed, validation = Feed(stream(), sizes[first:], device), Validation(learner.model, device)
    run_loop(learner, listed, first, source, feed, validation, [seen, *more])
    return seen


def test_a_run_and_its_continuation(places: Places, seed: int, tmp_path: Path) -> None:
    """A preempted job that goes on from its last epoch must end as if nothing had happened, to the bit."""
    whole = train(places, seed, tmp_path / "whole", saved=["1"])
    # 18 captions in batches of 6, three epochs.
    assert whole.steps == list(range(1, 10))
    assert [done for done, _ in whole.epochs] == [1, 2, 3]
    for _, metrics in whole.epochs:
        assert metrics["val/t2v/R5"] == 100
        assert 1 <= metrics["val/t2v/MnR"] <= 3
    continued = train(places, seed + 1, tmp_path / "continued", start=str(tmp_path / "whole" / "1"))
    assert continued.steps == whole.steps[3:]
    assert continued.losses == whole.losses[3:]
    assert continued.epochs == whole.epochs[1:]
    assert train(places, seed, tmp_path / "again").losses == whole.losses


def test_a_continuation_within_an_epoch(
    places: Places, seed: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Epochs take hours: a job preempted within one goes on from the batch that comes next, to the bit."""
    steps = sorted(rng.choice(np.arange(1, 9), 3, replace=False))
    whole = train(places, seed, tmp_path / "whole", saved=[f"step{step}" for step in steps])
    for step in steps:
        start = str(tmp_path / "whole" / f"step{step}")
        continued = train(places, seed + 1, tmp_path / "continued", start=start)
        assert continued.steps == whole.steps[step:], step
        assert continued.losses == whole.losses[step:], step
        # The validation after an epoch's last step is done again where the checkpoint was taken before it.
        assert continued.epochs == whole.epochs[(step - 1) // 3 :], step


def test_callbacks_are_called_in_their_order(places: Places, seed: int, tmp_path: Path) -> None:
    """Else a checkpoint lacks the metrics of its own step, or workers wait for each other for ever."""
    calls: list[tuple[str, str, float]] = []
    train(places, seed, tmp_path, more=[Ordered(calls, "first"), Ordered(calls, "last")])
    step = [("step", "first", 0), ("step", "last", 1)]
    epoch = [("epoch", "first", 0), ("epoch", "last", 1)]
    assert calls == [*(3 * step + epoch) * 3, ("finish", "last", 0), ("finish", "first", 0)]


def test_a_stream_that_ends_early_is_an_error(places: Places, seed: int, tmp_path: Path) -> None:
    """A loader that loses clips must not end the training as if it were done."""
    with pytest.raises(GareError, match="ended before batch 5 of 12"):
        train(places, seed, tmp_path, clips=4)


def test_splits_are_what_the_store_holds(places: Places) -> None:
    """A video that failed to decode is left out of training, and said; the rest keeps its split."""
    splits = places.splits()
    assert splits.missing == ("test0",)
    assert [len(splits.of_split(name)) for name in ("train", "val", "test")] == [9, 3, 1]
    assert [row.video_id for row in splits.val] == ["val0", "val1", "val2"]


def test_an_incomplete_store_is_refused(places: Places) -> None:
    """Training on the half that an interrupted extraction left would be reported as the whole."""
    describe_store(places.store, places.config.extract, complete=False)
    with pytest.raises(DataError, match="of 14 videos it holds 13, 1 failed"):
        places.splits()


def test_a_manifest_that_has_grown_is_refused(places: Places) -> None:
    """Videos that extraction never saw would be left out without a reason."""
    manifest = read_manifest(places.manifest)
    new = replace(manifest.rows[0], video_id="new")
    write_manifest(replace(manifest, rows=(*manifest.rows, new)), places.manifest)
    with pytest.raises(DataError, match="of 15 videos it holds 13, 1 failed"):
        places.splits()


def test_a_store_of_other_settings_is_refused(places: Places) -> None:
    """The pictures would not be those that the configuration, and MLflow, say."""
    other = places.config.extract.model_copy(update={"sample_fps": 9.0})
    with pytest.raises(DataError, match=r"sample_fps is 1\.0 in the store and 9\.0"):
        read_splits(places.manifest, places.store, other)


def test_history_forgets_what_a_restart_does_again(tmp_path: Path) -> None:
    """Else curves would run twice over the steps between the last checkpoint and the interruption."""
    uri = str(tmp_path / "runs" / "history.json")
    history = History.read(uri)
    for step in range(1, 6):
        history.add_step(step, {"loss/total": 1 / step})
    history.add_epoch(1, {"val/t2v/R1": 10.0})
    history.add_epoch(2, {"val/t2v/R1": 20.0})
    history.save()
    whole = History.read(uri)
    assert (whole.steps, whole.epochs) == (history.steps, history.epochs)
    resumed = History.read(uri, step=3, epoch=1)
    assert [step for step, _ in resumed.steps["loss/total"]] == [1, 2, 3]
    assert resumed.epochs == {"val/t2v/R1": [(1, 10.0)]}
    started_over = History.read(uri, step=0, epoch=0)
    assert not any(started_over.steps.values())


def test_history_grows_by_what_is_new(tmp_path: Path, rng: np.random.Generator) -> None:
    """Written whole at each checkpoint, a long run's record would hold up training for seconds each time."""
    uri = str(tmp_path / "history.json")
    history, step, sizes = History.read(uri), 0, []
    for number in range(2 * MAX_PARTS):
        for _ in range(int(rng.integers(0, 4))):
            step += 1
            history.add_step(step, {"loss/total": 1 / step, **({"odd": 1.0} if step % 3 else {})})
        if number % 7 == 0:
            history.add_epoch(number, {"val/t2v/R1": float(number)})
        before = {path.name for path in (tmp_path / "history").glob("*")}
        held = history.copy()
        history.add_step(step + 1, {"not": 1.0})
        held.save()
        del history.steps["not"]
        added = [path for path in (tmp_path / "history").glob("*") if path.name not in before]
        sizes += [path.stat().st_size for path in added]
        found = History.read(uri)
        assert (found.steps, found.epochs) == (held.steps, held.epochs)
    assert max(sizes) < 400
    assert len(list((tmp_path / "history").iterdir())) <= MAX_PARTS
    # A run that continues forgets what it does again, and then goes on.
    back = History.read(uri, step=step - 2, epoch=6)
    back.resumed = [step - 2]
    for later in range(step - 1, step + 3):
        back.add_step(later, {"loss/total": 2.0})
        back.save()
        again = History.read(uri)
        assert (again.steps, again.epochs, again.resumed) == (back.steps, back.epochs, back.resumed)
    # What ends writes all into the one file.
    whole = History.read(uri)
    whole.save()
    tree = read_json(uri)
    assert {name: [tuple(at) for at in points] for name, points in tree["steps"].items()} == back.steps
    assert list((tmp_path / "history").iterdir()) == []


def test_history_survives_a_kill_and_reads_the_old_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point that is there twice or not at all would bend the curves of a run that was killed."""
    uri = str(tmp_path / "history.json")
    write_json(uri, {"steps": {"loss/total": [[1, 0.5]]}, "epochs": {"val/t2v/R1": [[1, 3.0]]}})
    history = History.read(uri)
    assert (history.steps, history.epochs) == ({"loss/total": [(1, 0.5)]}, {"val/t2v/R1": [(1, 3.0)]})
    for step in (2, 3, 4):
        history.add_step(step, {"loss/total": 0.5})
        history.save()

    def killed(uri: str) -> None:
        raise KeyboardInterrupt

    expected = history.steps
    with monkeypatch.context() as patch:
        patch.setattr(history_module, "delete_file", killed)
        with pytest.raises(KeyboardInterrupt):
            History.read(uri).save()
    assert len(list((tmp_path / "history").iterdir())) == 2
    assert History.read(uri).steps == expected
    continued = History.read(uri, step=3, epoch=1)
    continued.add_step(4, {"loss/total": 0.1})
    continued.save()
    assert History.read(uri).steps["loss/total"] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.1)]
