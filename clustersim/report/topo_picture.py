"""A cluster as a picture: one node of each kind in detail, and the fabric above, equal parts folded."""

from __future__ import annotations

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.cluster.graph import leaves, mesh_shares
from clustersim.report.drawing import Box, Drawing, Line, Shape, Words
from clustersim.report.topo_text import fabric_line, rate

_GPU, _SWITCH, _PCIE, _SOCKET, _NIC, _LEAF, _SPINE, _NODE = (
    "#b7e4c7", "#ffd6a5", "#e2e8f0", "#fbcfe8", "#bfdbfe", "#c7d2fe", "#ddd6fe", "#fafafa",
)  # fmt: skip
_CELL, _GAP, _MARGIN = 62.0, 10.0, 24.0
_MOST_LEAVES = 8


def picture(cluster: Cluster, title: str) -> Drawing:
    """The cluster as a drawing. One box stands for all nodes of a kind; leaves beyond eight are counted, not drawn."""
    machines = cluster.machines
    widths = [_node_width(machine) for machine in machines]
    width = max(560.0, sum(widths) + _GAP * 2 * (len(machines) - 1) + 2 * _MARGIN)
    several = sum(machine.count for machine in machines) > 1 and machines[0].nic.kind != "loopback"
    top = 190.0 if several else 70.0
    shapes: list[Shape] = [Words(x=_MARGIN, y=30, text=title, size=17, bold=True)]
    if several:
        shapes.append(Words(x=_MARGIN, y=50, text=fabric_line(cluster), size=11, colour="#4a5568"))
    x = (width - sum(widths) - _GAP * 2 * (len(machines) - 1)) / 2.0
    plugs: list[float] = []
    for machine, wide in zip(machines, widths, strict=True):
        shapes += _node(machine, x, top, wide)
        plugs += [x + wide / 2.0]
        x += wide + 2 * _GAP
    if several:
        shapes += _fabric(cluster, width, top, plugs)
    return Drawing(width=width, height=top + 330.0, title=title, shapes=tuple(shapes))


def _node_width(machine: Machine) -> float:
    across = max(machine.node.devices, min(machine.node.nic.count, 8), 3)
    return across * (_CELL + _GAP) + _GAP


def _fabric(cluster: Cluster, width: float, top: float, plugs: list[float]) -> list[Shape]:
    found = leaves(cluster)
    drawn = min(found.count, _MOST_LEAVES)
    step = min(110.0, (width - 2 * _MARGIN) / drawn)
    left = (width - drawn * step) / 2.0
    shapes: list[Shape] = []
    if found.count > 1:
        spine = Box(x=width / 2 - 90, y=66, width=180, height=26, fill=_SPINE, text="spine")
        for index in range(drawn):
            middle = left + (index + 0.5) * step
            shapes.append(Line(x1=middle, y1=118, x2=width / 2, y2=92))
        shapes.append(spine)
    for index in range(drawn):
        last = index == drawn - 1 and found.count > drawn
        name = f"… {found.count} leaves" if last else ("switch" if found.count == 1 else f"leaf {index}")
        middle = left + (index + 0.5) * step
        for plug in plugs:
            shapes.append(Line(x1=middle, y1=144, x2=plug, y2=top, colour="#a0aec0", width=0.8))
        shapes.append(Box(x=left + index * step + 4, y=118, width=step - 8, height=26, fill=_LEAF, text=name, size=11))
    return shapes


