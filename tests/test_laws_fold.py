"""Folding (docs/laws.md): a class stands for its ranks exactly, and classes do not grow with the cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
from clusters import (
    all_reduce,
    cluster_of,
    framework_of,
    host_of,
    layout_of,
    model_of,
    parameter_server,
    servers,
    sharded,
    wire,
    workers,
    workload_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.cluster.background import Background
from clustersim.cluster.cluster import Cluster, Fault, SlowNic, SlowRank
from clustersim.cluster.fabric import Fabric
from clustersim.cluster.graph import leaves
from clustersim.hardware.cost import load_device
from clustersim.hardware.framework import Schedule
from clustersim.layout.layout import Layout, Mesh, Scheme
from clustersim.program.lower import lower
from clustersim.scenario.load import question
from clustersim.simulate.simulate import simulate
from clustersim.workload.model import Experts
from clustersim.workload.training import Workload

# Another device than the builders' one.
OTHER = "h100-sxm"
FabricKind = Literal["one-switch", "leaf-spine", "rail-optimized"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A cluster, a workload and a layout on it."""

    cluster: Cluster
    workload: Workload
    layout: Layout
    slowdown: float
    pass_s: float = 2e-4


def _schedules(pp: int, virtual: int) -> tuple[Schedule, ...]:
    if virtual > 1:
        return ("interleaved", "zb-v")
    return ("1f1b", "gpipe", "zb-h1") if pp > 1 else ("1f1b", "gpipe")


