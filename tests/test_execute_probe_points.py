"""How a probe spends its time: order, budget, resumption, outliers, events; on devices that are formulas."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.errors import ExecutionError
from clustersim.execute.launch import cores
from clustersim.execute.probe_clocks import UNKNOWN, clock_line, gpu_clocks
from clustersim.execute.probe_grid import cpu_points, cuda_points, levels, refined
from clustersim.execute.probe_samples import (
    AttentionPoint,
    AttentionSample,
    CopyPoint,
    CopySample,
    DeviceProbe,
    GemmPoint,
    GemmSample,
    LayerPoint,
    LayerSample,
    MemoryPoint,
    MemorySample,
    Point,
    Probe,
    Sample,
    SharedSample,
    SustainedPoint,
    SustainedSample,
    Timed,
)
from clustersim.execute.probe_session import Measured, RefusedPoint, measure_points
from clustersim.execute.profile_device import probed_device
from clustersim.hardware.cost import DeviceCosts
from clustersim.hardware.kernel import Attention, Gemm, Memory

OPS = ("norm", "residual", "optimizer", "activation", "embedding", "cross_entropy", "bias", "cast")
RATE, ATTENTION_RATE, BANDWIDTH, FLOOR_S, DERATE = 800e12, 400e12, 4e12, 3e-6, 0.93


def at(seconds: float) -> Timed:
    return Timed(seconds=seconds, spread=0.0, samples=5)


def gemm_s(m: float, n: float, k: float) -> float:
    return FLOOR_S + max(2.0 * m * n * k / RATE, 2.0 * (m * k + k * n + m * n) / BANDWIDTH)


def attention_s(instances: float, sequence: float, head_dim: float, backward: bool) -> float:
    work = 2.0 * instances * sequence**2 * head_dim
    return FLOOR_S + work * (5.0 if backward else 1.0) / ATTENTION_RATE  # The backward pass at half the rate.


@dataclass
class FormulaDevice:
    """A GPU whose kernels take what formulas say; measuring a point takes `overhead_s` of a clock that this holds."""

    overhead_s: float = 0.05
    lacks: str = ""
    clock_s: float = 0.0
    asked: list[Point] = field(default_factory=list)

    def now(self) -> float:
        return self.clock_s

    def measure(self, point: Point) -> tuple[Sample, ...]:
        self.asked.append(point)
        self.clock_s += point.seconds if isinstance(point, SustainedPoint) else self.overhead_s
        if point.kind == self.lacks:
            raise RefusedPoint("no such kernel")
        match point:
            case GemmPoint(dtype=dtype, m=m, n=n, k=k, batch=batch, form=form):
                time = at(gemm_s(batch * m, n, k))
                return (GemmSample(dtype=dtype, m=m, n=n, k=k, batch=batch, form=form, threads=0, time=time),)
            case AttentionPoint(dtype=dtype, instances=i, sequence=s, group=g, head_dim=d, backend=backend):
                ways = [at(attention_s(i, s, d, way)) for way in (False, True)]
                return (
                    AttentionSample(
                        dtype=dtype, instances=i, sequence=s, group=g, head_dim=d, backend=backend, forward=ways[0],
                        backward=ways[1],
                    ),
                )  # fmt: skip
            case MemoryPoint(elements=n):
                return tuple(
                    MemorySample(op=op, bytes=4 * n, time=at(FLOOR_S + 4 * n / BANDWIDTH))  # type: ignore[arg-type]
                    for op in OPS
                )
            case CopyPoint(direction=direction, bytes=size):
                return (CopySample(direction=direction, bytes=size, time=at(1e-5 + size / 50e9)),)
            case LayerPoint(hidden=h, layers=layers, tokens=t, sequence=s, dtype=dtype):
                forward, backward, update = (at(layers * x) for x in (1e-3, 2e-3, 1e-4))
                return (
                    LayerSample(
                        layers=layers, hidden=h, heads=1, tokens=t, sequence=s, dtype=dtype, forward=forward,
                        backward=backward, update=update,
                    ),
                )  # fmt: skip
            case SustainedPoint(dtype=dtype, side=side, seconds=seconds):
                return (
                    SustainedSample(
                        dtype=dtype, side=side, seconds=seconds, burst_flops=RATE, sustained_flops=DERATE * RATE,
                        spread=0.001,
                    ),
                )  # fmt: skip


def run(device: FormulaDevice, points: list[Point], budget_s: float, record: Path, needed: int = 0) -> Measured:
    return measure_points(
        device,
        points,
        needed=needed,
        until_s=device.now() + budget_s,
        record=record,
        now=device.now,
        tell=lambda _: None,
    )  # fmt: skip


GPU_POINTS, GPU_NEEDED = cuda_points(["bf16", "fp16", "fp32", "tf32", "fp8"], 140 * 10**9, 4.0)


def as_device(found: Measured) -> DeviceProbe:
    return DeviceProbe(
        kind="gpu", name="a GPU", memory_bytes=140 * 10**9, threads=0, floor_s=FLOOR_S, launch_s=4e-6, power_w=700.0,
        software={"torch": "2.11.0", "driver": "580"}, before={"sm_mhz": "1980"}, after={"sm_mhz": "1700"},
        missed=found.missed_by_kind, refused=found.refusals, gemm=found.gemm, attention=found.attention,
        memory=found.memory, copies=found.copies, layers=found.layers, sustained=found.sustained,
    )  # fmt: skip


def as_probe(device: DeviceProbe) -> Probe:
    shared = SharedSample(ranks=1, threads=1, layer=at(0.01), call_s=0.0)
    return Probe(
        date="2026-01-01", quick=False, took_s=1.0, cpu="a CPU", cores=2, sockets=1, memory_bytes=10**10,
        reduce_bytes_per_s=1e9, devices=(device,), alone=shared, shared=(shared,), collectives=(), messages=(),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the order


@given(st.integers(1, 40))
def test_levels_refine_from_the_ends(count: int) -> None:
    found = levels(count)
    assert found[0] == found[-1] == 0
    for level in range(max(found) + 1):
        known = [index for index in range(count) if found[index] <= level]
        gaps = [right - left for left, right in pairwise(known)]
        # Halving never leaves one gap more than one step wider than twice another.
        assert not gaps or max(gaps) <= 2 * min(gaps) + 1


def test_a_grid_is_measured_from_its_corners_inwards() -> None:
    places = sorted(refined([(1, 2, 3), (10, 20, 30)]))
    assert [point for deep, _, point in places if deep == 0] == [(1, 10), (1, 30), (3, 10), (3, 30)]
    assert len(places) == 9


@pytest.mark.parametrize("points", [GPU_POINTS, cpu_points(2.0).order])
def test_every_kind_is_among_the_first_points_and_nothing_twice(points: list[Point]) -> None:
    assert len(points) == len(set(points))
    kinds = {point.kind for point in points}
    early = points[: len(points) // 3]
    assert {point.kind for point in early} == kinds
    # What a profile cannot do without: two depths of a narrow model, and a wide one.
    models = [point for point in points[:10] if isinstance(point, LayerPoint)]
    assert len({point.layers for point in models if point.hidden <= 64}) == 2
    assert any(point.hidden > 64 for point in models)
    for kind in ("gemm", "memory"):
        sizes = [_size(point) for point in points if point.kind == kind]
        assert max(sizes) in sizes[: max(3, len(sizes) // 3)], "the slowest point of a kind must come early"


def _size(point: Point) -> int:
    match point:
        case GemmPoint():
            return point.batch * point.m * point.n * point.k
        case MemoryPoint():
            return point.elements
        case _:
            return 0


def test_small_devices_are_not_asked_for_large_tensors() -> None:
    large = [point for point in cuda_points(["fp16", "fp32"], 16 * 10**9, 1.0).order if isinstance(point, MemoryPoint)]
    assert max(point.elements for point in large) * 100 < 8 * 10**9


# ----------------------------------------------------------------------------------------------------- the budget


@settings(max_examples=25, deadline=None)
@given(budget_s=st.floats(8.0, 80.0), overhead_s=st.floats(0.01, 0.5))
def test_the_budget_is_kept(tmp_path_factory: pytest.TempPathFactory, budget_s: float, overhead_s: float) -> None:
    device = FormulaDevice(overhead_s=overhead_s)
    found = run(device, GPU_POINTS, budget_s, tmp_path_factory.mktemp("budget") / "record.jsonl")
    assert device.now() <= budget_s + 1e-9
    assert len(found.entries) + len(found.missed) == len(GPU_POINTS)
    assert sum(found.missed_by_kind.values()) == len(found.missed)
    # What is left out is the end of the order, but for what would have been too long.
    done = [entry.point for entry in found.entries]
    assert done == [point for point in GPU_POINTS if point in set(done)]
    assert not found.missed or device.now() > budget_s - 4.0 - overhead_s


def test_a_longer_budget_measures_the_same_points_and_more(tmp_path: Path) -> None:
    short = run(FormulaDevice(), GPU_POINTS, 20.0, tmp_path / "short.jsonl")
    long = run(FormulaDevice(), GPU_POINTS, 60.0, tmp_path / "long.jsonl")
    assert {entry.point for entry in short.entries} < {entry.point for entry in long.entries}


def test_what_a_profile_needs_is_measured_in_any_case(tmp_path: Path) -> None:
    found = run(FormulaDevice(), GPU_POINTS, 0.0, tmp_path / "record.jsonl", GPU_NEEDED)
    assert [entry.point for entry in found.entries] == GPU_POINTS[:GPU_NEEDED]
    device, _ = probed_device(as_probe(as_device(found)), as_device(found), "least")
    assert device.tables.gemm[0].provenance.rows == 1


# ------------------------------------------------------------------------------------------------------- resuming


def test_an_interrupted_probe_goes_on_where_it_stopped(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    first = FormulaDevice()
    run(first, GPU_POINTS, 10.0, record)
    # Killed in the middle of a line.
    with record.open("ab") as file:
        file.write(b'{"point": {"kind": "ge')
    second = FormulaDevice()
    found = run(second, GPU_POINTS, 1e6, record)
    assert not set(first.asked) & set(second.asked)
    assert set(first.asked) | set(second.asked) == set(GPU_POINTS)
    whole = run(FormulaDevice(), GPU_POINTS, 1e6, tmp_path / "whole.jsonl")
    assert [entry.samples for entry in found.entries] == [entry.samples for entry in whole.entries]
    # The file is whole again.
    assert len([json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]) == len(GPU_POINTS)


def test_what_the_device_refuses_is_told_and_not_asked_again(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    found = run(FormulaDevice(lacks="copy"), GPU_POINTS, 1e6, record)
    assert found.copies == ()
    assert found.refusals == {"copy": "15: no such kernel"}
    again = FormulaDevice()
    run(again, GPU_POINTS, 1e6, record)
    assert again.asked == []


def test_no_time_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match="nothing could be measured: the budget is too short"):
        run(FormulaDevice(), GPU_POINTS, 0.0, tmp_path / "record.jsonl")


# ------------------------------------------------------------------------------------------------------ the result


def test_the_profile_reproduces_the_formulas(tmp_path: Path) -> None:
    found = as_device(run(FormulaDevice(), GPU_POINTS, 1e6, tmp_path / "record.jsonl"))
    device, tables = probed_device(as_probe(found), found, "formula")
    for name, text in tables.texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    costs = DeviceCosts(device, tmp_path)
    assert device.sustained_clock == pytest.approx(DERATE)
    assert device.peak["bf16"] == pytest.approx(RATE, rel=0.01)
    random_ = random.Random(0)
    errors = []
    for _ in range(200):
        m, n, k = (8 * round(2.0 ** random_.uniform(5.0, 10.5)) for _ in range(3))
        price = costs.cost(Gemm(m=m, n=n, k=k, dtype="bf16")).seconds
        errors.append(abs(price * device.sustained_clock / gemm_s(m, n, k) - 1.0))
    assert sum(errors) / len(errors) < 0.03
    assert max(errors) < 0.2
    for point in found.gemm:
        if point.batch == 1 and point.form == "forward":
            price = costs.cost(Gemm(m=point.m, n=point.n, k=point.k, dtype=point.dtype)).seconds
            assert price * device.sustained_clock == pytest.approx(point.time.seconds, rel=2e-3)
    for size in (10**5, 10**7, 10**9):
        price = costs.cost(Memory(op="norm", read_bytes=size, written_bytes=size)).seconds
        assert price == pytest.approx(FLOOR_S + 2 * size / BANDWIDTH, rel=0.1)
    ratio = device.roofline.attention_backward_efficiency / device.roofline.attention_efficiency
    assert ratio == pytest.approx(0.5, rel=0.1)
    work = Attention(
        batch=16,
        queries=4096,
        keys=4096,
        heads=16,
        kv_heads=16,
        head_dim=128,
        causal=True,
        backward=False,
        dtype="bf16",
    )
    clock = costs.cost(work).seconds / attention_s(256, 4096, 128, False)
    assert 1.0 - 2e-3 <= clock <= 1.0 / DERATE + 2e-3


def test_a_quick_profile_comes_near_them(tmp_path: Path) -> None:
    quick = run(FormulaDevice(overhead_s=0.2), GPU_POINTS, 60.0, tmp_path / "record.jsonl")
    found = as_device(quick)
    assert quick.missed
    device, tables = probed_device(as_probe(found), found, "formula")
    for name, text in tables.texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    costs = DeviceCosts(device, tmp_path)
    random_ = random.Random(0)
    errors = []
    for _ in range(200):
        m, n, k = (8 * round(2.0 ** random_.uniform(7.0, 10.5)) for _ in range(3))
        price = costs.cost(Gemm(m=m, n=n, k=k, dtype="bf16")).seconds
        errors.append(abs(price * device.sustained_clock / gemm_s(m, n, k) - 1.0))
    assert sum(errors) / len(errors) < 0.1
    assert "Not measured for want of time" in device.provenance.notes


# --------------------------------------------------------------------------------------------------------- timings


def test_outliers_do_not_count() -> None:
    pytest.importorskip("torch")
    from clustersim.execute.timing import summary

    found = summary([1.0, 1.02, 0.98, 1.01, 0.99, 30.0])
    assert found.seconds == 1.0
    assert found.samples == 5
    assert found.rejected == pytest.approx(1 / 6)
    assert found.spread < 0.03
    assert summary([2.0]) == Timed(seconds=2.0, spread=0.0, samples=1)
    # Timings that a clock rounds to a few values are not outliers of each other.
    assert summary([1.0, 1.0, 1.0, 1.0, 1.005]).rejected == 0.0


@given(st.lists(st.floats(0.5, 2.0), min_size=5, max_size=40), st.lists(st.floats(50.0, 1e6), max_size=2))
def test_a_few_disturbances_move_the_median_little(calm: list[float], wild: list[float]) -> None:
    pytest.importorskip("torch")
    from clustersim.execute.timing import summary

    assert min(calm) <= summary([*calm, *wild]).seconds <= max(calm)


@dataclass
class FormulaStream:
    """A device and a host with clocks of their own: the host takes `launch_s` to queue a kernel, the device starts it
    when it is queued and the ones before are done; an event costs the device `event_s`."""

    launch_s: float = 5e-6
    event_s: float = 1.5e-6
    flush_s: float = 40e-6
    host_s: float = 0.0
    device_s: float = 0.0

    def kernel(self, seconds: float) -> None:
        self.host_s += self.launch_s
        self.device_s = max(self.device_s, self.host_s) + seconds

    def flush(self) -> None:
        self.kernel(self.flush_s)

    def seconds(self, launch: Callable[[], object]) -> Callable[[], float]:
        self.device_s = max(self.device_s, self.host_s) + self.event_s
        start = self.device_s
        launch()
        self.device_s = max(self.device_s, self.host_s) + self.event_s
        stop = self.device_s
        return lambda: stop - start

    def wait(self) -> None:
        self.host_s = max(self.host_s, self.device_s)

    def now(self) -> float:
        return self.host_s


@pytest.mark.parametrize("kernel_s", [3e-6, 8e-6, 50e-6, 2e-3])
@pytest.mark.parametrize("launches", [1, 12])
def test_kernels_shorter_than_their_launch_are_timed_right(kernel_s: float, launches: int) -> None:
    pytest.importorskip("torch")
    from clustersim.execute.timing import QueueTimer

    stream = FormulaStream()
    timer = QueueTimer(stream, lambda: stream.kernel(2e-6))

    def work() -> None:
        for _ in range(launches):
            stream.kernel(kernel_s)

    assert timer.floor_s == pytest.approx(2e-6, rel=0.1)
    assert timer.timed(work, 0.01).seconds == pytest.approx(launches * kernel_s, rel=0.05)
    # Many in a row, as a step runs them: whichever of host and device is slower.
    assert timer.steady(work, 0.01).seconds == pytest.approx(launches * max(kernel_s, stream.launch_s), rel=0.05)
    assert timer.launch_s(lambda: stream.kernel(2e-6)) == pytest.approx(stream.launch_s)


def test_a_host_that_is_slower_than_the_kernel_does_not_show_in_its_time() -> None:
    pytest.importorskip("torch")
    from clustersim.execute.timing import QueueTimer

    stream = FormulaStream()
    timer = QueueTimer(stream, lambda: stream.kernel(2e-6))

    def work() -> None:
        stream.host_s += 150e-6  # As a backward pass through autograd takes.
        stream.kernel(6e-6)

    assert timer.timed(work, 0.01).seconds == pytest.approx(6e-6, rel=0.05)
    assert timer.steady(work, 0.01).seconds == pytest.approx(155e-6, rel=0.05)


# --------------------------------------------------------------------------------------------------------- clocks


def test_clocks_are_what_the_tool_states_and_nothing_else() -> None:
    answers = {
        "clocks.sm": "1980\n",
        "power.limit": " 700.00\n",
        "temperature.gpu": "[N/A]\n",
        "clocks_throttle_reasons.active": "0x4\n",
    }
    found = gpu_clocks(answers.get)
    assert (found["sm_mhz"], found["power_limit_w"], found["slowed_by"]) == ("1980", "700.00", "0x4")
    assert found["temperature_c"] == found["driver"] == found["memory_mhz"] == UNKNOWN
    assert set(gpu_clocks(lambda field: None).values()) == {UNKNOWN}
    later = {**found, "sm_mhz": "1755"}
    assert clock_line(found, later) == "sm_mhz 1980 before, 1755 after; power_limit_w 700.00; slowed_by 0x4"
    assert clock_line({}, {}) == UNKNOWN
    assert cores() >= 1
