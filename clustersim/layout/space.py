"""The space of layouts: every legal way to divide the work, as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster
from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import Dtype
from clustersim.layout.choices import Choices
from clustersim.layout.layout import (
    Algorithm,
    AllReduce,
    Bsp,
    Family,
    Layout,
    Mesh,
    ParameterServer,
    Pipeline,
    Precision,
    RankOrder,
    Recompute,
    Schedule,
    Scheme,
    Sharded,
    SyncRule,
    even_boundaries,
    family,
)
from clustersim.workload.training import Workload

Ints = NDArray[np.int64]

RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved")
ORDERS: tuple[RankOrder, ...] = ("tp-dp-pp", "tp-pp-dp")
FAMILIES: tuple[Family, ...] = ("allreduce", "sharded", "parameter-server")
ALGORITHMS: tuple[Algorithm, ...] = ("ring", "tree", "hierarchical", "halving-doubling")
BUCKET_BYTES = 25.0 * 2**20
# BytePS's default partition.
PARTITION_BYTES = 4_096_000.0
_MOST_VIRTUAL_STAGES = 8
_LARGEST_MICRO_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Divisions:
    """Ways to divide the computation, one a row; `recompute`, `schedule`, `order` index the tuples above."""

    dp: Ints
    tp: Ints
    pp: Ints
    micro_batch: Ints
    micro_batches: Ints
    virtual_stages: Ints
    sequence_parallel: NDArray[np.bool_]
    recompute: Ints
    schedule: Ints
    order: Ints

    def __len__(self) -> int:
        return len(self.dp)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Space:
    """Every legal layout: row r divides the work as `divisions` row `division[r]` and synchronises by
    `schemes[scheme[r]]`."""

    divisions: Divisions
    schemes: tuple[Scheme, ...]
    division: Ints
    scheme: Ints
    precision: Precision
    boundaries: tuple[int, ...] | None
    layers: int
    reduce_in_node: bool

    def __len__(self) -> int:
        return len(self.division)

    def layout(self, row: int) -> Layout:
        """Row `row` as a Layout."""
        d, i = self.divisions, int(self.division[row])
        pp, virtual = int(d.pp[i]), int(d.virtual_stages[i])
        return Layout(
            mesh=Mesh(dp=int(d.dp[i]), tp=int(d.tp[i]), pp=pp),
            micro_batch=int(d.micro_batch[i]),
            sequence_parallel=bool(d.sequence_parallel[i]),
            pipeline=Pipeline(
                schedule=SCHEDULES[int(d.schedule[i])],
                virtual_stages=virtual,
                boundaries=self.boundaries or even_boundaries(self.layers, pp * virtual),
            ),
            recompute=RECOMPUTES[int(d.recompute[i])],
            precision=self.precision,
            order=ORDERS[int(d.order[i])],
            sync=(SyncRule(reduce_in_node=self.reduce_in_node, scheme=self.schemes[int(self.scheme[row])]),),
        )

    def row_of(self, layout: Layout) -> int | None:
        """The row of a layout, or None where the space does not hold it. O(rows)."""
        d, mesh = self.divisions, layout.mesh
        same = (
            (d.dp == mesh.dp)
            & (d.tp == mesh.tp)
            & (d.pp == mesh.pp)
            & (d.micro_batch == layout.micro_batch)
            & (d.virtual_stages == layout.pipeline.virtual_stages)
            & (d.sequence_parallel == layout.sequence_parallel)
            & (d.recompute == RECOMPUTES.index(layout.recompute))
        )
        schemes = [index for index, scheme in enumerate(self.schemes) if scheme == layout.scheme]
        for row in np.flatnonzero(same[self.division] & np.isin(self.scheme, schemes)):
            if self.layout(int(row)) == layout:
                return int(row)
        return None

    def subset(self, rows: Ints) -> Space:
        """The space of these rows alone."""
        return replace(self, division=self.division[rows], scheme=self.scheme[rows])

    def family_of(self) -> NDArray[np.int64]:
        """The family of each row, as an index into FAMILIES."""
        return np.array([FAMILIES.index(family(scheme)) for scheme in self.schemes], np.int64)[self.scheme]

    def distinct(self, rows: Ints) -> int:
        """How many of `rows` differ in (dp, tp, pp, micro-batch, recompute, virtual stages, family)."""
        if not len(rows):
            return 0
        d = self.divisions
        i = self.division[rows]
        keys = np.stack(
            [d.dp[i], d.tp[i], d.pp[i], d.micro_batch[i], d.recompute[i], d.virtual_stages[i], self.family_of()[rows]]
        )
        return int(np.unique(keys, axis=1).shape[1])


def layouts(workload: Workload, cluster: Cluster, framework: Framework, choices: Choices) -> Space:
    """Every legal layout of `workload` on all devices of `cluster`.

    Legal: dp * tp * pp = devices; tp divides heads and feed-forward columns and spans at most two nodes; dp times the
    micro-batch divides the global batch; a stage has at least one layer; interleaving has micro-batches in multiples of
    pp and layers in multiples of pp * virtual stages; ZeRO stages 2 and 3 run without a pipeline (they would reduce,
    and gather, for every micro-batch of every stage). GPipe takes as long as 1F1B and more memory, so that it is only
    considered on request. O(divisions * schemes).
    """
    divisions = _divisions(workload, cluster, framework, choices)
    schemes = tuple(_schemes(cluster, choices))
    count = len(divisions)
    dp, pp = divisions.dp, divisions.pp
    legal = np.zeros((count, len(schemes)), np.bool_)
    local = local_peers(divisions, cluster.devices_per_node)
    for column, scheme in enumerate(schemes):
        if isinstance(scheme, AllReduce):
            ok = (dp > 1) | (scheme.algorithm == "ring")
            if scheme.algorithm == "hierarchical" and choices.algorithm is None:
                # With one rank a node, or one node, it is the ring.
                ok = (local > 1) & (dp > local)
        elif isinstance(scheme, Sharded):
            ok = (dp > 1) & ((pp == 1) | (scheme.stage == 1))
        else:
            spread = scheme.colocated
            ok = (dp > 1) & ((spread == 0) | (np.full(count, cluster.devices) % max(1, spread) == 0))
        legal[:, column] = ok
    division, scheme_index = np.nonzero(legal)
    training = workload.training
    return Space(
        divisions=divisions,
        schemes=schemes,
        division=division,
        scheme=scheme_index,
        precision=precision_of(training.precision, framework),
        boundaries=choices.boundaries,
        layers=workload.model.layers,
        # Ranks of one host have no network to spare: summing first would only copy once more.
        reduce_in_node=cluster.workers[0].nic.kind != "loopback",
    )


def precision_of(compute: Dtype, framework: Framework) -> Precision:
    """Types of a training in `compute`: gradients in the framework's type, or in that of wider compute."""
    if compute in ("fp32", "tf32", "fp64"):
        wide: Dtype = "fp64" if compute == "fp64" else "fp32"
        return Precision(compute=compute, gradient=wide, optimizer=wide)
    return Precision(compute=compute, gradient=framework.gradient_dtype, optimizer="fp32")


