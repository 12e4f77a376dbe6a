"""What a device would take where nothing was measured; also the scale that tables are interpolated on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clustersim.errors import ProfileError
from clustersim.hardware.attention_speed import times_slower
from clustersim.hardware.device import Device
from clustersim.hardware.kernel import BYTES_OF, Attention, Dtype, Gemm, Memory

FloatArray = npt.NDArray[np.float64]

# Tensor cores read 16 bytes of a row at a time: rows of another length (n or k of a GEMM no multiple of 8 in
# 16-bit types, of 16 in fp8) fall to kernels with narrow loads. NVIDIA's guide to matrix multiplication asks
# for the multiple. Published runs bracket the price: padding GPT-2's vocabulary from 50257 to 50304 made the
# head's products about twice as fast, and BLOOM's trials with a head dimension of 150 had attention products
# about five times slower than with 224.
ALIGNMENT_BYTES = 16
MISALIGNED_SLOWDOWN = 3.0
_TENSOR_CORE: frozenset[Dtype] = frozenset({"tf32", "bf16", "fp16", "fp8"})


def misaligned(dtype: Dtype, n: int, k: int) -> bool:
    """Whether the rows of a GEMM's operands break the tensor cores' alignment."""
    width = BYTES_OF[dtype]
    return dtype in _TENSOR_CORE and (n * width % ALIGNMENT_BYTES != 0 or k * width % ALIGNMENT_BYTES != 0)


def misaligned_many(dtype: Dtype, n: FloatArray, k: FloatArray) -> npt.NDArray[np.bool_]:
    """`misaligned` for arrays."""
    if dtype not in _TENSOR_CORE:
        return np.zeros(np.broadcast(n, k).shape, dtype=bool)
    width = BYTES_OF[dtype]
    return np.asarray((n * width % ALIGNMENT_BYTES != 0) | (k * width % ALIGNMENT_BYTES != 0))


def peak_flops(device: Device, dtype: Dtype) -> float:
    """The peak of `dtype`; ProfileError where the device has none."""
    peak = device.peak.get(dtype)
    if peak is None:
        have = ", ".join(device.peak)
        raise ProfileError(f"{dtype} on {device.name}: the device has no {dtype}; use one of {have}")
    return peak


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """floor + max(flops / flops_per_s, bytes / bytes_per_s): the roofline of one kind of kernel and one
    dtype.

    Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009; with efficiencies and a floor.
    """

    flops_per_s: float
    bytes_per_s: float
    floor_s: float

    def seconds(self, flops: float, traffic_bytes: float) -> float:
        """Seconds of a kernel with these operations and bytes."""
        return self.floor_s + max(flops / self.flops_per_s, traffic_bytes / self.bytes_per_s)

    def many(self, flops: FloatArray, traffic_bytes: FloatArray) -> FloatArray:
        """`seconds` for arrays."""
        return np.asarray(self.floor_s + np.maximum(flops / self.flops_per_s, traffic_bytes / self.bytes_per_s))


def gemm_scale(device: Device, dtype: Dtype) -> Scale:
    """The roofline of matrix products."""
    return Scale(
        flops_per_s=peak_flops(device, dtype) * device.roofline.gemm_efficiency,
        bytes_per_s=device.memory_bandwidth_bytes_per_s * device.roofline.memory_efficiency,
        floor_s=device.roofline.kernel_floor_s,
    )


def attention_scale(device: Device, dtype: Dtype, *, backward: bool) -> Scale:
    """The roofline of fused attention, forward or backward."""
    roofline = device.roofline
    efficiency = roofline.attention_backward_efficiency if backward else roofline.attention_efficiency
    return Scale(
        flops_per_s=peak_flops(device, dtype) * efficiency,
        bytes_per_s=device.memory_bandwidth_bytes_per_s * roofline.memory_efficiency,
        floor_s=roofline.kernel_floor_s,
    )


def memory_seconds(device: Device, kernel: Memory) -> float:
    """Floor and bytes over the bandwidth that such an operation reaches."""
    roofline = device.roofline
    efficiency = roofline.memory_op_efficiency.get(kernel.op, roofline.memory_efficiency)
    return roofline.kernel_floor_s + kernel.traffic_bytes / (device.memory_bandwidth_bytes_per_s * efficiency)


def gemm_seconds(device: Device, kernel: Gemm) -> float:
    """The roofline of a GEMM, misaligned rows included."""
    seconds = gemm_scale(device, kernel.dtype).seconds(kernel.flops, kernel.traffic_bytes)
    return seconds * MISALIGNED_SLOWDOWN if misaligned(kernel.dtype, kernel.n, kernel.k) else seconds


def attention_seconds(device: Device, kernel: Attention) -> float:
    """The roofline of a fused attention kernel, of another generation by its published speed."""
    scale = attention_scale(device, kernel.dtype, backward=kernel.backward)
    seconds = scale.seconds(kernel.flops, kernel.traffic_bytes)
    if kernel.generation is None:
        return seconds
    slower = times_slower(kernel.generation, device.tables.attention_kernel, kernel.head_dim, kernel.backward)
    return scale.floor_s + (seconds - scale.floor_s) * slower
