"""Which constants a fit to ops determines: standard errors, and the elimination of what nothing determines."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from clustersim.calibrate.constants import is_scale
from clustersim.calibrate.fit import Fit, Floats, Solution
from clustersim.hardware.calibration import ConstantName, Status

# Per-layer host times, as multiples of those from before, from which the descent starts.
_STARTS = (1.0, 3.0, 8.0)
# How much worse (in chi squared) a fit may be with a constant put back: 3 standard errors.
_EXCLUDED = 9.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Identified:
    """A solution, the standard errors of all coordinates (infinite where nothing is known), and what became of them."""

    solution: Solution
    errors: dict[ConstantName, float]
    status: dict[ConstantName, Status]


def first(fit: Fit) -> Solution:
    """The best coordinates, from several starts."""
    starts = []
    for factor in _STARTS:
        values = fit.start.copy()
        for name in ("host.per_layer_forward", "host.per_layer_backward"):
            index = fit.names.index(name)
            values[index] = min(factor * max(1.0, values[index]), fit.high[index])
        starts.append(values if factor > 1.0 else fit.start)
    return min((fit.solve({}, values) for values in starts), key=lambda solution: solution.chi2)


def standard_errors(fit: Fit, solution: Solution) -> Floats:
    """Of the free coordinates: the larger of the Jacobian's and the jackknife's; infinite without any data."""
    if not solution.free:
        return np.empty(0)
    slopes = fit.sure_slopes(solution.values, solution.free)
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
    count = int(fit.case_of.max()) + 1
    if count > 1:
        moved = np.array([fit.without(solution, index) for index in range(count)])
        jackknife = np.sqrt((count - 1) / count * ((moved - moved.mean(axis=0)) ** 2).sum(axis=0))
        result = np.maximum(result, jackknife[solution.free])
    return result


def eliminate(fit: Fit, solution: Solution) -> Identified:
    """The solution without the constants that the runs do not determine."""
    fixed: dict[int, float] = {}
    doubts: dict[int, float] = {}
    status: dict[ConstantName, Status] = dict.fromkeys(fit.names, "fitted")
    while True:
        errors = standard_errors(fit, solution)
        worst, ratio = -1, 0.0
        for index, error in zip(solution.free, errors, strict=True):
            doubt = _doubt(fit, index, float(solution.values[index]), float(error))
            if doubt > ratio:
                worst, ratio = index, doubt
        if ratio < 1.0:
            known = {**doubts, **dict(zip(solution.free, errors.tolist(), strict=True))}
            return Identified(
                solution=solution, errors={fit.names[index]: error for index, error in known.items()}, status=status
            )
        name = fit.names[worst]
        doubts[worst] = float(errors[solution.free.index(worst)])
        ended = float(solution.values[worst])
        kept = fit.solve({**fixed, worst: float(fit.start[worst])}, solution.values)
        at_edge = ended <= fit.low[worst] + 1e-9 or ended >= fit.high[worst] - 1e-9
        variance = max(1.0, solution.chi2 / max(1, len(solution.residuals) - len(solution.free)))
        if at_edge and kept.chi2 - solution.chi2 > _EXCLUDED * variance:
            fixed[worst], status[name] = ended, "bound"
            solution = fit.solve(fixed, solution.values)
        else:
            fixed[worst], status[name] = float(fit.start[worst]), "kept"
            solution = kept


def _doubt(fit: Fit, index: int, value: float, error: float) -> float:
    """The standard error over the constant itself (a slowdown's excess over 1); infinite at an edge."""
    name = fit.names[index]
    if value <= fit.low[index] + 1e-9 or value >= fit.high[index] - 1e-9:
        return math.inf
    if name == "overlap.compute_slowdown":
        return error / (value - 1.0)
    return error if is_scale(name) else error / value
