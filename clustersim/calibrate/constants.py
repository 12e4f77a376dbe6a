"""The constants that may be fitted: their coordinates, how far off each may well be, and what of them rows can tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from clustersim.hardware.calibration import ConstantName, ScaleName, constant_of
from clustersim.hardware.framework import Framework

# What the ops of a run show apart.
RUN_CONSTANTS: tuple[ConstantName, ...] = (
    "compute_scale", "network_scale", "overlap.compute_slowdown", "host.per_layer_forward", "host.per_layer_backward",
    "host.per_micro_batch", "host.per_step", "host.per_collective",
)  # fmt: skip

# What measured steps may show, with the width of the prior (one standard deviation about the value from before): of
# the logarithm for a factor, as a multiple of its value for a time.
STEP_PRIORS: dict[ConstantName, float] = {
    # Kernels of a long step against tables of short bursts: clocks, power and libraries differ by 5 to 15 %.
    "compute_scale": 0.15,
    # How much of an unfused layer a framework fuses is not documented kernel by kernel.
    "scales.memory": 0.25,
    # What a misaligned product costs is a fact of cuBLAS: from nearly nothing (its documentation of 11.0 on) to tensor
    # cores left idle (a factor of 4 and more on an A100), about the 3 that is priced.
    "scales.misaligned": 0.6,
    # A profile names the generation of the kernel. Versions of one generation differ by up to a quarter.
    "scales.attention": 0.2,
    # NCCL of 2.7 and 2.27: 1 MiB in a node takes 93 and 39 us.
    "scales.tensor_parallel": 0.4,
    # Published allreduces between nodes reach 0.17 to 0.5 of the line rate where tables reach 0.5 to 0.9.
    "scales.synchronisation": 0.5,
    "scales.send": 0.5,
    "overlap.compute_slowdown": 0.1,
    # Eager host time depends on the CPU, Python and the framework's version.
    "host.per_layer_forward": 0.4,
    "host.per_layer_backward": 0.4,
    "host.per_micro_batch": 1.0,
    "host.per_step": 1.5,
}

# Sets of constants that a fit may free, each a part of the next.
Free = Literal["none", "compute_scale", "kernels", "kernels and messages", "all"]
_KERNELS: tuple[ConstantName, ...] = ("compute_scale", "scales.memory", "scales.misaligned", "scales.attention")
_MESSAGES: tuple[ConstantName, ...] = (
    "scales.tensor_parallel", "scales.synchronisation", "scales.send", "overlap.compute_slowdown",
)  # fmt: skip
NESTED: dict[Free, tuple[ConstantName, ...]] = {
    "none": (),
    "compute_scale": ("compute_scale",),
    "kernels": _KERNELS,
    "kernels and messages": (*_KERNELS, *_MESSAGES),
    "all": tuple(STEP_PRIORS),
}

_LARGEST_SCALE, _LARGEST_SLOWDOWN, _LONGEST_S = 30.0, 5.0, 1.0
# Generations of fused attention are within a factor of 2 of each other; no version of one is further off.
_LARGEST_ATTENTION = 2.0
_SMALLEST_UNIT_S = 2e-5


def is_scale(name: ConstantName) -> bool:
    """Whether the constant is a factor on times, whose logarithm is fitted."""
    return name in get_args(ScaleName) and name != "overlap.compute_slowdown"


def unit_s(framework: Framework, name: ConstantName) -> float:
    """What a time is counted in: its value from before."""
    return max(constant_of(framework, name), _SMALLEST_UNIT_S)


def coordinate(framework: Framework, name: ConstantName, value: float) -> float:
    """The logarithm of a factor, the slowdown itself, a time in units of its value from before."""
    if name == "overlap.compute_slowdown":
        return value
    return math.log(value) if is_scale(name) else value / unit_s(framework, name)


def value_at(framework: Framework, name: ConstantName, at: float) -> float:
    """The value at a coordinate."""
    if name == "overlap.compute_slowdown":
        return at
    return math.exp(at) if is_scale(name) else at * unit_s(framework, name)


def bounds(framework: Framework, name: ConstantName) -> tuple[float, float]:
    """The least and the largest possible coordinate."""
    if name == "overlap.compute_slowdown":
        return 1.0, max(_LARGEST_SLOWDOWN, framework.overlap.compute_slowdown)
    if is_scale(name):
        largest = math.log(_LARGEST_ATTENTION if name == "scales.attention" else _LARGEST_SCALE)
        return -largest, largest
    return 0.0, max(1.0, _LONGEST_S / unit_s(framework, name))


def loose_widths(framework: Framework, names: tuple[ConstantName, ...]) -> Mapping[ConstantName, float]:
    """Widths for fits to many ops, which hold a constant only where nothing determines it."""
    wide: dict[ConstantName, float] = {}
    for name in names:
        wide[name] = 0.5 if name == "overlap.compute_slowdown" else 0.7 if is_scale(name) else 2.0
    return wide
