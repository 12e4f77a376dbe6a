"""What a probe measures on a GPU: products, attention, memory-bound operations, copies, launches, small models."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from clustersim import files
from clustersim.execute import kernels
from clustersim.execute.gpt import TORCH_DTYPE
from clustersim.execute.probe_clocks import Query, gpu_clocks, nvidia_smi
from clustersim.execute.probe_grid import Points, cuda_points
from clustersim.execute.probe_samples import (
    AttentionPoint,
    CopyPoint,
    CopySample,
    DeviceProbe,
    GemmPoint,
    LayerPoint,
    MemoryPoint,
    Point,
    Sample,
    SustainedPoint,
    SustainedSample,
    Timed,
)
from clustersim.execute.probe_session import RefusedPoint, measure_points
from clustersim.execute.timing import CudaStream, QueueTimer, Stream, summary
from clustersim.hardware.kernel import Dtype

# Seconds of samples of a kernel, and of a small model, which shall be as warm as in a long run.
_BUDGET_S, _MODEL_S = 0.01, 0.5
# Seconds of the sustained run in a short and in a long probe, and what is short.
_SUSTAINED_S, _SHORT_S = (3.0, 8.0), 150.0
# Before the burst: long enough for the device to cool and to have its power budget back.
_PAUSE_S = 1.0


class QueuedDevice:
    """A device that works beside the host, its timer, and the smallest kernel. Only `stream` knows that it is a GPU."""

    def __init__(self, device: torch.device, stream: Stream) -> None:
        self.device = device
        self._stream = stream
        self._small = torch.zeros(8, device=device)
        self.timer = QueueTimer(stream, self.nothing)

    def nothing(self) -> None:
        """Launch the smallest kernel."""
        self._small.add_(1.0)

    def measure(self, point: Point) -> tuple[Sample, ...]:
        """Time what `point` asks; RefusedPoint where this device or this PyTorch has no kernel, or no memory, for
        it."""
        try:
            with _tensor_cores_in_fp32(isinstance(point, GemmPoint) and point.dtype == "tf32"):
                return self._measure(point)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise RefusedPoint("out of device memory") from None
        except (RuntimeError, ValueError) as error:
            # PyTorch refuses shapes and types with either. Waiting raises where the context is lost: that ends all.
            self._stream.wait()
            raise RefusedPoint(" ".join(str(error).split())[:200]) from None

    def _measure(self, point: Point) -> tuple[Sample, ...]:
        timed = self.timer.timed
        match point:
            case GemmPoint():
                return (kernels.gemm(point, self.device, timed, _BUDGET_S, 0),)
            case AttentionPoint():
                return (kernels.attention(point, self.device, timed, _BUDGET_S),)
            case MemoryPoint():
                return kernels.memory(point, self.device, timed, _BUDGET_S)
            case CopyPoint():
                return (self._copy(point),)
            case LayerPoint():
                return (kernels.layer(point, self.device, self.timer.steady, _MODEL_S),)
            case SustainedPoint():
                return (self._sustained(point),)

    def _copy(self, point: CopyPoint) -> CopySample:
        here = torch.empty(point.bytes, dtype=torch.int8, device=self.device)
        if point.direction == "device-to-device":
            other = torch.empty_like(here)
        else:
            # Pinned, or the driver copies everything once more; a CPU's own memory needs none of that.
            other = torch.empty(point.bytes, dtype=torch.int8, pin_memory=self.device.type != "cpu")
        source, target = (here, other) if point.direction == "device-to-host" else (other, here)
        time = self.timer.timed(lambda: target.copy_(source, non_blocking=True), _BUDGET_S)
        return CopySample(direction=point.direction, bytes=point.bytes, time=time)

    def _sustained(self, point: SustainedPoint) -> SustainedSample:
        """The product's rate as a row of the tables, after a pause, and its median rate in the second half of a run
        without one."""
        kind = TORCH_DTYPE[point.dtype]
        a, b = (torch.randn(point.side, point.side, device=self.device).to(kind) for _ in range(2))

        def run() -> object:
            return torch.mm(a, b)

        run()
        self._stream.wait()
        time.sleep(_PAUSE_S)
        burst = self.timer.timed(run, 0.02, 10)
        each: list[Timed] = []
        begin = time.perf_counter()
        moments: list[float] = []
        while time.perf_counter() - begin < point.seconds:
            each.append(self.timer.steady(run, 0.05))
            moments.append(time.perf_counter() - begin)
        late = [one.seconds for one, at in zip(each, moments, strict=True) if at > point.seconds / 2]
        found = summary(late)
        flops = 2.0 * point.side**3
        return SustainedSample(
            dtype=point.dtype, side=point.side, seconds=point.seconds, burst_flops=flops / burst.seconds,
            sustained_flops=flops / found.seconds,
            spread=max(burst.spread, statistics.median(one.spread for one in each)),
        )  # fmt: skip


@contextmanager
def _tensor_cores_in_fp32(wanted: bool) -> Iterator[None]:
    """Products of fp32 operands in tf32, or in fp32 proper."""
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def measure_cuda(
    *, rank: int, ranks: int, folder: Path, tell: Callable[[str], None], until_s: float, record: str, out: str
) -> None:
    """Device 0 until time.monotonic() reaches `until_s`: written to `out` as a DeviceProbe, or null where this host
    has none."""
    if not torch.cuda.is_available():
        files.save(None, out, DeviceProbe | None)
        return
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    properties = torch.cuda.get_device_properties(device)
    uuid = getattr(properties, "uuid", None)
    query = nvidia_smi("0" if uuid is None else f"GPU-{uuid}")
    seconds = _SUSTAINED_S[until_s - time.monotonic() > _SHORT_S]
    points = cuda_points(_dtypes(device), properties.total_memory, seconds)
    probe = probe_queued(
        QueuedDevice(device, CudaStream(device)), points, query, name=properties.name,
        memory_bytes=properties.total_memory, software=_software(device), until_s=until_s, record=Path(record),
        tell=tell,
    )  # fmt: skip
    files.save(probe, out)


def probe_queued(
    gpu: QueuedDevice,
    points: Points,
    query: Query,
    *,
    name: str,
    memory_bytes: int,
    software: dict[str, str],
    until_s: float,
    record: Path,
    tell: Callable[[str], None],
) -> DeviceProbe:
    """Measure `points` on a device that works beside the host; `query` answers for its clocks, limits and driver."""
    before = gpu_clocks(query)
    found = measure_points(
        gpu, points.order, needed=points.needed, until_s=until_s, record=record, now=time.monotonic, tell=tell
    )
    after = gpu_clocks(query)
    return DeviceProbe(
        kind="gpu",
        name=name,
        memory_bytes=memory_bytes,
        threads=0,
        floor_s=gpu.timer.floor_s,
        launch_s=gpu.timer.launch_s(gpu.nothing),
        power_w=_number(after["power_limit_w"]),
        software={**software, "driver": after["driver"]},
        before=before,
        after=after,
        missed=found.missed_by_kind,
        refused=found.refusals,
        gemm=found.gemm,
        attention=found.attention,
        memory=found.memory,
        copies=found.copies,
        layers=found.layers,
        sustained=found.sustained,
    )


def _dtypes(device: torch.device) -> list[Dtype]:
    """What the device multiplies at more than emulation's speed, the 16-bit type of training first."""
    capability = torch.cuda.get_device_capability(device)
    found: list[Dtype] = ["bf16", "fp16", "fp32"] if capability >= (8, 0) else ["fp16", "fp32"]
    if capability >= (8, 0):
        found.append("tf32")
    if capability >= (8, 9):
        found.append("fp8")
    return found


def _software(device: torch.device) -> dict[str, str]:
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(version),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
    }


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
