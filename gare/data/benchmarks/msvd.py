"""MSVD: 1,200, 100 and 670 videos with all their captions, about 41 each; in test every caption is a query.

Source: Chen and Dolan, ACL 2011; the split is that of Venugopalan et al., ICCV 2015, with the captions of its
lists as Collaborative Experts and CLIP4Clip use them. Repeated captions of a video are kept, as in those two.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from gare.data.benchmarks.annotation_folder import AnnotationFolder
from gare.data.benchmarks.reader import (
    BenchmarkReader,
    PublishedSplit,
    VideoAnnotations,
    group_by_id,
    stem_of,
)
from gare.errors import DataError

PUBLISHED = {
    "train": PublishedSplit(1200, 48_774, "abfb8ab5660b464cf547d63a37a369920ff92c5f547af80f07aedd709df335d3"),
    "val": PublishedSplit(100, 4_290, "9527cf1ef6c8fe2fb1ecfda0e1856acc563fecef5ff0a409b5d908b65c1e6ed4"),
    "test": PublishedSplit(
        670,
        27_763,
        "95eacd1fddb1d88cd7144267913ef02d0ecb8cc94a88bc484035433a2d8f9c7a",
        "23a13288bd6ea671cc8aca39e5895cc7e287dbe5c7d205266e1a24f07f14de61",
    ),
}
_CAPTION_FILES = (
    r"captions?_msvd|msvd_?captions?",
    r"raw-?_?captions",
    r"availablecorpus|allvideodescriptions",
    r"video_?\s?corpus|description_?\s?corpus",
    r"^sents_.*lc_nopunc",
    r"caption|annotations",
)
_MAPPING_FILES = (r"youtube.*mapping|mapping.*youtube|^mapping",)
_SPLIT_NAMES = {"train": "train", "val": "(val|valid|validation)", "test": "test"}


class MsvdReader(BenchmarkReader):
    """Reader of MSVD's annotation files.

    They are train_list.txt, val_list.txt and test_list.txt with captions_msvd.json, AvailableCorpus.txt or
    MSVD's own table; or a list such as [{"video": "….avi", "caption": …}] for each split.
    """

    benchmark = "msvd"
    protocol = "1,200/100/670 videos, all captions"
    published = PUBLISHED
    test_files = "test_list.txt with its 670 videos, all of them with captions"

    def read_splits(self) -> None:
        """Reads the lists, and the captions where the lists have none."""
        mapping = self.folder.find(_MAPPING_FILES)
        youtube_id = _youtube_ids(self.folder, mapping) if mapping else {}
        number_of = {name: number for number, name in youtube_id.items()}
        to_id = _id_by(youtube_id)
        members = {}
        for split, word in _SPLIT_NAMES.items():
            patterns = (rf"(^|[._-]){word}[._-]?list", rf"(^|[._-])(ret[._-])?{word}([._-]|$)")
            role = f"{split} list"
            entries = self.folder.read_split(split, patterns, role, f"{split}_list.txt", besides=r"^sents_")
            members[split] = group_by_id(entries, to_id, role)
        captions: dict[str, VideoAnnotations] = {}
        if not all(video.texts for videos in members.values() for video in videos.values()):
            entries = self.folder.read_required(
                _CAPTION_FILES,
                "captions",
                'captions_msvd.json, AvailableCorpus.txt or any JSON of {"id": [captions]}; a pickle can '
                "be written out as such JSON by who trusts it",
                besides=r"(^|[._-])(train|val|test)_list",
                may_be_many=True,
            )
            captions = group_by_id(entries, to_id, "captions")
        silent = []
        for split, videos in members.items():
            captioned = {
                name: VideoAnnotations(
                    names=[*video.names, *filter(None, [number_of.get(name)])],
                    texts=video.texts or captions.get(name, VideoAnnotations()).texts,
                )
                for name, video in videos.items()
            }
            silent += self.add_captioned(split, captioned)
        listed = {name for videos in members.values() for name in videos}
        self.add_deviation("listed videos without captions, left out", silent)
        self.add_deviation("videos with captions that no list names, left out", captions.keys() - listed)


def _youtube_ids(folder: AnnotationFolder, files: list[str]) -> dict[str, str]:
    """Returns YouTube's id of each ``vid<number>``."""
    found = {}
    for entry in folder.read(files, "mapping of ids"):
        pair = [entry.video, *entry.texts]
        number = next((part for part in pair if re.fullmatch(r"vid\d+", part)), None)
        name = next((part for part in pair if part != number), None)
        if number is None or name is None:
            raise DataError(
                f"{entry.where} is not a pair of ids: {pair}",
                where=files[0],
                accepted="lines such as -4wsuPCjDBc_5_15 vid1",
            )
        found[number] = name
    return found


def _id_by(youtube_id: dict[str, str]) -> Callable[[str], str | None]:
    def to_id(name: str) -> str | None:
        stem = stem_of(name)
        stem = youtube_id.get(stem, stem)
        return stem if re.fullmatch(r".{11}_\d+_\d+", stem) else None

    return to_id
