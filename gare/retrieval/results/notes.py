"""The note on a run's page in MLflow: its scores as a table, and the data that they were measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "R50": "R@50", "MdR": "MdR", "MnR": "MnR"}
_DIRECTIONS = {"t2v": "text → video", "v2t": "video → text"}
_VARIANTS = {"": "", "dsl/": ", dual softmax", "qbnorm/": ", query bank"}


def evaluation_note(results: Sequence[Mapping[str, Any]]) -> str:
    """Writes Markdown with one table for each split that was scored.

    Args:
        results: as evaluate writes them, with ``split``, ``benchmark``, ``protocol``, ``split_hash``,
            ``num_texts``, ``num_videos``, ``metrics`` and ``intervals``, perhaps with ``note``.
    """
    return "\n\n".join(map(_section, results)) + "\n"


def _section(result: Mapping[str, Any]) -> str:
    intervals = result.get("intervals", {})
    lines = [
        f"**{result['split']}** of {_plain(result['benchmark'])} ({_plain(result['protocol'])}), "
        f"{result['num_texts']:,} texts × {result['num_videos']:,} videos, "
        f"split {result['split_hash'][:12]}{'; 95 % intervals in brackets' if intervals else ''}",
        "",
        f"| {' | '.join(['', *_COLUMNS.values()])} |",
        "| --- |" + " ---: |" * len(_COLUMNS),
    ]
    for prefix, suffix in _VARIANTS.items():
        for direction, name in _DIRECTIONS.items():
            if f"{prefix}{direction}/R1" in result["metrics"]:
                keys = [f"{prefix}{direction}/{column}" for column in _COLUMNS]
                cells = [_cell(result["metrics"][key], intervals.get(key)) for key in keys]
                lines.append(f"| {' | '.join([name + suffix, *cells])} |")
    lines += ["", _plain(result["note"])] if result.get("note") else []
    return "\n".join(lines)


def _cell(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def _plain(text: str) -> str:
    """Escapes Markdown in a text; users choose the names of data sets and protocols."""
    return "".join(f"\\{char}" if char in "\\`*_[]<>|#" else char for char in " ".join(text.split()))
