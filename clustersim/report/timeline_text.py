"""A critical path in lines that a person can read: runs of like spans merged."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from clustersim.report.figures import percent
from clustersim.timeline import Span, Timeline, critical_path, is_communication
from clustersim.units import human_seconds

_VERBS = {
    "send": "send activations", "all-reduce": "all-reduce gradients", "reduce-scatter": "reduce-scatter gradients",
    "all-gather": "all-gather weights", "push": "push gradients", "pull": "pull weights", "update": "server updates",
    "gate": "wait for the slowest",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A run of the critical path: what happened, where, from when, and how long it took, waiting apart."""

    what: str
    where: str
    start_s: float
    busy_s: float
    waited_s: float
    spans: int


def stretches(timeline: Timeline, most: int = 14) -> list[Stretch]:
    """The critical path, first to last, in at most `most` stretches where merging can achieve that.

    Three grains are tried, finest first: same op kind, phase and place; then all compute and sends of one place; then
    all compute and sends wherever they run.
    """
    path = _path(timeline)
    labels = {c.rank: c.label for c in timeline.classes}
    grains: tuple[Callable[[Span], tuple[object, ...]], ...] = (
        lambda span: (span.op.kind, span.op.phase, span.rank),
        lambda span: (_broad(span), span.rank),
        lambda span: (_broad(span),),
    )
    found: list[Stretch] = []
    for grain in grains:
        found = _merged(path, grain, labels)
        if len(found) <= most:
            break
    return found


def _path(timeline: Timeline) -> list[Span]:
    """The critical path back to the start. Parts of a bucket overlap with the parts of what they wait for, so that a
    span may name nothing that ended before it: the path goes on with what ended last before it began."""
    path = list(critical_path(timeline))
    by_end = sorted(timeline.spans, key=lambda span: (span.end_s, span.start_s))
    ends = [span.end_s for span in by_end]
    while path:
        first = path[0]
        index = bisect.bisect_right(ends, first.start_s + 1e-12 * max(1.0, first.start_s)) - 1
        while index >= 0 and by_end[index].start_s >= first.start_s:
            index -= 1
        if index < 0:
            break
        current = by_end[index]
        chain = [current]
        while current.after:
            current = max((timeline.spans[i] for i in current.after), key=lambda span: span.end_s)
            chain.append(current)
        path = [*reversed(chain), *path]
    return path


def _broad(span: Span) -> str:
    return "pipeline" if span.op.kind in ("compute", "send") else span.op.kind


def _merged(path: Sequence[Span], grain: Callable[[Span], tuple[object, ...]], labels: dict[int, str]) -> list[Stretch]:
    result = []
    reached = path[0].start_s if path else 0.0
    for _, group in itertools.groupby(path, key=grain):
        spans = list(group)
        start = reached
        busy = 0.0
        for span in spans:
            busy += max(0.0, span.end_s - max(span.start_s, reached))
            reached = max(reached, span.end_s)
        result.append(
            Stretch(
                what=_what(spans), where=_where(spans, labels), start_s=start, busy_s=busy,
                waited_s=max(0.0, reached - start - busy), spans=len(spans),
            )
        )  # fmt: skip
    return result


def _what(spans: Sequence[Span]) -> str:
    parts = []
    counts: dict[tuple[str, str], list[Span]] = {}
    for span in spans:
        phase: str = span.op.phase if span.op.kind == "compute" else ""
        counts.setdefault((span.op.kind, phase), []).append(span)
    # What is computed goes first: sends are short.
    counts = dict(sorted(counts.items(), key=lambda item: item[0][0] != "compute"))
    for (kind, phase), like in counts.items():
        if kind == "compute":
            parts.append(f"{_COMPUTE.get(phase, phase)}{_micro_batches(like)}")
        else:
            many = f" ({len(like)} x)" if len(like) > 1 else ""
            parts.append(f"{_VERBS.get(kind, kind)}{many}")
    return ", ".join(parts)


