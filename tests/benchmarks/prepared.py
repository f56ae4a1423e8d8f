"""``make bench-prepared``: prepared videos with their basis and lean ones, by size, time and error.

ViT-B/32 width, clips of 12 frames, float32. Calls take turns; medians and the quarter of the fastest are
quoted. Errors are those of scores against the direct form in float64, of frames that are much alike. A table
on stderr, one JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from gare.model.factorized.prepared import PreparedVideo
from gare.model.features import TextFeatures, VideoFeatures
from gare.model.gare import GARE
from tests.benchmarks.inputs import D, F, features, head
from tests.helpers.heads import held_bytes

TEXTS = (1, 8, 64, 1000)
FORMS = {"with basis": False, "lean": True}
#: Noise around a clip's first frame, for cosines of 0.999.
ALIKE = 0.032


def quarters(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Returns the first quartile and the median of each call, milliseconds."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            taken[name].append(1000 * (time.perf_counter() - started))
    return {
        name: {"quartile": statistics.quantiles(values[1:])[0], "median": statistics.median(values[1:])}
        for name, values in taken.items()
    }


def errors(model: GARE, count: int = 100) -> dict[str, float]:
    """Returns the largest differences of scores from the direct form in float64."""
    text, video = features(count, count)
    first_M1D = video.frames[:, :1]
    video = VideoFeatures(first_M1D + ALIKE * torch.randn_like(video.frames), video.mask)
    exact = GARE(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    right = exact.score(
        TextFeatures(text.embedding.double(), None, text.mask),
        VideoFeatures(video.frames.double(), video.mask),
        "direct",
    )
    return {
        form: float((model.score(text, model.prepare_video(video, lean=lean)) - right).abs().max())
        for form, lean in FORMS.items()
    }


@torch.inference_mode()
def measure(num_videos: int, heads: int) -> dict[str, Any]:
    """Measures sizes, times and errors of both forms."""
    model = head(increment_heads=heads).eval()
    text, video = features(max(TEXTS), num_videos)
    held: dict[str, PreparedVideo] = {
        form: model.prepare_video(video, lean=lean) for form, lean in FORMS.items()
    }

    def scores(form: str, num_texts: int) -> Callable[[], object]:
        return lambda: model.score(text[:num_texts], held[form])

    preparing = {
        form: lambda lean=lean: model.prepare_video(video, lean=lean) for form, lean in FORMS.items()
    }
    return {
        "heads": heads,
        "videos": num_videos,
        "threads": torch.get_num_threads(),
        "bytes_per_video": {form: held_bytes(one) / num_videos for form, one in held.items()},
        "preparing_ms": quarters(preparing, 5),
        "scoring_ms": {
            count: quarters({form: scores(form, count) for form in FORMS}, 7 if count > 100 else 30)
            for count in TEXTS
        },
        "error": errors(model),
    }


def main() -> None:
    """Measures and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=1000)
    options = parser.parse_args()
    found = [measure(options.videos, heads) for heads in (1, 4)]
    for row in found:
        say = f"{row['videos']} clips, D = {D}, F = {F}, heads {row['heads']}, {row['threads']} threads"
        sys.stderr.write(f"{say}\n{'':<22}{'with basis':>20}{'lean':>20}\n")
        lines = {"bytes a clip": row["bytes_per_video"], "largest error": row["error"]}
        for name, cells in lines.items():
            sys.stderr.write(f"{name:<22}" + "".join(f"{cells[form]:>20.3g}" for form in FORMS) + "\n")
        timed = {"preparing": row["preparing_ms"]}
        timed |= {f"scores, {count} texts": values for count, values in row["scoring_ms"].items()}
        for name, cells in timed.items():
            shown = (f"{cells[form]['median']:.1f} ({cells[form]['quartile']:.1f}) ms" for form in FORMS)
            sys.stderr.write(f"{name:<22}" + "".join(f"{one:>20}" for one in shown) + "\n")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
