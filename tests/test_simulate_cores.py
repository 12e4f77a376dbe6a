"""Processes that share one host: cores divided among what is busy, and what a CPU computes and serves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from clusters import (
    BY_HAND,
    all_reduce,
    cluster_of,
    framework_of,
    host_of,
    layers,
    layout_of,
    parameter_server,
    program_of,
    servers,
    shares_of,
    wire,
    workers,
    workload_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim import files
from clustersim.cluster.cluster import Cluster
from clustersim.hardware.cost import device_costs, load_device
from clustersim.hardware.device import Device, Roofline
from clustersim.hardware.kernel import Gemm, Memory
from clustersim.layout.layout import Mesh
from clustersim.program.lower import lower
from clustersim.program.program import Collective, Compute, Op, Program, Update, Work
from clustersim.simulate.simulate import simulate
from clustersim.timeline import OpId, check_invariants

SHARED = (0.6, 1.0, 1.8, 2.4)


def one_host(
    ranks: int,
    cores: int,
    *,
    rate: float = 1.0,
    slowdown: tuple[float, ...] = (),
    reduce_rate: float = 1.0,
    hosts: int = 0,
) -> Cluster:
    """`ranks` devices of one host of `cores` cores, whose messages share a memory of `rate`; so do `hosts` servers."""
    link = wire(rate, kind="loopback")
    host = replace(host_of(reduce_rate=reduce_rate), cores=cores, rank_slowdown=slowdown)
    machine = workers(1, devices=ranks, far=link, near=link, host=host)
    return cluster_of(machine, hosts=servers(hosts, far=link, host=host) if hosts else None)


def compute(work: int = 0, after: tuple[tuple[int, int], ...] = ()) -> Compute:
    return Compute(id=OpId(0, 0, 0, "forward", "all", "compute"), after=after, work=work)


def reduce_of(size: int, after: tuple[tuple[int, int], ...] = ()) -> Collective:
    return Collective(
        id=OpId(0, -1, 0, "synchronise", "B0", "all-reduce"), stream="collective", after=after, kind="all_reduce",
        group="dp", algorithm="ring", bytes=size,
    )  # fmt: skip


def of_ranks(dp: int, *ops: Op) -> Program:
    return program_of(Mesh(dp=dp, tp=1, pp=1), [ops], works=(layers(1),))


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (2, 2.0),  # two computing threads and two that move bytes, on two cores: no faster than one after the other
        (3, 4.0 / 3.0),
    ],
)
def test_traffic_beside_compute_takes_cores_from_it(cores: int, expected: float) -> None:
    # An allreduce of 1 byte among two ranks puts 2 bytes on the memory.
    cluster = one_host(2, cores, rate=2.0)
    found = simulate(of_ranks(2, compute(), reduce_of(1)), cluster, framework_of(pass_s=1.0))
    assert found.makespan_s == pytest.approx(expected)
    check_invariants(found.timeline())


def test_one_after_the_other_nothing_is_shared() -> None:
    cluster = one_host(2, 2, rate=2.0)
    found = simulate(of_ranks(2, compute(), reduce_of(1, after=((0, 0),))), cluster, framework_of(pass_s=1.0))
    assert found.makespan_s == pytest.approx(2.0)


@pytest.mark.parametrize(("ranks", "expected"), [(1, 1.0), (2, 1.0), (3, 1.8), (4, 2.4)])
def test_ranks_that_all_compute_take_what_was_measured(ranks: int, expected: float) -> None:
    cluster = one_host(4, 2, slowdown=SHARED)
    found = simulate(of_ranks(ranks, compute()), cluster, framework_of(pass_s=1.0))
    # One rank has both cores, but the thread that drives it has one.
    assert found.makespan_s == pytest.approx(expected)


def update(size: int) -> Update:
    return Update(
        id=OpId(0, -1, -1, "update", "B0", "update"), after=(), pushes=1, bytes=size, state_bytes=0, partitions=1
    )


@pytest.mark.parametrize(("cores", "expected"), [(2, 2.0), (4, 1.0)])
def test_servers_take_cores_from_workers(cores: int, expected: float) -> None:
    shares = shares_of(dedicated=[1, 1])
    program = program_of(
        Mesh(dp=2, tp=1, pp=1), [[compute()]], works=(layers(1),), served=[update(2)], shares=shares
    )  # fmt: skip
    found = simulate(program, one_host(2, cores, hosts=2), framework_of(pass_s=1.0))
    assert found.makespan_s == pytest.approx(expected)


def test_servers_of_one_host_share_its_rates() -> None:
    machine = workers(2, devices=2, host=host_of(reduce_rate=1.0))
    times = []
    for homes in ((0, 2), (0, 1)):
        shares = shares_of(colocated=[(home, 1) for home in homes])
        program = program_of(Mesh(dp=4, tp=1, pp=1), [[]], served=[update(2)], shares=shares)
        times.append(simulate(program, cluster_of(machine), framework_of()).makespan_s)
    assert times == pytest.approx([1.0, 2.0])


@given(
    dp=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(["allreduce", "dedicated", "colocated"]),
    cores=st.sampled_from([1, 2, 3, 8]),
    slowdown=st.sampled_from([1.0, 1.4]),
)
@settings(max_examples=40, deadline=None)
def test_a_class_stands_for_its_ranks_on_a_shared_host_too(dp: int, kind: str, cores: int, slowdown: float) -> None:
    schemes = {
        "allreduce": all_reduce(), "dedicated": parameter_server(2, 0), "colocated": parameter_server(0, dp),
    }  # fmt: skip
    layout = layout_of(Mesh(dp=dp, tp=1, pp=1), schemes[kind])
    layout = replace(layout, sync=(replace(layout.sync[0], reduce_in_node=False),))
    framework = framework_of(pass_s=1e-3)
    framework = replace(framework, overlap=replace(framework.overlap, compute_slowdown=slowdown))
    program = lower(workload_of(8), layout, framework, 4)
    cluster = one_host(4, cores, rate=1e9, slowdown=SHARED, reduce_rate=1e9, hosts=2)
    folded = simulate(program, cluster, framework)
    every = simulate(program, cluster, framework, fold=False)
    assert folded.makespan_s == pytest.approx(every.makespan_s, rel=1e-9)
    check_invariants(folded.timeline())


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A CPU without tables: 1 GFLOP/s, 1 GB/s."""
    rough = Roofline(
        gemm_efficiency=1.0, attention_efficiency=1.0, attention_backward_efficiency=1.0, memory_efficiency=1.0,
        kernel_floor_s=0.0, provenance=BY_HAND,
    )  # fmt: skip
    device = Device(
        name="by-hand-cpu", kind="cpu", memory_bytes=1e9, memory_bandwidth_bytes_per_s=1e9, peak={"fp32": 1e9},
        power_w=0.0, idle_power_w=0.0, launch_overhead_s=0.0, roofline=rough, provenance=BY_HAND,
    )  # fmt: skip
    files.save(device, tmp_path / "hwprofiles" / "devices" / "by-hand-cpu" / "device.yaml")
    monkeypatch.chdir(tmp_path)
    return load_device("by-hand-cpu")


