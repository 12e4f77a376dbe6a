"""What a probe measures, and the profiles made of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from blocks import head_of

from clustersim import files
from clustersim.cluster.load import load_node, node_collectives
from clustersim.errors import ExecutionError
from clustersim.execute.launch import Launcher
from clustersim.execute.probe import probe
from clustersim.execute.probe_samples import (
    Among,
    AttentionPoint,
    AttentionSample,
    CollectiveSample,
    DeviceProbe,
    GemmPoint,
    GemmSample,
    LayerPoint,
    LayerSample,
    MemoryPoint,
    MemorySample,
    MessageSample,
    Probe,
    SharedSample,
    SustainedSample,
    Timed,
)
from clustersim.execute.profile_files import write_profiles
from clustersim.hardware.cost import DeviceCosts
from clustersim.hardware.curve import message_seconds
from clustersim.hardware.device import Device
from clustersim.hardware.framework import Framework
from clustersim.hardware.gemm_table import GemmRows
from clustersim.hardware.kernel import Attention, Gemm, Memory
from clustersim.hardware.load import load_link
from clustersim.workload.layer_kernels import head_backward, head_forward

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
    assert framework.attention == "flash", "the kernel that the device's tables were measured with"
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


def test_models_that_wait_for_the_host_do_not_scale_a_gpus_kernels(home: Path) -> None:
    found = made_up()
    layers = found.devices[0].layers
    gpu = replace(found.devices[0], kind="gpu", threads=0, name="a GPU")
    gpu = replace(gpu, gemm=tuple(replace(sample, threads=0) for sample in gpu.gemm))
    # Driving two layers takes 0.9 ms: this one is not longer than that.
    waits = layer_sample(2, 128, 3e-4, 6.5e-4)
    scales = []
    for models in (layers, (*layers, waits, waits, waits)):
        device = replace(gpu, layers=models)
        written = write_profiles(replace(found, devices=(found.devices[0], device)), "here")
        framework: Framework = files.load(Framework, home / "hwprofiles" / "frameworks" / f"{written.framework}.yaml")
        scales.append(framework.compute_scale)
    assert scales[0] == scales[1]


def with_products(found: Probe, points: dict[tuple[int, int, int], float], date: str) -> Probe:
    """`found` with other products."""
    gemm = tuple(
        GemmSample(dtype="fp32", m=m, n=n, k=k, threads=1, time=at(seconds)) for (m, n, k), seconds in points.items()
    )
    return replace(found, date=date, devices=(replace(found.devices[0], gemm=gemm),))


def gemm_rows(home: Path) -> dict[tuple[int, int, int], float]:
    rows = GemmRows.read(home / "hwprofiles" / "devices" / "here" / "gemm.csv")
    return dict(
        zip(zip(rows.m.tolist(), rows.n.tolist(), rows.k.tolist(), strict=True), rows.seconds.tolist(), strict=True)
    )


def test_a_second_profile_extends_and_replaces_rows_of_the_same_machine(home: Path) -> None:
    first = {(64, 64, 64): 1e-5, (64, 64, 128): 2e-5}
    second = {(64, 64, 128): 3e-5, (64, 128, 128): 4e-5}
    write_profiles(with_products(made_up(), first, "2026-01-01"), "here")
    write_profiles(with_products(made_up(), second, "2026-02-02"), "here")
    assert gemm_rows(home) == pytest.approx({**first, **second})
    device: Device = files.load(Device, home / "hwprofiles" / "devices" / "here" / "device.yaml")
    table = device.tables.gemm[0].provenance
    assert table.rows == 3
    assert "1 rows are of an earlier profile" in table.notes
    assert "1 rows are kept of 2026-01-01" in device.provenance.notes
    assert device.provenance.date == "2026-02-02"
    write_profiles(with_products(made_up(), second, "2026-03-03"), "here", fresh=True)
    assert gemm_rows(home) == pytest.approx(second)


def test_rows_of_another_machine_are_not_kept(home: Path) -> None:
    rows = {(64, 64, 128): 3e-5}
    write_profiles(with_products(made_up(), {(64, 64, 64): 1e-5}, "2026-01-01"), "here")
    write_profiles(replace(with_products(made_up(), rows, "2026-01-02"), cpu="another CPU"), "here")
    assert gemm_rows(home) == pytest.approx(rows)
    # Nor those of a file that cannot be read.
    write_profiles(made_up(), "here")
    (home / "hwprofiles" / "devices" / "here" / "memory.csv").write_text("op,bytes\n", encoding="utf-8")
    write_profiles(with_products(made_up(), rows, "2026-01-02"), "here")
    assert gemm_rows(home) == pytest.approx(rows)


def test_a_probe_that_lacks_a_kind_writes_nothing(home: Path) -> None:
    found = made_up()
    write_profiles(found, "here")
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    lame = replace(found.devices[0], attention=(), refused={"attention default": "2: no kernel"})
    with pytest.raises(ExecutionError, match=r"no attention were measured .*no kernel"):
        write_profiles(replace(found, devices=(lame,)), "here")
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_the_profile_says_clocks_derate_and_what_is_missing(home: Path) -> None:
    found = made_up()
    slowed = SustainedSample(dtype="fp32", side=64, seconds=3.0, burst_flops=100e9, sustained_flops=90e9, spread=0.01)
    device = replace(
        found.devices[0], before={"sm_mhz": "1980", "temperature_c": "35"},
        after={"sm_mhz": "1755", "temperature_c": "35"}, missed={"gemm": 7}, sustained=(slowed,),
    )  # fmt: skip
    write_profiles(replace(found, devices=(device,)), "here")
    profile: Device = files.load(Device, home / "hwprofiles" / "devices" / "here" / "device.yaml")
    assert profile.sustained_clock == pytest.approx(0.9)
    assert profile.provenance.clock == "sm_mhz 1980 before, 1755 after; temperature_c 35"
    assert "fell from 0.1 to 0.09 TFLOP/s in 3 s" in profile.provenance.notes
    assert "Not measured for want of time: 7 gemm" in profile.provenance.notes
    # A difference within the timings' spread is none.
    assert replace(slowed, spread=0.2).derate == 1.0


def test_the_attention_kernel_is_the_named_one_of_the_same_time(home: Path) -> None:
    found = made_up()
    own = found.devices[0].attention[0]
    named = (
        replace(own, backend="flash", forward=at(2.0 * own.forward.seconds)),
        replace(own, backend="cudnn", forward=at(1.02 * own.forward.seconds)),
    )
    device = replace(found.devices[0], attention=(*found.devices[0].attention, *named))
    write_profiles(replace(found, devices=(device,)), "here")
    profile: Device = files.load(Device, home / "hwprofiles" / "devices" / "here" / "device.yaml")
    assert profile.tables.attention_kernel == "cudnn"
    assert profile.tables.attention[0].provenance.rows == len(found.devices[0].attention)


def test_a_probe_of_one_rank_has_no_link(home: Path) -> None:
    with pytest.raises(ExecutionError, match="ranks 1,2,4"):
        write_profiles(replace(made_up(), messages=()), "here")


def test_too_many_ranks_are_refused() -> None:
    with pytest.raises(ExecutionError, match=r"this host has \d+ cores; probe 1 to \d+"):
        probe(10.0, [100000], lambda _: None)


# ------------------------------------------------------------------------------------------------- on this host


def test_kernels_are_timed_with_what_the_cost_model_counts() -> None:
    from clustersim.execute import kernels
    from clustersim.execute.timing import timed

    cpu = torch.device("cpu")
    for form in ("forward", "dgrad", "wgrad"):
        point = GemmPoint(dtype="fp32", m=64, n=32, k=16, form=form)
        found = kernels.gemm(point, cpu, timed, 0.01, 1)
        assert 0.0 < found.time.seconds < 0.1
        assert (found.m, found.n, found.k, found.form) == (64, 32, 16, form)
    batched = kernels.gemm(GemmPoint(dtype="fp32", m=8, n=8, k=8, batch=4), cpu, timed, 0.01, 1)
    assert batched.batch == 4
    fused = kernels.attention(
        AttentionPoint(dtype="fp32", instances=8, sequence=32, group=2, head_dim=16), cpu, timed, 0.01
    )
    assert fused.forward.seconds > 0.0
    assert fused.backward.seconds > 0.0
    samples = {s.op: s for s in kernels.memory(MemoryPoint(dtype="fp32", elements=2**13), cpu, timed, 0.002)}
    assert samples["residual"].bytes == 3 * 4 * 2**13
    assert samples["optimizer"].bytes == 28 * 2**13
    # A sample is the mean of both passes, and counts what the cost model does.
    gpt = kernels.small_model(16, 1, 2, 8)
    loss = (
        *head_forward(head_of(gpt, 8, dtype="fp32", fused=False)),
        *head_backward(head_of(gpt, 8, dtype="fp32", fused=False)),
    )
    counted = [kernel.traffic_bytes for kernel, _ in loss if getattr(kernel, "op", "") == "cross_entropy"]
    assert samples["cross_entropy"].bytes / 2**13 == sum(counted) / 2 / (8 * gpt.vocab)
    assert {"norm", "softmax", "activation", "cross_entropy", "embedding", "reduce", "copy"} <= set(samples)
    small = kernels.layer(LayerPoint(hidden=16, layers=1, tokens=16, sequence=16, dtype="fp32"), cpu, timed, 0.01)
    assert min(small.forward.seconds, small.backward.seconds, small.update.seconds) > 0.0


def test_products_have_the_shapes_of_the_three_passes_of_a_linear_layer() -> None:
    from clustersim.execute import kernels

    shapes = []

    def timer(function: Callable[[], object], budget_s: float) -> Timed:
        result = function()
        assert isinstance(result, torch.Tensor)
        shapes.append(tuple(result.shape))
        return at(1.0)

    for form, batch in (("forward", 1), ("dgrad", 1), ("wgrad", 1), ("forward", 3)):
        point = GemmPoint(dtype="fp32", m=24, n=8, k=16, form=form, batch=batch)
        kernels.gemm(point, torch.device("cpu"), timer, 0.0, 1)
    assert shapes == [(24, 8), (24, 8), (24, 8), (3, 24, 8)]


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    with Launcher() as one:
        yield one


def test_ranks_measure_messages_and_collectives_together(launcher: Launcher, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    launcher.run(
        "clustersim.execute.probe_among:measure_among", ranks=2, folder=tmp_path,
        arguments={"until_s": time.monotonic() + 12.0, "out": str(out)},
        progress=lambda _: None,
    )  # fmt: skip
    among: Among = files.load(Among, out)
    assert among.shared.ranks == 2
    assert among.shared.layer.seconds > 0.0
    assert among.shared.call_s > 0.0
    sizes = {sample.bytes for sample in among.messages}
    assert {2**10, 2**25} <= sizes
    assert {s.collective for s in among.collectives} == {"all_reduce", "all_gather", "reduce_scatter"}
    assert all(math.isfinite(s.time.seconds) and s.time.seconds > 0.0 for s in (*among.collectives, *among.messages))


@pytest.mark.parametrize("damage", ["device.yaml", "gemm.csv", "another source"])
def test_an_earlier_profile_that_does_not_fit_is_replaced_and_told(home: Path, damage: str) -> None:
    rows = {(64, 64, 128): 3e-5}
    write_profiles(with_products(made_up(), {(64, 64, 64): 1e-5}, "2026-01-01"), "here")
    folder = home / "hwprofiles"
    found = with_products(made_up(), rows, "2026-01-02")
    if damage == "device.yaml":
        # As a version wrote it that knew fewer keys, all files of a profile.
        for path in (
            folder / "devices" / "here" / "device.yaml", folder / "nodes" / "here" / "node.yaml",
            folder / "frameworks" / "clustersim-here.yaml", folder / "links" / "here-loopback.yaml",
        ):  # fmt: skip
            lines = path.read_text(encoding="utf-8").splitlines()
            path.write_text("\n".join(lines[:3]) + "\nold_key: 1\n", encoding="utf-8")
    elif damage == "gemm.csv":
        (folder / "devices" / "here" / "gemm.csv").write_text("m,n,k,us\n1,2,3,4\n", encoding="utf-8")
    else:
        found = replace(found, cpu="another CPU")
    told: list[str] = []
    write_profiles(found, "here", tell=told.append)
    (line,) = told
    assert "is replaced" in line
    assert ("another source" if damage == "another source" else damage) in line
    assert gemm_rows(home) == pytest.approx(rows)
    assert load_node("here").host.cores == 2
    # What fits is extended without a word.
    told.clear()
    write_profiles(with_products(made_up(), {(64, 64, 64): 1e-5}, "2026-01-03"), "here", tell=told.append)
    assert len(gemm_rows(home)) == (1 if damage == "another source" else 2)
    assert bool(told) == (damage == "another source")


def test_a_rank_alone_is_no_slower_than_several_with_as_many_threads(home: Path) -> None:
    """Something else disturbed the rank alone: 2 ranks took half its time."""
    found = replace(made_up(), alone=shared_sample(1, 1, 0.024))
    node = load_node(write_profiles(found, "here").node)
    assert node.host.rank_slowdown[1:] == pytest.approx((1.0, 1.5, 2.0))
