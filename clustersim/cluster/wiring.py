"""Routes by arithmetic: which physical links a flow between two worker ranks, or a rank and a server, crosses.

Every device has a port into its node's interconnect and a PCIe port towards its NIC; NICs meet at a leaf, leaves at the
spine. A link is one direction of one of these, numbered without building a graph, so that a route costs an addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, SlowNic

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Port(IntEnum):
    """Kinds of links, in the order of their numbers."""

    DEVICE_OUT = 0
    DEVICE_IN = 1
    PCIE_OUT = 2
    PCIE_IN = 3
    NIC_OUT = 4
    NIC_IN = 5
    LEAF_UP = 6
    LEAF_DOWN = 7
    SERVER_OUT = 8
    SERVER_IN = 9
    BUS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes per link, for one byte of every flow: `links` (numbers) and `loads` (bytes, one entry per crossing).

    `near` says which entries belong to flows that stay in a node: their efficiency is the interconnect's.
    """

    links: Ints
    loads: Floats
    near: NDArray[np.bool_]

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            links=np.concatenate((self.links, other.links)),
            loads=np.concatenate((self.loads, other.loads)),
            near=np.concatenate((self.near, other.near)),
        )

    def scaled(self, factor: float) -> Traffic:
        """The same traffic, `factor` times as much of it."""
        return Traffic(links=self.links, loads=self.loads * factor, near=self.near)


NO_TRAFFIC = Traffic(links=np.empty(0, np.int64), loads=np.empty(0), near=np.empty(0, np.bool_))


