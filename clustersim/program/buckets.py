"""Which gradients are sent together, and which servers hold how much of them."""

from __future__ import annotations

from clustersim.hardware.kernel import BYTES_OF
from clustersim.layout.layout import Layout, ParameterServer
from clustersim.program.program import Bucket, ServerShare
from clustersim.workload.model import Model
from clustersim.workload.parameters import stage_parameters


def layer_elements(model: Model, layout: Layout, layer: int) -> int:
    """Parameters of one layer on one tensor-parallel rank; layer -1 is the embedding, layer L the norm and head.

    With tied embeddings and several stages, the last stage holds a copy of the embedding matrix, counted in layer L.
    """
    tp = layout.mesh.tp
    if layer == -1:
        return stage_parameters(model, range(0), first=True, last=False, tp=tp)
    if layer == model.layers:
        return stage_parameters(model, range(0), first=layout.mesh.pp == 1, last=True, tp=tp) - (
            stage_parameters(model, range(0), first=True, last=False, tp=tp) if layout.mesh.pp == 1 else 0
        )
    return stage_parameters(model, range(layer, layer + 1), first=False, last=False, tp=tp)


def chunk_span(model: Model, layout: Layout, chunk: int) -> range:
    """The layers of a chunk, the embedding (-1) and the head (L) included where it holds them."""
    layers = layout.chunk_layers(chunk, model.layers)
    first = -1 if chunk == 0 else layers.start
    last = model.layers + 1 if chunk == layout.chunks - 1 else layers.stop
    return range(first, last)


def buckets(model: Model, layout: Layout) -> tuple[Bucket, ...]:
    """Whole layers from the end of each chunk to its start, closed once they reach the limit. O(layers).

    A bucket is never part of a layer: its gradients leave when the layer's backward pass is over, so that smaller ones
    would leave together anyway. Partitions of a parameter server are messages inside a bucket.
    """
    result: list[Bucket] = []
    limit = layout.scheme.bucket_bytes
    for chunk in reversed(range(layout.chunks)):
        span = chunk_span(model, layout, chunk)
        last, elements = span.stop - 1, 0
        for layer in reversed(span):
            elements += layer_elements(model, layout, layer)
            if elements * BYTES_OF[layout.precision.gradient] >= limit or layer == span.start:
                result.append(
                    Bucket(index=len(result), stage=chunk, first_layer=layer, last_layer=last, elements=elements)
                )
                last, elements = layer - 1, 0
    return tuple(result)


def server_shares(layout: Layout) -> tuple[ServerShare, ...]:
    """The servers of a layout and the parts each holds; co-located server j runs with an evenly spaced worker rank."""
    scheme = layout.scheme
    if not isinstance(scheme, ParameterServer):
        return ()
    spacing = layout.mesh.workers // scheme.colocated if scheme.colocated else 0
    dedicated = [
        ServerShare(server=j, host="server", node=j, parts=scheme.dedicated_parts) for j in range(scheme.dedicated)
    ]
    colocated = [
        ServerShare(server=scheme.dedicated + j, host="worker", node=j * spacing, parts=scheme.colocated_parts)
        for j in range(scheme.colocated)
    ]
    return tuple(dedicated + colocated)
