"""Zero-bubble schedules (docs/laws.md, Zero bubble): drawn by hand, their bubbles, what they hold, and the two halves
of a backward pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from blocks import head_of
from clusters import (
    ENDLESS,
    all_reduce,
    cluster_of,
    framework_of,
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

from clustersim.hardware.framework import Overlap, Schedule
from clustersim.hardware.kernel import Dtype, Gemm, Kernel, Kernels, Memory, linear_layers
from clustersim.layout.layout import Layout, Mesh, Recompute, Scheme
from clustersim.layout.moments import fullest_moments
from clustersim.layout.schedule import Turn, chunks_of, stage_of, turns
from clustersim.program.lower import lower
from clustersim.program.program import Collective, Compute, Program
from clustersim.program.work import pass_work
from clustersim.simulate.prices.prices import Prices
from clustersim.simulate.simulate import simulate
from clustersim.timeline import Phase
from clustersim.workload.layer_kernels import head_forward
from clustersim.workload.model import Experts, Model
from clustersim.workload.training import Training, Workload

TIMES = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
ZERO_BUBBLE: tuple[Schedule, ...] = ("zb-h1", "zb-v")


# ------------------------------------------------------------------------------------------------- drawn by hand

# One pass a column: F forward, B gradient of the input, W of the weights; small letters: the second chunk of a stage.
_H1_4_STAGES = """
F1 F2 F3 F4 -- -- -- B1 W1 F5 B2 W2 F6 B3 W3 F7 B4 W4 F8 B5 W5 B6 W6 B7 W7 B8 W8
-- F1 F2 F3 -- -- B1 F4 B2 W1 F5 B3 W2 F6 B4 W3 F7 B5 W4 F8 B6 W5 B7 W6 B8 W7 W8
-- -- F1 F2 -- B1 F3 B2 F4 B3 W1 F5 B4 W2 F6 B5 W3 F7 B6 W4 F8 B7 W5 B8 W6 W7 W8
-- -- -- F1 B1 F2 B2 F3 B3 F4 B4 W1 F5 B5 W2 F6 B6 W3 F7 B7 W4 F8 B8 W5 W6 W7 W8
"""
_V_2_STAGES = """
F1 F2 F3 f1 b1 w1 f2 b2 w2 F4 B1 W1 f3 b3 w3 B2 W2 f4 b4 w4 B3 W3 B4 W4 --
-- F1 f1 F2 f2 b1 w1 F3 B1 W1 f3 b2 w2 F4 B2 W2 f4 b3 w3 B3 b4 B4 W3 w4 W4
"""
_V_3_STAGES = """
F1 F2 F3 F4 F5 f1 b1 w1 f2 b2 w2 f3 b3 w3 B1 W1 f4 b4 w4 B2 W2 f5 b5 w5 B3 W3 B4 W4 B5 W5 -- --
-- F1 F2 F3 f1 F4 f2 b1 w1 f3 b2 w2 F5 B1 W1 f4 b3 w3 B2 W2 f5 b4 w4 B3 b5 B4 W3 B5 W4 w5 W5 --
-- -- F1 f1 F2 f2 F3 f3 b1 w1 F4 B1 W1 f4 b2 w2 F5 B2 W2 f5 b3 w3 B3 b4 B4 b5 B5 W3 w4 w5 W4 W5
"""
_V_4_STAGES = """
F1 F2 F3 F4 F5 F6 F7 f1 b1 w1 f2 b2 w2 f3 b3 w3 f4 b4 w4 B1 W1 f5 b5 w5 B2 W2 f6 b6 w6 B3 W3 f7 b7 w7 B4 W4 B5 W5 B6 W6 B7 W7 -- -- --
-- F1 F2 F3 F4 F5 f1 F6 f2 b1 w1 f3 b2 w2 f4 b3 w3 F7 B1 W1 f5 b4 w4 B2 W2 f6 b5 w5 B3 W3 f7 b6 w6 B4 b7 B5 W4 B6 W5 B7 W6 w7 W7 -- --
-- -- F1 F2 F3 f1 F4 f2 F5 f3 b1 w1 f4 b2 w2 F6 B1 W1 f5 b3 w3 F7 B2 W2 f6 b4 w4 B3 W3 f7 b5 w5 B4 b6 B5 b7 B6 W4 B7 W5 w6 w7 W6 W7 --
-- -- -- F1 f1 F2 f2 F3 f3 F4 f4 b1 w1 F5 B1 W1 f5 b2 w2 F6 B2 W2 f6 b3 w3 F7 B3 W3 f7 b4 w4 B4 b5 B5 b6 B6 b7 B7 W4 w5 w6 w7 W5 W6 W7
"""  # noqa: E501


@pytest.mark.parametrize(
    ("schedule", "micro_batches", "drawn"),
    [("zb-h1", 8, _H1_4_STAGES), ("zb-v", 4, _V_2_STAGES), ("zb-v", 5, _V_3_STAGES), ("zb-v", 7, _V_4_STAGES)],
    ids=["ZB-H1, 4 stages", "ZB-V, 2 stages", "ZB-V, 3 stages", "ZB-V, 4 stages"],
)
def test_schedules_as_drawn(schedule: Schedule, micro_batches: int, drawn: str) -> None:
    """All passes as long as each other: what runs on each stage in each unit of time."""
    wanted = [line.split() for line in drawn.split("\n") if line]
    stages = len(wanted)
    program = pipeline_program(schedule, stages, micro_batches, 2 if schedule == "zb-v" else 1)
    found = simulate(program, cluster_of(workers(stages)), framework_of(pass_s=1.0))
    assert found.makespan_s == len(wanted[0])
    letters = {"forward": "F", "backward": "B", "weight-gradient": "W"}
    rows = [["--"] * len(wanted[0]) for _ in range(stages)]
    for span in found.timeline().spans:
        if span.op.kind == "compute":
            assert span.end_s - span.start_s == 1.0
            letter = letters[span.op.phase]
            one = f"{letter if span.op.stage < stages else letter.lower()}{span.op.micro_batch + 1}"
            rows[span.rank][int(span.start_s)] = one
    assert rows == wanted


# --------------------------------------------------------------------------------------------------- the bubbles


@given(stages=st.integers(1, 7), count=st.integers(1, 16), passes=TIMES)
@settings(max_examples=120, deadline=None)
def test_bubble_of_zb_h1(stages: int, count: int, passes: tuple[int, int, int]) -> None:
    """(p-1)(f + b - w) as in the paper, where w is the shortest pass and m >= p."""
    f, b, w = passes
    program = pipeline_program("zb-h1", stages, count, 1, passes=passes)
    found = simulate(program, cluster_of(workers(stages)), framework_of(pass_s=1.0)).makespan_s
    hidden = (min(count, stages) - 1) * min(f, b, w)
    assert found == pytest.approx(count * (f + b + w) + (stages - 1) * (f + b) - hidden, rel=1e-12)
    if count >= stages and w <= min(f, b):
        assert found - count * (f + b + w) == pytest.approx((stages - 1) * (f + b - w), abs=1e-9)
    # 1F1B waits for the whole backward pass.
    whole = pipeline_program("1f1b", stages, count, 1, passes=(f, b + w, 1))
    waiting = simulate(whole, cluster_of(workers(stages)), framework_of(pass_s=1.0)).makespan_s
    assert found <= waiting


@given(stages=st.integers(1, 6), more=st.integers(0, 6), passes=TIMES)
@settings(max_examples=120, deadline=None)
def test_bubble_of_zb_v(stages: int, more: int, passes: tuple[int, int, int]) -> None:
    """Of passes f, b, w through one of a stage's two chunks: the fill alone where they are equal, (p-1) f; in general
    the longest of six chains, for m >= 2p - 1."""
    f, b, w = passes
    count, gaps = 2 * stages - 1 + more, stages - 1
    program = pipeline_program("zb-v", stages, count, 2, passes=passes)
    found = simulate(program, cluster_of(workers(stages)), framework_of(pass_s=1.0)).makespan_s
    bubble = found - 2 * count * (f + b + w)
    chains = [gaps * b, 2 * gaps * (b - w), (gaps - 1) * w + max(f, b)] if gaps else [0]
    if gaps and f > b:
        chains += [gaps * (2 * f - b) - min(f - b, w), 2 * gaps * (f - w) - min(f - b, w)]
    assert bubble == pytest.approx(max(chains), abs=1e-9)
    if f == b == w:
        assert bubble == pytest.approx(gaps * f, abs=1e-9)


@given(
    stages=st.integers(2, 6),
    count=st.integers(1, 14),
    passes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    loads=st.lists(st.integers(1, 3), min_size=6, max_size=6),
    schedule=st.sampled_from(["1f1b", "zb-h1", "zb-v"]),
)
@settings(max_examples=60, deadline=None)
def test_no_schedule_beats_its_chains(
    stages: int, count: int, passes: tuple[int, int], loads: list[int], schedule: Schedule
) -> None:
    """Uneven stages: the slowest one's work and what comes before its first pass; one micro-batch's way through all."""
    f, b = passes
    virtual = 2 if schedule == "zb-v" else 1
    model = model_of(layer_count=sum(loads[:stages]) * virtual, vocab=24, positions=0)
    sizes = [loads[stage_of(schedule, stages, chunk)] for chunk in range(stages * virtual)]
    layout = layout_of(
        Mesh(dp=1, tp=1, pp=stages), all_reduce(), schedule=schedule, virtual_stages=virtual, layer_count=model.layers
    )
    starts = tuple(sum(sizes[:chunk]) for chunk in range(len(sizes)))
    layout = replace(layout, pipeline=replace(layout.pipeline, boundaries=starts))
    # Half of a backward layer's host time each for B and W.
    framework = framework_of(pass_s=float(f), backward_s=2.0 * b)
    program = lower(workload_of(count, model=model), layout, framework, 1)
    found = simulate(program, cluster_of(workers(stages, far=wire(ENDLESS))), framework).makespan_s
    for stage in range(stages):
        assert found >= count * virtual * loads[stage] * (f + 2 * b) + sum(loads[:stage]) * f - 1e-9
    assert found >= sum(sizes) * (f + (2 * b if schedule == "1f1b" else b)) - 1e-9


# ------------------------------------------------------------------------------------------------------ P13, order


@given(stages=st.integers(1, 7), count=st.integers(1, 20), schedule=st.sampled_from(ZERO_BUBBLE))
@settings(max_examples=100, deadline=None)
def test_order_of_passes(stages: int, count: int, schedule: Schedule) -> None:
    """Every pass once; no weight gradient before its backward pass, no backward before its forward pass; weight
    gradients in the order of the micro-batches, so that the last one ends a chunk's gradients."""
    virtual = 2 if schedule == "zb-v" else 1
    phases: tuple[Phase, ...] = ("forward", "backward", "weight-gradient")
    for stage in range(stages):
        chunks = chunks_of(schedule, stages, stage, virtual)
        order = turns(schedule, stages, stage, count, virtual)
        assert Counter(order) == Counter(Turn(m, c, p) for m in range(count) for c in chunks for p in phases)
        place = {turn: index for index, turn in enumerate(order)}
        for m, c in product(range(count), chunks):
            ahead = [place[Turn(m, c, phase)] for phase in phases]
            assert ahead == sorted(ahead)
        for c, phase in product(chunks, phases):
            of_chunk = [turn.micro_batch for turn in order if turn.chunk == c and turn.phase == phase]
            assert of_chunk == list(range(count))
    every = [chunk for stage in range(stages) for chunk in chunks_of(schedule, stages, stage, virtual)]
    assert sorted(every) == list(range(stages * virtual))


