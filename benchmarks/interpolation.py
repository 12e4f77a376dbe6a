"""How far interpolated kernel times are from measured ones that the tables do not hold.

    python benchmarks/interpolation.py [device ...]

Prints for each device, table and dtype (or operation) the median and the 90th percentile of the relative
error over the held-out rows, by size, beside the spread of repeats: the same point measured more than once,
half the range of its times over their mean.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clustersim.files import profile_names, profile_path
from clustersim.hardware.attention_table import AttentionRows, kernel_seconds
from clustersim.hardware.cost import DeviceCosts, device_costs
from clustersim.hardware.gemm_table import GemmRows
from clustersim.hardware.kernel import Attention, Dtype, Memory, MemoryOp
from clustersim.hardware.memory_table import MemoryRows

FloatArray = npt.NDArray[np.float64]
BANDS = (("tiny", 0.0, 1e8), ("small", 1e8, 1e10), ("medium", 1e10, 1e12), ("large", 1e12, np.inf))


def gemm_errors(costs: DeviceCosts, rows: GemmRows, dtype: Dtype) -> tuple[FloatArray, FloatArray]:
    """Relative errors, and the FLOPs of each row, at the clock of the measurement."""
    at = rows.dtype == dtype
    m, n, k = rows.m[at], rows.n[at], rows.k[at]
    predicted = costs.gemm_seconds(m, n, k, dtype) * costs.device.sustained_clock
    return np.abs(predicted / rows.seconds[at] - 1.0), 2.0 * m * n * k


def attention_errors(costs: DeviceCosts, rows: AttentionRows, dtype: Dtype) -> tuple[FloatArray, FloatArray]:
    """Relative errors, and the FLOPs of each row, at the clock of the measurement."""
    errors, flops = [], []
    shape = (rows.instances, rows.sequence, rows.group, rows.head_dim)
    kernels_s = kernel_seconds(costs.device, dtype, *shape, rows.seconds)
    for at in np.flatnonzero(rows.dtype == dtype):
        group = int(rows.group[at])
        kernel = Attention(
            batch=int(rows.instances[at]) // group,
            queries=int(rows.sequence[at]),
            keys=int(rows.sequence[at]),
            heads=group,
            kv_heads=1,
            head_dim=int(rows.head_dim[at]),
            causal=True,
            backward=False,
            dtype=dtype,
        )
        predicted = costs.cost(kernel).seconds * costs.device.sustained_clock
        errors.append(abs(predicted / kernels_s[at] - 1.0))
        flops.append(float(kernel.flops))
    return np.array(errors), np.array(flops)


def memory_errors(costs: DeviceCosts, rows: MemoryRows, op: MemoryOp) -> tuple[FloatArray, FloatArray]:
    """Relative errors, and the bytes of each row."""
    at = rows.op == op
    predicted = [
        costs.cost(Memory(op=op, read_bytes=int(size), written_bytes=0)).seconds for size in rows.traffic_bytes[at]
    ]
    return np.abs(np.array(predicted) / rows.seconds[at] - 1.0), rows.traffic_bytes[at]


def repeat_spread(keys: FloatArray, seconds: FloatArray) -> FloatArray:
    """Half the range over the mean, for every point that occurs more than once."""
    _, place = np.unique(keys, axis=0, return_inverse=True)
    spreads = []
    for point in range(int(place.max()) + 1 if len(place) else 0):
        times = seconds[place == point]
        if len(times) > 1:
            spreads.append(float(np.ptp(times) / 2.0 / times.mean()))
    return np.array(spreads)


def _line(name: str, errors: FloatArray, noise: FloatArray | None = None) -> None:
    tail = ""
    if noise is not None and len(noise):
        median, p90 = 100 * np.median(noise), 100 * np.quantile(noise, 0.9)
        tail = f"   repeats {median:4.1f} % {p90:5.1f} % ({len(noise)})"
    median, p90 = 100 * np.median(errors), 100 * np.quantile(errors, 0.9)
    print(f"  {name:30}{len(errors):5}  {median:5.1f} %  {p90:5.1f} %{tail}")


def report(name: str) -> None:
    """Print the errors of one device."""
    folder: Path = profile_path("devices", name).parent
    costs = device_costs(name)
    if not any((folder / f"{kind}_heldout.csv").is_file() for kind in ("gemm", "attention", "memory")):
        return
    print(f"{name}\n  {'table':30}{'n':>5}  {'median':>7}  {'p90':>7}")
    if (folder / "gemm_heldout.csv").is_file():
        gemm = GemmRows.read(folder / "gemm_heldout.csv")
        for dtype in costs.device.peak:
            keys = np.stack([gemm.m, gemm.n, gemm.k], axis=1)[gemm.dtype == dtype]
            errors, flops = gemm_errors(costs, gemm, dtype)
            _banded(f"gemm {dtype}", errors, flops, repeat_spread(keys, gemm.seconds[gemm.dtype == dtype]))
    if (folder / "attention_heldout.csv").is_file():
        rows = AttentionRows.read(folder / "attention_heldout.csv")
        for dtype in costs.device.peak:
            at = rows.dtype == dtype
            keys = np.stack([rows.instances, rows.sequence, rows.group, rows.head_dim], axis=1)[at]
            errors, flops = attention_errors(costs, rows, dtype)
            _banded(f"attention {dtype}", errors, flops, repeat_spread(keys, rows.seconds[at]))
    if (folder / "memory_heldout.csv").is_file():
        memory = MemoryRows.read(folder / "memory_heldout.csv")
        for op in np.unique(memory.op):
            at = memory.op == op
            errors, _ = memory_errors(costs, memory, op)
            _line(f"memory {op}", errors, repeat_spread(memory.traffic_bytes[at][:, None], memory.seconds[at]))


def _banded(name: str, errors: FloatArray, flops: FloatArray, noise: FloatArray) -> None:
    if not len(errors):
        return
    _line(name, errors, noise)
    for band, low, high in BANDS:
        inside = (flops >= low) & (flops < high)
        if inside.any():
            _line(f"  {band} ({low:.0e} to {high:.0e} FLOP)", errors[inside])


def main() -> None:
    """The devices named on the command line, or all of them."""
    for name in sys.argv[1:] or sorted(profile_names("devices")):
        report(name)


if __name__ == "__main__":
    main()
