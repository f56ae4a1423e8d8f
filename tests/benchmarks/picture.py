"""Figure of the head's training step by batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = {
    "direct": ("direct form", "#b3462c"),
    "all": ("factorised, diversity over all texts", "#5b8db8"),
    "sample": ("factorised, diversity over 64 texts", "#1d4e79"),
}


def draw(steps: list[dict[str, Any]], file: Path) -> None:
    """Draws seconds and peak memory against the batch size, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, key, title in (
        (axes[0], "seconds", "seconds a step"),
        (axes[1], "peak_mb", "peak memory above the inputs, MB"),
    ):
        for name, (label, colour) in NAMES.items():
            points = [(row["pairs"], row[key][name]) for row in steps if name in row[key]]
            axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
        direct = [(row["pairs"], row[key]["direct"]) for row in steps if "direct" in row[key]]
        size, value = direct[-1]
        largest = steps[-1]["pairs"]
        # Time and memory of the direct form grow with the number of pairs.
        axis.plot(
            [size, largest],
            [value, value * (largest / size) ** 2],
            linestyle=":",
            color=NAMES["direct"][1],
            label="direct form, extrapolated",
        )
        axis.set(xscale="log", yscale="log", title=title, xlabel="batch: texts × videos a side")
        axis.set_xticks([row["pairs"] for row in steps], [f"{row['pairs']:,}" for row in steps])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle("Training step of GARE's head on two CPU cores, D = 512, 12 frames")
    figure.savefig(file, dpi=110)
