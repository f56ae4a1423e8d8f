"""Comparison of a store with its collection: new, changed, unchanged and gone clips.

The result is computed only from the existing rows and the collection, so that it is the same after any crash.
If a file comes back unchanged, its old row counts again; if two jobs have written a clip, one row counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gare.data.manifest import ManifestRow
from gare.data.store.contents import IDENTITY, RULES, Store, rules_of
from gare.data.store.part_index import digest_of
from gare.data.videos import FileVersion
from gare.errors import DataError, GoneError
from gare.extract.held import Held, HeldRows, Identity

#: Types of errors that the decoder or its limits are to blame for, beside the file.
_OF_THE_DECODER = frozenset(
    ("DecodeMemoryError", "DecoderCrashError", "DecoderFaultError", "EOFError", "BrokenPipeError")
)
#: Clips that are compared at once.
_AT_ONCE = 100_000


@dataclass(frozen=True)
class Comparison:
    """The result of comparing a store with its collection.

    Attributes:
        pending: rows to extract, each with its identity, as far as known, and the attempts so far.
        retired: rows that no longer count, in the form of ``gare.data.store.contents.Store.write_retired``.
        counts: ``new``, ``changed``, ``unchanged``, ``gone`` and ``retried`` clips. New, changed and retried
            clips are to be made; retried ones have failed before in their present state. Unchanged clips are
            stored, or their failure is final.
        lost: ids of the collection with a file that has vanished.
    """

    pending: tuple[dict[str, Any], ...]
    retired: dict[str, dict[str, str]]
    counts: dict[str, int]
    lost: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WantedClip:
    """A clip as a store should hold it.

    Attributes:
        row: of the manifest.
        identity: identity of its source, see ``gare.data.store.contents.IDENTITY``; without size and version
            if they are unknown.
        is_gone: True if its source does not exist any more.
        is_decoded: True if its frames are stored, so that an earlier failure to decode it does not count.
        rules: rules by which the frames were decoded; features of frames by earlier rules do not count.
    """

    row: ManifestRow
    identity: Identity
    is_gone: bool = False
    is_decoded: bool = False
    rules: int = 1

    @classmethod
    def of(cls, row: ManifestRow, version: FileVersion | DataError | None = None) -> WantedClip:
        """Builds the wanted clip from its file's version or fault; None if the file was not checked."""
        if isinstance(version, FileVersion):
            identity = (row.start_s, row.end_s, version.size_bytes, version.version)
            return cls(row, identity)
        return cls(row, (row.start_s, row.end_s, None, None), is_gone=isinstance(version, GoneError))


@dataclass(frozen=True)
class StoreState:
    """The rows and failures of a store at one moment.

    Attributes:
        held: its rows.
        failures: its failures, see ``Store.failures_by_clip``.
    """

    held: HeldRows
    failures: Mapping[str, Sequence[Mapping[str, Any]]]

    @classmethod
    def read(cls, uri: str, *, captions: bool = False) -> StoreState:
        """Reads the state of a store; ``captions`` is True if a row counts only with the right captions.

        Raises:
            DataError: for a part that cannot be read.
        """
        return cls(HeldRows.read(uri, captions=captions), Store(uri).failures_by_clip())


def compare(
    uri: str,
    rows: Sequence[ManifestRow],
    versions: Mapping[str, FileVersion | DataError],
    *,
    retry_failed: bool,
    max_attempts: int = 1,
    again: Container[str] = (),
) -> Comparison:
    """Compares the rows of a frame store with the clips that it should hold.

    Args:
        uri: the store.
        rows: of the manifest.
        versions: result of the source's ``stat`` for each uri of the rows. A file that cannot be checked, but
            is not gone, counts as unchanged.
        retry_failed: True to retry clips that failed on the same file, whatever the reason.
        max_attempts: attempts at a clip in its present state if its failures may pass; see ``is_transient``.
        again: ids of clips to be made again although their file has not changed, if they were made by rules
            before ``gare.data.store.contents.RULES``. Their rows count until others replace them.
    """
    wanted = (WantedClip.of(row, versions[row.uri]) for row in rows)
    return compare_clips(uri, wanted, retry_failed=retry_failed, max_attempts=max_attempts, again=again)


