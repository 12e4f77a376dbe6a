"""What the two ends of a model cost, next to its layers."""

from __future__ import annotations

import functools

from clustersim.cluster.cluster import Cluster
from clustersim.hardware.cost import DeviceCosts, device_costs
from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import Dtype
from clustersim.workload.block import AttentionKind
from clustersim.workload.layer_kernels import (
    Recompute,
    backward,
    embedding_backward,
    embedding_forward,
    forward,
    head_backward,
    head_forward,
    recomputed,
)
from clustersim.workload.model import Model
from clustersim.workload.training import Workload


def end_loads(
    workload: Workload, cluster: Cluster, framework: Framework, tp: int, recompute: Recompute
) -> tuple[float, float]:
    """What the embedding and the head take on the device, in layers: kernels of both passes and of recomputation."""
    device = cluster.workers[0].device
    assert device is not None
    return _loads_on(
        device_costs(device.name), workload.model, workload.training.sequence, tp, framework.attention,
        framework.fused_elementwise, workload.training.precision, recompute, framework.in_place_loss,
        framework.loss_in_steps,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _loads_on(
    costs: DeviceCosts, model: Model, sequence: int, tp: int, attention: AttentionKind, fused: bool, dtype: Dtype,
    recompute: Recompute, in_place: bool, in_steps: bool,
) -> tuple[float, float]:  # fmt: skip
    shape, how = (model, sequence, 1, tp, False), (attention, fused, dtype)
    layer = forward(*shape, *how) + backward(*shape, *how) + recomputed(*shape, *how, recompute)
    embedding = embedding_forward(*shape, dtype) + embedding_backward(*shape, dtype)
    head = head_forward(*shape, fused, dtype, in_place=in_place, in_steps=in_steps)
    head += head_backward(*shape, fused, dtype, in_place=in_place, in_steps=in_steps)
    one = costs.seconds(layer)
    # To a hundredth: what differs by less makes no other split.
    return round(costs.seconds(embedding) / one, 2), round(costs.seconds(head) / one, 2)
