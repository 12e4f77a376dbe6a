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
from typing import Literal

import numpy as np

from clustersim import files
from clustersim.calibrate.constants import RUN_CONSTANTS, loose_widths
from clustersim.calibrate.fit import Change, Fit, Floats
from clustersim.calibrate.identify import eliminate, first
from clustersim.calibrate.report import constant_at
from clustersim.compare import Comparison, Figure, Run, compare
from clustersim.errors import InputError
from clustersim.hardware.calibration import CalibratedRun, Calibration
from clustersim.hardware.framework import Framework
from clustersim.hardware.provenance import Provenance
from clustersim.layout.layout import Layout, describe
from clustersim.program.lower import lower
from clustersim.program.program import Program
from clustersim.scenario.question import Question
from clustersim.simulate.simulate import simulate
from clustersim.timeline import OpId, OpKind, Phase

# What is summed up: the ops of one phase and kind, or the step.
Sum = tuple[Phase, OpKind] | Literal["step"]

_STEP_TOLERANCE = 0.03
_OP_TOLERANCE = 0.10
# Sums below this are timer noise.
_SHORTEST_S = 2e-6
_RIDGE = 0.1


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
    fit = _fit(cases, framework)
    found = eliminate(fit, first(fit))
    solution = found.solution
    after = fit.change_to(solution.values)(framework)
    before_s = [_predicted(case, framework)["step"] for case in cases]
    after_s = [_predicted(case, after)["step"] for case in cases]
    left_out_s = [
        _predicted(case, fit.change_to(fit.without(solution, index))(framework))["step"]
        for index, case in enumerate(cases)
    ]
    runs = tuple(
        CalibratedRun(
            model=case.question.workload.model.name,
            layout=describe(case.layout),
            program_digest=case.runs[0].program_digest,
            run_digests=tuple(files.digest(run) for run in case.runs),
            worker_nodes=case.question.cluster.worker_nodes,
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
        constants=tuple(
            constant_at(framework, name, float(value), found.errors[name], found.status[name])
            for name, value in zip(fit.names, solution.values, strict=True)
        ),
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


def _fit(cases: tuple[_Case, ...], framework: Framework) -> Fit:
    """The fit of ln(predicted / measured) of every sum, over its tolerance. One simulation per program."""
    rows = [(index, key) for index, case in enumerate(cases) for key in case.measured]

    def observe(change: Change) -> Floats:
        predicted = [_predicted(case, change(framework)) for case in cases]
        return np.array([
            math.log(max(predicted[index][what], _SHORTEST_S) / cases[index].measured[what])
            / cases[index].tolerance[what]
            for index, what in rows
        ])  # fmt: skip

    case_of = np.array([index for index, _ in rows])
    return Fit(framework, loose_widths(framework, RUN_CONSTANTS), observe, case_of, weight=_RIDGE)


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
