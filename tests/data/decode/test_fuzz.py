"""Files of every kind: each ends as the right pictures at their times or as a failure with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from gare.data.decode.process import DecodeProcess
from tests.films.film import Film
from tests.films.judge import Ask, Verdict, draw_ask, judge
from tests.films.kinds import KINDS, generator, make_film
from tests.films.numbers import LIMIT, draw, read
from tests.helpers.fuzz import damaged_files, outcome, real_clips, table


def test_damaged_files_neither_crash_nor_hang_nor_give_empty_pictures(
    shared: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Lost otherwise: a night's extraction to one bad download, or a training set with holes in it."""
    clips = real_clips(shared / "data/videos", largest=500_000)
    assert len(clips) > 10
    outcomes: Counter[str] = Counter()
    faults = []
    with DecodeProcess() as process:
        for what, path in damaged_files(rng, clips, 60, tmp_path):
            ended = outcome(process, path)
            outcomes[ended] += 1
            if ended.startswith(("DecoderCrashError", "DecodeTimeoutError", "empty picture")):
                faults.append(f"{what}: {ended}")
        broken = {path.name: outcome(process, path) for path in sorted((shared / "data/broken").iterdir())}
    print(table(outcomes))
    assert not faults
    assert sum(outcomes.values()) == 60
    assert len(outcomes) > 2
    failed = {name for name, ended in broken.items() if ended.startswith("DataError")}
    assert failed == {
        *("README.md", "audio_only.mp4", "text_renamed.mp4", "truncated_70pct_index_last.mp4"),
        *("zero_byte.mp4", "zero_duration.mp4"),
    }
    assert {ended for name, ended in broken.items() if name not in failed} == {"whole", "damaged"}


#: Files of each kind; ``make fuzz`` makes hundreds.
_COUNT = 6
#: Of the same files each time; ``make fuzz`` draws new ones.
_SEED = 17
#: Kinds that are silently wrong now and then, by the row of the list of faults.
_WRONG = {
    "hurt_ts": "L9: damage that no decoder notices is not said",
    "hurt_mp4": "L9: damage that no decoder notices is not said",
}
#: Kinds of good files that are refused or marked as incomplete now and then.
_NEEDLESS = {"held_mp4": "L8: a last picture that is held counts as lost"}
_GOOD = (
    *("steady", "late", "negative", "sparse", "variable", "wrapped", "sound_first", "held_avi", "held_mp4"),
    *("two_tracks", "thumbnail", "cover", "subtitles"),
)


@pytest.fixture(scope="module")
def process() -> Iterator[DecodeProcess]:
    with DecodeProcess() as process:
        yield process


def _marked(kinds: dict[str, str] | tuple[str, ...], faults: dict[str, str]) -> list[object]:
    """The kinds as parameters; those with a known fault may fail."""
    return [
        pytest.param(kind, marks=pytest.mark.xfail(strict=False, raises=AssertionError, reason=faults[kind]))
        if kind in faults
        else kind
        for kind in kinds
    ]


def _verdicts(process: DecodeProcess, kind: str, folder: Path) -> Iterator[tuple[Film, Ask, Verdict]]:
    for number in range(_COUNT):
        rng = generator(_SEED, kind, number)
        film = make_film(kind, rng, folder, number)
        ask = draw_ask(rng, film)
        yield film, ask, judge(process, film, ask)


@pytest.mark.parametrize("kind", _marked(tuple(KINDS), _WRONG))
def test_no_file_is_silently_wrong(process: DecodeProcess, kind: str, tmp_path: Path) -> None:
    """Lost otherwise: a model to pictures that are not those of the second that a text describes."""
    wrong = [
        f"{film.what} | {ask} | {verdict.why}"
        for film, ask, verdict in _verdicts(process, kind, tmp_path)
        if verdict.ending == "wrong"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", _marked(_GOOD, _NEEDLESS))
def test_good_files_are_given_whole(process: DecodeProcess, kind: str, tmp_path: Path) -> None:
    """Lost otherwise: clips with which nothing is wrong but how people's cameras and tools write them."""
    refused = [
        f"{film.what} | {ask} | {verdict.ending}: {verdict.why}"
        for film, ask, verdict in _verdicts(process, kind, tmp_path)
        if verdict.is_needless
    ]
    assert not refused, "\n".join(refused)


def test_files_that_name_others_or_hold_no_pictures_are_refused(
    process: DecodeProcess, seed: int, tmp_path: Path
) -> None:
    """Lost otherwise: sound files and addresses that end as clips of nothing in a training set."""
    for kind in ("sound_only", "sdp"):
        assert {verdict.ending for _, _, verdict in _verdicts(process, kind, tmp_path)} == {"failed"}


@pytest.mark.parametrize("size", [(64, 64), (160, 120), (64, 96), (40, 40)])
def test_numbers_are_read_back_and_mixtures_are_not(size: tuple[int, int], rng: np.random.Generator) -> None:
    """Lost otherwise: the fuzzer's truth; a picture of two pictures would count as one of them."""
    for number in range(0, LIMIT, 7):
        assert read(draw(number, *size)) == number
    for _ in range(20):
        one, two = rng.choice(LIMIT, 2, replace=False)
        first, second = (draw(int(number), *size) for number in (one, two))
        mixed = np.where(np.arange(size[1])[:, None, None] < size[1] // 2, first, second)
        assert read(mixed) in (None, int(one), int(two))
        assert read((first // 2 + second // 2).astype(np.uint8)) is None


def test_each_film_is_what_it_says(seed: int, tmp_path: Path) -> None:
    """Lost otherwise: the fuzzer's truth; what PyAV decodes in order must be the numbers that were drawn."""
    for number in range(_COUNT):
        film = make_film("steady", generator(seed, "steady", number), tmp_path, number)
        with av.open(str(film.path)) as container:
            seen = [read(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        assert seen == film.showings[0].numbers.tolist(), film.what


def test_the_judge_sees_wrong_answers(process: DecodeProcess, seed: int, tmp_path: Path) -> None:
    """Lost otherwise: every other test here; a judge that lets all pass would show no fault."""
    film = make_film("steady", generator(seed, "steady", 0), tmp_path, 0)
    (shown,) = film.showings
    ask = Ask(None, None, "uniform", 1.0, 8, "auto")
    assert judge(process, film, ask).ending == "right"
    half = len(shown.numbers) // 2
    off_s = 2.5 * film.frame_s
    for name, other in {
        "late": replace(shown, times_s=shown.times_s + off_s, end_s=shown.end_s + off_s),
        "half": replace(
            shown,
            numbers=np.arange(2 * len(shown.numbers)),
            times_s=np.arange(2 * len(shown.numbers)) * film.frame_s,
            end_s=2 * shown.end_s,
        ),
        "other": replace(shown, numbers=shown.numbers + 500),
        "clip": replace(
            shown, numbers=shown.numbers[half:], times_s=shown.times_s[half:] - shown.times_s[half]
        ),
    }.items():
        assert judge(process, replace(film, showings=(other,)), ask).ending == "wrong", name
    assert judge(process, replace(film, showings=()), ask).ending == "wrong"
    assert judge(process, replace(film, lost=(0.0, 1.0)), ask).ending == "wrong"
