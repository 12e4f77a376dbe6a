"""A critical path in lines that a person can read: what happens again and again, once, with how often and how long."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from clustersim.report.figures import percent
from clustersim.timeline import Leg, Span, Timeline, critical_legs, is_communication, step_ends
from clustersim.units import human_seconds

_VERBS = {
    "send": "send activations", "all-reduce": "all-reduce gradients", "reduce-scatter": "reduce-scatter gradients",
    "all-gather": "all-gather weights", "push": "push gradients", "pull": "pull weights", "update": "server updates",
    "gate": "end of the step", "read": "read input",
}  # fmt: skip
_PASSES = {
    "forward": "forward", "backward": "backward", "weight-gradient": "weight gradients", "synchronise": "reduction",
    "update": "optimizer step",
}  # fmt: skip
_INSIDE = "collectives inside"
# Rows of less than this share of the path are shown together.
_LEAST_SHARE = 0.0005

# What happened, of which phase, and on which class of ranks (-1: on several).
Key = tuple[str, str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """What the critical path does again and again: first from `start_s`, last until `end_s`, `times` in all, `busy_s`
    together; `waited_s` where nothing ran that is known of."""

    what: str
    where: str
    start_s: float
    end_s: float
    busy_s: float
    waited_s: float
    spans: int
    times: int


@dataclass(slots=True)
class _Heap:
    """Legs of one kind, while they are gathered."""

    start_s: float
    end_s: float = 0.0
    seconds: float = 0.0
    spans: int = 0
    passes: set[tuple[object, ...]] = field(default_factory=set)
    seconds_on: dict[int, float] = field(default_factory=dict)

    def add(self, leg: Leg, seconds: float) -> None:
        """One leg more, `seconds` of which are of this kind."""
        self.end_s = max(self.end_s, leg.end_s)
        self.seconds += seconds
        self.spans += 1
        if leg.span is not None:
            # The pieces of a pass are one pass.
            op = leg.span.op
            once = (op.step, op.micro_batch, op.stage) if op.kind == "compute" else (self.spans,)
            self.passes.add(once)
            self.seconds_on[leg.span.rank] = self.seconds_on.get(leg.span.rank, 0.0) + seconds


def stretches(timeline: Timeline, most: int = 14, *, last_step: bool = False) -> list[Stretch]:
    """The critical path as rows of like ops, by first appearance; their seconds add up to it.

    Rows tell classes of ranks apart where that takes at most `most` rows. `last_step`: only what happened once the step
    before the last had ended.
    """
    legs = critical_legs(timeline, _start_of(timeline, last_step))
    apart = _heaps(legs, lambda span: span.rank)
    found = apart if len(apart) <= most else _heaps(legs, lambda span: -1)
    labels = {c.rank: c.label for c in timeline.classes}
    return [_stretch(key, heap, labels) for key, heap in found.items()]


def _start_of(timeline: Timeline, last_step: bool) -> float | None:
    """When the step before the last ended, of those that ask for the last alone."""
    ends = step_ends(timeline) if last_step else []
    return ends[-2] if len(ends) > 1 else None


def _between(start_s: float, end_s: float, whole_s: float) -> str:
    """Two moments of `whole_s` seconds, told apart where they are a thousandth of these apart: `12.63 - 12.78 s`."""
    unit, scale = next(((unit, s) for unit, s in (("s", 1.0), ("ms", 1e-3)) if whole_s >= s), ("us", 1e-6))
    places = max(0, 3 - math.floor(math.log10(whole_s / scale)))
    return f"{start_s / scale:,.{places}f} - {end_s / scale:,.{places}f} {unit}"


def _heaps(legs: Sequence[Leg], place: Callable[[Span], int]) -> dict[Key, _Heap]:
    found: dict[Key, _Heap] = {}

    def put(key: Key, leg: Leg, seconds: float) -> None:
        heap = found.get(key)
        if heap is None:
            heap = found[key] = _Heap(start_s=leg.start_s)
        heap.add(leg, seconds)

    for leg in legs:
        span = leg.span
        if span is None:
            put(("wait", "", -1), leg, leg.duration_s)
            continue
        kind, phase = span.op.kind, span.op.phase if span.op.kind in ("compute", "all-gather") else ""
        whole = span.end_s - span.start_s
        inside = span.inside_s * leg.duration_s / whole if whole > 0.0 else 0.0
        put((kind, phase, place(span)), leg, leg.duration_s - inside)
        if inside > 0.0:
            put((_INSIDE, phase, place(span)), leg, inside)
    return found


def _stretch(key: Key, heap: _Heap, labels: dict[int, str]) -> Stretch:
    kind, phase, _ = key
    times = len(heap.passes)
    waiting = kind == "wait"
    return Stretch(
        what=_what(kind, phase, times),
        where=_where(heap.seconds_on, labels),
        start_s=heap.start_s,
        end_s=heap.end_s,
        busy_s=0.0 if waiting else heap.seconds,
        waited_s=heap.seconds if waiting else 0.0,
        spans=heap.spans,
        times=max(1, times),
    )


def _what(kind: str, phase: str, times: int) -> str:
    many = f"{times:,} x " if times > 1 else ""
    if kind == "wait":
        return "waiting"
    if kind == "compute":
        return f"{many}{_PASSES[phase]}"
    if kind == _INSIDE:
        return f"{_INSIDE} {many}{_PASSES[phase]}"
    of = f", {_PASSES[phase]}" if phase in ("forward", "backward") and kind == "all-gather" else ""
    exposed = "" if kind in ("gate", "update") else ", exposed"
    return f"{many}{_VERBS.get(kind, kind)}{of}{exposed}"


def _where(seconds_on: dict[int, float], labels: dict[int, str]) -> str:
    names = {rank: labels.get(rank, f"rank {rank}") for rank in seconds_on}
    if len(names) <= 1:
        return next(iter(names.values()), "")
    most = max(seconds_on, key=lambda rank: (seconds_on[rank], -rank))
    return f"{percent(seconds_on[most] / sum(seconds_on.values()))} {names[most]}"


def critical_path_table(timeline: Timeline, most: int = 14, *, last_step: bool = False) -> Table:
    """The critical path as a table: what the step waits for, how long in all, when, and on whom. Rows add up to the
    last, and moments count from the start of the step."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in ("for", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what the step waits for", ratio=3)
    table.add_column("between", no_wrap=True)
    table.add_column("on", ratio=2)
    rows = stretches(timeline, most, last_step=last_step)
    total = sum(row.busy_s + row.waited_s for row in rows)
    if not total:
        return table
    start_s = _start_of(timeline, last_step) or 0.0
    short = [row for row in rows if row.busy_s + row.waited_s < _LEAST_SHARE * total]
    for row in rows:
        seconds = row.busy_s + row.waited_s
        if row not in short:
            between = _between(row.start_s - start_s, row.end_s - start_s, total)
            table.add_row(human_seconds(seconds), percent(seconds / total), row.what, between, row.where)
    if short:
        seconds = sum(row.busy_s + row.waited_s for row in short)
        table.add_row(human_seconds(seconds), percent(seconds / total), "others", "", "")
    table.add_row(human_seconds(total), percent(1.0), "in all", "", "", style="bold")
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
        of_rank[span.rank] = of_rank.get(span.rank, 0.0) + (span.end_s - span.start_s - span.idle_s) / timeline.steps
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("phase")
    table.add_column("work")
    table.add_column("on")
    for name in ("mean", "busiest", "of step"):
        table.add_column(name, justify="right", no_wrap=True)
    order = tuple(_PASSES)
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
