"""Collectives as phases of flows on links: what each algorithm sends over which wires, and how many hops it waits for.

A collective of k identical steps is one fluid phase: the bytes of all steps, and the sum over its hops of each hop's
alpha. `groups` arrays are (groups, members): all groups that run the collective at once, so that what they share (a
NIC, a leaf's uplinks) is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Machine
from clustersim.cluster.wiring import NO_TRAFFIC, Traffic, Wiring
from clustersim.hardware.curve import alpha_s, effective_rate
from clustersim.layout.layout import Algorithm
from clustersim.program.program import CollectiveKind

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Phase:
    """One fluid phase of a collective over a buffer of M bytes.

    `traffic` is what every link carries per byte of M. `near_hops` and `far_hops` count the steps that wait for an
    interconnect's or the network's alpha; `switches` the fabric switches on the longest far hop. `message` is the size
    of one step's message per byte of M, which decides the efficiency of the wire.
    """

    traffic: Traffic
    near_hops: float
    far_hops: float
    switches: int
    message: float


def phases(wiring: Wiring, groups: Ints, kind: CollectiveKind, algorithm: Algorithm) -> tuple[Phase, ...]:
    """The phases of a collective; none for groups of one rank. O(ranks * log members)."""
    members = groups.shape[1]
    if members == 1:
        return ()
    blocks = _blocks(wiring, groups)
    if kind != "all_reduce":
        return (_ring(wiring, blocks, rounds=1),)
    if algorithm == "ring":
        return (_ring(wiring, blocks, rounds=2),)
    if algorithm == "tree":
        return (_double_tree(wiring, blocks),)
    if algorithm == "hierarchical":
        return _hierarchical(wiring, blocks)
    return _halving_doubling(wiring, groups)


def _blocks(wiring: Wiring, groups: Ints) -> Ints:
    """`groups` as (groups, nodes, members of a node); a group that does not fill its nodes evenly counts as one member
    per node in ring order, whose neighbours may then share a node."""
    ordered = np.sort(groups, axis=1)
    count, members = ordered.shape
    if wiring.shared_host:
        return ordered.reshape(count, 1, members)
    nodes = wiring.node_of(ordered)
    per_node = int((nodes[0] == nodes[0, 0]).sum())
    if members % per_node == 0:
        blocks = ordered.reshape(count, members // per_node, per_node)
        inside = wiring.node_of(blocks)
        if bool((inside == inside[:, :, :1]).all()) and bool((inside[:, 1:, 0] != inside[:, :-1, 0]).all()):
            return blocks
    return ordered.reshape(count, members, 1)


def _switches(wiring: Wiring, blocks: Ints) -> int:
    """Fabric switches on the longest edge between neighbouring nodes of the rings."""
    if blocks.shape[1] == 1:
        return 0
    return wiring.most_switches(blocks.ravel(), np.roll(blocks, -1, axis=1).ravel())


def _ring(wiring: Wiring, blocks: Ints, rounds: int) -> Phase:
    """Rings, one per member of a node (channels), each leaving the node through another member's NIC port.

    `rounds` is 2 for an allreduce (reduce-scatter and all-gather), 1 for either alone. Every rank sends
    rounds (n-1)/n M (Patarasuk & Yuan 2009).
    """
    _, nodes, local = blocks.shape
    members = nodes * local
    sent = rounds * (members - 1) / members
    traffic = NO_TRAFFIC
    if local > 1:
        stays = 1.0 if nodes == 1 else (local - 1) / local
        following = np.roll(blocks, -1, axis=2)
        traffic = traffic + wiring.between(blocks.ravel(), following.ravel(), sent * stays)
    if nodes > 1:
        following = np.roll(blocks, -1, axis=1)
        traffic = traffic + wiring.between(blocks.ravel(), following.ravel(), sent / local)
    return Phase(
        traffic=traffic,
        near_hops=rounds * (members - nodes),
        far_hops=rounds * (nodes - 1),
        switches=_switches(wiring, blocks),
        message=1.0 / members,
    )


def tree_parents(n: int) -> Ints:
    """Parents in a binary tree over 0..n-1; the root is 0 (parent -1), its only child the topmost power of two.

    For r with lowest set bit b the parent is (r ^ b) | 2b, or r ^ b where that is not below n (NCCL's btree rule).
    """
    parents = np.full(n, -1, np.int64)
    for rank in range(1, n):
        low = rank & -rank
        up = (rank ^ low) | (low << 1)
        parents[rank] = up if up < n else rank ^ low
    return parents


def _double_tree(wiring: Wiring, blocks: Ints) -> Phase:
    """Two binary trees over the nodes, each carrying half, chains inside (Sanders et al. 2009; NCCL 2.4).

    Every rank is an inner node of one tree only, so that it sends and receives at most 2 M over both trees and both
    passes, whatever the number of ranks. In a single node the trees run over its ranks.
    """
    groups, nodes, local = blocks.shape
    if nodes == 1:
        blocks = blocks.reshape(groups, local, 1)
        groups, nodes, local = blocks.shape
    count = nodes
    parents = tree_parents(count)
    children = np.flatnonzero(parents >= 0)
    above = parents[children]
    if count % 2 == 0:
        other = (count - 1 - children, count - 1 - above)
    else:
        other = ((children + 1) % count, (above + 1) % count)
    traffic = NO_TRAFFIC
    for low, high in ((children, above), other):
        down, up = blocks[:, high, :].ravel(), blocks[:, low, :].ravel()
        traffic = traffic + wiring.between(up, down, 0.5 / local) + wiring.between(down, up, 0.5 / local)
    if local > 1:
        following = np.roll(blocks, -1, axis=2)
        traffic = traffic + wiring.between(blocks.ravel(), following.ravel(), 2.0 * (local - 1) / local)
    depth = int(np.ceil(np.log2(count)))
    single = wiring.shared_host or bool((wiring.node_of(blocks) == wiring.node_of(blocks[:, :1, :1])).all())
    return Phase(
        traffic=traffic,
        near_hops=2 * depth if single else 2 * (local - 1),
        far_hops=0 if single else 2 * depth,
        switches=0 if single else _switches(wiring, blocks),
        message=1.0 / (2 * local),
    )


def _hierarchical(wiring: Wiring, blocks: Ints) -> tuple[Phase, ...]:
    """Reduce-scatter in the node, allreduce of each shard per rail, all-gather in the node."""
    groups, nodes, local = blocks.shape
    if nodes == 1 or local == 1:
        return (_ring(wiring, blocks, rounds=2),)
    inside = _ring(wiring, blocks.reshape(groups * nodes, 1, local), rounds=1)
    rails = blocks.transpose(0, 2, 1).reshape(groups * local, nodes, 1)
    across = _ring(wiring, rails, rounds=2)
    shard = Phase(
        traffic=across.traffic.scaled(1.0 / local),
        near_hops=across.near_hops,
        far_hops=across.far_hops,
        switches=across.switches,
        message=across.message / local,
    )
    return (inside, shard, inside)


def _halving_doubling(wiring: Wiring, groups: Ints) -> tuple[Phase, ...]:
    """Recursive halving and doubling (Thakur et al. 2005), nearest partner first; other counts than powers of two fold
    the extra ranks into partners before and after."""
    ordered = np.sort(groups, axis=1)
    members = ordered.shape[1]
    power = 1 << (members.bit_length() - 1)
    result: list[Phase] = []
    extra = members - power
    if extra:
        away, home = ordered[:, power:].ravel(), ordered[:, :extra].ravel()
        result.append(_exchange_phase(wiring, away, home, 1.0, 1))
    active = ordered[:, :power]
    distance = 1
    while distance < power:
        partner = active[:, np.arange(power) ^ distance]
        result.append(_exchange_phase(wiring, active.ravel(), partner.ravel(), 0.5 / distance, 2))
        distance *= 2
    if extra:
        result.append(_exchange_phase(wiring, home, away, 1.0, 1))
    return tuple(result)


def _exchange_phase(wiring: Wiring, sources: Ints, targets: Ints, share: float, times: int) -> Phase:
    near = wiring.shared_host or bool((wiring.node_of(sources) == wiring.node_of(targets)).all())
    return Phase(
        traffic=wiring.between(sources, targets, share * times),
        near_hops=times if near else 0,
        far_hops=0 if near else times,
        switches=0 if near else wiring.most_switches(sources, targets),
        message=share,
    )


def wire_efficiency(machine: Machine, message_bytes: float) -> tuple[float, float]:
    """Fractions of the datasheet rate that messages of this size reach: inside a node, and between nodes."""
    far = effective_rate(machine.nic, message_bytes) / machine.nic.rate_bytes_per_s
    if machine.interconnect is None:
        return far, far
    near = effective_rate(machine.interconnect, message_bytes) / machine.interconnect.rate_bytes_per_s
    return near, far


def latency_s(phase: Phase, machine: Machine, hop_latency_s: float) -> float:
    """Seconds that the hops of a phase wait: the sum of their alphas, and of the switches on the way."""
    near = alpha_s(machine.interconnect) if machine.interconnect is not None else 0.0
    far = alpha_s(machine.nic) + phase.switches * hop_latency_s
    return phase.near_hops * near + phase.far_hops * far
