"""Predictions calibrated on a few rows of a source, a cluster and a framework, scored on the other rows."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from clustersim.calibrate.constants import STEP_PRIORS, Free
from clustersim.calibrate.fit import Change
from clustersim.calibrate.steps import Step, StepFit, fit_nested, simulated_s
from clustersim.errors import ClustersimError
from clustersim.estimate.estimate import estimate
from clustersim.hardware.calibration import ConstantName, Trade
from clustersim.layout.space import layouts
from clustersim.scenario.load import question
from clustersim.search.search import choices_of
from clustersim.validate.case import Case, Unmapped
from clustersim.validate.configurations import Repeats, configuration, repeats, spread_out
from clustersim.validate.family import Family, Rows
from clustersim.validate.score import Scored, illegal, score
from clustersim.validate.scoreboard import Summary, summary

# Sources of so many rows or fewer are scored by leaving one configuration out at a time.
SMALL = 16
# Fewer configurations than these cannot be calibrated and scored at all.
FEWEST = 4

Method = Literal["k rows", "leave-one-out", "too few"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A fitted constant: its value over that from before (a slowdown: its value), and its standard error."""

    name: ConstantName
    value: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedScore:
    """Rows of one source on one cluster under one framework: `k` of them calibrated (all but one configuration at a
    time where `method` is leave-one-out), and the figures of the others, as shipped and calibrated. `repeats`: of the
    rows; `stated`: what is known of the spread of repeated measurements where rows do not repeat.

    `free`: the set of constants that the calibrated rows chose (none: the profile stays as shipped), and `inner` the
    mean error of each set among those rows alone, one left out at a time. `constants` were identified; `kept` were not.
    Where one configuration is left out at a time, these are of a fit to all rows.
    """

    family: str
    cluster: str
    method: Method
    k: int
    shipped: Summary | None
    calibrated: Summary | None
    repeats: Repeats | None
    stated: float | None
    constants: tuple[Constant, ...]
    kept: tuple[ConstantName, ...]
    free: Free
    inner: Mapping[Free, float]
    trades: tuple[Trade, ...]
    rows: tuple[Scored, ...]
    fitted_on: tuple[str, ...]


def step_of(case: Case) -> Step | Unmapped:
    """A case as a step to calibrate on, under its framework as shipped; why not, where the product refuses it."""
    try:
        asked = question(case.scenario, case.id, calibrated=False)
        space = layouts(asked.workload, asked.cluster, asked.framework, choices_of(asked))
        if not len(space):
            raise illegal(asked)
        best = int(np.argmin(estimate(asked.workload, space, asked.cluster, asked.framework).step_s))
    except ClustersimError as error:
        return Unmapped(id=case.id, line=case.line, reason=str(error).removeprefix(f"{case.id}: "))
    return Step(
        name=case.id, question=asked, framework=asked.framework, space=space.subset(np.array([best])),
        measured_s=case.measured_s,
    )  # fmt: skip


def validate_calibrated(
    sets: Sequence[tuple[Rows, Family | None]], k: int, tell: Callable[[str], None]
) -> list[CalibratedScore]:
    """Calibrate on `k` rows of every (source, cluster, framework) and score the others. Minutes for all shipped
    families, on all cores; progress goes to `tell`."""
    tasks = []
    for rows, _ in sets:
        groups: dict[str, list[Case]] = defaultdict(list)
        for case in rows.cases:
            groups[case.cluster].append(case)
        tasks += [(rows.name, cluster, tuple(cases), k) for cluster, cases in groups.items()]
    begun, result = time.perf_counter(), []
    # The longest first: none begins late and alone.
    order = sorted(range(len(tasks)), key=lambda index: -len(tasks[index][2]))
    found: dict[int, CalibratedScore | None] = {}
    for number, (index, one) in enumerate(zip(order, _mapped([tasks[index] for index in order]), strict=True), start=1):
        found[index] = one
        name, seconds = tasks[index][0], time.perf_counter() - begun
        tell(f"{name}: {number} of {len(tasks)} groups of rows calibrated and scored, {seconds:.0f} s")
    result = [found[index] for index in range(len(tasks))]
    stated = {rows.name: family.repeats.spread for rows, family in sets if family is not None and family.repeats}
    return [replace(one, stated=stated.get(one.family)) for one in result if one is not None]