def _node(machine: Machine, x: float, y: float, wide: float) -> list[Shape]:
    node = machine.node
    shapes: list[Shape] = [Box(x=x, y=y, width=wide, height=306, fill=_NODE)]
    shapes.append(Words(x=x + _GAP, y=y + 298, text=f"{machine.count} x {node.name}", size=13, bold=True))
    inner = wide - 2 * _GAP

    def row(count: int, at: float, height: float) -> list[tuple[float, float, float, float]]:
        each = inner / count
        return [(x + _GAP + index * each + 3, at, each - 6, height) for index in range(count)]

    nics = row(min(node.nic.count, 8), y + 16, 30)
    sockets = row(node.host.sockets, y + 250, 28)
    for index, (left, at, width, height) in enumerate(sockets):
        shapes.append(Box(x=left, y=at, width=width, height=height, fill=_SOCKET, text=f"socket {index}", size=11))
    if node.devices == 0:
        for index, place in enumerate(nics):
            shapes.append(_down(place, sockets[index * len(sockets) // len(nics)]))
    gpus = row(node.devices, y + 128, 38) if node.devices else []
    switches = row(-(-node.devices // node.devices_per_pcie_switch), y + 76, 26) if machine.pcie and gpus else []
    for index, place in enumerate(switches):
        # To the socket, behind everything that stands between.
        foot = sockets[index * len(sockets) // len(switches)][1]
        shapes.append(Line(x1=place[0], y1=place[1] + place[3], x2=place[0], y2=foot, colour="#a0aec0", width=0.8))
        nearest = [nic for n, nic in enumerate(nics) if _switch_of(machine, n) == index]
        shapes += [_down(nic, place) for nic in nearest]
    for index, gpu in enumerate(gpus):
        if switches:
            shapes.append(_down(switches[index // node.devices_per_pcie_switch], gpu))
    shapes += _interconnect(machine, gpus, x + _GAP, y, inner)
    for left, at, width, height in switches:
        shapes.append(Box(x=left, y=at, width=width, height=height, fill=_PCIE, text="PCIe", size=10))
    device = machine.device.kind if machine.device is not None else "gpu"
    for index, (left, at, width, height) in enumerate(gpus):
        name = f"{device.upper()} {index}"
        shapes.append(Box(x=left, y=at, width=width, height=height, fill=_GPU, text=name, size=11))
    for left, at, width, height in nics:
        speed = rate(machine.nic_rate_bytes_per_s)
        hint = f"{machine.nic.name}, {speed}"
        name = f"NIC {speed}" if width > 90 else speed
        shapes.append(Box(x=left, y=at, width=width, height=height, fill=_NIC, text=name, size=10, hint=hint))
    return shapes


def _switch_of(machine: Machine, nic: int) -> int:
    shown = min(machine.node.nic.count, 8)
    return nic * machine.node.devices // shown // machine.node.devices_per_pcie_switch


def _down(
    above: tuple[float, float, float, float], below: tuple[float, float, float, float], colour: str = "#4a5568"
) -> Line:
    """From the foot of one place to the head of another."""
    return Line(
        x1=above[0] + above[2] / 2, y1=above[1] + above[3], x2=below[0] + below[2] / 2, y2=below[1], colour=colour
    )


def _interconnect(
    machine: Machine, gpus: list[tuple[float, float, float, float]], x: float, y: float, inner: float
) -> list[Shape]:
    if len(gpus) < 2:
        return []
    interconnect = machine.node.interconnect
    assert interconnect is not None
    speed = rate(machine.interconnect_rate_bytes_per_s)
    middles = [left + width / 2 for left, _, width, _ in gpus]
    foot = gpus[0][1] + gpus[0][3]
    name = machine.interconnect.name if machine.interconnect is not None else ""
    match interconnect.kind:
        case "switch" | "host" | "pcie":
            words = {"switch": "NVSwitch", "host": "host memory", "pcie": "PCIe root and sockets"}[interconnect.kind]
            below: list[Shape] = [Line(x1=m, y1=foot, x2=m, y2=y + 200) for m in middles]
            text = f"{words}: {name}, {speed} a device"
            return [*below, Box(x=x, y=y + 200, width=inner, height=28, fill=_SWITCH, text=text, size=11)]
        case "mesh":
            shapes: list[Shape] = [
                Words(x=x, y=y + 244, text=f"{name}, {speed} a device over all its direct links", size=11)
            ]
            for (a, b), share in mesh_shares(len(gpus)).items():
                # A direct link hangs below the two devices, deeper the further apart they stand.
                depth = foot + 8 + 6.0 * abs(b - a) + 4.0 * (a % 4)
                wide = 1.0 + 4.0 * share
                for x1, y1, x2, y2 in (
                    (middles[a] + 3 * b, foot, middles[a] + 3 * b, depth),
                    (middles[a] + 3 * b, depth, middles[b] - 3 * (8 - a), depth),
                    (middles[b] - 3 * (8 - a), depth, middles[b] - 3 * (8 - a), foot),
                ):
                    shapes.append(Line(x1=x1, y1=y1, x2=x2, y2=y2, colour="#dd6b20", width=wide))
            return shapes
