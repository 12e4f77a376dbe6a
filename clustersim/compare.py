"""Predicted and measured timelines, joined on what each op is."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from clustersim.timeline import OpId, OpKind, Phase, Span, Timeline, is_communication, union_s

if TYPE_CHECKING:
    import pandas as pd

PLAIN: dict[str, Any] = {"extra": "forbid"}

# Ops that no rank can finish before the last one has joined in.
_TOGETHER: tuple[OpKind, ...] = ("all-reduce", "reduce-scatter", "all-gather")
_PHASES: tuple[Phase, ...] = ("forward", "backward", "weight-gradient", "synchronise", "update")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`run.json`: what a real run measured. `step_s` are the wall times of the measured steps (warm-up left out);
    `losses` one per step of the whole run; `timeline` covers the measured steps; `clock_offset_s` per rank was already
    subtracted from its spans."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    schema_version: Literal[1] = 1
    clustersim: str
    program_digest: str
    backend: Literal["gloo", "nccl"]
    device: str
    ranks: int
    environment: dict[str, str]
    warmup_steps: int
    step_s: tuple[float, ...]
    losses: tuple[float, ...]
    clock_offset_s: tuple[float, ...] = ()
    timeline: Timeline = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One quantity, predicted and measured: the median, the 10th and the 90th percentile of `samples` measurements.

    `error` is predicted / measured - 1; None where nothing was measured, or zero seconds.
    """

    __pydantic_config__: ClassVar[Any] = PLAIN
    predicted_s: float
    measured_s: float
    low_s: float
    high_s: float
    samples: int
    error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRow:
    """One op of one class of ranks, per step. `op.step` is 0: steps are repetitions of one another."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    op: OpId
    ranks: str
    seconds: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRow:
    """How long the busiest rank (worker or server) is busy with the ops of one phase in a step."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    phase: Phase
    seconds: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A prediction beside a measurement.

    `exposed` is the time in which the worker that computes longest communicates and does not compute.
    `interval_s` is the 90 % interval that was predicted of the step.
    `joined_ops` is the fraction of the predicted ops that were found in the measurement, `joined_time` the fraction of
    the measured seconds that belong to joined ops; the others are listed.
    """

    __pydantic_config__: ClassVar[Any] = PLAIN
    schema_version: Literal[1] = 1
    step: Figure
    exposed: Figure
    phases: tuple[PhaseRow, ...]
    ops: tuple[OpRow, ...]
    joined_ops: float
    joined_time: float
    predicted_only: tuple[OpId, ...]
    measured_only: tuple[OpId, ...]
    interval_s: tuple[float, float] | None = None


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0 to 1) of at least one value, interpolated linearly (Hyndman & Fan 1996, type 7)."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def compare(predicted: Timeline, measured: Timeline, *, step_s: Sequence[float] = ()) -> Comparison:
    """Join two timelines of one program by op identity. O(spans log spans).

    The step is no part of the identity. A measured op has one sample per step: the median over those ranks that the
    predicted class stands for; of these samples the rows give median, 10th and 90th percentile. Collectives are timed
    from when the last rank joined in, as the simulator times them: waiting for a slow rank is no communication.
    `step_s` are the wall times of the steps as the run timed them; left out, a step lasts from the end of the one
    before it to its own.
    """
    expected = _by_op(predicted, predicted.spans)
    observed_spans = _since_last_joined(measured.spans)
    owners = _owners(predicted, measured, observed_spans)
    observed: dict[tuple[OpId, int], dict[int, list[float]]] = {}
    total_s = joined_s = 0.0
    strays: set[OpId] = set()
    for span in observed_spans:
        identity = span.op._replace(step=0)
        owner = owners.get((identity, span.rank))
        total_s += span.end_s - span.start_s
        if owner is None:
            strays.add(identity)
            continue
        joined_s += span.end_s - span.start_s
        samples = observed.setdefault((identity, owner), {})
        samples.setdefault(span.op.step, []).append(span.end_s - span.start_s)
    labels = {c.rank: c.label for c in predicted.classes}
    rows = tuple(
        OpRow(
            op=op,
            ranks=labels[rank],
            seconds=_figure(seconds, [statistics.median(of_step) for of_step in observed[op, rank].values()]),
        )
        for (op, rank), seconds in expected.items()
        if (op, rank) in observed
    )
    steps = tuple(step_s) or _steps(measured.spans)
    return Comparison(
        step=_figure(predicted.makespan_s / predicted.steps, steps),
        exposed=_figure(statistics.median(_exposed(predicted.spans)), _exposed(observed_spans)),
        phases=_phase_rows(predicted.spans, observed_spans),
        ops=rows,
        joined_ops=len(rows) / len(expected) if expected else 1.0,
        joined_time=joined_s / total_s if total_s > 0.0 else 1.0,
        predicted_only=tuple(dict.fromkeys(op for op, rank in expected if (op, rank) not in observed)),
        measured_only=tuple(sorted(strays)),
    )


def _figure(predicted_s: float, samples: Sequence[float]) -> Figure:
    middle = statistics.median(samples) if samples else 0.0
    return Figure(
        predicted_s=predicted_s,
        measured_s=middle,
        low_s=quantile(samples, 0.1) if samples else 0.0,
        high_s=quantile(samples, 0.9) if samples else 0.0,
        samples=len(samples),
        error=predicted_s / middle - 1.0 if middle > 0.0 else None,
    )


def _by_op(timeline: Timeline, spans: Iterable[Span]) -> dict[tuple[OpId, int], float]:
    """Seconds of every (op, class) in a step: the mean over the steps of a prediction."""
    found: dict[tuple[OpId, int], float] = {}
    for span in spans:
        key = (span.op._replace(step=0), span.rank)
        found[key] = found.get(key, 0.0) + (span.end_s - span.start_s) / timeline.steps
    return found


def _since_last_joined(spans: Sequence[Span]) -> list[Span]:
    """The same spans, collectives beginning when their last rank has arrived."""
    last: dict[OpId, float] = {}
    for span in spans:
        if span.op.kind in _TOGETHER:
            last[span.op] = max(last.get(span.op, span.start_s), span.start_s)
    return [
        replace(span, start_s=min(span.end_s, last[span.op])) if span.op.kind in _TOGETHER else span for span in spans
    ]


def _owners(predicted: Timeline, measured: Timeline, spans: Sequence[Span]) -> Mapping[tuple[OpId, int], int]:
    """Which predicted class stands for each (op, rank) that was measured.

    A rank belongs to the class that lists it. A server beside a worker has a number of its own in the prediction, and
    its worker's in the measurement: its ops belong to the class that no measured rank is a member of.
    """
    class_of = {member: c.rank for c in predicted.classes for member in c.members}
    seen = {rank for c in measured.classes for rank in c.members}
    hidden = {c.rank for c in predicted.classes if not seen.intersection(c.members)}
    with_op: dict[OpId, set[int]] = {}
    for span in predicted.spans:
        with_op.setdefault(span.op._replace(step=0), set()).add(span.rank)
    found: dict[tuple[OpId, int], int] = {}
    for span in spans:
        identity = span.op._replace(step=0)
        candidates = with_op.get(identity, set())
        own = class_of.get(span.rank)
        if own in candidates:
            assert own is not None
            found[identity, span.rank] = own
        elif candidates & hidden:
            found[identity, span.rank] = min(candidates & hidden)
    return found


def _steps(spans: Iterable[Span]) -> tuple[float, ...]:
    """Seconds of every step: from the end of the one before it (of the first: from its first start) to its end."""
    start: dict[int, float] = {}
    end: dict[int, float] = {}
    for span in spans:
        start[span.op.step] = min(start.get(span.op.step, span.start_s), span.start_s)
        end[span.op.step] = max(end.get(span.op.step, span.end_s), span.end_s)
    return tuple(end[k] - end.get(k - 1, start[k]) for k in sorted(end))


def _exposed(spans: Iterable[Span]) -> tuple[float, ...]:
    """Per step, |communication u compute| - |compute| of the worker that computes longest."""
    compute: dict[tuple[int, int], list[tuple[float, float]]] = {}
    traffic: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for span in spans:
        where = compute if span.op.kind == "compute" else traffic if is_communication(span) else None
        if where is not None:
            where.setdefault((span.op.step, span.rank), []).append((span.start_s, span.end_s))
    longest: dict[int, tuple[float, int]] = {}
    for (step, rank), intervals in compute.items():
        longest[step] = max(longest.get(step, (-1.0, -1)), (union_s(intervals), -rank))
    result = []
    for step, (busy, negative) in sorted(longest.items()):
        key = (step, -negative)
        result.append(union_s([*compute[key], *traffic.get(key, [])]) - busy)
    return tuple(result) or (0.0,)


def _phase_rows(predicted: Sequence[Span], measured: Sequence[Span]) -> tuple[PhaseRow, ...]:
    expected, observed = _phases(predicted), _phases(measured)
    return tuple(
        PhaseRow(phase=phase, seconds=_figure(statistics.median(expected[phase]), observed.get(phase, ())))
        for phase in _PHASES
        if phase in expected
    )


def _phases(spans: Iterable[Span]) -> dict[Phase, tuple[float, ...]]:
    """Per phase and step, the longest time in which a rank is busy with its ops. A server beside a worker counts as a
    rank of its own, as it does in a prediction."""
    intervals: dict[tuple[Phase, int, int, bool], list[tuple[float, float]]] = {}
    for span in spans:
        if span.op.kind != "gate":
            key = (span.op.phase, span.op.step, span.rank, span.op.kind == "update")
            intervals.setdefault(key, []).append((span.start_s, span.end_s))
    longest: dict[Phase, dict[int, float]] = {}
    for (phase, step, _, _), of_rank in intervals.items():
        of_step = longest.setdefault(phase, {})
        of_step[step] = max(of_step.get(step, 0.0), union_s(of_rank))
    return {phase: tuple(of_step[k] for k in sorted(of_step)) for phase, of_step in longest.items()}


def table(comparison: Comparison) -> pd.DataFrame:
    """The ops, one a row: identity, ranks, predicted and measured seconds, spread, error."""
    import pandas as pd

    columns = ["micro_batch", "stage", "phase", "part", "kind", "ranks",
               "predicted_s", "measured_s", "low_s", "high_s", "samples", "error"]  # fmt: skip
    rows = [
        (*row.op[1:], row.ranks, row.seconds.predicted_s, row.seconds.measured_s, row.seconds.low_s,
         row.seconds.high_s, row.seconds.samples, row.seconds.error)
        for row in comparison.ops
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)
