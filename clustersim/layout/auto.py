"""`algorithm: auto`: the allreduce that NCCL's tuner would run, written out for every division."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster
from clustersim.cluster.tuning import layout_algorithm, nccl_choice
from clustersim.layout.buckets import layer_elements
from clustersim.layout.layout import Algorithm
from clustersim.workload.model import Model

Ints = NDArray[np.int64]


def auto_algorithms(
    model: Model, cluster: Cluster, groups: dict[str, Ints], bucket_bytes: float, gradient_bytes: int
) -> tuple[Algorithm, ...]:
    """The algorithm for every row of `groups` (arrays `replicas`, `local` ranks of a node, `tp`, `pp`, `ep`).

    The size is that of a bucket: whole layers, up to the limit or one. A ring for single replicas, and where the
    devices do not speak NCCL. O(rows + distinct rows * pairs of the tuner).
    """
    found: dict[tuple[int, ...], Algorithm] = {}
    rows = list(zip(*(groups[name].tolist() for name in ("replicas", "local", "tp", "pp", "ep")), strict=True))
    for row in set(rows):
        replicas, local, tp, pp, ep = row
        layer = gradient_bytes * layer_elements(model, tp, pp, model.layers // 2, ep)
        whole = layer * (model.layers // pp)
        size = min(layer * np.ceil(bucket_bytes / layer), whole)
        choice = nccl_choice("all_reduce", float(size), replicas, local, cluster.workers[0], cluster)
        found[row] = layout_algorithm(choice.algorithm) if choice is not None else "ring"
    return tuple(found[row] for row in rows)