@given(stages=st.integers(1, 7), count=st.integers(1, 20), data=st.data())
@settings(max_examples=100, deadline=None)
def test_p13_held_by_zero_bubble_schedules(stages: int, count: int, data: st.DataObject) -> None:
    """ZB-H1 holds what 1F1B holds on the first stage, with what waits for weight gradients in it; ZB-V as much in
    halves of a stage."""
    stage = data.draw(st.integers(0, stages - 1))
    h1 = fullest_moments("zb-h1", stages, stage, count, 1)
    assert max(held.passes for (held,) in h1) == min(count, stages - stage)
    assert max(held.passes + held.weights for (held,) in h1) == min(count, stages)
    v = fullest_moments("zb-v", stages, stage, count, 2)
    assert max(first.passes + second.passes for first, second in v) <= 2 * stages
    assert max(sum(one.passes + one.weights for one in moment) for moment in v) <= 2 * stages
    # The moments cover every state of a walk through the whole schedule.
    for schedule, found in zip(ZERO_BUBBLE, (h1, v), strict=True):
        virtual = 2 if schedule == "zb-v" else 1
        chunks = chunks_of(schedule, stages, stage, virtual)
        held = {(chunk, kind): 0 for chunk in chunks for kind in (0, 1)}
        for turn in turns(schedule, stages, stage, count, virtual):
            held[turn.chunk, 0] += {"forward": 1, "backward": -1}.get(turn.phase, 0)
            held[turn.chunk, 1] += {"backward": 1, "weight-gradient": -1}.get(turn.phase, 0)
            state = list(held.values())
            assert min(state) >= 0
            assert any(
                all(have <= most for have, most in zip(state, [n for one in moment for n in one], strict=True))
                for moment in found
            )


