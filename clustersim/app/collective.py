"""`collective`: prices one collective on a cluster of one kind of nodes, as nccl-tests would measure it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from clustersim.app import screen
from clustersim.app.quantities import quantity
from clustersim.errors import InputError, UsageError

if TYPE_CHECKING:
    from clustersim.cluster.cluster import Cluster, Machine
    from clustersim.cluster.fabric import Fabric
    from clustersim.hardware.link import Link, LinkKind
    from clustersim.program.program import CollectiveAlgorithm, CollectiveKind
    from clustersim.report.collective_screen import CollectiveRow

# A range of sizes has no more rows than this.
_MOST_SIZES = 64


def add_to(app: typer.Typer) -> None:
    """Add this file's command to `app`."""
    app.command("collective")(collective_command)


class Kind(StrEnum):
    """Collectives by their usual names."""

    all_reduce = "all-reduce"
    all_gather = "all-gather"
    reduce_scatter = "reduce-scatter"
    all_to_all = "all-to-all"
    broadcast = "broadcast"
    reduce = "reduce"
    send_recv = "send-recv"


class AlgorithmName(StrEnum):
    """Algorithms of any collective, and the choice among them."""

    auto = "auto"
    ring = "ring"
    tree = "tree"
    binary_tree = "binary-tree"
    halving_doubling = "halving-doubling"
    hierarchical = "hierarchical"
    nvls = "nvls"
    sharp = "sharp"
    pairwise = "pairwise"
    per_rail = "per-rail"
    chain = "chain"
    binomial = "binomial"
    scatter_allgather = "scatter-allgather"
    direct = "direct"


