"""Timing of short operations: warm-up, repeats within a budget, the median and the spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from clustersim.execute.clock import timing_event
from clustersim.execute.probe import Timed

# A sample shorter than this is repeated inside one timing, so that the clock's own cost does not count.
_SHORTEST_S = 50e-6


def summary(samples: Sequence[float]) -> Timed:
    """Median and quartile spread of some timings."""
    middle = statistics.median(samples)
    if len(samples) < 2:
        return Timed(seconds=middle, spread=0.0, samples=len(samples))
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timed(seconds=middle, spread=(high - low) / middle if middle else 0.0, samples=len(samples))


def timed(function: Callable[[], object], budget_s: float, most: int = 30) -> Timed:
    """Time `function` on the CPU: one call to warm up, then 3 to `most` samples within about `budget_s` seconds."""
    function()
    begin = time.perf_counter()
    function()
    first = time.perf_counter() - begin
    inner = max(1, int(_SHORTEST_S / max(first, 1e-7)))
    samples: list[float] = []
    end = time.perf_counter() + budget_s
    while len(samples) < 3 or (len(samples) < most and time.perf_counter() < end):
        begin = time.perf_counter()
        for _ in range(inner):
            function()
        samples.append((time.perf_counter() - begin) / inner)
    return summary(samples)


class CudaTimer:
    """Times kernels with events; between samples it overwrites the level-2 cache, as the rest of a step would."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * max(size, 2**20), dtype=torch.int8, device=device)

    def timed(self, function: Callable[[], object], budget_s: float, most: int = 50) -> Timed:
        """Like `timed`, of what `function` launches."""
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        samples: list[float] = []
        end = time.perf_counter() + budget_s
        while len(samples) < 5 or (len(samples) < most and time.perf_counter() < end):
            pairs = []
            for _ in range(5):
                self._flush.zero_()
                pair = timing_event(), timing_event()
                pair[0].record()
                function()
                pair[1].record()
                pairs.append(pair)
            torch.cuda.synchronize()
            samples += [start.elapsed_time(stop) * 1e-3 for start, stop in pairs]
        return summary(samples)
