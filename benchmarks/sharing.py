"""Max-min fair sharing: 10,000 flows over 1,000 links of random capacity, four links a flow; three ways to fill.

    python benchmarks/sharing.py

`lazy heap` is what the simulator uses (plain Python), `by rounds` fills one link a round in NumPy, `plain filling` is
the definition: raise all rates until a link is full, freeze what crosses it, go on. All three must agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from clustersim.simulate.sharing import max_min_rates

FLOWS, LINKS, CROSSED = 10_000, 1_000, 4


def case(flows: int, links: int, crossed: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(flows, crossed) link numbers, all different in a row, and the capacities."""
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((flows, links)), axis=1)[:, :crossed], rng.uniform(1.0, 10.0, links)


def by_rounds(crossing: np.ndarray[Any, Any], capacity: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Freeze the flows of the link that fills first, one link a round, over arrays."""
    links = len(capacity)
    rates = np.full(len(crossing), np.nan)
    free = capacity.copy()
    rising = np.bincount(crossing.ravel(), minlength=links).astype(float)
    while np.isnan(rates).any():
        with np.errstate(divide="ignore", invalid="ignore"):
            level = np.where(rising > 0, free / rising, np.inf)
        link = int(level.argmin())
        frozen = np.isnan(rates) & (crossing == link).any(axis=1)
        rates[frozen] = level[link]
        crossed = crossing[frozen].ravel()
        np.subtract.at(free, crossed, level[link])
        np.subtract.at(rising, crossed, 1.0)
    return rates


def plain_filling(crossing: np.ndarray[Any, Any], capacity: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The definition, with nothing remembered from round to round but which flows are frozen, at which rate."""
    links = len(capacity)
    rates = np.zeros(len(crossing))
    rising = np.ones(len(crossing), bool)
    while rising.any():
        used = np.bincount(crossing.ravel(), weights=np.repeat(np.where(rising, 0.0, rates), CROSSED), minlength=links)
        count = np.bincount(crossing[rising].ravel(), minlength=links)
        with np.errstate(divide="ignore", invalid="ignore"):
            level = np.where(count > 0, (capacity - used) / count, np.inf)
        frozen = rising & (crossing == int(level.argmin())).any(axis=1)
        rates[frozen] = level.min()
        rising &= ~frozen
    return rates


def best(call: Callable[[], object], times: int) -> float:
    """The fastest of several calls, in process time."""
    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    """Print the table."""
    crossing, capacity = case(FLOWS, LINKS, CROSSED)
    weights = {flow: tuple((int(link), 1.0) for link in row) for flow, row in enumerate(crossing)}
    limits = capacity.tolist()
    found = max_min_rates(weights, limits)
    lazy = np.array([found[flow] for flow in range(FLOWS)])
    rounds, plain = by_rounds(crossing, capacity), plain_filling(crossing, capacity)
    print(f"{FLOWS:,} flows over {LINKS:,} links, {CROSSED} links a flow")
    heap_s = best(lambda: max_min_rates(weights, limits), 7)
    for name, seconds, rates in (
        ("lazy heap", heap_s, lazy),
        ("by rounds (NumPy)", best(lambda: by_rounds(crossing, capacity), 3), rounds),
        ("plain filling (NumPy)", best(lambda: plain_filling(crossing, capacity), 1), plain),
    ):
        apart = float(np.abs(rates / plain - 1.0).max())
        print(f"{name:22} {seconds * 1e3:9.1f} ms  {seconds / heap_s:7.1f} x  largest difference {apart:.1e}")


if __name__ == "__main__":
    main()
