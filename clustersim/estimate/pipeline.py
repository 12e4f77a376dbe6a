"""Seconds of a pipeline's passes, by division: what the slowest stage computes, and how long stages wait."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, SlowRank
from clustersim.estimate.passes import Passes
from clustersim.hardware.curve import alpha_s, effective_rate
from clustersim.hardware.framework import Framework, Schedule
from clustersim.layout.divisions import SCHEDULES, Divisions
from clustersim.layout.schedule import stage_of
from clustersim.layout.space import Space
from clustersim.layout.split import stage_loads
from clustersim.workload.activations import boundary_bytes
from clustersim.workload.training import Workload

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PipelineTimes:
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


def _straggling(cluster: Cluster) -> float:
    return max((fault.slowdown for fault in cluster.faults if isinstance(fault, SlowRank)), default=1.0)


def stage_layers(space: Space) -> tuple[Ints, Ints, Ints]:
    """Layers of the fullest stage, of that with the embedding and of that with the head, by division."""
    result = np.empty((3, len(space.divisions)), np.int64)
    for rows, schedule, loads in _grouped(space):
        head = stage_of(schedule, len(loads), int(space.divisions.virtual_stages[rows[0]]) * len(loads) - 1)
        result[:, rows] = np.array([[loads.max()], [loads[0]], [loads[head]]])
    return result[0], result[1], result[2]


def _grouped(space: Space) -> Iterator[tuple[Ints, Schedule, Ints]]:
    """The divisions with the same boundaries and schedule, with the layers of each stage."""
    d = space.divisions
    columns = np.stack([d.split, d.schedule, d.pp])
    keys, inverse = np.unique(columns, axis=1, return_inverse=True)
    for index, (split, schedule, pp) in enumerate(keys.T.tolist()):
        loads = stage_loads(space.splits[split], space.layers, SCHEDULES[schedule], pp, 0.0, 0.0)
        yield np.flatnonzero(inverse.ravel() == index), SCHEDULES[schedule], np.array(loads, np.int64)


def pipeline_times(
    workload: Workload, space: Space, p: Passes, cluster: Cluster, framework: Framework
) -> PipelineTimes:
    """The passes of all micro-batches through all stages, without what synchronisation adds. O(divisions * stages)."""
    slow = _straggling(cluster)
    d, layers, micro = space.divisions, workload.model.layers, framework.host.per_micro_batch_s
    most, at_first, at_last = stage_layers(space)
    # By pass: forward, backward, gradients of weights where these are apart.
    replicas, inverse = np.unique(d.replicas, return_inverse=True)
    uneven = np.ones(len(d))
    if cluster.noise is None:
        uneven = np.array([framework.slowest_of(int(n)) for n in replicas], dtype=np.float64)[inverse]
    layer: Floats = np.stack([p.forward, p.backward, p.weights]) * (slow * uneven)
    embedding: Floats = np.stack([p.embedding_forward, p.embedding_backward, p.embedding_weights]) * uneven
    head: Floats = np.stack([p.head_forward, p.head_backward, p.head_weights]) * uneven
    # One stage holds both ends where there is no other, and at the open end of a V.
    one_end = (d.pp == 1) | (d.schedule == SCHEDULES.index("zb-v"))
    first = at_first * layer + embedding + np.where(one_end, head, 0.0)
    last = at_last * layer + head + np.where(one_end, embedding, 0.0)
    inner = (most * layer).sum(axis=0)
    first, last = first.sum(axis=0), last.sum(axis=0)
    slowest = np.maximum(np.maximum(first, last), inner)
    summed = layers * layer + embedding + head
    send = _send_s(workload, d, cluster, framework)
    chunks = d.virtual_stages

    def each(computing: Floats, hops: Floats, sent: Floats) -> Floats:
        # Sends that run beside compute still have to get through the stage's cards.
        beside = framework.overlap.pipeline_send
        return np.maximum(computing, hops * sent) if beside else np.asarray(computing + hops * sent)

    # Where a model begins or ends, or a V turns round, there is nobody to send to.
    at_end = np.where(d.pp == 1, 0.0, np.where(one_end, 2.0, 2.0 * chunks - 1.0))
    within = np.where(d.pp > 2, 2.0 * chunks, at_end)
    ends = each(np.maximum(first, last) + micro, at_end, send)
    busy = np.asarray(d.micro_batches * np.maximum(ends, each(inner + micro, within, send)), dtype=np.float64)
    total = np.empty(len(d))
    for rows, schedule, loads in _grouped(space):
        pp, count, sent = len(loads), d.micro_batches[rows], send[rows]
        others = summed[:, rows].sum(axis=0) - slowest[rows]
        if pp == 1 or schedule in ("interleaved", "zb-v"):
            waiting = others / chunks[rows]
            if schedule == "zb-v":
                # The other stages' passes, all alike.
                passes_ = summed[:, rows] * others / summed[:, rows].sum(axis=0) / (pp - 1)
                waiting = _v_bubble_s(pp, count, *passes_)
            total[rows] = busy[rows] + waiting + (pp - 1) * (2.0 * sent + micro / chunks[rows])
            continue
        stages = loads * layer[:, rows, None]
        stages[..., 0] += embedding[:, rows]
        stages[..., -1] += head[:, rows]
        stages[0] += micro
        hops = np.full(pp, 2.0)
        hops[[0, -1]] = 1.0
        busy_of = count[:, None] * each(stages.sum(axis=0), hops, sent[:, None])
        total[rows] = (busy_of + waiting_s(schedule, count[:, None], stages, 2.0 * sent[:, None])).max(axis=1)
    # Gradients leave behind the last of a micro-batch's passes.
    splitting = p.weights > 0.0
    forward = at_first * layer[0]
    backward = np.asarray(at_first * np.where(splitting, layer[2], layer[1]))
    # A later stage is behind with its weight gradients, which it makes up for at the end.
    earlier = at_first * np.where(splitting, np.maximum(0.0, layer[1] - layer[2]), layer[1])
    # With virtual stages, a chunk is done pp chunk passes before the next one.
    passes_of_all = ((chunks - 1) * d.pp + 1) / chunks
    return PipelineTimes(
        total=total,
        busy=busy,
        window=backward * passes_of_all,
        drain=(d.pp - 1) * (earlier / chunks + send),
        opening=forward * passes_of_all,
        forward=forward,
        backward=backward,
    )


def waiting_s(schedule: Schedule, count: Ints, stages: Floats, hop: Floats) -> Floats:
    """How long each stage waits, if it is the one that decides: `stages` are seconds of each pass (forward, backward,
    weight gradients), division and stage; `hop` of a send each way between two stages (docs/model.md).

    The first micro-batch comes through the stages before, and at last goes back through them. The stages behind take D
    to return a micro-batch: the stage waits for the first one beyond the forward passes that it goes ahead by, and for
    the last one beyond the backward passes that are left; once for both where no pass lies between the two waits. Every
    sum is a chain of passes that follow each other, so that no 1F1B takes less; chains between other stages can only be
    longer where stages differ by more than a layer.
    """
    forward, backward, weights = stages
    passed = (forward + backward).cumsum(axis=1)
    place = np.arange(stages.shape[2])
    behind = place[-1] - place
    before = passed - forward - backward + place * hop
    beyond = passed[:, -1:] - passed + behind * hop
    if schedule == "gpipe":
        # All forward passes, then all backward ones: none of the work of the stages behind is hidden.
        return np.asarray(before + beyond)
    ahead = np.minimum(behind, count - 1)
    first = np.maximum(0.0, beyond - ahead * forward)
    last = np.maximum(0.0, beyond - ahead * (backward + weights))
    returning = np.where(count >= behind + 2, first + last, np.maximum(first, last))
    if schedule == "1f1b":
        return np.asarray(before + returning)
    # ZB-H1: weight gradients fill the second wait, and that for the stages before, of which the first one has its last
    # weight gradient to do.
    coming = forward.cumsum(axis=1) - forward + place * hop / 2.0
    leaving = backward.cumsum(axis=1) - backward + place * hop / 2.0
    late = np.minimum(place + 1, count)
    return np.asarray(coming + returning + np.maximum(0.0, leaving + weights[:, :1] - late * weights))


def _v_bubble_s(pp: int, count: Ints, forward: Floats, backward: Floats, weights: Floats) -> Floats:
    """How long a stage of ZB-V waits, of passes of so many seconds a stage, half of them for each of its two chunks
    (docs/model.md)."""
    f, b, w, gaps = forward / 2.0, backward / 2.0, weights / 2.0, pp - 1
    turning = gaps * np.maximum(2 * f - b, 2 * (f - w)) - np.minimum(f - b, w)
    bubble = np.maximum(np.maximum(gaps * b, 2 * gaps * (b - w)), (gaps - 1) * w + np.maximum(f, b))
    bubble = np.maximum(bubble, np.where(f > b, turning, 0.0))
    # Fewer micro-batches than 2p - 1 do not fill the V.
    early, late = np.minimum(count, pp) - 1, np.maximum(0, np.minimum(count, 2 * pp - 1) - pp)
    filling = 2 * gaps * (f + b) - early * np.minimum(2 * f, f + b) - late * np.minimum(2 * w, f + b)
    return np.asarray(np.maximum(bubble, filling))


def _send_s(workload: Workload, d: Divisions, cluster: Cluster, framework: Framework) -> Floats:
    """Seconds of one activation transfer between neighbouring stages."""
    machine = cluster.workers[0]
    result = np.zeros(len(d))
    known: dict[tuple[int, ...], float] = {}
    keys = zip(
        d.tp.tolist(), d.pp.tolist(), d.replicas.tolist(), d.micro_batch.tolist(), d.sequence_parallel.tolist(),
        d.order.tolist(), d.cp.tolist(), strict=True,
    )  # fmt: skip
    for index, (tp, pp, replicas, size, sp, order, cp) in enumerate(keys):
        if pp == 1:
            continue
        stride = tp * replicas if order == 0 else tp
        near = stride < machine.node.devices and (order == 1 or tp * replicas * pp <= machine.node.devices)
        key = (tp, size, int(sp), int(near), cp)
        if key not in known:
            tokens = workload.training.sequence // cp * size
            whole = boundary_bytes(workload.model, tokens=tokens, dtype=workload.training.precision)
            sent = whole / tp if framework.scatter_gather or sp else float(whole)
            link = (machine.interconnect or machine.nic) if near else machine.nic
            rate = effective_rate(link, sent)
            if not near:
                ports = min(machine.node.devices, machine.node.nic.count)
                rate *= machine.nic_rate_bytes_per_s * machine.node.nic.count / ports / link.rate_bytes_per_s
                rate *= ports / machine.node.devices
            known[key] = (link.launch_s + alpha_s(link) + sent / rate) * framework.send_scale
        result[index] = known[key]
    return result
