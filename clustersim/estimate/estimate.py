"""estimate(): the step time of every layout at once, from closed forms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.capacity import less_background
from clustersim.cluster.cluster import Cluster, Machine
from clustersim.estimate.feeding import feeding_s
from clustersim.estimate.passes import Passes, passes
from clustersim.estimate.pipeline import PipelineTimes, pipeline_times, stage_layers
from clustersim.hardware.cost import device_costs
from clustersim.hardware.curve import alpha_s, effective_rate
from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import BYTES_OF
from clustersim.hardware.scaled import device_s
from clustersim.layout.divisions import SCHEDULES, holder_peers, local_peers
from clustersim.layout.layout import AllReduce, ParameterServer, Scheme, Sharded
from clustersim.layout.memory import StateBytes
from clustersim.layout.space import Space
from clustersim.workload.layer_kernels import optimizer_kernels
from clustersim.workload.model import vocab_per_rank
from clustersim.workload.parameters import stage_parameters
from clustersim.workload.training import STATE_TENSORS, Workload

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Estimate:
    """Seconds by row: the step and what it is made of. `busy` is the slowest stage's compute (with the communication
    inside its passes), `bubble` the time that stages wait for each other, `exposed` synchronisation that nothing hides,
    `synchronise` all of it, hidden or not, `feeding` the read of the batch."""

    step_s: Floats
    busy_s: Floats
    bubble_s: Floats
    exposed_s: Floats
    synchronise_s: Floats
    coverage: Floats
    feeding_s: Floats


def estimate(workload: Workload, space: Space, cluster: Cluster, framework: Framework) -> Estimate:
    """The step time of every row of `space`.

    Pipeline: every stage runs its micro-batches, and the slowest with what it waits for decides (P12, `pipeline.py`).
    Synchronisation overlaps with compute as far as the framework lets it: the last backward pass of a stage
    hides its reduction, the drain of the pipeline the work of servers for later stages; what is left, and the last
    bucket, is exposed. What other jobs use of all NICs is taken off their rates. Independent of the simulator's
    schedules and networks. O(rows).
    """
    cluster = less_background(cluster)
    divisions = space.divisions
    row = space.division
    elements, experts, mean_elements = _stage_elements(workload, space)
    tied = _tied_s(workload, space, cluster, framework)
    step, busy, bubble, exposed, synchronise, coverage = np.empty((6, len(space)))
    # By whether ranks share out gradients and weights, as far as passes differ by it.
    known: dict[tuple[bool, bool], tuple[Passes, PipelineTimes]] = {}
    for index, scheme in enumerate(space.schemes):
        rows = np.flatnonzero(space.scheme == index)
        if not len(rows):
            continue
        at = row[rows]
        sharded = scheme if isinstance(scheme, Sharded) else None
        shares = (sharded.shards_gradients, sharded.shards_weights) if sharded is not None else (False, False)
        if shares not in known:
            priced = passes(workload, divisions, space.precision.gradient, cluster, framework, *shares)
            known[shares] = priced, pipeline_times(workload, space, priced, cluster, framework)
        priced, pipeline = known[shares]
        asked = _Asked(
            workload=workload, space=space, cluster=cluster, framework=framework, at=at, elements=elements[at],
            experts=experts[at], mean_elements=mean_elements[at],
        )  # fmt: skip
        total, shown = _synchronise(scheme, asked, pipeline)
        # Kernels run slower beside what is hidden: what that adds is exposed in any case.
        shown = np.maximum(shown, total * (1.0 - 1.0 / framework.overlap.compute_slowdown))
        stepping = _optimizer_s(scheme, asked)
        exposed[rows] = shown + tied[at]
        synchronise[rows] = total + tied[at]
        step[rows] = pipeline.total[at] + shown + tied[at] + stepping + framework.host.per_step_s
        busy[rows], bubble[rows] = pipeline.busy[at], pipeline.total[at] - pipeline.busy[at]
        coverage[rows] = priced.coverage[at]
    feeding = feeding_s(workload, divisions, cluster, framework.network_scale)[row]
    if workload.data is not None:
        # A batch that is read ahead holds a step up only where it takes longer.
        step = np.maximum(step, feeding) if workload.data.prefetch else step + feeding
    return Estimate(
        step_s=step,
        busy_s=busy,
        bubble_s=bubble,
        exposed_s=exposed,
        synchronise_s=synchronise,
        coverage=coverage,
        feeding_s=feeding,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Asked:
    """The rows of one scheme: `at` are their divisions, `elements` the parameters of the fullest stage that all
    replicas hold, `experts` those of the rank's experts where ranks share them, and `mean_elements` all of the average
    stage, on one tensor-parallel rank."""

    workload: Workload
    space: Space
    cluster: Cluster
    framework: Framework
    at: Ints
    elements: Floats
    experts: Floats
    mean_elements: Floats


def _stage_elements(workload: Workload, space: Space) -> tuple[Floats, Floats, Floats]:
    """Parameters of the fullest stage, shared experts apart, and of the average stage, on one tensor-parallel rank."""
    d = space.divisions
    known: dict[tuple[int, ...], tuple[float, float, float]] = {}
    result = np.empty((3, len(d)))
    layers = zip(*(column.tolist() for column in stage_layers(space)), strict=True)
    one_ends = (d.pp == 1) | (d.schedule == SCHEDULES.index("zb-v"))
    columns = (d.tp.tolist(), d.pp.tolist(), d.ep.tolist(), one_ends.tolist(), layers)
    for index, (tp, pp, ep, one_end, stages) in enumerate(zip(*columns, strict=True)):
        key = (tp, pp, ep, one_end, *stages)
        if key not in known:
            most, first, last = stages
            ends = [(False, False, most), (True, one_end, first), (one_end, True, last)]
            fullest, n = max(
                (stage_parameters(workload.model, range(n), first=f, last=e, tp=tp, ep=ep), n) for f, e, n in ends
            )
            shared = workload.model.experts is not None and ep > 1
            experts = (
                stage_parameters(workload.model, range(n), first=False, last=False, tp=tp, ep=ep, part="experts")
                if shared
                else 0
            )
            whole = stage_parameters(workload.model, range(workload.model.layers), first=True, last=True, tp=tp)
            known[key] = (float(fullest - experts), float(experts), whole / pp)
        result[:, index] = known[key]
    return result[0], result[1], result[2]


def _tied_s(workload: Workload, space: Space, cluster: Cluster, framework: Framework) -> Floats:
    """Seconds of the allreduce of a tied embedding's gradient between the first and the last stage, by division."""
    d, machine = space.divisions, cluster.workers[0]
    result = np.zeros(len(d))
    if not workload.model.tied:
        return result
    g = machine.node.devices
    one_end = (d.pp == 1) | (d.schedule == SCHEDULES.index("zb-v"))
    for index, (tp, pp, replicas, order, together) in enumerate(
        zip(d.tp.tolist(), d.pp.tolist(), d.replicas.tolist(), d.order.tolist(), one_end.tolist(), strict=True)
    ):
        if together:
            continue
        near = (tp * replicas * pp if order == 0 else tp * pp) <= g and machine.interconnect is not None
        link = machine.interconnect if near and machine.interconnect is not None else machine.nic
        size = vocab_per_rank(workload.model.vocab, tp, padded=False) * workload.model.hidden
        moved = float(size * BYTES_OF[space.precision.gradient])
        node_rate = machine.nic_rate_bytes_per_s * machine.node.nic.count
        rate = machine.interconnect_rate_bytes_per_s if near else node_rate / g
        rate *= effective_rate(link, moved / 2.0) / link.rate_bytes_per_s
        result[index] = (link.launch_s + 2.0 * alpha_s(link) + moved / rate) * framework.collective_scale("embedding")
    return result


