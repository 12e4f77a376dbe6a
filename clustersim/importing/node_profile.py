"""A node profile from a topology file: what it states, and what the user says where it does not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from clustersim.cluster.graph import mesh_shares
from clustersim.cluster.node import Interconnect, Nics, Node
from clustersim.errors import ProfileError
from clustersim.hardware.link import Link
from clustersim.hardware.provenance import Provenance
from clustersim.importing.topology import Topology

InterconnectKind = Literal["switch", "mesh", "pcie"]

# NVLinks of one device whose sum a shipped link profile's rate is (NVIDIA Volta, Ampere, Hopper and Blackwell
# architecture whitepapers).
_LINKS_OF = {"nvlink2": 6, "nvlink3": 12, "nvlink4": 18, "nvlink5": 18}


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the user says about a machine, besides its file. `like`: a node profile to take the rest from."""

    device: str | None = None
    interconnect: InterconnectKind | None = None
    link: Link | None = None
    rate_bytes_per_s: float | None = None
    nic_link: str | None = None
    nics: int | None = None
    pcie: str | None = None
    gpus_per_switch: int | None = None
    host: Node | None = None
    like: Node | None = None


def node_profile(topology: Topology, said: Said, name: str, provenance: Provenance) -> Node:
    """The profile of the machine that `topology` describes. What the file states goes first, then what the user says,
    then `said.like`; provenance names what did not come from the file. ProfileError, one line, that lists everything
    that is still missing, or says what a profile cannot express.
    """
    file, like = topology.file, said.like
    gpus = len(topology.gpus)
    missing = missing_options(topology, said)
    if missing:
        raise ProfileError(
            f"{file}: does not state all that a profile holds; give {', '.join(missing)}, or --like NODE"
        )
    device = _device(topology, said)
    # A node of one device needs no interconnect.
    interconnect = _interconnect(topology, said) if gpus > 1 else None
    nics = _nic_count(topology, said)
    nic_link = said.nic_link or (like.nic.link if like is not None else None)
    host = said.host or like
    pcie = said.pcie or (like.pcie if like is not None else None)
    per_switch = topology.gpus_per_switch() or said.gpus_per_switch
    per_switch = per_switch or (like.devices_per_pcie_switch if like is not None else None)
    assert nics is not None
    assert nic_link is not None
    assert host is not None
    rates = {nic.rate_bytes_per_s for nic in topology.nics if nic.name in used_nics(topology)}
    try:
        return Node(
            name=name,
            device=device,
            devices=gpus,
            interconnect=interconnect,
            pcie=pcie,
            devices_per_pcie_switch=min(per_switch or 1, gpus),
            nic=Nics(count=nics, link=nic_link, rate_bytes_per_s=rates.pop() if len(rates) == 1 else None),
            host=host.host,
            power_overhead_w=like.power_overhead_w if like is not None else host.power_overhead_w,
            provenance=replace(provenance, notes=_notes(topology, said, provenance.notes)),
        )
    except ValueError as error:
        raise ProfileError(f"{file}: {error}; a profile needs regular machines: give --nics COUNT") from None


def missing_options(topology: Topology, said: Said) -> tuple[str, ...]:
    """The options that a profile of this machine still needs, in words. ProfileError, one line, where none helps."""
    like = said.like
    if not topology.gpus:
        mend = "; --gpu and --nic say which PCI devices are what" if topology.unknown else ""
        raise ProfileError(f"{topology.file}: states no GPU{mend}")
    per_switch = topology.gpus_per_switch() or said.gpus_per_switch or like
    interconnect = _interconnect(topology, said) if len(topology.gpus) > 1 else ""
    return tuple(
        flag
        for value, flag in (
            (_device(topology, said), "--device NAME"),
            (interconnect, _interconnect_flags(topology)),
            (_nic_count(topology, said), "--nics COUNT"),
            (said.nic_link or like, "--nic-link NAME"),
            (said.host or like, "--host NODE (whose CPUs and memory it has)"),
            (per_switch if said.pcie is not None else "", "--gpus-per-switch COUNT"),
        )
        if value is None
    )


def _interconnect_flags(topology: Topology) -> str:
    known = topology.interconnect in ("switch", "direct", "one pair")
    return "--link NAME" if known else "--interconnect KIND and --link NAME"


def used_nics(topology: Topology) -> tuple[str, ...]:
    """The NICs that are nearest to some GPU; those that are nearest to none serve storage or the host."""
    nearest = [topology.nearest_nics(gpu.name) for gpu in topology.gpus]
    if any(found is None for found in nearest):
        return ()
    stated = [found for found in nearest if found is not None]
    # A GPU that is far from all NICs uses those of the others.
    near = [names for path, names in stated if path != "SYS"] or [names for _, names in stated]
    names = {name for group in near for name in group}
    return tuple(nic.name for nic in topology.nics if nic.name in names)


def spread_evenly(topology: Topology) -> bool:
    """Whether every used NIC is nearest to as many GPUs as any other, and every GPU has as many."""
    used = set(used_nics(topology))
    shares: Counter[str] = Counter()
    each = set()
    for gpu in topology.gpus:
        found = topology.nearest_nics(gpu.name)
        mine = used & set(found[1]) if found is not None else set[str]()
        each.add(len(mine))
        shares.update(mine)
    return len(each) == 1 and len(set(shares.values())) <= 1


