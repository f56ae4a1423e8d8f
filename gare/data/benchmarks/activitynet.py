"""ActivityNet Captions as paragraph retrieval: 10,009 videos to train on, the 4,917 of val_1 to test on.

Source: Krishna et al., ICCV 2017; paragraphs and val_1 as in Zhang et al., ECCV 2018, and Collaborative
Experts. val_2 has other sentences for the same videos, so it is not used as val: the benchmark has no val
split. The clip is the whole video.
"""

from __future__ import annotations

import re
from dataclasses import replace

from gare.data.benchmarks.formats.paragraphs import odd_times, paragraph_clips
from gare.data.benchmarks.reader import (
    BenchmarkReader,
    PublishedSplit,
    VideoAnnotations,
    group_by_id,
    stem_of,
)

PUBLISHED = {
    "train": PublishedSplit(
        10_009, 10_009, "1742cdf0c50c460cff811f89f867c77559a6882b27f18d1c2bdc24d8c4b9f4b9"
    ),
    "test": PublishedSplit(
        4_917,
        4_917,
        "9b39bfbdf6a256a62addb0c54eb1bd56f487300f02e10df6c4bf886dab720e9d",
        "019da795e8a2acec4a7ada3ed1ac161e02bcbb8cbf1db976ccad22070f64e68d",
    ),
}
_SENTENCE_FILES = {
    "train": (r"^train\.", r"(^|[._-])train([._-]|$)"),
    "test": (
        r"(^|[._-])val[._-]?1\.",
        r"(^|[._-])val[._-]?1([._-]|$)",
        r"^(activitynet|anet)?[._-]?(ret[._-])?val\.",
    ),
}
_LIST_FILES = {
    "train": (r"(^|[._-])train[._-]?list", r"(^|[._-])train[._-]?ids"),
    "test": (r"(^|[._-])val[._-]?1[._-]?list", r"(^|[._-])val[._-]?ids"),
}
_LISTS = r"[._-]?(list|ids)"


class ActivityNetReader(BenchmarkReader):
    """Reader of ActivityNet Captions' annotation files.

    They are train.json and val_1.json, or lists such as [{"video": …, "caption": …}]. Lists of videos
    (train_ids.json, val_ids.json, train_list.txt, val_1_list.txt) are compared with them if they are there.
    """

    benchmark = "activitynet"
    protocol = "paragraphs, test on val_1"
    published = PUBLISHED
    test_files = "val_1.json with its 4,917 videos"

    def read_splits(self) -> None:
        """Reads train, and val_1 as test."""
        for split, name in (("train", "train"), ("test", "val_1")):
            entries = self.folder.read_split(
                "train" if split == "train" else "val",
                _SENTENCE_FILES[split],
                f"sentences of {name}",
                f"{name}.json",
                besides=_LISTS,
            )
            source = group_by_id(entries, youtube_name, f"sentences of {name}")
            listed: dict[str, VideoAnnotations] = {}
            for pattern in _LIST_FILES[split]:
                files = self.folder.find((pattern,))
                # The union of the lists: a video that only one list names has no sentences, which is reported
                # below.
                role = f"list of {name}"
                listed |= group_by_id(self.folder.read(files, role) if files else [], youtube_name, role)
            found, odd = paragraph_clips(split, listed, [source])
            # On disk the videos are v_….mp4 or, as downloaders leave them, YouTube's id alone.
            self.clips += [
                replace(clip, names=(*clip.names, clip.clip_id.removeprefix("v_"))) for clip in found
            ]
            self.deviations += [*odd, *odd_times(split, source, ("which a paragraph does not use",) * 2)]


def youtube_name(name: str) -> str | None:
    """Returns a video's id as used for ActivityNet and YouCook2: YouTube's 11 characters after ``v_``."""
    stem = stem_of(name)
    if re.fullmatch(r"[\w-]{11}", stem, re.ASCII):
        return f"v_{stem}"
    return stem if re.fullmatch(r"v_[\w-]{11}", stem, re.ASCII) else None
