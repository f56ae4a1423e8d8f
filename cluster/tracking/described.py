"""Tags that say on what data and how a run's numbers were measured, and so which runs are comparable."""

from __future__ import annotations

from typing import Any

from cluster.logs import job_id
from gare.config import Config


def benchmark_name(config: Config, benchmark: str) -> str:
    """Returns a benchmark's display name; folders and features of one's own are named by their data set."""
    return config.name if benchmark in ("folder", "features") else benchmark


def run_tags(config: Config, benchmark: str, protocol: str) -> dict[str, Any]:
    """Returns the tags of a training or an evaluation that come from the configuration and from Ray.

    Args:
        config: configuration of the training, or of the evaluation; batch, seed, world_size and precision
            describe a training.
        benchmark: the manifest's benchmark.
        protocol: the manifest's protocol.
    """
    fewest, most, precision = config.cluster.min_workers, config.cluster.train_workers, config.train.precision
    tags: dict[str, Any] = {}
    # An unresolved automatic value does not say how the run was trained.
    if most != "auto":
        tags["world_size"] = f"{fewest} to {most}" if fewest else most
    if precision != "auto":
        tags["precision"] = precision
    return tags | {
        "benchmark": benchmark_name(config, benchmark),
        "protocol": protocol,
        "decoder": config.extract.decoder if config.has_towers else "none",
        "frames": config.model.max_frames,
        "batch": config.train.batch_size,
        "seed": config.train.seed,
        "ray.job": job_id() or "none",
    }


def split_tags(split: str, split_sha256: str, num_texts: int, num_videos: int) -> dict[str, Any]:
    """Returns the tags of the split that numbers were measured on, also under the split's own name.

    Plain tags are of the split measured last; those under ``test.`` stay when val follows.
    """
    about = {"split_hash": split_sha256, "N_text": num_texts, "N_video": num_videos}
    return {"split": split} | about | {f"{split}.{name}": value for name, value in about.items()}


def processing_tag(config: Config) -> str:
    """Returns the name of an evaluation's post-processing, whose metrics are added; ``none`` for none."""
    chosen = config.evaluate
    parts = [f"dsl({chosen.dsl_scale:g})"] if chosen.dsl else []
    parts += [f"qbnorm({chosen.qbnorm_scale:g}, {chosen.qbnorm_bank} captions)"] if chosen.qbnorm else []
    return "+".join(parts) or "none"
