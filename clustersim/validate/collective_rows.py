"""Rows of measured collectives, predicted by what the product answers for each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.estimate.collectives import bus_factor
from clustersim.hardware.curve import CollectiveKind as TableKind
from clustersim.program.program import CollectiveAlgorithm, CollectiveKind
from clustersim.units import human_bytes
from clustersim.validate.case import Unmapped
from clustersim.validate.collective_answer import Asked, answer, cluster_of, spreads
from clustersim.validate.point import Point, Points, named_in, source_of
from clustersim.validate.rows import Missing, Row, first_match
from clustersim.validate.training_rows import cards_of
from clustersim.validate.words import NODES

KINDS: dict[str, CollectiveKind] = {
    r"^all_?reduce$": "all_reduce",
    r"^all_?gather$": "all_gather",
    r"^reduce_?scatter$": "reduce_scatter",
    r"^all_?to_?all$": "all_to_all",
    r"^broadcast$": "broadcast",
    r"^reduce$": "reduce",
    r"^send_?recv$": "send_recv",
}
# Machines by name: their profile has their network too.
_SYSTEMS = {r"\bp4de\b": "p4de", r"\bp4d\b": "p4d", r"\bp5\b": "p5", r"a3-?mega": "a3-mega"}
# GPUs as sources of collectives name them, in a cell of the GPU or of the system; "" has no profile.
_GPUS = {
    r"pairwise|bridge|NV4 |PCIe": "",
    r"A100": "a100-sxm-80g",
    r"H200": "h200-sxm",
    r"H100": "h100-sxm",
    r"\bB200": "b200",
    r"L40S": "l40s",
    r"V100-SXM": "v100-sxm2-32g",
}
_TIMES = (("latency_us", 1e-6), ("time_us_oop", 1e-6), ("time_us_ip", 1e-6), ("time_us", 1e-6), ("median_us", 1e-6))
_RATES = ("algbw_GBps_oop", "algbw_GBps")
_RANKS = ("ranks", "num_gpus", "num_workers")
# Tables hold four digits; two systems have as much in common at one size in a hundred.
_SAME, _FEWEST_SAME = 5e-4, 3
COLUMNS = frozenset({
    "id", "system", "gpu", "device", "node", "nodes", "devices_per_node", "ranks", "num_gpus", "num_workers",
    "inter_node", "intra_node", "collective", "algorithm", "env", "size_bytes", "source", "repo", "busbw_GBps",
    *_RATES, *(name for name, _ in _TIMES),
})  # fmt: skip


def is_collectives(columns: Sequence[str]) -> bool:
    """Whether a file with these columns holds timed collectives."""
    return (
        {"collective", "size_bytes"} <= set(columns)
        and any(name in columns for name in _RANKS)
        and any(name in columns for name, _ in _TIMES)
    )


def collective_points(name: str, rows: Sequence[Row]) -> Points:
    """Every row predicted; rows of one group of ranks at once, each size once. O(rows + sizes)."""
    groups: dict[tuple[object, ...], list[tuple[Row, float, float]]] = defaultdict(list)
    unmapped = []
    for row in rows:
        try:
            size, seconds = _figure(row)
            groups[_question(row)].append((row, size, seconds))
        except (Missing, ClustersimError) as reason:
            unmapped.append(Unmapped(id=_name(row), line=row.line, reason=str(reason)))
    points: list[Point] = []
    own: set[str] = set()
    for (node, nic, cards, nodes, ranks, kind, algorithm, system), members in groups.items():
        try:
            asked = Asked(
                cluster=cluster_of(cast("str", node), cast("int", nodes), nic=cast("str | None", nic),
                                   cards=cast("int | None", cards)),
                kind=cast("CollectiveKind", kind), ranks=cast("int", ranks), nodes=cast("int", nodes),
                algorithm=cast("CollectiveAlgorithm | None", algorithm),
            )  # fmt: skip
            sizes, where = np.unique([size for _, size, _ in members], return_inverse=True)
            found = answer(asked, sizes)
            widths = spreads(asked, sizes, found.basis, str(system))
        except ClustersimError as error:
            unmapped += [Unmapped(id=_name(row), line=row.line, reason=str(error)) for row, _, _ in members]
            continue
        figures = [
            (size, seconds, float(found.seconds[at])) for (_, size, seconds), at in zip(members, where, strict=True)
        ]
        if _in_table(asked, figures):
            own.add(str(system))
        for (row, size, seconds), at in zip(members, where, strict=True):
            source, basis = source_of(row), found.basis[at]
            points.append(
                Point(
                    id=_name(row), line=row.line, system=str(system), measured=seconds, spread=float(widths[at]),
                    subject=f"{asked.kind} {asked.nodes}x{asked.per_node} {human_bytes(size)}",
                    predicted=float(found.seconds[at]), basis=basis, source=source,
                    seen=named_in(source, found.sources[at]),
                )
            )  # fmt: skip
    points = [
        replace(point, seen=True) if point.system in own and "measured" in point.basis else point for point in points
    ]
    points.sort(key=lambda point: point.line)
    unmapped.sort(key=lambda row: row.line)
    return Points(name=name, points=tuple(points), unmapped=tuple(unmapped))


def _in_table(asked: Asked, rows: Sequence[tuple[float, float, float]]) -> bool:
    """Whether the node's table was made from the system of these rows of (bytes, measured, predicted seconds), whoever
    they say they are from: several of them, and many of those at its sizes, have its very times."""
    table = asked.cluster.workers[0].collectives
    curve = None if table is None else table.curves.get((cast("TableKind", asked.kind), asked.ranks, asked.nodes))
    if curve is None or asked.algorithm is not None:
        return False
    known = {round(float(size)) for size in curve[0]}
    at = [(measured, predicted) for size, measured, predicted in rows if round(size) in known]
    same = sum(abs(predicted / measured - 1.0) < _SAME for measured, predicted in at)
    return same >= _FEWEST_SAME and 3 * same >= len(at)


def _name(row: Row) -> str:
    return row.text("id") or f"{row.text('system') or 'line'}:{row.line}"


def _figure(row: Row) -> tuple[float, float]:
    """(bytes, seconds) of a row."""
    size = row.required_positive("size_bytes")
    for column, scale in _TIMES:
        found = row.positive(column)
        if found is not None:
            return size, found * scale
    # A rate that rounds to 0 is none.
    for column in _RATES:
        rate = row.number(column)
        if rate is not None and rate > 0.0:
            return size, size / (rate * 1e9)
    rate = row.number("busbw_GBps")
    if rate is not None and rate > 0.0:
        kind, ranks = _kind(row), _ranks(row)
        return size, size * bus_factor(kind, ranks) / (rate * 1e9)
    raise Missing(f"no time: needs one of {', '.join((*(column for column, _ in _TIMES), *_RATES, 'busbw_GBps'))}")


def _kind(row: Row) -> CollectiveKind:
    text = row.required("collective")
    kind = first_match(text, KINDS)
    if kind is None:
        raise Missing(f"collective = {text!r} is not modelled; known are {', '.join(sorted(set(KINDS.values())))}")
    return cast("CollectiveKind", kind)


def _ranks(row: Row) -> int:
    for column in _RANKS:
        found = row.count(column)
        if found is not None and found >= 2:
            return found
    raise Missing(f"needs two ranks at least, in a column {', '.join(_RANKS)}")


def _question(row: Row) -> tuple[object, ...]:
    """(node profile, NICs that replace its own, how many, nodes, ranks, kind, algorithm, system)."""
    kind, ranks = _kind(row), _ranks(row)
    per_node = row.count("devices_per_node")
    nodes = row.count("nodes") or (1 if per_node is None else max(1, ranks // per_node))
    if ranks % nodes:
        raise Missing(f"{ranks} ranks do not spread evenly over {nodes} nodes")
    node, nic, cards = _machine(row, nodes)
    devices = cluster_of(node, 1).devices_per_node
    if ranks // nodes > devices:
        raise Missing(f"{ranks // nodes} ranks on a node: {node} has {devices} devices")
    return node, nic, cards, nodes, ranks, kind, _algorithm(row), row.text("system") or node


def _machine(row: Row, nodes: int) -> tuple[str, str | None, int | None]:
    given = row.text("node")
    if given is not None:
        return given, None, None
    words = " ".join(filter(None, (row.text(name) for name in ("system", "gpu", "device", "intra_node", "env"))))
    if "reduction-server" in words:
        raise Missing("a reduction server in the network is not modelled")
    whole = first_match(words.replace("_", " "), _SYSTEMS)
    if whole is not None:
        return whole, None, None
    device = first_match(words, _GPUS)
    if not device:
        raise Missing(f"no node profile has these GPUs ({row.text('gpu') or row.text('system')}, wired as stated)")
    node = NODES[device]
    if nodes == 1:
        return node, None, None
    cards = cards_of(row.required("inter_node"))
    return node, cards["link"], cards["count"]


def _algorithm(row: Row) -> CollectiveAlgorithm | None:
    """What the run was forced to use, where it says so."""
    text = row.text("algorithm") or row.text("env") or ""
    found = first_match(text, {r"^ring|NVLS off|NVLS_ENABLE=0": "ring", r"^tree|NCCL_ALGO=Tree": "tree"})
    return cast("CollectiveAlgorithm | None", found)
