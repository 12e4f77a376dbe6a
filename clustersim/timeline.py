"""Spans in time, simulated or measured: what ran, on whom, from when to when, and what it waited for."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from clustersim.units import FILE

# "weight-gradient": of a backward pass that is split in two; "backward" is then the gradient of the input alone.
Phase = Literal["forward", "backward", "weight-gradient", "synchronise", "update"]
OpKind = Literal[
    "compute", "send", "all-reduce", "reduce-scatter", "all-gather", "push", "pull", "update", "gate", "read"
]


class OpId(NamedTuple):
    """What an op is, independent of who predicts or measures it; predictions and measurements are joined on it.

    `stage` is the model chunk (the pipeline stage, where there are no virtual stages) or -1 on a server. `part` is
    `L3-7` (layers 3 to 7, both included), `B2` (bucket 2), or `all`. `micro_batch` is -1 for ops of the whole step.
    """

    step: int
    micro_batch: int
    stage: int
    phase: Phase
    part: str
    kind: OpKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One op on one rank (or on every rank of a class). Times are seconds from the start of the timeline.

    `ready_s` is when everything it waits for had happened; `start_s - ready_s` was spent waiting for its resource.
    `after` are indices of spans in the same timeline that it waited for; `follows` of those that it follows part by
    part, and that may end later than it begins. `inside_s`: seconds of a compute op that are collectives inside it;
    `idle_s`: seconds between the parts of a span that comes in parts.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    op: OpId
    rank: int
    start_s: float
    end_s: float
    ready_s: float
    resource: str
    after: tuple[int, ...] = ()
    follows: tuple[int, ...] = ()
    inside_s: float = 0.0
    idle_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankClass:
    """Ranks that behave alike: `rank` (the one that the spans name) stands for all `members`."""

    __pydantic_config__: ClassVar[Any] = FILE
    rank: int
    label: str
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What happened in `steps` steps. In a simulated timeline one span stands for every rank of a class.

    `communication` names the resources that carry traffic; all others compute.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    schema_version: Literal[1] = 1
    source: Literal["simulated", "measured"]
    steps: int
    classes: tuple[RankClass, ...]
    spans: tuple[Span, ...] = field(repr=False)

    @property
    def start_s(self) -> float:
        """When the first span starts."""
        return min((span.start_s for span in self.spans), default=0.0)

    @property
    def end_s(self) -> float:
        """When the last span ends."""
        return max((span.end_s for span in self.spans), default=0.0)

    @property
    def makespan_s(self) -> float:
        """From the first start to the last end."""
        return self.end_s - self.start_s

    def of_rank(self, rank: int) -> Iterator[Span]:
        """The spans of one rank, expanded from its class."""
        representative = next((c.rank for c in self.classes if rank in c.members), rank)
        return (span for span in self.spans if span.rank == representative)


def is_communication(span: Span) -> bool:
    """Whether a span moves bytes between ranks."""
    return span.op.kind in ("send", "all-reduce", "reduce-scatter", "all-gather", "push", "pull")


# What neither computes nor moves bytes between ranks.
_IDLE = ("gate", "read")


def union_s(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals. O(n log n)."""
    total, reach = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reach:
            total += end - max(start, reach)
            reach = end
    return total


def exposed_communication_s(timeline: Timeline, rank: int) -> float:
    """Seconds in which `rank` communicates and computes nothing: |comm u compute| - |compute|. O(n log n)."""
    spans = [(span, (span.start_s, span.end_s)) for span in timeline.of_rank(rank)]
    compute = [interval for span, interval in spans if not is_communication(span) and span.op.kind not in _IDLE]
    communicate = [interval for span, interval in spans if is_communication(span)]
    return union_s(compute + communicate) - union_s(compute)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """A piece of the critical path: from `start_s` to `end_s`, `span` is what everything later waits for. Without a
    span nothing ran that is known of."""

    start_s: float
    end_s: float
    span: Span | None

    @property
    def duration_s(self) -> float:
        """Seconds of the piece."""
        return self.end_s - self.start_s


