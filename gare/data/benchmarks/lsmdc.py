"""LSMDC: 1,000 clips of the 2016 challenge to test on, 101,079 to train on, 7,408 for val.

Source: Rohrbach et al., IJCV 2017; the retrieval protocol is that of Torabi et al., 2016. Every clip is a
file of its own. The annotations of train and val need a permission. For people who have only test, the train
split is empty.
"""

from __future__ import annotations

import re

from gare.data.benchmarks.annotation_folder import AnnotationFolder
from gare.data.benchmarks.reading import (
    BenchmarkClip,
    Deviation,
    Published,
    Reading,
    finish,
    gather,
    names_of,
    stem_of,
)

PUBLISHED = {
    "train": Published(101_079, 101_079),
    "val": Published(7_408, 7_408),
    "test": Published(
        1000,
        1000,
        "a87544b8124ce4092c0d0b7f88201b3e555f310053cc90da73b8c86f22b0b0d1",
        "4797ebfbeedc3dae3271310d61c8ce5617d6b5139badd7af2a5036a75b72fd58",
    ),
}
_FILES = {
    "train": (r"annos?_training", r"(^|[._-])train(ing)?([._-]|$)"),
    "val": (r"annos?_val", r"(^|[._-])val([._-]|$)"),
    "test": (r"1000_publictect|1000_publictest", r"(^|[._-])test([._-]|\d|$)"),
}


def read_lsmdc(location: str) -> Reading:
    """Reads LSMDC's annotation files.

    Args:
        location: their folder: LSMDC16_challenge_1000_publictect.csv (tabs or commas, with or without a
            header) or JSON of {id: {"text": …}}; also LSMDC16_annos_training.csv and LSMDC16_annos_val.csv
            where they are.

    Raises:
        DataError: for files that are missing or cannot be read, and for another test split.
    """
    folder = AnnotationFolder(location)
    test = folder.need(_FILES["test"], "test file", "LSMDC16_challenge_1000_publictect.csv")
    files = {split: folder.find(_FILES[split]) for split in ("train", "val")}
    entries = {
        "test": test,
        **{split: folder.read(found, f"{split} file") for split, found in files.items() if found},
    }
    clips, silent = [], []
    for split, listed in entries.items():
        for name, video in gather(listed, _to_id, f"{split} file").items():
            if video.texts:
                clips.append(
                    BenchmarkClip(name, names_of(name, *video.names), split, tuple(sorted(video.texts)))
                )
            else:
                silent.append(name)
    found_odd = (("clips without a caption, left out", tuple(sorted(silent))),)
    return finish(
        Reading(
            benchmark="lsmdc",
            protocol="1,000 clips of the public test",
            clips=tuple(clips),
            published=PUBLISHED,
            deviations=tuple(Deviation(what, ids) for what, ids in found_odd if ids),
            annotation_sha256=folder.sha256,
        ),
        test_files="LSMDC16_challenge_1000_publictect.csv with its 1,000 clips",
        needs_train=False,
    )


def _to_id(name: str) -> str | None:
    stem = stem_of(name)
    return stem if re.fullmatch(r"\d+_.+_\d\d\.\d\d\.\d\d\.\d{3}-\d\d\.\d\d\.\d\d\.\d{3}", stem) else None
