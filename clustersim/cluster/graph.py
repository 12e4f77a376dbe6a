"""graph(): a cluster as a networkx graph, built on demand for pictures, for checks, and for irregular machines.

The simulator itself finds routes by arithmetic (`wiring.py`); both must agree, which the tests check.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clustersim.cluster.capacity import background_share, nic_speeds
from clustersim.cluster.cluster import Cluster, Machine, SlowRank

if TYPE_CHECKING:
    import networkx as nx

# NVLinks between the GPUs of a hybrid cube mesh (NVIDIA DGX-1 whitepaper, V100): every GPU has six.
_CUBE_MESH_LINKS = {
    (0, 1): 1, (0, 2): 1, (0, 3): 2, (0, 4): 2, (1, 2): 2, (1, 3): 1, (1, 5): 2, (2, 3): 2, (2, 6): 1, (3, 7): 1,
    (4, 5): 1, (4, 6): 1, (4, 7): 2, (5, 6): 2, (5, 7): 1, (6, 7): 2,
}  # fmt: skip
_CUBE_MESH_LINKS_OF_ONE = 6


def mesh_shares(devices: int) -> dict[tuple[int, int], float]:
    """The share of one device's mesh rate on each direct link: the hybrid cube mesh of eight, else all to all."""
    if devices == 8:
        return {pair: lanes / _CUBE_MESH_LINKS_OF_ONE for pair, lanes in _CUBE_MESH_LINKS.items()}
    return {(a, b): 1.0 / (devices - 1) for a in range(devices) for b in range(a + 1, devices)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaves:
    """How many leaf switches a cluster has, how many ports of one node they tell apart, and what joins them: one uplink
    to each of `spines`; a single one stands for all of them where traffic is spread."""

    count: int
    rails: int
    spines: int
    uplink_bytes_per_s: float


def leaves(cluster: Cluster) -> Leaves:
    """The leaf switches of a cluster, or its one switch; the rate is that of one uplink."""
    fabric = cluster.fabric
    if fabric.kind == "one-switch":
        return Leaves(count=1, rails=1, spines=1, uplink_bytes_per_s=math.inf)
    first = cluster.machines[0]
    ports = max((_ports(machine, cluster) for machine in cluster.workers), default=_ports(first, cluster))
    rails = ports if fabric.kind == "rail-optimized" else 1
    groups = -(-(cluster.worker_nodes + cluster.server_nodes + cluster.storage_nodes) // fabric.nodes_per_leaf)
    port_rate = first.nic_rate_bytes_per_s * first.node.nic.count / ports
    below = port_rate * fabric.nodes_per_leaf * (1 if rails > 1 else ports)
    spines = fabric.spines if fabric.routing == "ecmp" else 1
    uplink = below / fabric.oversubscription / spines
    return Leaves(count=groups * rails, rails=rails, spines=spines, uplink_bytes_per_s=uplink)


def _ports(machine: Machine, cluster: Cluster) -> int:
    """NIC ports of a node, as ranks see them: several NICs of one device act as one."""
    nics = max(m.node.nic.count for m in (cluster.workers or cluster.servers))
    return min(machine.node.devices, nics) if machine.node.devices else nics


def graph(cluster: Cluster) -> nx.DiGraph:
    """Every GPU, switch, socket, NIC, leaf and host of `cluster`. O(devices + NICs); 16,384 GPUs take about a second.

    Nodes are called `n3.gpu0` (worker node 3) or `leaf2`, and have `kind` (gpu, cpu, nvswitch, memory, pcie-switch,
    socket, drives, nic, leaf, spine), `node` (the global node number; -1 in the fabric) and `host` (its profile). A GPU
    has its `rank` and the `nic` it uses; a straggler has `slowdown`. Edges are one direction of a link each, with
    `rate_bytes_per_s`: infinite where the simulator sets no limit (between sockets), less where faults and other jobs
    leave less.
    """
    import networkx

    result: nx.DiGraph = networkx.DiGraph()
    fabric = leaves(cluster)
    node = rank = 0
    for machine in cluster.machines:
        for _ in range(machine.count):
            rank = _add_node(result, cluster, machine, node, rank)
            _plug_in(result, cluster, machine, node, fabric)
            node += 1
    if fabric.count > 1:
        for spine in range(fabric.spines):
            name = f"spine{spine}" if fabric.spines > 1 else "spine"
            result.add_node(name, kind="spine", node=-1, host="")
            for index in range(fabric.count):
                left = 1.0 - background_share(cluster, "leaf-uplink", index)
                _join(result, f"leaf{index}", name, fabric.uplink_bytes_per_s * left)
    return result


def _join(result: nx.DiGraph, a: str, b: str, rate: float) -> None:
    """One link, both directions."""
    result.add_edge(a, b, rate_bytes_per_s=rate)
    result.add_edge(b, a, rate_bytes_per_s=rate)


def _add_node(result: nx.DiGraph, cluster: Cluster, machine: Machine, node: int, rank: int) -> int:
    """What stands in one box; returns the next free rank."""
    profile, host = machine.node, machine.node.name
    attributes: dict[str, Any] = {"node": node, "host": host}
    pcie = machine.pcie.rate_bytes_per_s if machine.pcie is not None else math.inf
    sockets = profile.host.sockets
    for socket in range(sockets):
        result.add_node(f"n{node}.socket{socket}", kind="socket", **attributes)
    for socket in range(sockets - 1):
        _join(result, f"n{node}.socket{socket}", f"n{node}.socket{socket + 1}", math.inf)
    switches = -(-profile.devices // profile.devices_per_pcie_switch) if machine.pcie is not None else 0
    for switch in range(switches):
        result.add_node(f"n{node}.pcie{switch}", kind="pcie-switch", **attributes)
        _join(result, f"n{node}.pcie{switch}", f"n{node}.socket{switch * sockets // switches}", pcie)
    for nic in range(profile.nic.count):
        result.add_node(f"n{node}.nic{nic}", kind="nic", **attributes)
        rate = pcie if switches else math.inf
        _join(result, f"n{node}.nic{nic}", _above_nic(machine, node, nic, switches), rate)
    if profile.storage is not None:
        result.add_node(f"n{node}.drives", kind="drives", **attributes)
        _join(result, f"n{node}.drives", f"n{node}.socket0", profile.storage.read_rate_bytes_per_s)
    kind = machine.device.kind if machine.device is not None else "gpu"
    slow = {fault.rank: fault.slowdown for fault in cluster.faults if isinstance(fault, SlowRank)}
    for device in range(profile.devices):
        name = f"n{node}.{kind}{device}"
        result.add_node(
            name, kind=kind, rank=rank, nic=f"n{node}.nic{_nic_of(machine, device)}", slowdown=slow.get(rank, 1.0),
            **attributes,
        )  # fmt: skip
        above = (
            f"n{node}.pcie{device // profile.devices_per_pcie_switch}" if switches else _socket(machine, node, device)
        )
        _join(result, name, above, pcie)
        rank += 1
    if profile.devices > 1:
        _add_interconnect(result, machine, node, kind)
    return rank


def _socket(machine: Machine, node: int, device: int) -> str:
    return f"n{node}.socket{device * machine.node.host.sockets // max(1, machine.node.devices)}"


def _nic_of(machine: Machine, device: int) -> int:
    """The NIC nearest to a device: cards are spread evenly, and the first of several is named."""
    return device * machine.node.nic.count // machine.node.devices


def _above_nic(machine: Machine, node: int, nic: int, switches: int) -> str:
    """The PCIe switch (or socket) that a NIC hangs below: that of the first device which uses it."""
    profile = machine.node
    if profile.devices == 0:
        return f"n{node}.socket{nic * profile.host.sockets // profile.nic.count}"
    device = nic * profile.devices // profile.nic.count
    return f"n{node}.pcie{device // profile.devices_per_pcie_switch}" if switches else _socket(machine, node, device)


def _add_interconnect(result: nx.DiGraph, machine: Machine, node: int, kind: str) -> None:
    interconnect = machine.node.interconnect
    assert interconnect is not None
    rate, devices = machine.interconnect_rate_bytes_per_s, machine.node.devices
    names = [f"n{node}.{kind}{device}" for device in range(devices)]
    match interconnect.kind:
        case "switch" | "host":
            middle = f"n{node}.nvswitch" if interconnect.kind == "switch" else f"n{node}.memory"
            sort = "nvswitch" if interconnect.kind == "switch" else "memory"
            result.add_node(middle, kind=sort, node=node, host=machine.node.name)
            if machine.nic.kind == "loopback":
                rate = machine.nic_rate_bytes_per_s
            for name in names:
                _join(result, name, middle, rate)
        case "mesh":
            for (a, b), share in mesh_shares(devices).items():
                _join(result, names[a], names[b], rate * share)
        case "pcie":
            # Devices meet at PCIe switches and sockets, which are there already.
            pass


def _plug_in(result: nx.DiGraph, cluster: Cluster, machine: Machine, node: int, fabric: Leaves) -> None:
    """The NICs of one node, at their leaves."""
    if machine.nic.kind == "loopback":
        return
    ports, nics = _ports(machine, cluster), machine.node.nic.count
    kept = nic_speeds(cluster)
    left = 1.0 - background_share(cluster, "nic", node)
    group = node // cluster.fabric.nodes_per_leaf * fabric.rails
    for nic in range(nics):
        # A host without devices has its cards below one leaf, and hosts take turns between the rails.
        rail = nic * ports // nics if machine.node.devices else (node - cluster.worker_nodes)
        leaf = f"leaf{group + rail % fabric.rails if fabric.count > 1 else 0}"
        if leaf not in result:
            result.add_node(leaf, kind="leaf", node=-1, host="")
        _join(result, f"n{node}.nic{nic}", leaf, machine.nic_rate_bytes_per_s * kept.get((node, nic), 1.0) * left)


def route(wires: nx.DiGraph, source: str, target: str) -> list[str]:
    """The fastest path between two devices: a device sends through its own NIC, and no other device forwards
    (but in a mesh, where devices have no other way). O(E log V)."""
    import networkx

    ends = {source, target, wires.nodes[source]["nic"], wires.nodes[target]["nic"]}
    same_node = wires.nodes[source]["node"] == wires.nodes[target]["node"]

    def passes(name: str) -> bool:
        place = wires.nodes[name]
        if same_node and place["node"] == wires.nodes[source]["node"]:
            return bool(place["kind"] != "nic")
        return name in ends or place["kind"] not in ("gpu", "cpu", "nic")

    open_wires = networkx.subgraph_view(wires, filter_node=passes)
    # Time per byte; a hop that costs nothing still counts, so that of two equal ways the shorter is taken.
    path: list[str] = networkx.shortest_path(
        open_wires, source, target, weight=lambda a, b, edge: 1.0 / edge["rate_bytes_per_s"] + 1e-15
    )
    return path
