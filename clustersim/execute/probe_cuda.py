"""What a probe measures on a GPU: products, attention, memory-bound operations, copies, launches."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

from clustersim import files
from clustersim.execute import kernels
from clustersim.execute.probe import CopySample, DeviceProbe, GemmSample
from clustersim.execute.timing import CudaTimer
from clustersim.hardware.kernel import Dtype


def measure_cuda(*, rank: int, ranks: int, folder: Path, tell: Callable[[str], None], quick: bool, out: str) -> None:
    """Device 0: written to `out` as a DeviceProbe, or null where this host has none."""
    if not torch.cuda.is_available():
        files.save(None, out, DeviceProbe | None)
        return
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    timer = CudaTimer(device)
    budget = 0.005 if quick else 0.02
    properties = torch.cuda.get_device_properties(device)
    gemm: list[GemmSample] = []
    kinds: list[Dtype] = ["bf16", "fp16", "fp32"] if torch.cuda.is_bf16_supported() else ["fp16", "fp32"]
    for dtype in kinds:
        tell(f"{dtype} products")
        gemm += kernels.gemm(_gemm_grid(quick, dtype), dtype, device, timer.timed, budget, 0)
    torch.set_float32_matmul_precision("high")
    if properties.major >= 8:
        gemm += kernels.gemm(_gemm_grid(quick, "tf32"), "tf32", device, timer.timed, budget, 0)
    if (properties.major, properties.minor) >= (8, 9):
        gemm += _fp8(quick, device, timer, budget)
    torch.set_float32_matmul_precision("highest")
    half = kinds[0]
    tell(f"{half} attention, memory and models")
    sequences, heads = ((512, 2048), (64,)) if quick else ((128, 512, 1024, 2048, 4096, 8192), (64, 128))
    shapes = product((16, 64) if quick else (8, 16, 32, 64, 128), sequences, (1,) if quick else (1, 4, 8), heads)
    sizes = (2**16, 2**20, 2**24) if quick else tuple(2**p for p in range(14, 29, 2))
    models = [(64, 2, 64, 64), (64, 6, 64, 64), (1024, 2, 4096, 1024)]
    models += [] if quick else [(2048, 2, 4096, 2048), (4096, 1, 4096, 2048)]
    probe = DeviceProbe(
        kind="gpu",
        name=properties.name,
        memory_bytes=properties.total_memory,
        threads=0,
        floor_s=timer.timed(lambda: torch.empty(8, device=device).zero_(), 0.02).seconds,
        launch_s=_launch_s(device),
        power_w=float(_smi("power.limit") or 0.0),
        software=_software(device),
        gemm=tuple(gemm),
        attention=tuple(kernels.attention(iter(shapes), half, device, timer.timed, budget)),
        memory=tuple(kernels.memory(sizes, half, device, timer.timed, budget)),
        copies=tuple(_copies(quick, device, timer, budget)),
        layers=tuple(kernels.layer(*shape, half, device, timer.timed, 4 * budget) for shape in models),
    )
    files.save(probe, out)


def _gemm_grid(quick: bool, dtype: Dtype) -> product[tuple[int, int, int]]:
    if quick:
        return product((128, 1024, 4096), (1024, 4096), (1024, 4096))
    rows = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    sides = (128, 256, 512, 1024, 2048, 4096, 8192, 16384) if dtype in ("bf16", "fp16") else (512, 2048, 8192)
    return product(rows, sides, sides)


def _fp8(quick: bool, device: torch.device, timer: CudaTimer, budget_s: float) -> list[GemmSample]:
    """Products of fp8 (e4m3) operands with one scale each, bf16 out."""
    result = []
    one = torch.ones((), device=device)
    for m, n, k in product((128, 1024, 4096), (1024, 4096), (1024, 4096) if quick else (1024, 4096, 16384)):
        a = torch.randn(m, k, device=device).to(torch.float8_e4m3fn)
        # The right-hand operand is column-major.
        b = torch.randn(n, k, device=device).to(torch.float8_e4m3fn).t()

        def run(a: torch.Tensor = a, b: torch.Tensor = b) -> object:
            return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        result.append(GemmSample(dtype="fp8", m=m, n=n, k=k, threads=0, time=timer.timed(run, budget_s)))
    return result


def _copies(quick: bool, device: torch.device, timer: CudaTimer, budget_s: float) -> list[CopySample]:
    result = []
    for size in (2**16, 2**24) if quick else (2**12, 2**16, 2**20, 2**24, 2**28):
        host = torch.empty(size, dtype=torch.int8, pin_memory=True)
        here = torch.empty(size, dtype=torch.int8, device=device)
        there = torch.empty_like(here)
        result += [
            CopySample(
                direction="host-to-device", bytes=size,
                time=timer.timed(lambda a=here, b=host: a.copy_(b, non_blocking=True), budget_s),  # type: ignore[misc]
            ),
            CopySample(
                direction="device-to-host", bytes=size,
                time=timer.timed(lambda a=host, b=here: a.copy_(b, non_blocking=True), budget_s),  # type: ignore[misc]
            ),
            CopySample(
                direction="device-to-device", bytes=size,
                time=timer.timed(lambda a=there, b=here: a.copy_(b), budget_s),  # type: ignore[misc]
            ),
        ]  # fmt: skip
    return result


def _launch_s(device: torch.device) -> float:
    """Host seconds per launch: many small kernels in a row, none waited for."""
    x = torch.zeros(8, device=device)
    for _ in range(100):
        x.add_(1.0)
    torch.cuda.synchronize()
    count = 500  # Fewer than the driver queues before it makes the host wait.
    begin = time.perf_counter()
    for _ in range(count):
        x.add_(1.0)
    took = time.perf_counter() - begin
    torch.cuda.synchronize()
    return took / count


def _software(device: torch.device) -> dict[str, str]:
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(version),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "driver": _smi("driver_version"),
        "sm_clock_mhz": _smi("clocks.sm"),
        "memory_clock_mhz": _smi("clocks.mem"),
        "largest_sm_clock_mhz": _smi("clocks.max.sm"),
    }


def _smi(field: str) -> str:
    """A field of nvidia-smi for device 0, or nothing where there is no such program."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
