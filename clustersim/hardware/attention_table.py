"""Measured times of fused attention: causal, forward, and what follows from them for the other cases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from clustersim.files import read_csv
from clustersim.hardware.attention_speed import times_slower
from clustersim.hardware.device import Device
from clustersim.hardware.grid import LogGrid
from clustersim.hardware.kernel import BYTES_OF, Attention, Dtype
from clustersim.hardware.roofline import attention_scale, gemm_scale
from clustersim.hardware.table_file import column, table_text, words

FloatArray = npt.NDArray[np.float64]

# Holes are filled along the axes that matter least first: groups, then instances, sequence, head dimensions.
_FILL_ORDER = (2, 0, 1, 3)

# Five matrix products against two (Dao, FlashAttention-2, 2023).
_BACKWARD_FLOPS = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRows:
    """Measured causal forward kernels; arrays of one length.

    A fused kernel gives each (sequence of the batch, head) pair its own thread blocks, so batch and heads
    count only by their product `instances`; `group` is heads over kv_heads.
    """

    dtype: npt.NDArray[np.str_]
    instances: FloatArray
    sequence: FloatArray
    group: FloatArray
    head_dim: FloatArray
    seconds: FloatArray

    @classmethod
    def read(cls, path: Path) -> AttentionRows:
        """The rows of a CSV with the columns dtype, instances, sequence, group, head_dim, time_us."""
        columns = read_csv(path)
        dtype = words(columns, "dtype", get_args(Dtype), path)
        names = ("instances", "sequence", "group", "head_dim", "time_us")
        instances, sequence, group, head_dim, time_us = (column(columns, name, path) for name in names)
        return cls(
            dtype=dtype,
            instances=instances,
            sequence=sequence,
            group=group,
            head_dim=head_dim,
            seconds=time_us * 1e-6,
        )

    def text(self) -> str:
        """The rows as a CSV, sorted, microseconds with four significant digits."""
        keys = zip(self.dtype, self.instances, self.sequence, self.group, self.head_dim, strict=True)
        rows = zip(keys, self.seconds * 1e6, strict=True)
        return table_text(
            "dtype,instances,sequence,group,head_dim,time_us",
            sorted(((str(d), int(i), int(s), int(g), int(h)), t) for (d, i, s, g, h), t in rows),
        )


def kernel_seconds(
    device: Device, dtype: Dtype, instances: FloatArray, sequence: FloatArray, group: FloatArray,
    head_dim: FloatArray, seconds: FloatArray,
) -> FloatArray:  # fmt: skip
    """Seconds of the kernels alone: measured times less those of the pass before, which moves Q, K and V in and out
    once at the sustained bandwidth; no kernel becomes faster than the device's peak."""
    if not device.tables.attention_prepared:
        return seconds
    around = gemm_scale(device, dtype)
    pass_s = BYTES_OF[dtype] * instances * sequence * head_dim * (2.0 + 4.0 / group) / around.bytes_per_s
    least = around.floor_s + 2.0 * instances * sequence * sequence * head_dim / device.peak[dtype]
    return np.asarray(np.minimum(seconds, np.maximum(seconds - pass_s, least)))


class AttentionTable:
    """Prices fused attention of one dtype from measured causal forward rows.

    Interpolated is the logarithm of measured time over the roofline's time, in log2 of instances, sequence,
    group and head dimension. The other cases follow by their work on the same ratio:

    - not causal: the roofline with all of the score matrix, twice the operations of the causal one;
    - queries and keys of different lengths, or not causal: looked up where a causal kernel has as many operations, at
      the geometric mean of the two lengths, or sqrt(2) times that: what is lost at a kernel's begin and end, and with
      blocks of the score matrix that do not fill the device, goes with the work;
    - backward: 2.5 times the forward's operations, at `attention_backward_efficiency / attention_efficiency`
      of the forward's rate; the kernel's floor is paid once;
    - another generation than the measured one: the ratio of their published speeds.

    Long runs keep `sustained_clock` of the speed, where the power limit sets the clock. Power goes with the work done
    in a second and the square of the voltage, and voltage follows the clock: a kernel that is r times slower is allowed
    the cube root of r more, at most all of the clock.

    Where a pass over Q, K and V was measured with the kernel, it is taken off (`kernel_seconds`).
    """

    __slots__ = ("_clock", "_grid", "_measured", "_scale", "_slower", "_width", "dtype")

    def __init__(self, device: Device, dtype: Dtype, rows: Iterable[AttentionRows]) -> None:
        kept = [
            (r.instances[s], r.sequence[s], r.group[s], r.head_dim[s], r.seconds[s])
            for r in rows
            for s in [r.dtype == dtype]
        ]
        instances, sequence, group, head_dim, seconds = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        self.dtype = dtype
        self._scale = attention_scale(device, dtype, backward=False)
        self._width = BYTES_OF[dtype]
        self._clock = device.sustained_clock
        self._measured = device.tables.attention_kernel
        roofline = device.roofline
        relative = roofline.attention_backward_efficiency / roofline.attention_efficiency
        self._slower = _BACKWARD_FLOPS / relative
        flops = 2.0 * instances * sequence * sequence * head_dim
        traffic = self._width * instances * sequence * head_dim * (2.0 + 2.0 / group)
        seconds = kernel_seconds(device, dtype, instances, sequence, group, head_dim, seconds)
        ratio = np.log(seconds / self._scale.many(flops, traffic))
        points = np.stack([instances, sequence, group, head_dim], axis=1)
        self._grid = LogGrid.scattered(points, ratio, _FILL_ORDER)

    def seconds(self, kernel: Attention) -> tuple[float, float]:
        """Seconds of `kernel`, and how far outside the table it is in log2 units."""
        ratio, outside = self._grid.at(
            kernel.batch * kernel.heads,
            sqrt((1.0 if kernel.causal else 2.0) * kernel.queries * kernel.keys),
            kernel.heads / kernel.kv_heads,
            kernel.head_dim,
        )
        pairs = kernel.batch * kernel.heads * kernel.queries * kernel.keys
        flops = (2.0 if kernel.causal else 4.0) * pairs * kernel.head_dim
        touched = 2 * kernel.heads * kernel.queries + 2 * kernel.kv_heads * kernel.keys
        traffic = self._width * kernel.batch * kernel.head_dim * touched
        forward = exp(ratio) * self._scale.seconds(flops, traffic)
        floor = min(self._scale.floor_s, forward)
        slower = self._slower if kernel.backward else 1.0
        clock = self._clock
        if kernel.generation is not None:
            older = times_slower(kernel.generation, self._measured, kernel.head_dim, kernel.backward)
            clock = min(1.0, clock * older ** (1.0 / 3.0))
            slower *= older
        return (floor + (forward - floor) * slower) / clock, outside
