"""MSR-VTT, protocol 1k-A: 9,000 or 7,010 videos to train on, with all captions; 1,000 pairs to test on.

Source: the split of Yu et al., ECCV 2018 (JSFusion); the 9k list is that of Gabeur et al., ECCV 2020. Every
video has 20 captions. Test has one sentence for each video, taken from the test file: some of them are not
literally among the 20. There is no val split.
"""

from __future__ import annotations

import re

from gare.config.data import DataConfig
from gare.data.benchmarks.reader import (
    BenchmarkReader,
    PublishedSplit,
    VideoAnnotations,
    group_by_id,
    stem_of,
)
from gare.errors import DataError, without_secrets

CAPTIONS_PER_VIDEO = 20
TEST = PublishedSplit(
    1000,
    1000,
    "64462f74c95235d602a0a231e7f2125640ebbf3de0e226fbdd5e64f621c46d83",
    "aedce8ee024c8c767642f062c355220a79c55557a3e892ca498d527fb945797c",
)
TRAIN = {
    "9k": PublishedSplit(9000, 180_000, "12e456ceab25905ffc585c4dfdf1d2972f563b63c317effdee7943bc84075ace"),
    "7k": PublishedSplit(7010, 140_200, "e63825a66cb7194c0502b86c4178dc1dc4b0e84bd47337b563d9f4cd58890596"),
}
_TEST_FILES = (
    r"jsfusion.*test|test.*jsfusion",
    r"test_?-?1k|1k-?_?a?[._-]?test",
    r"(^|[._-])ret[._-]test",
    r"^(msrvtt[._-])?test\.",
)
_TRAIN_FILES = {
    "9k": (
        r"train[._-]*9k|9k[._-]*train",
        r"train_list_jsfusion|jsfusion.*train",
        r"(^|[._-])ret[._-]train[._-]",
        r"^(msrvtt[._-])?train\.",
    ),
    "7k": (r"train[._-]*7k|7k[._-]*train",),
}
_CAPTION_FILES = (
    r"^msr-?_?vtt_data",
    r"videodatainfo",
    r"^msr-?_?vtt.*(caption|annot|sentence)",
    r"^caption",
)
# The Italian edition has the same layout and ids.
_OTHER_LANGUAGES = r"ital"


class MsrvttReader(BenchmarkReader):
    """Reader of MSR-VTT's annotation files.

    They are MSRVTT_data.json, MSRVTT_train.9k.csv or 7k.csv and MSRVTT_JSFUSION_test.csv, or lists such as
    [{"video": "video0.mp4", "caption": …}]. ``data.train_list`` names the videos to train on.
    """

    benchmark = "msrvtt"
    test_files = "MSRVTT_JSFUSION_test.csv with its 1,000 videos"

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        self.train_list = data.train_list
        self.protocol = f"1k-A, {self.train_list} train list, all captions"
        self.published = {"train": TRAIN[self.train_list], "test": TEST}

    def read_splits(self) -> None:
        """Reads test and train.

        Raises:
            DataError: as ``BenchmarkReader``, and for a test video with other than one sentence.
        """
        test, train = self._read_test(), self._read_train()
        bare = sorted(name for name, video in test.items() if len(set(video.texts)) != 1)
        if bare:
            raise DataError(
                f"{len(bare)} test videos have other than one sentence: {', '.join(bare[:10])}",
                where=without_secrets(self.folder.location),
                accepted="the one sentence that JSFusion chose for each: MSRVTT_JSFUSION_test.csv",
            )
        silent = self.add_captioned("train", train)
        self.add_captioned("test", test)
        self.add_deviation("train videos without captions, left out", silent)
        self.add_deviation(
            f"train videos with other than {CAPTIONS_PER_VIDEO} captions",
            [name for name, video in train.items() if len(video.texts) not in (0, CAPTIONS_PER_VIDEO)],
        )

    def _read_test(self) -> dict[str, VideoAnnotations]:
        role = "1k-A test file"
        return group_by_id(
            self.folder.read_required(_TEST_FILES, role, "MSRVTT_JSFUSION_test.csv"), _to_id, role
        )

    def _read_train(self) -> dict[str, VideoAnnotations]:
        files, role = _TRAIN_FILES[self.train_list], f"{self.train_list} train list"
        train = group_by_id(
            self.folder.read_required(files, role, f"MSRVTT_train.{self.train_list}.csv"), _to_id, role
        )
        if any(video.texts for video in train.values()):
            return train
        captions = self.folder.read_required(
            _CAPTION_FILES,
            "file with the captions of train",
            "MSRVTT_data.json, or train_val_videodatainfo.json and test_videodatainfo.json",
            besides=_OTHER_LANGUAGES,
            may_be_many=True,
        )
        known = group_by_id(captions, _to_id, "captions")
        return {
            name: VideoAnnotations(names=video.names, texts=known.get(name, VideoAnnotations()).texts)
            for name, video in train.items()
        }


def _to_id(name: str) -> str | None:
    # msr7020 is video7020 in the test file's second column.
    match = re.fullmatch(r"(?:video|msr)(\d+)", stem_of(name))
    return f"video{match[1]}" if match else None
