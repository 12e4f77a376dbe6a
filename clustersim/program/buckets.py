"""Which gradients are sent together, and which servers hold how much of them."""

from __future__ import annotations

from clustersim.hardware.kernel import BYTES_OF
from clustersim.layout.buckets import cuts
from clustersim.layout.layout import Layout, ParameterServer
from clustersim.program.program import Bucket, ServerShare
from clustersim.workload.model import Model
from clustersim.workload.parameters import Part


def chunk_span(model: Model, layout: Layout, chunk: int) -> range:
    """The layers of a chunk, the embedding (-1) and the head (L) included where it holds them."""
    layers = layout.chunk_layers(chunk, model.layers)
    first = -1 if chunk == 0 else layers.start
    last = model.layers + 1 if chunk == layout.chunks - 1 else layers.stop
    return range(first, last)


def buckets(model: Model, layout: Layout) -> tuple[Bucket, ...]:
    """The buckets of all chunks, numbered from the last chunk's last layer to the first chunk's first. O(layers).

    Experts that only some replicas hold are summed over fewer ranks, and so have a bucket of their own beside that of
    the other parameters of the same layers.
    """
    result: list[Bucket] = []
    mesh, width = layout.mesh, BYTES_OF[layout.precision.gradient]
    # Where one stage holds both ends, tied embeddings are there once.
    apart = 1 if layout.ends[0] == layout.ends[1] else mesh.pp
    for chunk in reversed(range(layout.chunks)):
        span = chunk_span(model, layout, chunk)
        for cut in cuts(model, mesh.tp, apart, span, layout.scheme.bucket_bytes, width, mesh.ep):
            parts: list[tuple[Part, int]] = [("dense" if cut.experts else "all", cut.elements - cut.experts)]
            if cut.experts:
                parts.append(("experts", cut.experts))
            for part, elements in parts:
                result.append(
                    Bucket(
                        index=len(result), stage=chunk, first_layer=cut.first, last_layer=cut.last,
                        elements=elements, params=part,
                    )
                )  # fmt: skip
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
