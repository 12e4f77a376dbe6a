"""docs/laws.md, input: a step takes as long as its compute or the read of its batch, whichever is longer."""

from __future__ import annotations

import copy
import heapq
import random
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from clusters import (
    BY_HAND,
    ENDLESS,
    all_reduce,
    cluster_of,
    framework_of,
    host_of,
    layers,
    layout_of,
    parameter_server,
    program_of,
    servers,
    sharded,
    wire,
    workers,
    workload_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.cluster.cluster import Cluster, Machine, SlowNic
from clustersim.cluster.fabric import Fabric
from clustersim.cluster.graph import graph, leaves
from clustersim.cluster.node import Nics, Node, Storage
from clustersim.cluster.reads import read_traffic
from clustersim.cluster.storage import reading, response_s, samples_per_s, service_s, supply_bytes_per_s
from clustersim.cluster.wiring import Port, Wiring
from clustersim.errors import ClustersimError
from clustersim.hardware.link import Link
from clustersim.layout.layout import Mesh, ParameterServer, RankOrder, Scheme
from clustersim.program.lower import lower
from clustersim.program.program import Compute, Op, Program, Read
from clustersim.report.plan_screen import why
from clustersim.scenario.load import question
from clustersim.search.search import make_plan
from clustersim.simulate.simulate import Simulated, simulate
from clustersim.timeline import OpId, check_invariants
from clustersim.workload.data import Data

Tier = Literal["nvme", "disk", "memory", "object"]


def store(
    count: int, rate: float, *, latency: float = 0.0, drives: int = 1, tier: Tier = "nvme", far: Link | None = None
) -> Machine:
    """`count` storage hosts that read `rate` bytes/s each; their network takes no time unless `far` says so."""
    node = Node(
        name="store", nic=Nics(count=1, link="by-hand"), host=host_of(), provenance=BY_HAND,
        storage=Storage(tier=tier, read_rate_bytes_per_s=rate, read_latency_s=latency, drives=drives),
    )  # fmt: skip
    return Machine(
        node=node, count=count, device=None, interconnect=None, nic=far or wire(ENDLESS), pcie=None, collectives=None
    )


def fed(*machines: Machine, by: Machine | None = None, fabric: Fabric | None = None) -> Cluster:
    return replace(cluster_of(*machines, fabric=fabric), storage=(by,) if by is not None else ())


def reads(
    size: int, *, prefetch: int = 1, stored: int | None = None, sample: int | None = None, readers: int = 1,
    decode_ns: int = 0,
) -> Read:  # fmt: skip
    return Read(
        id=OpId(0, -1, 0, "forward", "all", "read"), bytes=size, stored_bytes=size if stored is None else stored,
        prefetch=prefetch, sample_bytes=sample or size, readers=readers, decode_ns=decode_ns,
    )  # fmt: skip


def step_program(read: Read, mesh: Mesh | None = None) -> Program:
    """A read, and one layer that needs it."""
    compute = Compute(id=OpId(0, 0, 0, "forward", "all", "compute"), after=((0, 0),), work=0)
    return program_of(mesh or Mesh(dp=1, tp=1, pp=1), [[read, compute]], works=(layers(1),))


# ------------------------------------------------------------------------------------------------- supply and demand


@given(st.integers(1, 10_000), st.floats(0.01, 100.0), st.integers(1, 4), st.integers(2, 8), st.integers(1, 4))
def test_input_steady_state(size: int, compute: float, prefetch: int, steps: int, ranks: int) -> None:
    """With a batch read ahead, every step after the first takes max(compute, demand / supply), and the first both;
    the stall is what compute does not hide. 1e-9."""
    supply = 100.0
    cluster = fed(workers(ranks, far=wire(ENDLESS)), by=store(1, supply))
    program = step_program(reads(size, prefetch=prefetch), Mesh(dp=ranks, tp=1, pp=1))
    reading_s = ranks * size / supply
    longer = max(compute, reading_s)
    found = simulate(program, cluster, framework_of(pass_s=compute), steps=steps)
    check_invariants(found.timeline())
    # The first step reads all that it needs; then the longer of both is always under way.
    assert found.step_times_s[0] == pytest.approx(reading_s + compute, rel=1e-9)
    for seconds in found.step_times_s[1:]:
        assert seconds == pytest.approx(longer, rel=1e-9)
    stall = reading_s + (steps - 1) * (longer - compute)
    assert found.input_stall_s == pytest.approx(stall, rel=1e-9, abs=1e-9)
    for time in found.classes_s:
        assert time.compute_s + time.exposed_s + time.waiting_s + time.input_s == pytest.approx(found.makespan_s)
    one = simulate(program, cluster, framework_of(pass_s=compute))
    assert one.step_s == pytest.approx(longer, rel=1e-9)
    assert one.input_stall_s == pytest.approx(longer - compute, rel=1e-9, abs=1e-9)


@given(st.integers(1, 10_000), st.floats(0.01, 100.0), st.integers(1, 5))
def test_input_without_prefetch_takes_turns_with_compute(size: int, compute: float, steps: int) -> None:
    cluster = fed(workers(1, far=wire(ENDLESS)), by=store(1, 100.0))
    found = simulate(step_program(reads(size, prefetch=0)), cluster, framework_of(pass_s=compute), steps=steps)
    for seconds in found.step_times_s:
        assert seconds == pytest.approx(size / 100.0 + compute, rel=1e-9)


@given(st.integers(1, 5), st.integers(2, 6))
def test_input_is_read_no_further_ahead_than_said(prefetch: int, ahead: int) -> None:
    """The read of step s begins once step s - 1 - prefetch is over, and not before: reads that take no time are early
    by so many steps of compute."""
    steps = prefetch + ahead
    cluster = fed(workers(1, far=wire(ENDLESS)), by=store(1, 1e12))
    found = simulate(step_program(reads(1, prefetch=prefetch)), cluster, framework_of(pass_s=1.0), steps=steps)
    spans = [span for span in found.timeline().spans if span.op.kind == "read"]
    for span in spans:
        assert span.start_s == pytest.approx(max(0.0, span.op.step - prefetch), abs=1e-6)


def test_input_shares_the_network_with_gradients() -> None:
    """Two ranks, one card each: the card receives the gradients and the batch, and the step is no shorter than both
    take; it is longer than without the batch."""
    workload = replace(workload_of(2), data=Data(sample_bytes=40e6, readers=1))
    layout = layout_of(Mesh(dp=2, tp=1, pp=1), all_reduce(bucket_bytes=1e12))
    cluster = fed(workers(2, far=wire(1e9)), by=store(1, ENDLESS))
    framework = framework_of(pass_s=1e-9)
    program = lower(workload, layout, framework, 1)
    nic = next(link for link in simulate(program, cluster, framework).links if link.kind == "nic in")
    gradients = sum(bucket.elements * 4 for bucket in program.buckets)
    assert nic.bytes_per_link == pytest.approx(40e6 + gradients, rel=1e-9)
    assert simulate(program, cluster, framework).makespan_s >= nic.bytes_per_link / 1e9
    alone = simulate(lower(replace(workload, data=None), layout, framework, 1), cluster, framework)
    assert simulate(program, cluster, framework).makespan_s > 1.5 * alone.makespan_s


# -------------------------------------------------------------------------------------------------------- readers


@given(st.floats(1e-6, 1.0), st.integers(0, 10**8), st.integers(1, 50))
def test_input_one_reader_fetches_sample_by_sample(latency: float, decode_ns: int, samples: int) -> None:
    """Little's law with one request under way: a sample every latency + service + transfer + decoding."""
    sample, rate, far = 1000, 1e6, wire(1e7)
    cluster = fed(workers(1, far=far), by=store(1, rate, latency=latency))
    read = reads(samples * sample, sample=sample, decode_ns=decode_ns)
    found = simulate(step_program(read), cluster, framework_of(pass_s=1e-9))
    each = latency + sample / rate + sample / 1e7 + decode_ns * 1e-9
    assert found.step_s == pytest.approx(samples * each, rel=1e-9)


def test_input_readers_need_something_to_read() -> None:
    """A rank that reads three samples a step, two batches ahead, keeps six readers busy and no more."""
    workload = replace(workload_of(6), data=Data(sample_bytes=100.0, readers=32, prefetch=2))
    program = lower(workload, layout_of(Mesh(dp=2, tp=1, pp=1), all_reduce()), framework_of(), 1)
    read = program.positions[0].ops[0]
    assert isinstance(read, Read)
    assert (read.bytes, read.readers) == (300, 6)
    cluster = fed(workers(2, far=wire(ENDLESS)), by=store(1, ENDLESS, latency=1.0))
    assert simulate(program, cluster, framework_of()).step_s == pytest.approx(0.5, rel=1e-6)


def test_input_decoding_is_bound_by_cores() -> None:
    """Many readers on a node of one core decode one sample at a time."""
    cluster = fed(workers(1, devices=2, far=wire(ENDLESS)), by=store(1, ENDLESS))
    read = reads(1000, sample=100, readers=64, decode_ns=10**9)
    found = simulate(step_program(read, Mesh(dp=2, tp=1, pp=1)), cluster, framework_of(pass_s=1e-9))
    assert found.step_s == pytest.approx(20.0, rel=1e-9)


@given(st.floats(0.0, 1.0))
def test_input_in_memory_is_not_read(cache: float) -> None:
    """Storage serves the rest, and nothing where all is in memory; what memory holds is decoded all the same."""
    workload = replace(workload_of(4), data=Data(sample_bytes=1e6, cache=cache, decode_s=1e-3, readers=1))
    layout = layout_of(Mesh(dp=2, tp=1, pp=1), all_reduce())
    cluster = fed(workers(2, far=wire(1e9)), by=store(1, 1e6))
    framework = framework_of()
    found = simulate(lower(workload, layout, framework, 1), cluster, framework)
    drives = [link for link in found.links if link.kind == "drives"]
    assert sum(link.bytes_per_link for link in drives) == pytest.approx(4e6 * (1.0 - cache), abs=4.0)
    assert found.step_s >= 2e-3 * (1.0 - 1e-9)


@pytest.mark.parametrize(
    ("drives", "readers", "think"), [(1, 4, 0.5), (1, 30, 1.0), (8, 16, 0.2), (8, 64, 0.1), (36, 128, 0.05)]
)
def test_input_random_reads_simulated(drives: int, readers: int, think: float) -> None:
    """Readers that each fetch a sample from a drive at random and are away for a random time: the closed loop's
    throughput is within 3 % of a simulation of 200,000 reads."""
    draw = random.Random(7)
    service = 0.05
    free = [0.0] * drives
    waiting = [(draw.expovariate(1.0 / think), reader) for reader in range(readers)]
    heapq.heapify(waiting)
    count = 200_000
    for _ in range(count):
        now, reader = waiting[0]
        drive = draw.randrange(drives)
        free[drive] = max(free[drive], now) + service
        heapq.heapreplace(waiting, (free[drive] + draw.expovariate(1.0 / think), reader))
    storage = Storage(tier="nvme", read_rate_bytes_per_s=1000.0 * drives / service, read_latency_s=0.0, drives=drives)
    found = reading(storage, 1, readers, 1000.0, think)
    assert found.throughput_per_s == pytest.approx(count / now, rel=0.03)
    # And an open crowd at that rate waits as M/D/1 does, no less than the closed one.
    assert response_s(storage, 1000.0, found.throughput_per_s) >= found.response_s * (1.0 - 1e-9)


def test_input_tiers() -> None:
    """A disk seeks for every read and serves nobody meanwhile; NVMe overlaps latencies; any front end of an object
    store serves any sample, so that fewer wait than behind one drive each."""
    fast = Storage(tier="nvme", read_rate_bytes_per_s=1e6, read_latency_s=0.01, drives=4)
    slow = replace(fast, tier="disk")
    pooled = replace(fast, tier="object")
    size = 1000.0
    assert service_s(fast, size) == pytest.approx(0.004)
    assert service_s(slow, size) == pytest.approx(0.014)
    assert supply_bytes_per_s(fast, size) == pytest.approx(1e6)
    assert supply_bytes_per_s(slow, size) == pytest.approx(4 * size / 0.014)
    assert response_s(fast, size, 500.0) == pytest.approx(0.01 + 0.004 + 0.004 * 0.5 / (2 * 0.5))
    assert response_s(fast, size, 1e-9) == pytest.approx(response_s(slow, size, 1e-9), rel=1e-6)
    assert response_s(pooled, size, 700.0) < response_s(fast, size, 700.0)
    assert response_s(slow, size, 500.0) == float("inf")
    many = [reading(one, 2, 64, size, 0.0).throughput_per_s for one in (slow, fast, pooled)]
    assert many[0] < many[1] < many[2] <= 2e6 / size * (1.0 + 1e-12)


# ---------------------------------------------------------------------------------------------------------- routes


@settings(deadline=None, max_examples=60)
@given(
    nodes=st.integers(2, 6),
    devices=st.sampled_from([1, 2, 4]),
    hosts=st.integers(1, 5),
    kind=st.sampled_from(["one-switch", "leaf-spine", "rail-optimized"]),
    per_leaf=st.integers(1, 4),
    tp=st.sampled_from([1, 2]),
    pp=st.sampled_from([1, 2]),
    order=st.sampled_from(["tp-dp-pp", "tp-pp-dp"]),
    oversubscription=st.sampled_from([1.0, 4.0]),
    stored=st.sampled_from([0, 400, 1000]),
    switch=st.sampled_from([1, 2, 4]),
)
def test_input_folded_is_unfolded(
    nodes: int, devices: int, hosts: int, kind: Literal["one-switch", "leaf-spine", "rail-optimized"], per_leaf: int,
    tp: int, pp: int, order: RankOrder, oversubscription: float, stored: int, switch: int,
) -> None:  # fmt: skip
    """Makespan, bytes and stalls of classes are those of a simulation of every rank. 1e-9."""
    ranks = nodes * devices
    if ranks % (tp * pp):
        return
    mesh = Mesh(dp=ranks // tp // pp, tp=tp, pp=pp)
    fabric = Fabric(kind=kind, nodes_per_leaf=per_leaf, oversubscription=oversubscription, hop_latency_s=0.0)
    machine = workers(nodes, devices=devices, nics=max(1, devices // 2), far=wire(50.0), pcie=wire(40.0))
    machine = replace(machine, node=replace(machine.node, devices_per_pcie_switch=switch))
    cluster = fed(machine, by=store(hosts, 300.0, far=wire(120.0), latency=0.1), fabric=fabric)
    read = reads(1000, stored=stored, sample=10, readers=4, decode_ns=10**6)
    first: list[Op] = [read, Compute(id=OpId(0, 0, 0, "forward", "all", "compute"), after=((0, 0),), work=0)]
    program = program_of(mesh, [first, *([[]] * (pp - 1))], works=(layers(1),), order=order)
    folded, every = (simulate(program, cluster, framework_of(pass_s=3.0), steps=3, fold=fold) for fold in (True, False))
    assert folded.makespan_s == pytest.approx(every.makespan_s, rel=1e-9)
    assert folded.input_stall_s == pytest.approx(every.input_stall_s, rel=1e-9)
    assert _carried(folded) == pytest.approx(_carried(every), rel=1e-9)


@pytest.mark.parametrize("kind", ["one-switch", "leaf-spine", "rail-optimized"])
@pytest.mark.parametrize("scheme", [all_reduce(), sharded(1), sharded(3), parameter_server(2, 0)], ids=str)
@pytest.mark.parametrize("sizes", [(2, 2, 2, "tp-dp-pp"), (4, 1, 2, "tp-pp-dp"), (8, 1, 1, "tp-dp-pp")], ids=str)
def test_input_of_whole_steps_folded_is_unfolded(
    kind: Literal["one-switch", "leaf-spine", "rail-optimized"], scheme: Scheme, sizes: tuple[int, int, int, RankOrder]
) -> None:
    """Reads beside gradients, pipelines and servers, one NIC slower than the others. 1e-9."""
    dp, tp, pp, order = sizes
    workload = replace(workload_of(16), data=Data(sample_bytes=4e6, readers=2, decode_s=1e-3))
    layout = replace(layout_of(Mesh(dp=dp, tp=tp, pp=pp), scheme), order=order)
    fabric = Fabric(kind=kind, nodes_per_leaf=2, oversubscription=2.0)
    machine = workers(4, devices=2, nics=2, far=wire(1e9), near=wire(3e9))
    hosts = servers(2, far=wire(1e9)) if isinstance(scheme, ParameterServer) else None
    cluster = cluster_of(machine, hosts=hosts, fabric=fabric, faults=(SlowNic(node=1, nic=0, speed=0.5),))
    cluster = replace(cluster, storage=(store(2, 1e9, far=wire(2e9), latency=1e-3),))
    framework = framework_of(pass_s=1e-3)
    program = lower(workload, layout, framework, 2)
    for steps in (1, 3):
        folded, every = (simulate(program, cluster, framework, steps=steps, fold=fold) for fold in (True, False))
        assert folded.makespan_s == pytest.approx(every.makespan_s, rel=1e-9)
        assert folded.input_stall_s == pytest.approx(every.input_stall_s, rel=1e-9)
        assert _carried(folded) == pytest.approx(_carried(every), rel=1e-9)


def _carried(found: Simulated) -> dict[str, float]:
    total: dict[str, float] = {}
    for link in found.links:
        total[link.kind] = total.get(link.kind, 0.0) + link.count * link.bytes_per_link
    return total


@pytest.mark.parametrize("kind", ["one-switch", "leaf-spine", "rail-optimized"])
@pytest.mark.parametrize("hosts", [1, 3])
def test_input_every_link_carries_what_its_routes_put_on_it(
    kind: Literal["one-switch", "leaf-spine", "rail-optimized"], hosts: int
) -> None:
    """A walk over all routes, rank by rank and host by host, adds up to the traffic, link by link. 1e-12."""
    fabric = Fabric(kind=kind, nodes_per_leaf=2)
    machine = workers(3, devices=4, nics=2, pcie=wire(9.0))
    machine = replace(machine, node=replace(machine.node, devices_per_pcie_switch=2))
    wiring = Wiring(fed(machine, by=store(hosts, 1.0), fabric=fabric))
    ranks = np.array([0, 1, 5, 6, 11])
    expected = np.zeros(wiring.links)
    for rank in ranks.tolist():
        node, port = rank // 4, rank % 4 // 2
        expected[wiring.offset[Port.READERS] + rank] += 1.0
        expected[wiring.offset[Port.PCIE_IN] + rank] += 0.75
        # To the host's memory and back, below the switch of the NIC, which is that of the device.
        expected[wiring.offset[Port.SWITCH_UP] + node * 2 + port] += 0.75
        expected[wiring.offset[Port.SWITCH_DOWN] + node * 2 + port] += 0.75
        expected[wiring.offset[Port.NIC_IN] + node * 2 + port] += 0.75
        for host in range(hosts):
            part = 0.75 / hosts
            expected[wiring.offset[Port.DRIVES] + host] += part
            expected[wiring.offset[Port.STORAGE_OUT] + host] += part
            here = int(wiring.leaf_of(np.array(node), np.array(port)))
            there = wiring.leaf_of_host(host)
            if kind != "one-switch" and here != there:
                expected[wiring.offset[Port.LEAF_UP] + there] += part
                expected[wiring.offset[Port.LEAF_DOWN] + here] += part
    traffic = read_traffic(wiring, ranks, 0.75)
    found = np.bincount(traffic.links, weights=traffic.loads, minlength=wiring.links)
    assert found == pytest.approx(expected, rel=1e-12)


def test_input_from_drives_of_its_own_node_crosses_no_network() -> None:
    """Storage in the worker nodes: each node's drives serve its ranks, and no card carries a byte."""
    machine = workers(3, devices=2, far=wire(1.0))
    own = Storage(tier="nvme", read_rate_bytes_per_s=100.0, read_latency_s=0.0)
    cluster = cluster_of(replace(machine, node=replace(machine.node, storage=own)))
    program = step_program(reads(1000), Mesh(dp=6, tp=1, pp=1))
    found = simulate(program, cluster, framework_of(pass_s=1.0))
    assert found.step_s == pytest.approx(2 * 1000 / 100.0, rel=1e-9)
    assert not any(link.kind.startswith("nic") and link.bytes_per_link for link in found.links)


def test_input_samples_per_second_of_nothing() -> None:
    """All in memory and nothing to decode: no limit."""
    storage = Storage(tier="memory", read_rate_bytes_per_s=1.0, read_latency_s=1.0)
    rest = {"hosts": 1, "ranks": 2, "readers": 3, "sample_bytes": 5.0, "away_s": 0.0}
    assert samples_per_s(storage, stored=0.0, decode_s=0.0, **rest) == float("inf")  # type: ignore[arg-type]
    assert samples_per_s(storage, stored=0.0, decode_s=0.5, **rest) == 6.0  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- scenario

SCENARIO: dict[str, Any] = {
    "schema_version": 1,
    "name": "fed",
    "model": {"layers": 4, "hidden": 1024, "heads": 16, "vocab": 32000},
    "training": {"global_batch": 64, "sequence": 1024, "precision": "bf16"},
    "data": {"sample": "2MB", "readers": 16},
    "cluster": {"nodes": {"dgx-a100-80g": 2}, "storage": {"storage-nvme": 1}},
    "search": {"simulate": 4},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "nothing reads from it"),
        ({"cluster.storage": {}}, "nothing serves it"),
        ({"cluster.storage": {"cpu-server-200g": 1}}, "serves no data"),
        ({"cluster.storage": {"storage-nvme": "0..2"}}, "range of storage hosts"),
        ({"cluster.storage": {"storage-nvme": 0}}, "count of at least 1"),
        ({"cluster.storage": {"storage-nvme": 1, "storage-disk": 1}}, "several kinds"),
        ({"data": {"sample": "0B"}}, "at least 1B"),
        ({"data": {"sample": "1kB", "cache": "120%"}}, "cache: must be"),
        ({"data": {"sample": "1kB", "prefetch": -1}}, "prefetch: must be"),
        ({"data": {"sample": "1kB", "readers": 0}}, "readers: must be"),
        ({"data": {"sample": 4096}}, "has no unit"),
    ],
    ids=str,
)
def test_input_mistakes_say_what_to_write(changes: dict[str, Any], message: str) -> None:
    tree: dict[str, Any] = copy.deepcopy(SCENARIO)
    for path, value in changes.items():
        block, _, key = path.rpartition(".")
        (tree[block] if block else tree)[key] = value
    with pytest.raises(ClustersimError, match=message):
        question(tree, "fed")


@pytest.mark.parametrize("store_kind", ["storage-nvme", "storage-disk", "storage-memory", "storage-object"])
def test_input_of_every_kind_plans(store_kind: str) -> None:
    """Every tier's profile feeds a plan; where it binds, estimate and simulation agree, and the plan says so."""
    tree = copy.deepcopy(SCENARIO)
    tree["cluster"]["storage"] = {store_kind: 1}
    tree["data"] = {"sample": "400MB", "readers": 16}
    asked = question(tree, "fed")
    found = make_plan(asked, workers=1)
    best = found.ranking[0]
    assert best.prediction.input_stall_s > 0.1 * best.prediction.step_s
    # Gradients on the same cards come on top of the bound.
    assert 1.0 - 1e-6 <= best.prediction.step_s / best.estimated_s < 1.1
    assert any("Input binds" in line for line in why(found))
    assert "storage" in {lever.resource for lever in found.levers}
    # Of few small samples, what takes long is the latency of one; reading one batch ahead does not hide that of disks.
    tree["data"] = {"sample": "4kB", "prefetch": 1}
    unbound = make_plan(question(tree, "fed"), workers=1)
    slow = store_kind in ("storage-disk", "storage-object")
    assert (unbound.prediction.input_stall_s > 1e-3 * unbound.prediction.step_s) == slow


def test_input_worker_nodes_may_have_drives_of_their_own() -> None:
    tree = copy.deepcopy(SCENARIO)
    own = {"tier": "nvme", "drives": 4, "read_rate": "25GB/s", "read_latency": "100us"}
    tree["cluster"] = {"nodes": {"dgx-a100-80g": {"count": 2, "storage": own}}}
    asked = question(tree, "fed")
    wires = graph(asked.cluster)
    assert wires.edges["n1.drives", "n1.socket0"]["rate_bytes_per_s"] == 25e9
    found = make_plan(asked, workers=1)
    program = lower(found.workload, found.layout, found.framework, 8)
    simulated = simulate(program, asked.cluster, found.framework)
    busy = {use.kind: use.count for use in simulated.links if use.bytes_per_link}
    assert busy["drives"] == 2
    assert "storage out" not in busy
    assert [queue.kind for queue in simulated.queues] == ["drives (dgx-a100-80g)"]


def test_input_storage_hosts_stand_in_the_graph() -> None:
    tree = copy.deepcopy(SCENARIO)
    tree["cluster"] |= {"fabric": {"kind": "rail-optimized", "nodes_per_leaf": 2}, "storage": {"storage-nvme": 3}}
    cluster = question(tree, "fed").cluster
    wires, wiring = graph(cluster), Wiring(cluster)
    assert leaves(cluster).count == wiring.leaves
    for host in range(3):
        assert f"leaf{wiring.leaf_of_host(host)}" in wires[f"n{2 + host}.nic0"]
        assert wires.nodes[f"n{2 + host}.drives"]["kind"] == "drives"
