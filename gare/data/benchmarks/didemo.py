"""DiDeMo as paragraph retrieval: 8,392, 1,065 and 1,004 videos, all sentences of a video joined.

Source: Hendricks et al., ICCV 2017; the lists are those of Collaborative Experts, which leave out some
annotated videos (the data set's own train split has 8,395). Only the first 30 seconds were shown to the
annotators: as in CLIP4Clip, a clip is the first 31 seconds of its file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gare.data.benchmarks.formats.paragraphs import paragraph_clips
from gare.data.benchmarks.reader import (
    BenchmarkReader,
    PublishedSplit,
    VideoAnnotations,
    group_by_id,
    stem_of,
)
from gare.data.collected_errors import CollectedErrors

CLIP_END_S = 31.0
PUBLISHED = {
    "train": PublishedSplit(8392, 8392, "e84c95b48a3490d03315cf4050b6853549efa393df6cb50bbefde1e7baf56021"),
    "val": PublishedSplit(1065, 1065, "14e36577c02c7919c1a2e2a8f41aaa96fc63e826557b43465d1bd601bab22c0d"),
    "test": PublishedSplit(
        1004,
        1004,
        "9e98b69db2eed8341d77f2c8dd18e62a8207b79e19cd584b9c709c9431a3ea5e",
        "736a14316f6651f05c98b52b0669915fe0077e09744eb31e7ba2b8a898ad1576",
    ),
}
_WORDS = {"train": "train", "val": "(val|valid|validation)", "test": "test"}


class DidemoReader(BenchmarkReader):
    """Reader of DiDeMo's annotation files.

    They are, for each split: the sentences (train_data.json, or didemo_train_label.csv, or a list such as
    [{"video": …, "caption": …}]) and the list of videos (train_list.txt); without a list, all videos that
    have sentences.
    """

    benchmark = "didemo"
    protocol = "paragraphs, lists of Collaborative Experts"
    published = PUBLISHED
    test_files = "test_list.txt of Collaborative Experts with its 1,004 videos, all of them with sentences"

    def read_splits(self) -> None:
        """Reads sentences and lists of all splits."""
        for split, word in _WORDS.items():
            listed, sources = self._read_split(split, word)
            sources, strangers = _by_id(split, listed, sources)
            listed = {stem_of(name): video for name, video in listed.items()}
            found, odd = paragraph_clips(split, listed, sources, start_s=0.0, end_s=CLIP_END_S)
            self.clips += found
            self.deviations += odd
            what = f"{split} videos with sentences that the list does not name, left out"
            self.add_deviation(what, strangers)

    def _read_split(
        self, split: str, word: str
    ) -> tuple[dict[str, VideoAnnotations], list[dict[str, VideoAnnotations]]]:
        """Reads a split's list and its files of sentences, the most reliable first, both by file name."""
        lists = self.folder.find((rf"(^|[._-]){word}[._-]?list",))
        role = f"{split} list"
        listed = group_by_id(self.folder.read(lists, role) if lists else [], _to_name, role)
        originals = self.folder.find((rf"(^|[._-]){word}[._-]data",))
        others = self.folder.find(
            (rf"{word}[._-]?label", rf"(^|[._-]){word}([._-]|$)"),
            besides=rf"{word}[._-]?list|{word}[._-]data",
        )
        role = f"{split} sentences"
        sources = [
            group_by_id(self.folder.read(files, role), _to_name, role)
            for files in (originals, others)
            if files
        ]
        if not sources and not any(video.texts for video in listed.values()):
            role = f"sentences of {split}"
            entries = self.folder.read_split(
                split, (), role, f"{split}_data.json or didemo_{split}_label.csv"
            )
            sources = [group_by_id(entries, _to_name, role)]
        return listed, sources


def _by_id(
    split: str, listed: Mapping[str, VideoAnnotations], sources: Sequence[Mapping[str, VideoAnnotations]]
) -> tuple[list[dict[str, VideoAnnotations]], tuple[str, ...]]:
    """Returns sentences by id instead of file name, and the names that are not listed.

    The annotations have some videos twice, under names that differ only in their ending, with different
    sentences. The lists name one of the two, and its paragraph is made of the sentences under this name only.
    If all endings differ from the list's, as in copies with converted videos, names are compared without the
    ending.

    Raises:
        DataError: if neither of a video's two names is listed.
    """
    strangers: set[str] = set()
    found = []
    for source in sources:
        names: dict[str, str] = {}
        faults = CollectedErrors()
        for name in source:
            other = names.setdefault(stem_of(name), name)
            if other != name and name not in listed and other not in listed:
                faults.add("one video under two names, and no list says which", f"{other}, {name}")
        faults.raise_if_any("didemo", accepted=f"{split}_list.txt of Collaborative Experts")
        names |= {stem_of(name): name for name in source if not listed or name in listed}
        wanted = {stem_of(name) for name in listed} or names.keys()
        found.append({stem: source[name] for stem, name in names.items() if stem in wanted})
        strangers |= source.keys() - {names[stem] for stem in wanted & names.keys()}
    return found, tuple(sorted(strangers))


def _to_name(name: str) -> str | None:
    base = name.strip().replace("\\", "/").rsplit("/", 1)[-1]
    return base if re.fullmatch(r"\d+@N\d\d_\d+_[0-9a-f]+", stem_of(base)) else None
