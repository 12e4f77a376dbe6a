"""Seconds of a forward and a backward pass through a layer, by division: kernels, host, and collectives inside."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.hardware.cost import DeviceCosts, device_costs
from clustersim.hardware.curve import alpha_s, effective_rate
from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import Dtype, Kernels, linear_layers
from clustersim.hardware.scaled import device_s
from clustersim.layout.divisions import RECOMPUTES, SCHEDULES, Divisions
from clustersim.layout.schedule import splits_backward
from clustersim.workload.activations import (
    Exchange,
    embedding_collectives,
    ep_collectives,
    head_collectives,
    tp_collectives,
)
from clustersim.workload.block import Block
from clustersim.workload.head import Head
from clustersim.workload.layer_kernels import (
    accumulation_of,
    backward,
    embedding_backward,
    embedding_forward,
    embedding_weight_gradients,
    forward,
    head_backward,
    head_forward,
    head_weight_gradients,
    layer_weight_gradients,
    recomputed,
    without,
)
from clustersim.workload.parameters import Held
from clustersim.workload.ring import ring_shifts
from clustersim.workload.sharding_kernels import sharding_of
from clustersim.workload.training import Workload

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Passes:
    """Seconds by division: one layer, the embedding and the head forward and backward, and the part of a layer's two
    passes that is communication within them. `weights`: gradients of weights, where the schedule splits them off; they
    are in `backward` otherwise. `coverage`: measured fraction of kernel time."""

    forward: Floats
    backward: Floats
    embedding_forward: Floats
    embedding_backward: Floats
    head_forward: Floats
    head_backward: Floats
    weights: Floats
    embedding_weights: Floats
    head_weights: Floats
    tensor_parallel: Floats
    coverage: Floats


def passes(
    workload: Workload,
    divisions: Divisions,
    gradient: Dtype,
    cluster: Cluster,
    framework: Framework,
    shards_gradients: bool,
    shards_weights: bool,
) -> Passes:
    """Prices of every distinct (tp, micro-batch, sequence parallel, recompute, cp, ep, split or whole backward pass,
    gradients summed or not, weights copied or not); one kernel sum each. `gradient`: the type in which gradients are
    summed. Sharded gradients are reduced after every micro-batch instead of summed, sharded weights gathered for every
    pass."""
    slowest = [device_costs(machine.device.name) for machine in cluster.workers if machine.device is not None]
    known: dict[tuple[int, ...], tuple[float, ...]] = {}
    rows = np.empty((11, len(divisions)))
    splitting = np.array([splits_backward(schedule) for schedule in SCHEDULES])[divisions.schedule]
    # How far apart neighbouring replicas are; without groups of them in a pass, that plays no role.
    apart = np.where(divisions.order == 0, divisions.tp, divisions.tp * divisions.pp)
    gathered = (divisions.replicas > 1) & shards_weights
    columns = (
        divisions.tp, divisions.micro_batch, divisions.sequence_parallel.astype(np.int64), divisions.recompute,
        divisions.cp, divisions.ep, np.where((divisions.cp > 1) | (divisions.ep > 1), apart, 0), splitting,
        (divisions.micro_batches > 1) & (not shards_gradients), gathered != (framework.unsharding == "autocast"),
    )  # fmt: skip
    for index, key in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        if key not in known:
            prices = [
                _price(workload, gradient, framework, machine, costs, cluster, *key)
                for machine, costs in zip(cluster.workers, slowest, strict=True)
            ]
            known[key] = max(prices)
        rows[:, index] = known[key]
    return Passes(
        forward=rows[0], backward=rows[1], embedding_forward=rows[2], embedding_backward=rows[3],
        head_forward=rows[4], head_backward=rows[5], weights=rows[6], embedding_weights=rows[7], head_weights=rows[8],
        tensor_parallel=rows[9], coverage=rows[10],
    )  # fmt: skip


def _price(
    workload: Workload,
    gradient: Dtype,
    framework: Framework,
    machine: Machine,
    costs: DeviceCosts,
    cluster: Cluster,
    tp: int,
    micro_batch: int,
    sp: int,
    recompute: int,
    cp: int,
    ep: int,
    apart: int,
    splitting: bool,
    summed: bool,
    copied: bool,
) -> tuple[float, ...]:
    model, training = workload.model, workload.training
    dtype = training.precision
    policy = RECOMPUTES[recompute]
    block = Block.of(
        workload, framework, micro_batch=micro_batch, tp=tp, sequence_parallel=bool(sp), cp=cp, ep=ep, dtype=dtype
    )  # fmt: skip
    head = Head.of(block, training, framework)
    parts: list[Kernels] = [
        forward(block),
        backward(block) + recomputed(block, policy, framework.selective),
        embedding_forward(block),
        embedding_backward(block),
        head_forward(head),
        head_backward(head),
    ]
    everything = parts[0] + parts[1]
    weights: list[Kernels] = [(), (), ()]
    if splitting:
        weights = [layer_weight_gradients(block), embedding_weight_gradients(block), head_weight_gradients(head)]
        for index, taken in zip((1, 3, 5), weights, strict=True):
            parts[index] = without(parts[index], taken)
    parts += weights
    for index, (layers, first, last) in enumerate(((1, False, False), (0, True, False), (0, False, True))):
        held = Held(model=model, layers=layers, first=first, last=last, tp=tp, ep=ep)
        behind = 6 + index if splitting else 1 + 2 * index
        if summed:
            parts[behind] += accumulation_of(held, dtype=dtype, gradient=gradient, how=framework.gradient_accumulation)
        # A tied head is gathered with the embedding.
        if copied and not (last and model.tied):
            ahead, after = sharding_of(held, dtype=dtype, gradient=gradient, how=framework.unsharding)
            parts[2 * index] += ahead
            parts[behind] += after
    ends = *embedding_collectives(block), *head_collectives(block)
    exchanges: tuple[tuple[Exchange, ...], ...] = (*tp_collectives(block, policy), *ends, (), (), ())
    shared = _sharing(machine)
    device = [device_s(costs, part, framework) * shared for part in parts]
    network = [
        sum(item.times * ring_s(machine, cluster, tp, item.kind, item.bytes) for item in items)
        * framework.collective_scale("tp")
        for items in exchanges
    ]
    overlap = framework.overlap.tensor_parallel
    for index, items in enumerate(exchanges if overlap and sp else ()):
        # Gathers and scatters in pieces beside the linear layers that consume or produce them.
        pieces = sum(
            item.times * ring_s(machine, cluster, tp, item.kind, item.bytes)
            for item in items if item.kind in ("all_gather", "reduce_scatter")
        )  # fmt: skip
        beside = device_s(costs, linear_layers(parts[index]), framework) * shared
        # Kernels run slower while something is under way: what that adds is exposed in any case.
        hidden = min(overlap * pieces * framework.collective_scale("tp"), beside)
        network[index] -= hidden / framework.overlap.compute_slowdown
    collectives = [sum(item.times for item in items) for items in exchanges]
    for way, items in enumerate(ep_collectives(block, policy)):
        collectives[way] += sum(item.times for item in items)
        each = (item.times * all_to_all_s(machine, cluster, ep, apart, item.bytes) for item in items)
        network[way] += sum(each) * framework.network_scale
    for way, shifts in enumerate(ring_shifts(block, policy)):
        for shift in shifts:
            sent = shift_s(machine, cluster, cp, apart, shift.bytes) * framework.network_scale
            hidden = device_s(costs, shift.beside, framework) * shared
            slowed = sent * (1.0 - 1.0 / framework.overlap.compute_slowdown)
            network[way] += shift.times * max(slowed, sent - hidden)
            collectives[way] += shift.times
    host = framework.host
    launch = costs.device.launch_overhead_s * shared
    driven = [sum(count for _, count in part) * launch for part in parts]
    rerun = host.per_layer_forward_s if policy == "full" else 0.0
    driven[0] = max(driven[0], host.per_layer_forward_s * shared)
    backward_s = host.per_layer_backward_s * (0.5 if splitting else 1.0)
    driven[1] = max(driven[1], (backward_s + rerun) * shared)
    if splitting:
        driven[6] = max(driven[6], backward_s * shared)
    driven = [d + n * host.per_collective_s * shared for d, n in zip(driven, collectives, strict=True)]
    # A CPU drives itself: its work and the framework's take turns on the same cores.
    in_turn = costs.device.kind == "cpu" or host.blocking_launches
    seconds = [d + n + h if in_turn else max(d + n, h) for d, n, h in zip(device, network, driven, strict=True)]
    return (*seconds, network[0] + network[1], costs.coverage(everything))


def _sharing(machine: Machine) -> float:
    """How much slower ranks are that share their host's cores."""
    table = machine.node.host.rank_slowdown
    return table[min(machine.node.devices, len(table)) - 1] if table else 1.0


