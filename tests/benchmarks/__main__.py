"""``make bench``: the direct form against the factorised one, as ratios within one run.

Prints tables on stderr and one JSON line on stdout. Calls take turns and medians are quoted; every peak of
memory is that of a fresh process, above its inputs. ``--quick`` leaves out the largest batches; ``--picture
FILE`` draws the training steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.inputs import D, F, features, head
from tests.benchmarks.measure import in_fresh_process, interleaved
from tests.benchmarks.picture import draw
from tests.benchmarks.tasks import step_call, workers_seconds

ROUNDS = 3
BLOCK = 128
Table = dict[str, Any]


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def scores_frames(count: int = 1000) -> Table:
    """Measures scores with frames as context; the direct form is timed over a few of its blocks."""
    model = head().eval()
    text, video = features(count, count)
    with torch.no_grad():
        prepared = model.prepare_video(video)
        assert prepared.basis is not None
        rows, context = prepared.rows.flatten(0, 1), prepared.basis.context.flatten(0, 1)
        frames, weight = video.frames.flatten(0, 1), torch.randn(D, D)
        seconds = interleaved(
            {
                "direct_block": lambda: model.scorer.pairs(text[:BLOCK], video[:BLOCK]),
                "products": lambda: (rows @ text.embedding.T, context @ text.embedding.T),
                "prepared": lambda: model.score(text, prepared),
                "whole": lambda: model.score(text, video),
                "preparation": lambda: model.prepare_video(video),
                "one_DxD_product": lambda: frames @ weight,
            },
            ROUNDS,
        )
    direct = seconds["direct_block"] * (count / BLOCK) ** 2
    row = {
        "seconds": seconds | {"direct": direct},
        "speedup_prepared": direct / seconds["prepared"],
        "speedup_whole": direct / seconds["whole"],
        "over_products": seconds["prepared"] / seconds["products"],
        "preparation_in_DxD_products": seconds["preparation"] / seconds["one_DxD_product"],
        "extra_mb": {size: in_fresh_process(f"scores_peak({size}, {size})")["mb"] for size in (1000, 4096)},
    }
    say(
        f"scores {count} x {count}, D = {D}, F = {F}: direct {direct:.1f} s, from blocks of {BLOCK} x {BLOCK}"
    )
    lines = {
        "prepared": f"{row['speedup_prepared']:.1f} times the speed",
        "products": f"alone: the whole is {row['over_products']:.2f} times that",
        "whole": f"{row['speedup_whole']:.1f} times the speed, preparation included",
        "preparation": f"{row['preparation_in_DxD_products']:.1f} times one D x D product a frame",
    }
    for name, meaning in lines.items():
        say(f"  {name:<12} {seconds[name]:.3f} s, {meaning}")
    say(f"  extra memory, MB: {row['extra_mb']}")
    return row


def scores_words(num_frames: int, num_words: int, count: int = 1000) -> Table:
    """Measures scores with words as context and the video corrected."""
    model = head(context="words", corrected_side="video").eval()
    text, video = features(count, count, num_frames=num_frames, num_words=num_words)
    with torch.no_grad():
        seconds = interleaved(
            {
                "direct_block": lambda: model.scorer.pairs(text[:BLOCK], video[:BLOCK]),
                "whole": lambda: model.score(text, video),
                "preparation": lambda: model.scorer.prepare_text(text[:64], model.scorer.basis_maps(), None),
            },
            ROUNDS,
        )
    direct = seconds["direct_block"] * (count / BLOCK) ** 2
    preparation = seconds["preparation"] * count / 64
    row = {
        "seconds": seconds | {"direct": direct, "preparation": preparation},
        "speedup_whole": direct / seconds["whole"],
        "speedup_prepared": direct / (seconds["whole"] - preparation),
    }
    shape = f"{num_frames} frames, {num_words} words"
    say(f"scores {count} x {count}, words as context, {shape}: direct {direct:.1f} s")
    say(f"  whole        {seconds['whole']:.2f} s, {row['speedup_whole']:.1f} times the speed")
    say(f"  prepared     {row['speedup_prepared']:.1f} times the speed, the texts' bases not counted")
    return row


def steps(sizes: tuple[int, ...], direct_up_to: int) -> list[Table]:
    """Measures training steps of the head."""
    say(f"training step of the head, D = {D}, F = {F}; seconds and peak MB above the inputs")
    line = "{:>6} {:>16} {:>16} {:>16} {:>13} {:>13} {:>9}"
    say(line.format("pairs", "direct", "all texts", "64 texts", "speed", "memory", "pairs/s"))
    rows = []
    for size in sizes:
        forms = {"sample": ("factorised", "sample")}
        if size <= 512:
            forms["all"] = ("factorised", "all")
        if size <= direct_up_to:
            forms["direct"] = ("direct", "all")
        peaks = {
            name: in_fresh_process(f"step_peak({size}, {form!r}, {over!r})")
            for name, (form, over) in forms.items()
        }
        if size <= 512:
            calls = {name: step_call(size, form, over) for name, (form, over) in forms.items()}
            seconds = interleaved(calls, ROUNDS if size <= 256 else 1)
        else:
            seconds = {name: peak["seconds"] for name, peak in peaks.items()}
        row: Table = {
            "pairs": size,
            "seconds": seconds,
            "peak_mb": {name: peak["mb"] for name, peak in peaks.items()},
            "pairs_per_s": size**2 / seconds["sample"],
        }
        cells = [
            f"{seconds[name]:.2f} s {peaks[name]['mb']:.0f} MB" if name in seconds else "-"
            for name in ("direct", "all", "sample")
        ]
        ratios = ["-", "-"]
        if "direct" in seconds:
            row["speedup"] = {name: seconds["direct"] / seconds[name] for name in ("all", "sample")}
            row["memory_share"] = {
                name: row["peak_mb"][name] / row["peak_mb"]["direct"] for name in ("all", "sample")
            }
            ratios = [f"{row['speedup']['all']:.1f} / {row['speedup']['sample']:.1f}"]
            ratios += [f"{row['memory_share']['all']:.2f} / {row['memory_share']['sample']:.2f}"]
        say(line.format(size, *cells, *ratios, f"{row['pairs_per_s']:,.0f}"))
        rows.append(row)
    return rows


def diagnostics(size: int = 256) -> Table:
    """Measures the cost of diagnostics in the steps that compute them."""
    seconds = interleaved(
        {
            "plain": step_call(size, "factorised", "sample"),
            "watched": step_call(size, "factorised", "sample", watched=True),
        },
        9,
    )
    share = seconds["watched"] / seconds["plain"] - 1
    say(f"diagnostics in a step of {size}: {100 * share:.1f} % of it; one step of 50 has them by default")
    return {"seconds": seconds, "share": share}


def workers(size: int = 256) -> Table:
    """Measures one and two workers with one thread each."""
    seconds = {world: workers_seconds(world, size) for world in (1, 2)}
    say(f"workers of one thread, step of {size}: 1: {seconds[1]:.2f} s, 2: {seconds[2]:.2f} s")
    return {"seconds": seconds, "speedup": seconds[1] / seconds[2]}


def main() -> None:
    """Runs all benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="batches of at most 1,024")
    parser.add_argument("--picture", type=Path, help="PNG of the training steps")
    options = parser.parse_args()
    say(f"{torch.get_num_threads()} threads, float32, torch {torch.__version__}")
    sizes = (64, 128, 256, 512, 1024) if options.quick else (64, 128, 256, 512, 1024, 2048, 4096)
    found = {
        "scores": scores_frames(),
        "scores_words": {"12x32": scores_words(12, 32), "64x64": scores_words(64, 64)},
        "steps": steps(sizes, direct_up_to=256),
        "diagnostics": diagnostics(),
        "workers": workers(),
    }
    sys.stdout.write(json.dumps(found) + "\n")
    if options.picture:
        draw(found["steps"], options.picture)


if __name__ == "__main__":
    main()
