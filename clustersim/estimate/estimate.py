"""estimate(): the step time of every layout at once, from closed forms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, Machine, SlowRank
from clustersim.estimate.passes import Passes, passes
from clustersim.hardware.cost import device_costs
from clustersim.hardware.curve import alpha_s, effective_rate
from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import BYTES_OF
from clustersim.layout.layout import AllReduce, ParameterServer, Scheme, Sharded
from clustersim.layout.memory import StateBytes
from clustersim.layout.space import Divisions, Space, local_peers
from clustersim.workload.activations import boundary_bytes
from clustersim.workload.layer_kernels import optimizer_kernels
from clustersim.workload.parameters import stage_parameters
from clustersim.workload.training import Workload

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Estimate:
    """Seconds by row: the step and what it is made of. `busy` is the slowest stage's compute (with its tensor-parallel
    communication), `bubble` the time that stages wait for each other, `exposed` synchronisation that nothing hides,
    `synchronise` all of it, hidden or not."""

    step_s: Floats
    busy_s: Floats
    bubble_s: Floats
    exposed_s: Floats
    synchronise_s: Floats
    coverage: Floats


def estimate(workload: Workload, space: Space, cluster: Cluster, framework: Framework) -> Estimate:
    """The step time of every row of `space`.

    Pipeline: the slowest stage runs its micro-batches, the others' passes fill and drain it, over v with virtual stages
    (theory: P12). Synchronisation overlaps with the last backward pass of a stage as far as the framework lets it; what
    is left, and the last bucket, is exposed. Independent of the simulator's schedules and networks. O(rows).
    """
    divisions = space.divisions
    priced = passes(workload, divisions, cluster, framework)
    slow = _straggling(cluster)
    pipeline = _pipeline(workload, divisions, priced, cluster, framework, slow)
    row = space.division
    elements = _stage_elements(workload, divisions)
    step = np.empty(len(space))
    exposed = np.empty(len(space))
    synchronise = np.empty(len(space))
    for index, scheme in enumerate(space.schemes):
        rows = np.flatnonzero(space.scheme == index)
        if not len(rows):
            continue
        at = row[rows]
        total, tail, hideable = _synchronise(scheme, workload, space, at, elements[at], cluster, framework)
        window = pipeline.last_backward[at] if hideable else np.zeros(len(at))
        shown = np.maximum(total - window, tail)
        stepping = _optimizer_s(scheme, workload, space, at, elements[at], cluster)
        exposed[rows] = shown
        synchronise[rows] = total
        host = framework.host
        step[rows] = pipeline.total[at] + shown + stepping + host.per_step_s
    return Estimate(
        step_s=step,
        busy_s=pipeline.busy[row],
        bubble_s=pipeline.total[row] - pipeline.busy[row],
        exposed_s=exposed,
        synchronise_s=synchronise,
        coverage=priced.coverage[row],
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _PipelineTimes:
    total: Floats
    busy: Floats
    last_backward: Floats


def _straggling(cluster: Cluster) -> float:
    return max((fault.slowdown for fault in cluster.faults if isinstance(fault, SlowRank)), default=1.0)


def _pipeline(
    workload: Workload, d: Divisions, p: Passes, cluster: Cluster, framework: Framework, slow: float
) -> _PipelineTimes:
    layers = workload.model.layers
    most, least = -(-layers // d.pp), layers // d.pp
    both = (p.forward + p.backward) * slow
    micro = framework.host.per_micro_batch_s
    first = most * both + p.embedding_forward + p.embedding_backward
    last = least * both + p.head_forward + p.head_backward
    single = layers * both + p.embedding_forward + p.embedding_backward + p.head_forward + p.head_backward
    slowest = np.where(d.pp == 1, single, np.maximum(np.maximum(first, last), most * both))
    summed = layers * both + p.embedding_forward + p.embedding_backward + p.head_forward + p.head_backward
    send = _send_s(workload, d, cluster, framework)
    chunks = d.virtual_stages
    hops = np.where(d.pp > 1, 2.0 * chunks, 0.0)
    computing = slowest + micro
    # Sends that run beside compute still have to get through the stage's cards.
    each = np.maximum(computing, hops * send) if framework.overlap.pipeline_send else computing + hops * send
    fill = (summed - slowest) / chunks + (d.pp - 1) * (2.0 * send + micro / chunks)
    busy = np.asarray(d.micro_batches * each, dtype=np.float64)
    last_backward = np.where(d.pp == 1, layers, least) * p.backward * slow / chunks
    return _PipelineTimes(total=busy + fill, busy=busy, last_backward=last_backward)


def _send_s(workload: Workload, d: Divisions, cluster: Cluster, framework: Framework) -> Floats:
    """Seconds of one activation transfer between neighbouring stages."""
    machine = cluster.workers[0]
    width = BYTES_OF[workload.training.precision]
    result = np.zeros(len(d))
    known: dict[tuple[int, ...], float] = {}
    keys = zip(
        d.tp.tolist(), d.pp.tolist(), d.dp.tolist(), d.micro_batch.tolist(), d.sequence_parallel.tolist(),
        d.order.tolist(), strict=True,
    )  # fmt: skip
    for index, (tp, pp, dp, size, sp, order) in enumerate(keys):
        if pp == 1:
            continue
        stride = tp * dp if order == 0 else tp
        near = stride < machine.node.devices and (order == 1 or tp * dp * pp <= machine.node.devices)
        key = (tp, size, int(sp), int(near))
        if key not in known:
            whole = boundary_bytes(workload.model, workload.training.sequence, size, width)
            sent = whole / tp if framework.scatter_gather or sp else float(whole)
            link = (machine.interconnect or machine.nic) if near else machine.nic
            rate = effective_rate(link, sent)
            if not near:
                ports = min(machine.node.devices, machine.node.nic.count)
                rate *= machine.nic_rate_bytes_per_s * machine.node.nic.count / ports / link.rate_bytes_per_s
                rate *= ports / machine.node.devices
            known[key] = (link.launch_s + alpha_s(link) + sent / rate) * framework.network_scale
        result[index] = known[key]
    return result


def _stage_elements(workload: Workload, d: Divisions) -> Floats:
    """Parameters of the fullest stage on one tensor-parallel rank."""
    known: dict[tuple[int, int], float] = {}
    result = np.empty(len(d))
    layers = workload.model.layers
    for index, (tp, pp) in enumerate(zip(d.tp.tolist(), d.pp.tolist(), strict=True)):
        if (tp, pp) not in known:
            ends = [(True, pp == 1, -(-layers // pp)), (pp == 1, True, layers // pp)]
            known[tp, pp] = float(
                max(stage_parameters(workload.model, range(n), first=f, last=e, tp=tp) for f, e, n in ends)
            )
        result[index] = known[tp, pp]
    return result


def _optimizer_s(
    scheme: Scheme, workload: Workload, space: Space, at: Ints, elements: Floats, cluster: Cluster
) -> Floats:
    if isinstance(scheme, ParameterServer) and scheme.optimizer_at == "server":
        return np.zeros(len(at))
    shards = space.divisions.dp[at] if isinstance(scheme, Sharded) else np.ones(len(at))
    device = cluster.workers[0].device
    assert device is not None
    costs = device_costs(device.name)
    sizes, inverse = np.unique(np.ceil(elements / shards).astype(np.int64), return_inverse=True)
    seconds = [
        costs.seconds(optimizer_kernels(int(n), space.precision.compute, workload.training.optimizer)) for n in sizes
    ]
    return np.array(seconds)[inverse]


def _synchronise(
    scheme: Scheme, workload: Workload, space: Space, at: Ints, elements: Floats, cluster: Cluster, framework: Framework
) -> tuple[Floats, Floats, bool]:
    """(all seconds, seconds of the bucket that nothing can hide, whether the framework overlaps the rest), by row."""
    d = space.divisions
    machine = cluster.workers[0]
    gradient = BYTES_OF[space.precision.gradient]
    weight = StateBytes.of(space.precision, workload.training.optimizer).weights
    whole = elements * gradient
    layers = np.maximum(1, workload.model.layers // (d.pp[at] * d.virtual_stages[at]))
    buckets = np.maximum(1.0, np.minimum(whole / scheme.bucket_bytes, layers * d.virtual_stages[at]))
    dp = d.dp[at]
    local = local_peers(d, cluster.devices_per_node)[at]
    scale = framework.network_scale
    match scheme:
        case AllReduce():
            total = _allreduce_s(scheme.algorithm, machine, cluster, dp, local, whole, buckets)
            total = np.where(dp > 1, total, 0.0) * scale
            return total, total / buckets, framework.overlap.gradient_reduce and scheme.overlap
        case Sharded():
            reduce = 0.5 * _allreduce_s("ring", machine, cluster, dp, local, whole, buckets) * scale
            gather = 0.5 * _allreduce_s("ring", machine, cluster, dp, local, elements * weight, buckets) * scale
            count = d.micro_batches[at]
            overlaps = framework.overlap.gradient_reduce and scheme.overlap
            if scheme.stage == 1:
                seen = 0.0 if framework.overlap.parameter_gather else 1.0
                return reduce + seen * gather, seen * gather + reduce / buckets, overlaps
            if scheme.stage == 2:
                seen = 0.0 if framework.overlap.parameter_gather else 1.0
                return count * reduce + seen * gather, seen * gather + reduce / buckets, overlaps
            return count * (reduce + 2.0 * gather), (reduce + gather) / buckets, overlaps
        case ParameterServer():
            total = _server_s(scheme, machine, cluster, space, at, elements, local, gradient, weight) * scale
            pieces = np.maximum(buckets, whole / scheme.partition_bytes / np.maximum(local, 1))
            return total, total / np.minimum(pieces, buckets * 8), framework.overlap.gradient_reduce


def _port_rate(machine: Machine, message: Floats) -> Floats:
    """Network rate of one device when all devices of its node send at once."""
    rate = machine.nic_rate_bytes_per_s * machine.node.nic.count / machine.node.devices
    return np.asarray(rate * effective_rate(machine.nic, message) / machine.nic.rate_bytes_per_s)


def _allreduce_s(
    algorithm: str, machine: Machine, cluster: Cluster, dp: Ints, local: Ints, size: Floats, buckets: Floats
) -> Floats:
    """Seconds of the allreduce of `size` bytes a rank in `buckets` pieces, all groups of all nodes at once."""
    n = dp.astype(np.float64)
    k = np.minimum(local, dp).astype(np.float64)
    nodes = np.maximum(1.0, n / k)
    nic, inside = machine.nic, machine.interconnect
    message = size / buckets / n
    far_rate = _port_rate(machine, message)
    near_rate = np.full(len(n), np.inf)
    near_alpha = 0.0
    if inside is not None:
        near_rate = machine.interconnect_rate_bytes_per_s * effective_rate(inside, message) / inside.rate_bytes_per_s
        near_alpha = alpha_s(inside)
        if nic.kind == "loopback":
            # All ranks of one host share its memory: the bus carries every rank's bytes.
            near_rate = near_rate / n
    far_alpha = alpha_s(nic) + 3 * cluster.fabric.hop_latency_s
    launch = np.where(nodes > 1, nic.launch_s, inside.launch_s if inside is not None else 0.0)
    ring = 2.0 * (n - 1.0) / n * size
    if algorithm == "tree":
        depth = np.ceil(np.log2(np.maximum(nodes, 2.0)))
        waits = 2.0 * (depth * far_alpha + (k - 1.0) * near_alpha)
        bandwidth = np.maximum(np.where(nodes > 1, 2.0 * size / k / far_rate, 0.0), 2.0 * size / near_rate)
    elif algorithm == "hierarchical":
        waits = 2.0 * (k - 1.0) * near_alpha + 2.0 * (nodes - 1.0) * far_alpha
        across = 2.0 * (nodes - 1.0) / nodes * size / k / far_rate
        bandwidth = 2.0 * (k - 1.0) / k * size / near_rate + across
    elif algorithm == "halving-doubling":
        inner, outer = np.ceil(np.log2(np.maximum(k, 1.0))), np.ceil(np.log2(np.maximum(nodes, 1.0)))
        waits = 2.0 * (inner * near_alpha + outer * far_alpha)
        across = 2.0 * (nodes - 1.0) / nodes * size / k / far_rate
        bandwidth = 2.0 * (k - 1.0) / k * size / near_rate + across
    else:
        waits = 2.0 * ((n - nodes) * near_alpha + (nodes - 1.0) * far_alpha)
        across = np.where(nodes > 1, ring / k / far_rate, 0.0)
        bandwidth = np.maximum(across, ring * np.where(nodes > 1, (k - 1.0) / k, 1.0) / near_rate)
    analytic = buckets * (launch + waits) + bandwidth
    if machine.collectives is None or not bool((nodes == 1).any()):
        return np.asarray(analytic)
    for index in np.flatnonzero(nodes == 1):
        measured = machine.collectives.seconds("all_reduce", int(n[index]), float(size[index] / buckets[index]))
        if measured is not None:
            analytic[index] = buckets[index] * measured
    return np.asarray(analytic)


def _server_s(
    scheme: ParameterServer,
    machine: Machine,
    cluster: Cluster,
    space: Space,
    at: Ints,
    elements: Floats,
    local: Ints,
    gradient: int,
    weight: int,
) -> Floats:
    """Seconds of pushing and pulling everything: the busiest of worker ports, server ports and server memory.

    Push and pull overlap (full duplex) where they use different directions; a co-located node sends its pushes and its
    replies over the same one (Jiang et al., OSDI'20: M + (n - 2) M_G per direction).
    """
    d = space.divisions
    tp, pp = d.tp[at].astype(np.float64), d.pp[at].astype(np.float64)
    peers = np.minimum(local, d.dp[at]).astype(np.float64)
    pushed = elements * gradient / peers
    pulled = elements * (weight if scheme.optimizer_at == "server" else gradient) / peers
    message = np.full(len(at), min(scheme.partition_bytes, 1e12))
    port = _port_rate(machine, message)
    ranks = d.dp[at] * tp * pp
    pushes, pulls = pushed * ranks, pulled * ranks
    own = scheme.colocated_parts / scheme.parts
    hosts = scheme.dedicated_parts / scheme.parts
    worker = np.maximum(pushed, pulled) * (1.0 - own) / port
    nodes = max(1, cluster.worker_nodes)
    if scheme.colocated:
        node_rate = port * machine.node.devices
        if machine.nic.kind == "loopback":
            share = 1.0 - 1.0 / max(1, scheme.colocated) if not scheme.dedicated else 1.0
            bus = machine.nic_rate_bytes_per_s * effective_rate(machine.nic, message) / machine.nic.rate_bytes_per_s
            worker = (pushes + pulls) * share / bus
        else:
            out = (pushes / nodes) * (1.0 - own) + own * pulls * (1.0 - 1.0 / nodes)
            worker = np.maximum(worker, out / node_rate)
    seconds = worker
    host_bytes = np.maximum(pushes, pulls)
    if scheme.dedicated:
        server = cluster.servers[0]
        if machine.nic.kind == "loopback":
            rate = machine.nic_rate_bytes_per_s * effective_rate(machine.nic, message) / machine.nic.rate_bytes_per_s
            seconds = np.maximum(seconds, (pushes + pulls) / rate)
        else:
            whole_rate = server.nic_rate_bytes_per_s * server.node.nic.count
            host_rate = whole_rate * effective_rate(server.nic, message) / server.nic.rate_bytes_per_s
            seconds = np.maximum(seconds, hosts * host_bytes / host_rate)
        memory = server.node.host
        seconds = np.maximum(seconds, hosts * pushes / memory.reduce_rate_bytes_per_s)
    if scheme.colocated:
        seconds = np.maximum(seconds, own * pushes / machine.node.host.reduce_rate_bytes_per_s)
    if bool((peers > 1).any()) and machine.interconnect is not None:
        near = machine.interconnect_rate_bytes_per_s * effective_rate(machine.interconnect, elements)
        near = near / machine.interconnect.rate_bytes_per_s
        inside = (peers - 1.0) / peers * elements * (gradient + weight) / near
        seconds = seconds + np.where(peers > 1, inside, 0.0)
    return seconds
