"""Timing of short operations: warm-up, repeats within a budget, outliers rejected, the median and the spread."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from clustersim.execute.clock import timing_event
from clustersim.execute.probe_samples import Timed

# A sample shorter than this is repeated inside one timing, so that the clock's own cost does not count.
_SHORTEST_S = 50e-6
# A timing counts as long as it lies within so many standard deviations of the median, estimated from the median
# absolute deviation (times 1.4826 for a normal distribution), or within a hundredth of the median.
_REJECT_BEYOND = 5.0
_NORMAL = 1.4826
_ALWAYS_WITHIN = 0.01
# Kernels shorter than this are also timed many at a time: events around a single one cost as much as it does.
_SHORT_KERNEL_S = 30e-6
_BATCH = 20
# An idle device runs at a fraction of its clock; after so many seconds of work it runs at its own.
_WAKE_S = 0.3
# Flushes of the cache in front give the host a lead over the device: so many times what it needs, so many at most.
_LEAD = 1.5
_MOST_FLUSHES = 200


class Timer(Protocol):
    """Times a function within a budget in seconds."""

    def __call__(self, function: Callable[[], object], budget_s: float) -> Timed: ...


def summary(samples: Sequence[float]) -> Timed:
    """Median and quartile spread of some timings, after rejecting those too far from the median.

    Hampel's rule: |x - median| > 5 * 1.4826 * MAD (Hampel 1974; Iglewicz and Hoaglin 1993).
    """
    middle = statistics.median(samples)
    deviation = statistics.median(abs(x - middle) for x in samples)
    limit = max(_REJECT_BEYOND * _NORMAL * deviation, _ALWAYS_WITHIN * abs(middle))
    kept = [x for x in samples if abs(x - middle) <= limit] if len(samples) > 2 else list(samples)
    middle = statistics.median(kept)
    spread = 0.0
    if len(kept) > 1 and middle:
        low, _, high = statistics.quantiles(kept, n=4, method="inclusive")
        spread = (high - low) / middle
    return Timed(seconds=middle, spread=spread, samples=len(kept), rejected=1.0 - len(kept) / len(samples))


def timed(function: Callable[[], object], budget_s: float, most: int = 30) -> Timed:
    """Time `function` on the CPU: one call to warm up, then 3 to `most` samples within about `budget_s` seconds, each
    of several calls where one is shorter than the clock shows."""
    function()
    begin = time.perf_counter()
    function()
    first = time.perf_counter() - begin
    inner = max(1, int(_SHORTEST_S / max(first, 1e-7)))
    samples = [first] if inner == 1 else []
    end = time.perf_counter() + budget_s
    while len(samples) < 3 or (len(samples) < most and time.perf_counter() < end):
        begin = time.perf_counter()
        for _ in range(inner):
            function()
        samples.append((time.perf_counter() - begin) / inner)
    return summary(samples)


class Stream(Protocol):
    """What timing needs of a device that works beside the host."""

    def flush(self) -> None:
        """Queue a write of a buffer larger than the level-2 cache."""

    def seconds(self, launch: Callable[[], object]) -> Callable[[], float]:
        """Queue `launch` between two events; what it took, to be called after `wait`."""

    def wait(self) -> None:
        """Wait until the device has done everything."""

    def now(self) -> float:
        """Seconds of the host's clock."""


