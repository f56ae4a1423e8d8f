"""Rows of manifests without video files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gare.data.manifest import ManifestRow

COLOURS = ("red", "green", "blue", "pink")


def coloured(split: str, index: int, take: int) -> str:
    """Returns a caption that differs only in its take between videos of one colour."""
    del split
    return f"a {COLOURS[index % 4]} thing, take {take}"


def rows_of_splits(
    counts: Mapping[str, int], caption: Callable[[str, int, int], str] = coloured
) -> tuple[ManifestRow, ...]:
    """Returns rows for videos ``SPLITn``, with one, two or three captions in turn.

    Args:
        counts: number of videos in each split.
        caption: returns a caption for the split, the video's number and the caption's number.
    """
    return tuple(
        ManifestRow(
            f"{split}{index}",
            f"/videos/{split}{index}.mp4",
            None,
            None,
            split,
            tuple(caption(split, index, take) for take in range(1 + index % 3)),
        )
        for split, count in counts.items()
        for index in range(count)
    )
