"""The best layout of each family as bars: where the time of a step goes."""

from __future__ import annotations

import itertools

from clustersim.layout.layout import describe
from clustersim.plan import Plan, Prediction
from clustersim.report.drawing import Box, Drawing, Line, Shape, Words
from clustersim.report.figures import with_interval
from clustersim.report.plan_screen import family_table

_PARTS = (
    ("compute", "#2f855a"), ("pipeline bubble", "#cbd5e0"), ("exposed communication", "#dd6b20"), ("other", "#718096"),
)  # fmt: skip
_LEFT, _WIDTH, _BAR, _ROW = 24.0, 860.0, 26.0, 68.0


def picture(plan: Plan) -> Drawing:
    """One bar for the best of each family, fastest first; its whiskers are the interval of the prediction."""
    rows = sorted(family_table(plan.best_of_family), key=lambda row: row[1].prediction.step_s)
    title = f"{plan.scenario.name}: the best layout of each family"
    longest = max(candidate.prediction.high_s for _, candidate in rows)
    scale = (_WIDTH - 2 * _LEFT - 130.0) / longest
    shapes: list[Shape] = [Words(x=_LEFT, y=30, text=title, size=17, bold=True)]
    x = _LEFT
    used = [any(_seconds(candidate.prediction)[part] * scale >= 0.5 for _, candidate in rows) for part in range(4)]
    for name, colour in itertools.compress(_PARTS, used):
        shapes.append(Box(x=x, y=44, width=12, height=12, fill=colour, edge=colour))
        shapes.append(Words(x=x + 17, y=54, text=name, size=12))
        x += 36 + 7.0 * len(name)
    for index, (name, candidate) in enumerate(rows):
        found = candidate.prediction
        y = 78 + index * _ROW
        shapes.append(Words(x=_LEFT, y=y + 10, text=f"{name}: {describe(candidate.layout)}", size=13))
        x = _LEFT
        for (part, colour), length in zip(_PARTS, _seconds(found), strict=True):
            wide = length * scale
            if wide >= 0.5:
                shapes.append(Box(x=x, y=y + 18, width=wide, height=_BAR, fill=colour, edge=colour, hint=part))
            x += wide
        low, high, middle = _LEFT + found.low_s * scale, _LEFT + found.high_s * scale, y + 18 + _BAR / 2
        shapes += [
            Line(x1=low, y1=middle, x2=high, y2=middle, colour="#1a202c"),
            Line(x1=low, y1=middle - 5, x2=low, y2=middle + 5, colour="#1a202c"),
            Line(x1=high, y1=middle - 5, x2=high, y2=middle + 5, colour="#1a202c"),
        ]
        text = with_interval(found.step_s, found.low_s, found.high_s)
        shapes.append(Words(x=max(high, x) + 10, y=middle + 4, text=text, size=13, bold=index == 0))
    return Drawing(width=_WIDTH, height=78 + len(rows) * _ROW + 8, title=title, shapes=tuple(shapes))


def _seconds(found: Prediction) -> tuple[float, float, float, float]:
    """The step by `_PARTS`."""
    known = found.compute_s + found.bubble_s + found.exposed_communication_s
    return found.compute_s, found.bubble_s, found.exposed_communication_s, max(0.0, found.step_s - known)
