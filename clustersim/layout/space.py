"""The space of layouts: every legal way to divide the work, as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster
from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import BYTES_OF, Dtype
from clustersim.layout.auto import auto_algorithms
from clustersim.layout.choices import Choices
from clustersim.layout.ends import end_loads
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
    family,
)
from clustersim.layout.split import splits
from clustersim.workload.training import Workload

Ints = NDArray[np.int64]

RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")
ORDERS: tuple[RankOrder, ...] = ("tp-dp-pp", "tp-pp-dp")
FAMILIES: tuple[Family, ...] = ("allreduce", "sharded", "parameter-server")
# A single tree sends half as much again as two, and waits as long: only on request, as GPipe.
ALGORITHMS: tuple[Algorithm, ...] = ("ring", "tree", "hierarchical", "halving-doubling", "nvls", "sharp")
BUCKET_BYTES = 25.0 * 2**20
# BytePS's default partition.
PARTITION_BYTES = 4_096_000.0
_MOST_VIRTUAL_STAGES = 8
_LARGEST_MICRO_BATCH = 64
# Tokens of a sequence that a context-parallel rank keeps at least, unless cp is named.
_LEAST_CONTEXT = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Divisions:
    """Ways to divide the computation, one a row; `recompute`, `schedule`, `order` index the tuples above, `split` the
    boundaries of `Space.splits`."""

    dp: Ints
    tp: Ints
    pp: Ints
    cp: Ints
    ep: Ints
    micro_batch: Ints
    micro_batches: Ints
    virtual_stages: Ints
    sequence_parallel: NDArray[np.bool_]
    recompute: Ints
    schedule: Ints
    order: Ints
    split: Ints

    def __len__(self) -> int:
        return len(self.dp)

    @property
    def replicas(self) -> Ints:
        """Ranks that hold the same dense weights: dp * cp."""
        return self.dp * self.cp


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Space:
    """Every legal layout: row r divides the work as `divisions` row `division[r]` and synchronises by
    `schemes[scheme[r]]`."""

    divisions: Divisions
    schemes: tuple[Scheme, ...]
    division: Ints
    scheme: Ints
    precision: Precision
    splits: tuple[tuple[int, ...], ...]
    layers: int
    reduce_in_node: bool

    def __len__(self) -> int:
        return len(self.division)

    def layout(self, row: int) -> Layout:
        """Row `row` as a Layout."""
        d, i = self.divisions, int(self.division[row])
        pp, virtual = int(d.pp[i]), int(d.virtual_stages[i])
        return Layout(
            mesh=Mesh(dp=int(d.dp[i]), tp=int(d.tp[i]), pp=pp, cp=int(d.cp[i]), ep=int(d.ep[i])),
            micro_batch=int(d.micro_batch[i]),
            sequence_parallel=bool(d.sequence_parallel[i]),
            pipeline=Pipeline(
                schedule=SCHEDULES[int(d.schedule[i])],
                virtual_stages=virtual,
                boundaries=self.splits[int(d.split[i])],
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
            & (d.cp == mesh.cp)
            & (d.ep == mesh.ep)
            & (d.micro_batch == layout.micro_batch)
            & (d.virtual_stages == layout.pipeline.virtual_stages)
            & (d.sequence_parallel == layout.sequence_parallel)
            & (d.recompute == RECOMPUTES.index(layout.recompute))
            & (d.schedule == SCHEDULES.index(layout.pipeline.schedule))
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
        """How many of `rows` differ in (dp, tp, pp, cp, ep, micro-batch, recompute, schedule, boundaries, family)."""
        if not len(rows):
            return 0
        d = self.divisions
        i = self.division[rows]
        columns = (d.dp, d.tp, d.pp, d.cp, d.ep, d.micro_batch, d.recompute, d.schedule, d.split)
        keys = np.stack([*(column[i] for column in columns), self.family_of()[rows]])
        return int(np.unique(keys, axis=1).shape[1])


def layouts(workload: Workload, cluster: Cluster, framework: Framework, choices: Choices) -> Space:
    """Every legal layout of `workload` on all devices of `cluster`.

    Legal: dp * cp * tp * pp = devices; ep divides dp * cp and the experts, with sequence parallelism where tp > 1, as
    Megatron-LM asks, and without parameter servers; cp divides sequences into even pieces; tp divides heads and
    feed-forward columns and spans at most two nodes; dp times the micro-batch divides the global batch; a stage has at
    least one layer; interleaving has micro-batches in multiples of pp and layers in multiples of pp * virtual stages;
    ZeRO stages 2 and 3 run without a pipeline (they would reduce, and gather, for every micro-batch of every stage).
    GPipe takes as long as 1F1B and more memory, so that it is only considered on request. Layers are split evenly, or
    such that the slowest stage has less to do, where the embedding and the head allow it. O(divisions * schemes).
    """
    divisions, boundaries = _divisions(workload, cluster, framework, choices)
    schemes = tuple(_schemes(cluster, choices))
    count = len(divisions)
    replicas, pp = divisions.replicas, divisions.pp
    legal = np.zeros((count, len(schemes)), np.bool_)
    local = local_peers(divisions, cluster.devices_per_node)
    precision = precision_of(workload.training.precision, framework, choices.gradient)
    automatic = np.empty(0, np.str_)
    if choices.algorithm == "auto":
        groups = {"replicas": replicas, "local": local, "tp": divisions.tp, "pp": pp, "ep": divisions.ep}
        bucket, width = choices.bucket_bytes or BUCKET_BYTES, BYTES_OF[precision.gradient]
        automatic = np.array(auto_algorithms(workload.model, cluster, groups, bucket, width), np.str_)
    for column, scheme in enumerate(schemes):
        if isinstance(scheme, AllReduce):
            ok = (replicas > 1) | (scheme.algorithm == "ring")
            if choices.algorithm == "auto":
                ok = automatic == scheme.algorithm
            elif scheme.algorithm == "hierarchical" and choices.algorithm is None:
                # With one rank a node, or one node, it is the ring.
                ok = (local > 1) & (replicas > local)
            elif scheme.algorithm == "nvls":
                inside = [machine.node.interconnect for machine in cluster.workers]
                ok = (local > 1) & all(wires is not None and wires.reduces for wires in inside)
            elif scheme.algorithm == "sharp":
                ok = (replicas > local) & cluster.fabric.in_network_reduction
        elif isinstance(scheme, Sharded):
            ok = (replicas > 1) & ((pp == 1) | (scheme.stage == 1))
        else:
            spread = scheme.colocated
            ok = (replicas > 1) & ((spread == 0) | (np.full(count, cluster.devices) % max(1, spread) == 0))
            # A server counts on as many pushes of every parameter; experts have fewer holders than the rest.
            ok &= divisions.ep == 1
        legal[:, column] = ok
    division, scheme_index = np.nonzero(legal)
    return Space(
        divisions=divisions,
        schemes=schemes,
        division=division,
        scheme=scheme_index,
        precision=precision,
        splits=boundaries,
        layers=workload.model.layers,
        # Ranks of one host have no network to spare: summing first would only copy once more.
        reduce_in_node=cluster.workers[0].nic.kind != "loopback",
    )


def precision_of(compute: Dtype, framework: Framework, gradient: Dtype | None = None) -> Precision:
    """Types of a training in `compute`: gradients in the type that is asked for, else in the framework's, or in that of
    wider compute."""
    if compute in ("fp32", "tf32", "fp64"):
        wide: Dtype = "fp64" if compute == "fp64" else "fp32"
        return Precision(compute=compute, gradient=gradient or wide, optimizer=wide)
    return Precision(compute=compute, gradient=gradient or framework.gradient_dtype, optimizer="fp32")


def local_peers(divisions: Divisions, devices_per_node: int) -> Ints:
    """Data-parallel peers of a rank in its own node, itself included (`node_peers`, for every division)."""
    inner = np.where(divisions.order == 0, divisions.tp, divisions.tp * divisions.pp)
    fits = devices_per_node % inner == 0
    return np.where(fits, np.gcd(divisions.replicas, devices_per_node // inner), 1)


def holder_peers(divisions: Divisions, devices_per_node: int) -> Ints:
    """Ranks in a rank's own node that hold the same experts, itself included: every ep-th replica."""
    inner = np.where(divisions.order == 0, divisions.tp, divisions.tp * divisions.pp) * divisions.ep
    fits = devices_per_node % inner == 0
    return np.where(fits, np.gcd(divisions.replicas // divisions.ep, np.maximum(1, devices_per_node // inner)), 1)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _among(options: Iterable[int], fixed: int | None) -> list[int]:
    return [option for option in options if fixed is None or option == fixed]


def _divisions(
    workload: Workload, cluster: Cluster, framework: Framework, choices: Choices
) -> tuple[Divisions, tuple[tuple[int, ...], ...]]:
    """All divisions, and the boundaries that they index."""
    known: dict[tuple[int, ...], int] = {}
    rows = [
        (*row, known.setdefault(boundaries, len(known)))
        for row, boundaries in _division_rows(workload, cluster, framework, choices)
    ]
    table = np.array(rows, np.int64).reshape(len(rows), 13).T
    divisions = Divisions(
        dp=table[0], tp=table[1], pp=table[2], micro_batch=table[3], micro_batches=table[4],
        virtual_stages=table[5], sequence_parallel=table[6].astype(np.bool_), recompute=table[7], schedule=table[8],
        order=table[9], cp=table[10], ep=table[11], split=table[12],
    )  # fmt: skip
    return divisions, tuple(known)


def _division_rows(
    workload: Workload, cluster: Cluster, framework: Framework, choices: Choices
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(columns, boundaries) of every division."""
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
        ends_of = [(index, end_loads(workload, cluster, framework, tp, RECOMPUTES[index])) for index in recomputes]
        for pp in _among(_divisors(devices // tp), choices.pp):
            if pp > model.layers:
                continue
            for dp, cp, ep in _replicas(workload, framework, devices // (tp * pp), choices):
                for size, count in _micro_batches(training.global_batch, dp, choices.micro_batch):
                    for schedule, virtual in _schedules(model.layers, pp, count, framework, choices):
                        for sp in _sequence_parallel(tp, ep, training.sequence // cp * size, choices):
                            for recompute, ends in ends_of:
                                row = dp, tp, pp, size, count, virtual, int(sp), recompute, schedule, order, cp, ep
                                stages = (model.layers, SCHEDULES[schedule], pp, virtual)
                                for boundaries in splits(*stages, *ends, choices.boundaries):
                                    yield row, boundaries


def _sequence_parallel(tp: int, ep: int, tokens: int, choices: Choices) -> list[bool]:
    """Without and with: tensor-parallel ranks that share experts would send every token once each without."""
    fits = tp > 1 and tokens % tp == 0
    return [
        sp for sp in (False, True) if choices.sequence_parallel in (None, sp) and (fits if sp else tp == 1 or ep == 1)
    ]


def _replicas(
    workload: Workload, framework: Framework, replicas: int, choices: Choices
) -> Iterator[tuple[int, int, int]]:
    """(dp, cp, ep) of so many replicas.

    Ring attention needs a fused kernel and two equal pieces of every sequence for each rank; unless a degree is named,
    ranks keep `_LEAST_CONTEXT` tokens of a sequence or more: with fewer, attention hides less and less of the sends,
    and splitting a batch or a layer does as well. Ranks that share the experts have as many of them each.
    """
    sequence, experts = workload.training.sequence, workload.model.experts
    for cp in _among(_divisors(replicas), choices.cp):
        if choices.dp not in (None, replicas // cp):
            continue
        if cp > 1:
            if framework.attention != "flash" or sequence % (2 * cp) != 0:
                continue
            if choices.cp is None and sequence // cp < _LEAST_CONTEXT:
                continue
        for ep in _among(_divisors(experts.count) if experts is not None else [1], choices.ep):
            if replicas % ep == 0:
                yield replicas // cp, cp, ep


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


def _schedules(layers: int, pp: int, count: int, framework: Framework, choices: Choices) -> Iterator[tuple[int, int]]:
    """(schedule, virtual stages) pairs: those that the framework runs, where there is a pipeline to run."""
    asked, virtual = choices.schedule, choices.virtual_stages
    named = len(choices.boundaries) if isinstance(choices.boundaries, tuple) else None
    able: tuple[Schedule, ...] = framework.schedules if pp > 1 else ("1f1b", "gpipe")

    def fits(schedule: Schedule, chunks: int) -> bool:
        return schedule in able and virtual in (None, chunks) and named in (None, pp * chunks) and pp * chunks <= layers

    single: tuple[Schedule, ...] = ("1f1b", "gpipe", "zb-h1")
    for schedule in single:
        if (asked == schedule or (asked is None and schedule != "gpipe")) and fits(schedule, 1):
            yield SCHEDULES.index(schedule), 1
    if asked in (None, "interleaved") and pp > 1 and count % pp == 0:
        slots = 2 if choices.boundaries == "slots" else 0
        for chunks in range(2, min(layers // pp, max(_MOST_VIRTUAL_STAGES, virtual or 0)) + 1):
            if ((layers + slots) % (pp * chunks) == 0 or named) and fits("interleaved", chunks):
                yield SCHEDULES.index("interleaved"), chunks
    if asked in (None, "zb-v") and fits("zb-v", 2):
        yield SCHEDULES.index("zb-v"), 2


def _schemes(cluster: Cluster, choices: Choices) -> Iterator[Scheme]:
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
