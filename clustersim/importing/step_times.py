"""Where the time of a traced step goes: by kind of work, overlapped or not, and idle."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from clustersim.errors import InputError
from clustersim.hardware.kernel import Dtype
from clustersim.importing.kernel_names import CATEGORIES, Category, collective_name
from clustersim.importing.kineto import Product, StepMark, Trace, Work

Span = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds of one step. `host_s` is its ProfilerStep; `window_s` the time on the device from its first work to the
    next step's, which the rest divides: `busy` counts overlapping work twice, the others do not.

    `exposed_collective_s`: collectives while nothing computes; `exposed_copy_s`: copies while neither does; `idle_s`:
    nothing runs, of which `waits_for_host_s` because the host had not asked for the next work yet.
    """

    number: int
    host_s: float
    window_s: float
    busy_s: dict[Category, float]
    exposed_collective_s: float
    exposed_copy_s: float
    idle_s: float
    waits_for_host_s: float | None
    kernels: int


def step_times(trace: Trace) -> tuple[StepTimes, ...]:
    """The times of each step of a trace. O(steps * work log work). Without marks all of the trace is one step.
    InputError where no step has work.

    Work belongs to the step in which the host asked for it; without a launch in the trace, to the step it began in.
    Marked steps that trail (the last is cut off by the end of the profile) are kept: their window ends with their work.
    """
    steps = [mark for mark in trace.steps if mark.end_s > mark.start_s]
    if not steps and trace.work:
        end = max(item.end_s for item in trace.work)
        steps = [StepMark(number=0, start_s=0.0, end_s=end)]
    starts = [mark.start_s for mark in steps]
    of_step: list[list[Work]] = [[] for _ in steps]
    for item in trace.work:
        moment = item.launched_s if item.launched_s is not None else item.start_s
        at = bisect_right(starts, moment) - 1
        if at >= 0 and (moment <= steps[at].end_s or at + 1 < len(steps)):
            of_step[at].append(item)
    filled = [(mark, work) for mark, work in zip(steps, of_step, strict=True) if work]
    if not filled:
        raise InputError(f"{trace.file}: its steps hold no work; profile with the device's activity")
    found = []
    for number, (mark, work) in enumerate(filled):
        begin = min(item.start_s for item in work) if trace.gpu else mark.start_s
        end = max(item.end_s for item in work) if trace.gpu else mark.end_s
        if number + 1 < len(filled) and trace.gpu:
            end = max(begin, min(item.start_s for item in filled[number + 1][1]))
        # What other steps left running in this window keeps the device busy, too.
        inside = [item for item in trace.work if item.end_s > begin and item.start_s < end]
        found.append(_times(mark, work, inside, (begin, end), trace.gpu))
    return tuple(found)


def _times(mark: StepMark, work: Sequence[Work], inside: Sequence[Work], window: Span, gpu: bool) -> StepTimes:
    busy: dict[Category, float] = dict.fromkeys(CATEGORIES, 0.0)
    for item in work:
        busy[item.category] += item.end_s - item.start_s
    collective = _union(inside, window, ("collective",))
    copies = _union(inside, window, ("copy",))
    computes = _union(inside, window, tuple(c for c in CATEGORIES if c not in ("collective", "copy")))
    both = _merged([*computes, *collective])
    every = _merged([*both, *copies])
    gaps = _gaps(every, window)
    return StepTimes(
        number=mark.number,
        host_s=mark.end_s - mark.start_s,
        window_s=window[1] - window[0],
        busy_s=busy,
        exposed_collective_s=_length(both) - _length(computes),
        exposed_copy_s=_length(every) - _length(both),
        idle_s=_length(gaps),
        waits_for_host_s=_waits(gaps, work) if gpu else None,
        kernels=len(work),
    )


def _union(work: Sequence[Work], window: Span, categories: tuple[Category, ...]) -> list[Span]:
    spans = [(max(w.start_s, window[0]), min(w.end_s, window[1])) for w in work if w.category in categories]
    return _merged(spans)


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Spans as their union, in order."""
    result: list[Span] = []
    for start, end in sorted(span for span in spans if span[1] > span[0]):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(result[-1][1], end)
        else:
            result.append((start, end))
    return result


def _gaps(spans: Sequence[Span], window: Span) -> list[Span]:
    edges = [window[0], *(edge for span in spans for edge in span), window[1]]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]


def _length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)


def _waits(gaps: Sequence[Span], work: Sequence[Work]) -> float:
    """The part of the gaps before the host had asked for the work that ends each."""
    launched = {item.start_s: item.launched_s for item in work if item.launched_s is not None}
    return sum(max(0.0, min(end, launched[end]) - start) for start, end in gaps if end in launched)


def collective_times(trace: Trace) -> dict[str, tuple[int, float]]:
    """Of each kind of collective in a trace: how many, and their seconds in all."""
    found: dict[str, tuple[int, float]] = {}
    for item in trace.work:
        if item.category == "collective":
            name = collective_name(item.name)
            count, seconds = found.get(name, (0, 0.0))
            found[name] = count + 1, seconds + item.end_s - item.start_s
    return found


def gemm_rows(products: Sequence[Product]) -> dict[tuple[Dtype, int, int, int], tuple[int, float]]:
    """How often each product (dtype, m, n, k) ran, and its median seconds, in order of the key."""
    times: dict[tuple[Dtype, int, int, int], list[float]] = {}
    for product in products:
        times.setdefault((product.dtype, product.m, product.n, product.k), []).append(product.seconds)
    return {key: (len(found), median(found)) for key, found in sorted(times.items())}
