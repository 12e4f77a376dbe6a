"""Fits that a minority of odd rows does not decide, and what of the constants they identify."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from clustersim.calibrate.fit import Fit, Floats, Ints, Solution
from clustersim.hardware.calibration import ConstantName, Trade

# A step of a model with the right constants is off by at least so much: other jobs, jitter, rounding in print.
_LEAST_TOLERANCE = 0.02
_FIRST_TOLERANCE = 0.05
_HUBER = 1.5
# Degrees of freedom of Student's t: what Lange, Little & Taylor 1989 advise where there is little to find them from.
_FREEDOM = 4.0
# The standard deviation of a normal variable over the median of its absolute values.
_NORMAL = 1.4826
_NARROWED = 0.8
_TRACELESS = 0.97
_TRADING = 0.95


class Robust(Fit):
    """A `Fit` whose `observe` gives errors, ln(predicted / measured); the loss of its residuals is Huber's on the way
    to a first solution, and Student's t from there (`descended`), of the scale `tolerance`."""

    tolerance: float = _FIRST_TOLERANCE
    descended: bool = False

    def errors(self, values: Floats) -> Floats:
        """ln(predicted / measured) at these coordinates; remembered."""
        return super().residuals(values)

    def residuals(self, values: Floats) -> Floats:
        """Signed roots of the loss, whose squares add up to it."""
        off = self.errors(values) / self.tolerance
        size = np.abs(off)
        if self.descended:
            loss = (_FREEDOM + 1.0) * np.log1p(off * off / _FREEDOM)
        else:
            loss = np.where(size <= _HUBER, off * off, _HUBER * (2.0 * size - _HUBER))
        return np.asarray(np.sign(off) * np.sqrt(loss))

    def widths_by_name(self) -> Mapping[ConstantName, float]:
        """The widths of the priors."""
        return dict(zip(self.names, self.widths.tolist(), strict=True))


class Linear(Robust):
    """Another fit's errors as straight lines about one point."""

    def __init__(self, fit: Robust, at: Floats, here: Floats, lines: Floats, case_of: Ints) -> None:
        super().__init__(
            fit.base, fit.widths_by_name(), fit.observe, case_of, weight=fit.weight, precision=fit.precision
        )
        self.at, self.here, self.lines = at, here, lines

    @classmethod
    def of(cls, fit: Robust, at: Floats) -> Linear:
        """All rows of `fit`."""
        return cls(fit, at, fit.errors(at), error_slopes(fit, at), fit.case_of)

    def without_case(self, case: int) -> Linear:
        """All rows but those of one configuration."""
        keep = self.case_of != case
        return Linear(self, self.at, self.here[keep], self.lines[keep], self.case_of[keep])

    def errors(self, values: Floats) -> Floats:
        """On the lines."""
        return np.asarray(self.here + self.lines @ (values - self.at))


def error_slopes(fit: Robust, at: Floats) -> Floats:
    """By how much the errors of all rows grow with each coordinate."""
    plain = Fit(
        fit.base, fit.widths_by_name(), fit.observe, fit.case_of, weight=fit.weight, precision=fit.precision
    )  # fmt: skip
    return plain.slopes(at, list(range(len(fit.names))))


def settle(
    fit: Robust, solution: Solution | None = None, fixed: Mapping[int, float] | None = None
) -> tuple[Solution, dict[int, float]]:
    """The best coordinates of the constants that the rows determine, and the others, `fixed` at their start."""
    held = dict(fixed or {})
    if solution is None:
        fit.tolerance, fit.descended = _FIRST_TOLERANCE, False
        solution = fit.solve(held, fit.start)
    fit.tolerance = _tolerance(fit, solution)
    fit.descended = True
    solution = fit.solve(held, solution.values)
    return _without_unknown(fit, held, solution), held


def _tolerance(fit: Robust, solution: Solution) -> float:
    """What a row is off by: from the median of the absolute errors, over the degrees of freedom that the priors and
    rows leave."""
    slopes = solution.jacobian
    normal = slopes.T @ slopes
    used = (
        float(np.trace(np.linalg.solve(normal + np.diag(fit.ridge(solution.free)), normal))) if solution.free else 0.0
    )
    off = np.abs(fit.errors(solution.values))
    return max(_LEAST_TOLERANCE, _NORMAL * float(np.median(off)) * math.sqrt(len(off) / max(1.0, len(off) - used)))


def spreads(fit: Fit, solution: Solution) -> dict[int, float]:
    """The standard error of every free coordinate, given the rows and the priors."""
    if not solution.free:
        return {}
    slopes = solution.jacobian
    covariance = np.linalg.inv(slopes.T @ slopes + np.diag(fit.ridge(solution.free)))
    return dict(zip(solution.free, np.sqrt(np.diag(covariance)).tolist(), strict=True))


def trades(fit: Robust, at: Floats) -> tuple[Trade, ...]:
    """The pairs of constants, each of which the rows would determine by itself, that they do not tell apart: the
    correlation of the two estimates, nothing else free and no prior (a prior tells any two apart)."""
    lines = error_slopes(fit, at) / fit.tolerance
    size = np.sqrt((lines**2).sum(axis=0))
    alone = 1.0 / np.sqrt(1.0 + (size * fit.widths) ** 2)
    seen = [index for index in range(len(fit.names)) if alone[index] <= _NARROWED]
    found = []
    for place, one in enumerate(seen):
        for other in seen[place + 1 :]:
            correlation = -float(lines[:, one] @ lines[:, other]) / float(size[one] * size[other])
            if abs(correlation) > _TRADING:
                found.append(Trade(one=fit.names[one], other=fit.names[other], correlation=correlation))
    return tuple(found)


def _without_unknown(fit: Fit, fixed: dict[int, float], solution: Solution) -> Solution:
    """The solution with every constant that the rows say little about at its value from before; adds to `fixed`."""
    while solution.free:
        doubts = {}
        for index, error in spreads(fit, solution).items():
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
