"""Measured GEMM times: the rows of a table, and the price of any GEMM between them.

Interpolated is the logarithm of measured time over the roofline's time, trilinear in log2(m), log2(n),
log2(k). Models of tiles and waves of thread blocks in place of the plain roofline were tried on the full
tables and left the error where it was: the libraries choose tile and split-k by shape and so smooth the steps
out. The steps that remain (m = 257 against 256) are in the rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from clustersim.files import read_csv
from clustersim.hardware.device import Device
from clustersim.hardware.grid import LogGrid
from clustersim.hardware.kernel import BYTES_OF, Dtype, Gemm
from clustersim.hardware.roofline import MISALIGNED_SLOWDOWN, Scale, gemm_scale, misaligned, misaligned_many
from clustersim.hardware.table_file import column, table_text, words

FloatArray = npt.NDArray[np.float64]

# Holes are filled along k first: times are smoothest in it.
_FILL_ORDER = (2, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmRows:
    """Measured products (m, k) by (k, n) of one dtype each; arrays of one length."""

    dtype: npt.NDArray[np.str_]
    m: FloatArray
    n: FloatArray
    k: FloatArray
    seconds: FloatArray

    @classmethod
    def read(cls, path: Path) -> GemmRows:
        """The rows of a CSV with the columns dtype, m, n, k, time_us."""
        columns = read_csv(path)
        dtype = words(columns, "dtype", get_args(Dtype), path)
        m, n, k, time_us = (column(columns, name, path) for name in ("m", "n", "k", "time_us"))
        return cls(dtype=dtype, m=m, n=n, k=k, seconds=time_us * 1e-6)

    def text(self) -> str:
        """The rows as a CSV, sorted, microseconds with four significant digits."""
        rows = zip(self.dtype, self.m, self.n, self.k, self.seconds * 1e6, strict=True)
        return table_text(
            "dtype,m,n,k,time_us",
            sorted(((str(d), int(m), int(n), int(k)), t) for d, m, n, k, t in rows),
        )


class GemmTable:
    """Prices GEMMs of one dtype from measured rows."""

    __slots__ = ("_clock", "_grid", "_largest_m", "_scale", "_width", "dtype")

    def __init__(self, device: Device, dtype: Dtype, rows: Iterable[GemmRows]) -> None:
        kept = [(r.m[s], r.n[s], r.k[s], r.seconds[s]) for r in rows for s in [r.dtype == dtype]]
        m, n, k, seconds = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        self.dtype = dtype
        self._scale: Scale = gemm_scale(device, dtype)
        self._width = BYTES_OF[dtype]
        self._clock = device.sustained_clock
        ratio = np.log(seconds / self._roofline(m, n, k, np.ones(len(m))))
        self._grid = LogGrid.scattered(np.stack([m, n, k], axis=1), ratio, _FILL_ORDER)
        self._largest_m = self._grid.edge(0)

    def _roofline(self, m: FloatArray, n: FloatArray, k: FloatArray, batch: FloatArray) -> FloatArray:
        return self._scale.many(2.0 * batch * m * n * k, self._width * batch * (m * k + k * n + m * n))

    def seconds(self, kernel: Gemm) -> tuple[float, float]:
        """Seconds of `kernel`, and how far outside the table it is in log2 units.

        A batch is priced by the table's efficiency at (batch * m, n, k), not beyond the table's largest m, on
        the roofline of the batch's own operations and bytes: independent products fill the device with the
        same tiles as one tall product does, but each brings its own right-hand operand through memory.
        """
        m = float(kernel.m)
        if kernel.batch > 1:
            m = max(m, min(m * kernel.batch, self._largest_m))
        ratio, outside = self._grid.at(m, kernel.n, kernel.k)
        seconds = exp(ratio) * self._scale.seconds(kernel.flops, kernel.traffic_bytes) / self._clock
        if misaligned(self.dtype, kernel.n, kernel.k):
            seconds *= MISALIGNED_SLOWDOWN
        return seconds, outside

    def many(self, m: FloatArray, n: FloatArray, k: FloatArray, batch: FloatArray) -> FloatArray:
        """`seconds` for arrays of one shape."""
        folded = np.where(batch > 1.0, np.maximum(m, np.minimum(m * batch, self._largest_m)), m)
        seconds = np.exp(self._grid.many(folded, n, k)) * self._roofline(m, n, k, batch) / self._clock
        return np.where(misaligned_many(self.dtype, n, k), seconds * MISALIGNED_SLOWDOWN, seconds)
