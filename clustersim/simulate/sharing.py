"""Max-min fair rates of flow classes on link classes, by progressive filling (Bertsekas & Gallager 1992, section 6.5).

A flow class has a multiplicity on each link class that it crosses: how many bytes one such link carries while each of
its flows sends one byte. Max-min over classes with these weights is max-min over the flows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heapreplace
from math import inf
from typing import Any

Weights = Sequence[tuple[int, float]]

# A running sum of which less than this part is left has lost digits.
_CANCELLED = 0.05
# A link is compared with up to this many others: to keep one that could go costs time, not truth.
_MOST_RIVALS = 64


def max_min_rates(weights: Mapping[int, Weights], capacity: Sequence[float] | Mapping[int, float]) -> dict[int, float]:
    """The max-min fair rate of every flow class in `weights` (class -> (link, multiplicity) pairs), in bytes/s.

    All rates rise together until a link is full; the classes that cross it are frozen, the others rise on. A class
    that crosses no link gets an infinite rate. A link fills later once flows on it are frozen, never sooner, so that a
    heap may hold levels that are too low: O(crossings + rounds * log links) in all. Sums run on; where little is left
    of one, it is summed anew, so that rounding does not grow.
    """
    rates: dict[int, float] = {}
    # Of each link: what is free of it, the multiplicities of the classes that rise, the classes, all multiplicities.
    state: dict[int, list[Any]] = {}
    for flow, links in weights.items():
        if not links:
            rates[flow] = inf
        for link, multiplicity in links:
            here = state.get(link)
            if here is None:
                state[link] = [capacity[link], multiplicity, [flow], 0.0]
            else:
                here[1] += multiplicity
                here[2].append(flow)
    levels = []
    for link, here in state.items():
        here[3] = here[1]
        levels.append((here[0] / here[1], link))
    heapify(levels)
    missing = len(weights) - len(rates)
    while missing:
        known, link = levels[0]
        free, left, flows, whole = state[link]
        # Rounding may leave a little of a sum where nothing is left of it.
        level = free / left if left > 0.0 else inf
        if level > known * (1.0 + 1e-14):
            heapreplace(levels, (level, link))
            continue
        heappop(levels)
        slow = [flow for flow in flows if flow not in rates]
        if not slow:
            continue
        if left < _CANCELLED * whole:
            level = _level(link, flows, rates, weights, capacity[link])
        missing -= len(slow)
        for flow in slow:
            rates[flow] = level
            for other, multiplicity in weights[flow]:
                there = state[other]
                there[0] -= level * multiplicity
                there[1] -= multiplicity
    return rates


def _level(
    link: int, flows: Sequence[int], rates: Mapping[int, float], weights: Mapping[int, Weights], capacity: float
) -> float:
    """At which rate of the classes that still rise a link is full, from sums that nothing was taken from."""
    free, rising = capacity, 0.0
    for flow in flows:
        multiplicity = dict(weights[flow])[link]
        if flow in rates:
            free -= rates[flow] * multiplicity
        else:
            rising += multiplicity
    return max(0.0, free) / rising


def binding_links(loads: Sequence[Mapping[int, float]], capacity: Sequence[float]) -> list[bool]:
    """Which links can ever hold a flow back. `loads[l][p]` is what link l carries per byte of pattern p.

    A link of which another carries at least as large a share of its capacity, whatever flows, never fills before that
    one: without it the feasible rates are the same, and so is the max-min among them. Of equals the first is kept.
    O(crossings * rivals), memory O(crossings): a link is held against the fullest of those that carry the rarest of its
    patterns, and kept where there are too many of them.
    """
    shares = [{p: load / full for p, load in row.items()} for row, full in zip(loads, capacity, strict=True)]
    carrying: dict[int, list[int]] = {}
    for link, row in enumerate(shares):
        for pattern in row:
            carrying.setdefault(pattern, []).append(link)
    for pattern, links in carrying.items():
        links.sort(key=lambda link: -shares[link][pattern])
    keep = [True] * len(shares)
    for link, row in enumerate(shares):
        if not row:
            keep[link] = False
            continue
        rarest = min(row, key=lambda pattern: len(carrying[pattern]))
        for other in carrying[rarest][:_MOST_RIVALS]:
            rival = shares[other]
            if rival[rarest] < row[rarest]:
                break
            if other == link or not keep[other]:
                continue
            if all(rival.get(pattern, 0.0) >= share for pattern, share in row.items()) and (
                other < link or rival != row
            ):
                keep[link] = False
                break
    return keep
