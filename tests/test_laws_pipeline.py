"""Laws P12 to P14 of docs/laws.md: pipeline schedules and tensor-parallel collectives; when gradients may leave."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import pytest
from clusters import (
    ENDLESS,
    all_reduce,
    cluster_of,
    framework_of,
    host_of,
    layout_of,
    model_of,
    parameter_server,
    pipeline_program,
    servers,
    sharded,
    wire,
    workers,
    workload_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.cluster.wiring import Port, Wiring
from clustersim.hardware.framework import HostCost, Overlap
from clustersim.layout.layout import Mesh, RankOrder, Recompute, Schedule, Scheme, node_peers
from clustersim.layout.memory import passes_in_flight
from clustersim.layout.schedule import Turn, turns
from clustersim.program.lower import lower
from clustersim.program.program import Collective, Compute, Program, Work
from clustersim.simulate.collectives.phases import phases
from clustersim.simulate.fold import rank_grid
from clustersim.simulate.simulate import simulate
from clustersim.timeline import Phase

SHAPES = st.tuples(st.integers(1, 8), st.integers(1, 12), st.sampled_from([(1.0, 2.0), (1.0, 1.0), (3.0, 0.5)]))


def in_flight(order: list[Turn]) -> int:
    """The largest number of forward passes whose backward has not run yet."""
    peak = held = 0
    for turn in order:
        held += {"forward": 1, "backward": -1}.get(turn.phase, 0)
        peak = max(peak, held)
    return peak


# --------------------------------------------------------------------------------------------------------- P12


@given(SHAPES, st.sampled_from(["1f1b", "gpipe"]))
@settings(max_examples=80, deadline=None)
def test_p12_equal_stages_without_communication(
    shape: tuple[int, int, tuple[float, float]], schedule: Schedule
) -> None:
    stages, count, (forward, backward) = shape
    program = pipeline_program(schedule, stages, count, 1)
    found = simulate(program, cluster_of(workers(stages)), framework_of(pass_s=forward, backward_s=backward))
    assert found.makespan_s == pytest.approx((count + stages - 1) * (forward + backward), rel=1e-12)
    bubble = (stages - 1) / (count + stages - 1)
    for time in found.classes_s:
        assert time.waiting_s == pytest.approx(bubble * found.makespan_s, abs=1e-9)


@given(
    stages=st.integers(1, 6),
    rounds=st.integers(1, 4),
    virtual=st.integers(2, 4),
    passes=st.sampled_from([(1.0, 2.0), (1.0, 1.0), (1.0, 3.0)]),
)
@settings(max_examples=80, deadline=None)
def test_p12_virtual_stages_divide_the_bubble(
    stages: int, rounds: int, virtual: int, passes: tuple[float, float]
) -> None:
    """A chunk's pass takes 1/v of a stage's: m v + p - 1 chunk passes each way."""
    forward, backward = passes
    count = stages * rounds
    program = pipeline_program("interleaved", stages, count, virtual)
    found = simulate(program, cluster_of(workers(stages)), framework_of(pass_s=forward, backward_s=backward))
    ideal = count * virtual * (forward + backward)
    assert found.makespan_s == pytest.approx(ideal + (stages - 1) * (forward + backward), rel=1e-12)
    for time in found.classes_s:
        assert time.waiting_s / ideal == pytest.approx((stages - 1) / count / virtual, abs=1e-9)


@given(SHAPES, st.sampled_from(["1f1b", "gpipe"]))
@settings(max_examples=30, deadline=None)
def test_p12_of_a_lowered_program_too(shape: tuple[int, int, tuple[float, float]], schedule: Schedule) -> None:
    """Through lower(), with equal stages and passes as long as the host takes to drive their layers."""
    stages, count, (forward, backward) = shape
    layout = layout_of(Mesh(dp=1, tp=1, pp=stages), all_reduce(), layer_count=2 * stages, schedule=schedule)
    framework = framework_of(pass_s=forward, backward_s=backward)
    program = lower(workload_of(count, model=model_of(layer_count=2 * stages)), layout, framework, 1)
    found = simulate(program, cluster_of(workers(stages, far=wire(ENDLESS))), framework)
    expected = (count + stages - 1) * 2 * (forward + backward)
    # The embedding, the head and the optimizer take some hundred microseconds more.
    assert expected <= found.makespan_s <= expected + 2e-3


# --------------------------------------------------------------------------------------------------------- P13


@given(stages=st.integers(1, 9), count=st.integers(1, 20), data=st.data())
@settings(max_examples=150, deadline=None)
def test_p13_micro_batches_in_flight(stages: int, count: int, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, stages - 1))
    assert in_flight(turns("1f1b", stages, stage, count, 1)) == min(count, stages - stage)
    assert in_flight(turns("gpipe", stages, stage, count, 1)) == count
    virtual = data.draw(st.integers(2, 5))
    # What the memory model counts is what the schedule holds.
    cases: list[tuple[Schedule, int, int]] = [
        ("1f1b", count, 1), ("gpipe", count, 1), ("interleaved", count * stages, virtual)
    ]  # fmt: skip
    for schedule, rounds, chunks in cases:
        order = turns(schedule, stages, stage, rounds, chunks)
        held = [0] * chunks
        most, first, last = 0, 0, 0
        for turn in order:
            held[turn.chunk // stages] += -1 if turn.phase == "backward" else 1
            most, first, last = max(most, sum(held)), max(first, held[0]), max(last, held[-1])
        flying = passes_in_flight(schedule, stages, stage, rounds, chunks)
        assert flying.chunks == most
        if stage == 0:
            assert flying.first_chunk == first
        if stage == stages - 1:
            assert flying.last_chunk == last


@given(stages=st.integers(1, 6), rounds=st.integers(1, 3), virtual=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_p13_every_pass_happens_once_and_backward_after_forward(stages: int, rounds: int, virtual: int) -> None:
    schedules: tuple[Schedule, ...] = ("interleaved",) if virtual > 1 else ("1f1b", "gpipe")
    for schedule in schedules:
        for stage in range(stages):
            order = turns(schedule, stages, stage, rounds * stages, virtual)
            phases_: tuple[Phase, ...] = ("forward", "backward")
            assert Counter(order) == Counter(
                Turn(m, v * stages + stage, phase)
                for m in range(rounds * stages)
                for v in range(virtual)
                for phase in phases_
            )
            seen = set()
            for turn in order:
                if turn.phase == "backward":
                    assert turn._replace(phase="forward") in seen
                seen.add(turn)


# --------------------------------------------------------------------------------------------------------- P14


def _of_layers(program: Program, phase: Literal["forward", "backward"]) -> list[Work]:
    """The works of the passes of one phase in the first position."""
    ops = [op for op in program.positions[0].ops if isinstance(op, Compute) and op.id.phase == phase]
    return [program.works[op.work] for op in ops]


@pytest.mark.parametrize(("recompute", "forward", "backward"), [("none", 2, 2), ("selective", 2, 2), ("full", 2, 4)])
@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("sp", [False, True])
def test_p14_collectives_of_a_layer(recompute: Recompute, forward: int, backward: int, tp: int, sp: bool) -> None:
    """Four allreduces of b s h a layer, six with full recomputation; an all-gather and a reduce-scatter for each under
    sequence parallelism. Counted on the middle stage, which holds layers and nothing else."""
    sequence, size, count, layer_count = 128, 3, 5, 12
    layout = layout_of(
        Mesh(dp=1, tp=tp, pp=3), all_reduce(), layer_count=layer_count, micro_batch=size, recompute=recompute,
        sequence_parallel=sp,
    )  # fmt: skip
    work = workload_of(size * count, model=model_of(layer_count=layer_count), sequence=sequence)
    program = lower(work, layout, framework_of(), 8)
    message = size * sequence * work.model.hidden * 2
    for phase, each in (("forward", forward), ("backward", backward)):
        found: Counter[tuple[str, int]] = Counter()
        for op in program.positions[1].ops:
            if isinstance(op, Compute) and op.id.phase == phase:
                for inner in program.works[op.work].inner:
                    found[inner.kind, inner.bytes] += inner.count
        times = each * (layer_count // 3) * count
        kinds = ("all_gather", "reduce_scatter") if sp else ("all_reduce",)
        assert found == {(kind, message): times for kind in kinds}


@pytest.mark.parametrize("tp", [2, 3, 8])
def test_p14_sequence_parallelism_puts_the_same_bytes_on_the_wire(tp: int) -> None:
    wiring = Wiring(cluster_of(workers(1, devices=tp, nics=1)))
    group = np.arange(tp)[None, :]

    def sent(kind: Literal["all_reduce", "all_gather", "reduce_scatter"]) -> float:
        (phase,) = phases(wiring, group, kind, "ring")
        start = wiring.offset[Port.DEVICE_OUT]
        return float(np.bincount(phase.traffic.links, weights=phase.traffic.loads, minlength=wiring.links)[start])

    assert sent("all_reduce") == pytest.approx(sent("all_gather") + sent("reduce_scatter"), rel=1e-15)


# ------------------------------------------------------------------------------------------------- synchronisation


def _schemes() -> list[Scheme]:
    return [all_reduce(), sharded(1), parameter_server(2, 0), parameter_server(0, 2)]


@pytest.mark.parametrize("scheme", _schemes(), ids=["allreduce", "sharded-1", "dedicated", "colocated"])
@pytest.mark.parametrize("virtual", [1, 2])
def test_sync_without_overlap_no_gradient_leaves_before_its_stage_is_done(scheme: Scheme, virtual: int) -> None:
    waits = Overlap(gradient_reduce=False, parameter_gather=False, pipeline_send=True)
    framework = framework_of(pass_s=1e-3, overlap=waits)
    layout = layout_of(
        Mesh(dp=4, tp=1, pp=2), scheme, layer_count=8, virtual_stages=virtual,
        schedule="interleaved" if virtual > 1 else "1f1b",
    )  # fmt: skip
    program = lower(workload_of(16, model=model_of(layer_count=8)), layout, framework, 2)
    machine = workers(4, devices=2, nics=2, far=wire(1e9, 1e-6), near=wire(4e9, 1e-6))
    found = simulate(program, cluster_of(machine, hosts=servers(2, far=wire(1e9))), framework)
    timeline = found.timeline()
    for rank_class in timeline.classes[: found.prices.placement.folding.classes]:
        spans = [span for span in timeline.spans if span.rank == rank_class.rank]
        done = max(span.end_s for span in spans if span.op.phase == "backward" and span.op.kind == "compute")
        assert min(span.start_s for span in spans if span.op.phase == "synchronise") >= done


@pytest.mark.parametrize("stage", [2, 3])
def test_sync_without_overlap_the_next_micro_batch_waits_for_the_reduction_of_the_last(stage: Literal[2, 3]) -> None:
    waits = Overlap(gradient_reduce=False, parameter_gather=False, pipeline_send=True)
    framework = framework_of(pass_s=1e-3, overlap=waits)
    layout = layout_of(Mesh(dp=4, tp=1, pp=1), sharded(stage), layer_count=8)
    program = lower(workload_of(12, model=model_of(layer_count=8)), layout, framework, 1)
    spans = simulate(program, cluster_of(workers(4, far=wire(1e9, 1e-6))), framework).timeline().spans
    for micro_batch in range(2):
        reduced = [s for s in spans if s.op.kind == "reduce-scatter" and s.op.micro_batch == micro_batch]
        assert len(reduced) == len(program.buckets)
        after = [s for s in spans if s.op.kind == "compute" and s.op.micro_batch == micro_batch + 1]
        assert min(s.start_s for s in after) >= max(s.end_s for s in reduced)


@pytest.mark.parametrize("scheme", _schemes(), ids=["allreduce", "sharded-1", "dedicated", "colocated"])
def test_sync_with_overlap_gradients_leave_bucket_by_bucket(scheme: Scheme) -> None:
    layout = layout_of(Mesh(dp=4, tp=1, pp=1), scheme, layer_count=8)
    framework = framework_of(pass_s=1e-3)
    program = lower(workload_of(8, model=model_of(layer_count=8)), layout, framework, 1)
    cluster = cluster_of(workers(4, far=wire(1e9, 1e-6)), hosts=servers(2, far=wire(1e9)))
    spans = simulate(program, cluster, framework).timeline().spans
    for bucket in range(len(program.buckets)):
        first = [span for span in spans if span.op.part == f"B{bucket}" and span.op.phase == "synchronise"]
        computed = [span for span in spans if span.op.part == f"B{bucket}" and span.op.phase == "backward"]
        if bucket == 0:
            assert min(span.start_s for span in first) == computed[0].end_s
        assert min(span.start_s for span in first) >= computed[0].end_s


def test_sync_sharing_what_was_pulled_delays_no_bucket_that_is_still_to_be_pushed() -> None:
    """Peers of a node sum the next bucket while they wait for the last one to come back from a slow server."""
    layout = layout_of(Mesh(dp=8, tp=1, pp=1), parameter_server(1, 0, bucket_bytes=1.0), layer_count=8)
    framework = framework_of(pass_s=1e-3)
    program = lower(workload_of(8, model=model_of(layer_count=8)), layout, framework, 4)
    machine = workers(2, devices=4, nics=1, far=wire(1e12), near=wire(1e10, 1e-6))
    slow = servers(1, far=wire(1e12), host=host_of(reduce_rate=1e8))
    spans = simulate(program, cluster_of(machine, hosts=slow), framework).timeline().spans
    pulled = min(span.end_s for span in spans if span.op.kind == "pull")
    summed = [span for span in spans if span.op.kind == "reduce-scatter"]
    assert len(summed) == len(program.buckets) > 4
    assert sum(span.end_s < pulled for span in summed) == len(summed)


def test_sync_every_gradient_is_in_one_bucket() -> None:
    for pp, virtual in ((1, 1), (2, 1), (2, 2), (4, 2)):
        layout = layout_of(
            Mesh(dp=2, tp=2, pp=pp), all_reduce(bucket_bytes=3e6), layer_count=8, virtual_stages=virtual,
            schedule="interleaved" if virtual > 1 else "1f1b",
        )  # fmt: skip
        model = model_of(layer_count=8, tied=False)
        program = lower(workload_of(2 * pp, model=model), layout, framework_of(), 4)
        covered = [layer for bucket in program.buckets for layer in range(bucket.first_layer, bucket.last_layer + 1)]
        assert sorted(covered) == list(range(-1, 9))
        reduced = [op for position in program.positions for op in position.ops if isinstance(op, Collective)]
        assert sum(op.bytes for op in reduced if op.group == "dp") == 4 * sum(b.elements for b in program.buckets)


@pytest.mark.parametrize("scheme", [*_schemes(), sharded(3)], ids=lambda scheme: scheme.kind)
@pytest.mark.parametrize("pp", [1, 2])
def test_host_costs_are_paid_once_a_micro_batch_and_once_a_step(scheme: Scheme, pp: int) -> None:
    """Whether a pass is one op or an op a bucket, and wherever the optimizer runs."""
    if pp == 2 and scheme == sharded(3):
        return
    host = HostCost(per_layer_forward_s=0.0, per_layer_backward_s=0.0, per_micro_batch_s=1.0, per_step_s=16.0)
    framework = framework_of(host=host)
    layout = layout_of(
        Mesh(dp=2, tp=1, pp=pp), scheme, layer_count=8, virtual_stages=pp,
        schedule="interleaved" if pp == 2 else "1f1b",
    )  # fmt: skip
    program = lower(workload_of(8, model=model_of(layer_count=8)), layout, framework, 1)
    machine = workers(2 * pp, far=wire(ENDLESS))
    found = simulate(program, cluster_of(machine, hosts=servers(2, far=wire(ENDLESS))), framework)
    for time in found.classes_s:
        assert time.compute_s == pytest.approx(4 * 1.0 + 16.0, abs=0.05)


def test_host_costs_of_a_collective_are_paid_before_it() -> None:
    host = HostCost(
        per_layer_forward_s=0.0, per_layer_backward_s=0.0, per_micro_batch_s=0.0, per_step_s=0.0,
        per_collective_s=256.0,
    )  # fmt: skip
    layout = layout_of(Mesh(dp=2, tp=1, pp=1), all_reduce(bucket_bytes=1e12), layer_count=4)
    program = lower(workload_of(6), layout, framework_of(host=host), 1)
    found = simulate(program, cluster_of(workers(2, far=wire(ENDLESS))), framework_of(host=host))
    assert found.makespan_s == pytest.approx(256.0, abs=0.05)


@given(
    devices=st.sampled_from([1, 2, 4, 6, 8]),
    nodes=st.integers(1, 9),
    order=st.sampled_from(["tp-dp-pp", "tp-pp-dp"]),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_sync_peers_that_sum_among_themselves_share_a_node(
    devices: int, nodes: int, order: RankOrder, data: st.DataObject
) -> None:
    ranks = devices * nodes
    tp = data.draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    pp = data.draw(st.sampled_from([n for n in range(1, ranks // tp + 1) if ranks // tp % n == 0]))
    mesh = Mesh(dp=ranks // tp // pp, tp=tp, pp=pp)
    peers = node_peers(mesh, order, devices)
    groups = rank_grid(mesh, order).transpose(0, 2, 1).reshape(-1, mesh.dp)
    node = groups.reshape(-1, peers) // devices
    assert (node == node[:, :1]).all()
    if ranks & (ranks - 1) == 0 and peers < mesh.dp:
        # With powers of two, nobody else of the group is there.
        assert (np.diff(node[:, 0].reshape(-1, mesh.dp // peers), axis=1) != 0).all()
