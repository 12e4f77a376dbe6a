"""What a topology file states about one machine: its GPUs and NICs, and how near any two of them are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import networkx as nx

# From near to far, as nvidia-smi and NCCL name them: one PCIe bridge, several, the host bridge, between the host
# bridges of a NUMA node, between NUMA nodes.
Path = Literal["PIX", "PXB", "PHB", "NODE", "SYS"]
PATHS: tuple[Path, ...] = ("PIX", "PXB", "PHB", "NODE", "SYS")
_IN_SWITCH, _IN_NUMA = PATHS.index("PXB"), PATHS.index("NODE")

# The most NVLinks that a GPU has had (H100, B200: 18; NVIDIA Hopper and Blackwell architecture whitepapers).
MOST_NVLINKS = 18

# NVIDIA's PCI device ids (pci-ids.ucw.cz) of the devices that have profiles.
_PRODUCTS = {
    "0x1db1": "v100-sxm2-16g", "0x1db5": "v100-sxm2-32g", "0x20b0": "a100-sxm-40g", "0x20b2": "a100-sxm-80g",
    "0x2330": "h100-sxm", "0x2335": "h200-sxm", "0x26b9": "l40s", "0x2901": "b200",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU as its file names it; None is what the file does not state. `product` is its PCI device id."""

    name: str
    bus: str | None = None
    numa: str | None = None
    cpus: str | None = None
    product: str | None = None
    pcie_bytes_per_s: float | None = None

    @property
    def profile(self) -> str | None:
        """The device profile of a stated product, where there is one."""
        return _PRODUCTS.get(self.product.lower()) if self.product is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A network card, or one port of one; `rate` is per direction."""

    name: str
    device: str | None = None
    bus: str | None = None
    numa: str | None = None
    kind: Literal["infiniband", "ethernet"] | None = None
    rate_bytes_per_s: float | None = None
    pcie_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """How two devices reach each other. None: not stated (a matrix that shows NVLinks hides the PCIe path)."""

    path: Path | None = None
    nvlinks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Topology:
    """All that one file states. `ties` holds each pair once, in the order of the file.

    `to_switch` counts the NVLinks of each GPU into NVSwitches, where the file tells switches from GPUs; `unknown` are
    PCI devices of no stated class, by bus id, and their NUMA nodes; `notes` is what the reader left out or found odd.
    """

    file: str
    gpus: tuple[Gpu, ...]
    nics: tuple[Nic, ...]
    ties: Mapping[tuple[str, str], Tie]
    to_switch: Mapping[str, int] = field(default_factory=dict)
    unknown: Mapping[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def tie(self, a: str, b: str) -> Tie:
        """What is stated about a pair; nothing, where it is not in the file."""
        return self.ties.get((a, b)) or self.ties.get((b, a)) or Tie()

    @property
    def devices(self) -> tuple[Gpu | Nic, ...]:
        """The GPUs, then the NICs."""
        return (*self.gpus, *self.nics)

    @property
    def nvlinks_stated(self) -> bool:
        """Whether the file tells of every pair of GPUs how many NVLinks join them."""
        if self.to_switch or not self.gpus:
            return bool(self.to_switch)
        return all(self.tie(a.name, b.name).nvlinks is not None for a, b in combinations(self.gpus, 2))

    def peers(self, gpu: str) -> dict[str, int] | None:
        """The GPUs that NVLinks join to `gpu`, and how many each (through a switch: all that both have); None: not
        stated."""
        others = [other.name for other in self.gpus if other.name != gpu]
        if self.to_switch:
            mine = self.to_switch.get(gpu, 0)
            return {other: mine for other in others if mine and self.to_switch.get(other, 0)}
        known = {other: self.tie(gpu, other).nvlinks for other in others}
        if not known or any(lanes is None for lanes in known.values()):
            return None
        return {other: lanes for other, lanes in known.items() if lanes}

    @property
    def interconnect(self) -> Literal["switch", "direct", "one pair", "some", "none", "not stated"]:
        """How NVLinks join the GPUs: through switches, directly in one piece, two GPUs that either would join, only
        some of them, not at all, or not stated.

        A matrix shows for a pair behind switches all the links of a GPU; as many to each of its peers would then be
        more than a GPU has.
        """
        if self.to_switch:
            return "switch" if len(self.to_switch) == len(self.gpus) else "some"
        if not self.nvlinks_stated:
            return "not stated" if len(self.gpus) != 1 else "none"
        peers = {gpu.name: self.peers(gpu.name) or {} for gpu in self.gpus}
        if not any(peers.values()):
            return "none"
        if len(self.gpus) == 2:
            return "one pair"
        if any(sum(lanes.values()) > MOST_NVLINKS for lanes in peers.values()):
            return "switch" if all(len(lanes) == len(self.gpus) - 1 for lanes in peers.values()) else "some"
        return "direct" if len(_joined([gpu.name for gpu in self.gpus], peers)) == 1 else "some"

    def nvlinks_of(self, gpu: str) -> int | None:
        """All NVLinks of one GPU; None: not stated."""
        peers = self.peers(gpu)
        if peers is None:
            return None
        return max(peers.values(), default=0) if self.interconnect == "switch" else sum(peers.values())

    def nearest_nics(self, gpu: str) -> tuple[Path, tuple[str, ...]] | None:
        """The NICs nearest to `gpu` and the path to them; None where a NIC's path is not stated, or there are none."""
        paths = {nic.name: self.tie(gpu, nic.name).path for nic in self.nics}
        stated = [path for path in paths.values() if path is not None]
        if not stated or len(stated) < len(paths):
            return None
        best = min(stated, key=PATHS.index)
        return best, tuple(name for name, path in paths.items() if path == best)

    def switch_groups(self) -> tuple[tuple[str, ...], ...]:
        """The devices that meet at PCIe switches, as far as stated; a device on its own is a group of one."""
        return self._groups(_IN_SWITCH, [])

    def numa_groups(self) -> tuple[tuple[str, ...], ...]:
        """The devices that meet within a NUMA node: by their paths, and where no path is stated by their affinity."""
        same = [
            (a.name, b.name)
            for a, b in combinations(self.devices, 2)
            if self.tie(a.name, b.name).path is None and _same_place(a, b)
        ]
        return self._groups(_IN_NUMA, same)

    def _groups(self, farthest: int, more: list[tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
        names = [device.name for device in self.devices]
        near: dict[str, dict[str, int]] = {name: {} for name in names}
        pairs = [pair for pair, tie in self.ties.items() if tie.path and PATHS.index(tie.path) <= farthest]
        for a, b in (*pairs, *more):
            near[a][b] = near[b][a] = 1
        return _joined(names, near)

    def gpus_per_switch(self) -> int | None:
        """GPUs below each PCIe switch; None where not stated, or where switches differ."""
        groups = self.switch_groups()
        cards = {nic.name for nic in self.nics}
        sizes = set()
        for group in groups:
            members = [gpu.name for gpu in self.gpus if gpu.name in group]
            if not members:
                continue
            # Two GPUs whose path NVLinks hide may share a switch that no NIC shows.
            alone = not cards & set(group)
            others = [gpu.name for gpu in self.gpus if gpu.name not in group]
            if alone and any(self.tie(a, b).path is None for a in members for b in others):
                return None
            sizes.add(len(members))
        return sizes.pop() if len(sizes) == 1 else None


def _same_place(a: Gpu | Nic, b: Gpu | Nic) -> bool:
    if a.numa is not None and b.numa is not None:
        return a.numa == b.numa
    return isinstance(a, Gpu) and isinstance(b, Gpu) and a.cpus is not None and a.cpus == b.cpus


def _joined(names: list[str], near: Mapping[str, Mapping[str, int]]) -> tuple[tuple[str, ...], ...]:
    """The connected groups of `names`, in their order."""
    groups, seen = [], set[str]()
    for name in names:
        if name in seen:
            continue
        found, front = {name}, [name]
        while front:
            news = [other for other in near.get(front.pop(), {}) if other not in found]
            found.update(news)
            front += news
        seen |= found
        groups.append(tuple(other for other in names if other in found))
    return tuple(groups)


def graph(topology: Topology) -> nx.DiGraph:
    """The machine as a directed graph with as much as its file states. O(devices^2).

    Kinds of nodes: gpu, nic, nvswitch, pcie-switch, numa, unknown. Edges (both directions) have `kind` (nvlink, pcie,
    host), `nvlinks` where counted and `rate_bytes_per_s` per direction where stated, else None.
    """
    import networkx

    result: nx.DiGraph = networkx.DiGraph()
    devices: dict[str, Gpu | Nic] = {device.name: device for device in topology.devices}
    for name, device in devices.items():
        kind = "gpu" if isinstance(device, Gpu) else "nic"
        result.add_node(name, kind=kind, bus=device.bus, numa=device.numa)
    above = _hang(result, topology, devices)
    for number, group in enumerate(topology.numa_groups()):
        numas = {devices[name].numa for name in group} - {None}
        host = f"numa{number}"
        if not numas and not _apart(topology, group):
            continue
        result.add_node(host, kind="numa", bus=None, numa=numas.pop() if len(numas) == 1 else None)
        for name in dict.fromkeys(above.get(name, name) for name in group):
            _join(result, name, host, kind="pcie", rate_bytes_per_s=_pcie(devices.get(name)), nvlinks=None)
    _add_unknown(result, topology)
    hosts = [name for name, kind in result.nodes(data="kind") if kind == "numa"]
    for a, b in combinations(hosts, 2):
        _join(result, a, b, kind="host", rate_bytes_per_s=None, nvlinks=None)
    _add_nvlinks(result, topology)
    return result


def _add_unknown(result: nx.DiGraph, topology: Topology) -> None:
    """PCI devices of which the file does not say what they are, below their NUMA nodes."""
    for bus, numa in topology.unknown.items():
        result.add_node(bus, kind="unknown", bus=bus, numa=numa)
        if numa is None:
            continue
        known = [name for name, keys in result.nodes(data=True) if keys["kind"] == "numa" and keys["numa"] == numa]
        host = known[0] if known else f"numa{sum(kind == 'numa' for _, kind in result.nodes(data='kind'))}"
        result.add_node(host, kind="numa", bus=None, numa=numa)
        _join(result, bus, host, kind="pcie", rate_bytes_per_s=None, nvlinks=None)


def _apart(topology: Topology, group: tuple[str, ...]) -> bool:
    """Whether a group is known to have a host bridge of its own: the paths to all other devices are stated, or it is
    several that meet there."""
    names = [device.name for device in topology.devices]
    outside = [name for name in names if name not in group]
    return len(group) > 1 or all(topology.tie(group[0], other).path is not None for other in outside)


def _hang(result: nx.DiGraph, topology: Topology, devices: Mapping[str, Gpu | Nic]) -> dict[str, str]:
    """Add the PCIe switches that several devices share; the switch above each device that has one."""
    above = {}
    shared = [group for group in topology.switch_groups() if len(group) > 1]
    for number, group in enumerate(shared):
        switch = f"pcie{number}"
        result.add_node(switch, kind="pcie-switch", bus=None, numa=None)
        for name in group:
            above[name] = switch
            _join(result, name, switch, kind="pcie", rate_bytes_per_s=_pcie(devices[name]), nvlinks=None)
    return above


def _pcie(device: Gpu | Nic | None) -> float | None:
    return device.pcie_bytes_per_s if device is not None else None


def _add_nvlinks(result: nx.DiGraph, topology: Topology) -> None:
    if topology.interconnect == "switch":
        result.add_node("nvswitch", kind="nvswitch", bus=None, numa=None)
        for gpu in topology.gpus:
            lanes = topology.to_switch.get(gpu.name) or topology.nvlinks_of(gpu.name)
            _join(result, gpu.name, "nvswitch", kind="nvlink", rate_bytes_per_s=None, nvlinks=lanes)
        return
    for (a, b), tie in topology.ties.items():
        if tie.nvlinks:
            _join(result, a, b, kind="nvlink", rate_bytes_per_s=None, nvlinks=tie.nvlinks)


def _join(result: nx.DiGraph, a: str, b: str, **attributes: Any) -> None:
    """One link, both directions."""
    result.add_edge(a, b, **attributes)
    result.add_edge(b, a, **attributes)
