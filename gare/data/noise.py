"""Noise in the supervision: captions of train videos that change places with those of others.

C captions of all rows, in order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gare.data.manifest import Manifest, ManifestRow
from gare.errors import ConfigError

#: Places that are tried for a caption whose text the video of its place has already.
_TRIES = 1000


def with_noise(manifest: Manifest, fraction: float, seed: int) -> Manifest:
    """Exchanges a share of the train captions between videos; marks them, and names the noise as protocol.

    Args:
        manifest: without noise.
        fraction: see ``draw_exchange``.
        seed: see ``draw_exchange``.

    Raises:
        ConfigError: as ``draw_exchange``.
    """
    rows = exchange_captions(manifest.rows, draw_exchange(manifest.rows, fraction, seed))
    return replace(manifest, rows=rows, protocol=f"{manifest.protocol}; {describe_noise(fraction, seed)}")


def describe_noise(fraction: float, seed: int) -> str:
    """Describes the noise for the protocol, such as ``40 % noise, seed 0``."""
    return f"{100 * fraction:g} % noise, seed {seed}"


def count_noisy(rows: Sequence[ManifestRow]) -> int:
    """Counts the captions that are another video's."""
    return sum(sum(row.noisy) for row in rows)


def draw_exchange(rows: Sequence[ManifestRow], fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Draws which train captions change places, a derangement between videos.

    Every chosen caption goes to another video, and its place gets the caption of another video, so that a
    video keeps its number of captions. Where a swap allows it, that caption's text is none of the video's
    own either. The choice depends only on the seed, the ids and the positions of the captions, not on the
    order of the rows; with the same seed, a smaller share is chosen among the captions of a larger one.

    Args:
        rows: of a manifest; those of val and test are left as they are.
        fraction: share of the train captions, rounded to a whole number of them.
        seed: another one gives other noise.

    Returns:
        (C,): for each caption's place, the position of the caption that it gets; its own if not chosen.

    Raises:
        ConfigError: if one video owns more than half of the chosen captions, or none is chosen.
    """
    places = [(number, at) for number, row in enumerate(rows) for at in range(len(row.captions))]
    sources = np.arange(len(places), dtype=np.int64)
    train = [position for position, (number, _) in enumerate(places) if rows[number].split == "train"]
    count = int(len(train) * fraction + 0.5)

    def draw(what: str, positions: Sequence[int]) -> list[int]:
        def key(position: int) -> bytes:
            number, at = places[position]
            text = f"{what}\0{seed}\0{at}\0{rows[number].video_id}"
            return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()

        return sorted(positions, key=key)

    chosen = draw("noise", train)[:count]
    _check_can_change_places(rows, [places[position][0] for position in chosen], len(train), fraction)
    given = draw("exchange", chosen)
    texts = [frozenset(row.captions) for row in rows]

    def stays(place: int, caption: int) -> bool:
        return places[place][0] == places[caption][0]

    def repeats(place: int, caption: int) -> bool:
        number, at = places[caption]
        return rows[number].captions[at] in texts[places[place][0]]

    # As no video owns more than half of them, each swap of the first pass is found, and makes no new fault.
    _swap_faults(chosen, given, stays, len(chosen))
    _swap_faults(
        chosen, given, lambda place, caption: stays(place, caption) or repeats(place, caption), _TRIES
    )
    sources[chosen] = given
    return sources


def exchange_captions(rows: Sequence[ManifestRow], sources: npt.NDArray[np.int64]) -> tuple[ManifestRow, ...]:
    """Gives the rows the captions of ``draw_exchange``, with ``noisy`` set.

    Args:
        rows: without noise.
        sources: (C,), from ``draw_exchange``.
    """
    captions = [caption for row in rows for caption in row.captions]
    noisy = (sources != np.arange(len(sources))).tolist()
    ends = np.cumsum([len(row.captions) for row in rows]).tolist()
    found = []
    for row, end in zip(rows, ends, strict=True):
        own = slice(end - len(row.captions), end)
        texts = tuple(captions[source] for source in sources[own].tolist())
        found.append(replace(row, captions=texts, noisy=tuple(noisy[own])))
    return tuple(found)


def _check_can_change_places(
    rows: Sequence[ManifestRow], owners: Sequence[int], num_train: int, fraction: float
) -> None:
    accepted = "another share, or 0 for none"
    if not owners:
        raise ConfigError(
            f"is {fraction:g}, which chooses none of {num_train} train captions",
            where="data.noise",
            accepted=accepted,
        )
    owner, most = Counter(owners).most_common(1)[0]
    if 2 * most > len(owners):
        raise ConfigError(
            f"is {fraction:g}, and of the {len(owners)} train captions that it chooses {most} are of one "
            f"video, {rows[owner].video_id!r}: they cannot all go to others",
            where="data.noise",
            accepted=accepted,
        )


def _swap_faults(
    places: Sequence[int], given: list[int], is_fault: Callable[[int, int], bool], most: int
) -> None:
    """Swaps the captions of two places wherever this ends a fault and makes none.

    Args:
        places: places of the chosen captions.
        given: caption of each; changed.
        is_fault: returns True if a place must not have a caption.
        most: places that are tried for a fault, the following ones first.
    """
    total = len(places)
    for at in range(total):
        if not is_fault(places[at], given[at]):
            continue
        for step in range(1, min(most, total)):
            other = (at + step) % total
            if not is_fault(places[at], given[other]) and not is_fault(places[other], given[at]):
                given[at], given[other] = given[other], given[at]
                break
