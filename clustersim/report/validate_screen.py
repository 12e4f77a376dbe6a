"""What `clustersim validate` says: errors by family, beside what peers report, and the worst rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clustersim.report.figures import percent, signed_percent
from clustersim.report.hanging import Name, figure_lines, hanging
from clustersim.units import human_bytes, human_seconds
from clustersim.validate.board import Scores
from clustersim.validate.case import Unmapped, line_words, reasons
from clustersim.validate.score import Scored

# One noisy source would fill the list of the worst rows.
_OF_ONE = 3
_MEMORY = "Memory of the fullest device, and whether layouts that ran are called feasible"


def scoreboard_screen(scores: Sequence[Scores], *, worst: int = 10) -> Group:
    """One line a family, then the rankings, memory, what could not be mapped, and the worst rows."""
    parts: list[RenderableType] = [_errors(scores)]
    for found in scores:
        if found.family is not None and found.family.learned:
            parts.append(hanging([("*", f"{found.name}: profiles learned from it {found.family.learned}")]))
    for title, table in (
        ("Rankings: groups of one model, cluster and batch with at least four layouts", _rankings(scores)),
        (_MEMORY, _memory(scores)),
        ("Rows that are no case", _unmapped(scores)),
    ):
        if table is not None:
            parts += [Text(), Text(title, style="bold"), table]
    lines = _worst(scores, worst)
    if lines.row_count:
        parts += [Text(), Text(f"Furthest off (at most {_OF_ONE} of a family)", style="bold"), lines]
    return Group(*parts, *_outside(scores))


def rows_screen(found: Scores, width: int) -> Group:
    """Every row of a file in `width` columns: predicted, measured, error, interval, share of measured kernels with the
    coverage flag, what it is; then what was assumed, and why rows are no case."""
    parts: list[RenderableType] = []
    rows = [("line", "predicted", "measured", "error", "tables", "90 % interval", "in", "row")]
    for each in sorted(found.scored, key=lambda each: each.case.line):
        low, high = human_seconds(each.low_s), human_seconds(each.high_s)
        flags = ("!" if each.outside else " ") + ("?" if each.case.assumed else "")
        rows.append(
            (
                str(each.case.line), human_seconds(each.predicted_s), human_seconds(each.case.measured_s),
                signed_percent(each.error), f"{percent(each.coverage)} {flags}", f"{low} to {high}",
                "yes" if each.covered else "no", f"{each.case.id}: {each.layout}",
            )
        )  # fmt: skip
    if found.scored:
        parts.append(Text(figure_lines(rows, 5, width), no_wrap=True, overflow="ignore"))
    notes = [("tables:", "the share of the kernel time that comes from measured tables")] if found.scored else []
    if any(each.outside for each in found.scored):
        notes.append(("!", "outside of what the profiles or the validated runs cover; --json says in what"))
    notes += [("?", f"assumed, {line_words(lines)}: {what}") for what, lines in _assumed(found)]
    beyond = _beyond(found)
    if beyond:
        these, ran = ("1 row does", "it") if len(beyond) == 1 else (f"{len(beyond)} rows do", "they")
        most = percent(1.0 - min(each.headroom for each in beyond))
        at = line_words(sorted(each.case.line for each in beyond))
        notes.append(
            ("memory:", f"{these} not fit by prediction, though {ran} ran (up to {most} of the device's memory): {at}")
        )
    if notes:
        parts += [Text(), hanging(notes)]
    if found.unmapped:
        parts += [Text(), Text(f"Rows of {found.name} that are not predicted", style="bold")]
        told = [(str(len(lines)), f"{line_words(lines)}: {why}") for why, lines in reasons(found.unmapped)]
        parts.append(hanging(told, right=True))
    if found.scored:
        parts += [Text(), _errors([found])]
    if found.memory is not None and found.memory.errors is not None:
        parts += [Text(), Text(_MEMORY, style="bold"), _memory([found]) or Text()]
    return Group(*parts, *_outside([found]))


def _beyond(found: Scores) -> list[Scored]:
    """Rows that do not fit by prediction, though all that their layouts have was on the devices when they ran."""
    return [each for each in found.scored if not each.fits and not each.case.kept_elsewhere]


def _assumed(found: Scores) -> list[tuple[str, tuple[int, ...]]]:
    """What was assumed, and for which lines."""
    return reasons(
        Unmapped(id=each.case.id, line=each.case.line, reason=what)
        for each in found.scored
        for what in each.case.assumed
    )


def _outside(scores: Sequence[Scores]) -> list[RenderableType]:
    """How many rows leave the profiles or the validated runs, and in what."""
    counts = Counter(reason for found in scores for each in found.scored for reason in each.outside)
    if not counts:
        return []
    told = [(str(count), str(reason)) for reason, count in counts.most_common()]
    return [Text(), Text("Rows outside of what is covered, and in what", style="bold"), hanging(told, right=True)]


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
        "assumed": list(each.case.assumed),
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
            table.add_row(Name(found.name), "0", "", "", "", "", "", "", "")
            continue
        peers = () if found.family is None else found.family.peers
        table.add_row(
            Name(found.name + star), str(figures.n), percent(figures.mean), percent(figures.median),
            percent(figures.p90), signed_percent(figures.bias), signed_percent(figures.worst), percent(figures.covered),
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
                Name(found.name), str(rank.groups), str(rank.layouts), f"{rank.correlation:.3f}", percent(rank.regret),
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
                Name(found.name), *shown, f"{figures.called_infeasible} of {figures.judged}",
                signed_percent(figures.least_headroom), found.family.memory if found.family is not None else "",
            )  # fmt: skip
    return table if table.row_count else None


def _unmapped(scores: Sequence[Scores]) -> Table | None:
    table = _table("family", "rows", "why")
    for found in scores:
        reasons: Counter[str] = Counter(_shortened(row) for row in found.unmapped)
        for reason, count in reasons.most_common(3):
            table.add_row(Name(found.name), str(count), reason)
    return table if table.row_count else None


def _shortened(row: Unmapped) -> str:
    return row.reason if len(row.reason) <= 160 else row.reason[:157] + "..."


def _worst(scores: Sequence[Scores], count: int) -> Table:
    """The rows that are furthest off, with what is known of the cause."""
    every = [
        (found, each) for found in scores for each in sorted(found.scored, key=lambda each: -abs(each.error))[:_OF_ONE]
    ]
    lines = []
    for found, each in sorted(every, key=lambda pair: -abs(pair[1].error))[:count]:
        said = "in" if each.covered else "outside"
        words = f"{human_seconds(each.predicted_s)} predicted, {human_seconds(each.case.measured_s)} measured"
        lines.append((signed_percent(each.error), f"{found.name}: {each.case.id}: {words} ({said} the interval)"))
        lines.append(("", f"{each.layout}, {human_bytes(each.predicted_bytes)}"))
        if found.family is not None:
            lines.append(("", f"cause: {found.family.cause(each.case.id) or 'not known'}"))
    return hanging(lines, right=True)
