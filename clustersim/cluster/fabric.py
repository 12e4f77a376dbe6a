"""The fabric between nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.hardware.provenance import Provenance
from clustersim.units import FILE, Positive, Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """A fabric profile, `hwprofiles/fabrics/<name>.yaml`, or the `fabric:` block of a scenario.

    `one-switch`: all NICs in one non-blocking switch. `leaf-spine`: the NICs of `nodes_per_leaf` nodes share a leaf,
    whose uplinks carry 1/`oversubscription` of its downlinks. `rail-optimized`: NIC i of every node of a group of
    `nodes_per_leaf` shares leaf i of that group; groups meet at the spine. `hop_latency` is one switch's.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    schema_version: Literal[1] = 1
    kind: Literal["one-switch", "leaf-spine", "rail-optimized"] = "one-switch"
    nodes_per_leaf: int = 16
    oversubscription: Positive = 1.0
    hop_latency_s: Seconds = 5e-7
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        if self.nodes_per_leaf < 1:
            raise ValueError("nodes_per_leaf must be at least 1")
        if self.oversubscription < 1.0:
            raise ValueError("oversubscription = downlinks / uplinks must be at least 1")
