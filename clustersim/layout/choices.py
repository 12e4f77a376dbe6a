"""Choices of a layout that somebody has made already; the search makes the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import Dtype
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
    gradient: Dtype | None = None
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
        if self.servers is not None and self.servers < 0:
            raise ValueError(f"servers must not be negative, but is {self.servers}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices(LayoutSpec):
    """What is fixed (None: the search decides), the families to choose among, how many server hosts there may be."""

    families: tuple[Family, ...]
    least_servers: int
    most_servers: int


def contradiction(spec: LayoutSpec, workload: Workload, framework: Framework) -> tuple[str, str] | None:
    """The key of `spec` that no layout of this workload can follow, and why; None where there is none."""
    if spec.schedule not in (None, *framework.schedules):
        can = ", ".join(framework.schedules)
        return (
            "schedule",
            f"{spec.schedule}: {framework.name} does not run it; write one of {can}, or another framework",
        )
    sequence, experts = workload.training.sequence, workload.model.experts
    cp, ep = spec.cp or 1, spec.ep or 1
    if cp > 1 and framework.attention != "flash":
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
