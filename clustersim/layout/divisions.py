"""Divisions of the computation: every legal way to give each rank its part of the work, as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster
from clustersim.hardware.framework import Framework
from clustersim.layout.choices import Choices
from clustersim.layout.ends import end_loads
from clustersim.layout.layout import RankOrder, Recompute, Schedule
from clustersim.layout.split import splits
from clustersim.workload.training import Workload

Ints = NDArray[np.int64]

RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")
ORDERS: tuple[RankOrder, ...] = ("tp-dp-pp", "tp-pp-dp")
_MOST_VIRTUAL_STAGES = 8
LARGEST_MICRO_BATCH = 64
# Of one replica in a step: each is simulated.
MOST_MICRO_BATCHES = 2**16
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


def every_division(
    workload: Workload, cluster: Cluster, framework: Framework, choices: Choices
) -> tuple[Divisions, tuple[tuple[int, ...], ...]]:
    """All legal divisions, and the boundaries that their `split` indexes. O(divisions)."""
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
            if framework.attention == "unfused" or sequence % (2 * cp) != 0:
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
        if global_batch >= dp and fixed <= share and share <= fixed * MOST_MICRO_BATCHES:
            yield fixed, -(-share // fixed)
        return
    if global_batch % dp != 0:
        return
    share = global_batch // dp
    size = 1
    while size <= min(share, LARGEST_MICRO_BATCH):
        if share % size == 0 and share <= size * MOST_MICRO_BATCHES:
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


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _among(options: Iterable[int], fixed: int | None) -> list[int]:
    return [option for option in options if fixed is None or option == fixed]
