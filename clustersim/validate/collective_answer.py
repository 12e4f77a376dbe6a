"""What the product answers for one collective on idle nodes, at many sizes at once, and how far to trust it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.cluster.load import load_fabric, load_machine
from clustersim.cluster.tuning import shape_of
from clustersim.errors import InputError
from clustersim.files import profile_path, read_csv
from clustersim.hardware.curve import CollectiveKind as TableKind
from clustersim.hardware.curve import collective_table
from clustersim.hardware.load import load_link
from clustersim.hardware.tuner import TunerKind, chosen_seconds
from clustersim.hardware.tuner_constants import load_tuner
from clustersim.program.program import CollectiveAlgorithm, CollectiveKind
from clustersim.simulate.collectives.phases import ALGORITHMS_OF
from clustersim.simulate.collectives.standalone import StandaloneCollective, obstacle

Floats = NDArray[np.float64]
# The bands of sizes by which the errors of collectives differ, as docs/accuracy.md prints them.
_BANDS = (2.0**16, 2.0**20, 2.0**24, 2.0**28)
# A quantile of fewer systems' rows than this says nothing.
_FEWEST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One kind of collective among `ranks` ranks, as many on each of `nodes` nodes; `algorithm` None: the library's
    choice."""

    cluster: Cluster
    kind: CollectiveKind
    ranks: int
    nodes: int
    algorithm: CollectiveAlgorithm | None = None

    @property
    def per_node(self) -> int:
        """Ranks on a node."""
        return self.ranks // self.nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Seconds at every size; the basis of each; and the sources of the figures behind each."""

    seconds: Floats
    basis: tuple[str, ...]
    sources: tuple[str, ...]


def answer(asked: Asked, sizes: Floats) -> Answer:
    """What `clustersim collective --algorithm auto` says: the measured time, else NCCL's tuner, else what simulates
    fastest; with an algorithm given, its simulated time. O(sizes). InputError where nothing can run there."""
    machine = asked.cluster.workers[0]
    if asked.algorithm is None:
        measured = _measured(asked, machine, sizes)
        if measured is not None:
            return measured
        if asked.kind in get_args(TunerKind):
            constants = load_tuner()
            shape = shape_of(machine, asked.ranks, asked.per_node, asked.cluster, constants)
            if shape is not None:
                seconds = chosen_seconds(cast("TunerKind", asked.kind), sizes, shape, constants)
                return Answer(
                    seconds=seconds, basis=("tuner",) * len(sizes),
                    sources=(_tuner_sources(asked, machine, shape.architecture),) * len(sizes),
                )  # fmt: skip
    places = np.arange(asked.nodes)[:, None] * asked.cluster.devices_per_node + np.arange(asked.per_node)
    ranks = places.ravel()
    names = ALGORITHMS_OF[asked.kind] if asked.algorithm is None else (asked.algorithm,)
    able = [name for name in names if obstacle(asked.cluster, asked.kind, name, ranks) is None]
    if not able:
        raise InputError(obstacle(asked.cluster, asked.kind, names[0], ranks) or "no algorithm can run there")
    ready = [StandaloneCollective(asked.cluster, asked.kind, name, ranks=ranks) for name in able]
    seconds = np.array([min(one.price(float(size)).seconds for one in ready) for size in sizes])
    return Answer(seconds=seconds, basis=("links",) * len(sizes), sources=(_link_sources(asked, machine),) * len(sizes))


def _measured(asked: Asked, machine: Machine, sizes: Floats) -> Answer | None:
    table = machine.collectives
    whole = asked.nodes == 1 or asked.per_node == machine.node.devices
    if table is None or not whole or asked.kind == "send_recv":
        return None
    kind: TableKind = asked.kind
    found = [table.seconds(kind, asked.ranks, float(size), asked.nodes) for size in sizes]
    if any(each is None for each in found):
        return None
    curve = table.curves.get((kind, asked.ranks, asked.nodes))
    basis, sources = [], []
    for size in sizes:
        inside = curve is not None and curve[0][0] <= size <= curve[0][-1]
        basis.append("measured" if inside else "beyond measured")
        sources.append(_table_sources(machine, kind, asked.ranks, asked.nodes, float(size)))
    return Answer(seconds=np.array(found, np.float64), basis=tuple(basis), sources=tuple(sources))


# ------------------------------------------------------------------------------------------------ sources


def _table_sources(machine: Machine, kind: TableKind, ranks: int, nodes: int, size: float) -> str:
    """The sources of the table files that have this group at about this size; of all with this kind, where none has."""
    near, any_size = [], []
    for source, curves in _tables(machine.node.name):
        span = curves.get((kind, ranks, nodes))
        if span is not None:
            any_size.append(source)
            if span[0] <= size <= span[1]:
                near.append(source)
    return "; ".join(near or any_size or [source for source, _ in _tables(machine.node.name)])