# -------------------------------------------------------------------------------------------- B and W of a backward


_MODELS = {
    "gpt": model_of(layer_count=4),
    "tied, dropout": model_of(layer_count=4, tied=True, dropout=True),
    "gated, no bias": model_of(layer_count=4, gated=True, bias=False, norm="rmsnorm", rotary=True, positions=0),
    "experts": model_of(layer_count=4, experts=Experts(count=8, per_token=2, hidden=768), gated=True),
}


def _counted(kernels: Kernels) -> Counter[Kernel]:
    found: Counter[Kernel] = Counter()
    for kernel, count in kernels:
        found[kernel] += count
    return found


@pytest.mark.parametrize("name", list(_MODELS))
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_b_and_w_are_the_backward_pass(name: str, recompute: Recompute, attention: str) -> None:
    model = _MODELS[name]
    framework = framework_of(attention=attention)
    cases: list[tuple[int, bool, Dtype]] = [
        (1, False, "bf16"),
        (4, False, "fp8"),
        (4, True, "bf16"),
        (24, False, "bf16"),
    ]
    for tp, sp, dtype in cases:
        workload = Workload(model=model, training=Training(global_batch=8, sequence=96, precision=dtype))
        plain = layout_of(Mesh(dp=1, tp=tp, pp=2), all_reduce(), recompute=recompute, sequence_parallel=sp)
        split = layout_of(
            Mesh(dp=1, tp=tp, pp=2), all_reduce(), recompute=recompute, sequence_parallel=sp, schedule="zb-h1"
        )
        for layers in (range(-1, 2), range(1, 3), range(2, 5)):
            whole = pass_work(workload, plain, framework, "backward", layers, 1)
            first = pass_work(workload, split, framework, "backward", layers, 1)
            second = pass_work(workload, split, framework, "weight-gradient", layers, 1)
            assert _counted(first.kernels) + _counted(second.kernels) == _counted(whole.kernels)
            # Recomputation and every collective belong to B; each takes half of the host's time.
            assert (first.inner, second.inner) == (whole.inner, ())
            assert (first.forward_layers, second.forward_layers) == (whole.forward_layers, 0)
            assert first.split_layers == second.split_layers == whole.backward_layers
            assert first.backward_layers == second.backward_layers == 0
            _only_weight_gradients(workload, split, framework.fused_elementwise, layers, second.kernels)


