"""The work of one pass: which kernels and collectives a micro-batch needs on its way through some layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import Kernel, Kernels
from clustersim.layout.layout import Layout, Sharded
from clustersim.layout.schedule import splits_backward
from clustersim.program.program import Inner, Work
from clustersim.timeline import Phase
from clustersim.workload.activations import embedding_collectives, ep_collectives, head_collectives, tp_collectives
from clustersim.workload.block import Block
from clustersim.workload.head import Head
from clustersim.workload.layer_kernels import (
    accumulation_of,
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
from clustersim.workload.parameters import Held
from clustersim.workload.ring import ring_shifts
from clustersim.workload.sharding_kernels import sharding_of
from clustersim.workload.training import Workload


def pass_work(workload: Workload, layout: Layout, framework: Framework, phase: Phase, layers: range, size: int) -> Work:
    """One pass of a micro-batch of `size` through `layers` (embedding and head included where in range).

    Where the schedule splits the backward pass, "weight-gradient" is what only gradients of weights need, and
    "backward" everything else: recomputation and all collectives too.
    """
    model, mesh = workload.model, layout.mesh
    block = Block.of(
        workload, framework, micro_batch=size, tp=mesh.tp, sequence_parallel=layout.sequence_parallel, cp=mesh.cp,
        ep=mesh.ep, dtype=layout.precision.compute,
    )  # fmt: skip
    head = Head.of(block, workload.training, framework)
    real = range(max(0, layers.start), min(model.layers, layers.stop))
    parts: list[Kernels] = []
    if phase == "forward":
        each = forward(block)
    else:
        each = backward(block) + recomputed(block, layout.recompute, framework.selective)
    parts.append(_times(each, len(real)))
    tail: Kernels = ()
    way = 0 if phase == "forward" else 1
    inner: list[Inner] = []
    if len(real):
        within = tp_collectives(block, layout.recompute)[way]
        inner += [Inner(kind=kind, bytes=length, count=count * len(real)) for kind, length, count in within]
        routed = ep_collectives(block, layout.recompute)[way]
        inner += [Inner(group="ep", kind=kind, bytes=length, count=count * len(real)) for kind, length, count in routed]
        round_ = ring_shifts(block, layout.recompute)[way]
        inner += [
            Inner(group="cp", kind="send_recv", bytes=shift.bytes, count=shift.times * len(real), beside=shift.beside)
            for shift in round_
        ]
    if layers.start == -1:
        parts.append(embedding_forward(block) if phase == "forward" else embedding_backward(block))
        tail = parts[-1] if phase != "forward" else ()
        ends = embedding_collectives(block)[way]
        inner += [Inner(kind=kind, bytes=length, count=count) for kind, length, count in ends]
    if layers.stop == model.layers + 1:
        parts.append(head_forward(head) if phase == "forward" else head_backward(head))
        tail = parts[-1] if phase == "forward" else tail
        ends = head_collectives(block)[way]
        inner += [Inner(kind=kind, bytes=length, count=count) for kind, length, count in ends]
    ahead, behind = _unsharded(workload, layout, framework, layers, len(real))
    if phase == "forward":
        parts.append(ahead)
    summed = _accumulated(workload, layout, framework, layers, len(real)) + behind
    if phase == "backward" and not splits_backward(layout.pipeline.schedule):
        parts.append(summed)
    kernels = _merged(kernel for part in parts for kernel in part)
    forward_layers = len(real) if phase == "forward" or layout.recompute == "full" else 0
    if phase == "forward" or not splits_backward(layout.pipeline.schedule):
        backward_layers = len(real) if phase == "backward" else 0
        return Work(
            kernels=kernels, inner=tuple(inner), forward_layers=forward_layers, backward_layers=backward_layers,
            tail=tail if len(real) else (),
        )  # fmt: skip
    weights = _times(layer_weight_gradients(block), len(real))
    if layers.start == -1:
        weights += embedding_weight_gradients(block)
    if layers.stop == model.layers + 1:
        weights += head_weight_gradients(head)
    if phase == "weight-gradient":
        kernels = _merged(weights + summed)
        return Work(kernels=kernels, inner=(), forward_layers=0, backward_layers=0, split_layers=len(real))
    return Work(
        kernels=without(kernels, weights), inner=tuple(inner), forward_layers=forward_layers, backward_layers=0,
        split_layers=len(real),
    )  # fmt: skip


def _accumulated(workload: Workload, layout: Layout, framework: Framework, layers: range, real: int) -> Kernels:
    """Adding the gradients of one micro-batch to those before. Where they are reduced after every micro-batch, a rank
    adds its shard of them only, which is left out."""
    scheme = layout.scheme
    reduced = isinstance(scheme, Sharded) and scheme.shards_gradients
    if reduced or layout.micro_batches(workload.training.global_batch) == 1:
        return ()
    # A tied embedding's gradient comes from both of its ends.
    held = _held(workload, layout, real)
    parts = [held]
    parts += [replace(held, layers=0, first=True)] if layers.start == -1 else []
    parts += [replace(held, layers=0, last=True)] if layers.stop == workload.model.layers + 1 else []
    compute, gradient, how = layout.precision.compute, layout.precision.gradient, framework.gradient_accumulation
    return tuple(
        kernel for part in parts for kernel in accumulation_of(part, dtype=compute, gradient=gradient, how=how)
    )


def _unsharded(
    workload: Workload, layout: Layout, framework: Framework, layers: range, real: int
) -> tuple[Kernels, Kernels]:
    """Copies of gathered or converted weights and of their gradients: (forward, backward)."""
    model, mesh, scheme = workload.model, layout.mesh, layout.scheme
    sharded = isinstance(scheme, Sharded) and scheme.shards_weights and mesh.replicas > 1
    if sharded == (framework.unsharding == "autocast"):
        return (), ()
    held = _held(workload, layout, real)
    parts = [replace(held, first=layers.start == -1)]
    parts += [replace(held, layers=0, last=True)] if layers.stop == model.layers + 1 and not model.tied else []
    compute, gradient, how = layout.precision.compute, layout.precision.gradient, framework.unsharding
    each = [sharding_of(part, dtype=compute, gradient=gradient, how=how) for part in parts]
    ahead, behind = (tuple(kernel for one in each for kernel in one[way]) for way in (0, 1))
    return ahead, behind


def _held(workload: Workload, layout: Layout, layers: int) -> Held:
    """What a rank holds of some layers, without the ends."""
    return Held(
        model=workload.model, layers=layers, first=False, last=False, tp=layout.mesh.tp, ep=layout.mesh.ep
    )  # fmt: skip


def _times(kernels: Kernels, count: int) -> Kernels:
    return tuple((kernel, n * count) for kernel, n in kernels) if count else ()


def _merged(kernels: Iterable[tuple[Kernel, int]]) -> Kernels:
    """The same kernels, each named once."""
    counts: dict[Kernel, int] = {}
    for kernel, count in kernels:
        counts[kernel] = counts.get(kernel, 0) + count
    return tuple(counts.items())
