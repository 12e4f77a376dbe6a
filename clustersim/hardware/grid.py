"""Multilinear interpolation on a tensor grid in log2 coordinates, from measurements at arbitrary points."""

from __future__ import annotations

from bisect import bisect_right
from math import log2
from typing import Self

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def interpolation_matrix(knots: FloatArray, places: FloatArray) -> FloatArray:
    """Weights (places, knots) of piecewise linear interpolation, constant beyond the outer knots."""
    matrix = np.zeros((len(places), len(knots)))
    if len(knots) == 1:
        matrix[:, 0] = 1.0
        return matrix
    left = np.clip(np.searchsorted(knots, places, side="right") - 1, 0, len(knots) - 2)
    weight = np.clip((places - knots[left]) / (knots[left + 1] - knots[left]), 0.0, 1.0)
    rows = np.arange(len(places))
    matrix[rows, left] = 1.0 - weight
    matrix[rows, left + 1] += weight
    return matrix


def fill(axes: tuple[FloatArray, ...], values: FloatArray, order: tuple[int, ...]) -> FloatArray:
    """`values` without its NaNs: every hole is interpolated along one axis after the other, in the given
    order.

    `axes` are the log2 coordinates of the grid that `values` lies on. A line without any value is left to the
    next axis; beyond the last value of a line, that value holds.
    """
    filled = values.copy()
    for axis in order:
        lines = np.moveaxis(filled, axis, -1)
        holes = np.isnan(lines)
        for line in np.argwhere(holes.any(axis=-1) & ~holes.all(axis=-1)):
            known = ~holes[tuple(line)]
            lines[tuple(line)] = np.interp(axes[axis], axes[axis][known], lines[tuple(line)][known])
    return filled


class LogGrid:
    """A function of positive coordinates, known at some points, multilinear in their log2 between.

    Repeats of a point are averaged. Points need not form a grid: the holes of the grid that their coordinates
    span are filled by one-dimensional interpolation. Beyond the edge the value at the edge holds. Points are
    reproduced exactly. Building costs O(cells), a scalar look-up O(2^dimensions).
    """

    __slots__ = ("_dense", "_flat", "_strides", "_ticks")

    def __init__(self, ticks: tuple[FloatArray, ...], values: FloatArray) -> None:
        self._dense = (ticks, values)
        self._ticks = tuple(tick.tolist() for tick in ticks)
        self._flat: list[float] = values.ravel().tolist()
        self._strides = tuple(int(np.prod(values.shape[axis + 1 :])) for axis in range(values.ndim))

    @classmethod
    def scattered(cls, points: FloatArray, values: FloatArray, order: tuple[int, ...]) -> Self:
        """From `points` (rows, dimensions) and their `values`; holes are filled along the axes of `order`."""
        ticks: list[FloatArray] = []
        places: list[npt.NDArray[np.intp]] = []
        for axis in range(points.shape[1]):
            tick, place = np.unique(points[:, axis], return_inverse=True)
            ticks.append(np.array([log2(float(value)) for value in tick]))
            places.append(place)
        shape = tuple(len(tick) for tick in ticks)
        cell = np.ravel_multi_index(tuple(places), shape)
        size = int(np.prod(shape))
        count = np.bincount(cell, minlength=size)
        total = np.bincount(cell, weights=values, minlength=size)
        with np.errstate(invalid="ignore"):
            dense = (total / count).reshape(shape)
        return cls(tuple(ticks), fill(tuple(ticks), dense, order))

    def edge(self, axis: int) -> float:
        """The largest coordinate of the table on `axis`."""
        return float(2.0 ** self._ticks[axis][-1])

    def at(self, *coordinates: float) -> tuple[float, float]:
        """The value at `coordinates`, and how far outside the table it is (log2, worst axis)."""
        offsets = [0]
        weights = [1.0]
        outside = 0.0
        for ticks, stride, coordinate in zip(self._ticks, self._strides, coordinates, strict=True):
            place = log2(coordinate)
            if place <= ticks[0]:
                outside = max(outside, ticks[0] - place)
                continue
            if place >= ticks[-1]:
                outside = max(outside, place - ticks[-1])
                shift = (len(ticks) - 1) * stride
                offsets = [offset + shift for offset in offsets]
                continue
            left = bisect_right(ticks, place) - 1
            weight = (place - ticks[left]) / (ticks[left + 1] - ticks[left])
            shift = left * stride
            offsets = [offset + shift for offset in offsets]
            if weight > 0.0:
                offsets += [offset + stride for offset in offsets]
                weights = [w * (1.0 - weight) for w in weights] + [w * weight for w in weights]
        flat = self._flat
        return sum([weight * flat[offset] for weight, offset in zip(weights, offsets, strict=True)]), outside

    def many(self, *coordinates: FloatArray) -> FloatArray:
        """`at` for arrays of one shape, without the distance."""
        ticks, values = self._dense
        corners: list[tuple[list[npt.NDArray[np.intp]], FloatArray]] = [([], np.ones(coordinates[0].shape))]
        for tick, coordinate in zip(ticks, coordinates, strict=True):
            place = np.clip(np.log2(coordinate), tick[0], tick[-1])
            left = np.clip(np.searchsorted(tick, place, side="right") - 1, 0, max(len(tick) - 2, 0))
            right = np.minimum(left + 1, len(tick) - 1)
            width = tick[right] - tick[left]
            weight = np.where(width > 0.0, (place - tick[left]) / np.where(width > 0.0, width, 1.0), 0.0)
            corners = [
                ([*indices, side], product * share)
                for indices, product in corners
                for side, share in ((left, 1.0 - weight), (right, weight))
            ]
        return np.asarray(sum(values[tuple(indices)] * product for indices, product in corners))
