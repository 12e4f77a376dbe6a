"""A node: which devices, switches, sockets and NICs stand in one box, and how they are wired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.hardware.device import Price, TableRef
from clustersim.hardware.provenance import Provenance
from clustersim.units import FILE, Bytes, BytesPerS, Seconds, Watts


@dataclass(frozen=True, slots=True, kw_only=True)
class Nics:
    """The network cards of a node, spread evenly over its devices. `rate` overrides the link's datasheet rate."""

    __pydantic_config__: ClassVar[Any] = FILE
    count: int
    link: str
    rate_bytes_per_s: BytesPerS | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Interconnect:
    """How the devices of a node reach each other.

    `switch`: every device has one link into a non-blocking switch (NVSwitch), whose rate is the sum of the device's
    lanes; `mesh`: direct links, `rate` the sum of a device's lanes (DGX-1's hybrid cube mesh); `pcie`: through the
    PCIe switches and sockets; `host`: ranks that share one host's memory. `reduces`: the switch adds up what devices
    send and copies one message to all of them (NVLink SHARP).
    """

    __pydantic_config__: ClassVar[Any] = FILE
    kind: Literal["switch", "mesh", "pcie", "host"]
    link: str
    rate_bytes_per_s: BytesPerS | None = None
    reduces: bool = False

    def __post_init__(self) -> None:
        if self.reduces and self.kind != "switch":
            raise ValueError(f"reduces: true needs kind: switch; a {self.kind} has no switch that could add")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The CPU side: what a co-located or dedicated parameter server has to work with.

    `reduce_rate` is the measured rate at which all cores of the host add gradients, in bytes of input a second;
    `rank_slowdown[i]` is how much slower one rank computes when i + 1 ranks share the host's cores (empty: ranks do
    not share cores).
    """

    __pydantic_config__: ClassVar[Any] = FILE
    cores: int
    sockets: int = 1
    memory_bytes: Bytes
    memory_bandwidth_bytes_per_s: BytesPerS
    reduce_rate_bytes_per_s: BytesPerS
    rank_slowdown: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """What a storage node serves, or a worker node to its own devices, and how fast one request comes back.

    `read_rate` is that of all `drives` together (of an object store: of its front ends); each serves one read at a
    time. `read_latency` is that of one read: on a `disk` the seek, which keeps the drive busy; else a delay that the
    reads of other readers overlap.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    tier: Literal["nvme", "disk", "memory", "object"]
    read_rate_bytes_per_s: BytesPerS
    read_latency_s: Seconds
    drives: int = 1

    def __post_init__(self) -> None:
        if self.drives < 1:
            raise ValueError(f"drives must be at least 1, not {self.drives}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node profile, `hwprofiles/nodes/<name>/node.yaml`. A host that serves parameters or data has no devices.

    `collectives` are measured collectives among the devices of one such node (CSV: collective, ranks, bytes, time_us).
    `price` is the host's alone: a node with devices costs that and the prices of its devices, which clouds quote with
    the devices' share of their host, so that most such nodes have none of their own.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    schema_version: Literal[1] = 1
    name: str
    device: str | None = None
    devices: int = 0
    interconnect: Interconnect | None = None
    pcie: str | None = None
    devices_per_pcie_switch: int = 1
    nic: Nics
    host: Host
    storage: Storage | None = None
    power_overhead_w: Watts = 0.0
    price: Price | None = None
    collectives: tuple[TableRef, ...] = ()
    provenance: Provenance

    def __post_init__(self) -> None:
        if self.devices < 0:
            raise ValueError(f"devices must not be negative, but is {self.devices}")
        if (self.device is None) != (self.devices == 0):
            raise ValueError("device and devices go together: give both, or neither for a host without devices")
        if self.devices > 1 and self.interconnect is None:
            raise ValueError("a node of several devices needs an interconnect, e.g. {kind: switch, link: nvlink3}")
        if self.nic.count < 1:
            raise ValueError("nic.count must be at least 1")
        if self.devices > 0 and max(self.devices, self.nic.count) % min(self.devices, self.nic.count) != 0:
            raise ValueError(
                f"devices = {self.devices} and nic.count = {self.nic.count}: one must divide the other, "
                "so that every device has the same share of the network"
            )
