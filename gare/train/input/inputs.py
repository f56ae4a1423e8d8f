"""The kinds of training input, frames, stored and imported features, with all steps in which runs differ.

A run chooses one of them at its start. The driver gets the store's settings and the initial model from it;
the workers get their model, loader and batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gare.config import Config
from gare.data.batch import Batch, FeatureBatch
from gare.data.images import crop_centre
from gare.data.splits import StoredSplits
from gare.data.store.contents import Store
from gare.data.store.feature_reader import FeatureReader
from gare.data.store.feature_schema import feature_settings, settings_of_imported
from gare.errors import ConfigError
from gare.model.gare import GARE
from gare.storage.files import join
from gare.train.checkpoint.files import copy_checkpoint, write_model
from gare.train.checkpoint.initial_model import initial_model, read_initial_model
from gare.train.input.augment_batch import augment_batch
from gare.train.input.feed import Tensors
from gare.train.input.loader import FeatureLoader, FrameLoader, Load, WorkerBatches, clip_seeds
from gare.train.input.plan import PlannedBatch
from gare.train.input.tokens import CaptionTokens
from gare.train.validation import Validation

#: Folder of a run with the initial model, which the driver writes for the workers.
START = "start"


class TrainInput(ABC):
    """Input of a training run.

    Args:
        config: of the run.
        store: store that the run learns from.
    """

    def __init__(self, config: Config, store: str) -> None:
        self.config, self.store = config, store

    def check_weights(self) -> None:
        """Builds the initial model, to find faults of its weights before anything is written; on the driver.

        Raises:
            CheckpointError, ConfigError: as ``initial_model``.
        """
        initial_model(self.config)

    def check_store(self) -> None:
        """Checks, before the first step, that the store was made from pictures of the model's size.

        Raises:
            ConfigError: for pictures of another size.
            DataError: where there is no store.
        """
        stored = Store(self.store).read_meta().settings.get("image_size")
        wanted = self.config.model.clip.image_size
        if stored != wanted:
            raise ConfigError(
                f"is {wanted}, and pictures are of {stored} px in the store {self.store}",
                where="model.clip.image_size",
                accepted=f"{stored}, with extract.image_size, or another store (name, storage.root)",
            )

    @property
    @abstractmethod
    def store_settings(self) -> dict[str, Any] | None:
        """Returns the settings that a feature store must have been made with; None for a frame store."""

    @abstractmethod
    def write_for_workers(self, folder: str) -> None:
        """Writes the files that workers need into the run's folder; on the driver."""

    @abstractmethod
    def shared_data(self, splits: StoredSplits) -> Any:
        """Computes, once per run on the driver, the data that all workers' loaders need; it is pickled."""

    @abstractmethod
    def worker_model(self, folder: str) -> GARE:
        """Builds the model that a worker starts from."""

    @abstractmethod
    def loader(
        self, worker_batches: WorkerBatches, shared: Any, device: torch.device, model: GARE
    ) -> Callable[[], Load]:
        """Returns a function that builds a loader, in this process or another.

        Args:
            worker_batches: batches of the worker.
            shared: from ``shared_data``.
            device: that the worker trains on.
            model: of the worker.
        """

    def local_loader(self, make: Callable[[], Load]) -> Load | None:
        """Returns a loader for the worker's own process if it costs next to nothing there; else None.

        Args:
            make: from ``loader``.
        """
        del make
        return None

    @abstractmethod
    def row_bytes(self, num_captions: int = 1) -> int:
        """Estimates the bytes of a loaded clip with ``num_captions`` captions."""

    def finish_batch(self, planned: PlannedBatch, tensors: Tensors) -> Tensors:
        """Does the work on a GPU that the loaders leave to it."""
        del planned
        return tensors

    @abstractmethod
    def batch(self, tensors: Mapping[str, Tensor]) -> Batch | FeatureBatch:
        """Builds a training batch from loaded tensors."""

    @abstractmethod
    def validate(self, validation: Validation, planned: PlannedBatch, tensors: Mapping[str, Tensor]) -> None:
        """Adds loaded clips to a validation."""

    @abstractmethod
    def copy_best(self, checkpoint: str, best: str, sums: Mapping[str, str]) -> None:
        """Copies the run's best checkpoint to a folder where any reader can use it; on the driver.

        Args:
            checkpoint: of the run.
            best: folder of the copy.
            sums: SHA-256 of its files, from the run's index; empty if the index has none.

        Raises:
            CheckpointError, DataError: as ``copy_checkpoint``.
        """


