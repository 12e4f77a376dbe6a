"""A cluster as a tree on the terminal, equal nodes folded."""

from __future__ import annotations

from rich.text import Text
from rich.tree import Tree

from clustersim.cluster.cluster import Cluster, Machine, SlowNic, SlowRank
from clustersim.cluster.graph import Leaves, leaves
from clustersim.report.figures import significant
from clustersim.units import human_bytes, human_seconds


def rate(value: float) -> str:
    """A link rate, as the text of a tree: 25 GB/s."""
    return f"{human_bytes(value)}/s"


def _counted(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def tree(cluster: Cluster, title: str) -> Tree:
    """The machines, what stands in each, the fabric and the faults; all rates are per direction."""
    parts = []
    if cluster.worker_nodes:
        parts += [_counted(cluster.worker_nodes, "node"), _counted(cluster.devices, "device")]
    if cluster.server_nodes:
        parts.append(_counted(cluster.server_nodes, "host without devices", "hosts without devices"))
    if cluster.storage_nodes:
        parts.append(_counted(cluster.storage_nodes, "storage host"))
    what = ", ".join(parts)
    root = Tree(Text.assemble((title, "bold"), f": {what} (rates per direction)"))
    if sum(machine.count for machine in cluster.machines) > 1:
        root.add(Text(fabric_line(cluster)))
    node = rank = 0
    for machine in cluster.machines:
        ranks = f", ranks {rank}-{rank + machine.count * machine.node.devices - 1}" if machine.node.devices else ""
        numbers = f"nodes {node}-{node + machine.count - 1}" if machine.count > 1 else f"node {node}"
        branch = root.add(Text.assemble((f"{machine.count} x {machine.node.name}", "bold"), f"  {numbers}{ranks}"))
        for line in machine_lines(machine):
            branch.add(Text(line))
        node += machine.count
        rank += machine.count * machine.node.devices
    for fault in cluster.faults:
        match fault:
            case SlowRank():
                root.add(Text(f"rank {fault.rank} computes {fault.slowdown:g} times slower", "yellow"))
            case SlowNic():
                root.add(Text(f"node {fault.node} NIC {fault.nic} keeps {fault.speed:.0%} of its rate", "yellow"))
    for other in cluster.background:
        what = "NICs" if other.link == "nic" else "leaf uplinks"
        where = (
            ""
            if other.at is None
            else f" of {'node' if other.link == 'nic' else 'leaf'} " + ", ".join(map(str, other.at))
        )
        root.add(Text(f"other jobs use {other.share:.0%} of the {what}{where}", "yellow"))
    return root


def machine_lines(machine: Machine) -> list[str]:
    """What stands in one box, a line for each kind of thing."""
    node, device = machine.node, machine.device
    lines = []
    if device is not None:
        peaks = ", ".join(f"{dtype} {significant(peak / 1e12, 3)}" for dtype, peak in sorted(device.peak.items()))
        lines.append(f"{node.devices} x {device.name}: {human_bytes(device.memory_bytes)}, {peaks} TFLOP/s")
    if machine.interconnect is not None and node.interconnect is not None and node.devices > 1:
        how = {
            "switch": "NVSwitch", "mesh": "direct links", "pcie": "PCIe and sockets", "host": "host memory",
        }[node.interconnect.kind]  # fmt: skip
        lines.append(f"{how}: {machine.interconnect.name}, {rate(machine.interconnect_rate_bytes_per_s)} a device")
    if machine.pcie is not None:
        switches = -(-node.devices // node.devices_per_pcie_switch)
        lines.append(f"{switches} x PCIe switch: {machine.pcie.name}, {rate(machine.pcie.rate_bytes_per_s)} a device")
    lines.append(f"{node.nic.count} x NIC: {machine.nic.name}, {rate(machine.nic_rate_bytes_per_s)}")
    host = node.host
    lines.append(
        f"{_counted(host.sockets, 'socket')}, {_counted(host.cores, 'core')}, {human_bytes(host.memory_bytes)}"
    )
    if node.storage is not None:
        read = rate(node.storage.read_rate_bytes_per_s)
        drives = _counted(node.storage.drives, "drive")
        latency = human_seconds(node.storage.read_latency_s)
        lines.append(f"storage ({node.storage.tier}, {drives}): reads {read} in all, {latency} a read")
    return lines


def fabric_line(cluster: Cluster) -> str:
    """The fabric in one line."""
    fabric = cluster.fabric
    latency = f"{human_seconds(fabric.hop_latency_s)} a switch"
    if cluster.workers and cluster.workers[0].nic.kind == "loopback":
        return "no fabric: all ranks share one host"
    if fabric.kind == "one-switch":
        return f"one switch, non-blocking, {latency}"
    found: Leaves = leaves(cluster)
    blocking = "non-blocking" if fabric.oversubscription == 1.0 else f"{fabric.oversubscription:g}:1 oversubscribed"
    ways = f"{found.spines} x " if found.spines > 1 else ""
    rails = f"{found.rails} rails, " if found.rails > 1 else ""
    return (
        f"{fabric.kind}: {rails}{found.count} leaves of {fabric.nodes_per_leaf} nodes, {blocking}, "
        f"{ways}{rate(found.uplink_bytes_per_s)} up from each, {latency}"
    )
