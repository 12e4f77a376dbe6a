"""Which rows of a dense table to keep so that interpolation reproduces the others.

Times between grid points are interpolated (`grid.LogGrid`), so a grid line that its neighbours predict
carries nothing. Both functions work on log times (or log ratios) and know no units; they are used where
tables are made.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from clustersim.hardware.grid import fill, interpolation_matrix

FloatArray = npt.NDArray[np.float64]

# Errors above this count alike: single outliers must not buy the lines around them.
_LARGEST_ERROR = 0.3


def thin_grid(
    axes: tuple[FloatArray, ...],
    values: FloatArray,
    most_rows: int,
    *,
    importance: FloatArray | None = None,
    fill_order: tuple[int, ...] | None = None,
) -> tuple[tuple[int, ...], ...]:
    """The indices to keep on each axis, so that the kept tensor grid has at most `most_rows` cells.

    `axes`: ascending log2 coordinates; `values`: log times, or their logarithm over a model, NaN where
    nothing was measured; `importance`: weights of the cells' errors, all alike by default. Greedy backward
    elimination: of all inner lines of all axes the one goes whose loss raises the mean absolute error of the
    multilinear interpolation least, per row saved. The first and last line of an axis stay. Deterministic;
    O(lines squared * cells).
    """
    assert values.shape == tuple(len(axis) for axis in axes)
    importance = np.where(np.isnan(values), 0.0, 1.0 if importance is None else importance)
    importance /= importance.sum()
    order = fill_order or tuple(range(values.ndim))
    kept = [list(range(len(axis))) for axis in axes]
    weights = [np.eye(len(axis)) for axis in axes]
    error = 0.0
    while math.prod(len(lines) for lines in kept) > most_rows:
        best: tuple[float, int, list[int], FloatArray, float] | None = None
        rows = math.prod(len(lines) for lines in kept)
        for axis, lines in enumerate(kept):
            for line in lines[1:-1]:
                fewer = [other for other in lines if other != line]
                weight = interpolation_matrix(axes[axis][fewer], axes[axis])
                trial = [*kept[:axis], fewer, *kept[axis + 1 :]]
                matrices = [*weights[:axis], weight, *weights[axis + 1 :]]
                cells = fill(tuple(a[k] for a, k in zip(axes, trial, strict=True)), values[np.ix_(*trial)], order)
                found = _error(values, importance, cells, matrices)
                price = (found - error) * len(lines) / rows
                if best is None or price < best[0]:
                    best = (price, axis, fewer, weight, found)
        if best is None:
            raise ValueError(f"{most_rows} rows cannot hold the {rows} corners of the table; allow more")
        _, axis, kept[axis], weights[axis], error = best
    return tuple(tuple(lines) for lines in kept)


def _error(values: FloatArray, importance: FloatArray, cells: FloatArray, weights: list[FloatArray]) -> float:
    """Weighted mean of the clipped absolute error of the interpolation from the kept `cells`."""
    predicted = cells
    # Each product contracts the leading axis and appends the interpolated one, so the order ends as it was.
    for weight in weights:
        predicted = np.tensordot(predicted, weight, axes=(0, 1))
    error = np.minimum(np.abs(predicted - values), _LARGEST_ERROR)
    return float((np.where(importance > 0.0, error, 0.0) * importance).sum())


def thin_curve(x: FloatArray, y: FloatArray, tolerance: float) -> tuple[int, ...]:
    """The fewest indices of a curve whose piecewise linear interpolation is within `tolerance` of every
    point.

    `x` ascends strictly. Shortest path over segments that fit: O(points cubed) at worst, exact.
    """
    count = len(x)
    assert count >= 1
    fewest = [0] + [count] * (count - 1)
    before = [0] * count
    for start in range(count):
        for end in range(start + 1, count):
            inner = slice(start + 1, end)
            weight = (x[inner] - x[start]) / (x[end] - x[start])
            off = np.abs(y[start] * (1.0 - weight) + y[end] * weight - y[inner])
            if fewest[start] + 1 < fewest[end] and (off.size == 0 or float(off.max()) <= tolerance):
                fewest[end] = fewest[start] + 1
                before[end] = start
    path = [count - 1]
    while path[-1] != 0:
        path.append(before[path[-1]])
    return tuple(reversed(path))
