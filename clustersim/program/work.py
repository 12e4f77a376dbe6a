"""The work of one pass: which kernels and collectives a micro-batch needs on its way through some layers."""

from __future__ import annotations

from collections.abc import Iterable

from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import BYTES_OF, Kernel, Kernels
from clustersim.layout.layout import Layout
from clustersim.program.program import Inner, Work
from clustersim.timeline import Phase
from clustersim.workload.activations import embedding_collectives, head_collectives, tp_collectives
from clustersim.workload.layer_kernels import (
    backward,
    embedding_backward,
    embedding_forward,
    forward,
    head_backward,
    head_forward,
    recomputed,
)
from clustersim.workload.training import Workload


def pass_work(workload: Workload, layout: Layout, framework: Framework, phase: Phase, layers: range, size: int) -> Work:
    """One pass of a micro-batch of `size` through `layers` (embedding and head included where in range)."""
    model = workload.model
    sequence, tp, sp = workload.training.sequence, layout.mesh.tp, layout.sequence_parallel
    dtype = layout.precision.compute
    real = range(max(0, layers.start), min(model.layers, layers.stop))
    parts: list[Kernels] = []
    attention, fused = framework.attention, framework.fused_elementwise
    if phase == "forward":
        each = forward(model, sequence, size, tp, sp, attention, fused, dtype)
    else:
        each = backward(model, sequence, size, tp, sp, attention, fused, dtype) + recomputed(
            model, sequence, size, tp, sp, attention, fused, dtype, layout.recompute
        )
    parts.append(_times(each, len(real)))
    ins, outs = tp_collectives(model, sequence, size, tp, sp, layout.recompute, BYTES_OF[dtype])
    inner = [
        Inner(kind=kind, bytes=size_bytes, count=count * len(real))
        for kind, size_bytes, count in (ins if phase == "forward" else outs)
        if len(real)
    ]
    way = 0 if phase == "forward" else 1
    if layers.start == -1:
        make = (embedding_forward, embedding_backward)[way]
        parts.append(make(model, sequence, size, tp, sp, dtype))
        ends = embedding_collectives(model, sequence, size, tp, sp, BYTES_OF[dtype])[way]
        inner += [Inner(kind=kind, bytes=length, count=count) for kind, length, count in ends]
    if layers.stop == model.layers + 1:
        head = (head_forward, head_backward)[way]
        parts.append(head(model, sequence, size, tp, sp, fused, dtype))
        ends = head_collectives(model, sequence, size, tp, sp, BYTES_OF[dtype])[way]
        inner += [Inner(kind=kind, bytes=length, count=count) for kind, length, count in ends]
    forward_layers = len(real) if phase == "forward" or layout.recompute == "full" else 0
    return Work(
        kernels=_merged(kernel for part in parts for kernel in part),
        inner=tuple(inner),
        forward_layers=forward_layers,
        backward_layers=len(real) if phase == "backward" else 0,
    )


def _times(kernels: Kernels, count: int) -> Kernels:
    return tuple((kernel, n * count) for kernel, n in kernels) if count else ()


def _merged(kernels: Iterable[tuple[Kernel, int]]) -> Kernels:
    """The same kernels, each named once."""
    counts: dict[Kernel, int] = {}
    for kernel, count in kernels:
        counts[kernel] = counts.get(kernel, 0) + count
    return tuple(counts.items())
