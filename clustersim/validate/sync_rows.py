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
from clustersim.cluster.load import load_fabric, load_machine
from clustersim.hardware.cost import device_costs
from clustersim.hardware.kernel import Memory
from clustersim.program.program import CollectiveAlgorithm, CollectiveKind
from clustersim.units import human_bytes
from clustersim.validate.collective_answer import Asked, answer, spreads
from clustersim.validate.point import Point, Points, each_point
from clustersim.validate.rows import Missing, Row, first_match

COLUMNS = frozenset({
    "id", "system", "node", "nodes", "delay_ms", "bandwidth_gbps", "pattern", "implementation", "size_mb", "time_s",
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
# AWS EC2 user guide, network bandwidth of instances: one flow between instances gets 5 Gb/s at most, where they do not
# share a placement group. Gloo has one connection for a pair of ranks, NCCL several.
_AWS_ONE_FLOW_GBPS = 5.0


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
    nodes, size = row.required_count("nodes"), _positive(row, "size_mb") * 2.0**20
    profile = row.text("node") or first_match(row.required("system"), _SYSTEMS)
    if profile is None:
        raise Missing(f"no node profile has system = {row.text('system')!r}; name one in a column node")
    rate, delay_s = _positive(row, "bandwidth_gbps"), (row.number("delay_ms") or 0.0) / 1e3
    whole = rate
    if gloo and "AWS" in (row.text("system") or ""):
        rate = min(rate, _AWS_ONE_FLOW_GBPS)
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
    # The rate of the link profile was fitted on NCCL's sends between two machines, slowed down but not delayed.
    shaped = not delay_s and rate < cluster.workers[0].nic.rate_bytes_per_s / 125e6
    # A comparison of schemes names their ops; other measurements of the same settings were made at another time.
    compared = not gloo and pattern in _SCHEMES and len(implementation.split()) > 1
    setting = f"{rate:g} Gb/s" + (f" + {delay_s * 1e3:g} ms" if delay_s else "")
    return Point(
        id=label, line=row.line, system=row.text("system") or profile,
        subject=f"{pattern} {'Gloo' if gloo else 'NCCL'} {nodes} x {human_bytes(size)}, {setting}",
        measured=_positive(row, "time_s"), predicted=seconds, spread=spread, basis=bases[0],
        seen=profile == "p3-2xlarge" and pattern == "send_recv" and not gloo and shaped,
        group=f"{profile} {nodes} x {human_bytes(size)}, {setting}" if compared else "",
        scheme=pattern,
    )  # fmt: skip


def _positive(row: Row, column: str) -> float:
    found = row.number(column)
    if found is None:
        raise Missing(f"{column} is not stated; fill it with --defaults")
    if found <= 0.0:
        raise Missing(f"{column} = {found:g}; it must be more than 0")
    return found


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
