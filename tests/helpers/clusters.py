"""Resources of a training, as they are once a cluster is joined."""

from __future__ import annotations

from gare.config import ResolvedCluster


def resolved_cluster(**settings: object) -> ResolvedCluster:
    """Returns two workers of half a CPU with a loader each, but for the given settings."""
    known: dict[str, object] = {
        "train_workers": 2,
        "cpus_per_worker": 0.5,
        "loaders_per_worker": 1,
        "use_gpu": False,
    }
    return ResolvedCluster.model_validate(known | settings)
