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

# One noisy source would fill the list of the worst rows.
_OF_ONE = 3


def scoreboard_screen(scores: Sequence[Scores], *, worst: int = 10) -> Group:
    """One line a family, then the rankings, memory, what could not be mapped, and the worst rows."""
    parts: list[RenderableType] = [_errors(scores)]
    for found in scores:
        if found.family is not None and found.family.learned:
            parts.append(Text(f"* {found.name}: profiles learned from it {found.family.learned}"))
    for title, table in (
        ("Rankings: groups of one model, cluster and batch with at least four layouts", _rankings(scores)),
        ("Memory of the fullest device: errors where the source states it, and layouts that ran", _memory(scores)),
        ("Rows that are no case", _unmapped(scores)),
    ):
        if table is not None:
            parts += [Text(), Text(title, style="bold"), table]
    lines = _worst(scores, worst)
    if lines:
        parts += [Text(), Text(f"Furthest off (at most {_OF_ONE} of a family)", style="bold"), *lines]
    return Group(*parts, *_outside(scores))


def rows_screen(found: Scores) -> Group:
    """Every row of a file: predicted, measured, error, interval, share of measured kernels, coverage flag."""
    table = _table("row", "layout")
    for name in ("predicted", "measured", "error", "90 % interval", "in it", "by tables"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found.scored:
        table.add_row(
            each.case.id, each.layout, human_seconds(each.predicted_s), human_seconds(each.case.measured_s),
            signed_percent(each.error), f"{human_seconds(each.low_s)} to {human_seconds(each.high_s)}",
            "yes" if each.covered else "no",
            percent(each.coverage) + (" !" if each.outside else ""),
        )  # fmt: skip
    parts: list[RenderableType] = [table] if found.scored else []
    if any(each.outside for each in found.scored):
        parts.append(Text("!: outside of what the profiles or the validated runs cover; --json says in what"))
    parts += [Text(f"{found.name}, line {row.line}: {row.id}: not predicted: {row.reason}") for row in found.unmapped]
    if found.scored:
        parts += [Text(), _errors([found])]
    return Group(*parts, *_outside([found]))


def _outside(scores: Sequence[Scores]) -> list[Text]:
    """How many rows leave the profiles or the validated runs, and in what."""
    counts = Counter(reason for found in scores for each in found.scored for reason in each.outside)
    if not counts:
        return []
    told = "; ".join(f"{reason} ({count} {'row' if count == 1 else 'rows'})" for reason, count in counts.most_common())
    return [Text(), Text(f"Outside of what is covered: {told}.")]


def scoreboard_document(scores: Sequence[Scores]) -> dict[str, Any]:
    """The scoreboard as plain data."""
    return {"schema_version": 1, "families": [_family_document(found) for found in scores]}


def _family_document(found: Scores) -> dict[str, Any]:
    from clustersim.files import plain

    return {
        "name": found.name,
        "summary": None if found.summary is None else plain(found.summary),
        "memory": None if found.memory is None else plain(found.memory),
        "title": "" if found.family is None else found.family.title,
        "learned": "" if found.family is None else found.family.learned,
        "peers": [] if found.family is None else [plain(peer) for peer in found.family.peers],
        "rows": [
            _row_document(each) | ({} if found.family is None else {"cause": found.family.cause(each.case.id)})
            for each in found.scored
        ],
        "unmapped": [plain(row) for row in found.unmapped],
    }


def _row_document(each: Scored) -> dict[str, Any]:
    return {
        "id": each.case.id,
        "line": each.case.line,
        "layout": each.layout,
        "measured_s": each.case.measured_s,
        "predicted_s": each.predicted_s,
        "low_s": each.low_s,
        "high_s": each.high_s,
        "error": each.error,
        "in_interval": each.covered,
        "coverage": each.coverage,
        "kind": list(each.kind),
        "outside": [reason.value for reason in each.outside],
        "measured_bytes": each.case.memory_bytes,
        "predicted_bytes": each.predicted_bytes,
        "memory_level": each.case.memory_level,
        "fits": each.fits,
        "headroom": each.headroom,
        "kept_elsewhere": each.case.kept_elsewhere,
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
        star = " *" if found.family is not None and found.family.learned else ""
        if figures is None:
            table.add_row(found.name, "0", "", "", "", "", "", "", "")
            continue
        peers = () if found.family is None else found.family.peers
        table.add_row(
            found.name + star, str(figures.n), percent(figures.mean), percent(figures.median), percent(figures.p90),
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
    for name in ("n", "mean", "median", "bias", "worst", "infeasible", "least headroom"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what the source states", overflow="fold")
    for found in scores:
        if found.memory is not None:
            figures, errors = found.memory, found.memory.errors
            shown = ["0", "", "", "", ""]
            if errors is not None:
                shown = [str(errors.n), percent(errors.mean), percent(errors.median)]
                shown += [signed_percent(errors.bias), signed_percent(errors.worst)]
            table.add_row(
                found.name, *shown, f"{figures.called_infeasible} of {figures.judged}",
                signed_percent(figures.least_headroom), found.family.memory if found.family is not None else "",
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


def _worst(scores: Sequence[Scores], count: int) -> list[Text]:
    """The rows that are furthest off, with what is known of the cause."""
    every = [
        (found, each) for found in scores for each in sorted(found.scored, key=lambda each: -abs(each.error))[:_OF_ONE]
    ]
    lines = []
    for found, each in sorted(every, key=lambda pair: -abs(pair[1].error))[:count]:
        said = "in" if each.covered else "outside"
        lines.append(
            Text(
                f"{signed_percent(each.error):>7}  {found.name}: {each.case.id}: {human_seconds(each.predicted_s)} "
                f"predicted, {human_seconds(each.case.measured_s)} measured ({said} the interval)"
            )
        )
        lines.append(Text(f"         {each.layout}, {human_bytes(each.predicted_bytes)}"))
        if found.family is not None:
            lines.append(Text(f"         cause: {found.family.cause(each.case.id) or 'not known'}"))
    return lines
