"""Expert parallelism (docs/laws.md, Experts): what is exchanged, summed, kept and waited for by ranks that share."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from blocks import block_of
from clusters import (
    agreement,
    all_reduce,
    cluster_of,
    framework_of,
    layout_of,
    model_of,
    sharded,
    wire,
    workers,
    workload_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.cluster.cluster import Cluster, SlowNic, SlowRank
from clustersim.errors import ScenarioError
from clustersim.hardware.kernel import Gemm
from clustersim.layout.choices import Choices
from clustersim.layout.layout import Layout, Mesh, Schedule
from clustersim.layout.memory import StateBytes, footprint
from clustersim.layout.space import layouts
from clustersim.program.lower import lower
from clustersim.program.program import Collective, Compute, Inner, Program
from clustersim.scenario.load import question
from clustersim.search.search import survey
from clustersim.simulate.fold import rank_grid, replica_groups
from clustersim.simulate.simulate import simulate
from clustersim.workload.layer_kernels import backward, forward, recomputed
from clustersim.workload.model import Experts, Model
from clustersim.workload.parameters import stage_parameters
from clustersim.workload.training import Training, Workload

HIDDEN = 384


def experts_of(count: int = 8, per_token: int = 2, **changes: Any) -> Model:
    """The small decoder with experts of the width of its feed-forward block."""
    return model_of(experts=Experts(count=count, per_token=per_token, hidden=768), **changes)


def uneven(workload: Workload, imbalance: float) -> Workload:
    """The same training with uneven routers."""
    return replace(workload, training=replace(workload.training, expert_imbalance=imbalance))


def inner_of(program: Program, group: str, micro_batch: int = 0) -> list[tuple[str, Inner]]:
    """The collectives inside the passes of one micro-batch over all stages, with the phase of each."""
    return [
        (op.id.phase, item)
        for position in program.positions
        for op in position.ops
        if isinstance(op, Compute) and op.id.micro_batch == micro_batch
        for item in program.works[op.work].inner
        if item.group == group
    ]


@st.composite
def meshes(draw: st.DrawFn) -> tuple[Mesh, bool]:
    """Meshes with shared experts, and whether they run sequence parallelism."""
    ep = draw(st.sampled_from([2, 4, 8]))
    cp = draw(st.sampled_from([1, 2, 4]))
    tp = draw(st.sampled_from([1, 2]))
    least = ep // np.gcd(ep, cp)
    mesh = Mesh(dp=int(least) * draw(st.integers(1, 2)), tp=tp, pp=draw(st.sampled_from([1, 2])), cp=cp, ep=ep)
    return mesh, tp > 1


# --------------------------------------------------------------------------------------------- what is exchanged


@given(meshes(), st.sampled_from(["none", "full"]), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_p14_four_all_to_alls_a_layer(
    mesh_and_sp: tuple[Mesh, bool], recompute: Any, micro_batch: int, per_token: int
) -> None:
    """Dispatch and combine, forward and backward; two more where the forward pass runs again. Each rank has a row of
    hidden numbers for every choice of each of its tokens."""
    mesh, sp = mesh_and_sp
    model = experts_of(per_token=per_token)
    workload = workload_of(mesh.dp * micro_batch * mesh.pp, model=model)
    layout = layout_of(mesh, all_reduce(), micro_batch=micro_batch, sequence_parallel=sp, recompute=recompute)
    found = inner_of(lower(workload, layout, framework_of(), 8), "ep")
    assert {item.kind for _, item in found} == {"all_to_all"}
    counted = {phase: sum(item.count for where, item in found if where == phase) for phase in ("forward", "backward")}
    assert counted == {"forward": 2 * model.layers, "backward": (4 if recompute == "full" else 2) * model.layers}
    tokens = workload.training.sequence * micro_batch // mesh.cp // (mesh.tp if sp else 1)
    assert {item.bytes for _, item in found} == {tokens * per_token * HIDDEN * 2}


@pytest.mark.parametrize("per_token", [1, 2])
@pytest.mark.parametrize("ep", [2, 4, 8])
def test_p14_bytes_on_the_wire(ep: int, per_token: int) -> None:
    """A rank keeps its own share: (ep - 1)/ep of what is routed crosses a link, four times a layer and micro-batch."""
    workload = workload_of(16, model=experts_of(per_token=per_token))
    program = lower(workload, layout_of(Mesh(dp=8, tp=1, pp=1, ep=ep), sharded(1)), framework_of(), 8)
    links = simulate(program, cluster_of(workers(1, devices=8, near=wire(5e9))), framework_of()).links
    moved = {use.kind: use.count * use.inside_bytes_per_link for use in links}
    routed = workload.training.sequence * per_token * HIDDEN * 2
    whole = 8 * 2 * workload.model.layers * 4 * routed * (ep - 1) / ep
    assert moved["device out"] == moved["device in"] == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(("ep", "local"), [(4, 4), (8, 8), (8, 2)])
def test_all_to_all_takes_what_the_closed_form_says(ep: int, local: int) -> None:
    """A pass takes count * all-to-all more: (n-1)(alpha + M/(nB)) inside a node, and across nodes the bytes for other
    nodes at the rate of a rank's card."""
    near, far = wire(5e9, 1e-6), wire(1e9, 4e-6)
    cluster = cluster_of(workers(ep // local, devices=local, nics=local, near=near, far=far))
    workload = workload_of(ep, model=experts_of())
    layout = layout_of(Mesh(dp=ep, tp=1, pp=1, ep=ep), sharded(1))
    program = lower(workload, layout, framework_of(), local)
    size = workload.training.sequence * 2 * HIDDEN * 2
    prices = simulate(program, cluster, framework_of()).prices
    one = prices.collectives.seconds("ep", 0, "all_to_all", "pairwise", size)
    if local == ep:
        assert one == pytest.approx((ep - 1) * (1e-6 + size / ep / 5e9), rel=1e-9)
    else:
        assert one >= (ep - local) * size / ep / 1e9
        waits = (ep - 1) * 4e-6
        assert one <= (ep - local) * size / ep / 1e9 + (local - 1) * size / ep / 5e9 + waits + 1e-12
    for number, work in enumerate(program.works):
        if work.forward_layers:
            assert prices.compute.inner_s(number, 0) == pytest.approx(2 * work.forward_layers * one, rel=1e-12)


# ------------------------------------------------------------------------------------------------ what is summed


@given(meshes(), st.sampled_from(["all-reduce", "sharded"]))
@settings(max_examples=40, deadline=None)
def test_every_parameter_is_summed_once_over_the_ranks_that_hold_it(mesh_and_sp: tuple[Mesh, bool], kind: str) -> None:
    mesh, sp = mesh_and_sp
    model = experts_of()
    workload = workload_of(mesh.dp * mesh.pp, model=model)
    layout = layout_of(mesh, all_reduce() if kind == "all-reduce" else sharded(1), sequence_parallel=sp)
    program = lower(workload, layout, framework_of(), 8)
    whole = stage_parameters(model, range(model.layers), first=True, last=True, tp=mesh.tp)
    experts = stage_parameters(model, range(model.layers), first=True, last=True, tp=mesh.tp, part="experts")
    of_rank = [bucket for bucket in program.buckets if bucket.params == "experts"]
    # All ranks that share experts hold them once.
    assert sum(bucket.elements for bucket in of_rank) * mesh.ep == experts
    assert sum(bucket.elements for bucket in program.buckets) == whole - experts + experts // mesh.ep
    width = 4
    sent = dict.fromkeys(("dp", "expert-dp"), 0)
    for position in program.positions:
        for op in position.ops:
            if isinstance(op, Collective) and op.kind in ("all_reduce", "reduce_scatter"):
                sent[op.group] += op.bytes
    assert sent["dp"] == (whole - experts) * width
    assert sent["expert-dp"] == (experts // mesh.ep * width if mesh.expert_replicas > 1 else 0)


@given(meshes(), st.sampled_from(["tp-dp-pp", "tp-pp-dp"]))
def test_groups_meet_in_one_rank(mesh_and_sp: tuple[Mesh, bool], order: Any) -> None:
    """Ranks that share experts and ranks that hold the same ones: the replicas, as rows and as columns; neighbours
    share."""
    mesh, _ = mesh_and_sp
    sharing, holding = replica_groups(mesh, "ep"), replica_groups(mesh, "expert-dp")
    assert sharing.shape == (mesh.expert_replicas, mesh.ep)
    assert holding.shape == (mesh.ep, mesh.expert_replicas)
    assert sorted(sharing.ravel()) == sorted(holding.ravel()) == list(range(mesh.replicas))
    assert all(len(np.intersect1d(one, two)) == 1 for one in sharing for two in holding)
    steps = np.diff(rank_grid(mesh, order)[0, sharing, 0], axis=1)
    assert (steps == (mesh.tp if order == "tp-dp-pp" else mesh.tp * mesh.pp)).all()


# -------------------------------------------------------------------------------------------------- what is kept


@given(meshes(), st.sampled_from([1, 2, 3]))
@settings(max_examples=30, deadline=None)
def test_sharded_state_of_all_ranks_is_one_copy(mesh_and_sp: tuple[Mesh, bool], stage: Any) -> None:
    """Optimizer state over all ranks is that of every parameter once, experts over the few ranks that hold them."""
    mesh, sp = mesh_and_sp
    mesh = replace(mesh, pp=1)
    model = experts_of()
    workload = workload_of(mesh.dp, model=model)
    tree = {
        "schema_version": 1, "name": "experts", "model": "gpt2", "training": {"global_batch": 8, "sequence": 128},
        "framework": "megatron-core", "cluster": {"nodes": {"dgx-a100-80g": max(1, mesh.workers // 8)}},
    }  # fmt: skip
    asked = question(tree, "experts")
    if asked.cluster.devices != mesh.workers:
        return
    choices = Choices(
        families=("sharded",), least_servers=0, most_servers=0, dp=mesh.dp, tp=mesh.tp, pp=1, cp=mesh.cp, ep=mesh.ep,
        micro_batch=1, sequence_parallel=sp, sharded_stage=stage, recompute="none", schedule="1f1b",
    )  # fmt: skip
    space = layouts(workload, asked.cluster, asked.framework, choices)
    state = footprint(workload, space, asked.framework).state[0]
    per = StateBytes.of(space.precision, "adam")
    experts = stage_parameters(model, range(model.layers), first=True, last=True, tp=mesh.tp, part="experts")
    whole = stage_parameters(model, range(model.layers), first=True, last=True, tp=mesh.tp)
    dense = whole - experts
    kept = [per.optimizer, per.gradients * (stage >= 2), per.weights * (stage == 3)]
    once = sum(kept)
    always = per.optimizer + per.gradients + per.weights - once
    # Over the replicas: what is sharded once, the rest as often as it is held.
    assert state * mesh.replicas == pytest.approx(
        once * (dense + experts) + always * (dense * mesh.replicas + experts * mesh.expert_replicas), rel=1e-12
    )


# ---------------------------------------------------------------------------------------------- what is computed


def _expert_flops(model: Model, ep: int, tp: int, sp: bool, load: float = 1.0, cp: int = 1) -> int:
    """FLOPs of the experts' GEMMs on one rank, forward twice and backward: those that a dense layer does not have."""

    def flops(of: Model) -> int:
        block = block_of(of, 128, micro_batch=4, tp=tp, sequence_parallel=sp, cp=cp, ep=ep, load=load)
        kernels = (*forward(block), *backward(block), *recomputed(block, "full", "core"))
        return sum(kernel.flops * count for kernel, count in kernels if isinstance(kernel, Gemm))

    experts = model.experts
    assert experts is not None
    # What is left without experts to speak of: attention, and the router.
    least = replace(model, experts=replace(experts, hidden=tp))
    rest = 4 * 2 * 2 * 128 * 4 * experts.per_token * HIDDEN
    return flops(model) - flops(least) + round(rest * load)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.booleans())
def test_expert_work_of_all_ranks_is_the_whole(ep: int, tp: int, per_token: int, sp: bool) -> None:
    """Ranks that share experts swap work, and do as much as before; tensor-parallel ranks split it."""
    model = experts_of(per_token=per_token)
    # The forward pass twice and the backward pass, which is two of it: two matrices, 2 FLOPs each.
    whole = 4 * 2 * 2 * 128 * 4 * per_token * HIDDEN * 768
    assert _expert_flops(model, ep, tp, sp and tp > 1) * tp == whole


@given(st.sampled_from([2, 4, 8]), st.floats(1.0, 10.0))
def test_the_fullest_rank_has_its_share_more(ep: int, imbalance: float) -> None:
    training = Training(global_batch=8, sequence=128, expert_imbalance=imbalance)
    load = training.expert_load(ep)
    assert load == min(imbalance, ep)
    assert training.expert_load(1) == 1.0
    model = experts_of()
    stretched = _expert_flops(model, ep, 1, False, load) / _expert_flops(model, ep, 1, False)
    # Tokens are dealt eight at a time: at most four of 1,024 off.
    assert stretched == pytest.approx(load, abs=4.0 / 1024)


def test_uneven_routers_cost_time_and_memory_only_where_experts_are_shared() -> None:
    tree = {
        "schema_version": 1, "name": "experts", "model": "mixtral-8x7b", "framework": "megatron-core",
        "training": {"global_batch": 64, "sequence": 4096}, "cluster": {"nodes": {"hgx-h100": 4}},
    }  # fmt: skip
    for ep in (1, 8):
        step, memory = [], []
        for imbalance in (1.0, 1.5):
            tree["training"] = {"global_batch": 64, "sequence": 4096, "expert_imbalance": imbalance}
            asked = question(tree, "experts")
            layout = layout_of(
                Mesh(dp=32, tp=1, pp=1, ep=ep), sharded(1, bucket_bytes=25e6), layer_count=32,
                precision=replace(layout_of(Mesh(dp=1, tp=1, pp=1), sharded(1)).precision, gradient="bf16"),
            )  # fmt: skip
            program = lower(asked.workload, layout, asked.framework, 8)
            step.append(simulate(program, asked.cluster, asked.framework).step_s)
            choices = Choices(
                families=("sharded",), least_servers=0, most_servers=0, dp=32, tp=1, pp=1, cp=1, ep=ep, micro_batch=1,
                sharded_stage=1, recompute="none",
            )  # fmt: skip
            space = layouts(asked.workload, asked.cluster, asked.framework, choices)
            memory.append(footprint(asked.workload, space, asked.framework).activations[0])
        if ep == 1:
            assert step[0] == step[1]
            assert memory[0] == memory[1]
        else:
            # Expert GEMMs are most of the work, and no more than half as much is added to them.
            assert 1.15 < step[1] / step[0] < 1.5
            assert 1.05 < memory[1] / memory[0] < 1.5


# -------------------------------------------------------------------------------------------- who waits for whom


def test_a_straggler_slows_the_ranks_that_share_experts_with_it() -> None:
    """All-to-alls keep ep ranks in step, and their tensor-parallel peers; others go on until gradients are summed."""
    mesh = Mesh(dp=8, tp=2, pp=1, ep=4)
    cluster = cluster_of(workers(4, devices=4, nics=4), faults=(SlowRank(rank=3, slowdown=2.0),))
    layout = layout_of(mesh, sharded(1), sequence_parallel=True)
    program = lower(workload_of(8, model=experts_of()), layout, framework_of(), 4)
    prices = simulate(program, cluster, framework_of()).prices
    number = next(n for n, work in enumerate(program.works) if work.forward_layers)
    seconds = [prices.compute.work_s(number, int(c)) for c in prices.placement.folding.class_of]
    assert seconds[:8] == [seconds[0]] * 8
    assert seconds[8:] == [seconds[8]] * 8
    assert seconds[0] > seconds[8]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Cluster, Workload, Layout]:
    """Small clusters with faults, and layouts with cp and ep on them."""
    devices = draw(st.sampled_from([2, 4, 8]))
    cp, tp, pp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    replicas = cp * draw(st.sampled_from([1, 2, 4]))
    ep = draw(st.sampled_from([e for e in (1, 2, 4, 8) if replicas % e == 0]))
    ranks = replicas * tp * pp
    if ranks % devices:
        devices = 2 if ranks % 2 == 0 else 1
    nodes = ranks // devices
    faults: list[Any] = []
    for _ in range(draw(st.integers(0, 2))):
        faults.append(SlowRank(rank=draw(st.integers(0, ranks - 1)), slowdown=draw(st.sampled_from([1.25, 2.0]))))
    for _ in range(draw(st.integers(0, 1))):
        node, nic = draw(st.integers(0, nodes - 1)), draw(st.integers(0, devices - 1))
        faults.append(SlowNic(node=node, nic=nic, speed=0.5))
    machine = workers(nodes, devices=devices, nics=devices, far=wire(2e9, 5e-6, launch=1e-5), near=wire(5e9, 1e-6))
    mesh = Mesh(dp=replicas // cp, tp=tp, pp=pp, cp=cp, ep=ep)
    kinds = [all_reduce(draw(st.sampled_from(["ring", "tree", "hierarchical", "halving-doubling"])))]
    if replicas > 1:
        kinds += [sharded(1), *([sharded(2), sharded(3)] if pp == 1 else [])]  # type: ignore[list-item]
    elif replicas == 1:
        kinds = [all_reduce("ring")]
    schedule: Schedule = draw(st.sampled_from(["1f1b", "gpipe", "interleaved", "zb-h1", "zb-v"])) if pp > 1 else "1f1b"
    layout = layout_of(
        mesh,
        draw(st.sampled_from(kinds)),
        schedule=schedule,
        virtual_stages=2 if schedule in ("interleaved", "zb-v") else 1,
        order=draw(st.sampled_from(["tp-dp-pp", "tp-pp-dp"])),
        sequence_parallel=tp > 1 and (ep > 1 or draw(st.booleans())),
        recompute=draw(st.sampled_from(["none", "full"])),
    )
    model = experts_of(kv_heads=draw(st.sampled_from([24, 8])))
    workload = uneven(workload_of(mesh.dp * pp, model=model), draw(st.sampled_from([1.0, 1.3])))
    return cluster_of(machine, faults=tuple(faults)), workload, layout


@given(cases())
@settings(max_examples=25, deadline=None)
def test_fold_with_shared_experts_and_sequences_a_class_stands_for_its_ranks(
    case: tuple[Cluster, Workload, Layout],
) -> None:
    cluster, workload, layout = case
    program = lower(workload, layout, framework_of(pass_s=2e-5), cluster.devices_per_node)
    folded = simulate(program, cluster, framework_of(pass_s=2e-5))
    unfolded = simulate(program, cluster, framework_of(pass_s=2e-5), fold=False)
    assert folded.makespan_s == pytest.approx(unfolded.makespan_s, rel=1e-9)
    assert folded.classes <= unfolded.classes
    every, members = unfolded.prices.placement.folding.members, folded.prices.placement.folding.members
    ends = {(int(rank), span.op): span.end_s for span in unfolded.timeline().spans for rank in every[span.rank]}
    for span in folded.timeline().spans:
        for rank in members[span.rank]:
            assert span.end_s == pytest.approx(ends[int(rank), span.op], rel=1e-9, abs=1e-12), (span, rank)


# ------------------------------------------------------------------------------------------------------ measured


# NVIDIA NeMo Framework user guide, performance summary 25.02 (DGX B200, fp8): tokens/s a GPU.
# (model, GPUs, batch, micro-batch, sequence, tp, pp, cp, virtual stages, ep, measured)
_PUBLISHED = [
    ("mixtral-8x7b", 64, 256, 2, 4096, 1, 1, 1, 1, 8, 15457),
    ("mixtral-8x22b", 256, 64, 1, 65536, 2, 4, 8, 14, 8, 2232),
]  # fmt: skip


@pytest.mark.parametrize("run", _PUBLISHED, ids=lambda run: str(run[0]))
def test_shared_experts_run_as_fast_as_measured(run: tuple[Any, ...]) -> None:
    """Published runs with balanced routers, to which nothing was fitted."""
    model, gpus, batch, size, sequence, tp, pp, cp, virtual, ep, measured = run
    tree = {
        **_MIXTRAL, "model": model, "cluster": {"nodes": {"hgx-b200": gpus // 8}, "fabric": "rail-optimized"},
        "training": {"global_batch": batch, "sequence": sequence, "precision": "fp8"},
        "layout": {
            "tp": tp, "pp": pp, "cp": cp, "ep": ep, "micro_batch": size, "recompute": "none", "sync": "sharded",
            "sharded_stage": 1, "sequence_parallel": tp > 1, "virtual_stages": virtual,
        },
    }  # fmt: skip
    asked = question(tree, "experts")
    program = lower(asked.workload, survey(asked).space.layout(0), asked.framework, 8)
    step = simulate(program, asked.cluster, asked.framework).step_s
    rate = asked.workload.training.tokens_per_step / step / gpus
    print(f"{model} on {gpus} B200: {rate:,.0f} tokens/s a GPU, measured {measured:,} ({rate / measured - 1.0:+.1%})")
    assert rate == pytest.approx(measured, rel=0.15)


# ------------------------------------------------------------------------------------------- estimates, the space


_MIXTRAL: dict[str, Any] = {
    "schema_version": 1,
    "name": "experts",
    "model": "mixtral-8x7b",
    "training": {"global_batch": 256, "sequence": 4096, "expert_imbalance": 1.1},
    "framework": "megatron-core",
    "cluster": {"nodes": {"hgx-h100": 8}, "fabric": "rail-optimized"},
    "search": {"sync": ["allreduce", "sharded"]},
}  # fmt: skip


def test_estimates_of_shared_experts_rank_layouts_as_simulations_do() -> None:
    asked = question(_MIXTRAL, "experts")
    found = survey(asked)
    ep = found.space.divisions.ep[found.space.division]
    rng = random.Random(3)
    chosen: list[int] = []
    for degree in (1, 2, 4, 8):
        rows = [int(row) for row in found.feasible if ep[row] == degree]
        chosen += rng.sample(rows, min(6, len(rows)))
    correlation, bias = agreement("shared experts", asked, found, chosen)
    assert correlation >= 0.95
    assert bias <= 0.10


def test_the_space_holds_every_way_to_share_experts_and_none_else() -> None:
    found = survey(question(_MIXTRAL, "experts")).space
    d = found.divisions
    assert set(np.unique(d.ep).tolist()) == {1, 2, 4, 8}
    assert (d.dp * d.cp * d.tp * d.pp == 64).all()
    assert (d.replicas % d.ep == 0).all()
    assert d.sequence_parallel[(d.ep > 1) & (d.tp > 1)].all()
    rng = random.Random(1)
    for row in rng.sample(range(len(found)), 20):
        assert found.row_of(found.layout(row)) == row


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"model": "llama3-8b", "layout": {"ep": 2}}, "layout.ep", "has no experts"),
        ({"layout": {"ep": 3}}, "layout.ep", "no multiple"),
        ({"layout": {"ep": 2, "sync": "parameter-server"}}, "layout.ep", "parameter server"),
        ({"layout": {"ep": 2, "tp": 2, "sequence_parallel": False}}, "layout.ep", "sequence_parallel: true"),
        ({"layout": {"cp": 3}}, "layout.cp", "no multiple of 2 cp"),
        ({"layout": {"cp": 2}, "framework": "megatron-lm"}, "layout.cp", "fused kernel"),
        ({"training": {"global_batch": 8, "sequence": 64, "expert_imbalance": 0.5}}, "training", "at least 1"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_written(changes: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        question({**_MIXTRAL, **changes}, "experts")
    assert key in str(caught.value)
    assert words in str(caught.value)
