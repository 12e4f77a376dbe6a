"""Configurations of cases: which cases repeat one, and which few of them stand for all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clustersim.calibrate.steps import Step
from clustersim.validate.case import Case
from clustersim.workload.parameters import parameter_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """Rows that repeat a configuration: how many, of how many configurations, and the mean deviation of their measured
    times from the median of the configuration: what no prediction can be better than."""

    rows: int
    configurations: int
    spread: float


def configuration(case: Case) -> str:
    """What a case asks, its name apart."""
    return repr(sorted((key, repr(value)) for key, value in case.scenario.items() if key != "name"))


def repeats(cases: Sequence[Case]) -> Repeats | None:
    """The spread of measured times among cases of one configuration; None where none is repeated."""
    groups: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        groups[configuration(case)].append(case.measured_s)
    several = [np.array(group) for group in groups.values() if len(group) > 1]
    if not several:
        return None
    off = np.concatenate([np.abs(group / np.median(group) - 1.0) for group in several])
    return Repeats(rows=len(off), configurations=len(several), spread=float(off.mean()))


def spread_out(steps: Sequence[Step], count: int) -> list[int]:
    """`count` of `steps` that stand for all: one after the other, the one that most shortens the way from every step to
    the nearest chosen (greedy k-medians); the first of several alike. Measured times play no role.

    Distances are between logarithms of GPUs, parameters, degrees, micro-batch, tokens and micro-batches a step, and
    whether anything is recomputed, each over its standard deviation. O(count * steps^2).
    """
    points = np.array([_place(step) for step in steps])
    points = (points - points.mean(axis=0)) / np.where(points.std(axis=0) > 0.0, points.std(axis=0), 1.0)
    ways = np.sqrt(((points[:, None] - points[None]) ** 2).sum(axis=2))
    nearest = np.full(len(points), float(ways.max()) + 1.0)
    chosen: list[int] = []
    while len(chosen) < count and float(nearest.max()) > 1e-9:
        chosen.append(int(np.argmin(np.minimum(nearest, ways).sum(axis=1).round(9))))
        nearest = np.minimum(nearest, ways[chosen[-1]])
    return chosen


def _place(step: Step) -> list[float]:
    workload, layout = step.question.workload, step.space.layout(0)
    mesh, training = layout.mesh, workload.training
    sides = (
        mesh.dp * mesh.tp * mesh.pp * mesh.cp, parameter_count(workload.model), mesh.tp, mesh.pp, mesh.cp,
        layout.micro_batch, training.sequence, layout.micro_batches(training.global_batch),
    )  # fmt: skip
    return [*np.log2(sides).tolist(), {"none": 0.0, "selective": 1.0, "full": 2.0}[layout.recompute]]
