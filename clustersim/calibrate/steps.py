"""calibrate_steps(): what a few measured step times say about a framework's constants on a kind of cluster.

The fit minimises the squares of ln(predicted / measured), over what a step may be off by, with a normal prior on every
constant (`STEP_PRIORS`): the most probable constants, which four to eight rows suffice for. What a step may be off by
is found with them, from the residuals and the degrees of freedom that the rows leave; beyond 1.5 times that a residual
counts linearly (Huber 1964), so that one odd row does not decide. The forward model is the simulator, followed by
closed forms between simulations: estimate(x) * simulate(x0) / estimate(x0), simulated anew where the descent ended
(space mapping, Bandler et al. 1994).

A constant counts as identified if the rows narrow its prior to 0.8 of its width or less (they hold at least half as
much information as the prior), and it does not end at the edge of what is possible. The others keep the value from
before, the least determined one first, and the rest is fitted again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clustersim.calibrate.constants import STEP_PRIORS
from clustersim.calibrate.fit import Change, Fit, Floats, Solution
from clustersim.calibrate.report import constant_at
from clustersim.errors import InputError
from clustersim.estimate.estimate import estimate
from clustersim.hardware.calibration import CalibratedStep, Calibration, ConstantName, Status, Trade
from clustersim.hardware.framework import Framework
from clustersim.hardware.provenance import Provenance
from clustersim.layout.layout import describe
from clustersim.layout.space import Space
from clustersim.program.lower import lower
from clustersim.scenario.question import Question
from clustersim.simulate.simulate import simulate

# A step of a model with the right constants is off by at least so much: other jobs, jitter, rounding in print.
_LEAST_TOLERANCE = 0.02
_FIRST_TOLERANCE = 0.05
_HUBER = 1.5
_ROUNDS = 2
_NARROWED = 0.8
_TRACELESS = 0.97
_TRADING = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A measured step: the one layout of `space`, under `framework` as it is without any calibration."""

    name: str
    question: Question
    framework: Framework
    space: Space
    measured_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepFit:
    """What a fit to steps found. `change` applies it to a framework; `errors` are standard errors by coordinate;
    `tolerance` is what a step is off by after the fit; the errors of the steps (predicted / measured - 1) are simulated
    before, and of the closed forms after, and with the row left out."""

    change: Change
    solution: Solution
    names: tuple[ConstantName, ...]
    errors: Mapping[ConstantName, float]
    status: Mapping[ConstantName, Status]
    trades: tuple[Trade, ...]
    tolerance: float
    before: Floats
    after: Floats
    left_out: Floats


class _Model:
    """ln(predicted / measured) of every step: closed forms, tied to simulations at one point."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        self.measured = np.log([step.measured_s for step in steps])
        self.offset = np.zeros(len(steps))
        self.tolerance = _FIRST_TOLERANCE

    def tie(self, change: Change, simulated_s: Sequence[float]) -> Floats:
        """Follow the closed forms from what was simulated there; the errors there."""
        self.offset = np.log(simulated_s) - self._estimated(change)
        return np.asarray(np.exp(np.log(simulated_s) - self.measured) - 1.0)

    def anchor(self, change: Change) -> Floats:
        """Simulate every step there, and follow the closed forms from there; the errors."""
        return self.tie(change, [simulated_s(step, change(step.framework)) for step in self.steps])

    def errors(self, change: Change) -> Floats:
        """ln(predicted / measured)."""
        return np.asarray(self._estimated(change) + self.offset - self.measured)

    def residuals(self, change: Change) -> Floats:
        """Signed roots of Huber's loss, whose squares add up to it."""
        off = self.errors(change) / self.tolerance
        size = np.abs(off)
        return np.asarray(np.sign(off) * np.sqrt(np.where(size <= _HUBER, off * off, _HUBER * (2.0 * size - _HUBER))))

    def _estimated(self, change: Change) -> Floats:
        return np.log([
            estimate(step.question.workload, step.space, step.question.cluster, change(step.framework)).step_s[0]
            for step in self.steps
        ])  # fmt: skip


def simulated_s(step: Step, framework: Framework) -> float:
    """The simulated seconds of a step under a framework."""
    question = step.question
    program = lower(question.workload, step.space.layout(0), framework, question.cluster.devices_per_node)
    return simulate(program, question.cluster, framework).step_s


