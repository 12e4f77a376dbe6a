"""What runs on a GPU, with CPU tensors: the same functions behind a fake stream, fake events, another PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from execute_ranks import HostEvent, all_reduce, make_task

from clustersim import files
from clustersim.compare import Run
from clustersim.execute import execute
from clustersim.execute.launch import Launcher
from clustersim.execute.probe_samples import (
    AttentionPoint,
    AttentionSample,
    CopyPoint,
    CopySample,
    GemmPoint,
    GemmSample,
    LayerPoint,
    LayerSample,
    MemoryPoint,
    MemorySample,
    Point,
    Sample,
    SustainedPoint,
    SustainedSample,
)
from clustersim.execute.probe_session import RefusedPoint

torch = pytest.importorskip("torch")

from clustersim.execute import kernels, probe_cuda  # noqa: E402
from clustersim.execute.clock import Clock, Notes  # noqa: E402
from clustersim.execute.data_parallel import overlap_is_safe  # noqa: E402
from clustersim.execute.probe_cuda import QueuedDevice  # noqa: E402


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as one:
        yield one


# -------------------------------------------------------------------------------------------------------- kernels


class HostStream:
    """The host as a stream: what is queued is done at once."""

    def __init__(self) -> None:
        self.lost = False
        self._buffer = torch.empty(2**12)

    def flush(self) -> None:
        self._buffer.zero_()

    def seconds(self, launch: Callable[[], object]) -> Callable[[], float]:
        begin = time.perf_counter()
        launch()
        took = time.perf_counter() - begin
        return lambda: took

    def wait(self) -> None:
        if self.lost:
            raise RuntimeError("the context is lost")

    def now(self) -> float:
        return time.perf_counter()


@pytest.fixture(scope="module")
def device() -> Iterator[QueuedDevice]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Tensors are small, and other programs may want the other cores.
    yield QueuedDevice(torch.device("cpu"), HostStream())
    torch.set_num_threads(threads)


POINTS: list[tuple[Point, type[Sample]]] = [
    (GemmPoint(dtype="bf16", m=64, n=64, k=64), GemmSample),
    (GemmPoint(dtype="tf32", m=64, n=64, k=64), GemmSample),
    (GemmPoint(dtype="bf16", m=64, n=32, k=16, form="wgrad"), GemmSample),
    (GemmPoint(dtype="bf16", m=64, n=32, k=16, form="dgrad"), GemmSample),
    (GemmPoint(dtype="bf16", m=64, n=32, k=16, batch=4), GemmSample),
    (AttentionPoint(dtype="bf16", instances=8, sequence=32, group=4, head_dim=16), AttentionSample),
    (AttentionPoint(dtype="bf16", instances=8, sequence=32, group=1, head_dim=16, backend="flash"), AttentionSample),
    (MemoryPoint(dtype="bf16", elements=2**12), MemorySample),
    (CopyPoint(direction="host-to-device", bytes=2**12), CopySample),
    (CopyPoint(direction="device-to-host", bytes=2**12), CopySample),
    (CopyPoint(direction="device-to-device", bytes=2**12), CopySample),
    (LayerPoint(layers=1, hidden=64, tokens=32, sequence=16, dtype="bf16"), LayerSample),
    (SustainedPoint(dtype="bf16", side=32, seconds=0.2), SustainedSample),
]


@pytest.mark.parametrize(("point", "kind"), POINTS, ids=lambda x: getattr(x, "kind", ""))
def test_every_kind_of_point_is_measured_by_the_code_that_a_gpu_runs(
    point: Point, kind: type[Sample], device: QueuedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_cuda, "_PAUSE_S", 0.01)
    monkeypatch.setattr(probe_cuda, "_MODEL_S", 0.01)
    monkeypatch.setattr(probe_cuda, "_BUDGET_S", 0.001)
    samples = device.measure(point)
    assert samples
    assert all(isinstance(sample, kind) for sample in samples)
    # A probe writes them down and reads them again.
    for sample in samples:
        assert files.validated(kind, files.plain(sample), "here") == sample
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_pytorch_refuses_is_a_refused_point_and_a_lost_context_ends_all(
    device: QueuedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = GemmPoint(dtype="bf16", m=8, n=8, k=8)

    def fail_with(error: Exception) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(kernels, "gemm", fail)

    # fp8 products are refused with a ValueError in newer PyTorch, with a RuntimeError in older.
    for error in (ValueError("k must be\na multiple of 16"), RuntimeError("no kernel"), NotImplementedError("no")):
        fail_with(error)
        with pytest.raises(RefusedPoint, match=str(error).replace("\n", " ")):
            device.measure(point)
    fail_with(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RefusedPoint, match="out of device memory"):
        device.measure(point)
    lost = HostStream()
    gpu = QueuedDevice(torch.device("cpu"), lost)
    lost.lost = True
    fail_with(RuntimeError("an illegal memory access"))
    with pytest.raises(RuntimeError, match="the context is lost"):
        gpu.measure(point)


def test_fp8_products_multiply_as_the_table_says() -> None:
    """(m, k) by (k, n) with k, n multiples of 16, the right-hand side column-major, bf16 out."""
    run = kernels._fp8(GemmPoint(dtype="fp8", m=32, n=48, k=64), torch.device("cpu"))
    try:
        y = run()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no fp8 on this CPU: {error}")
    assert isinstance(y, torch.Tensor)
    assert (y.shape, y.dtype) == ((32, 48), torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------- clocks


def test_events_are_resolved_to_the_hosts_clock() -> None:
    clock = Clock(HostEvent)
    before = time.monotonic()
    mark = clock.mark()
    after = time.monotonic()
    assert isinstance(mark, HostEvent)
    assert before - 1e-3 <= clock.seconds(mark) <= after + 1e-3
    # A moment of the host stays what it is, and both stand in one row.
    notes = Notes(clock)
    notes.add(0, "forward", "all", "compute", "compute", before, mark)
    (row,) = notes.rows()
    assert row[-2] == before
    assert row[-1] == pytest.approx(before, abs=0.05)


def test_a_cpu_needs_no_events() -> None:
    assert isinstance(Clock.of(torch.device("cpu")).mark(), float)


# --------------------------------------------------------------------------------------------------------- overlap


@pytest.mark.parametrize(
    ("version", "kind", "share", "safe"),
    [
        ("2.9.1+cu128", "gpu", True, False),
        ("2.10.0", "gpu", True, False),
        ("2.11.0+cu130", "gpu", True, True),
        ("2.9.1", "gpu", False, True),  # NCCL.
        ("2.6.0", "cpu", True, True),
    ],
)
def test_overlap_over_gloo_needs_a_pytorch_that_waits(version: str, kind: str, share: bool, safe: bool) -> None:
    task = replace(make_task(all_reduce()), device_kind=kind, share_devices=share)  # type: ignore[arg-type]
    assert overlap_is_safe(task, version) == safe


def test_without_safe_overlap_ranks_say_so_and_reach_the_same_losses(launcher: Launcher, tmp_path: Path) -> None:
    plain = make_task(all_reduce(), steps=2)
    task = replace(plain, device_kind="gpu", share_devices=True)
    runs: dict[str, Run] = {}
    told: dict[str, list[str]] = {}
    for version in ("2.9.1+cu128", "2.11.0+cu130"):
        folder = tmp_path / version
        files.save(task, folder / "task.json")
        told[version] = []
        launcher.run(
            "execute_ranks:train_with_events", ranks=2, folder=folder, progress=told[version].append,
            arguments={
                "task": str(folder / "task.json"), "out": str(folder / "run.json"), "torch_version": version,
            },
        )  # fmt: skip
        runs[version] = files.load(Run, folder / "run.json")
    old, new = runs.values()
    assert any("no overlap: gloo in PyTorch 2.9.1" in line for line in told["2.9.1+cu128"])
    assert not any("no overlap" in line for line in told["2.11.0+cu130"])
    assert old.losses == pytest.approx(new.losses)
    for run in (old, new):
        # Marks are events of another clock here: all of them must have been resolved.
        assert 0.0 < sum(run.step_s) < 10.0
        assert all(0.0 <= span.ready_s <= span.end_s < 10.0 for span in run.timeline.spans)
    for step in range(old.timeline.steps):
        mine = [span for span in old.timeline.spans if span.op.step == step and span.rank == 0]
        passes = max(span.end_s for span in mine if span.op.phase == "backward")
        reduced = [span for span in mine if span.op.kind == "all-reduce"]
        assert reduced
        assert all(span.start_s >= passes for span in reduced)


def test_a_launcher_looks_for_gpus_once(launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def run(function: str, *, arguments: dict[str, str], **_: object) -> None:
        calls.append(function)
        Path(arguments["out"]).write_text('["a GPU"]', encoding="utf-8")

    one = Launcher()
    monkeypatch.setattr(one, "run", run)
    assert execute.host_gpus(one, tmp_path) == execute.host_gpus(one, tmp_path) == ["a GPU"]
    assert len(calls) == 1


# --------------------------------------------------------------------------------------------- probe to prediction


def test_what_a_gpus_probe_measures_becomes_a_profile_that_predicts(
    device: QueuedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way of a GPU, on small tensors of the CPU: probe, profile, question, simulated step."""
    from test_execute_probe import made_up

    from clustersim.execute.probe_grid import Points
    from clustersim.execute.profile_files import write_profiles
    from clustersim.hardware.device import Device
    from clustersim.program.lower import lower
    from clustersim.scenario.load import question
    from clustersim.search.search import make_plan
    from clustersim.simulate.simulate import simulate

    monkeypatch.setenv("CLUSTERSIM_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, seconds in (("_PAUSE_S", 0.01), ("_MODEL_S", 0.01), ("_BUDGET_S", 0.001)):
        monkeypatch.setattr(probe_cuda, name, seconds)
    models = [
        LayerPoint(layers=layers, hidden=hidden, tokens=64, sequence=32, dtype="bf16")
        for layers, hidden in ((1, 64), (3, 64), (1, 128))
    ]
    order: list[Point] = [
        *models,
        *(GemmPoint(dtype="bf16", m=m, n=n, k=64) for m in (32, 128) for n in (64, 128)),
        GemmPoint(dtype="bf16", m=32, n=64, k=64, form="wgrad"),
        GemmPoint(dtype="fp32", m=32, n=64, k=64),
        GemmPoint(dtype="fp8", m=32, n=32, k=32),
        *(AttentionPoint(dtype="bf16", instances=8, sequence=s, group=1, head_dim=64) for s in (32, 64)),
        AttentionPoint(dtype="bf16", instances=8, sequence=32, group=1, head_dim=64, backend="flash"),
        AttentionPoint(dtype="bf16", instances=8, sequence=32, group=1, head_dim=64, backend="cudnn"),
        MemoryPoint(dtype="bf16", elements=2**12),
        MemoryPoint(dtype="bf16", elements=2**14),
        CopyPoint(direction="host-to-device", bytes=2**12),
        SustainedPoint(dtype="bf16", side=32, seconds=0.2),
    ]
    answers = {"driver_version": "580.1\n", "power.limit": "700.00\n", "clocks.sm": "1980\n"}
    found = probe_cuda.probe_queued(
        device, Points(order, 3), answers.get, name="a GPU", memory_bytes=10**11, software={"torch": "2.11.0"},
        until_s=time.monotonic() + 60.0, record=tmp_path / "gpu.jsonl", tell=lambda _: None,
    )  # fmt: skip
    assert found.missed == {}
    # What this device has no kernel for is refused, with the reason, and the rest is measured.
    assert "attention cudnn" in found.refused
    assert {"bf16", "fp32"} <= {sample.dtype for sample in found.gemm}
    assert (found.power_w, found.software["driver"]) == (700.0, "580.1")
    host = made_up()
    written = write_profiles(replace(host, devices=(host.devices[0], found)), "here")
    profile: Device = files.load(Device, tmp_path / "hwprofiles" / "devices" / "here-gpu" / "device.yaml")
    assert ("fp8" in profile.peak) != ("gemm fp8" in found.refused)
    assert "Refused: attention cudnn" in profile.provenance.notes
    tree = {
        "schema_version": 1,
        "name": "one",
        "model": {"layers": 2, "hidden": 128, "heads": 2, "vocab": 512, "positions": 64},
        "training": {"global_batch": 4, "sequence": 64, "precision": "bf16"},
        "framework": written.framework,
        "cluster": {"nodes": {"here-gpu": {"count": 1, "devices": 1}}},
    }
    asked = question(tree, "one")
    plan = make_plan(asked)
    step = simulate(lower(asked.workload, plan.layout, asked.framework, 1), asked.cluster, asked.framework)
    assert 0.0 < step.step_s < 60.0
    assert plan.prediction.memory_bytes < profile.memory_bytes
