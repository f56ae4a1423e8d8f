"""Rows of manifests whose videos exist in no folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gare.data.manifest import ManifestRow

COLOURS = ("red", "green", "blue", "pink")


def coloured(split: str, index: int, take: int) -> str:
    """A caption that videos of one colour share but for its take."""
    del split
    return f"a {COLOURS[index % 4]} thing, take {take}"


def rows_of_splits(
    counts: Mapping[str, int], caption: Callable[[str, int, int], str] = coloured
) -> tuple[ManifestRow, ...]:
    """Videos ``SPLITn`` with one, two or three captions in turn.

    Args:
        counts: videos of each split.
        caption: text of a caption, from split, number of the video and number of the caption.
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
