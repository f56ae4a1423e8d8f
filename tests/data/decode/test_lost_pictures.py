"""gare/data/decode/packets.py: what is lost inside a Matroska file is told from pictures that are held."""

from __future__ import annotations

import re
from pathlib import Path

import av
import numpy as np
import pytest

from gare.data.decode.clip import decode_clip
from gare.data.decode.packets import ErrorLog
from gare.data.decode.probe import probe
from tests.films.film import Recipe, Track, write

CLUSTER = bytes.fromhex("1F43B675")
LIVE = {"live": "1"}


def film(path: Path, times_s: np.ndarray, sounds_s: list[list[float]], options: dict[str, str]) -> bytes:
    """A Matroska file of pictures that begin at some times, and of sounds that go on for some seconds."""
    pictures = Track(Recipe("libx264", 64, 64, 10, 10), range(len(times_s) - 1), times_s)
    write(path, "matroska", [pictures, *(Track(None, times_s=span) for span in sounds_s)], options)
    return path.read_bytes()


@pytest.mark.parametrize("damage", ["zeros", "noise"])
def test_damage_among_the_first_pictures_is_told(
    tmp_path: Path, rng: np.random.Generator, damage: str
) -> None:
    """FFmpeg reads them to know the codec, and says there what is lost: most were gone without a word."""
    path = tmp_path / "film.mkv"
    data = bytearray(film(path, np.arange(61) / 10, [], {}))
    assert probe(path).fault == ""
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    at = int(places[int(rng.integers(2, 6))] or 0) - 8  # before a block, over its header
    data[at : at + 40] = bytes(40) if damage == "zeros" else b"\x01" * 40
    path.write_bytes(data)
    source = probe(path)
    assert len(source.pts) < 60
    assert "container is damaged" in source.fault
    assert not decode_clip(path).complete


def test_a_log_is_that_of_its_file(tmp_path: Path, shared: Path) -> None:
    """One process reads many files; what is said of the last one would be held against the next."""
    good, bad = shared / "data/videos/crystal.webm", tmp_path / "bad.webm"
    data = bytearray(good.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50_000] = bytes(50_000)
    bad.write_bytes(data)
    level = av.logging.get_level(), av.logging.get_skip_repeated()
    assert [bool(probe(path).fault) for path in (bad, good, bad, good)] == [True, False, True, False]
    assert (av.logging.get_level(), av.logging.get_skip_repeated()) == level
    with pytest.raises(KeyError), ErrorLog():
        raise KeyError
    assert (av.logging.get_level(), av.logging.get_skip_repeated()) == level


@pytest.mark.parametrize("num_sounds", [1, 2])
def test_a_lost_piece_of_a_live_recording_is_told(tmp_path: Path, num_sounds: int) -> None:
    """A browser's recording states no sizes: a second was lost, and the picture before shown through it."""
    path = tmp_path / "live.mkv"
    data = film(path, np.arange(81) / 10, [[0.0, 8.0]] * num_sounds, LIVE)
    assert probe(path).fault == ""
    starts = [found.start() for found in re.finditer(re.escape(CLUSTER), data)]
    path.write_bytes(data[: starts[3]] + data[starts[4] :])
    clip = decode_clip(path)
    assert not clip.complete
    assert re.search(r"(0\.9|1\.0)\d s are missing", clip.note)


def test_held_pictures_and_pauses_are_no_loss(tmp_path: Path) -> None:
    """Slides, talks with pauses, and screen recordings would be called damaged."""
    path = tmp_path / "slides.mkv"
    held_s = np.array([0, 0.1, 0.2, 0.3, 2.3, 2.4, 2.5, 2.6, 2.7, 2.8])
    ends = {
        "sound goes on": [[0.0, 2.8]],
        "no sound": [],
        "sound ends": [[0.0, 0.5]],
        "sound begins later": [[2.0, 2.8]],
        "another sound goes on": [[0.0, 2.8], [0.0, 0.5]],
    }
    for options in ({}, LIVE):
        for name, sounds_s in ends.items():
            film(path, held_s, sounds_s, options)
            assert (name, probe(path).fault) == (name, "")


def paused(path: Path, times_s: list[float], sounds_s: list[tuple[float, float]]) -> None:
    """Pictures beside one track of sound that pauses."""
    parts = path.with_name("parts.mkv")
    recipe = Recipe("libx264", 64, 64, 10, 1)
    with av.open(str(path), "w", format="matroska") as out:
        rows = []
        for span in sounds_s:
            write(
                parts,
                "matroska",
                [Track(recipe, range(len(times_s) - 1), times_s), Track(None, times_s=span)],
            )
            with av.open(str(parts)) as part:
                if not out.streams:
                    streams = [out.add_stream_from_template(stream) for stream in part.streams]
                for packet in part.demux():
                    if packet.size and (packet.stream_index == 1 or span == sounds_s[0]):
                        packet.stream = streams[packet.stream_index]
                        rows.append(packet)
        for packet in sorted(rows, key=lambda packet: packet.dts):
            out.mux(packet)


@pytest.mark.parametrize(
    ("times_s", "sounds_s", "is_lost"),
    [
        ([0, 0.1, 0.2, 0.3, 2.3, 2.4, 2.5, 2.6, 2.7], [(0.0, 0.4), (2.3, 2.7)], True),
        # Each pauses by itself as well.
        ([0, 0.1, 0.2, 0.3, 2.3, 2.4, 2.5, 2.6, 2.7], [(0.0, 0.4), (1.0, 1.6), (2.3, 2.7)], False),
        ([0, 0.1, 0.2, 0.3, 2.3, 2.4, 2.5, 5.5, 5.6], [(0.0, 0.4), (2.3, 5.6)], False),
        # Each pauses where the other does not.
        ([0, 0.1, 0.2, 0.3, 2.3, 2.4, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0], [(0.0, 2.4), (2.9, 3.0)], False),
    ],
    ids=["both", "sound pauses more", "pictures pause more", "apart"],
)
def test_only_what_all_streams_lack_is_lost(
    tmp_path: Path, times_s: list[float], sounds_s: list[tuple[float, float]], is_lost: bool
) -> None:
    """A talk whose sound is cut where nobody speaks would be called damaged, or a lost piece would not."""
    paused(tmp_path / "paused.mkv", times_s, sounds_s)
    assert ("are missing" in probe(tmp_path / "paused.mkv").fault) == is_lost
