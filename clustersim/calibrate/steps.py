"""calibrate_steps(): what a few measured step times say about a framework's constants on a kind of cluster.

The fit finds the most probable constants for ln(predicted / measured), off by Student's t, with a normal prior on every
constant (`STEP_PRIORS`), which four to eight rows suffice for. What a step may be off by is found with them, from the
median of the residuals and the degrees of freedom that the rows leave: a minority of odd rows moves neither. The first
descent is in Huber's loss (1964), which has one minimum; as in Yohai's MM-estimates (1987), the other follows from
there. The forward model is the simulator, followed by closed forms between simulations: estimate(x) * simulate(x0) /
estimate(x0), simulated anew where the descent ended (space mapping, Bandler et al. 1994).

A constant counts as identified if the rows narrow its prior to 0.8 of its width or less (they hold at least half as
much information as the prior), and it does not end at the edge of what is possible. The others keep the value from
before, the least determined one first, and the rest is fitted again.

How many constants are free is chosen too, from the rows alone (`fit_nested`): none, one factor, those of kernels, those
of messages besides, or all; the smallest set whose error, each configuration left out in turn, is within one standard
error of the least (Breiman et al. 1984, section 3.4.3; Hastie, Tibshirani & Friedman 2009, section 7.10). None is an
answer. Rows that repeat a configuration are left out together: one of them would foretell the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from clustersim.calibrate.constants import NESTED, STEP_PRIORS, Free, coordinate
from clustersim.calibrate.fit import Change, Floats, Ints, Solution
from clustersim.calibrate.report import constant_at
from clustersim.calibrate.robust import Linear, Robust, settle, spreads, trades
from clustersim.errors import InputError
from clustersim.estimate.estimate import estimate
from clustersim.hardware.calibration import CalibratedStep, Calibration, ConstantName, Status, Trade, constant_of
from clustersim.hardware.framework import Framework
from clustersim.hardware.provenance import Provenance
from clustersim.layout.layout import describe
from clustersim.layout.space import Space
from clustersim.program.lower import lower
from clustersim.scenario.question import Question
from clustersim.simulate.simulate import simulate

_ROUNDS = 2
# Each left out in turn, three are left: of fewer configurations hardly anything is learned, nor what that is worth.
FEWEST = 4


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
    before, and of the closed forms after. `left_out`: with all rows of the configuration left out and everything found
    anew, the closed forms taken as straight lines. `free`: the set of constants chosen, and `inner` the mean error of
    every set, each configuration left out in turn; empty where there was no choice."""

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
    free: Free = "all"
    inner: Mapping[Free, float] = field(default_factory=dict)


