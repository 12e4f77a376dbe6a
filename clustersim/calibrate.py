"""calibrate(): what runs say about the constants of a framework on a kind of cluster, and how surely.

The forward model is the simulator itself. Observed of every program that was run are the step time, and the
summed times of its ops by phase and kind (forward compute, backward compute, all-reduce, push, pull, update). The fit
minimises the squares of ln(predicted / measured), each divided by what it may be off by: 3 % of a step, 10 % of a sum
of ops, and the standard error of the measured median besides. A ridge one hundredth as strong as a prior holds every
constant near its value from before, so that what nothing determines stays there. A host that is never waited for leaves
no trace, so that the descent starts from slower hosts, too, and the best end counts.

A constant counts as identified if its standard error is smaller than itself (a slowdown: than its excess over 1), and
it does not end at the edge of what is possible. The others are put back, the least determined one first, and the rest
is fitted again. Standard errors are the larger of two: from the Jacobian with the residuals' variance, and the
jackknife that leaves out one program at a time (Efron & Stein 1981).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from clustersim import files
from clustersim.compare import Comparison, Figure, Run, compare
from clustersim.errors import InputError
from clustersim.hardware.calibration import (
    CalibratedRun,
    Calibration,
    ConstantName,
    ScaleConstant,
    ScaleName,
    Status,
    TimeConstant,
    TimeName,
    constant_of,
    with_constant,
)
from clustersim.hardware.framework import Framework
from clustersim.hardware.provenance import Provenance
from clustersim.layout.layout import Layout, describe
from clustersim.program.lower import lower
from clustersim.program.program import Program
from clustersim.scenario.question import Question
from clustersim.simulate.simulate import simulate
from clustersim.timeline import OpId, OpKind, Phase

Floats = NDArray[np.float64]
# What is summed up: the ops of one phase and kind, or the step.
Sum = tuple[Phase, OpKind] | Literal["step"]

CONSTANTS: tuple[ConstantName, ...] = (*get_args(ScaleName), *get_args(TimeName))

_STEP_TOLERANCE = 0.03
_OP_TOLERANCE = 0.10
# Sums below this are timer noise.
_SHORTEST_S = 2e-6
_RIDGE = 0.1
# Per-layer host times, as multiples of those from before, from which the descent starts.
_STARTS = (1.0, 3.0, 8.0)
_LARGEST_SCALE, _LARGEST_SLOWDOWN, _LONGEST_S = 30.0, 5.0, 1.0
_SMALLEST_UNIT_S = 2e-5
_ROUNDS = 30
# How much worse (in chi squared) a fit may be with a constant put back: 3 standard errors.
_EXCLUDED = 9.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """The calibration to save, and the framework with it applied."""

    calibration: Calibration
    framework: Framework


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One program that was run: what was measured of its joined ops, each with what a prediction may be off by."""

    question: Question
    layout: Layout
    program: Program
    runs: tuple[Run, ...]
    joined: frozenset[OpId]
    step_s: float
    measured: Mapping[Sum, float]
    tolerance: Mapping[Sum, float]


def calibrate(pairs: Sequence[tuple[Question, Layout, Run]]) -> Calibrated:
    """Fit the constants of the one framework, on the one kind of cluster, that all `pairs` are about.

    Runs of one program are taken together. O(constants^2 * programs) simulations, of some milliseconds each.
    InputError where there is no run, where clusters or frameworks differ, or where a run is of another program.
    """
    cases = _cases(pairs)
    framework = pairs[0][0].framework
    fit = _Fit(cases, framework)
    solution, errors, status = fit.eliminate()
    after = fit.framework_at(solution.values)
    before_s = [_predicted(case, framework)["step"] for case in cases]
    after_s = [_predicted(case, after)["step"] for case in cases]
    left_out_s = fit.left_out(solution)
    runs = tuple(
        CalibratedRun(
            model=case.question.workload.model.name,
            layout=describe(case.layout),
            program_digest=case.runs[0].program_digest,
            run_digests=tuple(files.digest(run) for run in case.runs),
            step_s=case.step_s,
            error_before=first / case.step_s - 1.0,
            error_after=second / case.step_s - 1.0,
            error_left_out=third / case.step_s - 1.0,
        )
        for case, first, second, third in zip(cases, before_s, after_s, left_out_s, strict=True)
    )
    calibration = Calibration(
        nodes=_nodes(cases[0].question),
        framework=framework.name,
        constants=tuple(_constant(name, framework, solution, errors, fit.doubt, status) for name in CONSTANTS),
        runs=runs,
        mean_error_before=_mean(abs(run.error_before) for run in runs),
        mean_error_after=_mean(abs(run.error_after) for run in runs),
        mean_error_left_out=_mean(abs(run.error_left_out) for run in runs),
        provenance=_provenance(cases),
    )
    return Calibrated(calibration=calibration, framework=calibration.applied(framework))


