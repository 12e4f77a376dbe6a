"""Folding: worker ranks that must behave alike become one class, which stands for them exactly.

The ranks of a tensor-parallel group run in lockstep: they compute together, and an op of theirs is over when it is for
the slowest of them. A class is made up of whole groups, and a slow device in a group slows it as a whole. What the
network tells apart within a class are lanes: the ranks of a lane have flows at the same rate.

The lanes are the coarsest equitable partition of the ranks: two ranks share a lane only if they run the same position
on the same kind of device, and if their tensor- and data-parallel groups, their pipeline columns, and the ranks that
share their node, NIC port and leaf are made up of the same lanes in the same numbers (colour refinement; Weisfeiler &
Leman 1968). Groups of the same lanes in the same numbers are a class. A straggler or a slow NIC therefore splits only
what it touches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, SlowRank
from clustersim.cluster.scramble import Hashes, scramble
from clustersim.cluster.wiring import Port, Traffic, Wiring
from clustersim.layout.layout import Mesh, RankOrder
from clustersim.program.program import ServerShare

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Folding:
    """`class_of[rank]` and `lane_of[rank]` for every worker rank; `members[c]` are the ranks of class c, `stage[c]` its
    pipeline stage, `slowdown[c]` the factor by which faults slow its compute. `grid[stage, replica, tp]` is the rank at
    these places."""

    class_of: Ints
    lane_of: Ints
    members: tuple[Ints, ...]
    stage: tuple[int, ...]
    slowdown: tuple[float, ...]
    grid: Ints

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.members)

    def lanes(self, ranks: Ints) -> list[Ints]:
        """The indices into `ranks` of each lane, by the lane's number."""
        if len(ranks) == 1:
            return [np.zeros(1, np.int64)]
        _, inverse = np.unique(self.lane_of[ranks], return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        return np.split(order, np.cumsum(np.bincount(inverse))[:-1])


def rank_grid(mesh: Mesh, order: RankOrder) -> Ints:
    """Ranks by (stage, replica, tp); replica = d * cp + c."""
    ranks = np.arange(mesh.workers)
    if order == "tp-dp-pp":
        return ranks.reshape(mesh.pp, mesh.replicas, mesh.tp)
    return ranks.reshape(mesh.replicas, mesh.pp, mesh.tp).transpose(1, 0, 2)


def replica_groups(mesh: Mesh, kind: Literal["cp", "ep", "expert-dp"]) -> Ints:
    """The replicas that form each group, one group a row: the cp ranks of a sequence, the ep ranks that share a set of
    experts, or the ranks that hold the same experts."""
    replicas = np.arange(mesh.replicas)
    if kind == "cp":
        return replicas.reshape(mesh.dp, mesh.cp)
    sharing = replicas.reshape(-1, mesh.ep)
    return sharing if kind == "ep" else sharing.T


def fold(
    mesh: Mesh,
    order: RankOrder,
    cluster: Cluster,
    wiring: Wiring,
    servers: tuple[ServerShare, ...] = (),
    uneven: Iterable[Traffic] = (),
    *,
    every_rank: bool = False,
) -> Folding:
    """Partition the worker ranks into classes and lanes; `every_rank` makes a lane of each rank and a class of each
    tensor-parallel group (the reference). `servers` that run beside workers tell these apart from the others; so do the
    loads of `uneven` traffic on the ports of a rank.

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
    group = np.empty(mesh.workers, np.int64)
    group[grid] = np.arange(mesh.pp * mesh.replicas).reshape(mesh.pp, mesh.replicas, 1)
    slowest = np.ones(mesh.pp * mesh.replicas)
    np.maximum.at(slowest, group, slowdown)
    slowdown = slowest[group]
    colour, whole = ranks.astype(np.uint64), group.astype(np.uint64)
    # Under ECMP a flow's way is a hash of its two ends: no two ranks can be said to be alike.
    if not every_rank and not (wiring.ecmp and wiring.leaves > 1):
        served, hosted = _served(mesh, wiring, servers), _hosted(wiring, mesh, servers)
        apart = _mix(served, hosted, *_loads(mesh, wiring, uneven))
        colour = _refined(mesh, grid, cluster, wiring, stage, slowdown, apart, bool(served.any()))
        whole = _multiset(colour, group)
    class_of = _numbered(whole)
    by_class = np.split(np.argsort(class_of, kind="stable"), np.cumsum(np.bincount(class_of))[:-1])
    return Folding(
        class_of=class_of,
        lane_of=_numbered(colour),
        members=tuple(by_class),
        stage=tuple(int(stage[ranks_[0]]) for ranks_ in by_class),
        slowdown=tuple(float(slowdown[ranks_[0]]) for ranks_ in by_class),
        grid=grid,
    )


def _numbered(colour: Hashes) -> Ints:
    """Colours as numbers in the order of the first rank of each, so that they depend on nothing but the partition."""
    _, first, inverse = np.unique(colour, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[inverse]


def _served(mesh: Mesh, wiring: Wiring, servers: tuple[ServerShare, ...]) -> Ints:
    """The parts that servers hold beside each rank: in its node, or in the rank itself where all share one host."""
    place = np.arange(mesh.workers) if wiring.shared_host else wiring.node_of(np.arange(mesh.workers))
    held = np.zeros(int(place.max()) + 1, np.int64)
    for share in servers:
        if share.host == "worker":
            held[place[share.node]] += share.parts
    return held[place]


def _hosted(wiring: Wiring, mesh: Mesh, servers: tuple[ServerShare, ...]) -> Ints:
    """The parts that server hosts below each rank's leaf hold, and the storage hosts there."""
    ranks = np.arange(mesh.workers)
    held = np.zeros(max(1, wiring.leaves), np.int64)
    if wiring.has_leaves:
        for share in servers:
            if share.host == "server":
                held[wiring.leaf_of_host(share.node)] += share.parts
        # What storage hosts send does not climb to ranks below their own leaf.
        for host in range(wiring.storage):
            held[wiring.leaf_of_host(wiring.servers + host)] += 1 << 40
    return np.where(_under_binding_leaf(wiring, ranks), held[_leaf(wiring, ranks)], 0)


def _under_binding_leaf(wiring: Wiring, ranks: Ints) -> NDArray[np.bool_]:
    """Whether the uplinks of a rank's leaf can hold anything back: where they carry all that its ports can, who else
    is below the leaf does not matter."""
    return wiring.binding_leaves()[_leaf(wiring, ranks)] if wiring.has_leaves else np.zeros(len(ranks), np.bool_)


def _leaf(wiring: Wiring, ranks: Ints) -> Ints:
    """The leaf of each rank; one for all where there are none."""
    if not wiring.has_leaves:
        return np.zeros_like(ranks)
    return wiring.leaf_of(wiring.node_of(ranks), wiring.port_of(ranks))


def _uplink_rate(wiring: Wiring, leaves: Ints) -> NDArray[np.float64]:
    """What the uplinks of each leaf carry."""
    if not wiring.has_leaves:
        return np.zeros(len(leaves))
    return wiring.capacity[wiring.offset[Port.LEAF_UP] + leaves * wiring.uplinks]


def _loads(mesh: Mesh, wiring: Wiring, uneven: Iterable[Traffic]) -> list[Ints]:
    """What each traffic puts on the links of each rank, as twelve digits."""
    ranks = np.arange(mesh.workers)
    port = wiring.node_of(ranks) * wiring.ports_per_node + wiring.port_of(ranks)
    places = {
        Port.DEVICE_OUT: ranks, Port.DEVICE_IN: ranks, Port.PCIE_OUT: ranks, Port.PCIE_IN: ranks,
        Port.NIC_OUT: port, Port.NIC_IN: port,
    }  # fmt: skip
    if wiring.switches_per_node:
        places |= {Port.SWITCH_UP: wiring.switch_of(ranks), Port.SWITCH_DOWN: wiring.switch_of(ranks)}
    found = []
    binding = _under_binding_leaf(wiring, ranks)
    for traffic in uneven:
        total = np.bincount(traffic.links, weights=traffic.loads, minlength=wiring.links)
        digits = np.round(total * 1e12 / max(1e-300, float(total.max()))).astype(np.int64)
        found += [digits[wiring.offset[kind] + place] for kind, place in places.items()]
        if bool(binding.any()):
            leaf = _leaf(wiring, ranks)
            found += [
                np.where(binding, digits[wiring.offset[kind] + leaf], 0) for kind in (Port.LEAF_UP, Port.LEAF_DOWN)
            ]
    return found


def _refined(
    mesh: Mesh,
    grid: Ints,
    cluster: Cluster,
    wiring: Wiring,
    stage: Ints,
    slowdown: NDArray[np.float64],
    apart: Hashes,
    beside: bool,
) -> Hashes:
    ranks = np.arange(mesh.workers)
    nodes = wiring.node_of(ranks)
    ports = nodes * wiring.ports_per_node + wiring.port_of(ranks)
    kinds = np.repeat(np.arange(len(cluster.workers)), [machine.count for machine in cluster.workers])[nodes]
    rate = wiring.capacity[wiring.offset[Port.NIC_OUT] + ports].view(np.uint64)
    tp_group = np.empty(mesh.workers, np.int64)
    dp_group = np.empty(mesh.workers, np.int64)
    column = np.empty(mesh.workers, np.int64)
    for s in range(mesh.pp):
        tp_group[grid[s]] = s * mesh.replicas + np.arange(mesh.replicas)[:, None]
        dp_group[grid[s]] = s * mesh.tp + np.arange(mesh.tp)[None, :]
        column[grid[s]] = np.arange(mesh.replicas * mesh.tp).reshape(mesh.replicas, mesh.tp)
    leaf = _leaf(wiring, ranks)
    binding = _under_binding_leaf(wiring, ranks)
    uplink = np.where(binding, _uplink_rate(wiring, leaf).view(np.uint64), np.uint64(0))
    colour = _mix(stage, kinds, slowdown.view(np.uint64), rate, apart, uplink)
    if len(wiring.far_nic):
        colour = _mix(colour, wiring.far_nic[ranks])
    # Whether the next stage is in the node, below the same leaf, or beyond the spine decides a send's route.
    for shift in (1, -1):
        peer = np.empty(mesh.workers, np.int64)
        peer[grid] = np.roll(grid, -shift, axis=0)
        near = wiring.node_of(peer) == nodes
        same_leaf = wiring.leaf_of(wiring.node_of(peer), wiring.port_of(peer)) == wiring.leaf_of(
            nodes, wiring.port_of(ranks)
        )
        colour = _mix(colour, near, same_leaf if wiring.has_leaves else near)
        if wiring.uneven_switches:
            colour = _mix(colour, wiring.switch_of(peer) == wiring.switch_of(ranks))
    relations = [column, ports, nodes]
    if bool(binding.any()):
        relations.append(np.where(binding, leaf, int(leaf.max()) + 1 + nodes))
    if wiring.uneven_switches or (beside and wiring.switches_per_node):
        relations += [wiring.switch_of(ranks), wiring.switch_of_port(nodes, wiring.port_of(ranks))]
    if beside:
        # Traffic with a server beside a worker uses the same port index at both ends.
        relations.append(wiring.port_of(ranks))
    # Where the members of a group stand relative to each other decides the shape of its collectives, and who they are.
    places = [nodes]
    if wiring.has_leaves:
        places.append(leaf)
    if wiring.uneven_switches:
        places.append(wiring.switch_of(ranks))
    shared = [tp_group, dp_group]
    if mesh.cp > 1:
        shared.append(_grouped(mesh, grid, replica_groups(mesh, "cp")))
    if mesh.ep > 1:
        shared += [_grouped(mesh, grid, replica_groups(mesh, kind)) for kind in ("ep", "expert-dp")]
    for group in shared:
        _, inverse, count = np.unique(group * wiring.nodes + nodes, return_inverse=True, return_counts=True)
        colour = _mix(colour, count[inverse], *(_pattern(group, place) for place in places))
        relations += [inverse, group]
    known = 0
    while True:
        found = len(np.unique(colour))
        if found == known:
            return colour
        known = found
        colour = _mix(colour, *(_multiset(colour, relation) for relation in relations))


def _grouped(mesh: Mesh, grid: Ints, groups: Ints) -> Ints:
    """The number of each rank's group, of groups of replicas within one stage and tensor-parallel lane."""
    group_of = np.empty(mesh.replicas, np.int64)
    group_of[groups] = np.arange(len(groups))[:, None]
    lanes = np.arange(mesh.pp)[:, None, None] * mesh.tp + np.arange(mesh.tp)[None, None, :]
    found = np.empty(mesh.workers, np.int64)
    found[grid] = lanes * len(groups) + group_of[None, :, None]
    return found


def _pattern(group: Ints, place: Ints) -> Hashes:
    """For each rank, a hash of which members of its group (by rank) stand at the same place. O(ranks * log ranks)."""
    order = np.argsort(group, kind="stable")
    begins = np.concatenate(([0], np.cumsum(np.bincount(group))))[group[order]]
    keys = group[order] * (int(place.max()) + 1) + place[order]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    # The member that stands first at one's own place names it.
    named = scramble((np.arange(len(group)) - begins).astype(np.uint64)) + (first[inverse] - begins).astype(np.uint64)
    total = np.zeros(int(group.max()) + 1, np.uint64)
    np.add.at(total, group[order], scramble(named))
    return total[group]


def _multiset(colour: Hashes, group: Ints) -> Hashes:
    """For each rank, a hash of the multiset of colours in its group: the wrapping sum of scrambled colours."""
    total = np.zeros(int(group.max()) + 1, np.uint64)
    np.add.at(total, group, scramble(colour))
    return total[group]


def _mix(*parts: NDArray[np.generic]) -> Hashes:
    result = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        result = scramble(result * np.uint64(0x9E3779B97F4A7C15) + part.astype(np.uint64))
    return result