def collective_command(
    kind: Annotated[Kind, typer.Argument(help="The collective.", show_default=False)],
    size: Annotated[
        list[str],
        typer.Option("--size", help="Buffer, e.g. 1GiB, as nccl-tests count; 1MiB..1GiB doubles. May be repeated."),
    ] = ["1GiB"],  # noqa: B006
    node: Annotated[str | None, typer.Option("--node", help="A node profile, e.g. hgx-h100.")] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, max=2**15, help="How many; default: what --ranks needs, or 1.")
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option("--gpus-per-node", min=1, max=1024, help="Ranks on a node; default: all its devices, or 8."),
    ] = None,
    ranks: Annotated[int | None, typer.Option("--ranks", min=1, max=2**18, help="Use the first only.")] = None,
    fabric: Annotated[
        str | None, typer.Option("--fabric", help="A fabric profile, e.g. rail-optimized; default: one switch.")
    ] = None,
    algorithm: Annotated[AlgorithmName, typer.Option("--algorithm", help="What runs it.")] = AlgorithmName.auto,
    channels: Annotated[
        int | None, typer.Option("--channels", min=1, help="Rings or trees side by side; default: one per NIC or GPU.")
    ] = None,
    intra: Annotated[
        str | None,
        typer.Option("--intra", help="Rate and latency inside a node, per GPU and direction: 300GB/s,500ns."),
    ] = None,
    inter: Annotated[
        str | None,
        typer.Option("--inter", help="Rate and latency between nodes, per GPU and direction: 25GB/s,5us."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Price one collective: time, bandwidths, bottleneck, and the closed form that it should equal.

    Links are those of the profile --node, or --intra and --inter: a latency for every hop, and bytes / rate.

    auto: what NCCL's tuner picks, with its time, or the measured one; without NCCL, what simulates fastest.

    [bold]clustersim collective all-reduce --size 1MiB..1GiB --node hgx-h100 --nodes 128 --algorithm ring[/bold]
    """
    from clustersim.report.collective_screen import CollectiveTableHead, collective_document, collective_screen
    from clustersim.simulate.collectives.phases import ALGORITHMS_OF, CHANNELLED

    if channels is not None and algorithm.value not in CHANNELLED:
        with_channels = [known for known in ALGORITHMS_OF[cast("CollectiveKind", kind.name)] if known in CHANNELLED]
        mend = f"write --algorithm {with_channels[0]}, or leave it out" if with_channels else "leave it out"
        raise UsageError(f"--channels {channels}: {algorithm.value} has no channels to divide bytes over; {mend}")
    sizes = [parsed for text in size for parsed in _sizes(text)]
    machine = _machine(node, gpus_per_node, intra, inter, algorithm)
    per_node = gpus_per_node or machine.node.devices
    if per_node > machine.node.devices:
        raise UsageError(f"--gpus-per-node {per_node}: {machine.node.name} has {machine.node.devices} devices")
    count = nodes or -(-(ranks or 1) // per_node)
    used = ranks or count * per_node
    if used > count * per_node:
        raise UsageError(
            f"--ranks {used}: {count} nodes of {per_node} hold {count * per_node}; write --nodes {-(-used // per_node)}"
        )
    from clustersim.cluster.cluster import Cluster

    cluster = Cluster(
        workers=(replace(machine, count=count),), servers=(),
        fabric=_fabric(fabric, by_hand=inter is not None, sharp=algorithm is AlgorithmName.sharp),
    )  # fmt: skip
    name = cast("CollectiveKind", kind.name)
    asked = _Asked(
        cluster=cluster, kind=name, algorithm=algorithm, per_node=per_node, used=used, channels=channels,
        nccl=intra is None and inter is None,
    )  # fmt: skip
    rows = _rows(asked, sizes)
    words = ", ".join(filter(None, (node, _by_hand(intra, inter), fabric)))
    head = CollectiveTableHead(
        collective=kind.value, cluster=words, ranks=used, nodes=rows[0].priced.nodes,
        channels=rows[0].priced.channels if algorithm.value in CHANNELLED else None,
    )  # fmt: skip
    if as_json:
        screen.show_json(collective_document(head, rows))
        return
    screen.show(collective_screen(head, rows))


# ------------------------------------------------------------------------------------------------ prices


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One collective among the first `used` ranks of nodes with `per_node` ranks each. `nccl`: `auto` is NCCL's choice,
    not what simulates fastest."""

    cluster: Cluster
    kind: CollectiveKind
    algorithm: AlgorithmName
    per_node: int
    used: int
    channels: int | None
    nccl: bool

    @property
    def nodes(self) -> int:
        """Nodes that take part."""
        return -(-self.used // self.per_node)

    @property
    def local(self) -> int:
        """Ranks on each of them, where they have as many."""
        return self.used if self.nodes == 1 else self.per_node


def _rows(asked: _Asked, sizes: list[float]) -> list[CollectiveRow]:
    import numpy as np

    from clustersim.estimate.collectives import bus_factor, closed_form_s, two_levels
    from clustersim.report.collective_screen import CollectiveRow
    from clustersim.simulate.collectives.phases import ALGORITHMS_OF
    from clustersim.simulate.collectives.standalone import StandaloneCollective, obstacle

    cluster, kind = asked.cluster, asked.kind
    places = np.arange(asked.nodes)[:, None] * cluster.devices_per_node + np.arange(asked.per_node)
    ranks = places.ravel()[: asked.used]
    even = asked.used == asked.nodes * asked.local
    levels = two_levels(cluster, asked.nodes, asked.local, asked.channels) if even else None
    names: tuple[CollectiveAlgorithm, ...] = ALGORITHMS_OF[kind]
    if asked.algorithm is AlgorithmName.auto:
        names = tuple(name for name in names if obstacle(cluster, kind, name, ranks) is None)
    else:
        names = (cast("CollectiveAlgorithm", asked.algorithm.value),)
    ready: dict[str, StandaloneCollective] = {}
    found = []
    for size in sizes:
        choice = _nccl_choice(asked, size) if asked.algorithm is AlgorithmName.auto and even else None
        tried = names if choice is None else (choice[0],)
        for name in tried:
            if name not in ready:
                ready[name] = StandaloneCollective(cluster, kind, name, ranks=ranks, channels=asked.channels)
        priced = min((ready[name].price(size) for name in tried), key=lambda one: one.seconds)
        measured = _measured_s(asked, size) if even else None
        seconds, source, words = priced.seconds, "simulated", str(priced.algorithm)
        if choice is not None:
            _, words, predicted = choice
            seconds, source = (predicted, "tuner") if measured is None else (measured, "measured")
        found.append(
            CollectiveRow(
                priced=priced,
                seconds=seconds,
                source=source,
                algorithm=words,
                bus_factor=bus_factor(kind, asked.used),
                closed_form_s=closed_form_s(kind, priced.algorithm, levels, size) if levels is not None else None,
                measured_s=measured,
            )
        )
    return found


def _nccl_choice(asked: _Asked, size: float) -> tuple[CollectiveAlgorithm, str, float] | None:
    """What NCCL would run: its counterpart among the simulated ones, its name and protocol, and the tuner's seconds."""
    from clustersim.cluster.tuning import layout_algorithm, nccl_choice

    if not asked.nccl or asked.kind in ("all_to_all", "send_recv"):
        return None
    machine = asked.cluster.workers[0]
    found = nccl_choice(cast("Any", asked.kind), size, asked.used, asked.local, machine, asked.cluster)
    if found is None:
        return None
    name: CollectiveAlgorithm = layout_algorithm(found.algorithm)
    if asked.kind in ("broadcast", "reduce"):
        # NCCL calls its chain a ring.
        name = "chain"
    return name, f"{found.algorithm}/{found.protocol}", found.seconds


def _measured_s(asked: _Asked, size: float) -> float | None:
    """What such nodes were measured to take, where their profile says so."""
    table = asked.cluster.workers[0].collectives
    whole = asked.nodes == 1 or asked.local == asked.cluster.devices_per_node
    if table is None or not whole or asked.used == 1 or asked.kind == "send_recv":
        return None
    return table.seconds(asked.kind, asked.used, size, asked.nodes)


# ------------------------------------------------------------------------------------------------ input


def _by_hand(intra: str | None, inter: str | None) -> str:
    given = [f"{name} {text}" for name, text in (("intra", intra), ("inter", inter)) if text is not None]
    return ", ".join(given)


def _sizes(text: str) -> Iterator[float]:
    """`1GiB`, or `1MiB..1GiB`: from the first to the last by doubling."""
    first, dots, last = text.partition("..")
    low = quantity("--size", first, "Bytes")
    high = quantity("--size", last, "Bytes") if dots else low
    if not 0.0 < low <= high:
        raise UsageError(f"--size {text}: write a size of more than 0B, or a range that grows, e.g. 1MiB..1GiB")
    if high / low > 2.0**_MOST_SIZES:
        raise UsageError(f"--size {text}: that is more than {_MOST_SIZES} sizes; write a shorter range")
    while low <= high:
        yield low
        low *= 2.0


def _link(option: str, text: str, kind: LinkKind) -> Link:
    """`300GB/s,500ns`: a link of one alpha and one rate, without a launch."""
    from clustersim.hardware.link import Link, Segment
    from clustersim.hardware.provenance import Provenance

    rate, comma, latency = text.partition(",")
    if not comma:
        raise UsageError(f"{option} {text}: write a rate and a latency, e.g. 300GB/s,500ns")
    return Link(
        name="by hand",
        kind=kind,
        rate_bytes_per_s=quantity(option, rate, "BytesPerS"),
        segments=(Segment(from_bytes=0.0, alpha_s=quantity(option, latency, "Seconds"), efficiency=1.0),),
        provenance=Provenance(method="estimate", source="the command line"),
    )


def _machine(
    name: str | None, devices: int | None, intra: str | None, inter: str | None, algorithm: AlgorithmName
) -> Machine:
    """The node of a profile, its links replaced by those given by hand; or a node made of these alone."""
    from clustersim.cluster.load import load_machine
    from clustersim.cluster.node import Interconnect, Nics

    if name is None and (intra is None or inter is None):
        raise UsageError("write --node and a profile, e.g. --node hgx-h100, or both --intra and --inter")
    machine = load_machine(name) if name is not None else _bare(devices or 8)
    if not machine.node.devices:
        raise InputError(
            f"{machine.node.name} has no devices to run a collective on; write a node that has, e.g. hgx-h100"
        )
    node = machine.node
    if intra is not None and node.devices > 1:
        # Who prices a switch that adds up by its rate alone says with the algorithm that it can.
        kept = node.interconnect is not None and node.interconnect.reduces
        adds = kept or (name is None and algorithm is AlgorithmName.nvls)
        link = _link("--intra", intra, "nvlink")
        node = replace(node, interconnect=Interconnect(kind="switch", link=link.name, reduces=adds))
        machine = replace(machine, interconnect=link, collectives=None)
    if inter is not None:
        link = _link("--inter", inter, "ethernet")
        node = replace(node, nic=Nics(count=node.devices, link=link.name), pcie=None)
        machine = replace(machine, nic=link, pcie=None, collectives=None)
    return replace(machine, node=node)


def _bare(devices: int) -> Machine:
    """A node of which nothing is known yet but the number of its devices."""
    from clustersim.cluster.cluster import Machine
    from clustersim.cluster.node import Host, Interconnect, Nics, Node
    from clustersim.hardware.provenance import Provenance

    anything: dict[str, Any] = {
        "memory_bytes": 1.0,
        "memory_bandwidth_bytes_per_s": 1.0,
        "reduce_rate_bytes_per_s": 1.0,
    }
    link = _link("--intra", "1B/s,0s", "nvlink")
    node = Node(
        name="nodes by hand",
        device="by hand",
        devices=devices,
        interconnect=Interconnect(kind="switch", link="by hand") if devices > 1 else None,
        nic=Nics(count=devices, link="by hand"),
        host=Host(cores=1, **anything),
        provenance=Provenance(method="estimate", source="the command line"),
    )
    return Machine(
        node=node, count=1, device=None, interconnect=link if devices > 1 else None, nic=link, pcie=None,
        collectives=None,
    )  # fmt: skip


def _fabric(name: str | None, *, by_hand: bool, sharp: bool) -> Fabric:
    from clustersim.cluster.fabric import Fabric
    from clustersim.cluster.load import load_fabric

    if name is not None:
        return load_fabric(name)
    if by_hand:
        # The latency given is that of the whole way.
        return Fabric(kind="one-switch", hop_latency_s=0.0, in_network_reduction=sharp)
    return load_fabric("one-switch")
