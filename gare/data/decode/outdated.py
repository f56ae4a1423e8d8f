"""Traits of a video file for which an earlier version of this package may have taken wrong frames.

The column ``rules`` of a store tells the version, see ``gare.data.store.contents.RULES``. A file is only
probed here, not decoded: some of the reported files would give the same frames again. Damage that only
decoding shows is not found, since finding it would cost as much as making all clips again. Rules of version 1
took the first video track, trusted every time that a packet states, did not look at the demuxer's log, and
read playlists.
"""

from __future__ import annotations

from pathlib import Path

from gare.data.decode.packets import DECODING_ORDER, DECODING_TIMES
from gare.data.decode.probe import Probe, probe
from gare.data.decode.sampling import Sampling
from gare.errors import DataError

_TRAITS = {
    "joined clocks": "its clock starts anew",
    "wrapped clock": "its clock wraps",
    DECODING_ORDER: "its times are in decoding order",
    DECODING_TIMES: "it holds pictures (AVI)",
    "negative times": "its times begin below zero",
    "other keyframes": "its keyframes are not those that it lists",
    "no keyframe first": "its first pictures depend on others before them",
}


def outdated_traits(path: str | Path, sampling: Sampling, *, complete: bool | None = None) -> str:
    """Returns the traits of a file for which frames by version 1's rules may be wrong; empty without any.

    Args:
        path: the file.
        sampling: policy by which its frames were chosen.
        complete: True if the file was then taken to be whole; None if unknown.

    Raises:
        DataError: if the disk fails; a fault of the file itself is a trait.
    """
    try:
        source = probe(path)
    except DataError as error:
        if error.is_transient:
            raise
        return f"it is not decoded any more: {error.what}"
    return "; ".join(_traits(source, sampling, complete=complete))


def _traits(source: Probe, sampling: Sampling, *, complete: bool | None) -> list[str]:
    found = [words for trait, words in _TRAITS.items() if trait in source.traits]
    if source.num_video_streams > 1:
        found.append("it has several video tracks")
    if sampling == "keyframes" and "shared timestamps" in source.traits:
        found.append("its pictures share times")
    if source.fault:
        found.append(f"it is damaged: {source.fault}")
    elif complete is False:
        found.append("it was taken for damaged, and may not be")
    if source.has_moved_end:
        found.append("it ended elsewhere")
    if source.codec == "mpeg4":  # only decoding tells whether they are
        found.append("its pictures may be stored in another order than they are shown in (MPEG-4)")
    return found
