"""The writer of a feature store's parts from a frame store.

If a storage does not answer, the writer waits, and then ends the run, without recording clips as failed. A
clip fails if its pictures in the frame store are damaged, or its features are not finite.

M clips, F frames, C captions, W words, D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from gare.config import FeaturesConfig
from gare.data.images import normalise
from gare.data.store.contents import FAILURE_SCHEMA, IDENTITY, write_part
from gare.data.store.feature_schema import feature_schema, feature_table, stored_frames
from gare.data.store.frame_reader import FrameReader
from gare.data.store.parts import is_content_fault, write_table
from gare.errors import ConfigError, DataError, without_secrets
from gare.extract.feature_update import Part
from gare.model.encoders.clip import ClipTowers, tower_text
from gare.model.encoders.compiled import cast_weights_once, compile_towers
from gare.model.encoders.tokenizer import tokenize
from gare.model.gare import GARE
from gare.storage.patience import PATIENCE_S, retry_until_answered

logger = logging.getLogger(__name__)

#: Captions that go through the text tower at once, for each clip that goes through the image tower.
CAPTIONS_PER_CLIP = 8
#: Largest finite float16, beyond which a feature cannot be stored.
LARGEST = float(np.finfo(np.float16).max)

T = TypeVar("T")
#: Frames (1, F, H, W, 3) uint8 and their mask (1, F).
Clip: TypeAlias = tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}


class FeatureMaker:
    """Encoder of clips and captions with a model's towers, which writes each group as one part.

    Args:
        frames_uri: the frame store.
        uri: the feature store.
        features: its settings.
        model: model whose towers, as a copy, encode on the model's device.
        run: mark that makes the names of this run's parts differ from those of other runs over the same
            clips.
        generation: of the lock that the run holds, see ``gare.storage.generations``.
        patience_s: seconds for which a storage that fails is tried again.

    Raises:
        ConfigError: for a model without towers, or if the compiler fails and ``features.compile`` is towers.
    """

    def __init__(
        self,
        frames_uri: str,
        uri: str,
        features: FeaturesConfig,
        model: GARE,
        run: str = "",
        generation: int = 0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.frames_uri, self.uri, self.features, self.run = frames_uri, uri, features, run
        self.generation, self.patience_s = generation, patience_s
        if not isinstance(model.towers, ClipTowers):
            raise ConfigError("the model has no towers", where="encode", accepted="a model that has them")
        self.kind = _DTYPES[features.precision]
        self.towers = cast_weights_once(model.towers, self.kind)
        self.device = model.logit_scale.device
        self.reader: FrameReader | None = None
        self.config = config = model.config
        num_words = config.max_words if features.words else 0
        self.schema = feature_schema(config.max_frames, config.clip.embed_dim, num_words)
        compile_towers(self.towers, features.compile, self.device, self._rehearse, key="features.compile")

    def write(self, part: Part) -> dict[str, int]:
        """Writes a part of ``FeatureStoreUpdate.parts``, after the last of its clips is encoded.

        Clips that the frame store no longer has are left out.

        Returns:
            Numbers of clips written, clips failed and frames encoded.

        Raises:
            DataError: if a store cannot be read or written for ``patience_s``.
        """
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        known = self._made_before(part)
        self._follow_the_store([row for row in part if row["video_id"] not in known])
        for first in range(0, len(part), self.features.batch):
            some = part[first : first + self.features.batch]
            frames = self._frames([row for row in some if row["video_id"] not in known], bad) | known
            made = self._with_texts(
                [row | frames[row["video_id"]] for row in some if row["video_id"] in frames]
            )
            for row in made:
                if reason := _unfit(row):
                    # Caused by the clip and the weights: the next attempt gives the same.
                    bad.append(_failure(row, "ValueError", reason, transient=False))
                else:
                    good.append(row)
        for failure in bad:
            logger.warning("%s: %s", failure["video_id"], failure["message"])
        # Failures first, as in extraction.
        group = [self.run, *(row["video_id"] for row in part)]
        if bad:
            self._retry(
                lambda: write_part(self.uri, "failures", bad, FAILURE_SCHEMA, group, self.generation),
                f"{self.uri} cannot be written",
            )
        if good:
            table = feature_table(good, self.schema)
            self._retry(
                lambda: write_table(self.uri, "data", table, group, generation=self.generation),
                f"{self.uri} cannot be written",
            )
        return {"written": len(good), "failed": len(bad), "frames": sum(row["num_frames"] for row in good)}

    @torch.inference_mode()
    def _frames(
        self, rows: Sequence[Mapping[str, Any]], bad: list[dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """Encodes clips to ``frames`` and ``num_frames`` by id; adds damaged clips to ``bad``."""
        clips: dict[str, Clip] = {}
        for row in rows:
            video_id = row["video_id"]
            found = self._retry(
                partial(self._clip, video_id), f"{self.frames_uri}: {video_id!r} cannot be read"
            )
            if isinstance(found, DataError):
                # The part may be made again from the same video: another attempt may find it sound.
                kind = type(found.__cause__ or found).__name__
                bad.append(_failure(row, kind, found.what, transient=True))
            elif found is None:
                logger.warning("%s: the frame store no longer holds it; it is left out", video_id)
            else:
                clips[video_id] = found
        if not clips:
            return {}
        pictures, masks = (np.concatenate(arrays) for arrays in zip(*clips.values(), strict=True))
        # Real frames are selected on the CPU: on a GPU it would mean waiting, and sending padded frames as
        # well.
        encoded = np.zeros((*masks.shape, self.config.clip.embed_dim), np.float16)
        encoded[masks] = self._encode(torch.from_numpy(pictures[masks]))
        counts = masks.sum(axis=1).tolist()
        rows_made = zip(clips, encoded, counts, strict=True)
        return {one: {"frames": frames, "num_frames": count} for one, frames, count in rows_made}

    def _encode(self, pictures: torch.Tensor) -> npt.NDArray[np.float16]:
        """Encodes pictures (K, H, W, 3) uint8 to features (K, D)."""
        with self._autocast():
            return _half(self.towers.encode_images(normalise(pictures.to(self.device))))

    @torch.inference_mode()
    def _rehearse(self) -> None:
        """Encodes blank pictures and captions, as many as a whole group of clips has."""
        clips, side = self.features.batch if self.device.type == "cuda" else 1, self.config.clip.image_size
        self._encode(torch.zeros(clips * self.config.max_frames, side, side, 3, dtype=torch.uint8))
        self._texts([""] * (CAPTIONS_PER_CLIP * clips))

    def _follow_the_store(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Has clips looked up again if they have moved, since the store changes meanwhile."""
        places = self.reader.places if self.reader else {}
        if any(places.get(row["video_id"], ("", 0))[0] != row["place"] for row in rows):
            self.reader = None

    def _clip(self, video_id: str) -> Clip | DataError | None:
        """Reads a clip from the frame store; returns its damage if damaged, None if it is gone.

        Raises:
            DataError: if the storage fails, or the part was merged into another meanwhile; the next call
                looks the clip up anew.
        """
        if self.reader is None:
            self.reader = FrameReader(self.frames_uri)
        if video_id not in self.reader.places:
            return None
        reader, self.reader = self.reader, None
        try:
            found: Clip | DataError = reader.read([video_id])
        except DataError as error:
            if not is_content_fault(error):
                raise  # and forget the reader, with the files that it holds open
            found = error
        self.reader = reader
        return found

    def _made_before(self, part: Part) -> dict[str, dict[str, Any]]:
        """Reads features of frames that the store has already, for the part's clips by id."""
        known: dict[str, dict[str, Any]] = {}
        for location in sorted({row["made"] for row in part if row["made"]}):
            ids = {row["video_id"] for row in part if row["made"] == location}
            made = self._retry(partial(_sound_frames, location), f"{location} cannot be read")
            known |= {key: frames for key, frames in made.items() if key in ids}
        return known

    def _retry(self, action: Callable[[], T], fault: str) -> T:
        return retry_until_answered(action, fault, self.patience_s)

    @torch.inference_mode()
    def _with_texts(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        texts = self._texts([text for row in rows for text in row["captions"]])
        ends = np.cumsum([len(row["captions"]) for row in rows])
        return [
            {**row, "uri": without_secrets(row["uri"])}
            | {name: values[end - len(row["captions"]) : end] for name, values in texts.items()}
            for row, end in zip(rows, ends, strict=True)
        ]

    def _texts(self, captions: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        width, num_words = self.config.clip.embed_dim, self.config.max_words
        # They give the shapes where no clip has a caption.
        parts: dict[str, list[npt.NDArray[Any]]] = {
            "text": [np.zeros((0, width), np.float16)],
            "num_tokens": [np.zeros(0, np.int32)],
            **({"words": [np.zeros((0, num_words, width), np.float16)]} if self.features.words else {}),
        }
        size = self.features.batch * CAPTIONS_PER_CLIP
        for first in range(0, len(captions), size):
            token_ids, mask = tokenize(captions[first : first + size], self.config.max_words)
            with self._autocast():
                text = tower_text(self.towers, token_ids.to(self.device), mask.to(self.device))
            lengths = mask.sum(dim=1).numpy().astype(np.int32)
            found: dict[str, npt.NDArray[Any]] = {"text": _half(text.embedding), "num_tokens": lengths}
            if self.features.words:
                assert text.words is not None
                found["words"] = _half(text.words)
            for name, values in found.items():
                parts[name].append(values)
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.kind, enabled=self.kind is not torch.float32)


def _sound_frames(location: str) -> dict[str, dict[str, Any]]:
    """Returns ``stored_frames`` of a part; empty if it is damaged, so that its clips are encoded again.

    Raises:
        DataError: if the storage does not answer.
    """
    try:
        return stored_frames(location)
    except DataError as error:
        if not is_content_fault(error):
            raise
        logger.warning("%s is damaged, its frames are encoded again: %s", location, error.what)
        return {}


def _half(values: torch.Tensor) -> npt.NDArray[np.float16]:
    return values.to(torch.float16).cpu().numpy()


def _unfit(made: Mapping[str, Any]) -> str:
    for name in ("frames", "text", "words"):
        if name in made and not np.isfinite(made[name]).all():
            return f"{name} features are not finite in float16, whose largest number is {LARGEST:g}"
    return ""


def _failure(row: Mapping[str, Any], kind: str, message: str, *, transient: bool) -> dict[str, Any]:
    return {
        "video_id": row["video_id"],
        "uri": without_secrets(row["uri"]),
        **{key: row[key] for key in IDENTITY},
        "stage": "encode",
        "error_type": kind,
        "message": message,
        "attempts": row["attempts"] + 1,
        "rules": row["rules"],
        "transient": transient,
    }