def compare_clips(
    uri: str,
    clips: Iterable[WantedClip],
    *,
    retry_failed: bool,
    max_attempts: int = 1,
    captions: bool = False,
    again: Container[str] = (),
    state: StoreState | None = None,
    is_all: bool = True,
) -> Comparison:
    """Compares as ``compare`` does, for a store of any kind.

    Args:
        uri: the store.
        clips: the clips that it should hold, each once.
        retry_failed: as in ``compare``.
        max_attempts: as in ``compare``.
        captions: True if a row counts only with the captions of the manifest. Pending rows then have
            ``captions``, ``made`` (the part that has the clip with other captions, or None), ``rules`` by
            which its frames were decoded, and ``counted`` (the count that it is in).
        again: as in ``compare``.
        state: of the store, if it is known.
        is_all: False if the store holds other clips as well, which stay as they are.
    """
    state = state or StoreState.read(uri, captions=captions)
    work = _Comparing(state, retry_failed, max_attempts, captions, again)
    left = np.ones(len(state.held), bool)
    remaining = iter(clips)
    while some := list(itertools.islice(remaining, _AT_ONCE)):
        places = state.held.places([clip.row.video_id for clip in some])
        left[places[places >= 0]] = False
        for clip, place, only in zip(some, places.tolist(), state.held.only_rows(places), strict=True):
            work.add(clip, place, only)
    for place in np.flatnonzero(left).tolist() if is_all else ():
        work.counts["gone"] += _retire(
            work.retired, state.held.ids[place], state.held.rows(place), None, "gone"
        )
    return Comparison(tuple(work.pending), work.retired, work.counts, tuple(sorted(work.lost)))


class _Comparing:
    """A comparison that is being made, clip by clip."""

    def __init__(
        self, state: StoreState, retry_failed: bool, max_attempts: int, captions: bool, again: Container[str]
    ) -> None:
        self._state, self._captions, self._again = state, captions, again
        self._retry_failed, self._max_attempts = retry_failed, max_attempts
        self.counts = dict.fromkeys(("new", "changed", "unchanged", "gone", "retried"), 0)
        self.retired: dict[str, dict[str, str]] = {}
        self.pending: list[dict[str, Any]] = []
        self.lost: list[str] = []

    def add(self, clip: WantedClip, place: int, only: Held | None) -> None:
        """Compares a clip with its rows.

        Args:
            clip: the clip.
            place: of its rows; -1 if there are none.
            only: its row if it has one alone.
        """
        video_id = clip.row.video_id
        failed = self._state.failures.get(video_id, ())
        digest = digest_of(clip.row.captions) if self._captions and place >= 0 else b""
        if only and not failed and not clip.is_gone and video_id not in self._again:
            is_same = _same(only.identity, clip.identity) and only.rules >= clip.rules
            if is_same and only.captions == digest:
                self.counts["unchanged"] += 1
                return
        self._add(clip, [only] if only else self._state.held.rows(place), failed, digest)

    def _add(
        self, clip: WantedClip, stored: Sequence[Held], failed: Sequence[Mapping[str, Any]], digest: bytes
    ) -> None:
        counts, video_id = self.counts, clip.row.video_id
        same = [] if clip.is_gone else _of_the_clip(stored, failed, clip)
        matches = [one for one in same if one.captions == digest]
        match = matches[0] if matches else None
        if clip.is_gone and stored:
            self.lost.append(video_id)
            counts["gone"] += 1
        _retire(self.retired, video_id, stored, match, "gone" if clip.is_gone else "changed")
        is_again = video_id in self._again and all(one.rules < RULES for one in same)
        if match and not is_again:
            counts["unchanged"] += 1
            return
        # What failed by earlier rules was made since, and is to be made again.
        known = [one for one in failed if _has_failed(one, clip) and not (match and rules_of(one) < RULES)]
        is_pending = (
            not known or self._retry_failed or _is_tried_again(known, failed, clip, self._max_attempts)
        )
        counted = "changed" if stored or failed else "new"
        if known:
            counted = "retried" if is_pending else "unchanged"
        if not clip.is_gone or not stored:
            counts[counted] += 1
        if is_pending:
            request = _request(clip, max((one["attempts"] for one in failed), default=0))
            if self._captions:
                request["captions"] = list(clip.row.captions)
                request["made"] = same[0].part.location if same and not is_again else None
                request["rules"] = same[0].rules if request["made"] else clip.rules
                request["counted"] = counted
            self.pending.append(request)


