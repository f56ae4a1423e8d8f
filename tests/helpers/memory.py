"""Memory of this process, now and at its peak, as reported by Linux."""

from __future__ import annotations

from pathlib import Path


def reset_peak() -> float:
    """Resets the peak; returns the memory held now, MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mb()


def peak_mb() -> float:
    """Returns the largest memory since ``reset_peak``, MB."""
    return _status_mb("VmHWM")


def held_mb() -> float:
    """Returns the memory held now, MB, without resetting the peak."""
    return _status_mb("VmRSS")


def _status_mb(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6
