"""Spans in time, simulated or measured: what ran, on whom, from when to when, and what it waited for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from clustersim.units import FILE

Phase = Literal["forward", "backward", "synchronise", "update"]
OpKind = Literal["compute", "send", "all-reduce", "reduce-scatter", "all-gather", "push", "pull", "update", "gate"]


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
    `after` are indices of spans in the same timeline that it waited for.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    op: OpId
    rank: int
    start_s: float
    end_s: float
    ready_s: float
    resource: str
    after: tuple[int, ...] = ()


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
    compute = [interval for span, interval in spans if not is_communication(span) and span.op.kind != "gate"]
    communicate = [interval for span, interval in spans if is_communication(span)]
    return union_s(compute + communicate) - union_s(compute)


def critical_path(timeline: Timeline) -> tuple[Span, ...]:
    """A chain of spans that ends last, each waiting for the one before it, first to last. O(n).

    The predecessor of a span is what it waited for that ended latest: a dependency, or the span before it on its
    resource (the simulator lists both in `after`).
    """
    if not timeline.spans:
        return ()
    current = max(range(len(timeline.spans)), key=lambda i: timeline.spans[i].end_s)
    path = [current]
    while timeline.spans[current].after:
        current = max(timeline.spans[current].after, key=lambda i: timeline.spans[i].end_s)
        path.append(current)
    return tuple(timeline.spans[i] for i in reversed(path))


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


def chrome_trace(*timelines: Timeline) -> dict[str, Any]:
    """Timelines as one Chrome trace (JSON object format), which Perfetto opens: a process per class, a thread per
    resource; predicted and measured side by side where both are given."""
    events: list[dict[str, Any]] = []
    process = 0
    for timeline in timelines:
        process_of: dict[int, int] = {}
        thread_of: dict[tuple[int, str], int] = {}
        for rank_class in timeline.classes:
            process += 1
            process_of[rank_class.rank] = process
            count = len(rank_class.members)
            name = f"{timeline.source}: {rank_class.label}" + (f" (x{count})" if count > 1 else "")
            events.append({"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}})
        for span in timeline.spans:
            pid = process_of[span.rank]
            thread = thread_of.get((span.rank, span.resource))
            if thread is None:
                thread = thread_of[(span.rank, span.resource)] = len(thread_of) + 1
                events.append(
                    {"ph": "M", "name": "thread_name", "pid": pid, "tid": thread, "args": {"name": span.resource}}
                )
            op = span.op
            events.append(
                {
                    "ph": "X",
                    "name": f"{op.kind} {op.phase} {op.part}",
                    "cat": op.kind,
                    "pid": pid,
                    "tid": thread,
                    "ts": span.start_s * 1e6,
                    "dur": (span.end_s - span.start_s) * 1e6,
                    "args": {**op._asdict(), "waited_us": (span.start_s - span.ready_s) * 1e6},
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
