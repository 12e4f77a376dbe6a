"""Laws P23 to P28 of docs/laws.md: determinism, scaling, relabelling, monotonicity, lower bounds, order of events."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from clusters import (
    cluster_of,
    collective_program,
    framework_of,
    layers,
    pipeline_program,
    program_of,
    server_program,
    servers,
    shares_of,
    wire,
    workers,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_laws_fold import Case, cases, framework

from clustersim.cluster.cluster import Cluster, SlowRank
from clustersim.cluster.fabric import Fabric
from clustersim.files import plain
from clustersim.hardware.framework import HostCost
from clustersim.layout.layout import Mesh
from clustersim.program.lower import lower
from clustersim.program.program import Collective, Compute, Exchange, Program, Transfer
from clustersim.scenario.load import question
from clustersim.search.search import make_plan
from clustersim.simulate.simulate import Simulated, simulate
from clustersim.timeline import OpId, check_invariants, critical_legs, critical_path

# --------------------------------------------------------------------------------------------------------- P23

_SCENARIO = {
    "schema_version": 1,
    "name": "small",
    "model": {"layers": 4, "hidden": 256, "heads": 8, "vocab": 1000, "positions": 128},
    "training": {"global_batch": 64, "sequence": 128},
    "framework": "megatron-core",
    "cluster": {
        "nodes": {"dgx-a100-80g": {"count": 2}}, "servers": {"cpu-server-200g": "0..2"}, "fabric": "leaf-spine",
        "faults": [{"kind": "slow-rank", "rank": 5, "slowdown": 1.5}],
    },
    "search": {"simulate": 6},
    "what_if": [{"name": "faster NICs", "set": {"cluster.nodes.dgx-a100-80g.nic.rate": "400Gb/s"}}],
}  # fmt: skip

_PLANNING = f"""
import json, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_laws_simulator import planned
if __name__ == "__main__":
    print(planned(int(sys.argv[1])))
