"""Your own videos: a folder of video files, and one file with their captions if they have any."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pyarrow import fs as pafs

from gare.data.benchmarks.formats.captions_file import CaptionRow, parse_captions
from gare.data.benchmarks.split import split_by_video
from gare.data.benchmarks.video_folder import VIDEO_ENDINGS, NoSuchVideoError, VideoFolder
from gare.data.benchmarks.video_locations import VideoLocations
from gare.data.collected_errors import SHOWN, CollectedErrors, join_first
from gare.data.manifest import Manifest, ManifestRow
from gare.errors import DataError, without_secrets
from gare.storage.files import open_fs, read_bytes
from gare.storage.uris import scheme_of

logger = logging.getLogger(__name__)

#: A clip: file, start and end in seconds.
_Clip = tuple[str, float | None, float | None]


def read_folder(
    videos: str | Path,
    captions: str | Path,
    *,
    seed: int,
    val_fraction: float,
    test_fraction: float,
    schemes: Sequence[str] = ("file",),
    list_remote: Callable[[str], list[str]] | None = None,
) -> Manifest:
    """Reads a folder of videos and the file with their captions.

    ``captions_file`` and ``records`` describe the columns and layouts of captions, ``VideoFolder`` and (for
    URIs) ``video_locations`` how captions may name the videos. Rows of the same clip are merged in order. A
    row with a start or an end is a clip of its own, with the id ``name#12.5-20``; a missing time means the
    file's start or end.

    A caption without its video is an error. A video without a caption is only reported, as a warning and in
    ``Manifest.left_out``, since people may caption only a part of a folder.

    Args:
        videos: a local folder or one of an object store, with its subfolders. Empty if captions name videos
            only by URIs or absolute paths.
        captions: location of the captions file.
        seed: of the split that is made if the captions name none.
        val_fraction: share of the video files that such a split gives to val.
        test_fraction: the same for test. All clips of a file go to the same split.
        schemes: where videos may be, as in ``sources.schemes``.
        list_remote: lists the files below the URI of a folder, relative to it; without it, only local folders
            are accepted.

    Returns:
        The manifest, in the order of ids.

    Raises:
        DataError: with all faults of folder and captions, each kind with its first ten and their count.
        ConfigError: for fractions that leave no videos to train.
    """
    faults = CollectedErrors()
    folder = open_folder(str(videos), faults, list_remote) if str(videos) else None
    places = VideoLocations(folder, schemes) if folder or not str(videos) else None
    rows, annotation_sha256 = _open_captions(str(captions), faults, places)
    files = _find_files(rows, places, faults) if places else {}
    own_split = _own_split(rows, files, faults)
    faults.raise_if_any(str(captions))
    assert places is not None  # otherwise a fault was raised
    ids = places.ids(files.values())
    texts: dict[_Clip, list[str]] = {}
    for row in rows:
        texts.setdefault((files[row.video], row.start_s, row.end_s), []).extend(row.captions)
    if own_split:
        split, protocol = own_split, "own split"
    else:
        names, protocol = _seeded_split(
            (ids[file] for file, _, _ in texts), seed, val_fraction, test_fraction
        )
        split = {file: names[ids[file]] for file, _, _ in texts}
    clips = sorted(texts, key=lambda clip: (ids[clip[0]], clip[1] or 0.0, clip[2] or 0.0))
    return Manifest(
        rows=tuple(
            ManifestRow(
                video_id=_clip_id(ids[file], start_s, end_s),
                uri=places.path(file),
                start_s=start_s,
                end_s=end_s,
                split=split[file],
                captions=tuple(texts[file, start_s, end_s]),
            )
            for file, start_s, end_s in clips
        ),
        benchmark="folder",
        protocol=protocol,
        annotation_sha256=annotation_sha256,
        left_out=_report_left_out(folder, set(split), "have no caption") if folder else (),
    )


def read_videos(
    videos: str | Path,
    *,
    seed: int,
    val_fraction: float,
    test_fraction: float,
    list_remote: Callable[[str], list[str]] | None = None,
) -> Manifest:
    """Reads a folder of videos without captions: one whole clip a video file.

    Ids and the seeded split are those that the same videos get from ``read_folder``, so that captions can be
    added later.

    Args:
        videos: as for ``read_folder``.
        seed: as for ``read_folder``.
        val_fraction: as for ``read_folder``.
        test_fraction: as for ``read_folder``.
        list_remote: as for ``read_folder``.

    Returns:
        The manifest, without any caption, in the order of ids.

    Raises:
        DataError: for a folder that is missing or holds no video.
        ConfigError: for fractions that leave no videos to train.
    """
    faults = CollectedErrors()
    folder = open_folder(str(videos), faults, list_remote)
    faults.raise_if_any(without_secrets(str(videos)))
    assert folder is not None  # otherwise a fault was raised
    files = [file for file in folder.videos if _is_utf8(file) and folder.is_there(file)]
    if not files:
        raise DataError(
            "holds no video",
            where=without_secrets(str(videos)),
            accepted=f"files that end in {', '.join(sorted(VIDEO_ENDINGS))}",
        )
    ids = folder.ids(files)
    split, protocol = _seeded_split(ids.values(), seed, val_fraction, test_fraction)
    return Manifest(
        rows=tuple(
            ManifestRow(ids[file], folder.path(file), None, None, split[ids[file]], ())
            for file in sorted(files, key=ids.__getitem__)
        ),
        benchmark="folder",
        protocol=f"{protocol}; no captions",
        left_out=_report_left_out(
            folder, set(files), "are links that lead nowhere or have names that are not UTF-8"
        ),
    )


def _seeded_split(
    ids: Iterable[str], seed: int, val_fraction: float, test_fraction: float
) -> tuple[dict[str, str], str]:
    """Returns the split of each id, and the protocol's name."""
    names = split_by_video(ids, seed=seed, val_fraction=val_fraction, test_fraction=test_fraction)
    return names, f"seeded split by video (seed {seed}, val {val_fraction:g}, test {test_fraction:g})"


