"""The links of a cluster by number: how many of each kind there are, where each stands, and what hangs below it."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster

Ints = NDArray[np.int64]


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
    # What the input comes through: the NICs of storage hosts, the drives of these and then of worker nodes, and the
    # threads of each rank that read.
    STORAGE_OUT = 11
    DRIVES = 12
    READERS = 13
    # Between a PCIe switch and the host: to the host, and from it.
    SWITCH_UP = 14
    SWITCH_DOWN = 15


class Ports:
    """The ports of a cluster whose worker ranks fill its devices in order, numbered by kind; places by arithmetic.

    `offset[kind]` is the number of the first link of a kind, `kinds[l]` the Port of link l. Building is O(links).
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
        self.storage = cluster.storage_nodes
        self.feeds = any(machine.node.storage is not None for machine in (*cluster.workers, *cluster.storage))
        all_nodes = self.nodes + self.servers + self.storage
        self.has_leaves = cluster.fabric.kind != "one-switch"
        groups = -(-all_nodes // per_leaf)
        self.leaves = groups * (self.ports_per_node if rail else 1)
        self.rails, self.nodes_per_leaf = rail, per_leaf
        self.seed = cluster.fabric.ecmp_seed << 32
        self.ports_per_leaf = per_leaf * (1 if rail else self.ports_per_node)
        first = cluster.workers[0]
        self.port_rate_bytes_per_s = first.nic_rate_bytes_per_s * first.node.nic.count / self.ports_per_node
        # Under ECMP a flow takes one of a leaf's uplinks; else all of them together are one link.
        self.ecmp = self.has_leaves and cluster.fabric.routing == "ecmp"
        self.uplinks = cluster.fabric.spines if self.ecmp else 1
        # A device that has its switch for itself is plugged into the host directly.
        switched = [
            machine.node.devices_per_pcie_switch if machine.pcie is not None else 1 for machine in cluster.workers
        ]
        switched = [min(each, g) if each > 1 else 0 for each in switched]
        self.per_switch = np.repeat(np.array(switched, np.int64), [machine.count for machine in cluster.workers])
        self.switches_per_node = max([-(-g // each) if each else 0 for each in switched])
        # Devices of one node reach each other through their PCIe ports, or else over an interconnect of their own.
        self.over_pcie = np.repeat(
            np.array([m.node.interconnect is not None and m.node.interconnect.kind == "pcie" for m in cluster.workers]),
            [machine.count for machine in cluster.workers],
        )
        self.pcie_inside = bool(self.over_pcie.any())
        counts = {
            Port.DEVICE_OUT: self.devices,
            Port.DEVICE_IN: self.devices,
            Port.PCIE_OUT: self.devices,
            Port.PCIE_IN: self.devices,
            Port.NIC_OUT: self.nodes * self.ports_per_node,
            Port.NIC_IN: self.nodes * self.ports_per_node,
            Port.LEAF_UP: self.leaves * self.uplinks,
            Port.LEAF_DOWN: self.leaves * self.uplinks,
            Port.SERVER_OUT: self.servers,
            Port.SERVER_IN: self.servers,
            Port.BUS: 1,
            Port.STORAGE_OUT: self.storage,
            Port.DRIVES: self.storage + self.nodes if self.feeds else 0,
            Port.READERS: self.devices if self.feeds else 0,
            Port.SWITCH_UP: self.nodes * self.switches_per_node,
            Port.SWITCH_DOWN: self.nodes * self.switches_per_node,
        }
        self.offset: dict[Port, int] = {}
        total = 0
        for port in Port:
            self.offset[port] = total
            total += counts[port]
        self.links = total
        self.kinds = np.repeat(np.array(list(Port), np.uint64), [counts[port] for port in Port])
        self.shared_host = cluster.workers[0].nic.kind == "loopback"
        self.far_nic = self._far_nics()

    def _far_nics(self) -> NDArray[np.bool_]:
        """Of each device, whether its NIC port hangs below another PCIe switch; empty where none does."""
        if self.switches_per_node < 2:
            return np.zeros(0, np.bool_)
        ranks = np.arange(self.devices)
        nodes = self.node_of(ranks)
        far = self.switch_of(ranks) != self.switch_of_port(nodes, self.port_of(ranks))
        return far if bool(far.any()) else np.zeros(0, np.bool_)

    def ports_of_nic(self, node: int, nic: int) -> tuple[range, int]:
        """The ports (numbered through all nodes) that a NIC serves, and of how many NICs each of them is made up."""
        nics, ports = self.cluster.machine_of(node).node.nic.count, self.ports_per_node
        first = node * ports
        if nics >= ports:
            at = first + nic * ports // nics
            return range(at, at + 1), nics // ports
        return range(first + nic * ports // nics, first + (nic + 1) * ports // nics), 1

    @property
    def uneven_switches(self) -> bool:
        """Whether traffic between ranks, or what they read, may cross the uplinks of PCIe switches."""
        return self.switches_per_node > 0 and (self.pcie_inside or len(self.far_nic) > 0 or self.feeds)

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

    def switch_of(self, ranks: Ints) -> Ints:
        """The PCIe switch of each rank's device, numbered through all nodes; its node's first where it has none."""
        nodes = ranks // self.devices_per_node
        each = self.per_switch[nodes]
        return nodes * self.switches_per_node + (ranks % self.devices_per_node) // np.maximum(each, 1) * (each > 0)

    def has_switch(self, ranks: Ints) -> NDArray[np.bool_]:
        """Whether the device of each rank hangs below a PCIe switch."""
        return self.per_switch[self.node_of(ranks)] > 0

    def switch_of_port(self, nodes: Ints, ports: Ints) -> Ints:
        """The PCIe switch that a NIC port hangs below: that of the first device which uses it."""
        return self.switch_of(nodes * self.devices_per_node + ports * self.devices_per_node // self.ports_per_node)

    def leaf_of(self, nodes: Ints, ports: Ints) -> Ints:
        """The leaf that a node's port is plugged into; server hosts follow the worker nodes."""
        group = nodes // self.nodes_per_leaf
        return group * self.ports_per_node + ports if self.rails else group

    def leaf_of_host(self, host: int) -> int:
        """The leaf that server host `host` is plugged into: hosts take turns between the rails; then storage."""
        return int(self.leaf_of(np.array(self.nodes + host), np.array(host % self.ports_per_node)))