class FrameInput(TrainInput):
    """Input of frames from a frame store, from which the towers learn."""

    @property
    def store_settings(self) -> None:
        """Returns None: the store is a frame store."""

    def write_for_workers(self, folder: str) -> None:
        """Does nothing: each worker builds the initial model from the same seed and weights."""

    def shared_data(self, splits: StoredSplits) -> dict[str, CaptionTokens]:
        """Tokenises the captions of train and val."""
        max_words = self.config.model.max_words
        return {
            split: CaptionTokens.of([row.captions for row in splits.of_split(split)], max_words)
            for split in ("train", "val")
        }

    def worker_model(self, folder: str) -> GARE:
        """Builds the initial model from the run's seed and weights."""
        del folder
        return initial_model(self.config)

    def loader(
        self,
        worker_batches: WorkerBatches,
        shared: Mapping[str, CaptionTokens],
        device: torch.device,
        model: GARE,
    ) -> Callable[[], Load]:
        """Returns a builder of loaders that read frames and, without a GPU, augment them."""
        del model
        store, seed, augment = self.store, self.config.train.seed, self.config.augment
        on_gpu = self._augments_on(device)
        in_loader = augment if augment.is_on and not on_gpu else None
        whole = on_gpu and self.config.extract.crop == "none"
        return lambda: FrameLoader(store, worker_batches, shared, augment=in_loader, seed=seed, whole=whole)

    def row_bytes(self, num_captions: int = 1) -> int:
        """Estimates the bytes of the frames as uint8, whole ones as 16:9; tokens are negligible."""
        del num_captions
        model = self.config.model
        square = 3 * model.max_frames * model.clip.image_size**2
        return square * 16 // 9 if self.config.extract.crop == "none" else square

    def finish_batch(self, planned: PlannedBatch, tensors: Tensors) -> Tensors:
        """Augments training clips on a GPU, and then crops whole frames."""
        if planned.kind == "val" or not self._augments_on(tensors["frame_mask"].device):
            return tensors
        return self.augment_clips(planned, tensors)

    def _augments_on(self, device: torch.device) -> bool:
        """Returns True if clips are augmented, and on the device rather than by the loaders."""
        return self.config.augment.is_on and device.type == "cuda"

    def augment_clips(self, planned: PlannedBatch, tensors: Tensors) -> Tensors:
        """Augments the clips of a batch on their own device."""
        augment, seeds = self.config.augment, clip_seeds(self.config.train.seed, planned)
        if "pixels" in tensors:
            frames = self.augment_whole(tensors, seeds)
        else:
            frames = augment_batch(tensors["frames"], augment, seeds)
        return {name: tensor for name, tensor in tensors.items() if name != "pixels"} | {"frames": frames}

    def augment_whole(self, tensors: Tensors, seeds: Sequence[int]) -> Tensor:
        """Augments whole frames, clips of one size together, and crops their centres.

        Args:
            tensors: ``pixels``, ``sizes`` and ``frame_mask`` as ``FrameLoader`` loads them.
            seeds: of the m clips.

        Returns:
            (m, F, S, S, 3) uint8.
        """
        pixels, mask, size = tensors["pixels"], tensors["frame_mask"], self.config.extract.image_size
        sizes = [tuple(one) for one in tensors["sizes"].tolist()]
        starts = np.cumsum([0, *(3 * mask.shape[1] * height * width for height, width in sizes)])
        frames = pixels.new_empty(*mask.shape, size, size, 3)
        for height, width in sorted(set(sizes)):
            places = [place for place, one in enumerate(sizes) if one == (height, width)]
            clips = torch.stack([pixels[starts[at] : starts[at + 1]] for at in places])
            clips = clips.view(len(places), -1, height, width, 3)
            changed = augment_batch(clips, self.config.augment, [seeds[at] for at in places])
            for at, clip in zip(places, crop_centre(changed, size), strict=True):
                frames[at] = clip
        return frames

    def batch(self, tensors: Mapping[str, Tensor]) -> Batch:
        """Builds a batch of uint8 frames, which the objective normalises, and tokens."""
        return Batch(
            token_ids=tensors["token_ids"],
            token_mask=tensors["token_mask"],
            frames=tensors["frames"],
            frame_mask=tensors["frame_mask"],
            video_ids=tensors["video_ids"],
        )

    def validate(self, validation: Validation, planned: PlannedBatch, tensors: Mapping[str, Tensor]) -> None:
        """Encodes clips and all their captions."""
        validation.add(planned.videos.tolist(), tensors)

    def copy_best(self, checkpoint: str, best: str, sums: Mapping[str, str]) -> None:
        """Copies the checkpoint, which includes the towers."""
        copy_checkpoint(checkpoint, best, sums=sums)