def open_folder(
    videos: str, faults: CollectedErrors, list_remote: Callable[[str], list[str]] | None = None
) -> VideoFolder | None:
    """Opens the folder of videos; returns None, and adds the reason to the faults, if it is unusable."""
    kind = "folder of videos"
    try:
        if scheme_of(videos) != "file" and list_remote:
            folder = VideoFolder(videos, list_remote(videos))
            if not folder.files:
                faults.add(kind, f"{without_secrets(videos)!r} is missing or empty")
            return folder if folder.files else None
        filesystem, path = open_fs(videos)
    except DataError as error:
        faults.add(kind, str(error))
        return None
    if not isinstance(filesystem, pafs.LocalFileSystem):
        faults.add(
            kind, f"{without_secrets(videos)!r} is not on this machine; a local or mounted folder is accepted"
        )
    elif not Path(path).is_dir():
        faults.add(kind, f"{videos!r} is {'not a folder' if Path(path).exists() else 'missing'}")
    else:
        folder = VideoFolder(path)
        if folder.files:
            return folder
        faults.add(kind, f"{videos!r} is empty")
    return None


def _open_captions(
    captions: str, faults: CollectedErrors, places: VideoLocations | None
) -> tuple[list[CaptionRow], dict[str, str]]:
    try:
        data = read_bytes(captions)
        name = captions.partition("?")[0].rpartition("/")[2] if "://" in captions else Path(captions).name
        before = len(faults)
        rows = parse_captions(name, data, faults, names_video=places.holds if places else None)
    except DataError as error:
        faults.add("captions", error.what + (f" ({error.accepted})" if error.accepted else ""))
        return [], {}
    if not rows and len(faults) == before:
        faults.add("captions", "has no rows")
    return rows, {name: hashlib.sha256(data).hexdigest()}


def _find_files(rows: list[CaptionRow], places: VideoLocations, faults: CollectedErrors) -> dict[str, str]:
    """Maps each video name in the rows to its file's key; a name without a file is one fault."""
    files: dict[str, str] = {}
    lost: dict[str, tuple[NoSuchVideoError, list[str]]] = {}
    for row in rows:
        if row.video in files:
            continue
        if row.video in lost:
            lost[row.video][1].append(row.where)
            continue
        try:
            files[row.video] = places.find(row.video)
        except NoSuchVideoError as error:
            lost[row.video] = (error, [row.where])
    num_hints = 0
    for name, (fault, rows_of_it) in lost.items():
        hint = fault.hint
        if not hint and num_hints < SHOWN:  # the search takes a while in a large folder
            num_hints += 1
            near = places.nearest(name)
            hint = f"nearest: {near!r}" if near else ""
        place = rows_of_it[0] + (f" and {len(rows_of_it) - 1} more" if len(rows_of_it) > 1 else "")
        faults.add(fault.kind, f"{without_secrets(name)!r} ({'; '.join(filter(None, (place, hint)))})")
    return files


def _own_split(rows: list[CaptionRow], files: dict[str, str], faults: CollectedErrors) -> dict[str, str]:
    """Returns the split of each file as given in the rows; empty if no row gives one."""
    if all(row.split is None for row in rows):
        return {}
    first: dict[str, CaptionRow] = {}
    conflicts = set()
    for row in rows:
        if row.split is None:
            faults.add("rows without a split where others have one", row.where)
        elif row.video in files:
            other = first.setdefault(files[row.video], row)
            if other.split != row.split and (row.video, row.split) not in conflicts:
                conflicts.add((row.video, row.split))
                faults.add(
                    "one video in two splits",
                    f"{without_secrets(row.video)!r}: {other.split} ({other.where}), "
                    f"{row.split} ({row.where})",
                )
    return {file: row.split for file, row in first.items() if row.split is not None}


def _clip_id(name: str, start_s: float | None, end_s: float | None) -> str:
    if start_s is None and end_s is None:
        return name
    # repr: two different times never give the same id.
    times = ["" if value is None else repr(value).removesuffix(".0") for value in (start_s, end_s)]
    return f"{name}#{times[0]}-{times[1]}"


def _is_utf8(file: str) -> bool:
    # File systems allow other names, Parquet and logs do not.
    return file.encode("utf-8", "replace") == file.encode("utf-8", "surrogatepass")


def _report_left_out(folder: VideoFolder, used: set[str], reason: str) -> tuple[str, ...]:
    left_out = tuple(
        file.encode("utf-8", "backslashreplace").decode() for file in folder.videos if file not in used
    )
    if left_out:
        logger.warning(
            "%d of %d videos in %s %s and are left out: %s",
            len(left_out),
            len(folder.videos),
            folder.root,
            reason,
            join_first(left_out),
        )
    return left_out
