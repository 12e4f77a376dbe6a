"""Kernels under a framework: what a device takes, times the framework's factors."""

from __future__ import annotations

from typing import assert_never

from clustersim.hardware.cost import DeviceCosts
from clustersim.hardware.framework import Framework, Scales
from clustersim.hardware.kernel import Attention, Gemm, Kernel, Kernels, Memory
from clustersim.hardware.roofline import misaligned

_PLAIN = Scales()


def device_s(costs: DeviceCosts, kernels: Kernels, framework: Framework) -> float:
    """Seconds of all `kernels`, each as often as it is launched, with the factors of its kind."""
    scales = framework.scales
    if scales == _PLAIN:
        return costs.seconds(kernels) * framework.compute_scale
    total = sum(count * _factor(kernel, scales) * costs.cost(kernel).seconds for kernel, count in kernels)
    return total * framework.compute_scale


def _factor(kernel: Kernel, scales: Scales) -> float:
    match kernel:
        case Gemm():
            return scales.misaligned if misaligned(kernel.dtype, kernel.n, kernel.k) else 1.0
        case Attention():
            return scales.attention
        case Memory():
            return scales.memory
        case _:
            assert_never(kernel)
