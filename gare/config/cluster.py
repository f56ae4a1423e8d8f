"""The configuration section for Ray: workers, CPUs, GPUs and memory."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from gare.config.section import NonNegative, Positive, Section


class ClusterConfig(Section):
    """Resources asked of Ray. Automatic ones are resolved and logged once the cluster is joined."""

    address: str = Field("", description="Ray cluster to join; empty: RAY_ADDRESS if set, else a local one")
    num_cpus: int = Field(0, ge=0, description="CPUs of a local Ray; 0: all of this machine (at least 2)")
    object_store_mb: int = Field(
        0,
        ge=0,
        description="MB of a local Ray's object store; 0 or auto: a tenth of the memory, 512 to 8192",
    )
    spill_dir: str = Field(
        "",
        description="folder of this machine that a local Ray spills objects to; empty: Ray's, below /tmp/ray",
    )
    train_workers: int = Field(
        2,
        ge=0,
        description="training workers, which share train.batch_size; the gradient is the same whatever their "
        "number; 0 or auto: one for each GPU, without GPUs one for each node",
    )
    min_workers: int = Field(
        0,
        ge=0,
        description="training goes on with as few workers as this where nodes are lost, and takes "
        "train_workers again where they come back; the global batch stays, of more micro-batches; "
        "0: with train_workers or not at all",
    )
    resize_every_s: Positive = Field(
        300.0,
        description="with min_workers: seconds between looks for nodes that have come; a checkpoint is "
        "written at least twice as often, since the steps after the last one are then done again",
    )
    cpus_per_worker: NonNegative = Field(
        0.5,
        description="CPUs of a training worker; 0 or auto: half of its share of the CPUs, 4 at most with a "
        "GPU; the rest decodes and loads",
    )
    loaders_per_worker: int = Field(
        0,
        ge=0,
        description="actors on its node that load each training worker's clips and, without a GPU, augment "
        "them; 0 or auto: as many as it has CPUs left for each worker, 16 at most, fewer for small batches",
    )
    prefetch_mb: Positive = Field(
        1024.0,
        description="MB of clips, loaded or being loaded, that wait for a training worker at most, beside "
        "the batch that it puts together and with a GPU two on it; less where the object store is small",
    )
    use_gpu: Literal[True, False, "auto"] = Field(
        False, description="give each training worker a GPU; auto: where the cluster has any"
    )
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = Field(
        "pack",
        description="training workers on as few nodes as can be or on as many; strict_: on one, one on each",
    )
    leave_cpus: int = Field(
        -1,
        ge=-1,
        description="CPUs that extraction leaves free; -1 or auto: on a joined cluster what training with "
        "this configuration takes, a quarter of the CPUs at most; none in a local Ray",
    )
    max_cpus: int = Field(
        0, ge=0, description="CPUs that the cluster can grow to; 0: what its autoscaler says, if it has one"
    )
    max_gpus: int = Field(0, ge=0, description="GPUs that it can grow to; 0 likewise")
    wait_s: NonNegative = Field(
        120.0, description="seconds to wait for CPUs or GPUs that other jobs hold or that are being added"
    )

    @field_validator(
        "object_store_mb", "train_workers", "cpus_per_worker", "loaders_per_worker", mode="before"
    )
    @classmethod
    def _auto_is_zero(cls, value: Any) -> Any:
        return 0 if value == "auto" else value

    @field_validator("leave_cpus", mode="before")
    @classmethod
    def _auto_is_negative(cls, value: Any) -> Any:
        return -1 if value == "auto" else value

    @field_validator("use_gpu", mode="before")
    @classmethod
    def _numbers_are_switches(cls, value: Any) -> Any:
        return bool(value) if value in (0, 1) else value