def ring_s(machine: Machine, cluster: Cluster, ranks: int, kind: str, size: float) -> float:
    """Seconds of a ring collective among `ranks` neighbouring ranks: measured inside a node where the profile has it,
    2(n-1)(alpha + M/(nB)) for an allreduce and half of it for the others (Patarasuk & Yuan 2009) otherwise.

    Ranks of several nodes: the bytes that leave a node share its NICs with those of the node's other groups.
    """
    if ranks == 1:
        return 0.0
    g = machine.node.devices
    rounds = 2 if kind == "all_reduce" else 1
    local = min(ranks, g)
    if ranks <= g:
        if machine.collectives is not None:
            measured = machine.collectives.seconds(kind, ranks, size)  # type: ignore[arg-type]
            if measured is not None:
                return measured
        link = machine.interconnect or machine.nic
        rate = effective_rate(link, size / ranks) * machine.interconnect_rate_bytes_per_s / link.rate_bytes_per_s
        steps = rounds * (ranks - 1)
        return link.launch_s + steps * (alpha_s(link) + size / ranks / rate)
    nodes = -(-ranks // local)
    nic = machine.nic
    total = machine.nic_rate_bytes_per_s * machine.node.nic.count * effective_rate(nic, size / ranks)
    port = total / nic.rate_bytes_per_s / g
    bytes_each = rounds * (ranks - 1) / ranks * size / local
    inside = machine.interconnect
    near = rounds * (ranks - nodes) * alpha_s(inside) if inside is not None else 0.0
    far = rounds * (nodes - 1) * (alpha_s(nic) + 3 * cluster.fabric.hop_latency_s)
    return nic.launch_s + near + far + bytes_each / port


def _neighbours(machine: Machine, ranks: int, apart: int) -> int:
    """How many of `ranks` that follow each other, `apart` numbers from one to the next, share a node."""
    g = machine.node.devices
    return math.gcd(ranks, g // apart) if g % apart == 0 else 1


def _near(machine: Machine, message: float) -> tuple[float, float]:
    """(alpha, rate) inside a node for messages of this size."""
    link = machine.interconnect or machine.nic
    rate = effective_rate(link, message) * machine.interconnect_rate_bytes_per_s / link.rate_bytes_per_s
    return alpha_s(link), float(rate)


def _far(machine: Machine, cluster: Cluster, message: float) -> tuple[float, float]:
    """(alpha, rate of one device) between nodes, when all devices of a node send at once."""
    nic = machine.nic
    total = machine.nic_rate_bytes_per_s * machine.node.nic.count * effective_rate(nic, message) / nic.rate_bytes_per_s
    return alpha_s(nic) + 3 * cluster.fabric.hop_latency_s, float(total / machine.node.devices)


def all_to_all_s(machine: Machine, cluster: Cluster, ranks: int, apart: int, size: float) -> float:
    """Seconds of an all-to-all in which every rank has `size` bytes for all `ranks` together, itself included.

    (n-1)(alpha + M/(nB)) inside a node, measured where the profile has it; over nodes of k members each the (n-k) M/n
    bytes for other nodes go through a device's share of the NICs while (k-1) M/n stay inside.
    """
    if ranks == 1:
        return 0.0
    k = _neighbours(machine, ranks, apart)
    near_alpha, near_rate = _near(machine, size / ranks)
    if k == ranks:
        measured = machine.collectives.seconds("all_to_all", ranks, size) if machine.collectives is not None else None
        if measured is not None:
            return measured
        link = machine.interconnect or machine.nic
        return link.launch_s + (ranks - 1) * (near_alpha + size / ranks / near_rate)
    far_alpha, far_rate = _far(machine, cluster, size / ranks)
    moved = max((ranks - k) * size / ranks / far_rate, (k - 1) * size / ranks / near_rate)
    return machine.nic.launch_s + (k - 1) * near_alpha + (ranks - k) * far_alpha + moved


def shift_s(machine: Machine, cluster: Cluster, ranks: int, apart: int, size: float) -> float:
    """Seconds in which each of `ranks` sends `size` bytes to the next, the last one to the first."""
    inside = _neighbours(machine, ranks, apart) == ranks
    link = (machine.interconnect or machine.nic) if inside else machine.nic
    alpha, rate = _near(machine, size) if inside else _far(machine, cluster, size)
    return link.launch_s + alpha + size / rate
