"""The published benchmarks by name: builds a manifest from annotation files and a folder of videos."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gare.config import DataConfig
from gare.data.benchmarks.activitynet import ActivityNetReader
from gare.data.benchmarks.didemo import DidemoReader
from gare.data.benchmarks.lsmdc import LsmdcReader
from gare.data.benchmarks.msrvtt import MsrvttReader
from gare.data.benchmarks.msvd import MsvdReader
from gare.data.benchmarks.own_videos import open_folder
from gare.data.benchmarks.reader import (
    BenchmarkAnnotations,
    BenchmarkClip,
    BenchmarkReader,
    Deviation,
    PublishedSplit,
)
from gare.data.benchmarks.split import order_by_hash
from gare.data.benchmarks.video_folder import NoSuchVideoError, VideoFolder
from gare.data.benchmarks.youcook2 import YouCook2Reader
from gare.data.collected_errors import CollectedErrors
from gare.data.manifest import SPLITS, Manifest, ManifestRow
from gare.errors import ConfigError, DataError, without_secrets

logger = logging.getLogger(__name__)

READERS: dict[str, type[BenchmarkReader]] = {
    reader.benchmark: reader
    for reader in (MsrvttReader, MsvdReader, DidemoReader, ActivityNetReader, LsmdcReader, YouCook2Reader)
}
#: Placeholder for the location of a video that was not looked for.
NOT_LOOKED_FOR = "not looked for"


@dataclass(frozen=True)
class Benchmark:
    """A published benchmark as found on disk.

    Attributes:
        manifest: the clips with an existing video; all clips if videos were not looked for.
        annotations: the content of the annotation files.
        missing: ids of clips without a video; None if videos were not looked for.
        differences: differences of the manifest from the published counts, a line for each split.
    """

    manifest: Manifest
    annotations: BenchmarkAnnotations
    missing: tuple[str, ...] | None
    differences: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Summarises the deviations to know before numbers are compared, for a result in JSON."""
        split_of = {clip.clip_id: clip.split for clip in self.annotations.clips}
        missing = None
        if self.missing is not None:
            by_split = {split: [name for name in self.missing if split_of[name] == split] for split in SPLITS}
            missing = {split: {"count": len(ids), "ids": ids} for split, ids in by_split.items()}
        return {
            "annotated": self.annotations.counts(),
            "published": {
                split: {"videos": published.videos, "captions": published.captions}
                for split, published in self.annotations.published.items()
            },
            "as_published": not self.differences,
            "differences": list(self.differences),
            "deviations": [deviation.to_json() for deviation in self.annotations.deviations],
            "missing": missing,
            "annotation_sha256": dict(self.annotations.annotation_sha256),
        }


def read_benchmark(data: DataConfig, list_remote: Callable[[str], list[str]] | None = None) -> Benchmark:
    """Reads the annotations of ``data.benchmark`` and looks for its videos.

    The protocol in the manifest names counts that differ from the published ones, so that its numbers are not
    taken for comparable ones.

    Args:
        data: locations of the annotations and, if they are to be looked for, of the videos.
        list_remote: lists the files below the URI of a folder of videos; without it, only local folders are
            accepted.

    Raises:
        ConfigError: for a benchmark without annotations, and for more val videos than there are to hold out.
        DataError: for annotations that are not the benchmark's, an unusable folder of videos, and videos that
            are missing unless ``data.allow_missing`` or ``data.verify`` is set.
    """
    if not data.annotations:
        raise ConfigError(
            "is empty",
            where="data.annotations",
            accepted=f"the folder of {data.benchmark}'s annotation files",
        )
    annotations = READERS[data.benchmark](data).read()
    rows, missing = _rows_without_places(annotations), None
    if data.videos:
        rows, missing = _find_videos(annotations, data, list_remote)
    kept = {row.video_id for row in rows}
    present = replace(annotations, clips=tuple(clip for clip in annotations.clips if clip.clip_id in kept))
    differences = present.differences()
    protocol = annotations.protocol + (f"; not as published: {'; '.join(differences)}" if differences else "")
    if data.val_videos:
        rows = _hold_out(rows, data)
        protocol += f"; {data.val_videos} train videos held out for val (seed {data.seed})"
    deviations = [*annotations.deviations]
    if missing:
        deviations.append(Deviation("videos missing on disk, left out", missing))
    manifest = Manifest(
        rows=tuple(rows),
        benchmark=annotations.benchmark,
        protocol=protocol,
        annotation_sha256=dict(annotations.annotation_sha256),
        deviations=tuple(map(str, deviations)),
    )
    return Benchmark(manifest, annotations, missing, tuple(differences))