_COMPUTE = {"forward": "forward", "backward": "backward", "synchronise": "reduction", "update": "optimizer step"}


def _micro_batches(spans: Sequence[Span]) -> str:
    numbers = sorted({span.op.micro_batch for span in spans if span.op.micro_batch >= 0})
    if not numbers:
        return ""
    if len(numbers) == 1:
        return f" of micro-batch {numbers[0]}"
    joined = numbers[-1] - numbers[0] + 1 == len(numbers)
    return f" of micro-batches {numbers[0]}-{numbers[-1]}" if joined else f" of {len(numbers)} micro-batches"


def _where(spans: Iterable[Span], labels: dict[int, str]) -> str:
    seen = list(dict.fromkeys(labels.get(span.rank, f"rank {span.rank}") for span in spans))
    return seen[0] if len(seen) == 1 else f"{seen[0]} … {seen[-1]}"


def critical_path_table(timeline: Timeline, most: int = 14) -> Table:
    """The critical path as a table: when, how long, what, and on whom."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("from", justify="right", no_wrap=True)
    table.add_column("for", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("what the step waits for", ratio=3)
    table.add_column("on", ratio=2)
    total = timeline.makespan_s or 1.0
    rows = stretches(timeline, most)
    rows = [row for row in rows if row.busy_s + row.waited_s >= 0.0005 * total]
    # Where nothing merges any further, the ends tell more than the middle.
    shown = rows if len(rows) <= 2 * most else [*rows[:most], *rows[-most:]]
    for index, row in enumerate(shown):
        if len(shown) < len(rows) and index == most:
            hidden = rows[most:-most]
            seconds = sum(other.busy_s + other.waited_s for other in hidden)
            table.add_row("…", human_seconds(seconds), percent(seconds / total), f"{len(hidden)} more", "")
        waited = f", {human_seconds(row.waited_s)} of it waiting" if row.waited_s > 0.005 * total else ""
        seconds = row.busy_s + row.waited_s
        table.add_row(
            human_seconds(row.start_s), human_seconds(seconds), percent(seconds / total), row.what + waited, row.where
        )
    return table


def phase_table(timeline: Timeline) -> Table:
    """Busy seconds of a step by phase and kind of work, over all ranks: mean and busiest."""
    members = {c.rank: len(c.members) for c in timeline.classes}
    servers = {c.rank for c in timeline.classes if c.label.startswith("servers")}
    seconds: dict[tuple[str, str, bool], dict[int, float]] = {}
    for span in timeline.spans:
        if span.op.kind == "gate":
            continue
        key = (span.op.phase, span.op.kind, span.rank in servers)
        of_rank = seconds.setdefault(key, {})
        of_rank[span.rank] = of_rank.get(span.rank, 0.0) + (span.end_s - span.start_s) / timeline.steps
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("phase")
    table.add_column("work")
    table.add_column("on")
    for name in ("mean", "busiest", "of step"):
        table.add_column(name, justify="right", no_wrap=True)
    order = ("forward", "backward", "synchronise", "update")
    step = timeline.makespan_s / timeline.steps or 1.0
    for (phase, kind, at_server), of_rank in sorted(seconds.items(), key=lambda item: order.index(item[0][0])):
        crowd = [rank for rank in members if (rank in servers) == at_server]
        total = sum(members[rank] for rank in crowd)
        mean = sum(of_rank.get(rank, 0.0) * members[rank] for rank in crowd) / total
        busiest = max(of_rank.values())
        table.add_row(
            phase, "compute" if kind == "compute" else _VERBS.get(kind, kind), "servers" if at_server else "workers",
            human_seconds(mean), human_seconds(busiest), percent(mean / step),
        )  # fmt: skip
    return table


def overlapped_note(timeline: Timeline) -> str:
    """Why the shares of `phase_table` may add up to more than one."""
    moving = any(is_communication(span) for span in timeline.spans)
    return "communication overlaps with compute: shares may add up to more than 100 %" if moving else ""
