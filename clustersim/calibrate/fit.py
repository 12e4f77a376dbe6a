"""Constants that make predictions agree with what was measured: damped least squares with priors, within bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.calibrate.constants import bounds, coordinate, value_at
from clustersim.hardware.calibration import ConstantName, constant_of, with_constant
from clustersim.hardware.framework import Framework

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# A framework with some of its constants replaced.
Change = Callable[[Framework], Framework]

_ROUNDS = 30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """Coordinates of all constants, those that were fitted, and the residuals and Jacobian (by coordinate) there."""

    values: Floats
    free: list[int]
    residuals: Floats
    jacobian: Floats
    chi2: float


class Fit:
    """Damped Gauss-Newton (Levenberg 1944, Marquardt 1963) on bounded coordinates.

    `observe` gives the residuals under changed constants, each over what it may be off by; `case_of` says which program
    each belongs to. `widths` are those of the priors, `weight` is how strongly they hold (1: as normal
    priors). The descent ends where a step gains less than `precision` of the sum of squares.
    """

    def __init__(
        self,
        base: Framework,
        widths: Mapping[ConstantName, float],
        observe: Callable[[Change], Floats],
        case_of: Ints,
        *,
        weight: float,
        precision: float = 1e-6,
    ) -> None:
        self.base = base
        self.names: tuple[ConstantName, ...] = tuple(widths)
        self.observe = observe
        self.case_of = case_of
        self.start = np.array([coordinate(base, name, constant_of(base, name)) for name in self.names])
        edges = [bounds(base, name) for name in self.names]
        self.low, self.high = np.array([low for low, _ in edges]), np.array([high for _, high in edges])
        self.widths = np.array([widths[name] for name in self.names])
        self.weight = weight
        self.precision = precision
        self._seen: dict[bytes, Floats] = {}

    def change_to(self, values: Floats) -> Change:
        """What replaces the constants by those at these coordinates; times are multiples of a framework's own."""

        def changed(framework: Framework) -> Framework:
            for name, value in zip(self.names, values.tolist(), strict=True):
                framework = with_constant(framework, name, value_at(framework, name, value))
            return framework

        return changed

    def residuals(self, values: Floats) -> Floats:
        """Those at these coordinates; remembered."""
        key = values.tobytes()
        found = self._seen.get(key)
        if found is None:
            found = self._seen[key] = self.observe(self.change_to(values))
        return found

    def forget(self) -> None:
        """What is observed has changed."""
        self._seen.clear()

    def slopes(self, values: Floats, free: list[int], sign: float = 1.0) -> Floats:
        """Finite differences in one direction (the other at an edge), wide enough to see past rounding."""
        here = self.residuals(values)
        columns = []
        for index in free:
            width = 0.02 * max(1.0, abs(values[index]) if self.names[index].startswith("host") else 1.0) * sign
            if not self.low[index] <= values[index] + width <= self.high[index]:
                width = -width
            moved = values.copy()
            moved[index] += width
            columns.append((self.residuals(moved) - here) / width)
        return np.array(columns).T.reshape(len(here), len(free))

    def sure_slopes(self, values: Floats, free: list[int]) -> Floats:
        """The flatter of the slopes to either side. On the edge of a maximum (host against device) one of them is
        zero, and the constant may as well lie beyond."""
        up, down = self.slopes(values, free), self.slopes(values, free, -1.0)
        return np.where(np.abs(up) < np.abs(down), up, down)

    def solve(self, fixed: Mapping[int, float], start: Floats) -> Solution:
        """The best coordinates near `start` with some of them fixed."""
        free = [index for index in range(len(self.names)) if index not in fixed]
        values = start.copy()
        for index, value in fixed.items():
            values[index] = value
        damping, cost = 1e-3, self.cost(values)
        slopes = self.slopes(values, free)
        for _ in range(_ROUNDS if free else 0):
            step = self._step(values, free, slopes, damping)
            moved = values.copy()
            moved[free] = np.clip(values[free] + step, self.low[free], self.high[free])
            new = self.cost(moved)
            if new < cost:
                near = float(np.abs(moved - values).max()) < 10.0 * self.precision
                small = near or cost - new < self.precision * cost
                values, cost, damping = moved, new, damping / 5.0
                slopes = self.slopes(values, free)
                if small:
                    break
            else:
                damping *= 6.0
                if damping > 1e6 or float(np.abs(step).max()) < self.precision:
                    break
        residuals = self.residuals(values)
        return Solution(
            values=values, free=free, residuals=residuals, jacobian=slopes, chi2=float(residuals @ residuals)
        )

    def cost(self, values: Floats) -> float:
        """The squares of the residuals, and of how far the priors are left."""
        residuals = self.residuals(values)
        pull = self.weight * (values - self.start) / self.widths
        return float(residuals @ residuals + pull @ pull)

    def ridge(self, free: list[int]) -> Floats:
        """What the priors add to the normal matrix's diagonal."""
        return np.asarray((self.weight / self.widths[free]) ** 2)

    def _step(self, values: Floats, free: list[int], slopes: Floats, damping: float) -> Floats:
        ridge = self.ridge(free)
        normal = slopes.T @ slopes + np.diag(ridge)
        gradient = slopes.T @ self.residuals(values) + ridge * (values - self.start)[free]
        # Directions out of the allowed range are closed.
        open_ = ~(((values <= self.low)[free] & (gradient > 0.0)) | ((values >= self.high)[free] & (gradient < 0.0)))
        step = np.zeros(len(free))
        if open_.any():
            part = normal[np.ix_(open_, open_)]
            step[open_] = -np.linalg.solve(part + damping * np.diag(np.diag(part)), gradient[open_])
        return step

    def without(self, solution: Solution, case: int) -> Floats:
        """The coordinates fitted to all programs but one: one Gauss-Newton step from the solution."""
        keep = self.case_of != case
        slopes = solution.jacobian[keep]
        ridge = self.ridge(solution.free)
        gradient = slopes.T @ solution.residuals[keep] + ridge * (solution.values - self.start)[solution.free]
        moved = solution.values.copy()
        if solution.free:
            step = -np.linalg.solve(slopes.T @ slopes + np.diag(ridge), gradient)
            low, high = self.low[solution.free], self.high[solution.free]
            moved[solution.free] = np.clip(solution.values[solution.free] + step, low, high)
        return moved
