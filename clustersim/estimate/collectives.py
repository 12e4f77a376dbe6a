"""Closed forms of collectives in alpha and beta: what a simulated one should take where nothing is in its way.

M bytes (counted as in nccl-tests), n ranks, alpha seconds a hop, B bytes/s a link and direction. Sources: Thakur,
Rabenseifner & Gropp 2005 (binomial trees, scatter and all-gather, halving and doubling, pairwise exchange); Patarasuk &
Yuan 2009 (ring); Sanders, Speck & Traeff 2009 (two trees); NVIDIA/nccl and nccl-tests (hierarchy, busbw). Pipelines are
taken in the limit of small pieces, where a hop's alpha is waited for once. Two levels: g ranks on each of N nodes,
alpha_i and B_i inside a node, alpha_e and B_e of a NIC between nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.hardware.curve import alpha_s, effective_rate
from clustersim.program.program import CollectiveAlgorithm, CollectiveKind


def bus_factor(kind: CollectiveKind, ranks: int) -> float:
    """busbw / algbw of nccl-tests: what a link must carry at least, over the buffer: 2(n-1)/n for an allreduce, (n-1)/n
    for all-gather, reduce-scatter and all-to-all, 1 for the others."""
    match kind:
        case "all_reduce":
            return 2.0 * (ranks - 1) / ranks
        case "all_gather" | "reduce_scatter" | "all_to_all":
            return (ranks - 1) / ranks
        case "broadcast" | "reduce" | "send_recv":
            return 1.0


# ------------------------------------------------------------------------------------------------ one level


def ring_all_reduce_s(n: int, size: float, alpha: float, rate: float) -> float:
    """2(n-1) alpha + 2(n-1)/n M/B (Patarasuk & Yuan 2009)."""
    return 2.0 * (n - 1) * (alpha + size / (n * rate))


def ring_all_gather_s(n: int, size: float, alpha: float, rate: float) -> float:
    """(n-1)(alpha + M/(nB)); a reduce-scatter takes as long."""
    return (n - 1) * (alpha + size / (n * rate))


def halving_doubling_s(n: int, size: float, alpha: float, rate: float) -> float:
    """2 lg P alpha + 2(P-1)/P M/B, P the largest power of two up to n; 2(alpha + M/B) more where n is none
    (Rabenseifner, in Thakur et al. 2005)."""
    power = 1 << (n.bit_length() - 1)
    steps = 2.0 * (power.bit_length() - 1) * alpha + 2.0 * (power - 1) / power * size / rate
    return steps if power == n else steps + 2.0 * (alpha + size / rate)


def tree_all_reduce_s(n: int, size: float, alpha: float, rate: float, *, trees: int = 2) -> float:
    """2 ceil(lg n) alpha + 2M/B by two trees (Sanders et al. 2009), + 3M/B by one whose two passes overlap: an inner
    node sends and receives so much. Fewer ranks than an inner node needs neighbours send less."""
    return 2.0 * _lg(n) * alpha + _tree_load(n, trees) * size / rate


def binomial_broadcast_s(n: int, size: float, alpha: float, rate: float) -> float:
    """ceil(lg n)(alpha + M/B) (Thakur et al. 2005); a reduction takes as long."""
    return _lg(n) * (alpha + size / rate)


def chain_broadcast_s(n: int, size: float, alpha: float, rate: float, pieces: int | None = None) -> float:
    """A pipeline of c pieces: (n-1) alpha + (n-2+c) M/(cB), where a hop's alpha delays and does not keep the link busy;
    M/B + (n-1) alpha in the limit of small pieces (None)."""
    filling = 0.0 if pieces is None else (n - 2) * size / (pieces * rate)
    return (n - 1) * alpha + size / rate + filling


def scatter_all_gather_broadcast_s(n: int, size: float, alpha: float, rate: float) -> float:
    """(ceil(lg n) + n-1) alpha + 2(n-1)/n M/B (van de Geijn, in Thakur et al. 2005)."""
    return (_lg(n) + n - 1) * alpha + 2.0 * (n - 1) / n * size / rate


def pairwise_all_to_all_s(n: int, size: float, alpha: float, rate: float) -> float:
    """(n-1)(alpha + M/(nB)), M what one rank sends, its own part included (Thakur et al. 2005)."""
    return (n - 1) * (alpha + size / (n * rate))


def _lg(n: int) -> int:
    return (n - 1).bit_length()


def _tree_load(n: int, trees: int) -> float:
    """What the busiest rank sends, in both passes: its edges in all trees, an M/trees each."""
    return min(2.0, n / 2.0) if trees == 2 else float(min(3, n - 1))


# ------------------------------------------------------------------------------------------------ two levels


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoLevels:
    """g ranks (`local`) on each of `nodes` nodes of one kind: what closed forms need of a cluster. `adds`: the switch
    of a node can add up."""

    machine: Machine
    nodes: int
    local: int
    channels: int
    fabric_kind: str
    nodes_per_leaf: int
    hop_latency_s: float
    adds: bool

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.nodes * self.local

    @property
    def lanes(self) -> int:
        """Ranks that share a NIC port."""
        return min(self.local, max(1, self.machine.node.devices // self.machine.node.nic.count))

    def near_rate(self, message: float) -> float:
        """B_i for messages of this size."""
        link = self.machine.interconnect
        if link is None:
            return float("inf")
        return effective_rate(link, message, self.machine.interconnect_rate_bytes_per_s)

    def far_rate(self, message: float) -> float:
        """B_e of one NIC port for messages of this size; that of the PCIe links behind it where these are slower."""
        machine = self.machine
        ports = min(machine.node.devices, machine.node.nic.count)
        port = machine.nic_rate_bytes_per_s * machine.node.nic.count / ports
        if machine.pcie is not None:
            port = min(port, machine.pcie.rate_bytes_per_s * self.lanes)
        return effective_rate(machine.nic, message, port)

    def near_alpha(self) -> float:
        """alpha_i."""
        return alpha_s(self.machine.interconnect) if self.machine.interconnect is not None else 0.0

    def far_alpha(self, block: int | None = None) -> float:
        """alpha_e with the switches on the way: three where it goes over a spine. `block`: the hop stays inside groups
        of so many nodes that follow each other; 0: it goes to other members of nodes, too, which are on other rails."""
        crosses = self.nodes > self.nodes_per_leaf
        if block == 0:
            crosses |= self.fabric_kind == "rail-optimized" and self.local > self.lanes
        elif block is not None:
            crosses = self.nodes_per_leaf % block != 0
        switches = 3 if self.fabric_kind != "one-switch" and crosses and self.nodes > 1 else 1
        return alpha_s(self.machine.nic) + switches * self.hop_latency_s

    def phase(
        self, size: float, message: float, *, near: tuple[float, float] = (0, 0.0), far: tuple[float, float] = (0, 0.0),
        block: int | None = None,
    ) -> float:  # fmt: skip
        """Seconds of one phase: `near` and `far` are the hops, and the bytes (per byte of M) on the busiest link."""
        waits = near[0] * self.near_alpha() + (far[0] * self.far_alpha(block) if far[0] else 0.0)
        inside = near[1] / self.near_rate(size * message)
        return waits + size * max(inside, far[1] / self.far_rate(size * message))


def two_levels(cluster: Cluster, nodes: int, local: int, channels: int | None) -> TwoLevels | None:
    """The levels of a cluster of one kind of nodes without faults; None where there is no closed form."""
    machine = cluster.workers[0]
    if len(cluster.workers) > 1 or cluster.faults or machine.nic.kind == "loopback":
        return None
    inside = machine.node.interconnect
    return TwoLevels(
        machine=machine,
        nodes=nodes,
        local=local,
        channels=channels or local,
        fabric_kind=cluster.fabric.kind,
        nodes_per_leaf=cluster.fabric.nodes_per_leaf,
        hop_latency_s=cluster.fabric.hop_latency_s,
        adds=inside is not None and inside.reduces,
    )


def closed_form_s(kind: CollectiveKind, algorithm: CollectiveAlgorithm, on: TwoLevels, size: float) -> float | None:
    """Seconds by the closed form, launch included; None where there is none (a number of ranks on a node that is no
    power of two, under an algorithm that pairs ranks by powers of two)."""
    if on.ranks == 1:
        return 0.0
    match kind:
        case "all_reduce":
            seconds = _all_reduce_s(algorithm, on, size)
        case "all_gather" | "reduce_scatter":
            seconds = _all_gather_s(algorithm, on, size)
        case "all_to_all":
            seconds = _all_to_all_s(algorithm, on, size)
        case "broadcast" | "reduce":
            seconds = _broadcast_s(algorithm, on, size)
        case "send_recv":
            # Each rank sends to the next: the last of a node to another node, the others meanwhile inside.
            far = (1, 1.0) if on.nodes > 1 else (0, 0.0)
            near = (1 - far[0], 1.0 if on.local > 1 else 0.0)
            seconds = on.phase(size, 1.0, near=near, far=far, block=0)
    if seconds is None:
        return None
    link = on.machine.nic if on.nodes > 1 else on.machine.interconnect
    return seconds + (link.launch_s if link is not None else 0.0)


def _port(on: TwoLevels) -> float:
    """The part of M that the channels through the busiest NIC port carry."""
    ports = -(-on.local // on.lanes)
    return -(-on.channels // ports) / on.channels


def _inside(on: TwoLevels) -> float:
    """The part of M that the busiest link inside a node carries when channels enter it and visit all of it."""
    return 1.0 - on.channels // on.local / on.channels if on.local > 1 else 0.0


def _ring_s(on: TwoLevels, size: float, rounds: int) -> float:
    n = on.ranks
    sent = rounds * (n - 1) / n
    if on.nodes == 1:
        return on.phase(size, 1.0 / n, near=(rounds * (n - 1), sent))
    hops = (rounds * (n - on.nodes), sent * _inside(on))
    return on.phase(size, 1.0 / n, near=hops, far=(rounds * (on.nodes - 1), sent * _port(on)))


def _all_reduce_s(algorithm: CollectiveAlgorithm, on: TwoLevels, size: float) -> float | None:
    g, nodes, n = on.local, on.nodes, on.ranks
    match algorithm:
        case "tree" | "binary-tree":
            trees = 2 if algorithm == "tree" else 1
            if nodes == 1:
                return on.phase(size, 1.0 / trees, near=(2 * _lg(n), _tree_load(n, trees)))
            near, far = (2 * (g - 1), 2.0 * _inside(on)), (2 * _lg(nodes), _tree_load(nodes, trees) * _port(on))
            largest = -(-on.channels // g) / on.channels
            return on.phase(size, largest / trees, near=near, far=far)
        case "hierarchical" if nodes > 1 and g > 1:
            inside = on.phase(size, 1.0 / g, near=(g - 1, (g - 1) / g))
            rails = 2.0 * (nodes - 1) / nodes / g * on.lanes
            return 2.0 * inside + on.phase(size, 1.0 / n, far=(2 * (nodes - 1), rails))
        case "halving-doubling":
            return _exchanges_s(on, size, times=2)
        case "nvls":
            near = (2, 1.0) if g > 1 else (0, 0.0)
            if nodes == 1:
                return on.phase(size, 1.0 / g, near=near)
            far = (2 * _lg(nodes), _tree_load(nodes, 2) / g * on.lanes)
            return on.phase(size, 0.5 / g, near=near, far=far)
        case "sharp":
            near = (2, 1.0) if on.adds else (2 * (g - 1), 2.0 * (g - 1) / g)
            return on.phase(size, 1.0 / g, near=near if g > 1 else (0, 0.0), far=(2, on.lanes / g))
        case _:
            return _ring_s(on, size, rounds=2)


def _all_gather_s(algorithm: CollectiveAlgorithm, on: TwoLevels, size: float) -> float | None:
    g, nodes, n = on.local, on.nodes, on.ranks
    rails = (nodes - 1, (nodes - 1) / nodes / g * on.lanes)
    match algorithm:
        case "hierarchical" if nodes > 1 and g > 1:
            return on.phase(size, 1.0 / g, near=(g - 1, (g - 1) / g)) + on.phase(size, 1.0 / n, far=rails)
        case "halving-doubling":
            return _exchanges_s(on, size, times=1)
        case "nvls":
            return on.phase(size, 1.0 / n, near=(1, 1.0), far=rails if nodes > 1 else (0, 0.0))
        case _:
            return _ring_s(on, size, rounds=1)


def _exchanges_s(on: TwoLevels, size: float, times: int) -> float | None:
    """Halving and doubling, distance by distance: inside a node up to g/2, through the NICs from g on."""
    g, n = on.local, on.ranks
    if g & (g - 1) and on.nodes > 1:
        return None
    power = 1 << (n.bit_length() - 1)
    total, distance = 0.0, 1
    while distance < power:
        share = 0.5 / distance
        if distance < g:
            total += on.phase(size, share, near=(times, times * share))
        else:
            total += on.phase(size, share, far=(times, times * share * on.lanes), block=2 * distance // g)
        distance *= 2
    if power == n:
        return total
    folded = on.phase(size, 1.0, near=(1, 1.0)) if on.nodes == 1 else on.phase(size, 1.0, far=(1, on.lanes))
    return total + 2.0 * folded


def _all_to_all_s(algorithm: CollectiveAlgorithm, on: TwoLevels, size: float) -> float:
    g, nodes, n = on.local, on.nodes, on.ranks
    if algorithm == "per-rail" and nodes > 1 and g > 1:
        inside = on.phase(size, 1.0 / g, near=(g - 1, (g - 1) / g))
        return inside + on.phase(size, 1.0 / nodes, far=(nodes - 1, (nodes - 1) / nodes * on.lanes))
    return on.phase(size, 1.0 / n, near=(g - 1, (g - 1) / n), far=(n - g, (n - g) / n * on.lanes), block=0)


def _broadcast_s(algorithm: CollectiveAlgorithm, on: TwoLevels, size: float) -> float | None:
    g, nodes, n = on.local, on.nodes, on.ranks
    if algorithm == "chain":
        near = (n - nodes, 1.0) if g > 1 else (0, 0.0)
        return on.phase(size, 1.0 / n, near=near, far=(nodes - 1, _port(on)) if nodes > 1 else (0, 0.0))
    if g & (g - 1) and nodes > 1:
        return None
    total, distance = 0.0, 1 << (_lg(n) - 1)
    while distance:
        share = min(distance, n - distance) / n if algorithm == "scatter-allgather" else 1.0
        if distance < g:
            total += on.phase(size, share, near=(1, share))
        else:
            total += on.phase(size, share, far=(1, share), block=2 * distance // g)
        distance //= 2
    return total + _ring_s(on, size, rounds=1) if algorithm == "scatter-allgather" else total
