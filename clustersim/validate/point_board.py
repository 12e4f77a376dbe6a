"""Figures of scored points: errors, and whether schemes that answer one question come out in the right order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from clustersim.validate.family import Family
from clustersim.validate.point import Point, Points


@dataclass(frozen=True, slots=True, kw_only=True)
class PointSummary:
    """Errors of n points, predicted / measured - 1. `seen`: of points whose source the profile was built from, which
    prove nothing but that the profile holds them; they are never mixed with the others."""

    system: str
    seen: bool
    n: int
    mean: float
    median: float
    p90: float
    bias: float
    worst: float
    worst_id: str
    covered: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """One question that several schemes answered: the fastest as measured and as predicted, whether the whole order is
    right, and by how much our pick is slower than the best."""

    group: str
    schemes: int
    measured: str
    predicted: str
    order: bool
    regret: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ordering:
    """All contests of a family. `pairs_right` of `pairs`: of two schemes, the faster one was predicted to be: on which
    side of their crossover a question lies."""

    contests: tuple[Contest, ...]
    pairs: int
    pairs_right: int

    @property
    def orders_right(self) -> int:
        """Contests whose whole order is right."""
        return sum(one.order for one in self.contests)

    @property
    def best_right(self) -> int:
        """Contests whose fastest scheme is predicted to be the fastest."""
        return sum(one.measured == one.predicted for one in self.contests)

    @property
    def regret(self) -> float:
        """The mean over contests."""
        return float(np.mean([one.regret for one in self.contests]))


@dataclass(frozen=True, slots=True, kw_only=True)
class PointScores:
    """A family of points, or a file (`family` None), scored: figures by system, and of all systems together."""

    name: str
    family: Family | None
    points: Points
    systems: tuple[PointSummary, ...]
    together: tuple[PointSummary, ...]
    ordering: Ordering | None


def score_points(found: Points, family: Family | None) -> PointScores:
    """The figures of points."""
    return PointScores(
        name=found.name, family=family, points=found, systems=summaries(found.points),
        together=tuple(_summary("all", seen, mine) for seen in (False, True)
                       if (mine := [point for point in found.points if point.seen == seen])),
        ordering=ordering(found.points),
    )  # fmt: skip


def summaries(points: Sequence[Point]) -> tuple[PointSummary, ...]:
    """One summary for each system, those in the profile apart."""
    groups: dict[tuple[str, bool], list[Point]] = defaultdict(list)
    for point in points:
        groups[point.system, point.seen].append(point)
    return tuple(_summary(system, seen, mine) for (system, seen), mine in sorted(groups.items()))


def _summary(system: str, seen: bool, points: Sequence[Point]) -> PointSummary:
    errors = np.array([point.error for point in points])
    sizes = np.abs(errors)
    worst = int(np.argmax(sizes))
    return PointSummary(
        system=system, seen=seen, n=len(points), mean=float(sizes.mean()), median=float(np.median(sizes)),
        p90=float(np.quantile(sizes, 0.9)), bias=float(errors.mean()), worst=float(errors[worst]),
        worst_id=points[worst].id, covered=float(np.mean([point.covered for point in points])),
    )  # fmt: skip


def ordering(points: Sequence[Point]) -> Ordering | None:
    """Contests of at least two schemes; None without any."""
    groups: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        if point.group:
            groups[point.group].append(point)
    contests, pairs, right = [], 0, 0
    for group, members in groups.items():
        if len({point.scheme for point in members}) < 2:
            continue
        for one, other in combinations(members, 2):
            if one.measured == other.measured:
                continue
            pairs += 1
            right += (one.measured < other.measured) == (one.predicted < other.predicted)
        measured = sorted(members, key=lambda point: point.measured)
        predicted = sorted(members, key=lambda point: point.predicted)
        contests.append(
            Contest(
                group=group, schemes=len(members), measured=measured[0].scheme, predicted=predicted[0].scheme,
                order=[point.scheme for point in measured] == [point.scheme for point in predicted],
                regret=predicted[0].measured / measured[0].measured - 1.0,
            )
        )  # fmt: skip
    return Ordering(contests=tuple(contests), pairs=pairs, pairs_right=right) if contests else None