def local_peers(divisions: Divisions, devices_per_node: int) -> Ints:
    """Data-parallel peers of a rank in its own node, itself included (`node_peers`, for every division)."""
    inner = np.where(divisions.order == 0, divisions.tp, divisions.tp * divisions.pp)
    fits = devices_per_node % inner == 0
    return np.where(fits, np.gcd(divisions.dp, devices_per_node // inner), 1)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _among(options: Iterable[int], fixed: int | None) -> list[int]:
    return [option for option in options if fixed is None or option == fixed]


def _divisions(workload: Workload, cluster: Cluster, framework: Framework, choices: Choices) -> Divisions:
    rows = list(_division_rows(workload, cluster, framework, choices))
    table = np.array(rows, np.int64).reshape(len(rows), 10).T
    return Divisions(
        dp=table[0], tp=table[1], pp=table[2], micro_batch=table[3], micro_batches=table[4],
        virtual_stages=table[5], sequence_parallel=table[6].astype(np.bool_), recompute=table[7], schedule=table[8],
        order=table[9],
    )  # fmt: skip


def _division_rows(
    workload: Workload, cluster: Cluster, framework: Framework, choices: Choices
) -> Iterator[tuple[int, ...]]:
    model, training = workload.model, workload.training
    devices = cluster.devices
    order = ORDERS.index(choices.order or "tp-dp-pp")
    recomputes = [
        index
        for index, name in enumerate(RECOMPUTES)
        if choices.recompute in (None, name)
        # With flash attention there is nothing left to recompute selectively.
        and (name != "selective" or framework.attention == "unfused" or choices.recompute == name)
    ]
    for tp in _among(_divisors(devices), choices.tp):
        if not model.splits_over(tp) or tp > max(2 * cluster.devices_per_node, choices.tp or 0):
            continue
        for pp in _among(_divisors(devices // tp), choices.pp):
            dp = devices // (tp * pp)
            if pp > model.layers or (choices.dp is not None and dp != choices.dp):
                continue
            for size, count in _micro_batches(training.global_batch, dp, choices.micro_batch):
                for schedule, virtual in _schedules(model.layers, pp, count, choices):
                    for sp in (False, True):
                        if choices.sequence_parallel not in (None, sp):
                            continue
                        if sp and (tp == 1 or (training.sequence * size) % tp != 0):
                            continue
                        for recompute in recomputes:
                            yield dp, tp, pp, size, count, virtual, int(sp), recompute, schedule, order


def _micro_batches(global_batch: int, dp: int, fixed: int | None) -> Iterator[tuple[int, int]]:
    """Micro-batch sizes and counts: powers of two that divide a rank's batch; a size that the user fixed may leave a
    smaller last one."""
    if fixed is not None:
        share = -(-global_batch // dp)
        if global_batch >= dp and fixed <= share:
            yield fixed, -(-share // fixed)
        return
    if global_batch % dp != 0:
        return
    share = global_batch // dp
    size = 1
    while size <= min(share, _LARGEST_MICRO_BATCH):
        if share % size == 0:
            yield size, share // size
        size *= 2


def _schedules(layers: int, pp: int, count: int, choices: Choices) -> Iterator[tuple[int, int]]:
    """(schedule, virtual stages) pairs."""
    asked, virtual = choices.schedule, choices.virtual_stages
    fits = choices.boundaries is None or len(choices.boundaries) == pp * (virtual or 1)
    if asked in (None, "1f1b") and virtual in (None, 1) and fits:
        yield SCHEDULES.index("1f1b"), 1
    if asked == "gpipe" and virtual in (None, 1) and fits:
        yield SCHEDULES.index("gpipe"), 1
    if asked in (None, "interleaved") and pp > 1 and count % pp == 0:
        for chunks in range(2, min(layers // pp, max(_MOST_VIRTUAL_STAGES, virtual or 0)) + 1):
            named = choices.boundaries is not None and len(choices.boundaries) == pp * chunks
            if (layers % (pp * chunks) == 0 or named) and virtual in (None, chunks):
                yield SCHEDULES.index("interleaved"), chunks


def _schemes(cluster: Cluster, choices: Choices) -> Iterator[Scheme]:
    bucket = choices.bucket_bytes or BUCKET_BYTES
    if "allreduce" in choices.families:
        for algorithm in ALGORITHMS:
            if choices.algorithm in (None, algorithm):
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
