"""When which component of a job fails, in one run."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.horizon.job import Job, Threat

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A failure: when, of which threat, and which component of it."""

    at_s: float
    threat: int
    component: int


class Failures:
    """The failures of one run within the horizon, in order. Every component under a Weibull hazard of shape other than
    1 is new at the start, and as good as new after each failure."""

    def __init__(self, job: Job, whole_s: float, seed: int, run: int) -> None:
        found: list[tuple[Floats, Ints]] = []
        alike: Counter[tuple[str, str]] = Counter()
        for threat in job.threats:
            named = (threat.hazard.cause, threat.hazard.component)
            key = np.array([seed, _stable(*named, str(alike[named]))], np.uint64)
            alike[named] += 1
            stream = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, run]))
            found.append(_occurrences(threat, whole_s, stream))
        every = np.concatenate([times for times, _ in found]) if found else np.empty(0)
        order = np.argsort(every, kind="stable")
        self.by_threat = np.array([len(times) for times, _ in found], np.int64)
        self.times: Floats = every[order]
        self.threats = np.repeat(np.arange(len(found)), self.by_threat)[order]
        parts = np.concatenate([components for _, components in found]) if found else np.empty(0, np.int64)
        self.components = parts[order]

    def listed(self) -> list[Failure]:
        """All of them, one by one."""
        rows = zip(self.times.tolist(), self.threats.tolist(), self.components.tolist(), strict=True)
        return [Failure(at_s=at, threat=threat, component=component) for at, threat, component in rows]


def _stable(*words: str) -> int:
    """A number for words that is the same in every process."""
    return int.from_bytes(hashlib.blake2b("/".join(words).encode(), digest_size=8).digest(), "big")


def _occurrences(threat: Threat, whole_s: float, stream: np.random.Generator) -> tuple[Floats, Ints]:
    """Times and components of the failures of one threat before `whole_s`."""
    if threat.count == 0:
        return np.empty(0), np.empty(0, np.int64)
    shape = threat.hazard.shape
    if shape == 1.0:
        # Constant rates add up: one Poisson process for all components.
        mean = 1.0 / threat.rate_per_s
        chunk = int(whole_s / mean * 1.1) + 16
        times = np.cumsum(stream.exponential(mean, chunk))
        while times[-1] < whole_s:
            times = np.concatenate([times, times[-1] + np.cumsum(stream.exponential(mean, chunk))])
        times = times[times < whole_s]
        return times, stream.integers(0, threat.count, len(times))
    scale = 1.0 / (threat.hazard.rate_per_s * math.gamma(1.0 + 1.0 / shape))
    at = scale * stream.weibull(shape, threat.count)
    alive = np.arange(threat.count)
    found_at, found_of = [], []
    while True:
        inside = at < whole_s
        at, alive = at[inside], alive[inside]
        if not len(at):
            break
        found_at.append(at)
        found_of.append(alive)
        at = at + scale * stream.weibull(shape, len(at))
    if not found_at:
        return np.empty(0), np.empty(0, np.int64)
    times, parts = np.concatenate(found_at), np.concatenate(found_of)
    order = np.argsort(times, kind="stable")
    return times[order], parts[order]