def _of_the_clip(stored: Sequence[Held], failed: Sequence[Mapping[str, Any]], clip: WantedClip) -> list[Held]:
    """Returns rows of a clip's present state by rules that still hold; later ones may have refused it."""
    refused = [one for one in failed if _is_refusal(one) and _has_failed(one, clip)]

    def least(held: Held) -> int:
        of_this_file = (rules_of(one) for one in refused if _identity_of(one) == held.identity)
        return max([clip.rules, *of_this_file])

    return [one for one in stored if _same(one.identity, clip.identity) and one.rules >= least(one)]


def _is_refusal(failure: Mapping[str, Any]) -> bool:
    """Returns True if a file failed for what it is, not for the decoder, its limits or what may pass."""
    of_the_file = failure["stage"] == "decode" and failure["error_type"] not in _OF_THE_DECODER
    return of_the_file and not is_transient(failure)


def _identity_of(row: Mapping[str, Any]) -> Identity:
    return tuple(row[key] for key in IDENTITY)


def is_transient(failure: Mapping[str, Any]) -> bool:
    """Returns True if another attempt at a clip may succeed; a guess for a row of an earlier version.

    Earlier versions did not record it. Of their failures, those to fetch are tried again, those to decode are
    not. They also recorded faults of the frame store's disk or server as failures to encode: all of these are
    tried again, except features that are not finite (ValueError).
    """
    if failure["transient"] is not None:
        return bool(failure["transient"])
    if failure["stage"] == "encode":
        return bool(failure["error_type"] != "ValueError")
    return bool(failure["stage"] == "fetch")


def _is_tried_again(
    known: Sequence[Mapping[str, Any]],
    failed: Sequence[Mapping[str, Any]],
    clip: WantedClip,
    max_attempts: int,
) -> bool:
    """Returns True if a clip that failed in its present state is tried again without a request.

    A clip without its file waits for it, and uses up no attempt.

    Args:
        known: its failures in its present state, the last one last.
        failed: all its failures.
        clip: the clip.
        max_attempts: attempts at its present state.
    """
    last = known[-1]
    if clip.is_gone or not is_transient(last):
        return False
    # Attempts are counted across the versions of a file; those at this one came after the last at another.
    before = [one["attempts"] for one in failed if one not in known and one["attempts"] < last["attempts"]]
    return bool(last["attempts"] - max(before, default=0) < max_attempts)


def _has_failed(failure: Mapping[str, Any], clip: WantedClip) -> bool:
    """Returns True if an attempt failed at a clip as it is now, and none has succeeded since."""
    is_of_frames = failure["stage"] == "encode" and rules_of(failure) >= clip.rules
    past = clip.is_decoded and not is_of_frames
    return not past and _same(_identity_of(failure), clip.identity)


def _same(stored: Identity, now: Identity) -> bool:
    """Returns True if a row is of the clip's present state; an unknown version counts as the same."""
    return stored == now or (stored[:2] == now[:2] and now[2:] == (None, None))


def _retire(
    retired: dict[str, dict[str, str]],
    video_id: str,
    stored: Sequence[Held],
    match: Held | None,
    reason: str,
) -> int:
    for one in stored:
        if one is not match:
            doubled = match is not None and one.identity == match.identity and one.captions == match.captions
            retired.setdefault(one.part.checksum, {})[video_id] = "doubled" if doubled else reason
    return 1 if stored else 0


def _request(clip: WantedClip, attempts: int) -> dict[str, Any]:
    return {
        "video_id": clip.row.video_id,
        "uri": clip.row.uri,
        **dict(zip(IDENTITY, clip.identity, strict=True)),
        "attempts": attempts,
    }
