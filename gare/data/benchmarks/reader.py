"""Base of the readers of published benchmarks, and their result: the clips, and how they deviate."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gare.config.data import DataConfig
from gare.data.benchmarks.annotation_folder import AnnotationFolder
from gare.data.benchmarks.formats.annotations import Annotation
from gare.data.benchmarks.video_folder import without_ending
from gare.data.collected_errors import CollectedErrors, join_first
from gare.data.manifest import SPLITS
from gare.errors import DataError


@dataclass(frozen=True)
class PublishedSplit:
    """Published counts and checksums of a split.

    Attributes:
        videos: number of clips.
        captions: number of texts of all clips.
        ids_sha256: SHA-256 of the sorted ids, one a line; empty if the ids were not available.
        texts_sha256: SHA-256 of the texts; empty if they are not compared.
    """

    videos: int
    captions: int
    ids_sha256: str = ""
    texts_sha256: str = ""


@dataclass(frozen=True)
class Deviation:
    """A difference of the annotations from the published ones, or an oddity worth knowing.

    Attributes:
        what: in words.
        ids: ids of all clips concerned.
    """

    what: str
    ids: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what} ({len(self.ids)}): {'; '.join(self.ids)}"

    def to_json(self) -> dict[str, Any]:
        """Returns ``{"what", "count", "ids"}``."""
        return {"what": self.what, "count": len(self.ids), "ids": list(self.ids)}


@dataclass(frozen=True)
class BenchmarkClip:
    """One clip of a benchmark, before its file is found.

    Attributes:
        clip_id: its id, the same in every copy of the annotations.
        names: names that its video file may have, the most reliable first.
        split: train, val or test.
        captions: texts with normalised whitespace.
        start_s: seconds; None if the clip starts with its file.
        end_s: seconds; None if it ends with its file.
    """

    clip_id: str
    names: tuple[str, ...]
    split: str
    captions: tuple[str, ...]
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True)
class BenchmarkAnnotations:
    """All annotations of a benchmark, as read from its files.

    Attributes:
        benchmark: its name.
        protocol: the evaluation protocol, as a person would cite it.
        clips: sorted by id.
        published: the published counts of each split; a missing split has no clips.
        deviations: clips that were left out, repaired or differ from the published ones, by id.
        annotation_sha256: SHA-256 of every file that was read, by its name.
    """

    benchmark: str
    protocol: str
    clips: tuple[BenchmarkClip, ...]
    published: Mapping[str, PublishedSplit]
    deviations: tuple[Deviation, ...] = ()
    annotation_sha256: Mapping[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, dict[str, int]]:
        """Counts clips and texts of each split: ``{split: {"videos": …, "captions": …}}``."""
        counts = {split: {"videos": 0, "captions": 0} for split in SPLITS}
        for clip in self.clips:
            counts[clip.split]["videos"] += 1
            counts[clip.split]["captions"] += len(clip.captions)
        return counts

    def differences(self) -> list[str]:
        """Lists differences from the published counts, ids and texts, one line for each split."""
        lines = []
        for split, count in self.counts().items():
            published = self.published.get(split, PublishedSplit(0, 0))
            if published.videos and not count["videos"]:
                lines.append(f"no {split}")
                continue
            parts = [
                f"{count[what]} {what} for {number}"
                for what, number in (("videos", published.videos), ("captions", published.captions))
                if count[what] != number
            ]
            clips = [clip for clip in self.clips if clip.split == split]
            if not parts and published.ids_sha256 not in ("", sha256_of_ids(clip.clip_id for clip in clips)):
                parts.append("other videos")
            if not parts and published.texts_sha256 not in ("", sha256_of_texts(clips)):
                parts.append("other texts")
            lines += [f"{split} {', '.join(parts)}"] if parts else []
        return lines

    def require_split(self, split: str, accepted: str) -> BenchmarkAnnotations:
        """Returns itself if a split has the published videos.

        Raises:
            DataError: if not, so that no number of another split gets this protocol's name.
        """
        count = self.counts()[split]["videos"]
        published = self.published[split]
        ids = [clip.clip_id for clip in self.clips if clip.split == split]
        if count == published.videos and published.ids_sha256 in ("", sha256_of_ids(ids)):
            return self
        what = f"{count} videos for {published.videos}" if count != published.videos else "other videos"
        known = "; ".join(
            f"{item.what} ({len(item.ids)}): {join_first(item.ids)}" for item in self.deviations
        )
        raise DataError(
            f"its {split} split is not that of {self.protocol}: {what}" + (f". {known}" if known else ""),
            where=self.benchmark,
            accepted=accepted,
        )


def sha256_of_ids(ids: Iterable[str]) -> str:
    """SHA-256 of ids, sorted, one a line."""
    return hashlib.sha256("".join(f"{name}\n" for name in sorted(ids)).encode()).hexdigest()


def sha256_of_texts(clips: Iterable[BenchmarkClip]) -> str:
    """SHA-256 of the texts of clips, in the order of their ids, with case and punctuation."""
    ordered = sorted(clips, key=lambda clip: clip.clip_id)
    return hashlib.sha256(
        "".join(f"{text}\n" for clip in ordered for text in clip.captions).encode()
    ).hexdigest()


@dataclass
class VideoAnnotations:
    """All annotations of one video, in the order of the files.

    Attributes:
        names: names of the video in the files.
        texts: its texts, none blank.
        times: start and end of each, or empty.
        duration_s: of the video, if a file has it.
    """

    names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)
    duration_s: float | None = None


def group_by_id(
    annotations: Iterable[Annotation], to_id: Callable[[str], str | None], what: str
) -> dict[str, VideoAnnotations]:
    """Groups annotations by id, in the order of the files.

    Args:
        annotations: of one file or several.
        to_id: returns the benchmark's id of a name; None for a name that does not belong to the benchmark.
        what: role of the file, for messages.

    Raises:
        DataError: with all names that do not belong to the benchmark.
    """
    faults = CollectedErrors()
    videos: dict[str, VideoAnnotations] = {}
    for entry in annotations:
        name = to_id(entry.video)
        if name is None:
            faults.add("not a video of the benchmark", f"{entry.video!r} ({entry.where})")
            continue
        video = videos.setdefault(name, VideoAnnotations())
        if entry.video not in video.names:
            video.names.append(entry.video)
        timed = entry.times if len(entry.times) == len(entry.texts) else ()
        for position, text in enumerate(entry.texts):
            if text:
                video.texts.append(text)
                video.times += timed[position : position + 1]
        video.duration_s = entry.duration_s if entry.duration_s is not None else video.duration_s
    faults.raise_if_any(what)
    return videos


def stem_of(name: str) -> str:
    """Returns a name without folders and without a video's ending (or the bare dot that some have).

    Only the known endings are cut: what follows the last dot of an id may be a part of it.
    """
    base = name.strip().replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    stem = without_ending(base)
    return stem if stem != base else base.removesuffix(".") or base


def names_of(video_id: str, *written: str) -> tuple[str, ...]:
    """Returns names that a video file may have: as annotations name it, then its id."""
    bases = [name.strip().replace("\\", "/").rsplit("/", 1)[-1] for name in written]
    return tuple(dict.fromkeys([*bases, video_id]))


def check_disjoint(clips: Sequence[BenchmarkClip], benchmark: str) -> None:
    """Raises an error if a video is in two splits.

    Raises:
        DataError: with the ids.
    """
    faults = CollectedErrors()
    split_of: dict[str, str] = {}
    for clip in clips:
        other = split_of.setdefault(clip.clip_id, clip.split)
        if other != clip.split:
            faults.add("one video in two splits", f"{clip.clip_id!r}: {other}, {clip.split}")
    faults.raise_if_any(benchmark)


class BenchmarkReader(ABC):
    """Reader of a published benchmark's annotation files.

    A benchmark says what it is by these attributes, and adds its clips and deviations in ``read_splits``.

    Args:
        data: location of the annotation files, and choices between protocols.

    Attributes:
        benchmark: its name.
        protocol: the evaluation protocol, as a person would cite it.
        published: the published counts of each split; a missing split has no clips.
        test_files: the files that list the test videos, for messages.
        needs_train: True if a train split without any text is a fault.
        folder: the annotation files.
        clips: the clips that were read, in any order.
        deviations: clips that were left out, repaired or differ from the published ones, by id.

    Raises:
        DataError: for a folder that is missing or holds no annotation file.
    """

    benchmark: ClassVar[str]
    test_files: ClassVar[str]
    needs_train: ClassVar[bool] = True
    protocol: str
    published: Mapping[str, PublishedSplit]

    def __init__(self, data: DataConfig) -> None:
        self.folder = AnnotationFolder(data.annotations)
        self.clips: list[BenchmarkClip] = []
        self.deviations: list[Deviation] = []

    @abstractmethod
    def read_splits(self) -> None:
        """Reads the files of all splits, and adds their clips and deviations.

        Raises:
            DataError: for files that are missing or cannot be read.
        """

    def read(self) -> BenchmarkAnnotations:
        """Reads all annotations and checks that the splits are the benchmark's.

        Raises:
            DataError: for files that are missing or cannot be read, a video in two splits, another test split
                than the protocol's, and a missing train split if it is needed.
        """
        self.read_splits()
        if self.needs_train and not any(clip.captions for clip in self.clips if clip.split == "train"):
            known = "; ".join(f"{item.what} ({len(item.ids)})" for item in self.deviations)
            raise DataError(
                "no train video has a text" + (f": {known}" if known else ""),
                where=self.benchmark,
                accepted="annotation files whose ids and texts belong together",
            )
        check_disjoint(self.clips, self.benchmark)
        annotations = BenchmarkAnnotations(
            benchmark=self.benchmark,
            protocol=self.protocol,
            clips=tuple(sorted(self.clips, key=lambda clip: clip.clip_id)),
            published=self.published,
            deviations=tuple(self.deviations),
            annotation_sha256=self.folder.sha256,
        )
        return annotations.require_split("test", self.test_files)

    def add_captioned(self, split: str, videos: Mapping[str, VideoAnnotations]) -> list[str]:
        """Adds a clip for each video that has a text, and returns the ids of the others.

        Copies of a benchmark number and order the captions of a video differently; sorted, all copies train
        alike.
        """
        self.clips += [
            BenchmarkClip(name, names_of(name, *video.names), split, tuple(sorted(video.texts)))
            for name, video in videos.items()
            if video.texts
        ]
        return [name for name, video in videos.items() if not video.texts]

    def add_deviation(self, what: str, ids: Iterable[str]) -> None:
        """Adds a deviation that concerns these clips, unless there are none."""
        if found := tuple(sorted(ids)):
            self.deviations.append(Deviation(what, found))
