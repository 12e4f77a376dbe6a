"""How much every link of a cluster carries: rates of its profile, less what faults and other jobs take of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, Machine, SlowNic
from clustersim.cluster.ports import Port, Ports

Floats = NDArray[np.float64]


def nic_speeds(cluster: Cluster) -> dict[tuple[int, int], float]:
    """The fraction of its rate that each degraded NIC (node, nic) keeps; faults of one card multiply."""
    found: dict[tuple[int, int], float] = {}
    for fault in cluster.faults:
        if isinstance(fault, SlowNic):
            key = (fault.node, fault.nic)
            found[key] = found.get(key, 1.0) * fault.speed
    return found


def background_share(cluster: Cluster, link: str, place: int) -> float:
    """The fraction that other jobs use of the NIC ports of node `place`, or of the uplinks of leaf `place`."""
    return sum(
        other.share for other in cluster.background if other.link == link and (other.at is None or place in other.at)
    )


def less_background(cluster: Cluster) -> Cluster:
    """The cluster with what other jobs use of all NICs taken off their rates: for closed forms, which know links by
    kind. What they use of some NICs only, or of uplinks, is left out."""
    share = sum(other.share for other in cluster.background if other.link == "nic" and other.at is None)
    if share == 0.0:
        return cluster

    def left(machine: Machine) -> Machine:
        nic = replace(machine.node.nic, rate_bytes_per_s=machine.nic_rate_bytes_per_s * (1.0 - share))
        return replace(machine, node=replace(machine.node, nic=nic))

    return replace(cluster, workers=tuple(map(left, cluster.workers)), servers=tuple(map(left, cluster.servers)))


def capacities(ports: Ports) -> Floats:
    """Bytes/s that every link has for us. O(links)."""
    cluster, offset = ports.cluster, ports.offset
    capacity = np.full(ports.links, np.inf)
    node = 0
    for machine in cluster.workers:
        inside = machine.interconnect_rate_bytes_per_s if machine.interconnect is not None else np.inf
        pcie = machine.pcie.rate_bytes_per_s if machine.pcie is not None else np.inf
        outside = machine.nic_rate_bytes_per_s * machine.node.nic.count / ports.ports_per_node
        for kinds, each, rate in (
            ((Port.DEVICE_OUT, Port.DEVICE_IN), ports.devices_per_node, inside),
            ((Port.PCIE_OUT, Port.PCIE_IN), ports.devices_per_node, pcie),
            ((Port.SWITCH_UP, Port.SWITCH_DOWN), ports.switches_per_node, pcie),
            ((Port.NIC_OUT, Port.NIC_IN), ports.ports_per_node, outside),
        ):
            for kind in kinds:
                capacity[offset[kind] + node * each : offset[kind] + (node + machine.count) * each] = rate
        node += machine.count
    host = 0
    for machine in cluster.servers:
        rate = machine.nic_rate_bytes_per_s * machine.node.nic.count
        for kind in (Port.SERVER_OUT, Port.SERVER_IN):
            capacity[offset[kind] + host : offset[kind] + host + machine.count] = rate
        host += machine.count
    host = offset[Port.STORAGE_OUT]
    for machine in cluster.storage:
        capacity[host : host + machine.count] = machine.nic_rate_bytes_per_s * machine.node.nic.count
        host += machine.count
    uplink = ports.port_rate_bytes_per_s * ports.ports_per_leaf / cluster.fabric.oversubscription / ports.uplinks
    for kind in (Port.LEAF_UP, Port.LEAF_DOWN):
        capacity[offset[kind] : offset[kind] + ports.leaves * ports.uplinks] = uplink
    capacity[offset[Port.BUS]] = cluster.workers[0].nic_rate_bytes_per_s
    _take_faults(ports, capacity)
    _take_background(ports, capacity)
    return capacity


def _take_faults(ports: Ports, capacity: Floats) -> None:
    """A port keeps what its NICs keep: each is an equal part of it."""
    lost: dict[int, float] = {}
    for (node, nic), speed in nic_speeds(ports.cluster).items():
        served, parts = ports.ports_of_nic(node, nic)
        for port in served:
            lost[port] = lost.get(port, 0.0) + (1.0 - speed) / parts
    for port, part in lost.items():
        for kind in (Port.NIC_OUT, Port.NIC_IN):
            capacity[ports.offset[kind] + port] *= 1.0 - part


def _take_background(ports: Ports, capacity: Floats) -> None:
    cluster, offset = ports.cluster, ports.offset
    if not cluster.background:
        return
    hosts = ports.nodes + ports.servers
    left = np.array([1.0 - background_share(cluster, "nic", node) for node in range(hosts)])
    for out, into, part in (
        (Port.NIC_OUT, Port.NIC_IN, np.repeat(left[: ports.nodes], ports.ports_per_node)),
        (Port.SERVER_OUT, Port.SERVER_IN, left[ports.nodes :]),
    ):
        for kind in (out, into):
            capacity[offset[kind] : offset[kind] + len(part)] *= part
    if ports.has_leaves:
        shares = [background_share(cluster, "leaf-uplink", leaf) for leaf in range(ports.leaves)]
        part = np.repeat(1.0 - np.array(shares), ports.uplinks)
        for kind in (Port.LEAF_UP, Port.LEAF_DOWN):
            capacity[offset[kind] : offset[kind] + len(part)] *= part