@st.composite
def cases(draw: st.DrawFn, *, faults: bool = True, most_ranks: int = 24, shared_work: bool = False) -> Case:
    """Small clusters of every fabric, with faults and other jobs, and layouts of every kind on them; `shared_work`:
    with sequences and experts that ranks share, too."""
    devices = draw(st.sampled_from([1, 2, 4, 6]))
    nodes = draw(st.integers(1, most_ranks // devices))
    ranks = nodes * devices
    # Now and then all ranks share one host and its memory, as on a laptop.
    shared = nodes == 1 and not shared_work and draw(st.booleans())
    nics = draw(st.sampled_from([n for n in (1, 2, 4, 6, 8) if max(n, devices) % min(n, devices) == 0]))
    host = host_of(reduce_rate=draw(st.sampled_from([3e9, 1e11])), bandwidth=1e10)
    machine = workers(
        nodes, devices=devices, nics=nics, far=wire(2e9, 5e-6, launch=1e-5), near=wire(5e9, 1e-6),
        pcie=draw(st.sampled_from([None, wire(1.5e9)])), per_switch=draw(st.sampled_from([1, 2, 4])),
        inside=draw(st.sampled_from(["switch", "switch", "pcie"])), host=host,
    )  # fmt: skip
    if shared:
        machine = replace(machine, nic=wire(2e9, 5e-6, launch=1e-5, kind="loopback"))
    machines = [machine]
    if nodes > 1 and draw(st.booleans()):
        faster = replace(machine, count=nodes // 2, nic=wire(6e9, 2e-6, launch=1e-5))
        if draw(st.booleans()):
            faster = replace(faster, node=replace(faster.node, device=OTHER), device=load_device(OTHER))
        machines = [replace(machine, count=nodes - nodes // 2), faster]
    hosts = 0 if shared else draw(st.integers(0, 3))
    fabric = Fabric(
        kind=draw(st.sampled_from(["one-switch", "leaf-spine", "rail-optimized"])),
        nodes_per_leaf=draw(st.integers(1, 4)),
        oversubscription=draw(st.sampled_from([1.0, 1.0, 2.0, 3.0])),
        hop_latency_s=1e-6,
    )
    if fabric.kind != "one-switch" and draw(st.integers(0, 9)) == 0:
        fabric = replace(fabric, routing="ecmp", spines=draw(st.sampled_from([2, 3])))
    broken: list[Fault] = []
    if faults:
        for _ in range(draw(st.integers(0, 2))):
            slow = draw(st.sampled_from([1.25, 2.0]))
            broken.append(SlowRank(rank=draw(st.integers(0, ranks - 1)), slowdown=slow))
        for _ in range(draw(st.integers(0, 2))):
            node, nic = draw(st.integers(0, nodes - 1)), draw(st.integers(0, nics - 1))
            broken.append(SlowNic(node=node, nic=nic, speed=draw(st.sampled_from([0.25, 0.5]))))
    cluster = cluster_of(
        *machines, hosts=servers(hosts, far=wire(2e9, 5e-6), host=host) if hosts else None, fabric=fabric,
        faults=tuple(broken),
    )  # fmt: skip
    if faults and not shared:
        cluster = replace(cluster, background=tuple(draw(_others(cluster))))
    tp = draw(st.sampled_from([t for t in (1, 2, 3, 4, 6) if ranks % t == 0 and t <= 2 * devices]))
    pp = draw(st.sampled_from([p for p in (1, 2, 3, 4) if ranks // tp % p == 0]))
    replicas = ranks // tp // pp
    cp = draw(st.sampled_from([c for c in (1, 2, 4) if replicas % c == 0])) if shared_work else 1
    ep = draw(st.sampled_from([e for e in (1, 2, 4) if replicas % e == 0])) if shared_work else 1
    mesh = Mesh(dp=replicas // cp, tp=tp, pp=pp, cp=cp, ep=ep)
    scheme = draw(_schemes(mesh, nodes, hosts, shared))
    virtual = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    layer_count = pp * virtual * draw(st.integers(1, 2))
    micro_batches = pp * draw(st.integers(1, 2))
    layout = layout_of(
        mesh,
        scheme,
        layer_count=layer_count,
        schedule=draw(st.sampled_from(_schedules(pp, virtual))),
        virtual_stages=virtual,
        order=draw(st.sampled_from(["tp-dp-pp", "tp-pp-dp"])),
        sequence_parallel=tp > 1 and 128 % (tp * cp) == 0 and (ep > 1 or draw(st.booleans())),
        recompute=draw(st.sampled_from(["none", "full"])),
    )
    experts = Experts(count=ep * 2, per_token=1, hidden=384) if ep > 1 else None
    model = model_of(layer_count=layer_count, tied=draw(st.booleans()), experts=experts)
    return Case(
        cluster=cluster,
        workload=workload_of(mesh.dp * micro_batches, model=model),
        layout=layout,
        slowdown=draw(st.sampled_from([1.0, 1.5])),
        pass_s=draw(st.sampled_from([2e-4, 1e-6])),
    )


@st.composite
def _others(draw: st.DrawFn, cluster: Cluster) -> list[Background]:
    """What other jobs use: of all links of a kind or of some."""
    found = []
    places = {"nic": cluster.worker_nodes + cluster.server_nodes}
    if cluster.fabric.kind != "one-switch":
        places["leaf-uplink"] = leaves(cluster).count
    for link, count in places.items():
        if draw(st.integers(0, 3)) == 0:
            some = st.lists(st.integers(0, count - 1), min_size=1, max_size=2, unique=True).map(tuple)
            share, at = draw(st.sampled_from([0.25, 0.5])), draw(st.none() | some)
            found.append(Background(link=link, share=share, at=at))  # type: ignore[arg-type]
    return found


@st.composite
def _schemes(draw: st.DrawFn, mesh: Mesh, nodes: int, hosts: int, shared: bool) -> Scheme:
    if mesh.replicas == 1:
        return all_reduce("ring")
    kinds = ["all-reduce", "sharded-1", "colocated"]
    if mesh.cp * mesh.ep > 1:
        kinds, hosts = ["all-reduce", "sharded-1"], 0
    kinds += ["sharded-2", "sharded-3"] if mesh.pp == 1 else []
    kinds += ["dedicated", "mixed"] if hosts else []
    match draw(st.sampled_from(kinds)):
        case "all-reduce":
            by_switches = [] if shared else ["nvls", "sharp"]
            known = ["ring", "tree", "binary-tree", "hierarchical", "halving-doubling", *by_switches]
            return all_reduce(draw(st.sampled_from(known)))
        case "sharded-1":
            return sharded(1)
        case "sharded-2":
            return sharded(2)
        case "sharded-3":
            return sharded(3)
        case "colocated":
            nodes = mesh.workers if shared else nodes
            fewer = [n for n in range(1, nodes + 1) if mesh.workers % n == 0]
            count = draw(st.sampled_from([nodes, *fewer]))
            return parameter_server(0, count, optimizer_at=draw(st.sampled_from(["server", "worker"])))
        case "dedicated":
            return parameter_server(hosts, 0, optimizer_at=draw(st.sampled_from(["server", "worker"])))
        case _:
            parts = draw(st.sampled_from([(1, 1), (5, 2)]))
            return parameter_server(hosts, nodes, parts=parts)


def framework(case: Case) -> Any:
    """Costs of every kind."""
    plain = framework_of(pass_s=case.pass_s)
    overlap = type(plain.overlap)(
        gradient_reduce=True, parameter_gather=True, pipeline_send=True, compute_slowdown=case.slowdown
    )
    return framework_of(pass_s=case.pass_s, overlap=overlap)


@given(cases())
@settings(max_examples=120, deadline=None)
def test_fold_a_class_stands_for_its_ranks_exactly(case: Case) -> None:
    _check(case)


@given(cases(faults=False, most_ranks=48))
@settings(max_examples=40, deadline=None)
def test_fold_a_sound_cluster_is_its_classes(case: Case) -> None:
    _check(case)


@given(cases(shared_work=True))
@settings(max_examples=80, deadline=None)
def test_fold_a_class_stands_for_ranks_that_share_sequences_and_experts(case: Case) -> None:
    _check(case)


def _check(case: Case) -> None:
    program = lower(case.workload, case.layout, framework(case), case.cluster.devices_per_node)
    folded = simulate(program, case.cluster, framework(case))
    unfolded = simulate(program, case.cluster, framework(case), fold=False)
    assert folded.makespan_s == pytest.approx(unfolded.makespan_s, rel=1e-9)
    assert folded.classes <= unfolded.classes
    # Not only the end: what every rank did, and when.
    ends = dict[tuple[int, object], float]()
    members = unfolded.prices.placement.folding.members
    for span in unfolded.timeline().spans:
        if span.rank < len(members):
            ends |= {(int(rank), span.op): span.end_s for rank in members[span.rank]}
    mesh = case.layout.mesh.workers
    for span in folded.timeline().spans:
        members = folded.prices.placement.folding.members
        if span.rank >= len(members):
            continue
        for rank in members[span.rank]:
            assert span.end_s == pytest.approx(ends[int(rank), span.op], rel=1e-9, abs=1e-12), (span, rank)
    every = np.concatenate(folded.prices.placement.folding.members)
    assert sorted(every.tolist()) == list(range(mesh))


@given(cases(most_ranks=16))
@settings(max_examples=40, deadline=None)
def test_fold_bytes_of_all_links_are_the_same(case: Case) -> None:
    program = lower(case.workload, case.layout, framework(case), case.cluster.devices_per_node)
    totals = []
    for fold in (True, False):
        total = dict[str, float]()
        for use in simulate(program, case.cluster, framework(case), fold=fold).links:
            total[use.kind] = total.get(use.kind, 0.0) + use.count * use.bytes_per_link
        totals.append(total)
    assert totals[0] == pytest.approx(totals[1], rel=1e-9)


def _dgx(nodes: int, fabric: str, faults: tuple[dict[str, Any], ...] = ()) -> Cluster:
    tree = {
        "schema_version": 1,
        "name": "fold",
        "model": "gpt3-1.3b",
        "training": {"global_batch": 1024, "sequence": 2048},
        "cluster": {
            "nodes": {"dgx-a100-80g": nodes}, "servers": {"cpu-server-200g": 4}, "fabric": fabric,
            "faults": list(faults),
        },
    }  # fmt: skip
    return question(tree, "fold").cluster


@pytest.mark.parametrize("fabric", ["one-switch", "leaf-spine", "rail-optimized"])
@pytest.mark.parametrize("kind", ["ring", "sharded", "colocated", "dedicated"])
def test_fold_classes_do_not_grow_with_the_cluster(fabric: str, kind: str) -> None:
    counts = []
    for nodes in (32, 64, 256):
        schemes: dict[str, Scheme] = {
            "ring": all_reduce("ring"),
            "sharded": sharded(1),
            "colocated": parameter_server(0, nodes),
            "dedicated": parameter_server(4, 0),
        }
        mesh = Mesh(dp=nodes, tp=4, pp=2)
        layout = layout_of(mesh, schemes[kind], layer_count=8)
        program = lower(workload_of(2 * nodes, model=model_of(layer_count=8)), layout, framework_of(), 8)
        found = simulate(program, _dgx(nodes, fabric), framework_of())
        counts.append(found.classes)
    assert counts[0] == counts[1] == counts[2] <= 2 * 8 + 1


def test_fold_a_fault_splits_only_what_it_touches() -> None:
    """One straggler among 2,048 ranks: its node, its groups and its column are told apart, the rest is not."""
    layout = layout_of(Mesh(dp=128, tp=8, pp=2), all_reduce("ring"), layer_count=8)
    program = lower(workload_of(256, model=model_of(layer_count=8)), layout, framework_of(), 8)
    well = simulate(program, _dgx(256, "one-switch"), framework_of())
    fault = {"kind": "slow-rank", "rank": 17, "slowdown": 2.0}
    ill = simulate(program, _dgx(256, "one-switch", (fault,)), framework_of())
    assert well.classes == 2
    # Of each stage, the straggler's pipeline and the others; the lanes of its group go as it goes.
    assert ill.classes == 4
    assert ill.makespan_s > well.makespan_s


def test_fold_two_faults_on_a_port_are_not_one_of_their_sum() -> None:
    """Speeds multiply on a port: 1/4 of 1/4 is not 1/2."""
    machine = workers(4, devices=1, nics=1, far=wire(2e9, 5e-6))
    faults: tuple[Fault, ...] = (
        SlowNic(node=0, nic=0, speed=0.25),
        SlowNic(node=0, nic=0, speed=0.25),
        SlowNic(node=1, nic=0, speed=0.5),
    )
    cluster = cluster_of(machine, faults=faults)
    layout = layout_of(Mesh(dp=4, tp=1, pp=1), parameter_server(0, 4))
    program = lower(workload_of(4), layout, framework_of(), 1)
    folded = simulate(program, cluster, framework_of())
    unfolded = simulate(program, cluster, framework_of(), fold=False)
    assert folded.classes == unfolded.classes - 1
    assert folded.makespan_s == pytest.approx(unfolded.makespan_s, rel=1e-9)