def _only_weight_gradients(workload: Workload, layout: Layout, fused: bool, layers: range, kernels: Kernels) -> None:
    """W is as many operations as the linear layers have forward, and the rest of B as many again."""
    model, tp = workload.model, layout.mesh.tp
    framework = framework_of(attention="flash", fused_elementwise=fused)
    forward = pass_work(workload, layout, framework, "forward", layers, 1)
    linear = sum(kernel.flops * n for kernel, n in forward.kernels if isinstance(kernel, Gemm))
    assert sum(kernel.flops * n for kernel, n in kernels) == linear
    for kernel, _ in kernels:
        assert isinstance(kernel, Gemm) or (isinstance(kernel, Memory) and kernel.op == "embedding")
    if layers.stop == model.layers + 1:
        head = head_forward(head_of(model, 96, tp=tp, sequence_parallel=layout.sequence_parallel, fused=fused))
        (logits,) = [kernel for kernel, _ in head if isinstance(kernel, Gemm)]
        assert Gemm(m=logits.n, n=logits.k, k=logits.m, dtype="bf16") in _counted(kernels)


@pytest.mark.parametrize(("recompute", "times"), [("none", 2), ("selective", 2), ("full", 4)])
@pytest.mark.parametrize("sp", [False, True])
def test_p14_recomputed_collectives_are_in_b(recompute: Recompute, times: int, sp: bool) -> None:
    """Two collectives of b s h a layer in B, and the two of the forward pass again where all of it is recomputed."""
    layout = layout_of(
        Mesh(dp=1, tp=4, pp=3),
        all_reduce(),
        layer_count=12,
        recompute=recompute,
        sequence_parallel=sp,
        schedule="zb-h1",
    )
    program = lower(workload_of(6, model=model_of(layer_count=12)), layout, framework_of(), 4)
    found: Counter[tuple[Phase, str]] = Counter()
    for op in program.positions[1].ops:
        if isinstance(op, Compute):
            for inner in program.works[op.work].inner:
                found[op.id.phase, inner.kind] += inner.count
    for kind in ("all_gather", "reduce_scatter") if sp else ("all_reduce",):
        assert found["backward", kind] == times * 4 * 6
        assert found["forward", kind] == 2 * 4 * 6
        assert found["weight-gradient", kind] == 0


