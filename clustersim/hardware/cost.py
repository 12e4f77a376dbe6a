"""What a kernel costs on a device: from measured tables, or the roofline elsewhere; and which it was."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, assert_never, cast

import numpy as np
import numpy.typing as npt

from clustersim.files import load, profile_path
from clustersim.hardware import roofline
from clustersim.hardware.attention_table import AttentionRows, AttentionTable
from clustersim.hardware.device import Device
from clustersim.hardware.gemm_table import GemmRows, GemmTable
from clustersim.hardware.kernel import BYTES_OF, Attention, Dtype, Gemm, Kernel, Kernels, Memory, MemoryOp
from clustersim.hardware.memory_table import MemoryCurve, MemoryRows

Table = TypeVar("Table", GemmTable, AttentionTable)
FloatArray = npt.NDArray[np.float64]
Numbers = FloatArray | npt.NDArray[np.int64] | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of one kernel, their source, and how far outside the table it is (log2, worst axis)."""

    seconds: float
    source: Literal["measured", "roofline"]
    outside: float


class DeviceCosts:
    """Prices kernels on one device; a price is worked out once and remembered.

    A price holds the kernel's own floor and not the host's launch overhead. Measured GEMM and attention times
    are divided by the device's `sustained_clock`; rooflines and memory operations are not.
    """

    __slots__ = ("_attention", "_gemm", "_known", "_memory", "device")

    def __init__(self, device: Device, folder: Path) -> None:
        """Reads the tables of `device` from `folder`; ProfileError where one is malformed."""
        tables = device.tables
        gemm = [GemmRows.read(folder / ref.file) for ref in tables.gemm]
        attention = [AttentionRows.read(folder / ref.file) for ref in tables.attention]
        memory = [MemoryRows.read(folder / ref.file) for ref in tables.memory]
        self.device = device
        self._gemm = {d: GemmTable(device, d, gemm) for d in _dtypes(device, (rows.dtype for rows in gemm))}
        self._attention = {
            d: AttentionTable(device, d, attention) for d in _dtypes(device, (rows.dtype for rows in attention))
        }
        ops = sorted({str(op) for rows in memory for op in np.unique(rows.op)})
        # Tensor cores run both 16-bit types alike, and most tables were measured in one of them.
        if device.peak.get("fp16") == device.peak.get("bf16"):
            _share(self._gemm)
            _share(self._attention)
        self._memory = {op: MemoryCurve(op, memory) for op in cast(list[MemoryOp], ops)}
        self._known: dict[Kernel, Cost] = {}

    def cost(self, kernel: Kernel) -> Cost:
        """The price of one launch of `kernel`; ProfileError where the device lacks its dtype."""
        found = self._known.get(kernel)
        if found is None:
            found = self._known[kernel] = self._price(kernel)
        return found

    def seconds(self, kernels: Kernels) -> float:
        """Seconds of all `kernels`, each as often as it is launched, one after the other."""
        cost = self.cost
        return sum(count * cost(kernel).seconds for kernel, count in kernels)

    def coverage(self, kernels: Kernels) -> float:
        """The fraction of the time of `kernels` priced by measured tables; 1 where there is none."""
        total = measured = 0.0
        for kernel, count in kernels:
            price = self.cost(kernel)
            total += count * price.seconds
            measured += count * price.seconds if price.source == "measured" else 0.0
        return measured / total if total > 0.0 else 1.0

    def gemm_seconds(self, m: Numbers, n: Numbers, k: Numbers, dtype: Dtype, batch: Numbers = 1.0) -> FloatArray:
        """Seconds of many GEMMs of one dtype; m, n, k and batch broadcast together."""
        roofline.peak_flops(self.device, dtype)
        m, n, k, batch = (
            np.asarray(side, dtype=np.float64)
            for side in np.broadcast_arrays(np.asarray(m), np.asarray(n), np.asarray(k), np.asarray(batch))
        )
        table = self._gemm.get(dtype)
        if table is not None:
            return table.many(m, n, k, batch)
        traffic = BYTES_OF[dtype] * batch * (m * k + k * n + m * n)
        seconds = roofline.gemm_scale(self.device, dtype).many(2.0 * batch * m * n * k, traffic)
        slow = roofline.misaligned_many(dtype, n, k)
        return np.where(slow, seconds * roofline.MISALIGNED_SLOWDOWN, seconds)

    def _price(self, kernel: Kernel) -> Cost:
        match kernel:
            case Gemm():
                roofline.peak_flops(self.device, kernel.dtype)
                gemm = self._gemm.get(kernel.dtype)
                if gemm is not None:
                    return _measured(gemm.seconds(kernel))
                return _roofline(roofline.gemm_seconds(self.device, kernel))
            case Attention():
                roofline.peak_flops(self.device, kernel.dtype)
                attention = self._attention.get(kernel.dtype)
                if attention is not None:
                    return _measured(attention.seconds(kernel))
                return _roofline(roofline.attention_seconds(self.device, kernel))
            case Memory():
                curve = self._memory.get(kernel.op)
                if curve is not None:
                    return _measured(curve.seconds(kernel))
                return _roofline(roofline.memory_seconds(self.device, kernel))
            case _:
                assert_never(kernel)


def _share(tables: dict[Dtype, Table]) -> None:
    """Let fp16 and bf16 use each other's table where only one was measured."""
    found = tables.get("bf16") or tables.get("fp16")
    if found is not None:
        tables.setdefault("bf16", found)
        tables.setdefault("fp16", found)


def _measured(found: tuple[float, float]) -> Cost:
    seconds, outside = found
    return Cost(seconds=seconds, source="measured", outside=outside)


def _roofline(seconds: float) -> Cost:
    return Cost(seconds=seconds, source="roofline", outside=0.0)


def _dtypes(device: Device, columns: Iterable[npt.NDArray[np.str_]]) -> list[Dtype]:
    """The dtypes that tables hold and the device has, in a fixed order."""
    held = {str(dtype) for column in columns for dtype in np.unique(column)}
    return [dtype for dtype in device.peak if dtype in held]


def load_device(name: str) -> Device:
    """The device profile `name`; ProfileError where there is none. Read once a process for each file."""
    return _load(profile_path("devices", name).resolve())


def device_costs(name: str) -> DeviceCosts:
    """The prices of kernels on device `name`; ProfileError where it is unknown. Tables are read once."""
    return _costs(profile_path("devices", name).resolve())


@functools.cache
def _load(path: Path) -> Device:
    device: Device = load(Device, path)
    return device


@functools.cache
def _costs(path: Path) -> DeviceCosts:
    return DeviceCosts(_load(path), path.parent)
