"""Max-min fair rates of flow classes on link classes, by progressive filling (Bertsekas & Gallager 1992, section 6.5).

A flow class has a multiplicity on each link class that it crosses: how many bytes one such link carries while each of
its flows sends one byte. Max-min over classes with these weights is max-min over the flows.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Weights = Sequence[tuple[int, float]]

# Comparing every link with every other is worth it up to this many comparisons.
_MOST_COMPARISONS = 50_000_000


def max_min_rates(weights: Mapping[int, Weights], capacity: Sequence[float] | Mapping[int, float]) -> dict[int, float]:
    """The max-min fair rate of every flow class in `weights` (class -> (link, multiplicity) pairs), in bytes/s.

    All rates rise together until a link is full; the classes that cross it are frozen, the others rise on. A class
    that crosses no link gets an infinite rate. A link fills later once flows on it are frozen, never sooner, so that a
    heap may hold levels that are too low: O(crossings * log links) for each time that a link is looked at again.
    """
    rates: dict[int, float] = {}
    crossing: dict[int, list[tuple[int, float]]] = {}
    for flow, links in weights.items():
        if not links:
            rates[flow] = float("inf")
        for crossed in links:
            link = crossed[0]
            if link in crossing:
                crossing[link].append((flow, crossed[1]))
            else:
                crossing[link] = [(flow, crossed[1])]
    levels = [(capacity[link] / sum([m for _, m in flows]), link) for link, flows in crossing.items()]
    heapq.heapify(levels)
    while len(rates) < len(weights):
        known, link = levels[0]
        free, rising = capacity[link], 0.0
        for flow, multiplicity in crossing[link]:
            rate = rates.get(flow)
            if rate is None:
                rising += multiplicity
            else:
                free -= rate * multiplicity
        if rising == 0.0:
            heapq.heappop(levels)
            continue
        level = max(known, free / rising)
        if level > known:
            heapq.heapreplace(levels, (level, link))
            if levels[0][1] != link:
                continue
        heapq.heappop(levels)
        for flow, _ in crossing[link]:
            rates.setdefault(flow, level)
    return rates


def binding_links(loads: NDArray[np.float64], capacity: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which links can ever hold a flow back. `loads[l, p]` is what link l carries per byte of pattern p.

    A link of which another carries at least as large a share of its capacity, whatever flows, never fills before that
    one: without it the feasible rates are the same, and so is the max-min among them. Of equals the first is kept.
    O(links^2 * patterns); all are kept where that would be too much.
    """
    count, patterns = loads.shape
    keep = np.ones(count, np.bool_)
    if count * count * patterns > _MOST_COMPARISONS:
        return keep
    shares = loads / capacity[:, None]
    for link in range(count):
        others = keep.copy()
        others[link] = False
        rivals = shares[others]
        above = (rivals >= shares[link]).all(axis=1)
        same = (rivals == shares[link]).all(axis=1)
        keep[link] = not bool((above & (~same | (np.flatnonzero(others) < link))).any())
    return keep
