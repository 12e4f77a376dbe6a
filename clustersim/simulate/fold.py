"""Folding: worker ranks that must behave alike become one class, which stands for them exactly.

The classes are the coarsest equitable partition: two ranks share a class only if they run the same position on the
same kind of device, and if their tensor- and data-parallel groups, their pipeline columns, and the ranks that share
their node, NIC port and leaf are made up of the same classes in the same numbers (colour refinement; Weisfeiler & Leman
1968). A straggler or a slow NIC therefore splits only what it touches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, SlowNic, SlowRank
from clustersim.cluster.wiring import Wiring
from clustersim.layout.layout import Mesh, RankOrder

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Folding:
    """`class_of[rank]` for every worker rank; `members[c]` are the ranks of class c, `stage[c]` its pipeline stage,
    `slowdown[c]` the factor by which faults slow its compute. `grid[stage, dp, tp]` is the rank at these places."""

    class_of: Ints
    members: tuple[Ints, ...]
    stage: tuple[int, ...]
    slowdown: tuple[float, ...]
    grid: Ints

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.members)


def rank_grid(mesh: Mesh, order: RankOrder) -> Ints:
    """Ranks by (stage, dp, tp)."""
    ranks = np.arange(mesh.workers)
    if order == "tp-dp-pp":
        return ranks.reshape(mesh.pp, mesh.dp, mesh.tp)
    return ranks.reshape(mesh.dp, mesh.pp, mesh.tp).transpose(1, 0, 2)


def fold(mesh: Mesh, order: RankOrder, cluster: Cluster, wiring: Wiring, *, every_rank: bool = False) -> Folding:
    """Partition the worker ranks into classes; `every_rank` makes a class of each (the reference).

    O(ranks * rounds); the rounds are few, since every one must split a class to be followed by another.
    """
    grid = rank_grid(mesh, order)
    ranks = np.arange(mesh.workers)
    stage = np.empty(mesh.workers, np.int64)
    for index in range(mesh.pp):
        stage[grid[index].ravel()] = index
    slowdown = np.ones(mesh.workers)
    for fault in cluster.faults:
        if isinstance(fault, SlowRank) and fault.rank < mesh.workers:
            slowdown[fault.rank] *= fault.slowdown
    colour = ranks.astype(np.uint64)
    if not every_rank:
        colour = _refined(mesh, grid, cluster, wiring, stage, slowdown)
    # Classes are numbered by their first rank, so that numbering depends on nothing but the partition.
    _, first, inverse = np.unique(colour, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    class_of = number[inverse]
    by_class = np.split(np.argsort(class_of, kind="stable"), np.cumsum(np.bincount(class_of))[:-1])
    return Folding(
        class_of=class_of,
        members=tuple(by_class),
        stage=tuple(int(stage[ranks_[0]]) for ranks_ in by_class),
        slowdown=tuple(float(slowdown[ranks_[0]]) for ranks_ in by_class),
        grid=grid,
    )


def _refined(
    mesh: Mesh, grid: Ints, cluster: Cluster, wiring: Wiring, stage: Ints, slowdown: NDArray[np.float64]
) -> Hashes:
    ranks = np.arange(mesh.workers)
    nodes = wiring.node_of(ranks)
    ports = nodes * wiring.ports_per_node + wiring.port_of(ranks)
    kinds = np.repeat(np.arange(len(cluster.workers)), [machine.count for machine in cluster.workers])[nodes]
    port_fault = np.zeros(wiring.nodes * wiring.ports_per_node)
    for fault in cluster.faults:
        if isinstance(fault, SlowNic):
            nics = max(wiring.ports_per_node, cluster.machine_of(fault.node).node.nic.count)
            port_fault[fault.node * wiring.ports_per_node + fault.nic * wiring.ports_per_node // nics] += fault.speed
    tp_group = np.empty(mesh.workers, np.int64)
    dp_group = np.empty(mesh.workers, np.int64)
    column = np.empty(mesh.workers, np.int64)
    for s in range(mesh.pp):
        tp_group[grid[s]] = s * mesh.dp + np.arange(mesh.dp)[:, None]
        dp_group[grid[s]] = s * mesh.tp + np.arange(mesh.tp)[None, :]
        column[grid[s]] = np.arange(mesh.dp * mesh.tp).reshape(mesh.dp, mesh.tp)
    colour = _mix(stage, kinds, (slowdown * 1e9).astype(np.int64), (port_fault[ports] * 1e9).astype(np.int64))
    # Whether the next stage is in the node, below the same leaf, or beyond the spine decides a send's route.
    for shift in (1, -1):
        peer = np.empty(mesh.workers, np.int64)
        peer[grid] = np.roll(grid, -shift, axis=0)
        near = wiring.node_of(peer) == nodes
        same_leaf = wiring.leaf_of(wiring.node_of(peer), wiring.port_of(peer)) == wiring.leaf_of(
            nodes, wiring.port_of(ranks)
        )
        colour = _mix(colour, near, same_leaf if wiring.has_leaves else near)
    leaf = wiring.leaf_of(nodes, wiring.port_of(ranks)) if wiring.has_leaves else np.zeros_like(ranks)
    # How many peers of each group stand in one's own node decides the shape of its collectives.
    for group in (tp_group, dp_group):
        together = group * wiring.nodes + nodes
        _, inverse, count = np.unique(together, return_inverse=True, return_counts=True)
        colour = _mix(colour, count[inverse])
    relations = (tp_group, dp_group, column, ports, nodes, leaf)
    known = 0
    while True:
        found = len(np.unique(colour))
        if found == known:
            return colour
        known = found
        colour = _mix(colour, *(_multiset(colour, relation) for relation in relations))


def _multiset(colour: Hashes, group: Ints) -> Hashes:
    """For each rank, a hash of the multiset of colours in its group: the wrapping sum of scrambled colours."""
    total = np.zeros(int(group.max()) + 1, np.uint64)
    np.add.at(total, group, _scramble(colour))
    return total[group]


def _mix(*parts: NDArray[np.generic]) -> Hashes:
    result = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        result = _scramble(result * np.uint64(0x9E3779B97F4A7C15) + part.astype(np.uint64))
    return result


def _scramble(value: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA'14)."""
    value = value.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
