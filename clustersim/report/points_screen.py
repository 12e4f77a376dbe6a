"""What `clustersim validate` says of collectives, synchronisations and microbenchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clustersim.report.figures import percent, signed_percent, significant
from clustersim.report.hanging import Name, figure_lines, hanging, wrapped
from clustersim.units import human_seconds
from clustersim.validate.case import line_words, reasons
from clustersim.validate.point import Point
from clustersim.validate.point_board import PointScores, PointSummary

_BASES = {"measured": "table", "beyond measured": "beyond"}
_BASIS_WORDS = {
    "measured": "a measured table", "beyond measured": "past its sizes", "tuner": "NCCL's tuning model",
    "links": "simulated, or stated, on curves of links",
}  # fmt: skip
# The columns that are figures.
_NUMBERS = 4
_FURTHEST = "Furthest off, of rows that no profile was built from"
# One odd source would fill the list of the worst rows.
_OF_ONE = 4


def points_screen(scores: Sequence[PointScores], *, worst: int = 5) -> Group:
    """One line a family, what the profiles were built from apart; which scheme is fastest; the worst rows."""
    parts: list[RenderableType] = [_errors([(found.name, one) for found in scores for one in found.together])]
    contests = _contests(scores)
    if contests is not None:
        parts += [Text(), Text("Which scheme is fastest, as measured and as predicted", style="bold"), contests]
    lines = _worst(scores, worst)
    if lines.row_count:
        parts += [Text(), Text(f"{_FURTHEST} (at most {_OF_ONE} of a family)", style="bold"), lines]
    return Group(*parts)


def file_screen(found: PointScores, *, worst: int = 5) -> Group:
    """The figures of a file: by system, the order of schemes, why rows could not be mapped."""
    parts: list[RenderableType] = []
    if found.systems:
        parts.append(_errors([(one.system, one) for one in (*found.systems, *found.together)]))
    contests = _contests([found])
    if contests is not None:
        parts += [Text(), Text("Which scheme is fastest, as measured and as predicted", style="bold"), contests]
    lines = _worst([found], worst)
    if lines.row_count:
        parts += [Text(), Text(_FURTHEST, style="bold"), lines]
    unnamed = sum(point.source is None and not point.seen for point in found.points.points)
    if unnamed:
        rows = "1 row states" if unnamed == 1 else f"{unnamed} rows state"
        words = "no source (column source): profiles may have been built from that"
        parts += [Text(), hanging([("note:", f"{rows} {words}")])]
    if found.points.unmapped:
        parts += [Text(), Text("Rows that are not predicted", style="bold")]
        told = [(str(len(at)), f"{line_words(at)}: {why}") for why, at in reasons(found.points.unmapped)]
        parts.append(hanging(told, right=True))
    return Group(*parts)


def point_lines(found: PointScores, width: int) -> str:
    """Every predicted row of a file, in its order, in `width` columns: predicted, measured, error, 90 % interval,
    whether the measured figure is in it, what the prediction rests on. One write of text: files have thousands."""
    if not found.points.points:
        return ""
    rows = [("line", "predicted", "measured", "error", "90 % interval", "in", "by", "row")]
    for point in sorted(found.points.points, key=lambda point: point.line):
        basis = _BASES.get(point.basis, point.basis) + ("*" if point.seen else "")
        rows.append(
            (
                str(point.line), _figure(point.predicted, point), _figure(point.measured, point),
                signed_percent(point.error), _interval(point), "yes" if point.covered else "no", basis, point.subject,
            )
        )  # fmt: skip
    bases = {point.basis for point in found.points.points}
    notes = [f"{_BASES.get(name, name)} = {words}" for name, words in _BASIS_WORDS.items() if name in bases]
    if any(point.seen for point in found.points.points):
        notes.append("* = the profile was built from it, or from rows of its source")
    legend = wrapped("by: " + ", ".join(notes), width, 4)
    return f"{figure_lines(rows, _NUMBERS, width)}\n{legend}\n\n"


def points_document(found: PointScores) -> dict[str, Any]:
    """A family or file of points as plain data, every row included."""
    return points_summary(found) | {
        "rows": [
            {
                "id": point.id,
                "line": point.line,
                "system": point.system,
                "subject": point.subject,
                "unit": point.unit,
                "measured": point.measured,
                "predicted": point.predicted,
                "low": point.low,
                "high": point.high,
                "error": point.error,
                "in_interval": point.covered,
                "basis": point.basis,
                "source": point.source,
                "in_profile": point.seen,
                "cause": found.family.cause(point.id) if found.family is not None else "",
            }
            for point in found.points.points
        ],
        "unmapped": [{"id": row.id, "line": row.line, "reason": row.reason} for row in found.points.unmapped],
    }


def points_summary(found: PointScores) -> dict[str, Any]:
    """The figures of a family or file of points as plain data."""
    from clustersim.files import plain

    order = found.ordering
    return {
        "name": found.name,
        "title": found.family.title if found.family is not None else "",
        "together": [plain(one) for one in found.together],
        "systems": [plain(one) for one in found.systems],
        "ordering": None
        if order is None
        else {
            "contests": [plain(one) for one in order.contests],
            "orders_right": order.orders_right,
            "best_right": order.best_right,
            "pairs": order.pairs,
            "pairs_right": order.pairs_right,
            "regret": order.regret,
        },
    }


def _figure(value: float, point: Point) -> str:
    if point.unit == "s":
        return human_seconds(value)
    scale, unit = (1e12, f"T{point.unit}") if value >= 1e12 else (1e9, f"G{point.unit}")
    return f"{significant(value / scale, 3)} {unit}"


def _interval(point: Point) -> str:
    """The 90 % interval, its unit once where both ends have it."""
    low, high = _figure(point.low, point), _figure(point.high, point)
    figure, unit = low.split(" ")
    return f"{figure if high.endswith(f' {unit}') else low} to {high}"


def _errors(rows: Sequence[tuple[str, PointSummary]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", overflow="fold")
    table.add_column("rows")
    for name in ("n", "mean", "median", "90th pct", "bias", "worst", "in 90 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in rows:
        table.add_row(
            Name(name), "in the profile" if one.seen else "nobody used", str(one.n), percent(one.mean),
            percent(one.median), percent(one.p90), signed_percent(one.bias), signed_percent(one.worst),
            percent(one.covered),
        )  # fmt: skip
    return table


def _contests(scores: Sequence[PointScores]) -> Table | None:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", overflow="fold")
    for name in ("questions", "order right", "best right", "pairs right", "regret", "worst"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in scores:
        if found.ordering is not None:
            order = found.ordering
            table.add_row(
                Name(found.name), str(len(order.contests)), str(order.orders_right), str(order.best_right),
                f"{order.pairs_right} of {order.pairs}", percent(order.regret),
                percent(max(one.regret for one in order.contests)),
            )  # fmt: skip
    return table if table.row_count else None


def _worst(scores: Sequence[PointScores], count: int) -> Table:
    most = count if len(scores) == 1 else _OF_ONE
    every = [
        (found, point)
        for found in scores
        for point in sorted(
            (point for point in found.points.points if not point.seen), key=lambda point: -abs(point.error)
        )[:most]
    ]
    lines = []
    for found, point in sorted(every, key=lambda pair: -abs(pair[1].error))[:count]:
        name = f"line {point.line}" if found.family is None else found.name
        words = f"{_figure(point.predicted, point)} predicted, {_figure(point.measured, point)} measured"
        lines.append((signed_percent(point.error), f"{name}: {point.subject}: {words}"))
        if found.family is not None:
            lines.append(("", f"cause: {found.family.cause(point.id) or 'not known'}"))
    return hanging(lines, right=True)
