"""The configuration section for Ray: workers, CPUs, GPUs and memory."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from gare.config.section import Auto, Count, CountOrAuto, NonNegative, Positive, Section, number_or_auto


class ClusterConfig(Section):
    """Resources asked of Ray. Automatic ones are resolved and logged once the cluster is joined.

    See ``ResolvedCluster``.
    """

    address: str = Field("", description="Ray cluster to join; empty: RAY_ADDRESS if set, else a local one")
    num_cpus: CountOrAuto = Field(
        "auto",
        description="CPUs of a local Ray; auto: those that this process may use (affinity, control groups, "
        "SLURM_CPUS_PER_TASK), at least 2",
    )
    object_store_mb: CountOrAuto = Field(
        "auto",
        description="MB of a local Ray's object store; auto: a tenth of the memory, 512 to 8192",
    )
    spill_dir: str = Field(
        "",
        description="folder of this machine that a local Ray spills objects to; empty: Ray's, below /tmp/ray",
    )
    train_workers: CountOrAuto = Field(
        2,
        description="training workers, which share train.batch_size; the gradient is the same whatever their "
        "number; auto: one for each GPU, without GPUs one for each node",
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
    cpus_per_worker: Annotated[float | Auto, number_or_auto(0, whole=False, formerly=0)] = Field(
        0.5,
        description="CPUs of a training worker; auto: half of its share of the CPUs, 4 at most with a "
        "GPU; the rest decodes and loads",
    )
    loaders_per_worker: CountOrAuto = Field(
        "auto",
        description="actors on its node that load each training worker's clips and, without a GPU, augment "
        "them; auto: as many as it has CPUs left for each worker, 16 at most, fewer for small batches",
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
    leave_cpus: Annotated[int | Auto, number_or_auto(0, whole=True, formerly=-1)] = Field(
        "auto",
        description="CPUs that extraction leaves free; auto: on a joined cluster what training with "
        "this configuration takes, a quarter of the CPUs at most; none in a local Ray",
    )
    max_cpus: CountOrAuto = Field(
        "auto", description="CPUs that the cluster can grow to; auto: what its autoscaler says, if it has one"
    )
    max_gpus: CountOrAuto = Field("auto", description="GPUs that it can grow to; auto likewise")
    wait_s: NonNegative = Field(
        120.0, description="seconds to wait for CPUs or GPUs that other jobs hold or that are being added"
    )

    @field_validator("use_gpu", mode="before")
    @classmethod
    def _numbers_are_switches(cls, value: Any) -> Any:
        return bool(value) if value in (0, 1) else value

    @property
    def resolved(self) -> ResolvedCluster:
        """This section with numbers for all that training computes with.

        Raises:
            ValueError: if a value that training needs is still automatic.
        """
        return (
            self if isinstance(self, ResolvedCluster) else ResolvedCluster.model_validate(self.model_dump())
        )


class ResolvedCluster(ClusterConfig):
    """Resources of a cluster that was joined; those that training computes with are numbers."""

    train_workers: Count
    cpus_per_worker: Positive
    loaders_per_worker: Count
    use_gpu: bool