"""


def planned(processes: int) -> str:
    """The plan of the scenario as JSON, wall time apart."""
    tree = plain(make_plan(question(_SCENARIO, "small"), workers=processes))
    del tree["counts"]["wall_s"]
    return json.dumps(tree)


def test_p23_a_plan_is_the_same_whatever_the_hash_seed_and_the_number_of_processes() -> None:
    here = planned(1)
    assert planned(2) == here
    for seed, processes in (("1", "1"), ("77", "2")):
        there = subprocess.run(
            [sys.executable, "-c", _PLANNING, processes], env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert there.stdout.strip() == here


@given(cases())
@settings(max_examples=15, deadline=None)
def test_p23_the_same_input_gives_the_same_times(case: Case) -> None:
    program = lower(case.workload, case.layout, framework(case), case.cluster.devices_per_node)
    one, two = (simulate(program, case.cluster, framework(case)) for _ in range(2))
    assert one.engine.start_s == two.engine.start_s
    assert one.engine.end_s == two.engine.end_s
    assert one.links == two.links


# --------------------------------------------------------------------------------------------------------- P24


def _timed(factor: float, program: Program, cluster: dict[str, Any]) -> float:
    """The makespan with every time `factor` times as long: alphas and hosts, and one over the rates."""
    far = wire(3.0e9 / factor, 5e-6 * factor, launch=1.3e-5 * factor)
    near = wire(7.0e9 / factor, 1.1e-6 * factor)
    hosts = servers(2, far=wire(2.5e9 / factor, 4e-6 * factor)) if cluster["hosts"] else None
    fabric = Fabric(kind="leaf-spine", nodes_per_leaf=2, oversubscription=2.0, hop_latency_s=1.7e-7 * factor)
    machine = workers(cluster["nodes"], devices=2, nics=2, far=far, near=near)
    host = HostCost(
        per_layer_forward_s=1.1e-3 * factor, per_layer_backward_s=2.3e-3 * factor, per_micro_batch_s=1e-4 * factor,
        per_step_s=0.0, per_collective_s=1e-5 * factor,
    )  # fmt: skip
    there = cluster_of(machine, hosts=hosts, fabric=fabric)
    return simulate(program, there, framework_of(host=host)).makespan_s


_PROGRAMS: dict[str, tuple[Program, dict[str, Any]]] = {
    "ring": (collective_program(Mesh(dp=8, tp=1, pp=1), "all_reduce", "ring", 123457), {"nodes": 4, "hosts": False}),
    "tree": (collective_program(Mesh(dp=8, tp=1, pp=1), "all_reduce", "tree", 123457), {"nodes": 4, "hosts": False}),
    "pipeline": (pipeline_program("interleaved", 4, 8, 2, size=98765), {"nodes": 2, "hosts": False}),
    "servers": (
        server_program(
            Mesh(dp=8, tp=1, pp=1), shares_of(dedicated=[2, 3], colocated=[(0, 1), (4, 1)]), buckets=5, size=77777,
            partitions=3,
        ),
        {"nodes": 4, "hosts": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(_PROGRAMS))
@pytest.mark.parametrize("factor", [0.25, 2.0, 1024.0])
def test_p24_all_times_longer_by_a_power_of_two_make_the_step_longer_bit_by_bit(name: str, factor: float) -> None:
    program, cluster = _PROGRAMS[name]
    assert _timed(factor, program, cluster) == factor * _timed(1.0, program, cluster)


@pytest.mark.parametrize("name", list(_PROGRAMS))
def test_p24_without_alphas_twice_the_bytes_take_twice_as_long(name: str) -> None:
    program, there = _PROGRAMS[name]
    hosts = servers(2, far=wire(2.5e9)) if there["hosts"] else None
    machine = workers(there["nodes"], devices=2, nics=2, far=wire(3e9), near=wire(7e9))
    once, twice = (
        simulate(_with_bytes(program, times), cluster_of(machine, hosts=hosts), framework_of()).makespan_s
        for times in (1, 2)
    )
    assert once > 0.0
    assert twice == pytest.approx(2.0 * once, rel=1e-12)


def _with_bytes(program: Program, times: int) -> Program:
    positions = tuple(
        replace(
            position,
            ops=tuple(
                replace(op, bytes=op.bytes * times) if isinstance(op, (Transfer, Collective, Exchange)) else op
                for op in position.ops
            ),
        )
        for position in program.positions
    )
    return replace(program, positions=positions)


# --------------------------------------------------------------------------------------------------------- P25


@given(cases(faults=False), st.data())
@settings(max_examples=25, deadline=None)
def test_p25_who_of_equals_is_slow_does_not_matter(case: Case, data: st.DataObject) -> None:
    """Ranks that folding calls equal may be exchanged: the step is as long whichever of them is the straggler.

    Where tensor-parallel groups straddle the devices of a NIC, some of them do and others do not: they are equal only
    while all are sound.
    """
    node, tp = case.cluster.workers[0].node, case.layout.mesh.tp
    below = max(1, node.devices // node.nic.count)
    assume(tp % below == 0 or below % tp == 0)
    program = lower(case.workload, case.layout, framework(case), case.cluster.devices_per_node)
    members = simulate(program, case.cluster, framework(case)).prices.placement.folding.members
    alike = data.draw(st.sampled_from([ranks.tolist() for ranks in members]))
    one, two = data.draw(st.sampled_from(alike)), data.draw(st.sampled_from(alike))
    spans = []
    for rank in (one, two):
        ill = replace(case.cluster, faults=(SlowRank(rank=rank, slowdown=2.0),))
        spans.append(simulate(program, ill, framework(case)).makespan_s)
    assert spans[0] == pytest.approx(spans[1], rel=1e-9)


# --------------------------------------------------------------------------------------------------------- P26


@given(
    size=st.integers(1, 10**9),
    nodes=st.integers(2, 9),
    faster=st.sampled_from([1.0, 1.3, 4.0]),
    algorithm=st.sampled_from(["ring", "tree", "hierarchical", "halving-doubling"]),
)
@settings(max_examples=60, deadline=None)
def test_p26_a_faster_link_never_slows_a_single_collective_down(
    size: int, nodes: int, faster: float, algorithm: Any
) -> None:
    """Only where nothing competes: in general, faster links may lengthen a schedule (Graham 1969)."""
    program = collective_program(Mesh(dp=2 * nodes, tp=1, pp=1), "all_reduce", algorithm, size)
    for near, far in ((faster, 1.0), (1.0, faster), (faster, faster)):
        machine, other = (
            workers(nodes, devices=2, nics=1, near=wire(3e9 * a, 1e-6), far=wire(1e9 * b, 5e-6))
            for a, b in ((1.0, 1.0), (near, far))
        )
        before, after = (simulate(program, cluster_of(m), framework_of()).makespan_s for m in (machine, other))
        assert after <= before * (1.0 + 1e-12)


@given(
    stages=st.integers(1, 5), rounds=st.integers(1, 3), slow=st.sampled_from([1.0, 1.5, 3.0]), where=st.integers(0, 4)
)
@settings(max_examples=40, deadline=None)
def test_p26_a_straggler_never_shortens_a_pipeline(stages: int, rounds: int, slow: float, where: int) -> None:
    program = pipeline_program("1f1b", stages, stages * rounds, 1)
    machine = workers(stages, far=wire(1e9, 1e-6))
    ill = cluster_of(machine, faults=(SlowRank(rank=where % stages, slowdown=slow),))
    well = simulate(program, cluster_of(machine), framework_of(pass_s=1.0)).makespan_s
    slowed = simulate(program, ill, framework_of(pass_s=1.0)).makespan_s
    assert well * (1.0 - 1e-12) <= slowed <= slow * well * (1.0 + 1e-12)


# ---------------------------------------------------------------------------------------------------- P27 and P28


@given(cases(), st.sampled_from([1, 2, 3]))
@settings(max_examples=60, deadline=None)
def test_p27_p28_lower_bounds_and_order_of_events(case: Case, steps: int) -> None:
    program = lower(case.workload, case.layout, framework(case), case.cluster.devices_per_node)
    found = simulate(program, case.cluster, framework(case), steps=steps)
    timeline = found.timeline()
    check_invariants(timeline)
    end = found.makespan_s
    assert timeline.end_s == end
    # No link carries more than it can, no class computes for longer than the step is.
    for use in found.links:
        assert use.bytes_per_link <= use.capacity_bytes_per_s * end * (1.0 + 1e-9)
        assert 0.0 < use.utilisation <= 1.0 + 1e-9
    for time in found.classes_s:
        assert time.compute_s + time.exposed_s + time.waiting_s == pytest.approx(end, rel=1e-9)
        assert min(time.compute_s, time.exposed_s, time.waiting_s) >= -1e-9 * end
    assert _longest_chain(found) <= end * (1.0 + 1e-9)
    # The critical path has no gaps: its legs join, and add up to the makespan.
    legs = critical_legs(timeline)
    assert legs[-1].end_s == end
    assert legs[0].start_s == 0.0
    for before, after in itertools.pairwise(legs):
        assert before.end_s == after.start_s
        assert after.span is None or after.span.start_s <= after.end_s <= after.span.end_s
    # Every op of every class has a span in each step, and each ends.
    expected = sum(len(program.positions[stage].ops) for stage in found.prices.placement.folding.stage)
    servers = len(found.prices.servers.classes)
    expected += servers * (len(program.positions[-1].ops) if servers else 0)
    assert len(timeline.spans) == steps * expected


def _longest_chain(found: Simulated) -> float:
    """The longest chain of tasks that wait for each other, each as long as it took."""
    engine, tasks = found.engine, found.engine.compiled.tasks
    longest = [0.0] * len(tasks)
    waits = [task.waits for task in tasks]
    ready = [number for number, count in enumerate(waits) if count == 0]
    seen = 0
    while ready:
        number = ready.pop()
        seen += 1
        longest[number] += engine.end_s[number] - engine.start_s[number]
        for other in tasks[number].then:
            longest[other] = max(longest[other], longest[number])
            waits[other] -= 1
            if waits[other] == 0:
                ready.append(other)
    assert seen == len(tasks)
    return max(longest, default=0.0)


def test_p27_the_critical_path_goes_through_the_slowest_of_those_who_meet() -> None:
    """Four ranks compute, one of them longer, and reduce: the chain that ends last begins with the straggler."""
    mesh = Mesh(dp=4, tp=1, pp=1)
    reduce = replace(
        next(op for op in collective_program(mesh, "all_reduce", "ring", 1000).positions[0].ops), after=((0, 0),)
    )
    compute = Compute(id=OpId(0, 0, 0, "forward", "all", "compute"), after=(), work=0)
    program = program_of(mesh, [[compute, reduce]], works=(layers(1),))
    cluster: Cluster = cluster_of(workers(4, far=wire(1e3)), faults=(SlowRank(rank=2, slowdown=3.0),))
    found = simulate(program, cluster, framework_of(pass_s=1.0))
    path = critical_path(found.timeline())
    assert [span.op.kind for span in path] == ["compute", "all-reduce"]
    assert path[0].end_s == 3.0
    assert path[0].end_s == path[1].start_s
