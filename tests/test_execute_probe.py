"""What a probe measures, and the profiles made of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from clustersim import files
from clustersim.cluster.load import load_node, node_collectives
from clustersim.errors import ExecutionError
from clustersim.execute.launch import Launcher
from clustersim.execute.probe import (
    Among,
    AttentionSample,
    CollectiveSample,
    DeviceProbe,
    GemmSample,
    LayerSample,
    MemorySample,
    MessageSample,
    Probe,
    SharedSample,
    Timed,
    probe,
)
from clustersim.execute.profile_files import write_profiles
from clustersim.hardware.cost import DeviceCosts
from clustersim.hardware.curve import message_seconds
from clustersim.hardware.device import Device
from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import Attention, Gemm, Memory
from clustersim.hardware.load import load_link

torch = pytest.importorskip("torch")


def at(seconds: float) -> Timed:
    return Timed(seconds=seconds, spread=0.0, samples=5)


def layer_sample(layers: int, hidden: int, forward_s: float, backward_s: float) -> LayerSample:
    return LayerSample(
        layers=layers, hidden=hidden, heads=max(1, hidden // 64), tokens=128, sequence=64, dtype="fp32",
        forward=at(forward_s), backward=at(backward_s), update=at(1e-4),
    )  # fmt: skip


def shared_sample(ranks: int, threads: int, seconds: float) -> SharedSample:
    return SharedSample(ranks=ranks, threads=threads, layer=at(seconds), call_s=5e-5 if ranks > 1 else 0.0)


def made_up() -> Probe:
    """A host of 100 GFLOP/s a rank, 10 GB/s of memory, and messages of 50 us and 2 GB/s."""
    gemm = tuple(
        GemmSample(dtype="fp32", m=m, n=n, k=k, threads=1, time=at(2 * m * n * k / 100e9 + 1e-6))
        for m, n, k in product((64, 1024), (64, 1024), (64, 1024))
    )
    attention = tuple(
        AttentionSample(
            dtype="fp32", instances=i, sequence=s, group=1, head_dim=64, forward=at(i * s * s * 1e-9),
            backward=at(3 * i * s * s * 1e-9),
        )
        for i, s in product((8, 32), (64, 256))
    )  # fmt: skip
    memory = tuple(
        MemorySample(op=op, bytes=size, time=at(size / 10e9))
        for op in ("norm", "residual", "optimizer", "activation", "embedding", "cross_entropy", "bias", "cast")
        for size in (10**4, 10**7)
    )
    device = DeviceProbe(
        kind="cpu", name="x86_64", memory_bytes=16 * 10**9, threads=1, floor_s=2e-6, launch_s=0.0, power_w=0.0,
        software={"torch": "2.13.0"}, gemm=gemm, attention=attention, memory=memory, copies=(),
        layers=(
            layer_sample(2, 16, 3e-4, 6e-4), layer_sample(6, 16, 7e-4, 14e-4), layer_sample(2, 128, 2e-2, 4e-2),
        ),
    )  # fmt: skip
    return Probe(
        date="2026-01-01",
        quick=True,
        took_s=1.0,
        cpu="a CPU",
        cores=2,
        sockets=1,
        memory_bytes=16 * 10**9,
        reduce_bytes_per_s=5e9,
        devices=(device,),
        alone=shared_sample(1, 1, 0.010),
        shared=(shared_sample(1, 2, 0.006), shared_sample(2, 1, 0.012), shared_sample(4, 1, 0.024)),
        collectives=tuple(
            CollectiveSample(collective="all_reduce", ranks=ranks, bytes=size, time=at(ranks * (1e-4 + size / 1e9)))
            for ranks in (2, 4)
            for size in (2**10, 2**20)
        ),
        messages=tuple(MessageSample(bytes=size, time=at(50e-6 + 2 * size / 2e9)) for size in (2**10, 2**16, 2**22)),
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLUSTERSIM_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_profiles_predict_what_was_measured(home: Path) -> None:
    found = made_up()
    written = write_profiles(found, "here")
    folder = home / "hwprofiles" / "devices" / "here"
    device: Device = files.load(Device, folder / "device.yaml")
    costs = DeviceCosts(device, folder)
    for sample in found.devices[0].gemm:
        price = costs.cost(Gemm(m=sample.m, n=sample.n, k=sample.k, dtype="fp32"))
        assert price.source == "measured"
        assert price.seconds == pytest.approx(sample.time.seconds, rel=1e-3)
    for one in found.devices[0].attention:
        work = Attention(
            batch=1, queries=one.sequence, keys=one.sequence, heads=one.instances, kv_heads=one.instances, head_dim=64,
            causal=True, backward=False, dtype="fp32",
        )  # fmt: skip
        assert costs.cost(work).seconds == pytest.approx(one.forward.seconds, rel=1e-3)
        back = costs.cost(replace(work, backward=True)).seconds
        assert back == pytest.approx(one.backward.seconds, rel=0.25)
    price = costs.cost(Memory(op="norm", read_bytes=5 * 10**6, written_bytes=5 * 10**6))
    assert price.seconds == pytest.approx(1e-3, rel=1e-3)
    assert written.device == "here"
    assert all(path.is_file() for path in written.files)


def test_the_link_is_the_fit_of_the_messages(home: Path) -> None:
    found = made_up()
    link = load_link(write_profiles(found, "here").link)
    assert link.kind == "loopback"
    for sample in found.messages:
        assert message_seconds(link, 2.0 * sample.bytes) == pytest.approx(sample.time.seconds, rel=0.05)


def test_the_node_has_the_slowdowns_and_the_collectives(home: Path) -> None:
    node = load_node(write_profiles(made_up(), "here").node)
    assert node.devices == 4
    assert node.host.rank_slowdown == pytest.approx((0.6, 1.2, 1.8, 2.4))
    assert node.host.reduce_rate_bytes_per_s == 5e9
    table = node_collectives(node)
    assert table is not None
    assert table.seconds("all_reduce", 4, 2**20) == pytest.approx(4 * (1e-4 + 2**20 / 1e9), rel=1e-3)


def test_the_framework_has_the_host_costs(home: Path) -> None:
    written = write_profiles(made_up(), "here")
    framework: Framework = files.load(Framework, home / "hwprofiles" / "frameworks" / f"{written.framework}.yaml")
    assert framework.name == "clustersim-here"
    host = framework.host
    assert host.per_layer_forward_s == pytest.approx(1e-4)
    assert host.per_layer_backward_s == pytest.approx(2e-4)
    assert host.per_micro_batch_s == pytest.approx(3e-4)
    assert host.per_step_s == pytest.approx(1e-4)
    assert host.per_collective_s == pytest.approx(5e-5)
    assert framework.compute_scale > 0.0


def test_a_gpu_gets_a_device_and_a_node_of_its_own(home: Path) -> None:
    found = made_up()
    gpu = replace(found.devices[0], kind="gpu", threads=0, name="a GPU", launch_s=4e-6)
    gpu = replace(gpu, gemm=tuple(replace(sample, threads=0) for sample in gpu.gemm))
    written = write_profiles(replace(found, devices=(found.devices[0], gpu)), "here")
    assert written.gpu == "here-gpu"
    node = load_node("here-gpu")
    assert (node.device, node.devices, node.host.rank_slowdown) == ("here-gpu", 1, ())
    device: Device = files.load(Device, home / "hwprofiles" / "devices" / "here-gpu" / "device.yaml")
    assert (device.kind, device.launch_overhead_s) == ("gpu", 4e-6)


def test_a_probe_of_one_rank_has_no_link(home: Path) -> None:
    with pytest.raises(ExecutionError, match="ranks 1,2,4"):
        write_profiles(replace(made_up(), messages=()), "here")


def test_too_many_ranks_are_refused() -> None:
    with pytest.raises(ExecutionError, match=r"this host has \d+ cores; probe 1 to \d+"):
        probe(True, [100000], lambda _: None)


# ------------------------------------------------------------------------------------------------- on this host


def test_kernels_are_timed_with_what_the_cost_model_counts() -> None:
    from clustersim.execute import kernels
    from clustersim.execute.timing import timed

    cpu = torch.device("cpu")
    (product_,) = kernels.gemm(iter([(64, 64, 64)]), "fp32", cpu, timed, 0.01, 1)
    assert 0.0 < product_.time.seconds < 0.1
    (fused,) = kernels.attention(iter([(8, 32, 2, 16)]), "fp32", cpu, timed, 0.01)
    assert fused.forward.seconds > 0.0
    assert fused.backward.seconds > 0.0
    found = {sample.op: sample for sample in kernels.memory((2**13,), "fp32", cpu, timed, 0.002)}
    assert found["residual"].bytes == 3 * 4 * 2**13
    assert found["optimizer"].bytes == 28 * 2**13
    assert {"norm", "softmax", "activation", "cross_entropy", "embedding", "reduce", "copy"} <= set(found)
    small = kernels.layer(16, 1, 16, 16, "fp32", cpu, timed, 0.01)
    assert min(small.forward.seconds, small.backward.seconds, small.update.seconds) > 0.0


def test_samples_are_summed_up_by_median_and_quartiles() -> None:
    from clustersim.execute.timing import summary

    found = summary([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.seconds, found.samples) == (3.0, 5)
    assert found.spread == pytest.approx(2.0 / 3.0)
    assert summary([2.0]).spread == 0.0


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    with Launcher() as one:
        yield one


def test_ranks_measure_messages_and_collectives_together(launcher: Launcher, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    launcher.run(
        "clustersim.execute.probe_cpu:measure_among", ranks=2, folder=tmp_path,
        arguments={"quick": True, "out": str(out)},
        progress=lambda _: None,
    )  # fmt: skip
    among: Among = files.load(Among, out)
    assert among.shared.ranks == 2
    assert among.shared.layer.seconds > 0.0
    assert among.shared.call_s > 0.0
    sizes = {sample.bytes for sample in among.messages}
    assert len(sizes) >= 4
    assert {s.collective for s in among.collectives} == {"all_reduce", "all_gather", "reduce_scatter"}
    assert all(math.isfinite(s.time.seconds) and s.time.seconds > 0.0 for s in (*among.collectives, *among.messages))
