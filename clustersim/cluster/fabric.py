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
    `routing`: with `spread` the uplinks of a leaf act as one link; with `ecmp` a leaf has `spines` of them, one to each
    spine, and a hash of its two ends (and of `ecmp_seed`) puts a flow on one, where it may meet others while links
    beside it are idle. Traffic that is not between two ranks (with servers, storage, reducing switches) is spread.
    `in_network_reduction`: the switches add up what NICs send, and return the sum (SHARP).
    """

    __pydantic_config__: ClassVar[Any] = FILE
    schema_version: Literal[1] = 1
    kind: Literal["one-switch", "leaf-spine", "rail-optimized"] = "one-switch"
    nodes_per_leaf: int = 16
    oversubscription: Positive = 1.0
    hop_latency_s: Seconds = 5e-7
    in_network_reduction: bool = False
    routing: Literal["spread", "ecmp"] = "spread"
    spines: int = 1
    ecmp_seed: int = 0
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        if self.nodes_per_leaf < 1:
            raise ValueError("nodes_per_leaf must be at least 1")
        if self.oversubscription < 1.0:
            raise ValueError("oversubscription = downlinks / uplinks must be at least 1")
        if self.spines < 1:
            raise ValueError("spines must be at least 1")
        if self.routing == "ecmp" and self.kind == "one-switch":
            raise ValueError("routing: ecmp needs leaves; write kind: leaf-spine or rail-optimized")
        if self.routing == "spread" and (self.spines != 1 or self.ecmp_seed):
            raise ValueError("only routing: ecmp tells uplinks apart; write that, or leave out spines and ecmp_seed")
        if self.routing == "ecmp" and self.spines < 2:
            raise ValueError("routing: ecmp needs spines to choose from; write e.g. spines: 4")
        if not 0 <= self.ecmp_seed < 2**31:
            raise ValueError("ecmp_seed must be at least 0 and less than 2^31")
