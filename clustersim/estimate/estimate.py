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
from clustersim.workload.model import vocab_per_rank
from clustersim.workload.parameters import stage_parameters
from clustersim.workload.training import STATE_TENSORS, Workload

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
    (P12). Synchronisation overlaps with compute as far as the framework lets it: the last backward pass of a stage
    hides its reduction, the drain of the pipeline the work of servers for later stages; what is left, and the last
    bucket, is exposed. Independent of the simulator's schedules and networks. O(rows).
    """
    divisions = space.divisions
    priced = passes(workload, divisions, cluster, framework)
    slow = _straggling(cluster)
    pipeline = _pipeline(workload, space, priced, cluster, framework, slow)
    row = space.division
    elements, mean_elements = _stage_elements(workload, space)
    tied = _tied_s(workload, space, cluster, framework)
    step = np.empty(len(space))
    exposed = np.empty(len(space))
    synchronise = np.empty(len(space))
    for index, scheme in enumerate(space.schemes):
        rows = np.flatnonzero(space.scheme == index)
        if not len(rows):
            continue
        at = row[rows]
        asked = _Asked(
            workload=workload, space=space, cluster=cluster, framework=framework, at=at, elements=elements[at],
            mean_elements=mean_elements[at],
        )  # fmt: skip
        total, shown = _synchronise(scheme, asked, pipeline)
        stepping = _optimizer_s(scheme, workload, space, at, elements[at], cluster)
        exposed[rows] = shown + tied[at]
        synchronise[rows] = total + tied[at]
        step[rows] = pipeline.total[at] + shown + tied[at] + stepping + framework.host.per_step_s
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
    """Seconds by division. `window`: from the first gradients of the first stage's last micro-batch to the end of its
    backward pass; `drain`: by how much earlier the last stage is done; `opening`: how long after a step's begin the
    last weights of a stage may arrive; `forward` and `backward`: one micro-batch through one stage."""

    total: Floats
    busy: Floats
    window: Floats
    drain: Floats
    opening: Floats
    forward: Floats
    backward: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Asked:
    """The rows of one scheme: `at` are their divisions, `elements` the parameters of the fullest stage and
    `mean_elements` of the average one, on one tensor-parallel rank."""

    workload: Workload
    space: Space
    cluster: Cluster
    framework: Framework
    at: Ints
    elements: Floats
    mean_elements: Floats


def _straggling(cluster: Cluster) -> float:
    return max((fault.slowdown for fault in cluster.faults if isinstance(fault, SlowRank)), default=1.0)


def _stage_layers(space: Space) -> tuple[Ints, Ints, Ints]:
    """Layers of the fullest, the first and the last stage, by division."""
    d = space.divisions
    if space.boundaries is None:
        most, least = -(-space.layers // d.pp), space.layers // d.pp
        return most, most, least
    sizes = np.diff(np.array([*space.boundaries, space.layers]))
    stages = [sizes.reshape(-1, pp).sum(axis=0) for pp in d.pp.tolist()]
    return (
        np.array([int(stage.max()) for stage in stages]),
        np.array([int(stage[0]) for stage in stages]),
        np.array([int(stage[-1]) for stage in stages]),
    )


def _pipeline(
    workload: Workload, space: Space, p: Passes, cluster: Cluster, framework: Framework, slow: float
) -> _PipelineTimes:
    d, layers = space.divisions, workload.model.layers
    most, at_first, at_last = _stage_layers(space)
    both = (p.forward + p.backward) * slow
    micro = framework.host.per_micro_batch_s
    first = at_first * both + p.embedding_forward + p.embedding_backward
    last = at_last * both + p.head_forward + p.head_backward
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
    forward, backward = at_first * p.forward * slow, at_first * p.backward * slow
    # With virtual stages, a chunk is done pp chunk passes before the next one.
    passes_of_all = ((chunks - 1) * d.pp + 1) / chunks
    return _PipelineTimes(
        total=busy + fill,
        busy=busy,
        window=backward * passes_of_all,
        drain=(d.pp - 1) * (backward / chunks + send),
        opening=forward * passes_of_all,
        forward=forward,
        backward=backward,
    )


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


def _stage_elements(workload: Workload, space: Space) -> tuple[Floats, Floats]:
    """Parameters of the fullest and of the average stage on one tensor-parallel rank."""
    d = space.divisions
    known: dict[tuple[int, ...], tuple[float, float]] = {}
    result = np.empty((2, len(d)))
    layers = zip(*(column.tolist() for column in _stage_layers(space)), strict=True)
    for index, (tp, pp, stages) in enumerate(zip(d.tp.tolist(), d.pp.tolist(), layers, strict=True)):
        key = (tp, pp, *stages)
        if key not in known:
            most, first, last = stages
            ends = [(False, False, most), (True, pp == 1, first), (pp == 1, True, last)]
            fullest = max(stage_parameters(workload.model, range(n), first=f, last=e, tp=tp) for f, e, n in ends)
            whole = stage_parameters(workload.model, range(workload.model.layers), first=True, last=True, tp=tp)
            known[key] = (float(fullest), whole / pp)
        result[:, index] = known[key]
    return result[0], result[1]


def _tied_s(workload: Workload, space: Space, cluster: Cluster, framework: Framework) -> Floats:
    """Seconds of the allreduce of a tied embedding's gradient between the first and the last stage, by division."""
    d, machine = space.divisions, cluster.workers[0]
    result = np.zeros(len(d))
    if not workload.model.tied:
        return result
    g = machine.node.devices
    for index, (tp, pp, dp, order) in enumerate(
        zip(d.tp.tolist(), d.pp.tolist(), d.dp.tolist(), d.order.tolist(), strict=True)
    ):
        if pp == 1:
            continue
        near = (tp * dp * pp if order == 0 else tp * pp) <= g and machine.interconnect is not None
        link = machine.interconnect if near and machine.interconnect is not None else machine.nic
        size = vocab_per_rank(workload.model.vocab, tp, padded=False) * workload.model.hidden
        moved = float(size * BYTES_OF[space.precision.gradient])
        node_rate = machine.nic_rate_bytes_per_s * machine.node.nic.count
        rate = machine.interconnect_rate_bytes_per_s if near else node_rate / g
        rate *= effective_rate(link, moved / 2.0) / link.rate_bytes_per_s
        result[index] = (link.launch_s + 2.0 * alpha_s(link) + moved / rate) * framework.network_scale
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


