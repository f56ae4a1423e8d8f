"""YouCook2: each annotated segment is a clip with one sentence; 10,337 for train, the 3,492 of val for test.

Source: Zhou et al., AAAI 2018, with its own train and val videos; retrieval of segments as in Miech et al.,
ICCV 2019, who had 3,350 of the val clips: numbers of galleries of different size cannot be compared. There is
no val split beside test.
"""

from __future__ import annotations

from collections import Counter

from gare.data.benchmarks.activitynet import youtube_name
from gare.data.benchmarks.formats.paragraphs import odd_times
from gare.data.benchmarks.reader import (
    BenchmarkClip,
    BenchmarkReader,
    PublishedSplit,
    VideoAnnotations,
    group_by_id,
    names_of,
)

PUBLISHED = {
    "train": PublishedSplit(
        10_337, 10_337, "5bc9e34476977169f974ad533c751a66b8507a756bd624dc4504195d3efb0806"
    ),
    "test": PublishedSplit(
        3_492,
        3_492,
        "5f0b5052e9e8f27bd6b5f8bb8ea0301842c7407e11d74edd95c118994670b735",
        "c6d0fc6855548f5466ff4a529c0e91c3160399d4017aec31dcab391dc46479b2",
    ),
}
_FILES = {
    "train": (r"(^|[._-])train(ing)?([._-]|$)",),
    "test": (r"(^|[._-])val(idation)?([._-]|$)",),
}
_BOTH = (r"annotations_trainval", r"trainval")


class YouCook2Reader(BenchmarkReader):
    """Reader of YouCook2's annotation files.

    They are yc2_train.json and yc2_val.json in ActivityNet's layout, or the data set's own
    youcookii_annotations_trainval.json.
    """

    benchmark = "youcook2"
    protocol = "segments, test on val"
    published = PUBLISHED
    test_files = "yc2_val.json with its 457 videos and 3,492 segments"

    def read_splits(self) -> None:
        """Reads train, and val as test."""
        if both := self.folder.find(_BOTH):
            entries = self.folder.read(both, "annotations")
            parts = {
                "train": [entry for entry in entries if entry.split == "train"],
                "test": [entry for entry in entries if entry.split == "val"],
            }
        else:
            parts = {
                split: self.folder.read_split(name, _FILES[split], f"file of {name}", f"yc2_{name}.json")
                for split, name in (("train", "train"), ("test", "val"))
            }
        for split, listed in parts.items():
            videos = group_by_id(listed, youtube_name, f"annotations of {split}")
            untimed, repeated = [], []
            for name, video in videos.items():
                if len(video.times) != len(video.texts):
                    untimed.append(name)
                    continue
                found = _clips(name, video, split)
                self.clips += found
                repeated += [clip.clip_id for clip in found if "~" in clip.clip_id]
            self.add_deviation(f"{split} videos without a time for each sentence, left out", untimed)
            self.add_deviation(f"{split} clips with the start and end of another", repeated)
            self.deviations += odd_times(split, videos, ("turned round", "where its clip ends"))


def _clips(name: str, video: VideoAnnotations, split: str) -> list[BenchmarkClip]:
    """Builds a clip for each segment; the id holds start and end, and a count if two segments share both."""
    clips = []
    seen: Counter[tuple[float, float]] = Counter()
    for text, times in zip(video.texts, video.times, strict=True):
        start_s, end_s = sorted(times)
        seen[start_s, end_s] += 1
        again = f"~{seen[start_s, end_s]}" if seen[start_s, end_s] > 1 else ""
        clip_id = f"{name}#{start_s:g}-{end_s:g}{again}"
        names = names_of(name, *video.names, name.removeprefix("v_"))
        clips.append(BenchmarkClip(clip_id, names, split, (text,), start_s, end_s))
    return clips
