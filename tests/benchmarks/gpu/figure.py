"""Draw the head's step by batch, form and device: ``python -m tests.benchmarks.gpu.figure RESULT… FILE.png``.

A result is what ``make bench-gpu`` prints on stdout with the part ``head``: one file a device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Form, its name in the legend, its colour.
FORMS = (
    ("direct", "direct form, dropout of each pair", "#b3462c"),
    ("plain", "factorised, plain operations", "#8fb4d3"),
    ("fused", "factorised, fused kernels", "#1d4e79"),
    ("fused, graph", "the same as a CUDA graph", "#2a9d8f"),
    ("fused, tf32", "fused kernels, TF32 products", "#7b5ea7"),
    ("dot products", "dot products alone: no increments", "#777777"),
)
STYLES = ("-", "--", ":")


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Draws milliseconds, and peak GB, against the batch size; both axes logarithmic.

    Args:
        results: results of one device each, at most three.
        file: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    for axis, key, title in ((axes[0], "ms", "milliseconds a step"), (axes[1], "peak_gb", "GB at the peak")):
        sizes: set[int] = set()
        for result, style in zip(results, STYLES, strict=False):
            rows = result["parts"]["head"]["steps"]
            for form, label, colour in FORMS:
                if "fused" in form and "gpu" not in result["machine"]:
                    continue  # without kernels it is the same as the plain form
                points = [(row["size"], row[key]) for row in rows if row["form"] == form and key in row]
                if points:
                    name = label if len(results) == 1 else f"{label}, {_device(result)}"
                    axis.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=name)
                    sizes |= {size for size, _ in points}
        axis.set(xscale="log", yscale="log", title=title, xlabel="batch: texts × videos a side")
        axis.set_xticks(sorted(sizes), [f"{size:,}" for size in sorted(sizes)])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    devices = " and ".join(_device(result) for result in results)
    figure.suptitle(f"Training step of the head, all losses, forward and backward: {devices}")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _device(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return str(machine.get("gpu") or f"{machine['cpus']} CPU cores")


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the results, and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.benchmarks.gpu.figure")
    parser.add_argument("results", type=Path, nargs="+", help="JSON of make bench-gpu, one file a device")
    parser.add_argument("file", type=Path, help="PNG to write")
    options = parser.parse_args(arguments)
    if len(options.results) > len(STYLES):
        parser.error(f"{len(options.results)} results; accepted: {len(STYLES)} at most")
    results = []
    for file in options.results:
        result = json.loads(file.read_text().splitlines()[-1])
        if "steps" not in result.get("parts", {}).get("head", {}):
            parser.error(f"{file} has no steps of the head: run make bench-gpu GPU='--parts head'")
        results.append(result)
    draw(results, options.file)


if __name__ == "__main__":
    main()