# --------------------------------------------------------------------------------------------------------- cases


def _cases(pairs: Sequence[tuple[Question, Layout, Run]]) -> tuple[_Case, ...]:
    if not pairs:
        raise InputError("calibrating needs at least one run; measure one with `clustersim run`")
    first = pairs[0][0]
    found: dict[str, tuple[Question, Layout, Program, list[Run]]] = {}
    for question, layout, run in pairs:
        if _nodes(question) != _nodes(first):
            raise InputError(
                f"runs on {' + '.join(_nodes(first))} and on {' + '.join(_nodes(question))}: "
                "calibrate each kind of cluster on its own"
            )
        if question.framework != first.framework:
            raise InputError(
                f"runs with the frameworks {first.framework.name} and {question.framework.name}, "
                "or with constants that differ: calibrate each on its own"
            )
        if run.program_digest not in found:
            program = lower(question.workload, layout, question.framework, question.cluster.devices_per_node)
            digest = files.digest(program)
            if digest != run.program_digest:
                raise InputError(
                    f"a run of {question.workload.model.name}, {describe(layout)} is of another program "
                    f"({run.program_digest[:12]}, not {digest[:12]}); give the plan that was run"
                )
            found[run.program_digest] = (question, layout, program, [])
        found[run.program_digest][3].append(run)
    return tuple(_case(question, layout, program, tuple(runs)) for question, layout, program, runs in found.values())


def _nodes(question: Question) -> tuple[str, ...]:
    return tuple(sorted({machine.node.name for machine in question.cluster.workers}))


def _case(question: Question, layout: Layout, program: Program, runs: tuple[Run, ...]) -> _Case:
    """What was measured of a program: medians over its runs of the medians over their steps."""
    predicted = simulate(program, question.cluster, question.framework).timeline()
    found: dict[Sum, list[tuple[float, float]]] = {}
    joined: set[OpId] = set()
    for run in runs:
        comparison = compare(predicted, run.timeline, step_s=run.step_s)
        joined.update(row.op for row in comparison.ops)
        for key, (seconds, error) in _sums(comparison).items():
            found.setdefault(key, []).append((seconds, error))
    measured, tolerance = {}, {}
    for key, values in found.items():
        if len(values) < len(runs):
            continue
        seconds = float(np.median([value for value, _ in values]))
        noise = float(np.sqrt(np.mean([(error / value) ** 2 for value, error in values]) / len(values)))
        if len(values) > 1:
            noise = max(noise, float(np.std([value for value, _ in values], ddof=1)) / seconds / math.sqrt(len(values)))
        measured[key] = seconds
        tolerance[key] = math.hypot(_STEP_TOLERANCE if key == "step" else _OP_TOLERANCE, noise)
    return _Case(
        question=question, layout=layout, program=program, runs=runs, joined=frozenset(joined),
        step_s=measured["step"], measured=measured, tolerance=tolerance,
    )  # fmt: skip


def _sums(comparison: Comparison) -> dict[Sum, tuple[float, float]]:
    """Measured seconds of the step and of the joined ops by phase and kind, with the standard error of each."""
    found: dict[Sum, tuple[float, float]] = {"step": (comparison.step.measured_s, _standard_error(comparison.step))}
    for row in comparison.ops:
        key = (row.op.phase, row.op.kind)
        seconds, error = found.get(key, (0.0, 0.0))
        found[key] = (seconds + row.seconds.measured_s, math.hypot(error, _standard_error(row.seconds)))
    return {key: (seconds, error) for key, (seconds, error) in found.items() if seconds > _SHORTEST_S}


def _standard_error(figure: Figure) -> float:
    """Of a median of nearly normal samples: 1.25 sigma / sqrt(n), and 10 % to 90 % span 2.56 sigma."""
    return 1.25 * (figure.high_s - figure.low_s) / 2.56 / math.sqrt(max(1, figure.samples))


