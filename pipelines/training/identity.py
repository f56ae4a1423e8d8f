"""The identity of a training: the settings and data by which it is resumed, or found again."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from cluster.layout import absolute, layout
from gare.config import Config, differences
from gare.config.run_settings import completed_settings
from gare.data.splits import StoredSplits, read_splits
from gare.data.store.contents import Store
from gare.errors import DataError
from gare.retrieval.results.evaluation import runs_of
from gare.storage.run_folder import RunFolder
from gare.train.input.randaugment import POLICY

#: Settings of a training that name it and its start, and the precision, which is saved as it was resolved.
_NAMES = ("run", "start_from", "precision")
#: Records of runs read at a time, since an object store answers each in tens of milliseconds.
_READS = 16


def with_absolute_paths(config: Config) -> Config:
    """Returns the configuration with absolute paths of weights, which identify a run from any folder."""
    named = {key: absolute(getattr(config.train, key)) for key in ("clip_weights", "start_from")}
    train = config.train.model_copy(update=named)
    features = config.features.model_copy(update={"weights": absolute(config.features.weights)})
    return config.model_copy(update={"train": train, "features": features})


def identity_of(config: Config, splits: StoredSplits) -> dict[str, Any]:
    """Returns the settings and data that identify a run."""
    return {"settings": _settings_of(config), **_data_of(splits)}


def _settings_of(config: Config) -> dict[str, Any]:
    settings = config.identity()
    # Sampling or not is part of the identity, whichever key decides it: in earlier versions auto depended on
    # a memory setting.
    sampled = config.loss.samples_texts(config.train.batch_size, config.model.clip.embed_dim)
    del settings["loss"]["direction_over"]
    settings["loss"]["direction_is_sampled"] = sampled
    if config.augment.is_on:
        # Earlier versions used another library's policy under the same settings.
        settings["augment"]["policy"] = POLICY
    return settings


def _data_of(splits: StoredSplits) -> dict[str, Any]:
    return {
        "manifest_fingerprint": splits.manifest_fingerprint,
        "store_fingerprint": splits.store_fingerprint,
        "clips": splits.hashes(),
    }


def read_identity(folder: RunFolder) -> dict[str, Any]:
    """Reads what a run saved of its identity, and its MLflow run; its settings as this version saves them."""
    saved = folder.read_record()
    saved["settings"] = completed_settings(saved.get("settings", {}))
    if isinstance(loss := saved["settings"].get("loss"), dict):
        loss.pop("direction_over", None)
    return saved


def identity_differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lists how a saved identity differs from that of now, one line for each key."""
    lines = differences({key: saved.get(key) for key in now}, now)
    return [line.removeprefix("settings.") for line in lines]


class FinishedTrainings:
    """Find finished trainings by their settings and data, whatever their names are.

    Runs and data are read once: an instance knows those that were there at its first question.
    """

    def __init__(self) -> None:
        self._runs: dict[str, dict[str, list[RunFolder]]] = {}
        self._data: dict[str, dict[str, Any] | None] = {}

    def find(self, config: Config) -> Config | None:
        """Returns the settings of the first finished training by name that is the same but for names.

        Those of other names are the run and the one that it starts from, if that is the same, too.

        Args:
            config: of the training; nothing is found while its data are missing.
        """
        config = with_absolute_paths(config)
        data = self._data_set(config)
        if data is None:
            return None
        for folder in self._finished(config).get(_key({"settings": _settings_of(config), **data}), []):
            if config.train.precision in ("auto", _train_settings(folder)["precision"]):
                return renamed(config, folder)
        return None

    def _finished(self, config: Config) -> dict[str, list[RunFolder]]:
        """Returns the finished runs of a data set by their keys."""
        if config.name not in self._runs:
            places = layout(config)
            names = [name.partition("/")[2] for name in runs_of(places.root, config.name)]
            folders = [RunFolder(places.run(name)) for name in names]
            found: dict[str, list[RunFolder]] = {}
            with ThreadPoolExecutor(_READS) as pool:
                for folder, key in zip(folders, pool.map(_key_of_finished, folders), strict=True):
                    if key:
                        found.setdefault(key, []).append(folder)
            self._runs[config.name] = found
        return self._runs[config.name]

    def _data_set(self, config: Config) -> dict[str, Any] | None:
        """Returns what identifies the data of a training; None while they are missing or not complete."""
        places = layout(config)
        is_of_features = config.train.input == "features"
        store = places.features if is_of_features else places.frames
        if store not in self._data:
            self._data[store] = None
            with suppress(DataError):  # prepare and extract say what is wrong
                # A feature store's settings have the hash of towers; a training checks them itself.
                settings = Store(store).read_meta().settings if is_of_features else None
                self._data[store] = _data_of(read_splits(places.manifest, store, config.extract, settings))
        return self._data[store]


def renamed(config: Config, folder: RunFolder) -> Config:
    """Returns the settings of a finished training under its own name, and that of its start."""
    names = {"run": folder.name.partition("/")[2], "start_from": _train_settings(folder)["start_from"]}
    return config.model_copy(update={"train": config.train.model_copy(update=names)})


def _train_settings(folder: RunFolder) -> dict[str, Any]:
    settings: dict[str, Any] = read_identity(folder)["settings"]["train"]
    return settings


def _key(identity: dict[str, Any]) -> str:
    """Returns a hash of an identity without names, and without the precision, which may be auto."""
    train = {key: value for key, value in identity["settings"]["train"].items() if key not in _NAMES}
    train["start"] = _key_of_start(identity["settings"]["train"]["start_from"])
    kept = {key: value for key, value in identity.items() if key != "mlflow_run_id"}
    kept["settings"] = identity["settings"] | {"train": train}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _key_of_finished(folder: RunFolder) -> str:
    """Returns the key of a finished run; empty for another folder, or one with a damaged record."""
    with suppress(DataError):
        return _key(read_identity(folder)) if folder.has_begun and folder.is_finished else ""
    return ""


def _key_of_start(checkpoint: str) -> str:
    """Returns what identifies the weights that a run starts from: if they are a run's best, its key."""
    folder = RunFolder(checkpoint.rpartition("/")[0])
    return (checkpoint == folder.best and _key_of_finished(folder)) or checkpoint
