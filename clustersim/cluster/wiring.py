"""Routes by arithmetic: which physical links a flow between two worker ranks, or a rank and a server, crosses.

Every device has a port into its node's interconnect and a PCIe port towards its NIC; devices and NICs may meet at PCIe
switches, whose uplinks lead to the host and to each other; NICs meet at a leaf, leaves at the spine. A link is one
direction of one of these, numbered without building a graph, so that a route costs a few additions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.capacity import capacities
from clustersim.cluster.cluster import Cluster
from clustersim.cluster.ports import Port as Port
from clustersim.cluster.ports import Ports
from clustersim.cluster.scramble import scramble

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


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


class Wiring(Ports):
    """The ports of a cluster with what each carries, and the routes between ranks.

    `capacity[l]` is the rate of link l in bytes/s, what faults and other jobs take of it left out. A route is O(1).
    """

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.capacity = capacities(self)

    def binding_leaves(self) -> NDArray[np.bool_]:
        """Of each leaf, whether its uplinks carry less than the ports below it can, in either direction. O(ports)."""
        below = {}
        node, port = np.divmod(np.arange(self.nodes * self.ports_per_node), self.ports_per_node)
        leaf = self.leaf_of(node, port)
        hosts = np.array([self.leaf_of_host(host) for host in range(self.servers)], np.int64)
        for kind, near, far in (
            (Port.LEAF_UP, Port.NIC_OUT, Port.SERVER_OUT), (Port.LEAF_DOWN, Port.NIC_IN, Port.SERVER_IN),
        ):  # fmt: skip
            ports = self.capacity[self.offset[near] : self.offset[near] + len(leaf)]
            servers = self.capacity[self.offset[far] : self.offset[far] + self.servers]
            below[kind] = np.bincount(leaf, weights=ports, minlength=self.leaves)
            below[kind] += np.bincount(hosts, weights=servers, minlength=self.leaves)
        stores = np.array([self.leaf_of_host(self.servers + host) for host in range(self.storage)], np.int64)
        start = self.offset[Port.STORAGE_OUT]
        rates = self.capacity[start : start + self.storage]
        below[Port.LEAF_UP] += np.bincount(stores, weights=rates, minlength=self.leaves)
        binding = np.zeros(self.leaves, np.bool_)
        for kind, carried in below.items():
            start = self.offset[kind]
            uplinks = self.capacity[start : start + self.leaves * self.uplinks].reshape(self.leaves, self.uplinks)
            binding |= uplinks.min(axis=1) < carried * (1.0 - 1e-12)
        return binding

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
        offset = self.offset
        links: list[Ints] = [offset[Port.DEVICE_OUT] + sources[near], offset[Port.DEVICE_IN] + targets[near]]
        if self.pcie_inside:
            links += self._inside_pcie(sources[near], targets[near])
        far_sources, far_targets = sources[~near], targets[~near]
        out_port, in_port = self.port_of(far_sources), self.port_of(far_targets)
        far = [
            offset[Port.PCIE_OUT] + far_sources,
            offset[Port.NIC_OUT] + here[~near] * self.ports_per_node + out_port,
            offset[Port.NIC_IN] + there[~near] * self.ports_per_node + in_port,
            offset[Port.PCIE_IN] + far_targets,
        ]
        if len(self.far_nic):
            far += [*self._to_nic(far_sources), *self._from_nic(far_targets)]
        if self.has_leaves:
            up, down = self.leaf_of(here[~near], out_port), self.leaf_of(there[~near], in_port)
            cross = up != down
            up, down = up[cross], down[cross]
            if self.ecmp:
                way = self.way_of(far_sources[cross], far_targets[cross])
                up, down = up * self.uplinks + way, down * self.uplinks + way
            far += [offset[Port.LEAF_UP] + up, offset[Port.LEAF_DOWN] + down]
        count_near = sum(len(part) for part in links)
        every = np.concatenate(links + far)
        return Traffic(
            links=every,
            loads=np.full(len(every), load),
            near=np.arange(len(every)) < count_near,
        )

    def _inside_pcie(self, sources: Ints, targets: Ints) -> list[Ints]:
        """What flows between devices of a node cross that reach each other over PCIe only."""
        over = self.over_pcie[self.node_of(sources)]
        sources, targets = sources[over], targets[over]
        links = [self.offset[Port.PCIE_OUT] + sources, self.offset[Port.PCIE_IN] + targets]
        if self.switches_per_node:
            up, down = self.switch_of(sources), self.switch_of(targets)
            apart = up != down
            links += [self.offset[Port.SWITCH_UP] + up[apart], self.offset[Port.SWITCH_DOWN] + down[apart]]
        return links

    def _to_nic(self, ranks: Ints) -> tuple[Ints, Ints]:
        """The uplinks that flows from devices cross whose NIC hangs below another switch: up here, down there."""
        ranks = ranks[self.far_nic[ranks]]
        port = self.switch_of_port(self.node_of(ranks), self.port_of(ranks))
        return self.offset[Port.SWITCH_UP] + self.switch_of(ranks), self.offset[Port.SWITCH_DOWN] + port

    def _from_nic(self, ranks: Ints) -> tuple[Ints, Ints]:
        ranks = ranks[self.far_nic[ranks]]
        port = self.switch_of_port(self.node_of(ranks), self.port_of(ranks))
        return self.offset[Port.SWITCH_UP] + port, self.offset[Port.SWITCH_DOWN] + self.switch_of(ranks)

    def way_of(self, sources: Ints, targets: Ints) -> Ints:
        """The spine that the flow of each pair takes under ECMP: a hash of the two and of the seed."""
        pair = (sources * self.devices + targets).astype(np.uint64) + np.uint64(self.seed)
        with np.errstate(over="ignore"):
            ways: Ints = (scramble(pair) % np.uint64(self.uplinks)).astype(np.int64)
        return ways

    def through_leaf(self, kind: Port, leaves: Ints, loads: Floats) -> tuple[Ints, Floats]:
        """The uplinks (or downlinks) of leaves, for traffic that is spread evenly over them, with what each carries."""
        if self.uplinks == 1:
            return self.offset[kind] + leaves, loads
        every = leaves[:, None] * self.uplinks + np.arange(self.uplinks)
        return self.offset[kind] + every.ravel(), np.repeat(loads / self.uplinks, self.uplinks)

    def route(self, source: int, target: int) -> tuple[int, ...]:
        """The links that a flow from one rank to another crosses: those of `between`, one pair at a time. O(1)."""
        offset, g, ports = self.offset, self.devices_per_node, self.ports_per_node
        if self.shared_host:
            return (offset[Port.BUS],)
        here, a = divmod(source, g)
        there, b = divmod(target, g)
        if here == there:
            near: tuple[int, ...] = (offset[Port.DEVICE_OUT] + source, offset[Port.DEVICE_IN] + target)
            if not self.pcie_inside or not self.over_pcie[here]:
                return near
            near += (offset[Port.PCIE_OUT] + source, offset[Port.PCIE_IN] + target)
            each = int(self.per_switch[here])
            if not each or a // each == b // each:
                return near
            first = here * self.switches_per_node
            return (*near, offset[Port.SWITCH_UP] + first + a // each, offset[Port.SWITCH_DOWN] + first + b // each)
        out, into = a * ports // g, b * ports // g
        found: tuple[int, ...] = (
            offset[Port.PCIE_OUT] + source, offset[Port.NIC_OUT] + here * ports + out,
            offset[Port.NIC_IN] + there * ports + into, offset[Port.PCIE_IN] + target,
        )  # fmt: skip
        if len(self.far_nic):
            ends = [*self._to_nic(np.array([source])), *self._from_nic(np.array([target]))]
            found += tuple(int(link) for end in ends for link in end)
        if not self.has_leaves:
            return found
        up, down = here // self.nodes_per_leaf, there // self.nodes_per_leaf
        if self.rails:
            up, down = up * ports + out, down * ports + into
        if up == down:
            return found
        if self.ecmp:
            way = scramble(source * self.devices + target + self.seed) % self.uplinks
            up, down = up * self.uplinks + way, down * self.uplinks + way
        return (*found, offset[Port.LEAF_UP] + up, offset[Port.LEAF_DOWN] + down)

    def spread(self, ranks: Ints, near: Floats, far: Floats, beyond: Floats, apart: Floats | None = None) -> Traffic:
        """The traffic of ranks that each send, and receive, `near` bytes inside their node, of these `apart` bytes
        (none, if not given) to devices below other PCIe switches, and `far` bytes through their NIC port, of these
        `beyond` bytes above their leaf. One entry per rank and link. O(ranks)."""
        if self.shared_host:
            bus = np.full(len(ranks), self.offset[Port.BUS])
            return Traffic(links=bus, loads=near.astype(np.float64), near=np.ones(len(ranks), np.bool_))
        nodes, ports = self.node_of(ranks), self.port_of(ranks)
        flat = nodes * self.ports_per_node + ports
        parts = [(self.offset[kind] + ranks, near) for kind in (Port.DEVICE_OUT, Port.DEVICE_IN)]
        if self.pcie_inside:
            parts += self._spread_inside(ranks, near, np.zeros(len(ranks)) if apart is None else apart)
        inside = sum(len(links) for links, _ in parts)
        if len(self.far_nic):
            away = self.far_nic[ranks]
            ends = (*self._to_nic(ranks), *self._from_nic(ranks))
            parts += [(links, far[away]) for links in ends]
        parts += [(self.offset[kind] + ranks, far) for kind in (Port.PCIE_OUT, Port.PCIE_IN)]
        parts += [(self.offset[kind] + flat, far) for kind in (Port.NIC_OUT, Port.NIC_IN)]
        if self.has_leaves:
            leaf = self.leaf_of(nodes, ports)
            parts += [self.through_leaf(kind, leaf, beyond) for kind in (Port.LEAF_UP, Port.LEAF_DOWN)]
        links = np.concatenate([links for links, _ in parts])
        loads = np.concatenate([loads for _, loads in parts])
        used = loads > 0.0
        return Traffic(links=links[used], loads=loads[used], near=(np.arange(len(links)) < inside)[used])

    def _spread_inside(self, ranks: Ints, near: Floats, apart: Floats) -> list[tuple[Ints, Floats]]:
        """What ranks put on PCIe links that reach each other over these only."""
        over = self.over_pcie[self.node_of(ranks)]
        ranks, near, apart = ranks[over], near[over], apart[over]
        found = [(self.offset[kind] + ranks, near) for kind in (Port.PCIE_OUT, Port.PCIE_IN)]
        if self.switches_per_node:
            switch = self.switch_of(ranks)
            found += [(self.offset[kind] + switch, apart) for kind in (Port.SWITCH_UP, Port.SWITCH_DOWN)]
        return found

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