def fit_steps(
    steps: Sequence[Step],
    priors: Mapping[ConstantName, float] = STEP_PRIORS,
    *,
    shipped_s: Sequence[float] | None = None,
    rounds: int = _ROUNDS,
) -> StepFit:
    """The most probable constants of what `steps` were measured under, relative to their frameworks' own.

    `shipped_s`: what the steps take under their frameworks as they are, where that was simulated before. `rounds` of
    descent, each but the last followed by a simulation of every step. O(constants^2) estimates of each step.
    """
    model = _Model(steps)
    fit = Fit(steps[0].framework, priors, model.residuals, np.arange(len(steps)), weight=1.0, precision=1e-3)
    start = fit.change_to(fit.start)
    before = model.anchor(start) if shipped_s is None else model.tie(start, shipped_s)
    fixed: dict[int, float] = {}
    solution = fit.solve(fixed, fit.start)
    trades: tuple[Trade, ...] = ()
    for number in range(rounds):
        if number:
            model.anchor(fit.change_to(solution.values))
        model.tolerance = _tolerance(fit, solution, model)
        fit.forget()
        solution = fit.solve(fixed, solution.values)
        if number == 0:
            trades = _trades(fit, solution)
        solution = _without_unknown(fit, fixed, solution)
    after = np.expm1(model.errors(fit.change_to(solution.values)))
    spread = _spreads(fit, solution)
    status: dict[ConstantName, Status] = {
        name: "kept" if index in fixed else "fitted" for index, name in enumerate(fit.names)
    }
    left_out = [
        math.expm1(model.errors(fit.change_to(fit.without(solution, index)))[index]) for index in range(len(steps))
    ]
    return StepFit(
        change=fit.change_to(solution.values), solution=solution, names=fit.names,
        errors={name: spread.get(index, math.inf) for index, name in enumerate(fit.names)}, status=status,
        trades=trades, tolerance=model.tolerance, before=before, after=after, left_out=np.array(left_out),
    )  # fmt: skip


def calibrate_steps(steps: Sequence[Step], source: str) -> Calibration:
    """The calibration of the one framework, on the one kind of cluster, that all `steps` are of.

    InputError where there is none, or where they are of several.
    """
    if not steps:
        raise InputError(f"{source}: no row could be predicted")
    nodes, framework = _nodes(steps[0]), steps[0].framework
    for step in steps:
        if (_nodes(step), step.framework.name) != (nodes, framework.name):
            raise InputError(
                f"{source}: rows of {framework.name} on {' + '.join(nodes)} and of {step.framework.name} on "
                f"{' + '.join(_nodes(step))}: calibrate each framework and kind of cluster on its own"
            )
    found = fit_steps(steps)
    rows = zip(steps, found.before, found.after, found.left_out, strict=True)
    return Calibration(
        nodes=nodes,
        framework=framework.name,
        constants=tuple(
            constant_at(framework, name, float(value), found.errors[name], found.status[name])
            for name, value in zip(found.names, found.solution.values, strict=True)
        ),
        steps=tuple(
            CalibratedStep(
                row=step.name,
                layout=describe(step.space.layout(0)),
                step_s=step.measured_s,
                error_before=float(one),
                error_after=float(two),
                error_left_out=float(three),
            )
            for step, one, two, three in rows
        ),
        trades=found.trades,
        mean_error_before=float(np.abs(found.before).mean()),
        mean_error_after=float(np.abs(found.after).mean()),
        mean_error_left_out=float(np.abs(found.left_out).mean()),
        provenance=Provenance(method="fitted", source=f"{len(steps)} measured steps of {source}", rows=len(steps)),
    )


def _nodes(step: Step) -> tuple[str, ...]:
    return tuple(sorted({machine.node.name for machine in step.question.cluster.workers}))


def _tolerance(fit: Fit, solution: Solution, model: _Model) -> float:
    """What a step is off by: the residuals' spread over the degrees of freedom that the priors and rows leave."""
    slopes = solution.jacobian
    normal = slopes.T @ slopes
    used = (
        float(np.trace(np.linalg.solve(normal + np.diag(fit.ridge(solution.free)), normal))) if solution.free else 0.0
    )
    spare = max(1.0, len(solution.residuals) - used)
    return max(_LEAST_TOLERANCE, model.tolerance * math.sqrt(float(solution.residuals @ solution.residuals) / spare))


def _covariance(fit: Fit, solution: Solution) -> Floats:
    """Of the free coordinates, given the rows and the priors."""
    slopes = solution.jacobian
    return np.asarray(np.linalg.inv(slopes.T @ slopes + np.diag(fit.ridge(solution.free))))


def _spreads(fit: Fit, solution: Solution) -> dict[int, float]:
    """The standard error of every free coordinate."""
    if not solution.free:
        return {}
    return dict(zip(solution.free, np.sqrt(np.diag(_covariance(fit, solution))).tolist(), strict=True))


def _trades(fit: Fit, solution: Solution) -> tuple[Trade, ...]:
    """The pairs of constants that the rows do not tell apart."""
    covariance = _covariance(fit, solution)
    size = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(size, size)
    return tuple(
        Trade(one=fit.names[solution.free[i]], other=fit.names[solution.free[j]], correlation=float(correlation[i, j]))
        for i in range(len(size)) for j in range(i + 1, len(size)) if abs(correlation[i, j]) > _TRADING
    )  # fmt: skip


def _without_unknown(fit: Fit, fixed: dict[int, float], solution: Solution) -> Solution:
    """The solution with every constant that the rows say little about at its value from before."""
    while solution.free:
        doubts = {}
        for index, error in _spreads(fit, solution).items():
            value = solution.values[index]
            at_edge = value <= fit.low[index] + 1e-9 or value >= fit.high[index] - 1e-9
            doubts[index] = math.inf if at_edge else error / fit.widths[index]
        # All that leave no trace at all go at once.
        worst = max(doubts, key=lambda index: doubts[index])
        if doubts[worst] <= _NARROWED:
            break
        gone = {index for index, doubt in doubts.items() if _TRACELESS < doubt < math.inf} | {worst}
        fixed.update({index: float(fit.start[index]) for index in gone})
        solution = fit.solve(fixed, solution.values)
    return solution