def _predicted(case: _Case, framework: Framework) -> dict[Sum, float]:
    simulated = simulate(case.program, case.question.cluster, framework)
    found: dict[Sum, float] = {"step": simulated.step_s}
    for span in simulated.timeline().spans:
        if span.op in case.joined:
            key = (span.op.phase, span.op.kind)
            found[key] = found.get(key, 0.0) + span.end_s - span.start_s
    return found


# --------------------------------------------------------------------------------------------------------- fitting


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Solution:
    """Coordinates of all constants, those that were fitted, and the residuals and Jacobian (by coordinate) there."""

    values: Floats
    free: list[int]
    residuals: Floats
    jacobian: Floats
    chi2: float


class _Fit:
    """Damped Gauss-Newton (Levenberg 1944, Marquardt 1963) on bounded coordinates.

    Coordinates: the logarithm of a scale, the slowdown itself, a time in units of its value from before.
    """

    def __init__(self, cases: tuple[_Case, ...], framework: Framework) -> None:
        self.cases = cases
        self.base = framework
        self.start = np.array([_coordinate(framework, name, constant_of(framework, name)) for name in CONSTANTS])
        low, high, spread = zip(*(_range(framework, name) for name in CONSTANTS), strict=True)
        self.low, self.high = np.array(low), np.array(high)
        self.spread = np.array(spread)
        self.rows = [(index, key) for index, case in enumerate(cases) for key in case.measured]
        self.case_of = np.array([index for index, _ in self.rows])
        self.doubt: dict[ConstantName, float] = {}
        self._seen: dict[bytes, Floats] = {}

    def framework_at(self, values: Floats) -> Framework:
        """The framework with the constants at these coordinates."""
        result = self.base
        for name, value in zip(CONSTANTS, values, strict=True):
            result = with_constant(result, name, _value(self.base, name, float(value)))
        return result

    def residuals(self, values: Floats) -> Floats:
        """ln(predicted / measured) over its tolerance, for every observation. One simulation per program."""
        key = values.tobytes()
        found = self._seen.get(key)
        if found is None:
            framework = self.framework_at(values)
            predicted = [_predicted(case, framework) for case in self.cases]
            found = self._seen[key] = np.array([
                math.log(max(predicted[index][what], _SHORTEST_S) / self.cases[index].measured[what])
                / self.cases[index].tolerance[what]
                for index, what in self.rows
            ])  # fmt: skip
        return found

    def _slopes(self, values: Floats, free: list[int], sign: float = 1.0) -> Floats:
        """Finite differences in one direction (the other at an edge), wide enough to see past rounding."""
        here = self.residuals(values)
        columns = []
        for index in free:
            width = 0.02 * max(1.0, abs(values[index]) if CONSTANTS[index].startswith("host") else 1.0) * sign
            if not self.low[index] <= values[index] + width <= self.high[index]:
                width = -width
            moved = values.copy()
            moved[index] += width
            columns.append((self.residuals(moved) - here) / width)
        return np.array(columns).T.reshape(len(here), len(free))

    def _sure_slopes(self, values: Floats, free: list[int]) -> Floats:
        """The flatter of the slopes to either side. On the edge of a maximum (host against device) one of them is
        zero, and the constant may as well lie beyond."""
        up, down = self._slopes(values, free), self._slopes(values, free, -1.0)
        return np.where(np.abs(up) < np.abs(down), up, down)

    def first(self) -> _Solution:
        """The best coordinates, from several starts."""
        starts = []
        for factor in _STARTS:
            values = self.start.copy()
            for name in ("host.per_layer_forward", "host.per_layer_backward"):
                index = CONSTANTS.index(name)
                values[index] = min(factor * max(1.0, values[index]), self.high[index])
            starts.append(values if factor > 1.0 else self.start)
        return min((self.solve({}, values) for values in starts), key=lambda solution: solution.chi2)

    def solve(self, fixed: Mapping[int, float], start: Floats) -> _Solution:
        """The best coordinates near `start` with some of them fixed."""
        free = [index for index in range(len(CONSTANTS)) if index not in fixed]
        values = start.copy()
        for index, value in fixed.items():
            values[index] = value
        damping, cost = 1e-3, self._cost(values)
        slopes = self._slopes(values, free)
        for _ in range(_ROUNDS):
            step = self._step(values, free, slopes, damping)
            moved = values.copy()
            moved[free] = np.clip(values[free] + step, self.low[free], self.high[free])
            new = self._cost(moved)
            if new < cost:
                small = cost - new < 1e-6 * cost or float(np.abs(moved - values).max()) < 1e-5
                values, cost, damping = moved, new, damping / 5.0
                slopes = self._slopes(values, free)
                if small:
                    break
            else:
                damping *= 6.0
                if damping > 1e6:
                    break
        residuals = self.residuals(values)
        return _Solution(
            values=values, free=free, residuals=residuals, jacobian=slopes, chi2=float(residuals @ residuals)
        )

    def _cost(self, values: Floats) -> float:
        residuals = self.residuals(values)
        pull = _RIDGE * (values - self.start) / self.spread
        return float(residuals @ residuals + pull @ pull)

    def _step(self, values: Floats, free: list[int], slopes: Floats, damping: float) -> Floats:
        ridge = (_RIDGE / self.spread[free]) ** 2
        normal = slopes.T @ slopes + np.diag(ridge)
        gradient = slopes.T @ self.residuals(values) + ridge * (values - self.start)[free]
        # Directions out of the allowed range are closed.
        open_ = ~(((values <= self.low)[free] & (gradient > 0.0)) | ((values >= self.high)[free] & (gradient < 0.0)))
        step = np.zeros(len(free))
        if open_.any():
            part = normal[np.ix_(open_, open_)]
            step[open_] = -np.linalg.solve(part + damping * np.diag(np.diag(part)), gradient[open_])
        return step

    # ------------------------------------------------------------------------------------------- uncertainty

    def standard_errors(self, solution: _Solution) -> Floats:
        """Of the free coordinates: the larger of the Jacobian's and the jackknife's; infinite without any data."""
        if not solution.free:
            return np.empty(0)
        slopes = self._sure_slopes(solution.values, solution.free)
        spare = len(solution.residuals) - len(solution.free)
        variance = solution.chi2 / spare if spare > 0 else math.inf
        normal = slopes.T @ slopes
        size = np.sqrt(np.diag(normal))
        known = size > 1e-9
        result = np.full(len(solution.free), math.inf)
        if known.any():
            scaled = normal[np.ix_(known, known)] / np.outer(size[known], size[known])
            inverse = np.linalg.inv(scaled + 1e-10 * np.eye(len(scaled)))
            result[known] = np.sqrt(np.diag(inverse) * variance) / size[known]
        moved = np.array([self._without(solution, index) for index in range(len(self.cases))])
        count = len(self.cases)
        if count > 1:
            jackknife = np.sqrt((count - 1) / count * ((moved - moved.mean(axis=0)) ** 2).sum(axis=0))
            result = np.maximum(result, jackknife[solution.free])
        return result

    def _without(self, solution: _Solution, case: int) -> Floats:
        """The coordinates fitted to all programs but one: one Gauss-Newton step from the solution."""
        keep = self.case_of != case
        slopes = solution.jacobian[keep]
        ridge = (_RIDGE / self.spread[solution.free]) ** 2
        gradient = slopes.T @ solution.residuals[keep] + ridge * (solution.values - self.start)[solution.free]
        moved = solution.values.copy()
        if solution.free:
            step = -np.linalg.solve(slopes.T @ slopes + np.diag(ridge), gradient)
            low, high = self.low[solution.free], self.high[solution.free]
            moved[solution.free] = np.clip(solution.values[solution.free] + step, low, high)
        return moved

    def left_out(self, solution: _Solution) -> list[float]:
        """The step time of every program, predicted with constants fitted to all others."""
        return [
            _predicted(case, self.framework_at(self._without(solution, index)))["step"]
            for index, case in enumerate(self.cases)
        ]

    def eliminate(self) -> tuple[_Solution, Floats, dict[ConstantName, Status]]:
        """The solution without the constants that the runs do not determine, its standard errors, and what became of
        every constant."""
        fixed: dict[int, float] = {}
        status: dict[ConstantName, Status] = dict.fromkeys(CONSTANTS, "fitted")
        solution = self.first()
        while True:
            errors = self.standard_errors(solution)
            worst, ratio = -1, 0.0
            for index, error in zip(solution.free, errors, strict=True):
                doubt = self._doubt(index, float(solution.values[index]), float(error))
                if doubt > ratio:
                    worst, ratio = index, doubt
            if ratio < 1.0:
                return solution, errors, status
            name = CONSTANTS[worst]
            self.doubt[name] = float(errors[solution.free.index(worst)])
            ended = float(solution.values[worst])
            kept = self.solve({**fixed, worst: float(self.start[worst])}, solution.values)
            at_edge = ended <= self.low[worst] + 1e-9 or ended >= self.high[worst] - 1e-9
            variance = max(1.0, solution.chi2 / max(1, len(solution.residuals) - len(solution.free)))
            if at_edge and kept.chi2 - solution.chi2 > _EXCLUDED * variance:
                fixed[worst], status[name] = ended, "bound"
                solution = self.solve(fixed, solution.values)
            else:
                fixed[worst], status[name] = float(self.start[worst]), "kept"
                solution = kept

    def _doubt(self, index: int, value: float, error: float) -> float:
        """The standard error over the constant itself (a slowdown's excess over 1); infinite at an edge."""
        name = CONSTANTS[index]
        if value <= self.low[index] + 1e-9 or value >= self.high[index] - 1e-9:
            return math.inf
        if name == "overlap.compute_slowdown":
            return error / (value - 1.0)
        return error if name in get_args(ScaleName) else error / value