# -------------------------------------------------------------------------------------------------- lowered programs


def _lowered(schedule: Schedule, scheme: Scheme, model: Model, *, overlaps: bool = True, dp: int = 2) -> Program:
    layout = layout_of(
        Mesh(dp=dp, tp=1, pp=3),
        scheme,
        layer_count=12,
        schedule=schedule,
        virtual_stages=2 if schedule == "zb-v" else 1,
    )
    overlap = Overlap(gradient_reduce=overlaps, parameter_gather=overlaps, pipeline_send=True)
    return lower(workload_of(6 * dp, model=model), layout, framework_of(pass_s=1e-3, overlap=overlap), 1)


@pytest.mark.parametrize("schedule", ZERO_BUBBLE)
@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("scheme", [all_reduce(), sharded(1), parameter_server(2, 0)], ids=lambda scheme: scheme.kind)
def test_gradients_leave_behind_the_last_weight_gradient(schedule: Schedule, overlaps: bool, scheme: Scheme) -> None:
    """A bucket goes with the last micro-batch's W of its layers, or with the last W of its stage; the optimizer waits
    for all of them."""
    model = model_of(layer_count=12)
    program = _lowered(schedule, scheme, model, overlaps=overlaps)
    machine = workers(6, far=wire(1e9, 1e-6))
    overlap = Overlap(gradient_reduce=overlaps, parameter_gather=overlaps, pipeline_send=True)
    framework = framework_of(pass_s=1e-3, overlap=overlap)
    found = simulate(program, cluster_of(machine, hosts=servers(2, far=wire(1e9))), framework)
    timeline = found.timeline()
    for rank_class in timeline.classes[: found.prices.placement.folding.classes]:
        spans = [span for span in timeline.spans if span.rank == rank_class.rank]
        last = [s for s in spans if s.op.phase == "weight-gradient" and s.op.micro_batch == 5]
        sent = [s for s in spans if s.op.phase == "synchronise" and s.op.kind != "gate"]
        assert {s.op.part for s in last} == {s.op.part for s in sent}
        ready = {s.op.part: s.end_s for s in last}
        stage_done = max(ready.values())
        for span in spans:
            if span in sent:
                assert span.start_s >= (ready[span.op.part] if overlaps else stage_done)
            if span.op.phase == "update" and span.op.kind == "compute":
                assert span.start_s >= max(s.end_s for s in spans if s.op.phase in ("weight-gradient", "synchronise"))
    whole = [s for s in timeline.spans if s.op.phase == "backward" and s.op.kind == "compute"]
    assert {s.op.part for s in whole} == {"all"}