def on_cpu(cluster: Cluster, cpu: Device) -> Cluster:
    machine = cluster.workers[0]
    return replace(cluster, workers=(replace(machine, node=replace(machine.node, device=cpu.name), device=cpu),))


def test_a_cpu_computes_and_drives_one_after_the_other(cpu: Device) -> None:
    gemm = Gemm(m=100, n=100, k=50, dtype="fp32")
    work = Work(kernels=((gemm, 1),), inner=(), forward_layers=1, backward_layers=0)
    program = program_of(Mesh(dp=1, tp=1, pp=1), [[compute()]], works=(work,))
    found = simulate(program, on_cpu(one_host(1, 1), cpu), framework_of(pass_s=5e-3))
    assert found.makespan_s == pytest.approx(1e-3 + 5e-3)


def test_what_is_behind_the_layers_waits_for_the_host_to_drive_them() -> None:
    """A GPU that is faster than its host still computes the head after the last layer was launched."""
    body, head = Gemm(m=512, n=512, k=512, dtype="bf16"), Gemm(m=4096, n=4096, k=4096, dtype="bf16")
    cluster, framework = one_host(1, 1), framework_of(pass_s=5e-3)
    costs = device_costs(cluster.workers[0].node.device or "")
    mesh = Mesh(dp=1, tp=1, pp=1)
    for layers_, expected in ((1, 5e-3 + costs.cost(head).seconds), (0, costs.seconds(((body, 1), (head, 1))))):
        work = Work(
            kernels=((body, 1), (head, 1)), inner=(), forward_layers=layers_, backward_layers=0,
            tail=((head, 1),) if layers_ else (),
        )  # fmt: skip
        found = simulate(program_of(mesh, [[compute()]], works=(work,)), cluster, framework)
        assert found.makespan_s == pytest.approx(expected)


def test_a_server_on_a_cpu_takes_its_kernels(cpu: Device) -> None:
    cluster = on_cpu(one_host(2, 8), cpu)
    served = Update(
        id=OpId(0, -1, -1, "update", "B0", "update"), after=(), pushes=2, bytes=1000, state_bytes=8000, partitions=1
    )
    program = program_of(Mesh(dp=2, tp=1, pp=1), [[]], served=[served], shares=shares_of(colocated=[(0, 1)]))
    costs = device_costs(cpu.name)
    expected = sum(
        costs.cost(Memory(op=op, read_bytes=read, written_bytes=written)).seconds  # type: ignore[arg-type]
        for op, read, written in (("copy", 1000, 1000), ("reduce", 2000, 1000), ("optimizer", 4000, 4000))
    )
    assert simulate(program, cluster, framework_of()).makespan_s == pytest.approx(expected)
