"""Records of a study's finished runs, and of those of other studies that are the same trainings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster.layout import absolute, layout
from gare.config import Config
from gare.data.splits import read_splits, split_hash_of
from gare.data.store.contents import Store
from gare.errors import ConfigError, DataError
from gare.storage.files import exists, join, json_sha256, list_files, read_json, stat_file, write_json
from gare.storage.run_folder import RESULT, RunFolder
from gare.study.plan import PlannedRun, as_typed

#: A finished run: digest, evaluation, metrics, MLflow run and seconds, and what other studies must know.
Record = dict[str, Any]

#: Sections of settings that a training depends on in any way.
_SECTIONS = ("name", "data", "extract", "features", "model", "loss", "train", "augment")
#: But for the run's name, what to do with a run of that name, and paths, whose files are compared.
_NOT_COMPARED = ("run", "overwrite", "resume", "start_from", "clip_weights")
#: Keys of a training's own record that identify its data.
_DATA = ("manifest_fingerprint", "store_fingerprint", "clips")
#: Keys of a run's record by which other studies can take it; records of earlier versions lack some.
_COMPARABLE = {"evaluation", "metrics", "training_digest", "run_digest", "scoring_digest", "precision"}
#: Records read at a time, since an object store answers each in tens of milliseconds.
_READS = 16


@dataclass(frozen=True)
class _Data:
    """Identity of the data of trainings, and hashes of the splits that they are scored on."""

    identity: dict[str, Any]
    split_hashes: dict[str, str]


class StudyRecords:
    """Keeps a small file for each finished run of a study, so that any number can end at the same time.

    Args:
        studies: folder of all studies of a data set.
        name: of the study.
    """

    def __init__(self, studies: str, name: str) -> None:
        self._studies = studies
        self.uri = join(studies, name)
        self._data: dict[str, _Data | None] = {}

    def _file(self, run: PlannedRun) -> str:
        return join(self.uri, "runs", f"{run.cell.name}-seed{run.seed}.json")

    def is_done(self, run: PlannedRun) -> bool:
        """Returns True if a run's result is there.

        Raises:
            ConfigError: if it was made with other settings.
        """
        if not (record := self.read(run)):
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
        trained = training_of(result).read_record()
        precision = trained.get("settings", {}).get("train", {}).get("precision")
        split_hash = read_json(join(result["evaluation"], RESULT)).get("split_hash")
        about = {}
        if precision and split_hash and trained.keys() >= set(_DATA):  # else of an earlier version
            about = {
                "training_digest": self._digest_of_training(run, {key: trained[key] for key in _DATA}),
                "run_digest": json_sha256(trained),
                "scoring_digest": _digest_of_scoring(run, split_hash),
                "precision": precision,
            }
        write_json(self._file(run), {"digest": run.digest, **about, **result})

    def read(self, run: PlannedRun) -> Record:
        """Returns a run's record, with ``taken_from`` if its training is another's; empty if none."""
        return dict(read_json(self._file(run))) if exists(self._file(run)) else {}

    def seconds(self, runs: Sequence[PlannedRun]) -> list[float]:
        """Returns the seconds of the runs that are done, but for those that were taken."""
        records = [self.read(run) for run in runs]
        return [record["seconds"] for record in records if record and not record.get("taken_from")]

    def find_same(
        self, runs: Sequence[PlannedRun], precision_of: Callable[[Config], str]
    ) -> list[tuple[PlannedRun, Record]]:
        """Finds trainings of other runs with the same settings, seeds, starts and data.

        They were scored as the runs would be, which does not matter for runs that others start from.

        Args:
            runs: those that are not done, after those that they start from; for one that has begun under its
                own name nothing is found.
            precision_of: returns the precision that auto stands for; empty: any is the same.

        Returns:
            The runs for which there is one, with the first record by name.
        """
        others = self._read_comparable()
        found: list[tuple[PlannedRun, Record]] = []
        for run in runs if others else ():
            data = self._data_of(run.config)
            if data is None or RunFolder(layout(run.config).run(run.name)).has_begun:
                continue
            starts = {one.name: record for one, record in found}
            training = self._digest_of_training(run, data.identity, starts)
            scoring = _digest_of_scoring(run, data.split_hashes[run.config.evaluate.split])
            for record in others.get(training, ()):
                is_scored = run.cell.is_start or record["scoring_digest"] == scoring
                precision = precision_of(run.config) if run.config.train.precision == "auto" else ""
                if is_scored and precision in ("", record["precision"]) and _is_whole(record):
                    found.append((run, record))
                    break
        return found

    def take(self, run: PlannedRun, record: Record) -> str:
        """Records the training of another run as a run's; returns the other's name."""
        name = training_of(record).name.partition("/")[2]
        write_json(self._file(run), {**record, "digest": run.digest, "taken_from": name})
        return name

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
                found.setdefault(str(record["training_digest"]), []).append(record)
        return found

    def _data_of(self, config: Config) -> _Data | None:
        """Returns what identifies the data of a training; None while they are missing or not complete."""
        places, of_features = layout(config), config.train.input == "features"
        store = places.features if of_features else places.frames
        if store not in self._data:
            self._data[store] = None
            with suppress(DataError):  # prepare and extract say what is wrong
                # A training checks a feature store's settings, of which one is the hash of the towers.
                settings = Store(store).read_meta().settings if of_features else None
                splits = read_splits(places.manifest, store, config.extract, settings)
                hashes = splits.hashes() | {"test": split_hash_of(splits.test)}
                self._data[store] = _Data(splits.identity(), hashes)
        return self._data[store]

    def _digest_of_training(
        self, run: PlannedRun, data: Mapping[str, Any], starts: Mapping[str, Record] | None = None
    ) -> str:
        """Hashes all that a training depends on in any way: settings, its start, and its data.

        Args:
            run: planned or done.
            data: what identifies the data.
            starts: records, by run, of starts that this study has not taken yet.
        """
        config = run.config
        content: dict[str, Any] = config.model_dump(mode="json", include=set(_SECTIONS))
        # A study may be about any setting, such as the number of workers.
        content["cell"] = {
            key: as_typed(value)
            for key, value in run.cell.settings.items()
            if key.partition(".")[0] not in (*_SECTIONS, "evaluate")
        }
        for key in _NOT_COMPARED:
            del content["train"][key]
        del content["features"]["weights"]
        content["weights"] = [_files_of(config.train.clip_weights), _files_of(config.features.weights)]
        if run.start is None:
            content["start"] = _files_of(config.train.start_from)
        else:
            start = self.read(run.start) or (starts or {}).get(run.start.name, {})
            # Of one that is not made yet nothing is the same.
            content["start"] = [start.get(key, run.start.name) for key in ("training_digest", "precision")]
        return json_sha256({**content, **data})


def training_of(record: Record) -> RunFolder:
    """Returns the folder of the training that a record is of: another run's if it was taken from there."""
    return RunFolder.of_evaluation(record["evaluation"])


def _files_of(uri: str) -> list[Any]:
    """Returns the files of weights with their sizes and times, which change where they are replaced."""
    if not uri:
        return []
    place = absolute(uri)
    return [(file, stat_file(file)) for file in list_files(place, recursive=True) or [place]]


def _digest_of_scoring(run: PlannedRun, split_hash: str) -> str:
    return json_sha256([run.config.evaluate.model_dump(mode="json"), split_hash])


def _is_whole(record: Record) -> bool:
    """Returns True if a record's run is there, and was neither trained anew nor scored otherwise since."""
    result = join(record["evaluation"], RESULT)
    if not exists(result):
        return False
    if not record.keys() >= _COMPARABLE:
        return True
    with suppress(DataError, TypeError, ValueError, AttributeError):  # a damaged file
        trained = training_of(record).read_record()
        scores = read_json(result)["metrics"]
        same_scores = all(scores.get(name) == value for name, value in record["metrics"].items())
        return same_scores and record["run_digest"] == json_sha256(trained)
    return False