class Wiring:
    """The links of a cluster whose worker ranks fill its devices in order.

    `capacity[l]` is the datasheet rate of link l in bytes/s, faults included, `kinds[l]` its Port. Building is
    O(links), a route O(1).
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        g = cluster.devices_per_node
        nics = {machine.node.nic.count for machine in cluster.workers}
        # Several NICs of one device act as one port; fewer NICs than devices are shared.
        self.ports_per_node = min(g, max(nics))
        self.devices_per_node = g
        self.devices = cluster.devices
        self.nodes = cluster.worker_nodes
        self.servers = cluster.server_nodes
        rail = cluster.fabric.kind == "rail-optimized"
        per_leaf = cluster.fabric.nodes_per_leaf
        all_nodes = self.nodes + self.servers
        self.has_leaves = cluster.fabric.kind != "one-switch"
        groups = -(-all_nodes // per_leaf)
        self.leaves = groups * (self.ports_per_node if rail else 1)
        self._rail, self._per_leaf = rail, per_leaf
        counts = {
            Port.DEVICE_OUT: self.devices,
            Port.DEVICE_IN: self.devices,
            Port.PCIE_OUT: self.devices,
            Port.PCIE_IN: self.devices,
            Port.NIC_OUT: self.nodes * self.ports_per_node,
            Port.NIC_IN: self.nodes * self.ports_per_node,
            Port.LEAF_UP: self.leaves,
            Port.LEAF_DOWN: self.leaves,
            Port.SERVER_OUT: self.servers,
            Port.SERVER_IN: self.servers,
            Port.BUS: 1,
        }
        self.offset: dict[Port, int] = {}
        total = 0
        for port in Port:
            self.offset[port] = total
            total += counts[port]
        self.links = total
        self.kinds = np.repeat(np.array(list(Port), np.uint64), [counts[port] for port in Port])
        self.shared_host = cluster.workers[0].nic.kind == "loopback"
        self.capacity = self._capacities()

    # ---------------------------------------------------------------------------------------------- capacities

    def _capacities(self) -> Floats:
        capacity = np.full(self.links, np.inf)
        node = 0
        for machine in self.cluster.workers:
            devices = slice(node * self.devices_per_node, (node + machine.count) * self.devices_per_node)
            ports = slice(node * self.ports_per_node, (node + machine.count) * self.ports_per_node)
            inside = machine.interconnect_rate_bytes_per_s if machine.interconnect is not None else np.inf
            pcie = machine.pcie.rate_bytes_per_s if machine.pcie is not None else np.inf
            outside = machine.nic_rate_bytes_per_s * machine.node.nic.count / self.ports_per_node
            for port, where, rate in (
                (Port.DEVICE_OUT, devices, inside), (Port.DEVICE_IN, devices, inside),
                (Port.PCIE_OUT, devices, pcie), (Port.PCIE_IN, devices, pcie),
                (Port.NIC_OUT, ports, outside), (Port.NIC_IN, ports, outside),
            ):  # fmt: skip
                start = self.offset[port]
                capacity[start + where.start : start + where.stop] = rate
            node += machine.count
        host = 0
        for machine in self.cluster.servers:
            rate = machine.nic_rate_bytes_per_s * machine.node.nic.count
            for port in (Port.SERVER_OUT, Port.SERVER_IN):
                start = self.offset[port] + host
                capacity[start : start + machine.count] = rate
            host += machine.count
        nic_rate = capacity[self.offset[Port.NIC_OUT]]
        below = nic_rate * self._per_leaf * (1 if self._rail else self.ports_per_node)
        for port in (Port.LEAF_UP, Port.LEAF_DOWN):
            start = self.offset[port]
            capacity[start : start + self.leaves] = below / self.cluster.fabric.oversubscription
        capacity[self.offset[Port.BUS]] = self.cluster.workers[0].nic_rate_bytes_per_s
        for fault in self.cluster.faults:
            if isinstance(fault, SlowNic):
                index = fault.node * self.ports_per_node + fault.nic * self.ports_per_node // self._nics(fault.node)
                for port in (Port.NIC_OUT, Port.NIC_IN):
                    capacity[self.offset[port] + index] *= fault.speed
        return capacity

    def _nics(self, node: int) -> int:
        return max(self.ports_per_node, self.cluster.machine_of(node).node.nic.count)

    def kind_of(self, link: int) -> Port:
        """What kind of link a number stands for."""
        return Port(int(self.kinds[link]))

    # ---------------------------------------------------------------------------------------------- places

    def node_of(self, ranks: Ints) -> Ints:
        """The worker node of each rank."""
        return ranks // self.devices_per_node

    def port_of(self, ranks: Ints) -> Ints:
        """The NIC port, within its node, that each rank uses: the one nearest to its device."""
        return (ranks % self.devices_per_node) * self.ports_per_node // self.devices_per_node

    def leaf_of(self, nodes: Ints, ports: Ints) -> Ints:
        """The leaf that a node's port is plugged into; server hosts follow the worker nodes."""
        group = nodes // self._per_leaf
        return group * self.ports_per_node + ports if self._rail else group

    def leaf_of_host(self, host: int) -> int:
        """The leaf that server host `host` is plugged into: hosts take turns between the rails."""
        return int(self.leaf_of(np.array(self.nodes + host), np.array(host % self.ports_per_node)))

    # ---------------------------------------------------------------------------------------------- routes

    def between(self, sources: Ints, targets: Ints, load: float = 1.0) -> Traffic:
        """The traffic of one flow of `load` bytes from each source rank to the target rank beside it. O(flows)."""
        if self.shared_host:
            return Traffic(
                links=np.full(len(sources), self.offset[Port.BUS]),
                loads=np.full(len(sources), load),
                near=np.ones(len(sources), np.bool_),
            )
        here, there = self.node_of(sources), self.node_of(targets)
        near = here == there
        links: list[Ints] = [
            self.offset[Port.DEVICE_OUT] + sources[near],
            self.offset[Port.DEVICE_IN] + targets[near],
        ]
        far_sources, far_targets = sources[~near], targets[~near]
        out_port, in_port = self.port_of(far_sources), self.port_of(far_targets)
        far = [
            self.offset[Port.PCIE_OUT] + far_sources,
            self.offset[Port.NIC_OUT] + here[~near] * self.ports_per_node + out_port,
            self.offset[Port.NIC_IN] + there[~near] * self.ports_per_node + in_port,
            self.offset[Port.PCIE_IN] + far_targets,
        ]
        if self.has_leaves:
            up, down = self.leaf_of(here[~near], out_port), self.leaf_of(there[~near], in_port)
            cross = up != down
            far += [self.offset[Port.LEAF_UP] + up[cross], self.offset[Port.LEAF_DOWN] + down[cross]]
        count_near = sum(len(part) for part in links)
        every = np.concatenate(links + far)
        return Traffic(
            links=every,
            loads=np.full(len(every), load),
            near=np.arange(len(every)) < count_near,
        )

    def hops(self, source: int, target: int) -> tuple[int, int]:
        """(intra-node hops, fabric switches crossed) between two ranks."""
        if source // self.devices_per_node == target // self.devices_per_node or self.shared_host:
            return 1, 0
        a, b = np.array([source]), np.array([target])
        if not self.has_leaves:
            return 0, 1
        same = self.leaf_of(self.node_of(a), self.port_of(a)) == self.leaf_of(self.node_of(b), self.port_of(b))
        return 0, 1 if bool(same[0]) else 3

    def most_switches(self, sources: Ints, targets: Ints) -> int:
        """The fabric switches that the longest of these routes crosses: 0 inside nodes, 1 below a leaf, 3 else."""
        here, there = self.node_of(sources), self.node_of(targets)
        far = here != there
        if self.shared_host or not bool(far.any()):
            return 0
        if not self.has_leaves:
            return 1
        up = self.leaf_of(here[far], self.port_of(sources[far]))
        down = self.leaf_of(there[far], self.port_of(targets[far]))
        return 3 if bool((up != down).any()) else 1

    def with_servers(
        self, ranks: Ints, hosts: Ints, host_shares: Floats, homes: Ints, home_shares: Floats, *, push: bool
    ) -> Traffic:
        """The traffic of one byte between each of `ranks` and all servers, by their shares. O(ranks + servers * ports).

        `hosts` are server-host numbers with `host_shares`; `homes` are worker ranks beside which a server
        runs, with `home_shares`. A rank's traffic with a co-located server arrives at the port of the same index as its
        own, and does not leave its node when that server is at home there.
        """
        if self.shared_host:
            # A rank needs no wire to the server inside itself.
            own = np.bincount(homes, weights=home_shares, minlength=self.devices)[ranks]
            total = float(len(ranks) * (host_shares.sum() + home_shares.sum()) - own.sum())
            return Traffic(links=np.array([self.offset[Port.BUS]]), loads=np.array([total]), near=np.ones(1, np.bool_))
        nodes, ports = self.node_of(ranks), self.port_of(ranks)
        own_share = np.bincount(self.node_of(homes), weights=home_shares, minlength=self.nodes).astype(np.float64)
        flat = nodes * self.ports_per_node + ports
        count = np.bincount(flat, minlength=self.nodes * self.ports_per_node).astype(np.float64)
        by_port = count.reshape(self.nodes, self.ports_per_node)
        leaving = by_port * (1.0 - own_share)[:, None]
        arriving = own_share[:, None] * (by_port.sum(axis=0)[None, :] - by_port)
        near_out, near_in = (Port.NIC_OUT, Port.NIC_IN) if push else (Port.NIC_IN, Port.NIC_OUT)
        pcie = Port.PCIE_OUT if push else Port.PCIE_IN
        far_in = Port.SERVER_IN if push else Port.SERVER_OUT
        parts = [
            (self.offset[near_out] + np.arange(leaving.size), leaving.ravel()),
            (self.offset[near_in] + np.arange(arriving.size), arriving.ravel()),
            (self.offset[pcie] + ranks, np.ones(len(ranks))),
            (self.offset[far_in] + hosts, host_shares * len(ranks)),
        ]
        if self.has_leaves:
            parts += self._through_leaves(by_port, hosts, host_shares, own_share, push=push)
        links = np.concatenate([links for links, _ in parts])
        loads = np.concatenate([loads for _, loads in parts])
        used = loads > 0.0
        return Traffic(links=links[used], loads=loads[used], near=np.zeros(int(used.sum()), np.bool_))

    def _through_leaves(
        self, by_port: Floats, hosts: Ints, host_shares: Floats, own_share: Floats, *, push: bool
    ) -> list[tuple[Ints, Floats]]:
        """Traffic of ranks with servers below other leaves, over the leaves' uplinks."""
        node, port = np.divmod(np.arange(self.nodes * self.ports_per_node), self.ports_per_node)
        leaf = self.leaf_of(node, port)
        senders = np.bincount(leaf, weights=by_port.ravel(), minlength=self.leaves)
        host_leaf = np.array([self.leaf_of_host(int(host)) for host in hosts], np.int64)
        served = np.bincount(host_leaf, weights=host_shares, minlength=self.leaves)
        # A co-located server takes each rank's traffic at the port of the rank's own index: on rails, traffic with it
        # keeps to the leaves of that index.
        if self._rail:
            group = np.bincount(
                np.arange(self.nodes) // self._per_leaf, weights=own_share, minlength=self.leaves // self.ports_per_node
            )
            homes = np.repeat(group, self.ports_per_node)
            reaching = np.tile(by_port.sum(axis=0), self.leaves // self.ports_per_node)
        else:
            homes = np.bincount(np.arange(self.nodes) // self._per_leaf, weights=own_share, minlength=self.leaves)
            reaching = np.full(self.leaves, by_port.sum())
        up = senders * np.maximum(0.0, 1.0 - served - homes)
        down = served * (by_port.sum() - senders) + homes * (reaching - senders)
        # What rounding leaves of nothing is no traffic.
        up[up < 1e-12 * by_port.sum()] = 0.0
        first, second = (Port.LEAF_UP, Port.LEAF_DOWN) if push else (Port.LEAF_DOWN, Port.LEAF_UP)
        every = np.arange(self.leaves)
        return [(self.offset[first] + every, up), (self.offset[second] + every, down)]
