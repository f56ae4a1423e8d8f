"""MSR-VTT, protocol 1k-A: 9,000 or 7,010 videos to train on, with all captions; 1,000 pairs to test on.

Source: the split of Yu et al., ECCV 2018 (JSFusion); the 9k list is that of Gabeur et al., ECCV 2020. Every
video has 20 captions. Test has one sentence for each video, taken from the test file: some of them are not
literally among the 20. There is no val split.
"""

from __future__ import annotations

import re
from typing import Literal

from gare.data.benchmarks.annotation_folder import AnnotationFolder
from gare.data.benchmarks.reading import (
    BenchmarkClip,
    Deviation,
    Gathered,
    Published,
    Reading,
    finish,
    gather,
    names_of,
    stem_of,
)
from gare.errors import DataError, shown

CAPTIONS_PER_VIDEO = 20
TEST = Published(
    1000,
    1000,
    "64462f74c95235d602a0a231e7f2125640ebbf3de0e226fbdd5e64f621c46d83",
    "aedce8ee024c8c767642f062c355220a79c55557a3e892ca498d527fb945797c",
)
TRAIN = {
    "9k": Published(9000, 180_000, "12e456ceab25905ffc585c4dfdf1d2972f563b63c317effdee7943bc84075ace"),
    "7k": Published(7010, 140_200, "e63825a66cb7194c0502b86c4178dc1dc4b0e84bd47337b563d9f4cd58890596"),
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


def read_msrvtt(location: str, train_list: Literal["9k", "7k"]) -> Reading:
    """Reads MSR-VTT's annotation files.

    Args:
        location: their folder: MSRVTT_data.json, MSRVTT_train.9k.csv or 7k.csv and MSRVTT_JSFUSION_test.csv,
            or lists such as [{"video": "video0.mp4", "caption": …}].
        train_list: which videos to train on.

    Raises:
        DataError: for files that are missing or cannot be read, and for another test split than 1k-A's.
    """
    folder = AnnotationFolder(location)
    test = gather(
        folder.need(_TEST_FILES, "1k-A test file", "MSRVTT_JSFUSION_test.csv"), _to_id, "1k-A test file"
    )
    train = gather(
        folder.need(_TRAIN_FILES[train_list], f"{train_list} train list", f"MSRVTT_train.{train_list}.csv"),
        _to_id,
        f"{train_list} train list",
    )
    if not any(video.texts for video in train.values()):
        captions = folder.need(
            _CAPTION_FILES,
            "file with the captions of train",
            "MSRVTT_data.json, or train_val_videodatainfo.json and test_videodatainfo.json",
            besides=_OTHER_LANGUAGES,
            may_be_many=True,
        )
        known = gather(captions, _to_id, "captions")
        train = {name: _joined(video, known.get(name, Gathered())) for name, video in train.items()}
    bare = sorted(name for name, video in test.items() if len(set(video.texts)) != 1)
    if bare:
        raise DataError(
            f"{len(bare)} test videos have other than one sentence: {', '.join(bare[:10])}",
            where=shown(location),
            accepted="the one sentence that JSFusion chose for each: MSRVTT_JSFUSION_test.csv",
        )
    silent = tuple(sorted(name for name, video in train.items() if not video.texts))
    uneven = tuple(
        sorted(
            name for name, video in train.items() if video.texts and len(video.texts) != CAPTIONS_PER_VIDEO
        )
    )
    clips = [
        BenchmarkClip(name, names_of(name, *video.names), split, tuple(sorted(video.texts)))
        for split, videos in (("train", train), ("test", test))
        for name, video in videos.items()
        if video.texts
    ]
    return finish(
        Reading(
            benchmark="msrvtt",
            protocol=f"1k-A, {train_list} train list, all captions",
            clips=tuple(clips),
            published={"train": TRAIN[train_list], "test": TEST},
            deviations=tuple(
                Deviation(what, ids)
                for what, ids in (
                    ("train videos without captions, left out", silent),
                    (f"train videos with other than {CAPTIONS_PER_VIDEO} captions", uneven),
                )
                if ids
            ),
            annotation_sha256=folder.sha256,
        ),
        test_files="MSRVTT_JSFUSION_test.csv with its 1,000 videos",
    )


def _joined(video: Gathered, known: Gathered) -> Gathered:
    return Gathered(names=video.names, texts=known.texts)


def _to_id(name: str) -> str | None:
    # msr7020 is video7020 in the test file's second column.
    match = re.fullmatch(r"(?:video|msr)(\d+)", stem_of(name))
    return f"video{match[1]}" if match else None
