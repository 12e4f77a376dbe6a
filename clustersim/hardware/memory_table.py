"""Measured times of memory-bound operations: one curve of time over bytes for each operation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from clustersim.files import read_csv
from clustersim.hardware.kernel import Memory, MemoryOp
from clustersim.hardware.table_file import column, table_text, words

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRows:
    """Measured operations by the bytes that they read and write; arrays of one length."""

    op: npt.NDArray[np.str_]
    traffic_bytes: FloatArray
    seconds: FloatArray

    @classmethod
    def read(cls, path: Path) -> MemoryRows:
        """The rows of a CSV with the columns op, bytes, time_us."""
        columns = read_csv(path)
        op = words(columns, "op", get_args(MemoryOp), path)
        traffic_bytes, time_us = column(columns, "bytes", path), column(columns, "time_us", path)
        return cls(op=op, traffic_bytes=traffic_bytes, seconds=time_us * 1e-6)

    def text(self) -> str:
        """The rows as a CSV, sorted, microseconds with four significant digits."""
        rows = zip(self.op, self.traffic_bytes, self.seconds * 1e6, strict=True)
        return table_text("op,bytes,time_us", sorted(((str(o), int(b)), t) for o, b, t in rows))


class MemoryCurve:
    """Time of one operation over its bytes: effective bandwidth interpolated in log-log.

    Above the largest measurement its bandwidth holds. Below the smallest, too, down to the kernel's own floor: the
    shortest time that any operation of the table was measured at. Repeats at one size are averaged.
    """

    __slots__ = ("_bytes", "_floor", "_log_s")

    def __init__(self, op: MemoryOp, rows: Sequence[MemoryRows]) -> None:
        self._floor = min(log(float(r.seconds.min())) for r in rows if len(r.seconds))
        kept = [(r.traffic_bytes[s], r.seconds[s]) for r in rows for s in [r.op == op]]
        sizes, seconds = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        at, place = np.unique(sizes, return_inverse=True)
        logs = np.bincount(place, weights=np.log(seconds)) / np.bincount(place)
        self._bytes: list[float] = [log(size) for size in at.tolist()]
        self._log_s: list[float] = logs.tolist()

    def seconds(self, kernel: Memory) -> tuple[float, float]:
        """Seconds of `kernel`, and how far outside the measured sizes it is in log2 units."""
        sizes, logs = self._bytes, self._log_s
        size = log(max(kernel.traffic_bytes, 1))
        if size <= sizes[0]:
            return exp(max(self._floor, logs[0] + size - sizes[0])), (sizes[0] - size) / log(2.0)
        if size >= sizes[-1]:
            return exp(logs[-1] + size - sizes[-1]), (size - sizes[-1]) / log(2.0)
        left = bisect_right(sizes, size) - 1
        weight = (size - sizes[left]) / (sizes[left + 1] - sizes[left])
        return exp(logs[left] * (1.0 - weight) + logs[left + 1] * weight), 0.0
