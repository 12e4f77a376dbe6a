"""Prices of parameter servers: pushes and pulls as flows on the links, and the time in which a server updates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.cluster.push_pull import server_traffic
from clustersim.cluster.wiring import Traffic, Wiring
from clustersim.hardware.cost import device_costs
from clustersim.hardware.kernel import Kernel, Memory
from clustersim.hardware.scaled import device_s
from clustersim.program.program import ServerShare, Update
from clustersim.simulate.collectives.phases import wire_efficiency
from clustersim.simulate.flows import Flows, Patterns, side_by_side
from clustersim.simulate.prices.placement import Placement

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerClass:
    """Servers that behave alike: on the same kind of host, with the same share."""

    shares: tuple[ServerShare, ...]
    machine: Machine


class ServerPrices:
    """The servers of a program in classes of equals, and what workers exchange with them."""

    def __init__(self, placement: Placement, patterns: Patterns) -> None:
        self.placement = placement
        self.patterns = patterns
        self.classes = _server_classes(placement.program.servers, placement.cluster, placement.wiring)
        self._exchanges: dict[tuple[int, str], list[tuple[Traffic, Machine]]] = {}

    def exchange_flows(self, of: int, direction: str, size: float, message: float) -> Flows:
        """Every rank of class `of` exchanges `size` bytes with all servers, in messages of `message` bytes."""
        lanes = self._exchanges.get((of, direction))
        if lanes is None:
            ranks = self.placement.folding.members[of]
            machine_of = self.placement.machine_of_rank
            lanes = self._exchanges[of, direction] = [
                (self._with_servers(ranks[lane], push=direction == "push"), machine_of(int(ranks[lane[0]])))
                for lane in self.placement.folding.lanes(ranks)
            ]
        return side_by_side([self._lane_exchange(traffic, machine, size, message) for traffic, machine in lanes])

    def _lane_exchange(self, traffic: Traffic, machine: Machine, size: float, message: float) -> Flows:
        near, far = wire_efficiency(machine, message)
        wait = machine.nic.launch_s + machine.nic.segments[0].alpha_s
        wait += (3 if self.placement.wiring.has_leaves else 1) * self.placement.cluster.fabric.hop_latency_s
        scale = self.placement.framework.network_scale
        host = self.placement.framework.host.per_collective_s
        return Flows([(wait * scale + host, size, self.patterns.weights(traffic, scale / near, scale / far))])

    def _with_servers(self, ranks: Ints, *, push: bool) -> Traffic:
        total = self.placement.program.share_parts
        hosts = [share for share in self.placement.program.servers if share.host == "server"]
        homes = [share for share in self.placement.program.servers if share.host == "worker"]
        return server_traffic(
            self.placement.wiring,
            ranks,
            np.array([share.node for share in hosts], np.int64),
            np.array([share.parts / total for share in hosts]),
            np.array([share.node for share in homes], np.int64),
            np.array([share.parts / total for share in homes]),
            push=push,
        )

    def update_s(self, server: int, update: Update, parts: int) -> float:
        """Seconds in which a server adds its share of `pushes` gradients and steps.

        Memory traffic over its host's rates, which servers of one host share, since they are busy at the same time;
        the measured kernels where the host is a measured CPU.
        """
        machine = self.classes[server].machine
        share = self.classes[server].shares[0].parts / self.placement.program.share_parts / parts
        if machine.device is not None and machine.device.kind == "cpu":
            costs = device_costs(machine.device.name)
            size, state = round(update.bytes * share), round(update.state_bytes * share / 2)
            kernels: list[tuple[Kernel, int]] = [(Memory(op="copy", read_bytes=size, written_bytes=size), 1)]
            kernels.append((Memory(op="reduce", read_bytes=2 * size, written_bytes=size), update.pushes - 1))
            if state:
                kernels.append((Memory(op="optimizer", read_bytes=state, written_bytes=state), 1))
            slowdown = self.placement.sharing_slowdown(0)
            return device_s(costs, tuple(kernels), self.placement.framework) * slowdown
        host = machine.node.host
        added = update.pushes * update.bytes * share / host.reduce_rate_bytes_per_s
        stepped = update.state_bytes * share / host.memory_bandwidth_bytes_per_s
        return (added + stepped) * self._servers_beside(server)

    def _servers_beside(self, server: int) -> int:
        """How many servers share the host of a server of this class, itself included."""
        if self.classes[server].shares[0].host == "server":
            return 1
        homes = np.array([share.node for share in self.placement.program.servers if share.host == "worker"], np.int64)
        return int(np.bincount(self.placement.wiring.node_of(homes)).max())


def _server_classes(servers: tuple[ServerShare, ...], cluster: Cluster, wiring: Wiring) -> tuple[ServerClass, ...]:
    found: dict[tuple[str, int, str], list[ServerShare]] = {}
    machines: dict[tuple[str, int, str], Machine] = {}
    for share in servers:
        if share.host == "server":
            machine = cluster.machine_of(cluster.worker_nodes + share.node)
        else:
            machine = cluster.machine_of(int(wiring.node_of(np.array([share.node]))[0]))
        key = (share.host, share.parts, machine.node.name)
        found.setdefault(key, []).append(share)
        machines[key] = machine
    return tuple(ServerClass(shares=tuple(shares), machine=machines[key]) for key, shares in found.items())
