"""The result of reading a published benchmark: its clips, and where they are not as published."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gare.data.benchmarks.formats.annotations import Annotation
from gare.data.benchmarks.video_folder import without_ending
from gare.data.collected_errors import Faults, first_of
from gare.data.manifest import SPLITS
from gare.errors import DataError


@dataclass(frozen=True)
class Published:
    """A split as it was published.

    Attributes:
        videos: how many clips.
        captions: how many texts they have together.
        ids_sha256: SHA-256 of the sorted ids, one a line; empty where the ids could not be had.
        texts_sha256: SHA-256 of the texts; empty where they are not compared.
    """

    videos: int
    captions: int
    ids_sha256: str = ""
    texts_sha256: str = ""


@dataclass(frozen=True)
class Deviation:
    """Something in the annotations that is not as published, or odd and worth knowing.

    Attributes:
        what: in words.
        ids: of all clips concerned.
    """

    what: str
    ids: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what} ({len(self.ids)}): {'; '.join(self.ids)}"

    def to_json(self) -> dict[str, Any]:
        """``{"what", "count", "ids"}``."""
        return {"what": self.what, "count": len(self.ids), "ids": list(self.ids)}


@dataclass(frozen=True)
class BenchmarkClip:
    """One clip of a benchmark, before its file is looked for.

    Attributes:
        clip_id: its id, the same in every copy of the annotations.
        names: under which its video may be kept, the surest first.
        split: train, val or test.
        captions: texts with whitespace folded.
        start_s: seconds; None where the clip starts with its file.
        end_s: seconds; None where it ends with its file.
    """

    clip_id: str
    names: tuple[str, ...]
    split: str
    captions: tuple[str, ...]
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True)
class Reading:
    """A benchmark as its annotation files give it.

    Attributes:
        benchmark: its name.
        protocol: what is compared under that name, as a person would cite it.
        clips: sorted by id.
        published: the counts of each split; a split that is not there has no clips.
        deviations: what was left out, repaired or is not as published, by id.
        annotation_sha256: SHA-256 of every file that was read, by its name.
    """

    benchmark: str
    protocol: str
    clips: tuple[BenchmarkClip, ...]
    published: Mapping[str, Published]
    deviations: tuple[Deviation, ...] = ()
    annotation_sha256: Mapping[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, dict[str, int]]:
        """Clips and texts of each split: ``{split: {"videos": …, "captions": …}}``."""
        counts = {split: {"videos": 0, "captions": 0} for split in SPLITS}
        for clip in self.clips:
            counts[clip.split]["videos"] += 1
            counts[clip.split]["captions"] += len(clip.captions)
        return counts

    def differences(self) -> list[str]:
        """Lists where counts or ids differ from the published ones, a line a split."""
        lines = []
        for split, count in self.counts().items():
            published = self.published.get(split, Published(0, 0))
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

    def require(self, split: str, accepted: str) -> Reading:
        """Itself, if a split has the published videos.

        Raises:
            DataError: if not, so that nothing is compared under this protocol's name that is not.
        """
        count = self.counts()[split]["videos"]
        published = self.published[split]
        ids = [clip.clip_id for clip in self.clips if clip.split == split]
        if count == published.videos and published.ids_sha256 in ("", sha256_of_ids(ids)):
            return self
        what = f"{count} videos for {published.videos}" if count != published.videos else "other videos"
        known = "; ".join(f"{item.what} ({len(item.ids)}): {first_of(item.ids)}" for item in self.deviations)
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
class Gathered:
    """All that files say of one video, in their order.

    Attributes:
        names: as they name it.
        texts: its texts, none blank.
        times: start and end of each, or empty.
        duration_s: of the video, where one says so.
    """

    names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)
    duration_s: float | None = None


def gather(
    annotations: Iterable[Annotation], to_id: Callable[[str], str | None], what: str
) -> dict[str, Gathered]:
    """Annotations by id, in the order of the files.

    Args:
        annotations: of one file or several.
        to_id: the benchmark's id of a name; None for a name that is none of it.
        what: the file's part, for messages.

    Raises:
        DataError: naming all that are no names of the benchmark.
    """
    faults = Faults()
    videos: dict[str, Gathered] = {}
    for entry in annotations:
        name = to_id(entry.video)
        if name is None:
            faults.add("not a video of the benchmark", f"{entry.video!r} ({entry.where})")
            continue
        video = videos.setdefault(name, Gathered())
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
    """A name without folders and without the ending of a video, or the bare dot that some have for one.

    Only the known endings are cut: what follows the last dot of an id may be a part of it.
    """
    base = name.strip().replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    stem = without_ending(base)
    return stem if stem != base else base.removesuffix(".") or base


def names_of(video_id: str, *written: str) -> tuple[str, ...]:
    """Names under which a video may be kept: as files name it, then its id."""
    bases = [name.strip().replace("\\", "/").rsplit("/", 1)[-1] for name in written]
    return tuple(dict.fromkeys([*bases, video_id]))


def check_disjoint(clips: Sequence[BenchmarkClip], benchmark: str) -> None:
    """Refuses a video that is in two splits, or twice in one.

    Raises:
        DataError: with the ids.
    """
    faults = Faults()
    split_of: dict[str, str] = {}
    for clip in clips:
        other = split_of.setdefault(clip.clip_id, clip.split)
        if other != clip.split:
            faults.add("one video in two splits", f"{clip.clip_id!r}: {other}, {clip.split}")
    faults.raise_if_any(benchmark)


def finish(reading: Reading, *, test_files: str, needs_train: bool = True) -> Reading:
    """A reading in its final order, with the differences from the published counts noted and test required.

    Args:
        reading: clips in any order.
        test_files: the files that say which videos test has, for the message.
        needs_train: whether a train split without one text is a fault.

    Raises:
        DataError: for a video in two splits, for another test split than the protocol's, and for no train
            split where there has to be one.
    """
    if needs_train and not reading.counts()["train"]["captions"]:
        known = "; ".join(f"{item.what} ({len(item.ids)})" for item in reading.deviations)
        raise DataError(
            "no train video has a text" + (f": {known}" if known else ""),
            where=reading.benchmark,
            accepted="annotation files whose ids and texts belong together",
        )
    check_disjoint(reading.clips, reading.benchmark)
    ordered = replace(reading, clips=tuple(sorted(reading.clips, key=lambda clip: clip.clip_id)))
    return ordered.require("test", test_files)
