"""What `clustersim validate --calibrate` and `--leave-one-out` say: as shipped beside calibrated, on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clustersim.report.figures import percent, signed_percent
from clustersim.validate.calibrated import CalibratedScore, Constant
from clustersim.validate.scoreboard import Summary
from clustersim.validate.sources import LeftOut


def calibrated_screen(scores: Sequence[CalibratedScore]) -> Group:
    """Two lines for each (source, cluster, framework): the rows that nothing was calibrated on, as shipped and
    calibrated on the others; then what was found, and what the rows do not tell apart."""
    table = _table("rows", "figure")
    for name in ("n", "mean", "median", "90th pct", "bias", "worst", "rank", "regret", "repeats"):
        table.add_column(name, justify="right", no_wrap=True)
    found: list[RenderableType] = []
    for one in scores:
        if one.shipped is None or one.calibrated is None:
            continue
        spread = one.repeats.spread if one.repeats is not None else one.stated
        table.add_row(one.family, "as shipped", *_figures(one.shipped), "-" if spread is None else percent(spread))
        told = f"on {one.k} rows" if one.method == "k rows" else "leave-one-out"
        table.add_row("", told, *_figures(one.calibrated), "")
        found.append(Text(f"{one.family}, {one.cluster}: {_constants(one.constants)}"))
        for pair in one.trades:
            found.append(Text(f"  {pair.one} and {pair.other} trade (correlation {pair.correlation:+.2f})"))
        errors = ", ".join(f"{free} {percent(error)}" for free, error in one.inner.items())
        found.append(Text(f"  free: {one.free}; each configuration left out in turn: {errors}"))
    few = [f"{one.family} ({one.cluster})" for one in scores if one.method == "too few"]
    parts: list[RenderableType] = [
        table, Text(), Text("Constants over those shipped (the others keep theirs: not identified)", style="bold"),
        *found,
    ]  # fmt: skip
    if few:
        parts += [Text(), Text(f"Too few configurations to calibrate on some and score others: {', '.join(few)}.")]
    return Group(*parts)


def left_out_screen(found: Sequence[LeftOut]) -> Group:
    """Two lines for each source: as shipped, and with constants that no row of it went into."""
    table = _table("source left out", "figure")
    for name in ("n", "mean", "median", "90th pct", "bias", "worst", "rank", "regret"):
        table.add_column(name, justify="right", no_wrap=True)
    lines: list[RenderableType] = []
    for one in found:
        table.add_row(one.source, "as shipped", *_figures(one.shipped))
        table.add_row("", f"on {one.fitted} of others", *_figures(one.left_out))
        what = one.learned
        told = "" if what.per_layer_identified else " (not identified: known in general)"
        spread = "" if what.jitter_identified else " (not identified)"
        lines.append(
            Text(
                f"without {one.source}: an eager layer takes the host {1e3 * what.per_layer_s:.2f} ms each way{told}; "
                f"jitter {percent(what.jitter)}{spread}"
            )
        )
    return Group(table, Text(), *lines)


def calibrated_document(scores: Sequence[CalibratedScore], found: Sequence[LeftOut]) -> dict[str, Any]:
    """Both as plain data."""
    from clustersim.files import plain

    groups = []
    for one in scores:
        told = plain(one)
        told["rows"] = [
            {"id": row.case.id, "measured_s": row.case.measured_s, "predicted_s": row.predicted_s, "error": row.error}
            for row in one.rows
        ]
        groups.append(told)
    return {"schema_version": 1, "calibrated": groups, "sources_left_out": [plain(one) for one in found]}


def _figures(figures: Summary) -> tuple[str, ...]:
    rank = figures.ranking
    return (
        str(figures.n), percent(figures.mean), percent(figures.median), percent(figures.p90),
        signed_percent(figures.bias), signed_percent(figures.worst),
        f"{rank.correlation:.2f}" if rank is not None else "-", percent(rank.regret) if rank is not None else "-",
    )  # fmt: skip


def _constants(constants: Sequence[Constant]) -> str:
    if not constants:
        return "kept as shipped"
    return ", ".join(f"{one.name} {one.value:.2f} ± {one.error:.2f}" for one in constants)


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold")
    return table
