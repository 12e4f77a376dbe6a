"""What the two ends of a model cost, next to its layers."""

from __future__ import annotations

import functools

from clustersim.cluster.cluster import Cluster
from clustersim.hardware.cost import DeviceCosts, device_costs
from clustersim.hardware.framework import Framework
from clustersim.workload.block import Block
from clustersim.workload.head import Head
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
from clustersim.workload.training import Workload


def end_loads(
    workload: Workload, cluster: Cluster, framework: Framework, tp: int, recompute: Recompute
) -> tuple[float, float]:
    """What the embedding and the head take on the device, in layers: kernels of both passes and of recomputation."""
    device = cluster.workers[0].device
    assert device is not None
    block = Block.of(
        workload, framework, micro_batch=1, tp=tp, sequence_parallel=False, cp=1, ep=1,
        dtype=workload.training.precision,
    )  # fmt: skip
    head = Head.plain(block, in_place=framework.in_place_loss, in_steps=framework.loss_in_steps)
    return _loads_on(device_costs(device.name), head, recompute)


@functools.lru_cache(maxsize=1024)
def _loads_on(costs: DeviceCosts, head: Head, recompute: Recompute) -> tuple[float, float]:
    block = head.block
    one = costs.seconds(forward(block) + backward(block) + recomputed(block, recompute, "core"))
    embedding = costs.seconds(embedding_forward(block) + embedding_backward(block))
    # To a hundredth: what differs by less makes no other split.
    return round(embedding / one, 2), round(costs.seconds(head_forward(head) + head_backward(head)) / one, 2)
