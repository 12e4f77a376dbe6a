"""Choices of a layout that somebody has made already; the search makes the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.cluster.cluster import Cluster
from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import GradientDtype
from clustersim.layout.layout import Algorithm, Family, RankOrder, Recompute, Schedule, ServerPlacement
from clustersim.units import FILE, Bytes
from clustersim.workload.training import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutSpec:
    """The `layout:` block: choices that the user makes; the search makes the others.

    `boundaries`: the first layer of each chunk; or as many layers for each (`even`), as much work for each stage with
    the embedding and the head (`balanced`), or these two in the place of a layer each (`slots`).
    `algorithm: auto` is what NCCL's tuner picks for the buckets and groups of each division.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    cp: int | None = None
    ep: int | None = None
    micro_batch: int | None = None
    sequence_parallel: bool | None = None
    schedule: Schedule | None = None
    virtual_stages: int | None = None
    boundaries: Literal["even", "balanced", "slots"] | tuple[int, ...] | None = None
    recompute: Recompute | None = None
    gradient: GradientDtype | None = None
    order: RankOrder | None = None
    sync: Family | None = None
    algorithm: Algorithm | Literal["auto"] | None = None
    sharded_stage: Literal[1, 2, 3] | None = None
    servers: int | None = None
    placement: ServerPlacement | None = None
    optimizer_at: Literal["server", "worker"] | None = None
    bucket_bytes: Bytes | None = None
    partition_bytes: Bytes | None = None

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "cp", "ep", "micro_batch", "virtual_stages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name in ("bucket", "partition"):
            if getattr(self, f"{name}_bytes") == 0.0:
                raise ValueError(f"{name} must be more than 0; write e.g. 25MiB, or leave it out")
        if self.servers is not None and self.servers < 0:
            raise ValueError(f"servers must not be negative, but is {self.servers}")
        if isinstance(self.boundaries, tuple) and (
            not self.boundaries or self.boundaries[0] != 0 or list(self.boundaries) != sorted(set(self.boundaries))
        ):
            raise ValueError("boundaries must start at layer 0 and grow, e.g. [0, 6, 12, 18]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices(LayoutSpec):
    """What is fixed (None: the search decides), the families to choose among, how many server hosts there may be."""

    families: tuple[Family, ...]
    least_servers: int
    most_servers: int


def contradiction(
    spec: LayoutSpec, workload: Workload, cluster: Cluster, framework: Framework
) -> tuple[str, str] | None:
    """The key of `spec` that no layout of this workload can follow, and why; None where there is none."""
    if spec.schedule not in (None, *framework.schedules):
        can = ", ".join(framework.schedules)
        return (
            "schedule",
            f"{spec.schedule}: {framework.name} does not run it; write one of {can}, or another framework",
        )
    found = _wrong_chunks(spec) or _wrong_boundaries(spec, workload) or _wrong_switches(spec, cluster)
    if found is not None:
        return found
    sequence, experts = workload.training.sequence, workload.model.experts
    cp, ep = spec.cp or 1, spec.ep or 1
    if cp > 1 and framework.attention == "unfused":
        return "cp", f"{cp}: ring attention needs a fused kernel, which {framework.name} does not use; write cp: 1"
    if cp > 1 and sequence % (2 * cp) != 0:
        return "cp", f"{cp}: sequence = {sequence} is no multiple of 2 cp = {2 * cp}, the pieces that balance the ranks"
    if ep > 1 and experts is None:
        return "ep", f"{ep}: {workload.model.name} has no experts; write ep: 1"
    if experts is not None and experts.count % ep != 0:
        return "ep", f"{ep}: the {experts.count} experts of {workload.model.name} are no multiple of it"
    if ep > 1 and spec.sync == "parameter-server":
        return "ep", f"{ep}: a parameter server counts one push of every parameter a replica, experts have fewer; ep: 1"
    if ep > 1 and (spec.tp or 1) > 1 and spec.sequence_parallel is False:
        return "ep", f"{ep}: with tp > 1 every rank would route every token; write sequence_parallel: true"
    return None


def _wrong_chunks(spec: LayoutSpec) -> tuple[str, str] | None:
    """Virtual stages of a schedule that has a number of its own."""
    if spec.schedule is None or spec.schedule == "interleaved" or spec.virtual_stages is None:
        return None
    has = 2 if spec.schedule == "zb-v" else 1
    if spec.virtual_stages == has:
        return None
    return (
        "virtual_stages",
        f"{spec.virtual_stages}: {spec.schedule} has {has} a stage; write virtual_stages: {has}, "
        "or schedule: interleaved",
    )


def _wrong_boundaries(spec: LayoutSpec, workload: Workload) -> tuple[str, str] | None:
    """Chunks that the model or the pipeline does not have."""
    if not isinstance(spec.boundaries, tuple):
        return None
    named, layers = len(spec.boundaries), workload.model.layers
    if spec.boundaries[-1] >= layers:
        return (
            "boundaries",
            f"{workload.model.name} has layers 0 to {layers - 1}; {spec.boundaries[-1]} is none of them",
        )
    if spec.pp is not None and (named % spec.pp != 0 or (spec.virtual_stages or named // spec.pp) * spec.pp != named):
        chunks = spec.pp * (spec.virtual_stages or 1)
        return "boundaries", f"name {named} chunks; write the first layer of each of {chunks} (pp x virtual_stages)"
    return None


def _wrong_switches(spec: LayoutSpec, cluster: Cluster) -> tuple[str, str] | None:
    """Algorithms that need switches which add up, where there are none."""
    if spec.algorithm == "sharp" and not cluster.fabric.in_network_reduction:
        return (
            "algorithm",
            "sharp: needs a fabric whose switches add up (in_network_reduction: true), e.g. rail-optimized-sharp",
        )
    for machine in cluster.workers:
        inside = machine.node.interconnect
        if spec.algorithm == "nvls" and (inside is None or not inside.reduces):
            return (
                "algorithm",
                f"nvls: needs switches that add up (interconnect.reduces: true), which {machine.node.name} has not",
            )
    return None
