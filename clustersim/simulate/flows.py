"""Traffic patterns of a program, and the classes of links that they load alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.wiring import Traffic, Wiring
from clustersim.simulate.sharing import binding_links

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkClasses:
    """Links that every traffic pattern of a program loads alike: `members` of each class, its `capacity`, and for each
    pattern the (class, bytes per byte of a flow) pairs it loads. `binding`: the classes that can hold a flow back."""

    capacity: list[float]
    members: list[Ints]
    patterns: list[tuple[tuple[int, float], ...]]
    binding: list[bool]


@dataclass(slots=True)
class Flows:
    """A communication task: phases one after the other, each a latency and then flows of `size` bytes per flow, with
    (pattern, factor) pairs: a lossy wire is busy for longer than its bytes would keep it.

    Once the link classes are known, `phases` are (latency, size, weights on the binding link classes), and `carried`
    says what each link class carries in all phases: (link class, bytes, bytes with the factors).
    """

    planned: list[tuple[float, float, tuple[tuple[int, float], ...]]]
    phases: list[tuple[float, float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    carried: list[tuple[int, float, float]] = field(default_factory=list)

    def resolve(self, links: LinkClasses) -> None:
        """Find the link classes that the patterns load."""
        carried: dict[int, list[float]] = {}
        for wait, size, named in self.planned:
            total: dict[int, float] = {}
            for pattern, factor in named:
                for link, load in links.patterns[pattern]:
                    counts = carried.setdefault(link, [0.0, 0.0])
                    counts[0] += size * load
                    counts[1] += size * load * factor
                    if links.binding[link]:
                        total[link] = total.get(link, 0.0) + load * factor
            self.phases.append((wait, size, tuple(total.items())))
        self.carried = [(link, size, busy) for link, (size, busy) in carried.items()]


class Patterns:
    """The traffic patterns that flows name; link classes are formed once all are known.

    Two links are of one class when every pattern loads them alike.
    """

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._patterns: list[Traffic] = []
        self._pattern_of: dict[int, list[tuple[int, bool]]] = {}
        # Keeps every traffic alive, so that no other gets its id.
        self._kept: list[Traffic] = []

    def weights(self, traffic: Traffic, near: float, far: float) -> tuple[tuple[int, float], ...]:
        """Remember the patterns of a traffic (its flows inside nodes, and between them), with a factor on each."""
        found = self._pattern_of.get(id(traffic))
        if found is None:
            found = []
            for inside in (True, False):
                part = traffic.near == inside
                if part.any():
                    found.append((len(self._patterns), inside))
                    self._patterns.append(
                        Traffic(links=traffic.links[part], loads=traffic.loads[part], near=traffic.near[part])
                    )
            self._pattern_of[id(traffic)] = found
            self._kept.append(traffic)
        return tuple((pattern, near if inside else far) for pattern, inside in found)

    def classes(self) -> LinkClasses:
        """The classes of the links that remembered patterns load.

        The signature of a link is a hash of its kind, its capacity and of (pattern, load) over the patterns on it.
        """
        links: list[Ints] = []
        pattern: list[Ints] = []
        loads: list[NDArray[np.float64]] = []
        for index, traffic in enumerate(self._patterns):
            total = np.bincount(traffic.links, weights=traffic.loads)
            used = np.flatnonzero(total)
            used = used[np.isfinite(self._wiring.capacity[used])]
            links.append(used.astype(np.int64))
            pattern.append(np.full(len(used), index))
            loads.append(total[used].astype(np.float64))
        if not links or not sum(map(len, links)):
            return LinkClasses(capacity=[], members=[], patterns=[() for _ in self._patterns], binding=[])
        every, which, much = np.concatenate(links), np.concatenate(pattern), np.concatenate(loads)
        # Equal loads may differ in the last bits by the order of summation: compare twelve digits.
        exponent = np.floor(np.log10(much))
        digits = np.round(much / 10.0**exponent, 11).view(np.uint64) + exponent.astype(np.int64).view(np.uint64)
        mixed = _hash(_hash(which.astype(np.uint64)) + digits)
        signature = np.zeros(self._wiring.links, np.uint64)
        np.add.at(signature, every, mixed)
        signature = _hash(_hash(signature + self._wiring.capacity.view(np.uint64)) + self._wiring.kinds)
        touched = np.unique(every)
        _, first, inverse = np.unique(signature[touched], return_index=True, return_inverse=True)
        class_of = np.full(self._wiring.links, -1, np.int64)
        class_of[touched] = inverse
        capacity = self._wiring.capacity[touched[first]]
        matrix = np.zeros((len(first), len(links)))
        patterns: list[tuple[tuple[int, float], ...]] = []
        for index, (used, load) in enumerate(zip(links, loads, strict=True)):
            classes, where = np.unique(class_of[used], return_index=True)
            matrix[classes, index] = load[where]
            patterns.append(tuple((int(c), float(load[i])) for c, i in zip(classes, where, strict=True)))
        return LinkClasses(
            capacity=capacity.tolist(),
            members=[touched[inverse == c] for c in range(len(first))],
            patterns=patterns,
            binding=binding_links(matrix, capacity).tolist(),
        )


def _hash(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
