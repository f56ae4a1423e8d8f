"""This process's memory now, and its peak since a moment of its own, as Linux keeps them."""

from __future__ import annotations

from pathlib import Path


def reset_peak() -> float:
    """Forgets earlier peaks; returns what is held now, MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mb()


def peak_mb() -> float:
    """The largest memory since then, MB."""
    return _status_mb("VmHWM")


def held_mb() -> float:
    """What is held now, MB; earlier peaks stay."""
    return _status_mb("VmRSS")


def _status_mb(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6