def critical_legs(timeline: Timeline, since_s: float | None = None) -> tuple[Leg, ...]:
    """The critical path, first to last, without gaps from `since_s` (the start) to the end: the lengths add up.

    The predecessor of a span is what it waited for that ended latest: a dependency, or the span before it on its
    resource (the simulator lists both in `after`); of those that it follows part by part, what was under way when it
    began. A span that waited for nothing known (in measured timelines) comes behind what ended last. O(n log n).
    """
    since = timeline.start_s if since_s is None else since_s
    if not timeline.spans:
        return ()
    spans = timeline.spans
    current = max(range(len(spans)), key=lambda i: spans[i].end_s)
    reached = spans[current].end_s
    legs: list[Leg] = []
    ended: _Ended | None = None
    while reached > since:
        span = spans[current]
        start = min(span.start_s, reached)
        legs.append(Leg(start_s=max(start, since), end_s=reached, span=span))
        before = [*span.after, *(i for i in span.follows if spans[i].start_s < span.start_s)]
        if before:
            current = max(before, key=lambda i: (min(spans[i].end_s, start), spans[i].end_s <= start))
        else:
            ended = ended or _Ended(spans)
            found = ended.last_before(span)
            if found is None:
                reached = start
                break
            current = found
        reached = min(spans[current].end_s, start)
        if start > max(reached, since):
            legs.append(Leg(start_s=max(reached, since), end_s=start, span=None))
    if reached > since:
        legs.append(Leg(start_s=since, end_s=reached, span=None))
    return tuple(reversed(legs))