def _unit_s(framework: Framework, name: ConstantName) -> float:
    return max(constant_of(framework, name), _SMALLEST_UNIT_S)


def _coordinate(framework: Framework, name: ConstantName, value: float) -> float:
    if name == "overlap.compute_slowdown":
        return value
    return math.log(value) if name in get_args(ScaleName) else value / _unit_s(framework, name)


def _value(framework: Framework, name: ConstantName, coordinate: float) -> float:
    if name == "overlap.compute_slowdown":
        return coordinate
    return math.exp(coordinate) if name in get_args(ScaleName) else coordinate * _unit_s(framework, name)


def _range(framework: Framework, name: ConstantName) -> tuple[float, float, float]:
    """The least and the largest possible coordinate, and how far off the value from before may well be."""
    if name == "overlap.compute_slowdown":
        return 1.0, max(_LARGEST_SLOWDOWN, framework.overlap.compute_slowdown), 0.5
    if name in get_args(ScaleName):
        return -math.log(_LARGEST_SCALE), math.log(_LARGEST_SCALE), 0.7
    return 0.0, max(1.0, _LONGEST_S / _unit_s(framework, name)), 2.0


# --------------------------------------------------------------------------------------------------------- results


def _constant(
    name: ConstantName,
    before: Framework,
    solution: _Solution,
    errors: Floats,
    doubt: Mapping[ConstantName, float],
    status: Mapping[ConstantName, Status],
) -> ScaleConstant | TimeConstant:
    index = CONSTANTS.index(name)
    error = float(errors[solution.free.index(index)]) if index in solution.free else doubt[name]
    value = _value(before, name, float(solution.values[index]))
    if name in get_args(ScaleName) and name != "overlap.compute_slowdown":
        error *= value
    elif name in get_args(TimeName):
        error *= _unit_s(before, name)
    uncertainty = error if math.isfinite(error) else None
    identified = status[name] == "fitted"
    # mypy does not narrow a Literal by membership, so the two kinds are told apart by their members.
    match name:
        case "compute_scale" | "network_scale" | "overlap.compute_slowdown":
            return ScaleConstant(
                name=name, value=value, uncertainty=uncertainty, before=constant_of(before, name),
                status=status[name], identified=identified,
            )  # fmt: skip
        case _:
            return TimeConstant(
                name=name, value_s=value, uncertainty_s=uncertainty, before_s=constant_of(before, name),
                status=status[name], identified=identified,
            )  # fmt: skip


def _provenance(cases: Sequence[_Case]) -> Provenance:
    run = cases[0].runs[0]
    count = sum(len(case.runs) for case in cases)
    return Provenance(
        method="fitted",
        source=f"{count} runs of {len(cases)} programs on {run.device or 'this machine'}, {run.backend}",
        software=", ".join(f"{key} {value}" for key, value in sorted(run.environment.items()))[:300] or "not stated",
        measured_by=f"clustersim {run.clustersim}",
        rows=sum(len(case.measured) for case in cases),
    )


def _mean(values: Iterable[float]) -> float:
    every = list(values)
    return sum(every) / len(every)
