"""Random draws by counter, and the slowest of many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.noise import Distribution, Noise, normal_probability, normal_quantile

Floats = NDArray[np.float64]
Hashes = NDArray[np.uint64]
_BELOW_ONE = float(np.nextafter(1.0, 0.0))
# Stands for no op: for what all ops of a stretch share.
_SHARED = (1 << 64) - 1


def uniforms(seed: int, who: Hashes, what: Hashes, step: Hashes) -> Floats:
    """Uniform numbers in (0, 1) by counter (SplitMix64's finaliser; Steele et al., OOPSLA'14): each depends on the seed
    and its own coordinates only, so that another op or rank moves none of the others. Arrays broadcast."""
    with np.errstate(over="ignore"):
        value = _scrambled(np.asarray(seed, np.uint64))
        for part in (who, what, step):
            value = _scrambled(value * np.uint64(0x9E3779B97F4A7C15) + part)
    result: Floats = ((value >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return result


def _scrambled(value: Hashes) -> Hashes:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: Hashes = value ^ (value >> np.uint64(31))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Ranks that keep step op by op: those of one such group (`size` of them), of which there are `replicas` alike.
    Worker r counts as 2 r, server s as 2 s + 1; the identity of all is the least number among their classes."""

    identity: int
    ranks: Sequence[int]
    size: int
    replicas: int


class Draws:
    """Draws of one distribution under one noise, for `steps` steps, which count from 1."""

    def __init__(self, noise: Noise, shape: Distribution, steps: int) -> None:
        self.noise = noise
        self.shape = shape
        self.steps = steps

    def every_member(self, unit: Unit, names: list[int]) -> Floats:
        """(steps, ops): the largest of one draw of each rank that keeps step."""
        ranks = np.array(unit.ranks, np.uint64)[:, None, None]
        return self._quantile(self._uniforms(ranks, names, self._steps(1, self.steps)).max(axis=0))

    def slowest_member(self, unit: Unit, names: list[int]) -> Floats:
        """(steps, ops): the same, drawn at once."""
        who = np.array(unit.identity, np.uint64)
        return self._quantile(self._uniforms(who, names, self._steps(1, self.steps)) ** (1.0 / unit.size))

    def slowest_replica(self, unit: Unit, names: list[int], prices: list[float], before: int) -> Floats:
        """(steps, ops) draws of the replica for which the ops together take longest. The first `before` ops are of the
        step before: then there is one row more, for what follows the last step."""
        when = self._steps(1, self.steps + (1 if before else 0))
        who = np.array(unit.identity, np.uint64)
        of_one = self._uniforms(who, names, when - np.array([i < before for i in range(len(names))], np.uint64))
        if len(names) == 1:
            return self._quantile(of_one ** (1.0 / (unit.replicas * unit.size)))
        price = np.array(prices)
        norm = float(np.sqrt((price**2).sum()))
        weights = price / norm if norm > 0.0 else np.full(len(price), 1.0 / math.sqrt(len(price)))
        scores = normal_quantile(of_one)
        # The largest of r weighted means, each standard normal, in the place of that of one replica.
        shared = uniforms(self.noise.seed, who, np.array([[_SHARED]], np.uint64), when)
        largest = normal_quantile(np.minimum(shared ** (1.0 / unit.replicas), _BELOW_ONE))
        slowest = normal_probability(scores + weights[None, :] * (largest - (scores @ weights)[:, None]))
        return self._quantile(slowest ** (1.0 / unit.size))

    def every_replica(self, unit: Unit) -> Floats:
        """(steps + 2, replicas) draws that all ops of a replica share in a step, from the step before the first to the
        one after the last."""
        who, each = np.array(unit.identity, np.uint64), np.arange(unit.replicas, dtype=np.uint64)[None, :]
        when = self._steps(0, self.steps + 1)
        constant = self.noise.every == "run"
        of_all = uniforms(self.noise.seed, who, each, np.zeros_like(when) if constant else when)
        return self._quantile(of_all ** (1.0 / unit.size))

    def _steps(self, first: int, last: int) -> Hashes:
        return np.arange(first, last + 1, dtype=np.uint64)[:, None]

    def _uniforms(self, who: Hashes, names: list[int], when: Hashes) -> Floats:
        """(..., steps, ops) uniform numbers, one for all ops of a step or of the run where these share a draw."""
        what = np.array(names if self.noise.every == "op" else [0] * len(names), np.uint64)[None, :]
        return uniforms(self.noise.seed, who, what, np.zeros_like(when) if self.noise.every == "run" else when)

    def _quantile(self, of: Floats) -> Floats:
        # A float just below 1 where rounding reached it: no quantile is infinite.
        return self.shape.quantile(np.clip(of, 1e-300, _BELOW_ONE))
