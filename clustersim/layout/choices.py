"""Choices of a layout that somebody has made already; the search makes the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.layout.layout import Algorithm, Family, RankOrder, Recompute, Schedule, ServerPlacement
from clustersim.units import FILE, Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutSpec:
    """The `layout:` block: choices that the user makes; the search makes the others."""

    __pydantic_config__: ClassVar[Any] = FILE
    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    micro_batch: int | None = None
    sequence_parallel: bool | None = None
    schedule: Schedule | None = None
    virtual_stages: int | None = None
    boundaries: tuple[int, ...] | None = None
    recompute: Recompute | None = None
    order: RankOrder | None = None
    sync: Family | None = None
    algorithm: Algorithm | None = None
    sharded_stage: Literal[1, 2, 3] | None = None
    servers: int | None = None
    placement: ServerPlacement | None = None
    optimizer_at: Literal["server", "worker"] | None = None
    bucket_bytes: Bytes | None = None
    partition_bytes: Bytes | None = None

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "micro_batch", "virtual_stages"):
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
