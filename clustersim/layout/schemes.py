"""Schemes of synchronisation: every way to bring gradients together that the search compares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from clustersim.cluster.cluster import Cluster
from clustersim.layout.choices import Choices
from clustersim.layout.layout import Algorithm, AllReduce, Bsp, ParameterServer, Scheme, Sharded

# A single tree sends half as much again as two, and waits as long: only on request, as GPipe.
ALGORITHMS: tuple[Algorithm, ...] = ("ring", "tree", "hierarchical", "halving-doubling", "nvls", "sharp")
BUCKET_BYTES = 25.0 * 2**20
# BytePS's default partition.
PARTITION_BYTES = 4_096_000.0


def every_scheme(cluster: Cluster, choices: Choices) -> Iterator[Scheme]:
    """The schemes of the families in `choices`, whether or not a division can run them."""
    bucket = choices.bucket_bytes or BUCKET_BYTES
    if "allreduce" in choices.families:
        match choices.algorithm:
            case None:
                named = ALGORITHMS
            case "auto":
                named = get_args(Algorithm)
            case _:
                named = (choices.algorithm,)
        for algorithm in named:
            yield AllReduce(algorithm=algorithm, bucket_bytes=bucket, overlap=True)
    if "sharded" in choices.families:
        for stage in (1, 2, 3):
            if choices.sharded_stage in (None, stage):
                yield Sharded(stage=stage, bucket_bytes=bucket, overlap=True)
    if "parameter-server" in choices.families:
        yield from _server_schemes(cluster, choices, bucket)


def _server_schemes(cluster: Cluster, choices: Choices, bucket: float) -> Iterator[Scheme]:
    """Dedicated, co-located and mixed servers, the optimizer on either side."""
    shared_host = cluster.workers[0].nic.kind == "loopback"
    homes = cluster.devices if shared_host else cluster.worker_nodes
    counts = [n for n in range(choices.least_servers, choices.most_servers + 1) if choices.servers in (None, n)]
    for placement in ("colocated", "dedicated", "mixed"):
        if choices.placement not in (None, placement):
            continue
        for servers in counts if placement != "colocated" else [0]:
            if placement == "colocated" and choices.servers not in (None, 0):
                continue
            if placement != "colocated" and servers == 0:
                continue
            parts = _shares(cluster, homes, servers) if placement == "mixed" else (1, 1)
            if parts is None:
                continue
            for optimizer_at in ("server", "worker"):
                if choices.optimizer_at in (None, optimizer_at):
                    yield ParameterServer(
                        dedicated=servers,
                        colocated=0 if placement == "dedicated" else homes,
                        dedicated_parts=parts[0] if servers else 0,
                        colocated_parts=0 if placement == "dedicated" else parts[1],
                        consistency=Bsp(),
                        bucket_bytes=bucket,
                        partition_bytes=choices.partition_bytes or PARTITION_BYTES,
                        optimizer_at=optimizer_at,
                    )


def _shares(cluster: Cluster, n: int, k: int) -> tuple[int, int] | None:
    """Parts of a dedicated and of a co-located server that equalise their NICs (Jiang et al., OSDI'20, generalised to
    unequal NICs: with r the ratio of a server host's rate to a worker node's, M_G / M = (1 - k r / n) / (n + k r (n -
    2) / n)); None where the dedicated hosts should hold everything."""
    worker, server = cluster.workers[0], cluster.servers[0]
    rate = worker.nic_rate_bytes_per_s * worker.node.nic.count
    ratio = server.nic_rate_bytes_per_s * server.node.nic.count / rate
    colocated = (1.0 - k * ratio / n) / (n + k * ratio * (n - 2) / n)
    if colocated <= 0.0 or n < 2:
        return None
    dedicated = (1.0 - n * colocated) / k
    # To a thousandth of the larger part.
    scale = 1000.0 / max(dedicated, colocated)
    return max(1, round(dedicated * scale)), max(1, round(colocated * scale))
