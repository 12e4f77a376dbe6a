"""A scenario: the types of its file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from clustersim.cluster.background import Background
from clustersim.cluster.cluster import Fault
from clustersim.cluster.fabric import Fabric
from clustersim.cluster.noise import Noise
from clustersim.cluster.reliability import Reliability
from clustersim.layout.choices import LayoutSpec
from clustersim.layout.layout import Family
from clustersim.units import FILE, Fraction, Seconds
from clustersim.workload.data import Data
from clustersim.workload.model import Dimensions
from clustersim.workload.training import Training

# `8` nodes, or {count: 8, and overrides of the profile's keys}; server hosts also take a range `0..16`.
NodeSpec = int | str | dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """The `cluster:` block: node profiles by name with their counts, the fabric, hosts for servers and data, faults."""

    __pydantic_config__: ClassVar[Any] = FILE
    nodes: dict[str, NodeSpec]
    fabric: str | Fabric = "one-switch"
    servers: dict[str, NodeSpec] = field(default_factory=dict)
    storage: dict[str, NodeSpec] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    background: tuple[Background, ...] = ()
    noise: Noise | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpec:
    """The `search:` block: the families to compare, and how many layouts to simulate."""

    __pydantic_config__: ClassVar[Any] = FILE
    sync: tuple[Family, ...] = ("allreduce", "sharded", "parameter-server")
    simulate: int = 12

    def __post_init__(self) -> None:
        if not self.sync:
            raise ValueError("sync must name at least one of allreduce, sharded, parameter-server")
        if self.simulate < 1:
            raise ValueError("simulate must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What a layout must keep: a fraction of device memory free, and the time in which the whole training ends."""

    __pydantic_config__: ClassVar[Any] = FILE
    memory_headroom: Fraction = 0.0
    deadline_s: Seconds | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.memory_headroom < 1.0:
            raise ValueError("memory_headroom must be at least 0 and less than 1, e.g. 8%")


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """The scenario with some keys set: planned again, shown as a difference."""

    __pydantic_config__: ClassVar[Any] = FILE
    name: str
    set: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A scenario file."""

    __pydantic_config__: ClassVar[Any] = FILE
    schema_version: Literal[1]
    name: str
    model: str | Dimensions
    training: Training
    data: Data | None = None
    framework: str = "clustersim"
    cluster: ClusterSpec
    search: SearchSpec = field(default_factory=SearchSpec)
    layout: LayoutSpec = field(default_factory=LayoutSpec)
    objective: Literal["step_time", "usd"] = "step_time"
    constraints: Constraints = field(default_factory=Constraints)
    reliability: Reliability | None = None
    what_if: tuple[WhatIf, ...] = ()
