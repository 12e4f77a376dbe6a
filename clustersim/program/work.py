"""The work of one pass: which kernels and collectives a micro-batch needs on its way through some layers."""

from __future__ import annotations

from collections.abc import Iterable

from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import BYTES_OF, Kernel, Kernels, activation_width
from clustersim.layout.layout import Layout, Sharded
from clustersim.layout.schedule import splits_backward
from clustersim.program.program import Inner, Work
from clustersim.timeline import Phase
from clustersim.workload.activations import embedding_collectives, ep_collectives, head_collectives, tp_collectives
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
from clustersim.workload.model import with_rows
from clustersim.workload.ring import ring_shifts
from clustersim.workload.sharding_kernels import sharding_of
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
    width, spread = activation_width(dtype), (mesh.ep, mesh.cp, load)
    real = range(max(0, layers.start), min(model.layers, layers.stop))
    attention, fused = framework.attention, framework.fused_elementwise
    seen = workload.training.head_sequence(sequence, tp)
    end = (with_rows(model, framework.vocab_multiple * tp), seen, size, tp, sp, fused)
    parts: list[Kernels] = []
    if phase == "forward":
        each = forward(model, whole, size, tp, sp, attention, fused, dtype, *spread)
    else:
        each = backward(model, whole, size, tp, sp, attention, fused, dtype, *spread) + recomputed(
            model, whole, size, tp, sp, attention, fused, dtype, layout.recompute, *spread, framework.selective
        )
    parts.append(_times(each, len(real)))
    tail: Kernels = ()
    way = 0 if phase == "forward" else 1
    inner: list[Inner] = []
    if len(real):
        within = tp_collectives(model, sequence, size, tp, sp, layout.recompute, width, load, BYTES_OF[dtype])[way]
        inner += [Inner(kind=kind, bytes=length, count=count * len(real)) for kind, length, count in within]
        routed = ep_collectives(model, sequence, size, tp, sp, mesh.ep, layout.recompute, width, load)[way]
        inner += [Inner(group="ep", kind=kind, bytes=length, count=count * len(real)) for kind, length, count in routed]
        round_ = ring_shifts(model, whole, size, tp, fused, dtype, layout.recompute, mesh.cp, attention)[way]
        inner += [
            Inner(group="cp", kind="send_recv", bytes=shift.bytes, count=shift.times * len(real), beside=shift.beside)
            for shift in round_
        ]
    if layers.start == -1:
        make = (embedding_forward, embedding_backward)[way]
        parts.append(make(model, sequence, size, tp, sp, dtype))
        tail = parts[-1] if phase != "forward" else ()
        ends = embedding_collectives(model, sequence, size, tp, sp, width)[way]
        inner += [Inner(kind=kind, bytes=length, count=count) for kind, length, count in ends]
    if layers.stop == model.layers + 1:
        if phase == "forward":
            reported = framework.loss_metrics
            parts.append(head_forward(*end, dtype, False, framework.in_place_loss, reported, framework.loss_in_steps))
        else:
            parts.append(head_backward(*end, dtype, False, framework.in_place_loss, framework.loss_in_steps))
        tail = parts[-1] if phase == "forward" else tail
        ends = head_collectives(model, sequence, size, tp, sp, width)[way]
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
    weights = _times(layer_weight_gradients(model, whole, size, tp, sp, attention, fused, dtype, *spread), len(real))
    if layers.start == -1:
        weights += embedding_weight_gradients(model, sequence, size, tp, sp, dtype)
    if layers.stop == model.layers + 1:
        weights += head_weight_gradients(*end, dtype)
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
    model, mesh = workload.model, layout.mesh
    # A tied embedding's gradient comes from both of its ends.
    parts = [(real, False, False)]
    parts += [(0, True, False)] if layers.start == -1 else []
    parts += [(0, False, True)] if layers.stop == model.layers + 1 else []
    types = (layout.precision.compute, layout.precision.gradient, framework.gradient_accumulation)
    return tuple(kernel for part in parts for kernel in accumulation_of(model, *part, mesh.tp, mesh.ep, *types))


def _unsharded(
    workload: Workload, layout: Layout, framework: Framework, layers: range, real: int
) -> tuple[Kernels, Kernels]:
    """Copies of gathered or converted weights and of their gradients: (forward, backward)."""
    model, mesh, scheme = workload.model, layout.mesh, layout.scheme
    sharded = isinstance(scheme, Sharded) and scheme.shards_weights and mesh.replicas > 1
    if sharded == (framework.unsharding == "autocast"):
        return (), ()
    parts = [(real, layers.start == -1, False)]
    parts += [(0, False, True)] if layers.stop == model.layers + 1 and not model.tied else []
    types = (layout.precision.compute, layout.precision.gradient, framework.unsharding)
    each = [sharding_of(model, *part, mesh.tp, mesh.ep, *types) for part in parts]
    ahead, behind = (tuple(kernel for one in each for kernel in one[way]) for way in (0, 1))
    return ahead, behind


def _times(kernels: Kernels, count: int) -> Kernels:
    return tuple((kernel, n * count) for kernel, n in kernels) if count else ()


def _merged(kernels: Iterable[tuple[Kernel, int]]) -> Kernels:
    """The same kernels, each named once."""
    counts: dict[Kernel, int] = {}
    for kernel, count in kernels:
        counts[kernel] = counts.get(kernel, 0) + count
    return tuple(counts.items())
