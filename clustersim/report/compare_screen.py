"""What `clustersim compare` says: predicted beside measured."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clustersim.compare import Comparison, Figure, OpRow
from clustersim.report.figures import percent, signed_percent, with_interval
from clustersim.timeline import OpId
from clustersim.units import human_seconds


def op_text(op: OpId, *, place: bool = True) -> str:
    """An op identity in a few words: `backward L3-7, micro-batch 0, stage 1`; without the stage where it is said."""
    what = op.phase if op.kind == "compute" else op.kind
    part = "" if op.part == "all" else f" {op.part}"
    micro_batch = f", micro-batch {op.micro_batch}" if op.micro_batch >= 0 else ""
    stage = "" if not place else f", stage {op.stage}" if op.stage >= 0 else ", server"
    return f"{what}{part}{micro_batch}{stage}"


def compare_screen(name: str, found: Comparison, *, tolerance: float | None = None, most: int = 12) -> Group:
    """The step, the phases, the `most` ops that are furthest off in seconds, and what did not join."""
    parts: list[RenderableType] = [
        Text.assemble(
            (name, "bold"), ": predicted step ", (human_seconds(found.step.predicted_s), "bold"), ", measured ",
            (human_seconds(found.step.measured_s), "bold"), f" ({_spread(found.step)}), error ",
            (_error(found.step), _style(found.step, tolerance)),
        ),
        Text(
            f"{_inside(found)}{percent(found.joined_ops)} of the predicted ops were measured; they are "
            f"{percent(found.joined_time)} of the measured time"
        ),
        Text(),
        _phases(found),
    ]  # fmt: skip
    if found.ops:
        parts += [Text(), Text("Furthest off, in seconds a step", style="bold"), _ops(found.ops, most)]
    for words, ops in (("predicted only", found.predicted_only), ("measured only", found.measured_only)):
        if ops:
            more = f" and {len(ops) - 3} more" if len(ops) > 3 else ""
            parts.append(Text(f"{words}: {'; '.join(op_text(op) for op in ops[:3])}{more}"))
    return Group(*parts)


def _inside(found: Comparison) -> str:
    """Whether the measured step lies in the predicted interval."""
    if found.interval_s is None or found.step.samples == 0:
        return ""
    low, high = found.interval_s
    words = "inside" if low <= found.step.measured_s <= high else "outside"
    return f"{words} the 90 % interval {with_interval(found.step.predicted_s, low, high)}; "


def _columns(first: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for name in ("predicted", "measured", "10 to 90 %", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _phases(found: Comparison) -> Table:
    table = _columns("busiest rank")
    for row in found.phases:
        table.add_row(row.phase, *_cells(row.seconds))
    table.add_row("exposed communication", *_cells(found.exposed))
    table.add_row("step", *_cells(found.step), style="bold")
    return table


def _ops(ops: Sequence[OpRow], most: int) -> Table:
    table = _columns("op")
    worst = sorted(ops, key=lambda row: -abs(row.seconds.predicted_s - row.seconds.measured_s))
    for row in worst[:most]:
        table.add_row(f"{op_text(row.op, place=False)} ({row.ranks})", *_cells(row.seconds))
    return table


def _cells(figure: Figure) -> tuple[str, ...]:
    return human_seconds(figure.predicted_s), human_seconds(figure.measured_s), _spread(figure), _error(figure)


def _spread(figure: Figure) -> str:
    if figure.samples < 2:
        return "one sample" if figure.samples else "not measured"
    return f"{human_seconds(figure.low_s)} to {human_seconds(figure.high_s)}"


def _error(figure: Figure) -> str:
    return "-" if figure.error is None else signed_percent(figure.error)


def _style(figure: Figure, tolerance: float | None) -> str:
    if tolerance is None or figure.error is None:
        return "bold"
    return "bold green" if abs(figure.error) <= tolerance else "bold red"


def demo_table(rows: Sequence[tuple[str, Comparison]]) -> Table:
    """Predicted against measured, one line a layout."""
    table = _columns("layout")
    for name, found in rows:
        table.add_row(name, *_cells(found.step))
    return table