class FeatureInput(TrainInput):
    """Input of stored features, from which the modules after the towers learn.

    The workers hold no towers: the driver writes them the initial model without towers. In the end it adds
    the towers to the best checkpoint, so that new captions and videos can be encoded with it.

    Args:
        config: of the run.
        store: the feature store.
        settings: that the store must have been made with, if known; otherwise they follow from the weights of
            the towers.
    """

    def __init__(self, config: Config, store: str, settings: dict[str, Any] | None = None) -> None:
        super().__init__(config, store)
        self._settings = settings

    @cached_property
    def initial_model(self) -> GARE:
        """Builds, once, the model that the run starts from.

        Raises:
            CheckpointError: for weights that cannot be used.
            ConfigError: if ``model.clip`` has other sizes than the weights.
        """
        return initial_model(self.config)

    @property
    def store_settings(self) -> dict[str, Any]:
        """Returns the settings of the store, including the hash of the towers."""
        if self._settings is None:
            from gare.model.encoders.clip import towers_sha256

            self._settings = feature_settings(self.config, towers_sha256(self.initial_model.towers))
        return self._settings

    def check_weights(self) -> None:
        """Builds the initial model and keeps it for later steps.

        Raises:
            CheckpointError, ConfigError: as ``initial_model``.
        """
        _ = self.initial_model

    def write_for_workers(self, folder: str) -> None:
        """Writes the initial model without its towers."""
        model = self.initial_model
        towers = model.towers
        model.drop_towers()
        try:
            write_model(join(folder, START), model)
        finally:
            model.towers = towers  # the checkpoint gets them in the end

    def shared_data(self, splits: StoredSplits) -> None:
        """Does nothing: the store has the captions' features."""

    def worker_model(self, folder: str) -> GARE:
        """Reads the initial model without towers, which the driver wrote."""
        return read_initial_model(join(folder, START), self.config.model)

    def loader(
        self, worker_batches: WorkerBatches, shared: Any, device: torch.device, model: GARE
    ) -> Callable[[], Load]:
        """Returns a builder of loaders that read features of clips and captions."""
        del shared, device
        store, words, cache_mb = self.store, model.scorer.needs_words, self.config.features.cache_mb
        return lambda: FeatureLoader(FeatureReader(store, words=words, cache_mb=cache_mb), worker_batches)

    def local_loader(self, make: Callable[[], Load]) -> Load | None:
        """Returns the loader if the store fits into ``features.cache_mb``, as it is then read only once."""
        loader = make()
        return loader if isinstance(loader, FeatureLoader) and loader.reader.whole else None

    def row_bytes(self, num_captions: int = 1) -> int:
        """Estimates the bytes of the features as float16."""
        model = self.config.model
        words = model.max_words if model.increment and model.context == "words" else 0
        return 2 * (model.max_frames + num_captions * (1 + words)) * model.clip.embed_dim

    def batch(self, tensors: Mapping[str, Tensor]) -> FeatureBatch:
        """Builds a batch of features of clips, each with one caption."""
        words = tensors.get("words")
        return FeatureBatch(
            tensors["text"][:, 0],
            None if words is None else words[:, 0],
            tensors["token_mask"][:, 0],
            tensors["frames"],
            tensors["frame_mask"],
            tensors["video_ids"],
        )

    def validate(self, validation: Validation, planned: PlannedBatch, tensors: Mapping[str, Tensor]) -> None:
        """Adds clips and all their captions."""
        validation.add_features(planned.videos.tolist(), tensors)

    def copy_best(self, checkpoint: str, best: str, sums: Mapping[str, str]) -> None:
        """Copies the checkpoint and adds the towers, so that it is like one of a run on frames."""
        copy_checkpoint(checkpoint, best, sums=sums, start=self.initial_model)


class ImportedInput(FeatureInput):
    """Input of imported features, which no towers of ours made.

    Args:
        config: of the run.
        store: the feature store.
        settings: that the store must have been made with, if known; otherwise those of the arrays in it.
    """

    def check_store(self) -> None:
        """Checks, before the first step, that the store holds imported features of the model's sizes.

        Raises:
            DataError: where there is no such store, with each setting that differs.
        """
        Store(self.store).read_meta_of(self.store_settings)

    @property
    def store_settings(self) -> dict[str, Any]:
        """Returns the settings of the store, including the hash of the arrays."""
        if self._settings is None:
            self._settings = settings_of_imported(self.store, self.config.model)
        return self._settings

    def copy_best(self, checkpoint: str, best: str, sums: Mapping[str, str]) -> None:
        """Copies the checkpoint, which has no towers to be added."""
        copy_checkpoint(checkpoint, best, sums=sums)


def input_of(
    config: Config, frames: str, features: str, settings: dict[str, Any] | None = None
) -> TrainInput:
    """Builds the input that ``train.input`` names.

    Args:
        config: of the run.
        frames: the frame store.
        features: the feature store.
        settings: of the feature store, if known.
    """
    if not config.has_towers:
        return ImportedInput(config, features, settings)
    if config.train.input == "features":
        return FeatureInput(config, features, settings)
    return FrameInput(config, frames)
