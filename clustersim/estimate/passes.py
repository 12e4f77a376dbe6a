"""Seconds of one forward and one backward pass through a layer, by division: kernels, host and tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.hardware.cost import DeviceCosts, device_costs
from clustersim.hardware.curve import alpha_s, effective_rate
from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import BYTES_OF, Kernels
from clustersim.layout.space import RECOMPUTES, Divisions
from clustersim.workload.activations import embedding_collectives, head_collectives, tp_collectives
from clustersim.workload.layer_kernels import (
    backward,
    embedding_backward,
    embedding_forward,
    forward,
    head_backward,
    head_forward,
    recomputed,
)
from clustersim.workload.training import Workload

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Passes:
    """Seconds by division: one layer forward and backward, the embedding and the head (both passes together), and the
    part of a layer's two passes that is tensor-parallel communication. `coverage`: measured fraction of kernel time."""

    forward: Floats
    backward: Floats
    embedding_forward: Floats
    embedding_backward: Floats
    head_forward: Floats
    head_backward: Floats
    tensor_parallel: Floats
    coverage: Floats


def passes(workload: Workload, divisions: Divisions, cluster: Cluster, framework: Framework) -> Passes:
    """Prices of every distinct (tp, micro-batch, sequence parallel, recompute); one kernel sum each."""
    slowest = [device_costs(machine.device.name) for machine in cluster.workers if machine.device is not None]
    known: dict[tuple[int, int, int, int], tuple[float, ...]] = {}
    rows = np.empty((8, len(divisions)))
    columns = (divisions.tp, divisions.micro_batch, divisions.sequence_parallel.astype(np.int64), divisions.recompute)
    for index, key in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        if key not in known:
            prices = [
                _price(workload, framework, machine, costs, cluster, *key)
                for machine, costs in zip(cluster.workers, slowest, strict=True)
            ]
            known[key] = max(prices)
        rows[:, index] = known[key]
    return Passes(
        forward=rows[0], backward=rows[1], embedding_forward=rows[2], embedding_backward=rows[3],
        head_forward=rows[4], head_backward=rows[5], tensor_parallel=rows[6], coverage=rows[7],
    )  # fmt: skip


def _price(
    workload: Workload,
    framework: Framework,
    machine: Machine,
    costs: DeviceCosts,
    cluster: Cluster,
    tp: int,
    micro_batch: int,
    sp: int,
    recompute: int,
) -> tuple[float, ...]:
    model, sequence = workload.model, workload.training.sequence
    dtype = workload.training.precision
    attention, fused = framework.attention, framework.fused_elementwise
    policy = RECOMPUTES[recompute]
    shape = (model, sequence, micro_batch, tp, bool(sp))
    again = recomputed(*shape, attention, fused, dtype, policy)
    parts: list[Kernels] = [
        forward(*shape, attention, fused, dtype),
        backward(*shape, attention, fused, dtype) + again,
        embedding_forward(*shape, dtype),
        embedding_backward(*shape, dtype),
        head_forward(*shape, fused, dtype),
        head_backward(*shape, fused, dtype),
    ]
    width = BYTES_OF[dtype]
    layer = tp_collectives(*shape, policy, width)
    embedding, head = embedding_collectives(*shape, width), head_collectives(*shape, width)
    exchanges = (*layer, *embedding, *head)
    shared = _sharing(machine)
    device = [costs.seconds(part) * framework.compute_scale * shared for part in parts]
    network = [
        sum(item.times * ring_s(machine, cluster, tp, item.kind, item.bytes) for item in items)
        * framework.network_scale
        for items in exchanges
    ]
    host = framework.host
    launch = costs.device.launch_overhead_s * shared
    driven = [sum(count for _, count in part) * launch for part in parts]
    rerun = host.per_layer_forward_s if policy == "full" else 0.0
    driven[0] = max(driven[0], host.per_layer_forward_s * shared)
    driven[1] = max(driven[1], (host.per_layer_backward_s + rerun) * shared)
    # A CPU drives itself: its work and the framework's take turns on the same cores.
    itself = costs.device.kind == "cpu"
    seconds = [d + n + h if itself else max(d + n, h) for d, n, h in zip(device, network, driven, strict=True)]
    everything = parts[0] + parts[1]
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
