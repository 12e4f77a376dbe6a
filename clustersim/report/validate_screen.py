"""What `clustersim validate` says: errors by family, beside what peers report, and the worst rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clustersim.report.figures import percent, signed_percent
from clustersim.units import human_bytes, human_seconds
from clustersim.validate.board import Scores
from clustersim.validate.case import Unmapped
from clustersim.validate.score import Scored


def scoreboard_screen(scores: Sequence[Scores], *, worst: int = 10) -> Group:
    """One line a family, then the rankings, memory, what could not be mapped, and the worst rows."""
    parts: list[RenderableType] = [_errors(scores)]
    for title, table in (
        ("Rankings: groups of one model, cluster and batch with at least four layouts", _rankings(scores)),
        ("Memory of the fullest device, where the source states one", _memory(scores)),
        ("Rows that are no case", _unmapped(scores)),
        ("Furthest off", _worst(scores, worst)),
    ):
        if table is not None:
            parts += [Text(), Text(title, style="bold"), table]
    return Group(*parts)


def rows_screen(found: Scores) -> Group:
    """Every row of a file: predicted, measured, error, interval, coverage."""
    table = _table("row", "layout")
    for name in ("predicted", "measured", "error", "90 % interval", "in it", "measured kernels"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found.scored:
        low, high = each.predicted_s / (1.0 + each.spread), each.predicted_s * (1.0 + each.spread)
        table.add_row(
            each.case.id, each.layout, human_seconds(each.predicted_s), human_seconds(each.case.measured_s),
            signed_percent(each.error), f"{human_seconds(low)} to {human_seconds(high)}",
            "yes" if each.covered else "no",
            percent(each.coverage),
        )  # fmt: skip
    parts: list[RenderableType] = [table] if found.scored else []
    parts += [Text(f"{found.name}, line {row.line}: {row.id}: not predicted: {row.reason}") for row in found.unmapped]
    if found.scored:
        parts += [Text(), _errors([found])]
    return Group(*parts)


def scoreboard_document(scores: Sequence[Scores]) -> dict[str, Any]:
    """The scoreboard as plain data."""
    return {"schema_version": 1, "families": [_family_document(found) for found in scores]}


def _family_document(found: Scores) -> dict[str, Any]:
    from clustersim.files import plain

    return {
        "name": found.name,
        "summary": None if found.summary is None else plain(found.summary),
        "memory": None if found.memory is None else plain(found.memory),
        "peers": [] if found.family is None else [plain(peer) for peer in found.family.peers],
        "rows": [_row_document(each) for each in found.scored],
        "unmapped": [plain(row) for row in found.unmapped],
    }


def _row_document(each: Scored) -> dict[str, Any]:
    return {
        "id": each.case.id,
        "line": each.case.line,
        "layout": each.layout,
        "measured_s": each.case.measured_s,
        "predicted_s": each.predicted_s,
        "low_s": each.predicted_s / (1.0 + each.spread),
        "high_s": each.predicted_s * (1.0 + each.spread),
        "error": each.error,
        "in_interval": each.covered,
        "coverage": each.coverage,
        "measured_bytes": each.case.memory_bytes,
        "predicted_bytes": each.predicted_bytes,
        "fits": each.fits,
    }


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _errors(scores: Sequence[Scores]) -> Table:
    table = _table("family")
    for name in ("n", "mean", "median", "90th pct", "bias", "worst", "in 90 %"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("peers", overflow="fold")
    for found in scores:
        figures = found.summary
        if figures is None:
            table.add_row(found.name, "0", "", "", "", "", "", "", "")
            continue
        peers = () if found.family is None else found.family.peers
        table.add_row(
            found.name, str(figures.n), percent(figures.mean), percent(figures.median), percent(figures.p90),
            signed_percent(figures.bias), signed_percent(figures.worst), percent(figures.covered),
            ", ".join(f"{peer.name} {percent(peer.mean_error)}" for peer in peers),
        )  # fmt: skip
    return table


def _rankings(scores: Sequence[Scores]) -> Table | None:
    table = _table("family")
    for name in ("groups", "layouts", "rank correlation", "top-1 regret", "worst regret"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in scores:
        if found.summary is not None and found.summary.ranking is not None:
            rank = found.summary.ranking
            table.add_row(
                found.name, str(rank.groups), str(rank.layouts), f"{rank.correlation:.3f}", percent(rank.regret),
                percent(rank.worst_regret),
            )  # fmt: skip
    return table if table.row_count else None


def _memory(scores: Sequence[Scores]) -> Table | None:
    table = _table("family")
    for name in ("n", "mean", "bias", "worst", "called infeasible"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what the source states", overflow="fold")
    for found in scores:
        if found.memory is not None:
            figures = found.memory
            table.add_row(
                found.name, str(figures.n), percent(figures.mean), signed_percent(figures.bias),
                signed_percent(figures.worst), str(figures.called_infeasible),
                found.family.memory if found.family is not None else "",
            )  # fmt: skip
    return table if table.row_count else None


def _unmapped(scores: Sequence[Scores]) -> Table | None:
    table = _table("family", "rows", "why")
    for found in scores:
        reasons: Counter[str] = Counter(_shortened(row) for row in found.unmapped)
        for reason, count in reasons.most_common(3):
            table.add_row(found.name, str(count), reason)
    return table if table.row_count else None


def _shortened(row: Unmapped) -> str:
    return row.reason if len(row.reason) <= 160 else row.reason[:157] + "..."


def _worst(scores: Sequence[Scores], count: int) -> Table | None:
    every = [(found.name, each) for found in scores for each in found.scored]
    if not every or count == 0:
        return None
    table = _table("family", "row", "layout")
    for name in ("predicted", "measured", "error", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, each in sorted(every, key=lambda pair: -abs(pair[1].error))[:count]:
        table.add_row(
            name, each.case.id, each.layout, human_seconds(each.predicted_s), human_seconds(each.case.measured_s),
            signed_percent(each.error), human_bytes(each.predicted_bytes),
        )  # fmt: skip
    return table