def _optimizer_s(scheme: Scheme, asked: _Asked) -> Floats:
    workload, space, at = asked.workload, asked.space, asked.at
    if isinstance(scheme, ParameterServer) and scheme.optimizer_at == "server":
        return np.zeros(len(at))
    stepped = asked.elements + asked.experts
    if isinstance(scheme, Sharded):
        replicas = space.divisions.replicas[at]
        stepped = asked.elements / replicas + asked.experts * space.divisions.ep[at] / replicas
    device = asked.cluster.workers[0].device
    assert device is not None
    costs, software = device_costs(device.name), asked.framework
    how = (
        space.precision.compute, workload.training.optimizer, None, software.fused_optimizer, software.clips_gradients,
    )  # fmt: skip
    sizes, inverse = np.unique(np.ceil(stepped).astype(np.int64), return_inverse=True)
    seconds = [device_s(costs, optimizer_kernels(int(n), *how), asked.framework) for n in sizes]
    return np.array(seconds)[inverse]


def _synchronise(scheme: Scheme, asked: _Asked, pipeline: PipelineTimes) -> tuple[Floats, Floats]:
    """(all seconds of synchronisation, those that nothing hides), by row."""
    d, at = asked.space.divisions, asked.at
    machine, cluster, framework = asked.cluster.workers[0], asked.cluster, asked.framework
    gradient = BYTES_OF[asked.space.precision.gradient]
    weight = StateBytes.of(asked.space.precision, asked.workload.training.optimizer).weights
    whole = (asked.elements + asked.experts) * gradient
    layers = np.maximum(1, asked.workload.model.layers // (d.pp[at] * d.virtual_stages[at]))
    buckets = np.maximum(1.0, np.minimum(whole / scheme.bucket_bytes, layers * d.virtual_stages[at]))
    local = local_peers(d, cluster.devices_per_node)[at]
    scale = framework.network_scale
    overlaps = framework.overlap.gradient_reduce and (isinstance(scheme, ParameterServer) or scheme.overlap)
    window = pipeline.window[at] if overlaps else np.zeros(len(at))
    match scheme:
        case AllReduce():
            total = _reduce_s(scheme.algorithm, asked, local, gradient, buckets)
            return total, np.maximum(total - window, total / buckets)
        case Sharded():
            reduce = 0.5 * _reduce_s("ring", asked, local, gradient, buckets)
            gather = 0.5 * _reduce_s("ring", asked, local, weight, buckets)
            count = d.micro_batches[at].astype(np.float64)
            forward, backward = pipeline.forward[at], pipeline.backward[at]
            if scheme.shards_weights:
                # Gathers run beside both passes of every micro-batch, reductions beside the backward one.
                back = gather + reduce if overlaps else gather
                shown = np.maximum(gather - forward, gather / buckets) + np.maximum(back - backward, 0.0)
                late = reduce / buckets if overlaps else count * reduce
                return count * (reduce + 2.0 * gather), count * shown + late
            behind = np.maximum(gather - pipeline.opening[at], gather / buckets)
            seen = behind if framework.overlap.parameter_gather else gather
            if not scheme.shards_gradients:
                reduce *= 2.0 if framework.sharded_reduce == "all_reduce" else 1.0
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


def _reduce_s(algorithm: str, asked: _Asked, local: Ints, width: int, buckets: Floats) -> Floats:
    """Seconds of the allreduce of all parameters at `width` bytes each: of the dense ones over all replicas, and of
    shared experts over the ranks that hold the same ones."""
    d, at, cluster = asked.space.divisions, asked.at, asked.cluster
    machine = cluster.workers[0]
    total = _allreduce_s(algorithm, machine, cluster, d.replicas[at], local, asked.elements * width, buckets)
    total = np.where(d.replicas[at] > 1, total, 0.0)
    holders = d.replicas[at] // d.ep[at]
    some = np.flatnonzero((asked.experts > 0) & (holders > 1))
    if len(some):
        near = holder_peers(d, cluster.devices_per_node)[at][some]
        size = asked.experts[some] * width
        total[some] += _allreduce_s(algorithm, machine, cluster, holders[some], near, size, buckets[some])
    return np.asarray(total * asked.framework.collective_scale("dp"))


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
    depth = np.ceil(np.log2(np.maximum(nodes, 2.0)))
    if algorithm in ("tree", "binary-tree"):
        waits = 2.0 * (depth * far_alpha + (k - 1.0) * near_alpha)
        # A rank has at most four edges in two trees, half the buffer on each, or three in one, both ways; with two or
        # three ranks it has fewer.
        edges = [np.minimum(2.0, m / 2.0) if algorithm == "tree" else np.minimum(3.0, m - 1.0) for m in (nodes, k)]
        across = edges[0] * size / k / far_rate
        inside_one = edges[1] * size / near_rate
        bandwidth = np.where(nodes > 1, np.maximum(across, 2.0 * (k - 1.0) / k * size / near_rate), inside_one)
    elif algorithm in ("nvls", "sharp"):
        # Switches add up: in a node every rank sends and receives the buffer once, and between nodes its part of it,
        # where the fabric adds; else two trees carry it.
        adds = machine.node.interconnect is not None and machine.node.interconnect.reduces
        inner = np.where(k > 1, 2.0 if adds else 2.0 * (k - 1.0), 0.0)
        outer = np.where(nodes > 1, 2.0 if algorithm == "sharp" else 2.0 * depth, 0.0)
        waits = inner * near_alpha + outer * far_alpha
        far_load = np.where(nodes > 1, 1.0 if algorithm == "sharp" else np.minimum(2.0, nodes / 2.0), 0.0)
        near_load = np.where(k > 1, 1.0 if adds else 2.0 * (k - 1.0) / k, 0.0)
        bandwidth = np.maximum(near_load * size / near_rate, far_load * size / k / far_rate)
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
    peers = np.minimum(local, d.replicas[at]).astype(np.float64) if space.reduce_in_node else np.ones(len(at))
    back = weight if scheme.optimizer_at == "server" else gradient
    message = np.full(len(at), min(scheme.partition_bytes, 1e12))
    port = _port_rate(machine, message)
    own = scheme.colocated_parts / scheme.parts
    hosts = scheme.dedicated_parts / scheme.parts
    worker = elements * max(gradient, back) / peers * (1.0 - own) / port
    # What all ranks push and pull together, over stages of average size.
    whole = asked.mean_elements * d.pp[at] * d.tp[at]
    pushes, pulls = (whole * size * d.replicas[at] / peers for size in (gradient, back))
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
