"""From what ranks noted to one measured Timeline. No torch here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from clustersim import __version__
from clustersim.compare import Run
from clustersim.execute.task import Task, server_rank
from clustersim.timeline import OpId, RankClass, Span, Timeline

# Resources that finish one thing after the other only in the plan: two transfers in flight at once are shown one behind
# the other, in the order in which they ended, so that the time in which the resource was busy is exact.
_SHARED = ("collective", "push", "pull")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What one process saw: `Notes.rows()`, its share of each step's loss, and when each of its steps ended."""

    rank: int
    rows: list[list[Any]]
    losses: list[float]
    step_ends_s: list[float]
    clock_offset_s: float
    environment: dict[str, str]


def assemble(task: Task, observed: Sequence[Observed], backend: str, device: str) -> Run:
    """The Run of all processes together. A step takes from the end of the one before it, on the last worker to get
    there, to its own end. Warm-up steps are left out, and the others are numbered from 0."""
    workers = [o for o in observed if o.rank < task.workers]
    ends = [max(o.step_ends_s[k] - o.clock_offset_s for o in workers) for k in range(task.warmup + task.steps)]
    begin = ends[task.warmup - 1] if task.warmup else min(_first(o) for o in workers)
    edges = [begin, *ends[task.warmup :]]
    # A worker that is ahead starts its first measured step before the last one has ended its warm-up.
    zero = min(float(row[7]) - o.clock_offset_s for o in observed for row in o.rows if row[0] >= task.warmup)
    spans: list[Span] = []
    for o in observed:
        spans += _spans(task, o, zero)
    spans = _begin_pulls(task, spans)
    return Run(
        clustersim=__version__,
        program_digest=task.program_digest,
        backend="nccl" if backend == "nccl" else "gloo",
        device=device,
        ranks=task.processes,
        environment=observed[0].environment,
        warmup_steps=task.warmup,
        step_s=tuple(after - before for before, after in pairwise(edges)),
        losses=tuple(sum(o.losses[k] for o in workers) for k in range(task.warmup + task.steps)),
        clock_offset_s=tuple(o.clock_offset_s for o in observed),
        timeline=Timeline(
            source="measured",
            steps=task.steps,
            classes=tuple(_class_of(task, o.rank) for o in observed),
            spans=tuple(_one_after_the_other(spans)),
        ),
    )


def _class_of(task: Task, rank: int) -> RankClass:
    if rank >= task.workers:
        label = f"server {rank - task.workers}"
    else:
        beside = any(server_rank(task, share.server) == rank for share in task.program.servers)
        label = f"worker {rank} and its server" if beside else f"worker {rank}"
    return RankClass(rank=rank, label=label, members=(rank,))


def _first(observed: Observed) -> float:
    return min(float(row[8]) for row in observed.rows) - observed.clock_offset_s


def _spans(task: Task, observed: Observed, zero: float) -> list[Span]:
    result = []
    shift = zero + observed.clock_offset_s
    for step, micro_batch, stage, phase, part, kind, resource, ready, start, end in observed.rows:
        if step >= task.warmup:
            op = OpId(step - task.warmup, micro_batch, stage, phase, part, kind)
            at = {"ready_s": ready - shift, "start_s": start - shift, "end_s": end - shift}
            result.append(Span(op=op, rank=observed.rank, resource=resource, **at))
    return result


def _begin_pulls(task: Task, spans: list[Span]) -> list[Span]:
    """A worker sees only the end of a pull. It begins when the first server has updated the bucket."""
    updated: dict[tuple[int, str], float] = defaultdict(lambda: float("inf"))
    for span in spans:
        if span.op.kind == "update":
            key = (span.op.step, span.op.part)
            updated[key] = min(updated[key], span.end_s)
    result = []
    for span in spans:
        if span.op.kind == "pull":
            start = min(span.end_s, updated[span.op.step, span.op.part])
            span = replace(span, start_s=start, ready_s=start)
        result.append(span)
    return result


def _one_after_the_other(spans: list[Span]) -> list[Span]:
    reached: dict[tuple[int, str], float] = {}
    result = []
    for span in sorted(spans, key=lambda s: (s.end_s, s.start_s, s.rank, s.op)):
        key = (span.rank, span.resource)
        if span.resource in _SHARED and reached.get(key, span.start_s) > span.start_s:
            span = replace(span, start_s=min(span.end_s, reached[key]))
        reached[key] = span.end_s
        result.append(span)
    return result
