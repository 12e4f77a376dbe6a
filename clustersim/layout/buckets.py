"""Which gradients are sent together: whole layers, from the end of a chunk to its start."""

from __future__ import annotations

import functools
from typing import NamedTuple

from clustersim.workload.model import Model
from clustersim.workload.parameters import stage_parameters


class Cut(NamedTuple):
    """Layers `first` to `last` of one chunk (the embedding counts as layer -1, the head as L) and their `elements` on
    one tensor-parallel rank, `experts` of which belong to experts that only some replicas hold (none where ep = 1)."""

    first: int
    last: int
    elements: int
    experts: int


def expert_elements(model: Model, tp: int, layer: int, ep: int) -> int:
    """Parameters of one layer's experts on one tensor-parallel rank, which holds 1/ep of them; 0 where ep = 1, when
    they are kept and synchronised as everything else is."""
    if ep == 1 or not 0 <= layer < model.layers:
        return 0
    return stage_parameters(model, range(layer, layer + 1), first=False, last=False, tp=tp, ep=ep, part="experts")


def layer_elements(model: Model, tp: int, pp: int, layer: int, ep: int = 1) -> int:
    """Parameters of one layer on one tensor-parallel rank that holds 1/ep of the experts; layer -1 is the embedding,
    layer L the norm and head.

    With tied embeddings and several stages, the last stage holds a copy of the embedding matrix, counted in layer L.
    """
    if layer == -1:
        return stage_parameters(model, range(0), first=True, last=False, tp=tp)
    if layer == model.layers:
        return stage_parameters(model, range(0), first=pp == 1, last=True, tp=tp) - (
            stage_parameters(model, range(0), first=True, last=False, tp=tp) if pp == 1 else 0
        )
    return stage_parameters(model, range(layer, layer + 1), first=False, last=False, tp=tp, ep=ep)


@functools.lru_cache(maxsize=4096)
def cuts(
    model: Model, tp: int, pp: int, span: range, limit_bytes: float, gradient_bytes: int, ep: int = 1
) -> tuple[Cut, ...]:
    """The buckets of a chunk of layers `span`, last to first: closed once they reach the limit. O(layers).

    A bucket is never part of a layer: its gradients leave when the layer's backward pass is over, so that smaller ones
    would leave together anyway. Partitions of a parameter server are messages inside a bucket.
    """
    found: list[Cut] = []
    last, elements, experts = span.stop - 1, 0, 0
    for layer in reversed(span):
        elements += layer_elements(model, tp, pp, layer, ep)
        experts += expert_elements(model, tp, layer, ep)
        if elements * gradient_bytes >= limit_bytes or layer == span.start:
            found.append(Cut(layer, last, elements, experts))
            last, elements, experts = layer - 1, 0, 0
    return tuple(found)
