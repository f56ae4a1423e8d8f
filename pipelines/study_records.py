"""Records of a study's finished runs, and of those of other studies that are the same trainings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from cluster.layout import absolute, layout
from gare.config import Config
from gare.data.splits import read_splits
from gare.data.store.contents import Store
from gare.errors import ConfigError, DataError
from gare.storage.files import exists, join, list_files, read_json, write_json
from gare.storage.run_folder import RESULT, RunFolder
from gare.study.plan import PlannedRun

#: A finished run: digest, evaluation, metrics, MLflow run and seconds, and what other studies must know.
Record = dict[str, Any]

#: Sections of settings that a training depends on in any way.
_SECTIONS = ("name", "data", "extract", "features", "model", "loss", "train", "augment")
#: But for names, what to do with a run of that name, and the start, which is compared by its own digest.
_NOT_COMPARED = ("run", "overwrite", "resume", "start_from")
#: Keys of a training's own record that identify its data.
_DATA = ("manifest_fingerprint", "store_fingerprint", "clips")
#: Keys of a run's record by which other studies can take it; records of earlier versions lack some.
_COMPARABLE = {"evaluation", "training", "trained", "scoring", "precision"}
#: Records read at a time, since an object store answers each in tens of milliseconds.
_READS = 16


class StudyRecords:
    """Keeps a small file for each finished run of a study, so that any number can end at the same time.

    Args:
        studies: folder of all studies of a data set.
        name: of the study.
    """

    def __init__(self, studies: str, name: str) -> None:
        self._studies = studies
        self.uri = join(studies, name)
        self._data: dict[str, dict[str, Any]] = {}

    def _file(self, run: PlannedRun) -> str:
        return join(self.uri, "runs", f"{run.cell.name}-seed{run.seed}.json")

    def is_done(self, run: PlannedRun) -> bool:
        """Returns True if a run's result is there.

        Raises:
            ConfigError: if it was made with other settings.
        """
        if not (record := self._read(run)):
            return False
        if record["digest"] != run.digest:
            raise ConfigError(
                f"{run.name} was run with other settings",
                where=self.uri,
                accepted="a study file of another name, another name of the data set, or this folder deleted",
            )
        return _is_whole(record)

    def left_of(self, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
        """Returns the runs that are not done."""
        return [run for run in runs if not self.is_done(run)]

    def add(self, run: PlannedRun, result: dict[str, Any]) -> None:
        """Records that a run is done, with what other studies must know to take it."""
        trained = RunFolder.of_evaluation(result["evaluation"]).read_record()
        precision = trained.get("settings", {}).get("train", {}).get("precision")
        about = {}
        if precision and trained.keys() >= set(_DATA):  # else of an earlier version, and never taken
            about = {
                "training": self._digest_of_training(run, trained),
                "trained": _digest_of(trained),
                "scoring": _digest_of_scoring(run),
                "precision": precision,
            }
        write_json(self._file(run), {"digest": run.digest, **about, **result})

    def read(self, run: PlannedRun) -> Record:
        """Returns what is recorded of a run."""
        return dict(read_json(self._file(run)))

    def training_of(self, run: PlannedRun) -> RunFolder:
        """Returns the folder of a run's training: another study's if the run was taken from there."""
        record = self._read(run)
        own = RunFolder(layout(run.config).run(run.name))
        return RunFolder.of_evaluation(record["evaluation"]) if record.get("taken_from") else own

    def taken_from(self, run: PlannedRun) -> str:
        """Returns the name of the training that a run was taken from; empty if it is its own."""
        return str(self._read(run).get("taken_from", ""))

    def seconds(self, runs: Sequence[PlannedRun]) -> list[float]:
        """Returns the seconds of the runs that are done, but for those that were taken."""
        records = [self._read(run) for run in runs]
        return [record["seconds"] for record in records if record and not record.get("taken_from")]

    def find_same(
        self, runs: Sequence[PlannedRun], precision_of: Callable[[Config], str]
    ) -> list[tuple[PlannedRun, Record]]:
        """Finds trainings of other names with the same settings, seeds, starts and data.

        They were scored as the runs would be, which does not matter for runs that others start from.

        Args:
            runs: those that are not done; for one that has begun under its own name nothing is found.
            precision_of: returns the precision that auto stands for; empty: any is the same.

        Returns:
            The runs for which there is one, with the first record by name.
        """
        others = self._read_comparable()
        found = []
        for run in runs if others else ():
            if RunFolder(layout(run.config).run(run.name)).has_begun:
                continue
            training, scoring = self._digest_of_training(run), _digest_of_scoring(run)
            for record in others.get(training, ()):
                is_scored = run.cell.is_start or record["scoring"] == scoring
                precision = precision_of(run.config) if run.config.train.precision == "auto" else ""
                if is_scored and precision in ("", record["precision"]) and _is_whole(record):
                    found.append((run, record))
                    break
        return found

    def take(self, run: PlannedRun, record: Record) -> None:
        """Records a training of another name as a run's."""
        name = RunFolder.of_evaluation(record["evaluation"]).name.partition("/")[2]
        write_json(self._file(run), {**record, "digest": run.digest, "taken_from": name})

    def _read(self, run: PlannedRun) -> Record:
        return dict(read_json(self._file(run))) if exists(self._file(run)) else {}

    def _read_comparable(self) -> dict[str, list[Record]]:
        """Reads the records of all studies of the data set by training; leaves out damaged and older ones."""

        def read(file: str) -> Any:
            with suppress(DataError):
                return read_json(file)

        files = [one for one in list_files(self._studies, ".json", recursive=True) if "/runs/" in one]
        with ThreadPoolExecutor(_READS) as pool:
            records = list(pool.map(read, files))
        found: dict[str, list[Record]] = {}
        for record in records:
            if isinstance(record, dict) and record.keys() >= _COMPARABLE:
                found.setdefault(record["training"], []).append(record)
        return found

    def _data_of(self, config: Config) -> dict[str, Any]:
        """Returns what identifies the data of a training; empty while they are missing or not complete."""
        places, of_features = layout(config), config.train.input == "features"
        store = places.features if of_features else places.frames
        if store not in self._data:
            self._data[store] = {}
            with suppress(DataError):  # prepare and extract say what is wrong
                # A training checks a feature store's settings, of which one is the hash of the towers.
                settings = Store(store).read_meta().settings if of_features else None
                splits = read_splits(places.manifest, store, config.extract, settings)
                self._data[store] = splits.identity()
        return self._data[store]

    def _digest_of_training(self, run: PlannedRun, trained: Mapping[str, Any] | None = None) -> str:
        """Hashes all that a training depends on in any way: settings, its start, and its data.

        Args:
            run: planned or done.
            trained: record of the training that was done; None: the data as they are now.
        """
        settings = run.config.model_dump(mode="json", include=set(_SECTIONS))
        train = {key: value for key, value in settings["train"].items() if key not in _NOT_COMPARED}
        settings["train"] = train | {"clip_weights": absolute(run.config.train.clip_weights)}
        settings["features"]["weights"] = absolute(run.config.features.weights)
        if run.start is None:
            settings["start"] = absolute(run.config.train.start_from)
        else:
            settings["start"] = self._read(run.start).get("training") or self._digest_of_training(run.start)
        data = self._data_of(run.config) if trained is None else {key: trained[key] for key in _DATA}
        return _digest_of(settings | data)


def _digest_of_scoring(run: PlannedRun) -> str:
    return _digest_of(run.config.evaluate.model_dump(mode="json"))


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _is_whole(record: Record) -> bool:
    """Returns True if the training and the evaluation of a record are there, and were not made anew since."""
    if not exists(join(record["evaluation"], RESULT)):
        return False
    if "trained" not in record:
        return True
    with suppress(DataError):  # a damaged one; a training of that name says so
        return bool(
            record["trained"] == _digest_of(RunFolder.of_evaluation(record["evaluation"]).read_record())
        )
    return False
