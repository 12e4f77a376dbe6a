"""What is predicted of a case, beside what was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.estimate.estimate import estimate
from clustersim.hardware.framework import Framework
from clustersim.layout.layout import Layout, describe
from clustersim.layout.memory import footprint
from clustersim.layout.space import layouts
from clustersim.program.lower import lower
from clustersim.scenario.load import question
from clustersim.scenario.question import Question
from clustersim.search.search import choices_of, spread_of
from clustersim.simulate.simulate import simulate
from clustersim.validate.case import Case, Unmapped


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A case with its prediction. `spread`: half-width of the 90 % interval, relative; `coverage`: measured fraction of
    kernel time; `predicted_bytes`: memory of the fullest worker, `fits`: whether the layout is called feasible."""

    case: Case
    layout: str
    predicted_s: float
    spread: float
    coverage: float
    predicted_bytes: float
    fits: bool

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted_s / self.case.measured_s - 1.0

    @property
    def covered(self) -> bool:
        """Whether the measured time lies in the 90 % interval."""
        return self.predicted_s / (1 + self.spread) <= self.case.measured_s <= self.predicted_s * (1 + self.spread)


def asked(case: Case, framework: Framework | None = None) -> tuple[Question, Layout, float, bool, float]:
    """(question, layout, worker bytes, fits, coverage) of a case; ClustersimError where the product refuses it."""
    found = question(case.scenario, case.id)
    space = layouts(found.workload, found.cluster, found.framework, choices_of(found))
    if not len(space):
        raise ClustersimError("the layout is not legal here")
    estimated = estimate(found.workload, space, found.cluster, found.framework)
    row = int(np.argmin(estimated.step_s))
    used = float(footprint(found.workload, space, found.framework).worker[row])
    capacity = min(m.device.memory_bytes for m in found.cluster.workers if m.device is not None)
    return found, space.layout(row), used, used <= capacity, float(estimated.coverage[row])


def score(case: Case, framework: Callable[[Framework], Framework] | None = None) -> Scored | Unmapped:
    """Predict one case. `framework` may replace constants of the framework (a calibration, an ablation)."""
    try:
        found, layout, used, fits, coverage = asked(case)
        software = found.framework if framework is None else framework(found.framework)
        program = lower(found.workload, layout, software, found.cluster.devices_per_node)
        step = simulate(program, found.cluster, software).step_s
    except ClustersimError as error:
        return Unmapped(id=case.id, line=case.line, reason=str(error).removeprefix(f"{case.id}: "))
    return Scored(
        case=case, layout=describe(layout), predicted_s=step, spread=spread_of(found), coverage=coverage,
        predicted_bytes=used, fits=fits,
    )  # fmt: skip


def score_all(cases: Sequence[Case], tell: Callable[[str], None]) -> Iterator[Scored | Unmapped]:
    """Predict all cases, on all cores; in order. Progress goes to `tell`."""
    workers = min(os.cpu_count() or 1, max(1, len(cases) // 8))
    begun = time.perf_counter()
    if workers == 1:
        results: Iterable[Scored | Unmapped] = map(score, cases)
        yield from _told(results, len(cases), begun, tell)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from _told(pool.map(score, cases, chunksize=4), len(cases), begun, tell)


def _told(
    results: Iterable[Scored | Unmapped], count: int, begun: float, tell: Callable[[str], None]
) -> Iterator[Scored | Unmapped]:
    for number, result in enumerate(results, start=1):
        tell(f"{number} of {count} runs predicted, {time.perf_counter() - begun:.0f} s")
        yield result