class QueueTimer:
    """Times what a function queues on a device, by events in its stream.

    Before every sample the level-2 cache is overwritten, outside of the timed region; that also gives the host a lead,
    longer for functions that take it longer, so that the device never waits for a launch inside the region. Events
    around one kernel cost some microseconds: that cost is measured once on a kernel that does nothing, as the
    difference between one alone and one of many in a row, and taken off. A kernel cannot be shorter than one of many
    in a row with its operands in the cache, so that this bounds short ones from below.
    """

    def __init__(self, stream: Stream, nothing: Callable[[], object]) -> None:
        """`nothing` launches the smallest kernel there is."""
        self._stream = stream
        self._overhead_s = 0.0
        self._wake()
        self._flush_s = self._of_flush()
        alone = self._alone(nothing, 0.05, 100).seconds
        self.floor_s = self._in_a_row(nothing)
        self._overhead_s = max(0.0, alone - self.floor_s)

    def timed(self, function: Callable[[], object], budget_s: float, most: int = 50) -> Timed:
        """The time of what `function` launches, cold cache: 3 calls to warm up, then 5 to `most` samples within about
        `budget_s` seconds."""
        for _ in range(3):
            function()
        self._stream.wait()
        found = self._alone(function, budget_s, most)
        if found.seconds >= _SHORT_KERNEL_S:
            return found
        least = self._in_a_row(function)
        return Timed(
            seconds=max(found.seconds, least), spread=found.spread, samples=found.samples, rejected=found.rejected
        )

    def steady(self, function: Callable[[], object], budget_s: float) -> Timed:
        """The time of one of many calls in a row, nothing flushed, the host included where the device waits for it: at
        least 5 samples, each of calls for some milliseconds, for at least `budget_s` seconds."""
        for _ in range(3):
            function()
        self._stream.wait()
        begin = self._stream.now()
        function()
        self._stream.wait()
        inner = max(1, min(1000, math.ceil(5e-3 / max(self._stream.now() - begin, 1e-6))))
        samples: list[float] = []
        end = self._stream.now() + budget_s
        while len(samples) < 5 or self._stream.now() < end:
            # The timed calls follow others without a pause, as they do in training.
            took = [self._stream.seconds(lambda: _repeat(function, inner)) for _ in range(3)]
            self._stream.wait()
            samples += [one() / inner for one in took[1:]]
        return summary(samples)

    def launch_s(self, nothing: Callable[[], object], count: int = 500) -> float:
        """Host seconds per launch: many small kernels in a row, none waited for. `count`: fewer than a driver queues
        before it makes the host wait."""
        for _ in range(100):
            nothing()
        self._stream.wait()
        begin = self._stream.now()
        for _ in range(count):
            nothing()
        took = self._stream.now() - begin
        self._stream.wait()
        return took / count

    def _wake(self) -> None:
        end = self._stream.now() + _WAKE_S
        while self._stream.now() < end:
            _repeat(self._stream.flush, _BATCH)
            self._stream.wait()

    def _of_flush(self) -> float:
        for _ in range(3):
            self._stream.flush()
        self._stream.wait()
        took = [self._stream.seconds(self._stream.flush) for _ in range(10)]
        self._stream.wait()
        return max(1e-6, statistics.median(one() for one in took))

    def _lead(self, function: Callable[[], object]) -> float:
        """Flushes that keep the device busy while the host launches `function` once."""
        begin = self._stream.now()
        function()
        host_s = self._stream.now() - begin
        self._stream.wait()
        return _LEAD * host_s / self._flush_s

    def _alone(self, function: Callable[[], object], budget_s: float, most: int) -> Timed:
        lead = max(1, min(_MOST_FLUSHES, math.ceil(self._lead(function))))
        samples: list[float] = []
        end = self._stream.now() + budget_s
        while len(samples) < 5 or (len(samples) < most and self._stream.now() < end):
            took = []
            for _ in range(5):
                for _ in range(lead):
                    self._stream.flush()
                took.append(self._stream.seconds(function))
            self._stream.wait()
            samples += [max(one() - self._overhead_s, 0.0) for one in took]
        return summary(samples)

    def _in_a_row(self, function: Callable[[], object]) -> float:
        one = self._lead(function)
        calls = int(min(_BATCH, _MOST_FLUSHES / max(one, 1e-9)))
        if calls < 2:
            return 0.0  # The host cannot launch two before the device is through with the first.
        lead = max(1, math.ceil(calls * one))
        samples = []
        for _ in range(5):
            for _ in range(lead):
                self._stream.flush()
            took = self._stream.seconds(lambda: _repeat(function, calls))
            self._stream.wait()
            samples.append(took() / calls)
        return summary(samples).seconds


def _repeat(function: Callable[[], object], calls: int) -> None:
    # What a call returns is freed before the next one: a pass through a model holds gigabytes.
    for _ in range(calls):
        function()


class CudaStream:
    """The current stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        size = int(torch.cuda.get_device_properties(device).L2_cache_size)
        self._device = device
        self._buffer = torch.empty(2 * max(size, 2**24), dtype=torch.int8, device=device)

    def flush(self) -> None:
        self._buffer.zero_()

    def seconds(self, launch: Callable[[], object]) -> Callable[[], float]:
        start, stop = timing_event(), timing_event()
        start.record()
        launch()
        stop.record()
        return lambda: float(start.elapsed_time(stop)) * 1e-3

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def now(self) -> float:
        return time.perf_counter()
