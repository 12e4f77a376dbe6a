"""NCCL's topology XML (NCCL_TOPO_FILE, NCCL_TOPO_DUMP_FILE) as a Topology.

The elements as NCCL reads and writes them (NCCL source, graph/xml.cc and topo.cc): `system`, `cpu` (a NUMA node), `pci`
(nested below bridges, told apart by PCI class), and in full dumps `gpu` with `nvlink`, `nic` with `net`. Files that
clouds ship list PCI devices only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Literal
from xml.parsers import expat

from clustersim.errors import InputError
from clustersim.importing.topology import Gpu, Nic, Path, Tie, Topology

# Bits on the wire per bit of payload: 8b/10b up to 5 GT/s, 128b/130b from 8 GT/s on (PCI Express base specification).
_CODED = ((5.0, 0.8), (float("inf"), 128.0 / 130.0))
_NVSWITCH, _HOST_NVLINK = "0x068000", "0x068001"
_DEEPEST = 64


@dataclass(slots=True)
class _Element:
    """One element, and where it stands."""

    tag: str
    line: int
    keys: dict[str, str]
    parent: _Element | None
    children: list[_Element] = field(default_factory=list)

    def below(self) -> Iterator[_Element]:
        """All elements below this one, in the order of the file."""
        for child in self.children:
            yield child
            yield from child.below()

    def above(self) -> Iterator[_Element]:
        """The elements around this one, nearest first."""
        if self.parent is not None:
            yield self.parent
            yield from self.parent.above()


def read_xml(text: str, name: str, gpus: tuple[str, ...] = (), nics: tuple[str, ...] = ()) -> Topology:
    """The machine that an NCCL topology file describes. `gpus` and `nics` are patterns of the bus ids of devices whose
    class the file leaves out. O(devices^2). InputError, one line, for other XML, or a pattern that fits nothing."""
    root = _parse(text, name)
    if root.tag != "system":
        raise InputError(f"{name}:{root.line}: <{root.tag}> is not NCCL's <system>; dump one with NCCL_TOPO_DUMP_FILE")
    kinds = {id(element): _kind(element, gpus, nics) for element in root.below() if element.tag == "pci"}
    for what, patterns in (("--gpu", gpus), ("--nic", nics)):
        for pattern in patterns:
            if not any(fnmatchcase(e.keys.get("busid", ""), pattern) for e in root.below() if e.tag == "pci"):
                raise InputError(f"{name}: no PCI device has a bus id like {pattern!r}; mend {what}")
    found_gpus = [e for e in root.below() if e.tag == "pci" and kinds[id(e)] == "gpu"]
    full = any(element.tag == "gpu" for element in root.below())
    gpu_at = {f"GPU{number}": element for number, element in enumerate(found_gpus)}
    nic_at, cards = _nics(root, kinds, name)
    notes = [] if full else ["lists PCI devices only: NVLinks are not stated"]
    unknown = {
        e.keys.get("busid", f"line {e.line}"): _numa(e)
        for e in root.below()
        if e.tag == "pci" and kinds[id(e)] == "unknown"
    }
    hosts = {e.keys["host_hash"] for e in root.children if "host_hash" in e.keys}
    if len(hosts) > 1:
        notes.append(f"describes {len(hosts)} hosts that share NVLinks")
    ties = {
        (a, b): Tie(path=_path(at_a, at_b), nvlinks=None)
        for (a, at_a), (b, at_b) in combinations([*gpu_at.items(), *nic_at.items()], 2)
    }
    to_switch = _nvlinks(gpu_at, ties, notes, name) if full else {}
    return Topology(
        file=name,
        gpus=tuple(_gpu(gpu, element, name) for gpu, element in gpu_at.items()),
        nics=tuple(cards),
        ties=ties,
        to_switch=to_switch,
        unknown=unknown,
        notes=tuple(notes),
    )


def _parse(text: str, name: str) -> _Element:
    root: list[_Element] = []
    open_: list[_Element] = []
    parser = expat.ParserCreate()

    def start(tag: str, keys: dict[str, str]) -> None:
        parent = open_[-1] if open_ else None
        element = _Element(tag=tag, line=parser.CurrentLineNumber, keys=keys, parent=parent)
        (parent.children if parent is not None else root).append(element)
        open_.append(element)
        if len(open_) > _DEEPEST:
            raise InputError(f"{name}:{parser.CurrentLineNumber}: nested deeper than {_DEEPEST}; no NCCL topology is")

    def doctype(*_: object) -> None:
        raise InputError(f"{name}:{parser.CurrentLineNumber}: has a DOCTYPE, which no NCCL topology has; remove it")

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda tag: open_.pop()
    parser.StartDoctypeDeclHandler = doctype
    try:
        # Text in memory is Unicode, whatever its first line says about bytes.
        parser.Parse(re.sub(r"^\s*<\?xml[^>]*\?>", "", text), True)
    except expat.ExpatError as error:
        raise InputError(
            f"{name}:{error.lineno}: is not XML: {expat.errors.messages[error.code]}; save it whole"
        ) from None
    return root[0]


def _kind(
    element: _Element, gpus: tuple[str, ...], nics: tuple[str, ...]
) -> Literal["gpu", "nic", "bridge", "unknown", "other"]:
    """What a PCI device is: by what stands in it, by its class, or by what the user says."""
    inside = {child.tag for child in element.children}
    bus, code = element.keys.get("busid", ""), element.keys.get("class", "").lower()
    if "gpu" in inside or any(fnmatchcase(bus, pattern) for pattern in gpus):
        return "gpu"
    if inside & {"nic", "net"} or any(fnmatchcase(bus, pattern) for pattern in nics):
        return "nic"
    # Base classes of the PCI code and ID assignment: display controllers and accelerators, networks, bridges.
    if code.startswith(("0x03", "0x12")):
        return "gpu"
    if code.startswith("0x02"):
        return "nic"
    if code.startswith("0x06") or "pci" in inside:
        return "bridge"
    return "other" if code else "unknown"


def _place(element: _Element) -> tuple[_Element | None, list[_Element]]:
    """The NUMA node of a device, and the bridges between."""
    bridges = [e for e in element.above() if e.tag == "pci"]
    return next((e for e in element.above() if e.tag == "cpu"), None), bridges


def _numa(element: _Element) -> str | None:
    cpu, _ = _place(element)
    return cpu.keys.get("numaid") if cpu is not None else None


def _path(a: _Element, b: _Element) -> Path:
    """The path between two devices of the tree, named as NCCL names it."""
    if a is b:
        return "PIX"
    (cpu_a, above_a), (cpu_b, above_b) = _place(a), _place(b)
    shared = next((bridge for bridge in above_a if any(bridge is other for other in above_b)), None)
    if shared is not None:
        return "PIX" if above_a[0] is shared and above_b[0] is shared else "PXB"
    return "PHB" if cpu_a is cpu_b else "SYS"


def _gpu(name: str, element: _Element, file: str) -> Gpu:
    cpu, _ = _place(element)
    return Gpu(
        name=name,
        bus=element.keys.get("busid"),
        numa=_numa(element),
        cpus=_cpus(cpu, file) if cpu is not None else None,
        # A device id means something beside its vendor's only.
        product=element.keys.get("device") if element.keys.get("vendor", "").lower() == "0x10de" else None,
        pcie_bytes_per_s=_pcie(element, file),
    )


def _nics(root: _Element, kinds: Mapping[int, str], file: str) -> tuple[dict[str, _Element], list[Nic]]:
    """The ports of the network cards: each `net`, or the card where the file has none; the device each belongs to."""
    at: dict[str, _Element] = {}
    cards: list[Nic] = []
    holders = [e for e in root.below() if (e.tag == "pci" and kinds[id(e)] == "nic") or (e.tag == "nic" and _alone(e))]
    for element in holders:
        code = element.keys.get("class", "").lower()
        kind: Literal["infiniband", "ethernet"] | None = (
            "infiniband" if code.startswith("0x0207") else "ethernet" if code.startswith("0x0200") else None
        )
        nets: list[_Element | None] = [e for e in element.below() if e.tag == "net"]
        for net in nets or [None]:
            speed = _number(net, "speed", file) if net is not None else None
            name = net.keys.get("name") if net is not None else None
            if name is None or name in at:
                name = f"NIC{len(at)}"
            at[name] = element
            cards.append(
                Nic(
                    name=name,
                    bus=element.keys.get("busid"),
                    numa=_numa(element),
                    kind=kind,
                    # NCCL writes Mb/s; what a plugin does not know is 0 or less.
                    rate_bytes_per_s=speed * 1e6 / 8 if speed is not None and speed > 0 else None,
                    pcie_bytes_per_s=_pcie(element, file),
                )
            )
    return at, cards


def _alone(nic: _Element) -> bool:
    """A `nic` without a PCI device: a socket of the host."""
    return nic.parent is not None and nic.parent.tag != "pci"


def _nvlinks(
    gpu_at: dict[str, _Element], ties: dict[tuple[str, str], Tie], notes: list[str], file: str
) -> dict[str, int]:
    """Fill the NVLinks of all pairs into `ties`; the links of each GPU into switches."""
    by_bus = {element.keys.get("busid", "").lower(): name for name, element in gpu_at.items()}
    to_switch: Counter[str] = Counter()
    between: Counter[tuple[str, str]] = Counter()
    hosts = 0
    for name, element in gpu_at.items():
        for link in (e for e in element.below() if e.tag == "nvlink"):
            count = int(_number(link, "count", file) or 1)
            target, code = link.keys.get("target", "").lower(), link.keys.get("tclass", "").lower()
            if target in by_bus:
                between[name, by_bus[target]] += count
            elif code.startswith("0x03"):
                raise InputError(
                    f"{file}:{link.line}: NVLink to {link.keys.get('target')!r}, which is no GPU of the file; "
                    "add its <pci>"
                )
            elif code.startswith(_HOST_NVLINK):
                hosts += count
            else:
                # A virtual machine hides the switches: the target has no address then.
                to_switch[name] += count
    if hosts:
        notes.append(f"{hosts} NVLinks lead to the host's CPU")
    names = list(gpu_at)
    for a, b in combinations(names, 2):
        here, there = between[a, b], between[b, a]
        if here and there and here != there:
            notes.append(f"{a} counts {here} NVLinks to {b}, which counts {there}")
        ties[a, b] = Tie(path=ties[a, b].path, nvlinks=max(here, there))
    return dict(to_switch)


def _number(element: _Element, key: str, file: str) -> float | None:
    given = element.keys.get(key)
    if given is None:
        return None
    match = re.match(r"\s*-?\d+(\.\d+)?", given)
    if match is None:
        raise InputError(f'{file}:{element.line}: {key}={given!r} is not a number; write e.g. {key}="16"')
    return float(match.group())


def _pcie(element: _Element, file: str) -> float | None:
    """Bytes a second of the device's PCIe link, one direction; None where the file does not say."""
    speed, width = _number(element, "link_speed", file), _number(element, "link_width", file)
    if not speed or not width:
        return None
    coding = next(share for most, share in _CODED if speed <= most)
    return speed * 1e9 * width * coding / 8


def _cpus(cpu: _Element, file: str) -> str | None:
    """The CPUs of an affinity mask as ranges: 0-23,48-71."""
    mask = cpu.keys.get("affinity")
    if mask is None:
        return None
    try:
        bits = int("".join(word.zfill(8) for word in mask.split(",")), 16)
    except ValueError:
        raise InputError(f'{file}:{cpu.line}: affinity={mask!r} is not a CPU mask; write e.g. "00ffffff"') from None
    ranges: list[str] = []
    number = 0
    while bits >> number:
        if bits >> number & 1:
            last = number
            while bits >> (last + 1) & 1:
                last += 1
            ranges.append(f"{number}-{last}" if last > number else str(number))
            number = last
        number += 1
    return ",".join(ranges) or None