class _Ended:
    """Spans by their ends."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.order = sorted(range(len(spans)), key=lambda i: (spans[i].end_s, spans[i].start_s))
        self.ends = [spans[i].end_s for i in self.order]

    def last_before(self, span: Span) -> int | None:
        """What ended last, and began earlier, before `span` began; None where nothing did."""
        at = bisect.bisect_right(self.ends, span.start_s + 1e-12 * max(1.0, abs(span.start_s))) - 1
        while at >= 0 and self.spans[self.order[at]].start_s >= span.start_s:
            at -= 1
        return self.order[at] if at >= 0 else None


def critical_path(timeline: Timeline) -> tuple[Span, ...]:
    """The spans of the critical path (`critical_legs`), first to last."""
    return tuple(leg.span for leg in critical_legs(timeline) if leg.span is not None)


def step_ends(timeline: Timeline) -> tuple[float, ...]:
    """When the last op of each step ended."""
    ends = [timeline.start_s] * timeline.steps
    for span in timeline.spans:
        ends[span.op.step] = max(ends[span.op.step], span.end_s)
    return tuple(ends)


def check_invariants(timeline: Timeline) -> None:
    """Assert what every timeline must satisfy: no negative duration, no op before what it waits for, and no two
    spans at once on one serial resource of one rank. (A server's `host` is not serial by spans: it takes partitions of
    several buckets in turn.)"""
    busy: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for span in timeline.spans:
        assert span.end_s >= span.start_s >= span.ready_s >= 0.0 or timeline.source == "measured", span
        for index in span.after:
            before = timeline.spans[index]
            assert before.end_s <= span.start_s + 1e-9 * max(1.0, span.start_s), (before, span)
        if span.resource != "host":
            busy.setdefault((span.rank, span.resource), []).append((span.start_s, span.end_s))
    for key, intervals in busy.items():
        intervals.sort()
        for (_, end), (start, _) in itertools.pairwise(intervals):
            assert start >= end - 1e-9 * max(1.0, end), (key, end, start)


# What a counter shows over time: its name, and (seconds, value) where the value changes.
Counters = Mapping[str, Sequence[tuple[float, float]]]


def chrome_trace(*timelines: Timeline, counters: Counters | None = None) -> dict[str, Any]:
    """Timelines as one Chrome trace (JSON object format), which Perfetto opens: a process per class, a thread per
    resource; predicted and measured side by side where both are given. Arrows lead from what one class did to what
    another waited for it to do; `counters` become tracks of their own. Times are in microseconds, to the nanosecond."""
    events: list[dict[str, Any]] = []
    process = arrow = 0
    for timeline in timelines:
        process_of: dict[int, int] = {}
        for rank_class in timeline.classes:
            process += 1
            process_of[rank_class.rank] = process
            count = len(rank_class.members)
            name = f"{timeline.source}: {rank_class.label}" + (f" (x{count})" if count > 1 else "")
            events += _named(process, 0, "process", name, process)
        thread_of, named = _threads(timeline)
        for (rank, resource), thread in named.items():
            events += _named(process_of[rank], thread, "thread", resource, thread)
        for index, span in enumerate(timeline.spans):
            start, end = _microseconds(span.start_s), _microseconds(span.end_s)
            event = {"pid": process_of[span.rank], "tid": thread_of[index]}
            waited = _microseconds(span.start_s - span.ready_s)
            arguments = {**span.op._asdict(), "waited_us": waited}
            name = span_name(span)
            events.append(
                {"ph": "X", "name": name, "cat": span.op.kind, **event, "ts": start, "dur": round(end - start, 3),
                 "args": arguments}
            )  # fmt: skip
            for other in span.after:
                before = timeline.spans[other]
                if before.rank == span.rank or span.end_s <= span.start_s or before.end_s <= before.start_s:
                    continue
                arrow += 1
                whence = {"pid": process_of[before.rank], "tid": thread_of[other]}
                link = {"cat": "waits", "name": before.op.kind, "id": arrow}
                # An arrow hangs on the slice that its time is inside of.
                leaves = _microseconds(before.end_s - 1e-3 * (before.end_s - before.start_s))
                arrives = _microseconds(span.start_s + 1e-3 * (span.end_s - span.start_s))
                events.append({"ph": "s", **link, **whence, "ts": leaves})
                events.append({"ph": "f", "bp": "e", **link, **event, "ts": arrives})
    if counters:
        process += 1
        events += _named(process, 0, "process", "links", process)
        for name, changes in counters.items():
            events += [
                {"ph": "C", "name": name, "pid": process, "tid": 0, "ts": _microseconds(at), "args": {"value": value}}
                for at, value in changes
            ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def span_name(span: Span) -> str:
    """What a slice of a trace is called: `forward, micro-batch 3`, `all-reduce B2`."""
    op = span.op
    name = f"{op.phase}" if op.kind == "compute" else f"{op.kind}"
    part = "" if op.part == "all" else f" {op.part}"
    return f"{name}{part}" + (f", micro-batch {op.micro_batch}" if op.micro_batch >= 0 else "")


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _named(process: int, thread: int, what: str, name: str, order: int) -> list[dict[str, Any]]:
    place = {"ph": "M", "pid": process, "tid": thread}
    return [
        {**place, "name": f"{what}_name", "args": {"name": name}},
        {**place, "name": f"{what}_sort_index", "args": {"sort_index": order}},
    ]


def _threads(timeline: Timeline) -> tuple[list[int], dict[tuple[int, str], int]]:
    """The thread of each span, and the name of each thread: one a resource, more where its spans overlap (a server's
    host takes buckets in turn), since slices of one thread may not."""
    lanes: dict[tuple[int, str], list[tuple[int, float]]] = {}
    named: dict[tuple[int, str], int] = {}
    found = [0] * len(timeline.spans)
    for index in sorted(range(len(found)), key=lambda i: (timeline.spans[i].start_s, i)):
        span = timeline.spans[index]
        open_lanes = lanes.setdefault((span.rank, span.resource), [])
        start, end = _microseconds(span.start_s), _microseconds(span.end_s)
        lane = next((k for k, (_, reached) in enumerate(open_lanes) if reached <= start), len(open_lanes))
        if lane == len(open_lanes):
            name = span.resource if lane == 0 else f"{span.resource} {lane + 1}"
            named[span.rank, name] = len(named) + 1
            open_lanes.append((named[span.rank, name], end))
        thread = open_lanes[lane][0]
        open_lanes[lane] = (thread, end)
        found[index] = thread
    return found, named
