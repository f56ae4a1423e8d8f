"""LSMDC: 1,000 clips of the 2016 challenge to test on, 101,079 to train on, 7,408 for val.

Source: Rohrbach et al., IJCV 2017; the retrieval protocol is that of Torabi et al., 2016. Every clip is a
file of its own. The annotations of train and val need a permission. For people who have only test, the train
split is empty.
"""

from __future__ import annotations

import re

from gare.data.benchmarks.reader import BenchmarkReader, PublishedSplit, group_by_id, stem_of

PUBLISHED = {
    "train": PublishedSplit(101_079, 101_079),
    "val": PublishedSplit(7_408, 7_408),
    "test": PublishedSplit(
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


class LsmdcReader(BenchmarkReader):
    """Reader of LSMDC's annotation files.

    They are LSMDC16_challenge_1000_publictect.csv (tabs or commas, with or without a header) or JSON of
    {id: {"text": …}}; also LSMDC16_annos_training.csv and LSMDC16_annos_val.csv where they are.
    """

    benchmark = "lsmdc"
    protocol = "1,000 clips of the public test"
    published = PUBLISHED
    test_files = "LSMDC16_challenge_1000_publictect.csv with its 1,000 clips"
    needs_train = False

    def read_splits(self) -> None:
        """Reads test, and train and val where they are."""
        test = self.folder.read_required(_FILES["test"], "test file", "LSMDC16_challenge_1000_publictect.csv")
        files = {split: self.folder.find(_FILES[split]) for split in ("train", "val")}
        entries = {
            "test": test,
            **{split: self.folder.read(found, f"{split} file") for split, found in files.items() if found},
        }
        silent = []
        for split, listed in entries.items():
            silent += self.add_captioned(split, group_by_id(listed, _to_id, f"{split} file"))
        self.add_deviation("clips without a caption, left out", silent)


def _to_id(name: str) -> str | None:
    stem = stem_of(name)
    return stem if re.fullmatch(r"\d+_.+_\d\d\.\d\d\.\d\d\.\d{3}-\d\d\.\d\d\.\d\d\.\d{3}", stem) else None
