"""Element-wise operations: one pass where the framework fuses them, one pass each where it does not.

An eager PyTorch has one kernel for a layer norm, for a GELU and for a bias (in its product). A root-mean-square norm
(before there was a kernel for it), rotary positions and gates are series of operations, in fp32 between two casts.
Sizes are elements, `width` bytes an element.
"""

from __future__ import annotations

from clustersim.hardware.kernel import Kernels, Memory, MemoryOp


def _one(op: MemoryOp, read_bytes: int, written_bytes: int) -> Kernels:
    return ((Memory(op=op, read_bytes=read_bytes, written_bytes=written_bytes), 1),)


def norm(elements: int, width: int, in_steps: bool, backward: bool) -> Kernels:
    """A norm, backward without the addition to what came past it.

    In steps, forward: cast, square, average, scaling, cast, weight. Backward: the weight's gradient as a product and a
    sum, and the input's; cast; the scaling's two products and a sum; the average's and the square's; their sum; cast.
    """
    if not in_steps:
        return _one("norm", (2 if backward else 1) * elements * width, elements * width)
    read, written = (5 * width + 36, 3 * width + 24) if backward else (2 * width + 16, 2 * width + 12)
    return _one("activation", elements * read, elements * written)


def rotary(elements: int, width: int, in_steps: bool) -> Kernels:
    """Rotary positions, either way; in steps: cast, turned, cast back."""
    if not in_steps:
        return _one("rotary", elements * width, elements * width)
    return _one("activation", elements * (width + 8), elements * (width + 8))


def activation(before: int, behind: int, width: int, in_steps: bool) -> Kernels:
    """From `before` elements to `behind`; in steps a gate is a pass of its own."""
    if not in_steps or before == behind:
        return _one("activation", before * width, behind * width)
    gate = _one("activation", 2 * behind * width, behind * width)
    return (*_one("activation", behind * width, behind * width), *gate)


def activation_backward(before: int, behind: int, width: int, in_steps: bool) -> Kernels:
    """Its backward pass; in steps those of the gate's two factors, then of the activation."""
    if not in_steps or before == behind:
        return _one("activation", (before + behind) * width, before * width)
    return tuple(kernel for _ in range(3) for kernel in _one("activation", 2 * behind * width, behind * width))