def test_a_v_holds_tied_embeddings_once() -> None:
    """Its first stage has the embedding and the head: no gradients to add up between stages, and no second copy."""
    model = model_of(layer_count=12, tied=True)
    elements: dict[Schedule, int] = {}
    for schedule in ("zb-h1", "zb-v"):
        program = _lowered(schedule, all_reduce(), model)
        ops = [op for position in program.positions for op in position.ops if isinstance(op, Collective)]
        assert sum(op.group == "embedding" for op in ops) == (2 if schedule == "zb-h1" else 0)
        elements[schedule] = sum(bucket.elements for bucket in program.buckets)
    assert elements["zb-h1"] - elements["zb-v"] == model.vocab * model.hidden


@pytest.mark.parametrize("schedule", ZERO_BUBBLE)
def test_lowered_programs_take_as_long_as_drawn_ones(schedule: Schedule) -> None:
    model = model_of(layer_count=12, vocab=24, positions=0)
    stages, count, virtual = 3, 9, 2 if schedule == "zb-v" else 1
    layout = layout_of(
        Mesh(dp=1, tp=1, pp=stages), all_reduce(), layer_count=12, schedule=schedule, virtual_stages=virtual
    )
    framework = framework_of(pass_s=1.0, backward_s=2.0)
    program = lower(workload_of(count, model=model), layout, framework, 1)
    found = simulate(program, cluster_of(workers(stages, far=wire(ENDLESS))), framework).makespan_s
    each = 12 // stages // virtual
    drawn = simulate(
        pipeline_program(schedule, stages, count, virtual, passes=(each, each, each)), cluster_of(workers(stages)),
        framework_of(pass_s=1.0),
    ).makespan_s  # fmt: skip
    assert drawn <= found <= drawn + 2e-3


# ------------------------------------------------------------------------------------------ tensor-parallel overlap


@given(overlap=st.floats(0.0, 1.0), rate=st.sampled_from([1e9, 3e10, 1e12]), split=st.booleans())
@settings(max_examples=40, deadline=None)
def test_overlap_of_sequence_parallel_collectives(overlap: float, rate: float, split: bool) -> None:
    """max((1 - x) t, t - g) of their seconds t stays exposed, with g seconds of linear layers in the same pass. An
    all-reduce (without sequence parallelism) does not come in pieces."""
    for sp in (False, True):
        layout = layout_of(
            Mesh(dp=1, tp=4, pp=2), all_reduce(), sequence_parallel=sp, schedule="zb-h1" if split else "1f1b"
        )
        prices = []
        for fraction in (0.0, overlap):
            how = Overlap(gradient_reduce=True, parameter_gather=True, pipeline_send=True, tensor_parallel=fraction)
            framework = framework_of(overlap=how)
            program = lower(workload_of(4, sequence=1024), layout, framework, 4)
            cluster = cluster_of(workers(2, devices=4, near=wire(rate, 1e-6)))
            prices.append(Prices(program, cluster, framework, every_rank=False))
        none, some = prices
        for index, work in enumerate(none.placement.program.works):
            if sp and any(inner.kind == "all_reduce" for inner in work.inner):
                # The head's losses.
                continue
            whole, exposed = none.compute.inner_s(index, 0), some.compute.inner_s(index, 0)
            gemms = none.compute.costs[0].seconds(linear_layers(work.kernels))
            wanted = max((1.0 - overlap) * whole, whole - gemms) if sp else whole
            assert exposed == pytest.approx(wanted, rel=1e-9, abs=1e-15)
            device = none.compute.costs[0].seconds(work.kernels) + exposed
            assert some.compute.work_s(index, 0) == pytest.approx(device, rel=1e-9) or not work.inner
