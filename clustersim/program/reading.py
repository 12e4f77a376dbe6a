"""What a step reads: every rank of the first stage its part of its replica's batch."""

from __future__ import annotations

from clustersim.layout.layout import Layout
from clustersim.program.program import Read
from clustersim.timeline import OpId
from clustersim.workload.training import Workload


def batch_read(workload: Workload, layout: Layout) -> Read | None:
    """The read of one step by one rank of the first stage; None where the data is not modelled.

    The ranks that work on the same samples (tensor- and context-parallel) read a part of each, and share it inside
    their node: what crosses the network is one copy.
    """
    data, mesh = workload.data, layout.mesh
    if data is None:
        return None
    samples = -(-workload.training.global_batch // mesh.dp)
    together = mesh.tp * mesh.cp
    return Read(
        id=OpId(0, -1, 0, "forward", "all", "read"),
        bytes=max(1, round(samples * data.sample_bytes / together)),
        stored_bytes=round(samples * data.sample_bytes * (1.0 - data.cache) / together),
        sample_bytes=round(data.sample_bytes),
        readers=data.busy_readers(samples / together),
        decode_ns=round(data.decode_s * 1e9),
        prefetch=data.prefetch,
    )