@functools.cache
def _tables(node: str) -> tuple[tuple[str, dict[tuple[TableKind, int, int], tuple[float, float]]], ...]:
    """For each table file of a node: its source, and the smallest and largest size of each of its groups."""
    folder = profile_path("nodes", node).resolve().parent
    machine = load_machine(node)
    return tuple(
        (
            ref.provenance.source,
            {
                key: (float(sizes[0]), float(sizes[-1]))
                for key, (sizes, _) in collective_table((ref,), folder).curves.items()
            },
        )
        for ref in machine.node.collectives
    )


def _tuner_sources(asked: Asked, machine: Machine, architecture: str) -> str:
    reach = "one" if asked.nodes == 1 else "several"
    return "; ".join(
        item.provenance.source
        for item in load_tuner().corrections
        if item.nodes == reach and item.architecture in (None, architecture)
    )


def _link_sources(asked: Asked, machine: Machine) -> str:
    link = machine.nic if asked.nodes > 1 or machine.interconnect is None else machine.interconnect
    return link.provenance.source


# ------------------------------------------------------------------------------------------------ spread


def spreads(asked: Asked, sizes: Floats, basis: Sequence[str], system: str) -> Floats:
    """Relative half-widths of the 90 % intervals: the 90th percentile of the errors of such answers on the systems that
    nothing was fitted on (tuners/heldout.csv, split held) but `system` itself, by reach, basis and band of sizes."""
    bands = np.searchsorted(np.array(_BANDS), sizes)
    several = asked.nodes > 1
    return np.array([_spread(several, _means(one), int(at), system) for one, at in zip(basis, bands, strict=True)])


_Means = Literal["table", "tuner", "links"]


def links_spread(several: bool, size_bytes: float) -> float:
    """The half-width of what is simulated on the links' curves alone."""
    return _spread(several, "links", int(np.searchsorted(np.array(_BANDS), size_bytes)), None)


def _means(basis: str) -> _Means:
    return basis if basis in ("tuner", "links") else "table"  # type: ignore[return-value]


@functools.cache
def _spread(several: bool, means: _Means, band: int, system: str | None) -> float:
    # Every machine with a measurement across nodes has its table: the tuner's errors stand in for those of a table.
    means = "tuner" if several and means == "table" else means
    rows = [row for row in _residuals() if (row.several, row.means) == (several, means)]
    if system is not None:
        rows = [row for row in rows if not row.system.endswith(system)]
    near = [row.size for row in rows if row.band == band]
    return float(np.expm1(np.quantile(near if len(near) >= _FEWEST else [row.size for row in rows], 0.9)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Residual:
    """|log(predicted / measured)| of one held-out row: by a node's table, by the tuner, or by a ring on the links."""

    system: str
    several: bool
    means: _Means
    band: int
    size: float


@functools.cache
def _residuals() -> tuple[_Residual, ...]:
    columns = read_csv(profile_path("tuners", "nccl").resolve().parent / "heldout.csv")
    names = ("split", "system", "node", "nic", "ranks", "nodes", "collective", "source", "bytes", "time_us")
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for split, *key, size, time in zip(*(columns[name] for name in names), strict=True):
        if split == "held":
            groups.setdefault(tuple(key), []).append((float(size), float(time) * 1e-6))
    found = []
    for (system, node, nic, ranks, nodes, kind, source), rows in groups.items():
        sizes, measured = np.array(rows).T
        whole = cluster_of(node, int(nodes), nic=nic or None)
        bare = replace(whole, workers=(replace(whole.workers[0], collectives=None),))
        bands = np.searchsorted(np.array(_BANDS), sizes)
        for means in get_args(_Means):
            asked = Asked(
                cluster=whole if means == "table" else bare, kind=cast("Any", kind), ranks=int(ranks), nodes=int(nodes),
                algorithm="ring" if means == "links" else None,
            )  # fmt: skip
            one = answer(asked, sizes)
            errors = np.abs(np.log(one.seconds / measured))
            for band, error, basis, behind in zip(bands, errors, one.basis, one.sources, strict=True):
                if _means(basis) == means and source.split(" (")[0] not in behind:
                    found.append(
                        _Residual(
                            system=system, several=int(nodes) > 1, means=means, band=int(band), size=float(error)
                        )
                    )  # fmt: skip
    return tuple(found)


@functools.cache
def cluster_of(node: str, nodes: int, *, nic: str | None = None, cards: int | None = None) -> Cluster:
    """`nodes` nodes of a profile below one switch; `nic` puts `cards` cards of another link into them."""
    machine = load_machine(node, nodes)
    if nic is not None:
        nics = replace(machine.node.nic, link=nic, count=cards or machine.node.nic.count)
        # What was measured across nodes was measured over the profile's own cards.
        tables = machine.collectives if nodes == 1 else None
        machine = replace(machine, node=replace(machine.node, nic=nics), nic=load_link(nic), collectives=tables)
    return Cluster(workers=(machine,), servers=(), fabric=load_fabric("one-switch"))
