"""Figures of a family of scored cases: errors, their spread, ranking and regret."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.validate.score import Scored

Floats = NDArray[np.float64]
# Rankings are compared in groups of at least this many layouts.
SMALLEST_GROUP = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Over `groups` of one model, cluster and batch with at least four layouts: mean Spearman correlation, and by how
    much the layout predicted fastest was slower than the truly fastest (mean and largest)."""

    groups: int
    layouts: int
    correlation: float
    regret: float
    worst_regret: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Errors of n cases, predicted / measured - 1: mean, median and 90th percentile of their size, mean with sign, the
    worst; and how many measured times lie in the predicted 90 % interval."""

    n: int
    mean: float
    median: float
    p90: float
    bias: float
    worst: float
    worst_id: str
    covered: float
    ranking: Ranking | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryErrors:
    """Errors of predicted against stated memory, predicted / stated - 1, of n cases."""

    n: int
    mean: float
    median: float
    bias: float
    worst: float
    worst_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySummary:
    """`errors` where the source states memory. Feasibility of the `judged` cases, which ran with all that their layout
    has on the device: how many are called infeasible, and the smallest headroom, which is how far a device's need stays
    below its capacity, relative to it."""

    errors: MemoryErrors | None
    judged: int
    called_infeasible: int
    least_headroom: float
    least_headroom_id: str


def summary(scored: Sequence[Scored]) -> Summary:
    """The figures of at least one scored case."""
    errors = np.array([each.error for each in scored])
    sizes = np.abs(errors)
    worst = int(np.argmax(sizes))
    return Summary(
        n=len(scored), mean=float(sizes.mean()), median=float(np.median(sizes)), p90=float(np.quantile(sizes, 0.9)),
        bias=float(errors.mean()), worst=float(errors[worst]), worst_id=scored[worst].case.id,
        covered=float(np.mean([each.covered for each in scored])), ranking=ranking(scored),
    )  # fmt: skip


def memory_summary(scored: Sequence[Scored]) -> MemorySummary | None:
    """Memory of the cases that state any, and feasibility of all; None where none can be judged."""
    judged = [each for each in scored if not each.case.kept_elsewhere]
    if not judged:
        return None
    tightest = min(judged, key=lambda each: each.headroom)
    return MemorySummary(
        errors=_memory_errors(judged), judged=len(judged), called_infeasible=sum(not each.fits for each in judged),
        least_headroom=tightest.headroom, least_headroom_id=tightest.case.id,
    )  # fmt: skip


def _memory_errors(judged: Sequence[Scored]) -> MemoryErrors | None:
    stated = [(each, each.case.memory_bytes) for each in judged if each.case.memory_bytes]
    if not stated:
        return None
    errors = np.array([each.predicted_bytes / measured - 1.0 for each, measured in stated if measured])
    sizes = np.abs(errors)
    worst = int(np.argmax(sizes))
    return MemoryErrors(
        n=len(errors), mean=float(sizes.mean()), median=float(np.median(sizes)), bias=float(errors.mean()),
        worst=float(errors[worst]), worst_id=stated[worst][0].case.id,
    )  # fmt: skip


def ranking(scored: Sequence[Scored]) -> Ranking | None:
    """Rank correlation and top-1 regret in groups of one model, cluster, framework and batch; None without any."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for each in scored:
        groups[each.case.group].append(each)
    large = [group for group in groups.values() if len({each.layout for each in group}) >= SMALLEST_GROUP]
    if not large:
        return None
    correlations, regrets = [], []
    for group in large:
        predicted = np.array([each.predicted_s for each in group])
        measured = np.array([each.case.measured_s for each in group])
        correlations.append(spearman(predicted, measured))
        regrets.append(float(measured[np.argmin(predicted)] / measured.min() - 1.0))
    return Ranking(
        groups=len(large), layouts=sum(map(len, large)), correlation=float(np.mean(correlations)),
        regret=float(np.mean(regrets)), worst_regret=max(regrets),
    )  # fmt: skip


def spearman(one: Floats, two: Floats) -> float:
    """Spearman's rank correlation, ties at their mean rank; 1 where either is constant."""
    first, second = _ranks(one), _ranks(two)
    if float(np.ptp(first)) == 0.0 or float(np.ptp(second)) == 0.0:
        return 1.0
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    upper = np.cumsum(counts)
    return np.asarray((upper - (counts - 1) / 2.0)[inverse], dtype=np.float64)
