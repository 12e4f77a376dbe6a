"""Moves: who sends how much to whom in one phase of a collective, and what links carry of it.

A phase knows its moves, and makes traffic of them only where somebody asks. Where a single collective is priced, nobody
needs all of it: nodes that the same moves reach in the same way, behind the same hardware, load their links alike, so
that the links of one such node (or leaf with its nodes) of every kind are enough (`Pods`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.scramble import scramble
from clustersim.cluster.wiring import NO_TRAFFIC, Port, Traffic, Wiring

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

# Up to so many flows, finding out which are alike costs more than routing them all.
_FEW_FLOWS = 512
_OPPOSITE = (
    (Port.DEVICE_OUT, Port.DEVICE_IN), (Port.PCIE_OUT, Port.PCIE_IN), (Port.NIC_OUT, Port.NIC_IN),
    (Port.LEAF_UP, Port.LEAF_DOWN), (Port.SWITCH_UP, Port.SWITCH_DOWN),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moves:
    """`load` bytes (per byte of the buffer) from each of `sources` to the rank at the same place in `targets`.

    Both are (rows, lanes) arrays of ranks; the ranks of a row share a node, and stand there at the same slots after the
    row's first one in every row.
    """

    sources: Ints
    targets: Ints
    load: float

    def reversed(self) -> Moves:
        """The same bytes, the other way."""
        return Moves(sources=self.targets, targets=self.sources, load=self.load)

    def scaled(self, factor: float) -> Moves:
        """The same moves of `factor` times as much."""
        return Moves(sources=self.sources, targets=self.targets, load=self.load * factor)

    def rows(self, chosen: NDArray[np.bool_]) -> Moves:
        """Some rows of it."""
        return Moves(sources=self.sources[chosen], targets=self.targets[chosen], load=self.load)


@dataclass(slots=True, kw_only=True, eq=False)
class Phase:
    """One fluid phase of a collective over a buffer of M bytes.

    `moves` (and `besides`, what no pair of ranks exchanges: switches that add up and copy) are bytes per byte of M.
    `near_hops` and `far_hops` count the steps that wait for an interconnect's or the network's alpha. `message` is the
    size of one step's message per byte of M, which decides the efficiency of the wire.
    """

    wiring: Wiring
    moves: tuple[Moves, ...]
    near_hops: float
    far_hops: float
    message: float
    besides: Traffic = NO_TRAFFIC
    _traffic: Traffic | None = field(default=None, init=False)
    _switches: int = field(default=-1, init=False)

    @property
    def traffic(self) -> Traffic:
        """What every link carries per byte of M; the same object every time. O(flows)."""
        if self._traffic is None:
            self._traffic = routed(self.wiring, self.moves, self.besides)
        return self._traffic

    @property
    def switches(self) -> int:
        """The fabric switches on the longest of its far hops. O(flows)."""
        if self._switches < 0:
            self._switches = most_switches(self.wiring, self.moves, self.besides) if self.far_hops else 0
        return self._switches

    def scaled(self, factor: float) -> Phase:
        """The same steps over `factor` times as many bytes."""
        return Phase(
            wiring=self.wiring, moves=tuple(move.scaled(factor) for move in self.moves), near_hops=self.near_hops,
            far_hops=self.far_hops, message=self.message * factor, besides=self.besides.scaled(factor),
        )  # fmt: skip

    def reversed(self) -> Phase:
        """The mirror image: what was broadcast is reduced."""
        return Phase(
            wiring=self.wiring, moves=tuple(move.reversed() for move in self.moves), near_hops=self.near_hops,
            far_hops=self.far_hops, message=self.message, besides=_mirrored(self.wiring, self.besides),
        )  # fmt: skip


def _mirrored(wiring: Wiring, traffic: Traffic) -> Traffic:
    """What was sent is received."""
    links, kinds = traffic.links.copy(), wiring.kinds[traffic.links]
    for one, other in _OPPOSITE:
        apart = wiring.offset[other] - wiring.offset[one]
        links[kinds == one] += apart
        links[kinds == other] -= apart
    return Traffic(links=links, loads=traffic.loads, near=traffic.near)


def routed(wiring: Wiring, moves: Sequence[Moves], besides: Traffic = NO_TRAFFIC) -> Traffic:
    """The traffic of `moves`, and of what goes on besides."""
    parts = [wiring.between(move.sources.ravel(), move.targets.ravel(), move.load) for move in moves if move.load > 0.0]
    if len(besides.links):
        parts.append(besides)
    if not parts:
        return NO_TRAFFIC
    if len(parts) == 1:
        return parts[0]
    return Traffic(
        links=np.concatenate([part.links for part in parts]),
        loads=np.concatenate([part.loads for part in parts]),
        near=np.concatenate([part.near for part in parts]),
    )


def most_switches(wiring: Wiring, moves: Sequence[Moves], besides: Traffic = NO_TRAFFIC) -> int:
    """The fabric switches that the longest route of `moves` crosses; what goes on besides crosses three where it loads
    the uplinks of a leaf."""
    most = max((wiring.most_switches(move.sources.ravel(), move.targets.ravel()) for move in moves), default=0)
    if len(besides.links) and not bool(besides.near.all()):
        kinds = wiring.kinds[besides.links]
        most = max(most, 3 if bool((kinds == Port.LEAF_UP).any()) else 1)
    return most


class Pods:
    """Parts of a cluster that share no link: a node on one switch, else a leaf group with its nodes.

    A flow uses links of the pods of its two ends only. Two pods are alike when their nodes have the same links and the
    same numbers of the same moves begin and end at them: then their links carry the same, and the flows that touch one
    of them tell what they carry. Exact for any cluster and any moves; the more differ, the more flows are left.
    """

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        nodes = np.arange(wiring.nodes)
        if wiring.has_leaves:
            _, self.of_node = np.unique(wiring.leaf_of(nodes, np.zeros_like(nodes)), return_inverse=True)
        else:
            self.of_node = nodes
        self.count = int(self.of_node[-1]) + 1
        self._hardware = _hardware(wiring, nodes)

    def fewer(self, phases: Sequence[Phase]) -> list[tuple[Moves, ...]]:
        """The moves of each phase that touch one pod of every kind. O(rows)."""
        wiring = self.wiring
        if wiring.shared_host or sum(move.sources.size for phase in phases for move in phase.moves) <= _FEW_FLOWS:
            return [phase.moves for phase in phases]
        g = wiring.devices_per_node
        signature = self._hardware.copy()
        ends: list[tuple[Ints, Ints, NDArray[np.bool_]]] = []
        with np.errstate(over="ignore"):
            for number, move in enumerate(move for phase in phases for move in phase.moves):
                first, second = move.sources[:, 0], move.targets[:, 0]
                here, there = first // g, second // g
                near = here == there
                apart = self.of_node[here] != self.of_node[there]
                ends.append((here, there, apart))
                # How far it goes, and between which slots of the nodes: what a flow's load on links depends on.
                code = (apart.astype(np.int64) * 2 + near) * g * g + first % g * g + second % g
                for node, table in zip((here, there), _codes(number, 4 * g * g), strict=True):
                    np.add.at(signature, node, table[code])
            whole = np.zeros(self.count, np.uint64)
            np.add.at(whole, self.of_node, scramble(signature))
        _, chosen = np.unique(whole, return_index=True)
        wanted = np.zeros(self.count, np.bool_)
        wanted[chosen] = True
        of = wanted[self.of_node]
        found: list[tuple[Moves, ...]] = []
        number = 0
        for phase in phases:
            kept = []
            for move in phase.moves:
                here, there, apart = ends[number]
                # Which uplink ECMP gives a flow depends on its two ends: no two leaves are alike.
                above = wiring.ecmp & (apart | (wiring.rails & (here != there)))
                kept.append(move.rows(of[here] | of[there] | above))
                number += 1
            found.append(tuple(kept))
        return found


def _hardware(wiring: Wiring, nodes: Ints) -> Hashes:
    """A hash of what every node is, and of the capacities of all links that its flows can use."""
    machines = [machine.count for machine in wiring.cluster.workers]
    result = scramble(np.repeat(np.arange(len(machines)), machines).astype(np.uint64))
    ports = np.arange(wiring.ports_per_node)
    for kind in Port:
        start = wiring.offset[kind]
        match kind:
            case Port.DEVICE_OUT | Port.DEVICE_IN | Port.PCIE_OUT | Port.PCIE_IN:
                links = wiring.capacity[start:][: len(nodes) * wiring.devices_per_node]
                capacity = links.reshape(-1, wiring.devices_per_node)
            case Port.NIC_OUT | Port.NIC_IN:
                links = wiring.capacity[start:][: len(nodes) * wiring.ports_per_node]
                capacity = links.reshape(-1, wiring.ports_per_node)
            case Port.SWITCH_UP | Port.SWITCH_DOWN:
                if not wiring.switches_per_node:
                    continue
                links = wiring.capacity[start:][: len(nodes) * wiring.switches_per_node]
                capacity = links.reshape(-1, wiring.switches_per_node)
            case Port.LEAF_UP | Port.LEAF_DOWN:
                if not wiring.has_leaves or wiring.ecmp:
                    continue
                capacity = wiring.capacity[start + wiring.leaf_of(nodes[:, None], ports[None, :])]
            case _:
                # No flow between workers uses the others.
                continue
        if capacity.min() != capacity.max():
            keys = scramble(np.arange(capacity.shape[1]).astype(np.uint64) + np.uint64(64 * int(kind) + 1))
            each = scramble(np.ascontiguousarray(capacity).view(np.uint64))
            with np.errstate(over="ignore"):
                result += (each * keys).sum(axis=1, dtype=np.uint64)
    return result


def _codes(number: int, count: int) -> tuple[Hashes, Hashes]:
    """Random numbers for the flows of one move that begin, and that end, at a node."""
    both = scramble(np.arange(2 * count).astype(np.uint64) + np.uint64(number * 2 * count + 1))
    return both[:count], both[count:]
