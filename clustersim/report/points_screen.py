"""What `clustersim validate` says of collectives, synchronisations and microbenchmarks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clustersim.report.figures import percent, signed_percent, significant
from clustersim.units import human_seconds
from clustersim.validate.point import Point
from clustersim.validate.point_board import PointScores, PointSummary

_FURTHEST = "Furthest off, of rows that no profile was built from"
# One odd source would fill the list of the worst rows.
_OF_ONE = 4


def points_screen(scores: Sequence[PointScores], *, worst: int = 5) -> Group:
    """One line a family, what the profiles were built from apart; which scheme is fastest; the worst rows."""
    parts: list[RenderableType] = [_errors([(found.name, one) for found in scores for one in found.together])]
    contests = _contests(scores)
    if contests is not None:
        parts += [Text(), Text("Which scheme is fastest, as measured and as predicted", style="bold"), contests]
    lines = list(_worst(scores, worst))
    if lines:
        parts += [Text(), Text(f"{_FURTHEST} (at most {_OF_ONE} of a family)", style="bold"), *lines]
    return Group(*parts)


def file_screen(found: PointScores, *, worst: int = 5) -> Group:
    """The figures of a file: by system, the order of schemes, why rows could not be mapped."""
    parts: list[RenderableType] = []
    if found.systems:
        parts.append(_errors([(one.system, one) for one in (*found.systems, *found.together)]))
    contests = _contests([found])
    if contests is not None:
        parts += [Text(), Text("Which scheme is fastest, as measured and as predicted", style="bold"), contests]
    lines = list(_worst([found], worst))
    if lines:
        parts += [Text(), Text(_FURTHEST, style="bold"), *lines]
    reasons = Counter(row.reason for row in found.points.unmapped)
    if reasons:
        parts += [Text(), Text("Rows that are not predicted", style="bold")]
        parts += [Text(f"{count:>6}  {reason}") for reason, count in reasons.most_common()]
    return Group(*parts)


def point_lines(found: PointScores) -> str:
    """Every row of a file, in its order: predicted, measured, error, 90 % interval, whether the measured figure is in
    it, what the prediction rests on; or why there is none. One write of text: files have thousands of rows."""
    head = f"{'line':>6} {'predicted':>9} {'measured':>9} {'error':>7} {'90 % interval':<20} {'in':<3} {'by':<9} row"
    rows: list[tuple[int, str]] = []
    for point in found.points.points:
        interval = f"{_figure(point.low, point)} to {_figure(point.high, point)}"
        basis = ("beyond" if point.basis == "beyond measured" else point.basis) + ("*" if point.seen else "")
        text = (
            f"{point.line:>6} {_figure(point.predicted, point):>9} {_figure(point.measured, point):>9} "
            f"{signed_percent(point.error):>7} {interval:<20} {'yes' if point.covered else 'no':<3} {basis:<9} "
            f"{point.subject}"
        )
        rows.append((point.line, text))
    rows += [(row.line, f"{row.line:>6}  not predicted: {row.id}: {row.reason}") for row in found.points.unmapped]
    notes = (
        "by: measured = the node's table, beyond = past its sizes, tuner = NCCL's tuning model,\n"
        "links = simulated on the links' curves; * = the profile was built from rows of this source"
    )
    return "\n".join([head, *(text for _, text in sorted(rows)), notes]) + "\n\n"


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


def _errors(rows: Sequence[tuple[str, PointSummary]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", overflow="fold")
    table.add_column("rows")
    for name in ("n", "mean", "median", "90th pct", "bias", "worst", "in 90 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in rows:
        table.add_row(
            name, "in the profile" if one.seen else "nobody used", str(one.n), percent(one.mean), percent(one.median),
            percent(one.p90), signed_percent(one.bias), signed_percent(one.worst), percent(one.covered),
        )  # fmt: skip
    return table


def _contests(scores: Sequence[PointScores]) -> Table | None:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in ("", "questions", "order right", "best right", "pairs on the right side", "regret", "worst regret"):
        table.add_column(name, justify="right" if name else "left")
    for found in scores:
        if found.ordering is not None:
            order = found.ordering
            table.add_row(
                found.name, str(len(order.contests)), str(order.orders_right), str(order.best_right),
                f"{order.pairs_right} of {order.pairs}", percent(order.regret),
                percent(max(one.regret for one in order.contests)),
            )  # fmt: skip
    return table if table.row_count else None


def _worst(scores: Sequence[PointScores], count: int) -> Iterator[Text]:
    most = count if len(scores) == 1 else _OF_ONE
    every = [
        (found, point)
        for found in scores
        for point in sorted(
            (point for point in found.points.points if not point.seen), key=lambda point: -abs(point.error)
        )[:most]
    ]
    for found, point in sorted(every, key=lambda pair: -abs(pair[1].error))[:count]:
        yield Text(
            f"{signed_percent(point.error):>7}  {found.name}: {point.subject}: {_figure(point.predicted, point)} "
            f"predicted, {_figure(point.measured, point)} measured"
        )
        if found.family is not None:
            yield Text(f"         cause: {found.family.cause(point.id) or 'not known'}")