def _synchronise(scheme: Scheme, asked: _Asked, pipeline: _PipelineTimes) -> tuple[Floats, Floats]:
    """(all seconds of synchronisation, those that nothing hides), by row."""
    d, at, elements = asked.space.divisions, asked.at, asked.elements
    machine, cluster, framework = asked.cluster.workers[0], asked.cluster, asked.framework
    gradient = BYTES_OF[asked.space.precision.gradient]
    weight = StateBytes.of(asked.space.precision, asked.workload.training.optimizer).weights
    whole = elements * gradient
    layers = np.maximum(1, asked.workload.model.layers // (d.pp[at] * d.virtual_stages[at]))
    buckets = np.maximum(1.0, np.minimum(whole / scheme.bucket_bytes, layers * d.virtual_stages[at]))
    dp = d.dp[at]
    local = local_peers(d, cluster.devices_per_node)[at]
    scale = framework.network_scale
    overlaps = framework.overlap.gradient_reduce and (isinstance(scheme, ParameterServer) or scheme.overlap)
    window = pipeline.window[at] if overlaps else np.zeros(len(at))
    match scheme:
        case AllReduce():
            total = _allreduce_s(scheme.algorithm, machine, cluster, dp, local, whole, buckets)
            total = np.where(dp > 1, total, 0.0) * scale
            return total, np.maximum(total - window, total / buckets)
        case Sharded():
            reduce = 0.5 * _allreduce_s("ring", machine, cluster, dp, local, whole, buckets) * scale
            gather = 0.5 * _allreduce_s("ring", machine, cluster, dp, local, elements * weight, buckets) * scale
            count = d.micro_batches[at].astype(np.float64)
            forward, backward = pipeline.forward[at], pipeline.backward[at]
            if scheme.stage == 3:
                # Gathers run beside both passes of every micro-batch, reductions beside the backward one.
                back = gather + reduce if overlaps else gather
                shown = np.maximum(gather - forward, gather / buckets) + np.maximum(back - backward, 0.0)
                late = reduce / buckets if overlaps else count * reduce
                return count * (reduce + 2.0 * gather), count * shown + late
            behind = np.maximum(gather - pipeline.opening[at], gather / buckets)
            seen = behind if framework.overlap.parameter_gather else gather
            if scheme.stage == 1:
                return reduce + gather, np.maximum(reduce - window, reduce / buckets) + seen
            beside = backward if overlaps else np.zeros(len(at))
            return count * reduce + gather, np.maximum(count * (reduce - beside), reduce / buckets) + seen
        case ParameterServer():
            worker, server = (
                part * scale for part in _server_s(scheme, machine, cluster, asked, local, gradient, weight)
            )
            total = np.maximum(worker, server)
            pieces = np.maximum(buckets, whole / scheme.partition_bytes / np.maximum(local, 1))
            tail = total / np.minimum(pieces, buckets * 8)
            # Servers begin with the later stages while the first is still at work.
            shown = np.maximum(worker - window, server - window - pipeline.drain[at])
            return total, np.maximum(shown, tail)


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
        # A rank has at most four edges in both trees, half the buffer on each; with two or three ranks it has fewer.
        across = np.minimum(2.0, nodes / 2.0) * size / k / far_rate
        inside_one = np.minimum(2.0, k / 2.0) * size / near_rate
        bandwidth = np.where(nodes > 1, np.maximum(across, 2.0 * (k - 1.0) / k * size / near_rate), inside_one)
    elif algorithm == "hierarchical":
        waits = 2.0 * (k - 1.0) * near_alpha + 2.0 * (nodes - 1.0) * far_alpha
        across = 2.0 * (nodes - 1.0) / nodes * size / k / far_rate
        bandwidth = 2.0 * (k - 1.0) / k * size / near_rate + across
    elif algorithm == "halving-doubling":
        inner, outer = np.ceil(np.log2(np.maximum(k, 1.0))), np.ceil(np.log2(np.maximum(nodes, 1.0)))
        waits = 2.0 * (inner * near_alpha + outer * far_alpha)
        across = 2.0 * (nodes - 1.0) / nodes * size / k / far_rate
        bandwidth = 2.0 * (k - 1.0) / k * size / near_rate + across
        # What is more than a power of two folds into partners, before and after.
        extra = np.log2(n) % 1.0 > 1e-9
        waits += np.where(extra, 2.0 * far_alpha, 0.0)
        bandwidth += np.where(extra, 2.0 * size / np.where(nodes > 1, far_rate, near_rate), 0.0)
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
    asked: _Asked,
    local: Ints,
    gradient: int,
    weight: int,
) -> tuple[Floats, Floats]:
    """Seconds of pushing and pulling everything: of the busiest worker port, and of the busiest port or memory of a
    server.

    Push and pull overlap (full duplex) where they use different directions; a co-located node sends its pushes and its
    replies over the same one (Jiang et al., OSDI'20: M + (n - 2) M_G per direction).
    """
    space, at, elements = asked.space, asked.at, asked.elements
    d = space.divisions
    peers = np.minimum(local, d.dp[at]).astype(np.float64) if space.reduce_in_node else np.ones(len(at))
    back = weight if scheme.optimizer_at == "server" else gradient
    message = np.full(len(at), min(scheme.partition_bytes, 1e12))
    port = _port_rate(machine, message)
    own = scheme.colocated_parts / scheme.parts
    hosts = scheme.dedicated_parts / scheme.parts
    worker = elements * max(gradient, back) / peers * (1.0 - own) / port
    # What all ranks push and pull together, over stages of average size.
    whole = asked.mean_elements * d.pp[at] * d.tp[at]
    pushes, pulls = (whole * size * d.dp[at] / peers for size in (gradient, back))
    state = 0.0
    if scheme.optimizer_at == "server":
        tensors = 1 + STATE_TENSORS[asked.workload.training.optimizer]
        state = 2.0 * BYTES_OF[space.precision.optimizer] * tensors + gradient + BYTES_OF[space.precision.compute]
    nodes = max(1, cluster.worker_nodes)
    server = np.zeros(len(at))
    loopback = machine.nic.kind == "loopback"
    if scheme.colocated:
        if loopback:
            share = 1.0 - 1.0 / max(1, scheme.colocated) if not scheme.dedicated else 1.0
            bus = machine.nic_rate_bytes_per_s * effective_rate(machine.nic, message) / machine.nic.rate_bytes_per_s
            worker = (pushes + pulls) * share / bus
        else:
            # A node sends its own pushes and the replies to all others' pulls; it receives the same the other way.
            out, into = (
                one / nodes * (1.0 - own) + own * other * (1.0 - 1.0 / nodes)
                for one, other in ((pushes, pulls), (pulls, pushes))
            )
            server = np.maximum(out, into) / (port * machine.node.devices)
        server = np.maximum(server, own * _host_s(machine, pushes, whole * state))
    if scheme.dedicated:
        there = cluster.servers[0]
        if loopback:
            rate = machine.nic_rate_bytes_per_s * effective_rate(machine.nic, message) / machine.nic.rate_bytes_per_s
            server = np.maximum(server, (pushes + pulls) / rate)
        else:
            whole_rate = there.nic_rate_bytes_per_s * there.node.nic.count
            host_rate = whole_rate * effective_rate(there.nic, message) / there.nic.rate_bytes_per_s
            server = np.maximum(server, hosts * np.maximum(pushes, pulls) / host_rate)
        server = np.maximum(server, hosts * _host_s(there, pushes, whole * state))
    if bool((peers > 1).any()) and machine.interconnect is not None:
        near = machine.interconnect_rate_bytes_per_s * effective_rate(machine.interconnect, elements)
        near = near / machine.interconnect.rate_bytes_per_s
        inside = (peers - 1.0) / peers * elements * (gradient + weight) / near
        worker = worker + np.where(peers > 1, inside, 0.0)
    return worker, server


def _host_s(machine: Machine, pushes: Floats, state: Floats) -> Floats:
    """Seconds of one host that adds all of these gradients and steps through all of this state."""
    host = machine.node.host
    return np.asarray(pushes / host.reduce_rate_bytes_per_s + state / host.memory_bandwidth_bytes_per_s)
