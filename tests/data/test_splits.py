"""What a run learns from stays what it began with."""

from __future__ import annotations

from dataclasses import replace

from gare.data.manifest import ManifestRow
from gare.data.splits import StoredSplits


def row(video_id: str, split: str, caption: str = "a dog") -> ManifestRow:
    return ManifestRow(video_id, f"/videos/{video_id}.mp4", None, None, split, (caption,))


def test_a_store_that_grows_changes_no_run() -> None:
    """Else the night's extraction changes the order of samples of a training that continues, unnoticed."""
    begun = StoredSplits(
        (row("a", "train"), row("c", "train")), (row("v", "val"),), (), (), "m", "s", "own", "own"
    )
    grown = replace(
        begun,
        train=(row("a", "train"), row("b", "train"), row("c", "train")),
        val=(row("v", "val"), row("w", "val")),
    )
    assert grown.hashes() != begun.hashes()
    assert grown.restricted_to(begun.ids()) == begun
    # What is missing, or has another caption, is not the same any more.
    for other in (
        replace(begun, train=begun.train[:1]),
        replace(begun, val=(row("v", "val", "a cat"),)),
    ):
        assert other.restricted_to(begun.ids()).hashes() != begun.hashes()