_Task = tuple[str, str, tuple[Case, ...], int]


def _mapped(tasks: Sequence[_Task]) -> Iterator[CalibratedScore | None]:
    workers = min(os.cpu_count() or 1, len(tasks))
    if workers <= 1:
        yield from map(_scored, tasks)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_scored, tasks)


def _scored(task: _Task) -> CalibratedScore | None:
    family, cluster, cases, k = task
    pairs = [(case, step) for case in cases if isinstance(step := step_of(case), Step)]
    if not pairs:
        return None
    mapped, steps = [case for case, _ in pairs], [step for _, step in pairs]
    if len({configuration(case) for case in mapped}) < FEWEST:
        return _result(family, cluster, "too few", 0, mapped, [], [], None, ())
    if len(mapped) <= SMALL:
        return _leave_one_out(family, cluster, mapped, steps)
    chosen = spread_out(steps, k)
    known = {configuration(mapped[index]) for index in chosen}
    fit = fit_nested([steps[index] for index in chosen])
    others = [case for case in mapped if configuration(case) not in known]
    shipped, calibrated = scored_both((case, fit.change) for case in others)
    names = tuple(mapped[index].id for index in chosen)
    return _result(family, cluster, "k rows", len(chosen), mapped, shipped, calibrated, fit, names)


def _leave_one_out(family: str, cluster: str, mapped: list[Case], steps: list[Step]) -> CalibratedScore:
    """Every configuration predicted with constants fitted to all others."""
    names = [configuration(case) for case in mapped]
    shipped_s = [simulated_s(step, step.framework) for step in steps]
    fits = {}
    for left in dict.fromkeys(names):
        kept = [index for index, name in enumerate(names) if name != left]
        fits[left] = fit_nested([steps[i] for i in kept], shipped_s=[shipped_s[i] for i in kept], rounds=1)
    shipped, calibrated = scored_both((case, fits[name].change) for case, name in zip(mapped, names, strict=True))
    return _result(
        family, cluster, "leave-one-out", len(mapped) - 1, mapped, shipped, calibrated,
        fit_nested(steps, shipped_s=shipped_s, rounds=1), (),
    )  # fmt: skip


def scored_both(cases: Iterable[tuple[Case, Change]]) -> tuple[list[Scored], list[Scored]]:
    """Every case as shipped and calibrated."""
    shipped, calibrated = [], []
    for case, change in cases:
        one, two = score(case), score(case, change)
        if isinstance(one, Scored) and isinstance(two, Scored):
            shipped.append(one)
            calibrated.append(two)
    return shipped, calibrated


def _result(
    family: str,
    cluster: str,
    method: Method,
    k: int,
    mapped: list[Case],
    shipped: list[Scored],
    calibrated: list[Scored],
    fit: StepFit | None,
    names: tuple[str, ...],
) -> CalibratedScore:
    return CalibratedScore(
        family=family, cluster=cluster, method=method, k=k, shipped=summary(shipped) if shipped else None,
        calibrated=summary(calibrated) if calibrated else None, repeats=repeats(mapped), stated=None,
        constants=constants_of(fit) if fit is not None else (),
        kept=tuple(n for n in STEP_PRIORS if fit.status.get(n, "kept") == "kept") if fit is not None else (),
        free=fit.free if fit is not None else "none", inner=fit.inner if fit is not None else {},
        trades=fit.trades if fit is not None else (), rows=tuple(calibrated), fitted_on=names,
    )  # fmt: skip


def constants_of(fit: StepFit) -> tuple[Constant, ...]:
    """The identified constants: factors on the value from before (a slowdown: the value)."""
    found = []
    for name, at in zip(fit.names, fit.solution.values.tolist(), strict=True):
        if fit.status[name] != "kept":
            value = float(np.exp(at)) if name == "compute_scale" or name.startswith("scales.") else at
            error = fit.errors[name] * (value if name == "compute_scale" or name.startswith("scales.") else 1.0)
            found.append(Constant(name=name, value=value, error=error))
    return tuple(found)
