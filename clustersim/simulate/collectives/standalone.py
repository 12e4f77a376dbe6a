"""price_collective(): one collective on an idle cluster, on the simulator's clock.

Only what can decide is built: the flows that touch one part of the cluster of every kind (`Pods`), and of their links
the busiest. A collective over 16,384 ranks costs as many events as one over 16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simpy
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.cluster.wiring import Port, Wiring
from clustersim.errors import InputError
from clustersim.program.program import CollectiveAlgorithm, CollectiveKind
from clustersim.simulate.collectives.moves import Moves, Phase, Pods, most_switches, routed
from clustersim.simulate.collectives.phases import ALGORITHMS_OF, latency_s, launch_s, phases, wire_efficiency
from clustersim.simulate.network import Network

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTime:
    """The busiest link of a kind: what it carried, and for how long that kept it busy (losses on the wire counted)."""

    kind: str
    bytes: float
    capacity_bytes_per_s: float
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedCollective:
    """One collective of `size_bytes` over `ranks` ranks on `nodes` nodes. Sizes count as in nccl-tests: the whole
    buffer; of an all-to-all what one rank sends, its own part included.

    `waiting_s` is what of `seconds` passes before bytes flow: launch, and the alphas of all hops. `links`: the busiest
    link of every kind that carries anything, the busiest kind first.
    """

    kind: CollectiveKind
    algorithm: CollectiveAlgorithm
    size_bytes: float
    ranks: int
    nodes: int
    channels: int
    seconds: float
    waiting_s: float
    links: tuple[LinkTime, ...]
    phases: int
    events: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Loads:
    """Bytes on links per byte of the buffer, by flows inside nodes and between them."""

    kind: Ints
    near: Floats
    far: Floats
    capacity: Floats


class StandaloneCollective:
    """A collective whose flows are known, to be priced at any size. Raises InputError where it cannot run."""

    def __init__(
        self,
        cluster: Cluster,
        kind: CollectiveKind,
        algorithm: CollectiveAlgorithm,
        *,
        ranks: Ints | None = None,
        channels: int | None = None,
    ) -> None:
        self.cluster = cluster
        self.kind = kind
        self.algorithm = algorithm
        self.ranks = np.arange(cluster.devices) if ranks is None else ranks
        reason = obstacle(cluster, kind, algorithm, self.ranks)
        if reason is not None:
            raise InputError(reason)
        if channels is not None and channels < 1:
            raise InputError(f"channels must be at least 1, not {channels}")
        wiring = Wiring(cluster)
        used = np.unique(wiring.node_of(self.ranks))
        self.nodes = len(used)
        ends = np.cumsum([machine.count for machine in cluster.workers])
        kinds = np.unique(np.searchsorted(ends, used, side="right"))
        self.machines = [cluster.workers[index] for index in kinds]
        self.phases = phases(wiring, self.ranks[None, :], kind, algorithm, channels)
        self.channels = channels or max(1, -(-len(self.ranks) // self.nodes))
        self.launch_s = max((launch_s(self.phases, machine) for machine in self.machines), default=0.0)
        fewer = Pods(wiring).fewer(self.phases) if self.phases else []
        self._wiring = wiring
        self._loads = [
            _loads(wiring, moves, phase) for moves, phase in zip(fewer, self.phases, strict=True)
        ]  # fmt: skip
        self._switches = [
            most_switches(wiring, moves, phase.besides) if phase.far_hops else 0
            for moves, phase in zip(fewer, self.phases, strict=True)
        ]

    def price(self, size_bytes: float) -> PricedCollective:
        """Its time for a buffer of `size_bytes`. O(phases)."""
        if not (math.isfinite(size_bytes) and size_bytes > 0.0):
            raise InputError(f"a collective of {size_bytes:g} bytes: write a size of more than 0B, e.g. 1MiB")
        rows = [self._row(number, size_bytes) for number in range(len(self.phases))]
        kinds = sorted({kind for _, links in rows for kind in links})
        number_of = {kind: number for number, kind in enumerate(kinds)}
        env = simpy.Environment()
        network = Network(env, [1.0] * len(kinds))

        def begin(index: int) -> None:
            if index < len(rows):
                wait = rows[index][0] + (self.launch_s if index == 0 else 0.0)
                env.timeout(wait).callbacks.append(lambda _: flow(index))

        def flow(index: int) -> None:
            # A byte of the buffer keeps the busiest link of each kind busy for so many seconds.
            weights = [(number_of[kind], busy) for kind, (busy, _, _) in rows[index][1].items()]
            network.start(size_bytes, weights, lambda: begin(index + 1))

        begin(0)
        events = 0
        while env.peek() < math.inf:
            env.step()
            events += 1
        links = [
            LinkTime(
                kind=Port(kind).name.lower().replace("_", " "),
                bytes=size_bytes * sum(found[kind][1] for _, found in rows if kind in found),
                capacity_bytes_per_s=min(found[kind][2] for _, found in rows if kind in found),
                busy_s=size_bytes * sum(found[kind][0] for _, found in rows if kind in found),
            )
            for kind in kinds
        ]
        return PricedCollective(
            kind=self.kind,
            algorithm=self.algorithm,
            size_bytes=size_bytes,
            ranks=len(self.ranks),
            nodes=self.nodes,
            channels=self.channels,
            seconds=env.now,
            waiting_s=sum(wait for wait, _ in rows) + (self.launch_s if rows else 0.0),
            links=tuple(sorted(links, key=lambda link: -link.busy_s)),
            phases=len(rows),
            events=events,
        )

    def _row(self, number: int, size: float) -> tuple[float, dict[int, tuple[float, float, float]]]:
        """Of one phase: the seconds before bytes flow, and for each kind of links, of the one that is busy for longest:
        (seconds a byte of the buffer, bytes a byte of the buffer, capacity)."""
        phase, loads = self.phases[number], self._loads[number]
        hop = self.cluster.fabric.hop_latency_s
        wait = max(latency_s(phase, machine, hop, self._switches[number]) for machine in self.machines)
        near, far = _efficiency(self.machines, size * phase.message)
        busy = (loads.near / near + loads.far / far) / loads.capacity
        links: dict[int, tuple[float, float, float]] = {}
        for at in range(len(busy)):
            kind = int(loads.kind[at])
            if kind not in links or busy[at] > links[kind][0]:
                links[kind] = (float(busy[at]), float(loads.near[at] + loads.far[at]), float(loads.capacity[at]))
        return wait, links


def price_collective(
    cluster: Cluster,
    kind: CollectiveKind,
    algorithm: CollectiveAlgorithm,
    size_bytes: float,
    *,
    ranks: Ints | None = None,
    channels: int | None = None,
) -> PricedCollective:
    """The time of one collective among `ranks` (default: all devices) of an otherwise idle cluster.

    `channels` divide the bytes of rings, chains and trees over NICs; by default there is one per NIC, or one per rank
    of a node where ranks share NICs. InputError where the algorithm cannot run there. O(ranks), and a few events for
    each phase.
    """
    return StandaloneCollective(cluster, kind, algorithm, ranks=ranks, channels=channels).price(size_bytes)


def obstacle(cluster: Cluster, kind: CollectiveKind, algorithm: CollectiveAlgorithm, ranks: Ints) -> str | None:
    """Why an algorithm cannot run a collective among `ranks`, and what can; None where it can."""
    known = ALGORITHMS_OF[kind]
    words = kind.replace("_", "-")
    if algorithm not in known:
        return f"{words} has no algorithm {algorithm!r}; write one of {', '.join(known)}"
    if len(ranks) < 1 or int(ranks.min()) < 0 or int(ranks.max()) >= cluster.devices:
        return f"the ranks must be of 0 to {cluster.devices - 1}"
    if algorithm == "halving-doubling" and kind != "all_reduce" and len(ranks) & (len(ranks) - 1):
        return f"{words} by halving-doubling needs a power of two of ranks, not {len(ranks)}; write ring"
    first = ranks // cluster.devices_per_node
    several_nodes = bool((first != first[0]).any()) and cluster.workers[0].nic.kind != "loopback"
    if algorithm == "nvls":
        for machine in cluster.workers:
            inside = machine.node.interconnect
            if inside is None or not inside.reduces:
                return (
                    f"nvls needs switches that add up (interconnect.reduces: true), which {machine.node.name} has not; "
                    f"write {'tree' if kind == 'all_reduce' else 'ring'}"
                )
    if algorithm == "sharp":
        if not cluster.fabric.in_network_reduction:
            return (
                "sharp needs a fabric whose switches add up (in_network_reduction: true), e.g. --fabric "
                "rail-optimized-sharp; write tree"
            )
        if not several_nodes:
            return "sharp needs ranks on several nodes; inside one node write nvls or ring"
    return None


def _efficiency(machines: Sequence[Machine], message_bytes: float) -> tuple[float, float]:
    """The wire efficiencies of the machines that reach the lowest rates with them."""
    near, far = (math.inf, 1.0), (math.inf, 1.0)
    for machine in machines:
        inside, beyond = wire_efficiency(machine, message_bytes)
        rate = machine.interconnect_rate_bytes_per_s if machine.interconnect is not None else math.inf
        near = min(near, (inside * rate, inside))
        far = min(far, (beyond * machine.nic_rate_bytes_per_s, beyond))
    return near[1], far[1]


def _loads(wiring: Wiring, moves: Sequence[Moves], phase: Phase) -> _Loads:
    """The links that can be the busiest of their kind, whatever the efficiencies."""
    traffic = routed(wiring, moves, phase.besides)
    links, inverse = np.unique(traffic.links, return_inverse=True)
    near = np.bincount(inverse, weights=traffic.loads * traffic.near).astype(np.float64)
    far = np.bincount(inverse, weights=traffic.loads * ~traffic.near).astype(np.float64)
    capacity = wiring.capacity[links]
    finite = np.isfinite(capacity)
    links, near, far, capacity = links[finite], near[finite], far[finite], capacity[finite]
    kinds = wiring.kinds[links].astype(np.int64)
    chosen: list[int] = []
    for kind in np.unique(kinds):
        at = np.flatnonzero(kinds == kind)
        inside, beyond = near[at] / capacity[at], far[at] / capacity[at]
        # From the largest share of one sort of flows on, only links with a larger share of the other sort matter.
        order = np.lexsort((-beyond, -inside))
        best = -1.0
        for index in order[np.concatenate(([True], np.diff(np.maximum.accumulate(beyond[order])) > 0.0))]:
            if beyond[index] > best:
                best = float(beyond[index])
                chosen.append(int(at[index]))
    return _Loads(kind=kinds[chosen], near=near[chosen], far=far[chosen], capacity=capacity[chosen])
