"""A cluster: machines by count, the fabric between them, and what is wrong with some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.cluster.background import Background
from clustersim.cluster.fabric import Fabric
from clustersim.cluster.node import Node
from clustersim.cluster.noise import Noise
from clustersim.hardware.curve import CollectiveTable
from clustersim.hardware.device import Device
from clustersim.hardware.link import Link
from clustersim.units import FILE, Fraction, Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowRank:
    """A straggler: everything that worker rank `rank` computes takes `slowdown` times as long."""

    __pydantic_config__: ClassVar[Any] = FILE
    kind: Literal["slow-rank"] = "slow-rank"
    rank: int
    slowdown: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowNic:
    """A degraded card: NIC `nic` of worker node `node` keeps the fraction `speed` of its rate."""

    __pydantic_config__: ClassVar[Any] = FILE
    kind: Literal["slow-nic"] = "slow-nic"
    node: int
    nic: int
    speed: Fraction


Fault = SlowRank | SlowNic


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A node template with everything that it names resolved, and how many of it there are."""

    node: Node
    count: int
    device: Device | None
    interconnect: Link | None
    nic: Link
    pcie: Link | None
    collectives: CollectiveTable | None

    @property
    def nic_rate_bytes_per_s(self) -> float:
        """Rate of one NIC, per direction."""
        return self.node.nic.rate_bytes_per_s or self.nic.rate_bytes_per_s

    @property
    def interconnect_rate_bytes_per_s(self) -> float:
        """Rate of one device into its node's interconnect, per direction."""
        assert self.interconnect is not None
        assert self.node.interconnect is not None
        return self.node.interconnect.rate_bytes_per_s or self.interconnect.rate_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Workers first: global node numbers count through `workers`, then through `servers`, then through `storage`.

    Every worker machine has the same number of devices, so that slot s is device s mod g of node s div g.
    """

    workers: tuple[Machine, ...]
    servers: tuple[Machine, ...]
    fabric: Fabric
    faults: tuple[Fault, ...] = ()
    background: tuple[Background, ...] = ()
    storage: tuple[Machine, ...] = ()
    noise: Noise | None = None

    @property
    def devices_per_node(self) -> int:
        """Devices of one worker node."""
        return self.workers[0].node.devices

    @property
    def worker_nodes(self) -> int:
        """Number of worker nodes."""
        return sum(machine.count for machine in self.workers)

    @property
    def server_nodes(self) -> int:
        """Number of server hosts."""
        return sum(machine.count for machine in self.servers)

    @property
    def machines(self) -> tuple[Machine, ...]:
        """All kinds of machines, in the order of their node numbers."""
        return (*self.workers, *self.servers, *self.storage)

    @property
    def storage_nodes(self) -> int:
        """Number of hosts that serve data."""
        return sum(machine.count for machine in self.storage)

    @property
    def devices(self) -> int:
        """Number of worker devices."""
        return sum(machine.count * machine.node.devices for machine in self.workers)

    def machine_of(self, node: int) -> Machine:
        """The machine that global node number `node` is of. O(machine kinds)."""
        for machine in self.machines:
            if node < machine.count:
                return machine
            node -= machine.count
        raise AssertionError(f"node number out of range by {node + 1}")
