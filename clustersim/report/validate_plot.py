"""Predicted against measured step times of all families, log-log, as a drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from clustersim.report.drawing import Drawing, Line, Mark, MarkKind, Shape, Words
from clustersim.report.figures import percent
from clustersim.units import human_seconds
from clustersim.validate.board import Scores

_WIDTH, _HEIGHT = 860.0, 620.0
_LEFT, _TOP, _SIDE = 66.0, 44.0, 520.0
# The colours of Okabe and Ito, then of Tol, which the colour-blind tell apart.
_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d", "#882255", "#44aa99", "#999933",
    "#332288", "#aa4499", "#117733",
)  # fmt: skip
_MARKS: tuple[MarkKind, ...] = ("circle", "square", "triangle", "diamond", "cross")
# Families of more rows than this get smaller marks.
_MANY = 100
_GRID, _INK = "#e2e8f0", "#4a5568"


def picture(scores: Sequence[Scores]) -> Drawing:
    """The plot; on the diagonal a prediction is exact, between the outer lines it is within 10 %."""
    every = [value for found in scores for each in found.scored for value in (each.predicted_s, each.case.measured_s)]
    low, high = _decades(every)
    scale = _SIDE / (high - low)

    def x(seconds: float) -> float:
        return _LEFT + (math.log10(seconds) - low) * scale

    def y(seconds: float) -> float:
        return _TOP + _SIDE - (math.log10(seconds) - low) * scale

    shapes: list[Shape] = [*_axes(low, high, x, y)]
    first, last = 10.0**low, 10.0**high
    for factor in (1.1, 1.0, 1.0 / 1.1):
        # Each line from where it enters the square to where it leaves it.
        start, end = max(first, first / factor), min(last, last / factor)
        shapes.append(
            Line(
                x1=x(start), y1=y(start * factor), x2=x(end), y2=y(end * factor),
                colour="#1a202c" if factor == 1.0 else "#a0aec0", width=1.4 if factor == 1.0 else 1.0,
            )
        )  # fmt: skip
    legend_x, legend_y = _LEFT + _SIDE + 24.0, _TOP + 14.0
    shapes.append(Words(x=legend_x, y=legend_y - 4.0, text="family: n, mean error", size=12, bold=True))
    shown = [found for found in scores if found.scored]
    # Large families first, so that the marks of small ones lie on top.
    for number in sorted(range(len(shown)), key=lambda index: -len(shown[index].scored)):
        found = shown[number]
        kind, colour = _MARKS[number % len(_MARKS)], _COLOURS[number % len(_COLOURS)]
        for each in found.scored:
            shapes.append(
                Mark(
                    x=x(each.case.measured_s), y=y(each.predicted_s), kind=kind, colour=colour, opacity=0.65,
                    size=5.0 if len(found.scored) > _MANY else 7.0,
                    hint=f"{each.case.id}: {human_seconds(each.predicted_s)} predicted, "
                    f"{human_seconds(each.case.measured_s)} measured",
                )
            )  # fmt: skip
    for number, found in enumerate(shown):
        at = legend_y + 20.0 * (number + 1)
        kind, colour = _MARKS[number % len(_MARKS)], _COLOURS[number % len(_COLOURS)]
        shapes.append(Mark(x=legend_x + 5.0, y=at - 4.0, kind=kind, colour=colour, size=9.0))
        figures = found.summary
        assert figures is not None
        words = f"{found.name}: {figures.n}, {percent(figures.mean)}"
        shapes.append(Words(x=legend_x + 18.0, y=at, text=words, size=12))
    below = legend_y + 20.0 * (len(shown) + 1) + 10.0
    shapes.append(Line(x1=legend_x, y1=below - 4.0, x2=legend_x + 14.0, y2=below - 4.0, colour="#1a202c", width=1.4))
    shapes.append(Words(x=legend_x + 18.0, y=below, text="exact", size=12))
    shapes.append(Line(x1=legend_x, y1=below + 16.0, x2=legend_x + 14.0, y2=below + 16.0, colour="#a0aec0", width=1.0))
    shapes.append(Words(x=legend_x + 18.0, y=below + 20.0, text="10 % above, 10 % below", size=12))
    title = f"Training steps: predicted against measured, {sum(len(found.scored) for found in shown)} published runs"
    shapes.append(Words(x=_LEFT, y=26.0, text=title, size=15, bold=True))
    return Drawing(width=_WIDTH, height=_HEIGHT, title=title, shapes=tuple(shapes))


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the axes in powers of ten, half decades, with room around the values."""
    if not values:
        return 0.0, 1.0
    low = math.floor(2.0 * math.log10(min(values) / 1.1)) / 2.0
    return low, max(low + 0.5, math.ceil(2.0 * math.log10(max(values) * 1.1)) / 2.0)


def _axes(low: float, high: float, x: Callable[[float], float], y: Callable[[float], float]) -> list[Shape]:
    right, bottom = _LEFT + _SIDE, _TOP + _SIDE
    shapes: list[Shape] = []
    for decade in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            seconds = digit * 10.0**decade
            if not low - 1e-9 <= math.log10(seconds) <= high + 1e-9:
                continue
            strong = _GRID if digit == 1 else "#f1f5f9"
            shapes.append(Line(x1=x(seconds), y1=_TOP, x2=x(seconds), y2=bottom, colour=strong))
            shapes.append(Line(x1=_LEFT, y1=y(seconds), x2=right, y2=y(seconds), colour=strong))
            label = f"{seconds:g}"
            shapes.append(Words(x=x(seconds), y=bottom + 16.0, text=label, size=11, anchor="middle", colour=_INK))
            shapes.append(Words(x=_LEFT - 6.0, y=y(seconds) + 4.0, text=label, size=11, anchor="end", colour=_INK))
    for x1, y1, x2, y2 in (
        (_LEFT, _TOP, _LEFT, bottom), (_LEFT, bottom, right, bottom), (right, _TOP, right, bottom),
        (_LEFT, _TOP, right, _TOP),
    ):  # fmt: skip
        shapes.append(Line(x1=x1, y1=y1, x2=x2, y2=y2, colour=_INK, width=1.0))
    shapes.append(Words(x=_LEFT + _SIDE / 2.0, y=bottom + 38.0, text="measured step, s", size=12, anchor="middle"))
    shapes.append(Words(x=18.0, y=_TOP + _SIDE / 2.0, text="predicted step, s", size=12, anchor="middle", turned=True))
    return shapes
