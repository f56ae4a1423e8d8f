"""demo: the whole way on the embedded benchmark, for the baseline and for GARE, and one table at the end."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys
    from pathlib import Path

    # Before other folders of PYTHONPATH, which may have a module of the same name.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from cluster.runtime.signals import take_signals

    take_signals()

import logging
import statistics
import sys
import time
from collections import defaultdict
from typing import Any

from cluster.command import Flag, main
from cluster.layout import layout
from cluster.runtime.session import ray_session
from cluster.runtime.signals import raise_if_asked
from cluster.status.peak_memory import PeakMemory
from cluster.tracking import resolve_tracking_uri
from gare.config import Config
from gare.errors import mask_secrets
from gare.storage.files import join, write_json
from gare.storage.run_folder import RESULT
from pipelines import evaluate, extract, prepare, train
from pipelines.sizes import sizes_of_weights

logger = logging.getLogger(__name__)

MODELS = ("baseline", "gare")
COLUMNS = ("R1", "R5", "R10", "MdR", "MnR")
Metrics = dict[str, float]


def run(config: Config) -> dict[str, Any]:
    """Runs prepare and extract, then trains and evaluates both models for every seed."""
    seconds: dict[str, float] = defaultdict(float)
    prepared = _timed(seconds, "prepare", prepare, config)
    with PeakMemory() as memory, ray_session(config.cluster):
        _timed(seconds, "extract", extract, config)
        trained: dict[str, list[dict[str, Any]]] = defaultdict(list)
        scored: dict[str, list[Metrics]] = defaultdict(list)
        for seed in range(config.train.seed, config.train.seed + config.demo.seeds):
            for model in MODELS:
                one = _variant(config, model, seed)
                trained[model].append(_timed(seconds, "train", train, one))
                scored[model].append(_timed(seconds, "evaluate", evaluate, one)["metrics"])
    result = {
        **{model: _over_seeds(scored[model], statistics.fmean) for model in MODELS},
        "deviation": {model: _over_seeds(scored[model], _deviation) for model in MODELS},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
    write_json(join(layout(config).step("demo"), RESULT), result)
    sys.stderr.write(_table(config, result, trained, prepared, memory.peak_bytes))
    return result


def _variant(config: Config, model: str, seed: int) -> Config:
    train_config = config.train.model_copy(update={"run": f"{model}-seed{seed}", "seed": seed})
    gare = config.model.model_copy(update={"increment": True})
    model_config = gare if model == "gare" else gare.baseline()
    return config.model_copy(update={"train": train_config, "model": model_config})


def _timed(seconds: dict[str, float], name: str, step: Any, config: Config) -> dict[str, Any]:
    raise_if_asked()  # a signal at the very end of the last step let it finish first
    logger.info("%s %s", name, config.train.run if name in ("train", "evaluate") else config.name)
    started = time.monotonic()
    result: dict[str, Any] = step.run(config)
    seconds[name] += time.monotonic() - started
    return result


def _over_seeds(metrics: list[Metrics], reduce: Any) -> Metrics:
    return {name: reduce([one[name] for one in metrics]) for name in metrics[0]}


def _deviation(values: list[float]) -> float:
    """Returns the sample standard deviation; 0 for one seed, which says nothing about spread."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _table(
    config: Config,
    result: dict[str, Any],
    trained: dict[str, list[dict[str, Any]]],
    prepared: dict[str, Any],
    peak_bytes: int,
) -> str:
    seeds = config.demo.seeds
    test = prepared["counts"]["test"]
    lines = [
        "",
        f"Test split: {test['captions']} captions × {test['videos']} videos, "
        f"{100 * prepared.get('ambiguous_test_captions', 0.0):.1f} % of the captions true of another too; "
        f"{seeds} seed{'s' if seeds > 1 else ''}{', mean ± deviation' if seeds > 1 else ''}",
        "",
        " " * 10 + "".join(f"{f'{way} {name}':>15}" for way in ("t2v", "v2t") for name in COLUMNS),
    ]
    for model in MODELS:
        cells = []
        for key in (f"{way}/{name}" for way in ("t2v", "v2t") for name in COLUMNS):
            spread = f" ± {result['deviation'][model][key]:.1f}" if seeds > 1 else ""
            cells.append(f"{f'{result[model][key]:.1f}{spread}':>15}")
        lines.append(f"{model:<10}" + "".join(cells))
    lines.append("")
    for model in MODELS:
        runs = trained[model]
        step_s = statistics.fmean(one["seconds_per_step"] for one in runs)
        peak = max(one["worker_peak_bytes"] for one in runs) / 2**30
        lines.append(
            f"{model:<10} {step_s:.3f} s a step of {config.train.batch_size} pairs, {peak:.2f} GiB a worker, "
            f"{runs[0]['steps']} steps"
        )
    lines.append(
        f"{'all steps':<10} {sum(result['seconds'].values()):.0f} s: "
        + ", ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
        + f"; {peak_bytes / 2**30:.1f} GiB at most in all processes together"
    )
    gain = result["gare"]["t2v/R1"] - result["baseline"]["t2v/R1"]
    verdict = "above" if gain > 0 else "below" if gain < 0 else "level with"
    if seeds == 1:
        remark = ", by one seed, which says little (make demo SEEDS=3)"
    elif abs(gain) <= max(result["deviation"][model]["t2v/R1"] for model in MODELS):
        remark = ", within one deviation"
    else:
        remark = ""
    places = layout(config)
    uri = mask_secrets(resolve_tracking_uri(config.tracking.uri, places.root))
    lines += [
        f"GARE is {abs(gain):.1f} points of t2v R@1 {verdict} the baseline here{remark}.",
        "",
        f"Runs, curves and retrieval pictures: make ui   ({uri}, experiment {config.tracking.experiment})",
        f"Pictures as files: {places.data}/runs/*/evaluation-test/retrieval.png",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    flags = {"--seeds": Flag("demo.seeds", "training seeds for each model")}
    main(run, __doc__, flags, sizes_of_weights)
