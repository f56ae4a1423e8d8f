"""Files of which an earlier version took other frames are named by what is unusual about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gare.data.decode.clip_request import ClipRequest
from gare.data.decode.outdated import outdated_traits
from gare.data.decode.process import DecodeProcess
from gare.errors import DataError
from tests.films.kinds import make_film


@pytest.mark.parametrize(
    ("kind", "trait"),
    [
        ("joined", "its clock starts anew"),
        ("two_tracks", "it has several video tracks"),
        ("thumbnail", "it has several video tracks"),
        ("open_start", "its first pictures depend on others before them"),
        ("hls", "it is not decoded any more: cannot be opened as a video: it is an HLS"),
    ],
)
def test_what_is_outdated_is_named(kind: str, trait: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Frames that were wrong would stay in the store for ever, as "unchanged"."""
    film = make_film(kind, rng, tmp_path, 0)
    assert trait in outdated_traits(film.path, "released", complete=True)


@pytest.mark.parametrize(
    ("name", "complete", "trait"),
    [
        ("01/concat.ts", True, "its clock starts anew"),
        ("02/gap264.avi", False, "it was taken for damaged"),
        ("02/gapm4.avi", False, "it was taken for damaged"),
        ("21/h264b.avi", True, "its times are in decoding order"),
    ],
)
def test_files_that_were_read_wrongly_are_named(shared: Path, name: str, complete: bool, trait: str) -> None:
    """These gave wrong frames: they are the reason for looking."""
    assert trait in outdated_traits(shared / "data/faults" / name, "released", complete=complete)


def test_pictures_that_share_times_were_wrong_by_keyframes_alone(shared: Path) -> None:
    """Other samplings gave the right frames and need no second decode."""
    path = shared / "data/videos" / "stream-of-water.webm"
    assert outdated_traits(path, "keyframes", complete=True) == "its pictures share times"
    assert outdated_traits(path, "released", complete=True) == ""


def test_most_files_are_left_alone(shared: Path) -> None:
    """An upgrade that decoded whole collections again would cost days."""
    named = {}
    for path in sorted((shared / "data/videos").glob("*.*")):
        try:
            named[path.name] = outdated_traits(path, "released", complete=True)
        except DataError:
            continue
    assert len(named) > 20
    assert sum(map(bool, named.values())) <= len(named) / 4, named


def test_the_child_looks(shared: Path, tmp_path: Path) -> None:
    """A file that hangs or crashes its decoder must not take the check of a store with it."""
    with DecodeProcess() as process:
        path = str(shared / "data/faults/01" / "concat.ts")
        assert "starts anew" in process.find_outdated_traits(path, sampling="released", complete=True)
        (tmp_path / "text.mp4").write_text("no video")
        assert "not decoded any more" in process.find_outdated_traits(
            str(tmp_path / "text.mp4"), sampling="released", complete=True
        )
        with pytest.raises(DataError, match="is not on this machine"):
            process.find_outdated_traits("s3://bucket/a.mp4", sampling="released", complete=True)
        # And goes on decoding.
        assert process.extract(ClipRequest(path, image_size=32)).frames
