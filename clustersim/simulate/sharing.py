"""Max-min fair rates of flow classes on link classes, by progressive filling (Bertsekas & Gallager 1992, section 6.5).

A flow class has a multiplicity on each link class that it crosses: how many bytes one such link carries while each of
its flows sends one byte. Max-min over classes with these weights is max-min over the flows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Weights = Sequence[tuple[int, float]]


def max_min_rates(weights: Mapping[int, Weights], capacity: Sequence[float] | Mapping[int, float]) -> dict[int, float]:
    """The max-min fair rate of every flow class in `weights` (class -> (link, multiplicity) pairs), in bytes/s.

    All rates rise together until a link is full; the classes that cross it are frozen, the others rise on. A class
    that crosses no link gets an infinite rate. O(links * rounds + crossings), at most one round per link.
    """
    rates: dict[int, float] = {}
    crossing: dict[int, list[tuple[int, float]]] = {}
    left: dict[int, float] = {}
    demand: dict[int, float] = {}
    for flow, links in weights.items():
        if not links:
            rates[flow] = float("inf")
        for link, multiplicity in links:
            crossing.setdefault(link, []).append((flow, multiplicity))
            left[link] = capacity[link]
            demand[link] = demand.get(link, 0.0) + multiplicity
    while crossing:
        tightest = min(crossing, key=lambda link: (left[link] / demand[link], link))
        level = max(0.0, left[tightest] / demand[tightest])
        for flow, _ in crossing.pop(tightest):
            if flow in rates:
                continue
            rates[flow] = level
            for link, multiplicity in weights[flow]:
                if link in crossing:
                    left[link] -= level * multiplicity
                    demand[link] -= multiplicity
        done = [link for link, flows in crossing.items() if all(flow in rates for flow, _ in flows)]
        for link in done:
            del crossing[link]
    return rates