class _Model:
    """ln(predicted / measured) of every step: closed forms, tied to simulations at one point."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        self.measured = np.log([step.measured_s for step in steps])
        self.offset = np.zeros(len(steps))

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


def configurations(steps: Sequence[Step]) -> Ints:
    """The number of every step's configuration, from 0 in the order of the steps: steps of one model, workload, cluster
    and layout have one, whatever they are called."""
    seen: dict[str, int] = {}
    numbers = []
    for step in steps:
        workload = step.question.workload
        workload = replace(workload, model=replace(workload.model, name=""))
        numbers.append(seen.setdefault(repr((workload, step.question.cluster, step.space.layout(0))), len(seen)))
    return np.array(numbers)


def _by_configuration(off: Floats, case_of: Ints) -> Floats:
    """The mean of every configuration."""
    return np.bincount(case_of, weights=off) / np.bincount(case_of)


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
    fit = Robust(steps[0].framework, priors, model.errors, configurations(steps), weight=1.0, precision=1e-3)
    start = fit.change_to(fit.start)
    before = model.anchor(start) if shipped_s is None else model.tie(start, shipped_s)
    solution, fixed = settle(fit)
    found = trades(fit, fit.start)
    for _ in range(rounds - 1):
        model.anchor(fit.change_to(solution.values))
        fit.forget()
        solution, fixed = settle(fit, solution, fixed)
    spread = spreads(fit, solution)
    status: dict[ConstantName, Status] = {
        name: "kept" if index in fixed else "fitted" for index, name in enumerate(fit.names)
    }
    return StepFit(
        change=fit.change_to(solution.values), solution=solution, names=fit.names,
        errors={name: spread.get(index, math.inf) for index, name in enumerate(fit.names)}, status=status,
        trades=tuple(pair for pair in found if "fitted" in (status[pair.one], status[pair.other])),
        tolerance=fit.tolerance, before=before, after=np.expm1(fit.errors(solution.values)),
        left_out=_left_out(fit, solution),
    )  # fmt: skip


def _left_out(fit: Robust, solution: Solution) -> Floats:
    """The error of every row under constants found without its configuration; those from before, where there is no
    other. O(rows * constants^3) beside one slope of each."""
    lines = Linear.of(fit, solution.values)
    found = np.empty(len(lines.here))
    for case in range(int(fit.case_of.max()) + 1):
        rows = fit.case_of == case
        values = fit.start if rows.all() else settle(lines.without_case(case))[0].values
        found[rows] = lines.errors(values)[rows]
    return np.expm1(found)


def fit_nested(steps: Sequence[Step], *, shipped_s: Sequence[float] | None = None, rounds: int = _ROUNDS) -> StepFit:
    """`fit_steps` of the smallest set of constants (`NESTED`) that errs no more than the best of them, but for one
    standard error, on configurations left out one at a time; none where there is one configuration only."""
    seconds = [simulated_s(step, step.framework) for step in steps] if shipped_s is None else shipped_s
    case_of = configurations(steps)
    off: dict[Free, Floats] = {}
    for free, names in NESTED.items():
        found = fit_steps(steps, {name: STEP_PRIORS[name] for name in names}, shipped_s=seconds, rounds=1)
        off[free] = _by_configuration(np.abs(np.log1p(found.left_out)), case_of)
    inner = {free: float(each.mean()) for free, each in off.items()}
    best = min(inner, key=lambda free: inner[free])
    count = len(off[best])
    allowed = inner[best] + float(off[best].std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    chosen = next(free for free in NESTED if inner[free] <= allowed)
    few = {name: STEP_PRIORS[name] for name in NESTED[chosen]}
    return replace(fit_steps(steps, few, shipped_s=seconds, rounds=rounds), free=chosen, inner=inner)


def calibrate_steps(steps: Sequence[Step], source: str) -> Calibration:
    """The calibration of the one framework, on the one kind of cluster, that all `steps` are of.

    InputError where they are of several, or of fewer than `FEWEST` configurations.
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
    case_of = configurations(steps)
    count = int(case_of.max()) + 1
    if count < FEWEST:
        rows = "1 row" if len(steps) == 1 else f"{len(steps)} rows"
        raise InputError(
            f"{source}: {rows} of {count} configuration{'s' if count > 1 else ''}; calibrating needs at least {FEWEST} "
            f"different ones: add {FEWEST - count} or more with another model, batch, number of GPUs or layout"
        )
    found = fit_nested(steps)
    each = zip(steps, case_of.tolist(), found.before, found.after, found.left_out, strict=True)
    at = dict(zip(found.names, found.solution.values.tolist(), strict=True))
    return Calibration(
        nodes=nodes,
        framework=framework.name,
        constants=tuple(
            constant_at(
                framework,
                name,
                at.get(name, coordinate(framework, name, constant_of(framework, name))),
                found.errors.get(name, math.inf),
                found.status.get(name, "kept"),
            )
            for name in STEP_PRIORS
        ),
        steps=tuple(
            CalibratedStep(
                row=step.name,
                layout=describe(step.space.layout(0)),
                configuration=number,
                worker_nodes=step.question.cluster.worker_nodes,
                step_s=step.measured_s,
                error_before=float(one),
                error_after=float(two),
                error_left_out=float(three),
            )
            for step, number, one, two, three in each
        ),
        trades=found.trades,
        mean_error_before=float(_by_configuration(np.abs(found.before), case_of).mean()),
        mean_error_after=float(_by_configuration(np.abs(found.after), case_of).mean()),
        mean_error_left_out=float(_by_configuration(np.abs(found.left_out), case_of).mean()),
        provenance=Provenance(method="fitted", source=f"{len(steps)} measured steps of {source}", rows=len(steps)),
    )


def _nodes(step: Step) -> tuple[str, ...]:
    return tuple(sorted({machine.node.name for machine in step.question.cluster.workers}))
