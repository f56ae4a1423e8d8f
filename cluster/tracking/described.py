"""Tags that say what a run's numbers were measured on and how, so that runs compare or visibly do not."""

from __future__ import annotations

from typing import Any

from cluster.logs import job_id
from gare.config import Config


def benchmark_name(config: Config, benchmark: str) -> str:
    """Names a benchmark for people; folders of one's own are told apart by the data set's name."""
    return config.name if benchmark == "folder" else benchmark


def run_tags(config: Config, benchmark: str, protocol: str) -> dict[str, Any]:
    """Tags of a training or an evaluation that come from the configuration and from Ray.

    Args:
        config: of the training, or of the evaluation; batch, seed, world_size and precision are a training's.
        benchmark: the manifest's.
        protocol: the manifest's.
    """
    workers: int | str = config.cluster.train_workers
    if config.cluster.min_workers:
        workers = f"{config.cluster.min_workers} to {workers}"
    precision = config.train.precision
    # What is automatic and not settled says nothing of how the run was trained.
    settled = ({"world_size": workers} if workers else {}) | (
        {"precision": precision} if precision != "auto" else {}
    )
    return settled | {
        "benchmark": benchmark_name(config, benchmark),
        "protocol": protocol,
        "decoder": config.extract.decoder,
        "frames": config.extract.num_frames,
        "batch": config.train.batch_size,
        "seed": config.train.seed,
        "ray.job": job_id() or "none",
    }


def split_tags(split: str, split_sha256: str, num_texts: int, num_videos: int) -> dict[str, Any]:
    """Tags of the split that numbers were measured on, also under the split's own name.

    The plain ones are those of the split measured last; those under ``test.`` stay when val follows.
    """
    about = {"split_hash": split_sha256, "N_text": num_texts, "N_video": num_videos}
    return {"split": split} | about | {f"{split}.{name}": value for name, value in about.items()}


def processing_tag(config: Config) -> str:
    """The post-processed metrics that an evaluation has beside the plain ones; ``none`` for none."""
    chosen = config.evaluate
    parts = [f"dsl({chosen.dsl_scale:g})"] if chosen.dsl else []
    parts += [f"qbnorm({chosen.qbnorm_scale:g}, {chosen.qbnorm_bank} captions)"] if chosen.qbnorm else []
    return "+".join(parts) or "none"
