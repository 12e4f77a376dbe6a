"""Rows that time one synchronisation of a buffer: allreduce, a central or a sharded parameter server, or a primitive.

The schemes are made of the collectives that the source names: a central server is a reduce to one rank and a broadcast
from it, a sharded one an all-to-all, an addition on every rank and an all-gather. All are simulated on the links, as a
plan compares schemes: NCCL's tuner has no all-to-all, and its times would favour what it does not price.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from clustersim.cluster.cluster import Cluster
from clustersim.cluster.load import load_fabric, load_machine, load_node
from clustersim.files import profile_path, read_csv
from clustersim.hardware.cost import device_costs
from clustersim.hardware.kernel import Memory
from clustersim.program.program import CollectiveAlgorithm, CollectiveKind
from clustersim.units import human_bytes
from clustersim.validate.collective_answer import Asked, answer, spreads
from clustersim.validate.point import Point, Points, each_point, source_of
from clustersim.validate.rows import Missing, Row, first_match

COLUMNS = frozenset({
    "id", "system", "node", "nodes", "delay_ms", "bandwidth_gbps", "flow_gbps", "pattern", "implementation", "size_mb",
    "time_s", "source", "repo",
})  # fmt: skip
_SYSTEMS = {r"p3\.2xlarge": "p3-2xlarge"}
_PATTERNS: dict[str, tuple[CollectiveKind, ...]] = {
    "allreduce": ("all_reduce",),
    "centralized_ps": ("reduce", "broadcast"),
    "sharded_ps": ("all_to_all", "all_gather"),
    "broadcast": ("broadcast",),
    "reduce": ("reduce",),
    "send_recv": ("send_recv",),
}
_SCHEMES = ("allreduce", "centralized_ps", "sharded_ps")
# NCCL over sockets, one GPU a node: rings, of which a broadcast or a reduce is a chain.
_NCCL: dict[CollectiveKind, CollectiveAlgorithm] = {
    "all_reduce": "ring", "all_gather": "ring", "broadcast": "chain", "reduce": "chain", "all_to_all": "pairwise",
    "send_recv": "direct",
}  # fmt: skip
# What Gloo runs (its documentation of algorithms): rings, and a binomial tree for a broadcast. A reduce is a ring
# reduce-scatter whose parts are then gathered at the root.
_GLOO: dict[CollectiveKind, CollectiveAlgorithm] = {
    "all_reduce": "ring", "broadcast": "binomial", "reduce_scatter": "ring", "send_recv": "direct",
}  # fmt: skip
# AWS EC2 user guide, network bandwidth of instances: outside a placement group one flow between two instances gets
# 5 Gb/s at most.
_ONE_FLOW_GBPS = {"tcp-aws-10": 5.0}


def is_sync(columns: Sequence[str]) -> bool:
    """Whether a file with these columns holds timed synchronisations."""
    return {"pattern", "size_mb", "time_s", "nodes"} <= set(columns)


def sync_points(name: str, rows: Sequence[Row]) -> Points:
    """Every row predicted."""
    return each_point(name, rows, _point)


def _point(row: Row, label: str) -> Point:
    pattern = row.required("pattern")
    if pattern not in _PATTERNS:
        raise Missing(f"pattern = {pattern!r} is not modelled; known are {', '.join(_PATTERNS)}")
    implementation = row.text("implementation") or "NCCL"
    gloo = "gloo" in implementation.lower()
    if not gloo and "nccl" not in implementation.lower():
        raise Missing(f"implementation = {implementation!r} is not known; write NCCL or Gloo")
    nodes, size = row.required_count("nodes"), row.required_positive("size_mb") * 2.0**20
    profile = row.text("node") or first_match(row.required("system"), _SYSTEMS)
    if profile is None:
        raise Missing(f"no node profile has system = {row.text('system')!r}; name one in a column node")
    rate, delay_s = row.required_positive("bandwidth_gbps"), (row.number("delay_ms") or 0.0) / 1e3
    if delay_s < 0.0:
        raise Missing(f"delay_ms = {delay_s * 1e3:g}; it must be at least 0")
    if nodes < 2:
        raise Missing(f"nodes = {nodes}; a synchronisation needs two")
    whole = rate
    if gloo:
        # One connection for a pair of ranks, where NCCL has several.
        rate = min(rate, _flow_gbps(row, profile) or rate)
    cluster = _shaped(profile, nodes, rate, delay_s)
    seconds, spread, bases = 0.0, 0.0, []
    kinds = _PATTERNS[pattern]
    if gloo and pattern == "reduce":
        # All but the root's own part arrive there at once, over as many connections.
        kinds = ("reduce_scatter",)
        seconds = delay_s + size * (nodes - 1) / nodes / (whole * 125e6)
    for kind in kinds:
        asked = Asked(cluster=cluster, kind=kind, ranks=nodes, nodes=nodes, algorithm=(_GLOO if gloo else _NCCL)[kind])
        sizes = np.array([size])
        found = answer(asked, sizes)
        seconds += float(found.seconds[0])
        spread = max(spread, float(spreads(asked, sizes, found.basis, label)[0]))
        bases.append(found.basis[0])
    if pattern == "sharded_ps":
        seconds += _addition_s(cluster, nodes, size)
    measured = row.required_positive("time_s")
    # Curves of links were fitted on NCCL's sends.
    point = None if delay_s or gloo else (pattern, nodes, size, rate, measured)
    # A comparison of schemes names their ops; other measurements of the same settings were made at another time.
    compared = not gloo and pattern in _SCHEMES and len(implementation.split()) > 1
    setting = f"{rate:g} Gb/s" + (f" + {delay_s * 1e3:g} ms" if delay_s else "")
    return Point(
        id=label, line=row.line, system=row.text("system") or profile,
        subject=f"{pattern} {'Gloo' if gloo else 'NCCL'} {nodes} x {human_bytes(size)}, {setting}",
        measured=measured, predicted=seconds, spread=spread, basis=bases[0], source=source_of(row),
        seen=point in _fitted(cluster.workers[0].nic.name),
        group=f"{profile} {nodes} x {human_bytes(size)}, {setting}" if compared else "",
        scheme=pattern,
    )  # fmt: skip


@functools.cache
def _fitted(link: str) -> frozenset[tuple[str, int, float, float, float]]:
    """The points that a link's curve was fitted on (links/heldout.csv, split fit): pattern, nodes, bytes, the rate the
    link was set to in Gb/s, seconds."""
    beside = profile_path("links", link).resolve().parent / "heldout.csv"
    if not beside.is_file():
        return frozenset()
    columns = read_csv(beside)
    names = ("link", "split", "kind", "ranks", "bytes", "rate_gbps", "time_us")
    rows = zip(*(columns[name] for name in names), strict=True)
    return frozenset(
        ("send_recv" if kind == "message" else kind, int(ranks), float(size), float(rate), round(float(time) * 1e-6, 9))
        for name, split, kind, ranks, size, rate, time in rows
        if (name, split) == (link, "fit") and rate
    )


def _flow_gbps(row: Row, profile: str) -> float | None:
    """What one connection gets at most: as the row says, else as is known of the nodes' link."""
    return row.positive("flow_gbps") or _ONE_FLOW_GBPS.get(load_node(profile).nic.link)


@functools.cache
def _shaped(profile: str, nodes: int, rate_gbps: float, delay_s: float) -> Cluster:
    """Nodes whose cards are slowed down to a rate, and whose messages all arrive `delay_s` later."""
    machine = load_machine(profile, nodes)
    rate = min(rate_gbps * 125e6, machine.nic_rate_bytes_per_s)
    segments = tuple(replace(one, alpha_s=one.alpha_s + delay_s) for one in machine.nic.segments)
    node = replace(machine.node, nic=replace(machine.node.nic, rate_bytes_per_s=rate))
    machine = replace(machine, node=node, nic=replace(machine.nic, segments=segments))
    return Cluster(workers=(machine,), servers=(), fabric=load_fabric("one-switch"))


def _addition_s(cluster: Cluster, nodes: int, size: float) -> float:
    """Seconds in which every rank adds the `nodes` parts of its share."""
    device = cluster.workers[0].device
    if device is None:
        raise Missing("the nodes have no devices to add gradients on")
    share = round(size / nodes)
    one = Memory(op="reduce", read_bytes=2 * share, written_bytes=share)
    return device_costs(device.name).seconds(((one, nodes - 1),))