def _nic_count(topology: Topology, said: Said) -> int | None:
    used = len(used_nics(topology))
    return said.nics or used or (said.like.nic.count if said.like is not None else None)


def _device(topology: Topology, said: Said) -> str | None:
    stated = {gpu.profile for gpu in topology.gpus}
    if len(stated) > 1:
        raise ProfileError(f"{topology.file}: has GPUs of several products; a profile holds one, so split the machine")
    product = stated.pop()
    if product is not None and said.device not in (None, product):
        raise ProfileError(
            f"{topology.file}: its GPUs are {product} by their PCI ids, not {said.device}; leave --device out"
        )
    return product or said.device or (said.like.device if said.like is not None else None)


def _interconnect(topology: Topology, said: Said) -> Interconnect | None:
    """The interconnect that the NVLinks make up; None where file and user leave it open."""
    file, found = topology.file, topology.interconnect
    like = said.like.interconnect if said.like is not None else None
    kind = said.interconnect
    link = said.link.name if said.link is not None else None
    if found == "some" and kind != "pcie":
        raise ProfileError(
            f"{file}: NVLinks join only some of the GPUs, and a profile has one interconnect for all; "
            "give --interconnect pcie and --link to leave the NVLinks out"
        )
    if kind == "pcie" or (kind is None and said.link is not None and said.link.kind == "pcie"):
        if found in ("switch", "direct", "one pair") and kind is None:
            raise ProfileError(
                f"{file}: its GPUs have NVLinks; give an NVLink --link, or --interconnect pcie to leave them out"
            )
        return Interconnect(kind="pcie", link=link, rate_bytes_per_s=said.rate_bytes_per_s) if link else None
    if found == "switch" and kind == "mesh":
        raise ProfileError(f"{file}: its NVLinks lead to switches; give --interconnect switch")
    if kind is None:
        kind = "switch" if found == "switch" else "mesh" if found in ("direct", "one pair") else None
    if kind is None and link is None and like is not None:
        return like
    if kind is None:
        return None
    if link is None and like is not None and like.kind in ("switch", "mesh"):
        link = like.link
    if link is None:
        return None
    if kind == "mesh" and found == "direct":
        _check_mesh(topology)
    return Interconnect(kind=kind, link=link, rate_bytes_per_s=_rate(topology, said, link))


def _rate(topology: Topology, said: Said, link: str) -> float | None:
    """The rate of one device where it has not all the links that the profile's rate is the sum of."""
    if said.rate_bytes_per_s is not None:
        return said.rate_bytes_per_s
    if topology.interconnect in ("none", "not stated"):
        return None
    lanes = {topology.nvlinks_of(gpu.name) for gpu in topology.gpus}
    if len(lanes) != 1:
        raise ProfileError(f"{topology.file}: its GPUs have different numbers of NVLinks; give --rate, that of one GPU")
    stated = lanes.pop()
    if stated is None or stated == _LINKS_OF.get(link):
        return None
    whole = f"is of {_LINKS_OF[link]}" if link in _LINKS_OF else "does not say of how many"
    raise ProfileError(
        f"{topology.file}: a GPU has {stated} NVLinks, and the rate of {link} {whole}; give --rate, one direction of "
        "all links of a GPU, e.g. --rate 56.25GB/s"
    )


def _check_mesh(topology: Topology) -> None:
    """Refuse direct links that are not those that the simulator knows a mesh by."""
    wanted = mesh_shares(len(topology.gpus))
    names = [gpu.name for gpu in topology.gpus]
    total = topology.nvlinks_of(names[0]) or 0
    for a in range(len(names)):
        for b in range(a + 1, len(names)):
            lanes = topology.tie(names[a], names[b]).nvlinks or 0
            if abs(wanted.get((a, b), 0.0) * total - lanes) > 1e-9:
                raise ProfileError(
                    f"{topology.file}: {names[a]} and {names[b]} have {lanes} NVLinks; a mesh profile is all-to-all "
                    "or the hybrid cube mesh of eight; give --interconnect pcie to leave the NVLinks out"
                )


def _notes(topology: Topology, said: Said, before: str) -> str:
    """What did not come from the file, in words."""
    used = used_nics(topology)
    parts = [before] if before else []
    others = [nic.name for nic in topology.nics if nic.name not in used]
    if topology.nics and used and others:
        parts.append(f"NICs nearest to no GPU are left out: {', '.join(others)}.")
    if used and not spread_evenly(topology):
        parts.append("A profile spreads its NICs evenly over its devices; the file does not.")
    if said.interconnect == "pcie" and topology.interconnect not in ("none", "not stated"):
        parts.append("NVLinks of the file are left out.")
    given = [
        f"{word} {value}"
        for word, value in (
            ("device", said.device),
            ("interconnect", said.interconnect),
            ("link", said.link.name if said.link is not None else None),
            ("NIC link", said.nic_link),
            ("NICs", said.nics),
            ("PCIe link", said.pcie),
            ("devices per switch", said.gpus_per_switch),
            ("host of", said.host.name if said.host is not None else None),
            ("the rest of", said.like.name if said.like is not None else None),
        )
        if value is not None
    ]
    if given:
        parts.append(f"Not from the file: {', '.join(given)}.")
    return " ".join(parts)