def _rows_without_places(annotations: BenchmarkAnnotations) -> list[ManifestRow]:
    return [_row(clip, NOT_LOOKED_FOR) for clip in annotations.clips]


def _row(clip: BenchmarkClip, uri: str) -> ManifestRow:
    return ManifestRow(clip.clip_id, uri, clip.start_s, clip.end_s, clip.split, clip.captions)


def _find_videos(
    annotations: BenchmarkAnnotations, data: DataConfig, list_remote: Callable[[str], list[str]] | None
) -> tuple[list[ManifestRow], tuple[str, ...]]:
    faults = CollectedErrors()
    folder = open_folder(data.videos, faults, list_remote)
    faults.raise_if_any("data.videos")
    assert folder is not None  # otherwise a fault was raised
    rows = []
    missing: list[BenchmarkClip] = []
    file_of: dict[tuple[str, ...], str | None] = {}
    for clip in annotations.clips:
        if clip.names not in file_of:
            file_of[clip.names] = _find(folder, clip.names, faults)
        file = file_of[clip.names]
        if file is None:
            missing.append(clip)
        else:
            rows.append(_row(clip, folder.path(file)))
    faults.raise_if_any(without_secrets(data.videos), accepted="one file for each video")
    if missing and not (data.allow_missing or data.verify):
        for split in SPLITS:
            for clip in missing:
                if clip.split == split:
                    faults.add(f"{split} clips without video file", clip.clip_id)
        faults.raise_if_any(
            without_secrets(data.videos),
            accepted="all videos; data.allow_missing=true leaves these out, and the protocol then says so; "
            "--verify lists all of them",
        )
    if not rows and not data.verify:
        raise DataError(
            f"holds no video of {annotations.benchmark}",
            where=without_secrets(data.videos),
            accepted=f"files such as {annotations.clips[0].names[0]}.mp4",
        )
    return rows or _rows_without_places(annotations), tuple(clip.clip_id for clip in missing)


def _find(folder: VideoFolder, names: Sequence[str], faults: CollectedErrors) -> str | None:
    """Finds the file of a video by any of its names; several files of one name are a fault."""
    for name in names:
        try:
            return folder.find(name)
        except NoSuchVideoError as error:
            if error.hint and error.kind.startswith("several"):
                faults.add(error.kind, f"{name!r}: {error.hint}")
                return None
    return None


def _hold_out(rows: Sequence[ManifestRow], data: DataConfig) -> list[ManifestRow]:
    """Moves train rows to val, all clips of a file together."""
    if any(row.split == "val" for row in rows):
        raise ConfigError(
            f"is {data.val_videos}, but {data.benchmark} has a val split of its own",
            where="data.val_videos",
            accepted="0",
        )
    files = order_by_hash(
        {row.video_id.partition("#")[0] for row in rows if row.split == "train"}, seed=data.seed
    )
    if data.val_videos >= len(files):
        raise ConfigError(
            f"is {data.val_videos}, but train has {len(files)} videos",
            where="data.val_videos",
            accepted=f"at most {max(len(files) - 1, 0)}",
        )
    held_out = set(files[: data.val_videos])
    return [
        replace(row, split="val")
        if row.split == "train" and row.video_id.partition("#")[0] in held_out
        else row
        for row in rows
    ]


def format_table(benchmark: Benchmark) -> str:
    """Formats counts beside the published ones, deviations and missing videos as readable text."""
    annotations = benchmark.annotations
    lines = [f"{annotations.benchmark}, {benchmark.manifest.protocol}"]
    annotated, used = annotations.counts(), benchmark.manifest.counts
    lines.append(f"{'split':8}{'':10}{'published':>10}{'annotated':>10}{'used':>10}")
    for split in SPLITS:
        published = annotations.published.get(split, PublishedSplit(0, 0))
        for what, number in (("videos", published.videos), ("captions", published.captions)):
            lines.append(f"{split:8}{what:10}{number:10,}{annotated[split][what]:10,}{used[split][what]:10,}")
    for deviation in annotations.deviations:
        lines.append(f"{deviation.what}: {len(deviation.ids)}: {'; '.join(deviation.ids[:10])}")
    if benchmark.missing is None:
        lines.append("videos: not looked for (data.videos is empty)")
    else:
        shown = "; ".join(benchmark.missing[:10])
        lines.append(f"videos missing on disk: {len(benchmark.missing)}" + (f": {shown}" if shown else ""))
    lines += [f"sha256 {digest}  {name}" for name, digest in annotations.annotation_sha256.items()]
    return "\n".join(lines)
