"""The work of one pass: which kernels and collectives a micro-batch needs on its way through some layers."""

from __future__ import annotations

from collections.abc import Iterable

from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import BYTES_OF, Kernel, Kernels
from clustersim.layout.layout import Layout
from clustersim.layout.schedule import splits_backward
from clustersim.program.program import Inner, Work
from clustersim.timeline import Phase
from clustersim.workload.activations import embedding_collectives, ep_collectives, head_collectives, tp_collectives
from clustersim.workload.layer_kernels import (
    backward,
    embedding_backward,
    embedding_forward,
    embedding_weight_gradients,
    forward,
    head_backward,
    head_forward,
    head_weight_gradients,
    layer_weight_gradients,
    recomputed,
    without,
)
from clustersim.workload.ring import ring_shifts
from clustersim.workload.training import Workload


def pass_work(workload: Workload, layout: Layout, framework: Framework, phase: Phase, layers: range, size: int) -> Work:
    """One pass of a micro-batch of `size` through `layers` (embedding and head included where in range).

    Where the schedule splits the backward pass, "weight-gradient" is what only gradients of weights need, and
    "backward" everything else: recomputation and all collectives too.
    """
    model, mesh = workload.model, layout.mesh
    whole, tp, sp = workload.training.sequence, mesh.tp, layout.sequence_parallel
    # What a rank has of it.
    sequence = whole // mesh.cp
    dtype, load = layout.precision.compute, workload.training.expert_load(mesh.ep)
    spread = (mesh.ep, mesh.cp, load)
    real = range(max(0, layers.start), min(model.layers, layers.stop))
    parts: list[Kernels] = []
    attention, fused = framework.attention, framework.fused_elementwise
    if phase == "forward":
        each = forward(model, whole, size, tp, sp, attention, fused, dtype, *spread)
    else:
        each = backward(model, whole, size, tp, sp, attention, fused, dtype, *spread) + recomputed(
            model, whole, size, tp, sp, attention, fused, dtype, layout.recompute, *spread
        )
    parts.append(_times(each, len(real)))
    way = 0 if phase == "forward" else 1
    inner: list[Inner] = []
    if len(real):
        width = BYTES_OF[dtype]
        within = tp_collectives(model, sequence, size, tp, sp, layout.recompute, width, load)[way]
        inner += [Inner(kind=kind, bytes=length, count=count * len(real)) for kind, length, count in within]
        routed = ep_collectives(model, sequence, size, tp, sp, mesh.ep, layout.recompute, width, load)[way]
        inner += [Inner(group="ep", kind=kind, bytes=length, count=count * len(real)) for kind, length, count in routed]
        round_ = ring_shifts(model, whole, size, tp, fused, dtype, layout.recompute, mesh.cp)[way]
        inner += [
            Inner(group="cp", kind="send_recv", bytes=shift.bytes, count=shift.times * len(real), beside=shift.beside)
            for shift in round_
        ]
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
    kernels = _merged(kernel for part in parts for kernel in part)
    forward_layers = len(real) if phase == "forward" or layout.recompute == "full" else 0
    if phase == "forward" or not splits_backward(layout.pipeline.schedule):
        backward_layers = len(real) if phase == "backward" else 0
        return Work(kernels=kernels, inner=tuple(inner), forward_layers=forward_layers, backward_layers=backward_layers)
    weights = _times(layer_weight_gradients(model, whole, size, tp, sp, attention, fused, dtype, *spread), len(real))
    if layers.start == -1:
        weights += embedding_weight_gradients(model, sequence, size, tp, sp, dtype)
    if layers.stop == model.layers + 1:
        weights += head_weight_gradients(model, sequence, size, tp, sp, fused, dtype)
    if phase == "weight-gradient":
        return Work(kernels=_merged(weights), inner=(), forward_layers=0, backward_layers=0, split_layers=len(real))
    return Work(
        kernels=without(kernels, weights), inner=tuple(inner), forward_layers=forward_layers, backward_layers=0,
        split_layers=len(real),
    )  # fmt: skip


def _times(kernels: Kernels, count: int) -> Kernels:
    return tuple((kernel, n * count) for kernel, n in kernels) if count else ()


def _merged(kernels: Iterable[tuple[Kernel, int]]) -> Kernels:
    """The same kernels, each named once."""
    counts: dict[Kernel, int] = {}
    for kernel, count in kernels:
        counts[kernel] = counts.get(kernel, 0) + count
    return tuple(counts.items())
