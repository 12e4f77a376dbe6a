"""Traffic patterns of a program, and the classes of links that they load alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.scramble import scramble
from clustersim.cluster.wiring import Traffic, Wiring
from clustersim.simulate.network import Bundle
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

    `beside`: strands of the same task that the network tells apart, each with phases of its own (the lanes of a
    tensor-parallel group, the rings over them); the task is over when all are.

    Once the link classes are known, `phases` are (latency, size, weights on the binding link classes), and `carried`
    says what each link class carries in all phases and strands: (link class, bytes, bytes with the factors).
    """

    planned: list[tuple[float, float, tuple[tuple[int, float], ...]]]
    beside: tuple[Flows, ...] = ()
    phases: list[tuple[float, float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    carried: list[tuple[int, float, float]] = field(default_factory=list)
    # Latency and size, where all strands have one phase only, and the same.
    single: tuple[float, float] | None = None
    _bundles: dict[tuple[int, ...], Bundle] = field(default_factory=dict)

    def bundle(self, phase: int, which: Sequence[int], capacity: Sequence[float]) -> Bundle:
        """What some of the strands start in a phase; built once."""
        key = (phase, *which)
        found = self._bundles.get(key)
        if found is None:
            strands = self.strands
            found = self._bundles[key] = Bundle([strands[k].phases[phase][2] for k in which], capacity)
        return found

    @property
    def strands(self) -> tuple[Flows, ...]:
        """The strands, each without others beside it."""
        return (self, *self.beside)

    def resolve(self, links: LinkClasses) -> None:
        """Find the link classes that the patterns load."""
        carried: dict[int, list[float]] = {}
        for strand in self.strands:
            strand.phases = []
            for wait, size, named in strand.planned:
                total: dict[int, float] = {}
                for pattern, factor in named:
                    for link, load in links.patterns[pattern]:
                        counts = carried.setdefault(link, [0.0, 0.0])
                        counts[0] += size * load
                        counts[1] += size * load * factor
                        if links.binding[link]:
                            total[link] = total.get(link, 0.0) + load * factor
                strand.phases.append((wait, size, tuple(total.items())))
        plans = {tuple((wait, size) for wait, size, _ in strand.planned) for strand in self.strands}
        if len(plans) == 1 and len(self.planned) == 1:
            self.single = self.planned[0][:2]
        self.carried = [(link, size, busy) for link, (size, busy) in carried.items()]


def side_by_side(strands: Sequence[Flows]) -> Flows:
    """One task of several strands."""
    return Flows(strands[0].planned, beside=tuple(strands[1:]))


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
            used, total = _summed(traffic, self._wiring.links)
            limited = np.isfinite(self._wiring.capacity[used]) & (total > 0.0)
            links.append(used[limited])
            pattern.append(np.full(len(links[-1]), index))
            loads.append(total[limited])
        if not links or not sum(map(len, links)):
            return LinkClasses(capacity=[], members=[], patterns=[() for _ in self._patterns], binding=[])
        every, which, much = np.concatenate(links), np.concatenate(pattern), np.concatenate(loads)
        # Equal loads may differ in the last bits by the order of summation: compare twelve digits.
        exponent = np.floor(np.log10(much))
        digits = np.round(much / 10.0**exponent, 11).view(np.uint64) + exponent.astype(np.int64).view(np.uint64)
        mixed = scramble(scramble(which.astype(np.uint64)) + digits)
        signature = np.zeros(self._wiring.links, np.uint64)
        np.add.at(signature, every, mixed)
        signature = scramble(scramble(signature + self._wiring.capacity.view(np.uint64)) + self._wiring.kinds)
        touched = np.unique(every)
        _, first, inverse = np.unique(signature[touched], return_index=True, return_inverse=True)
        class_of = np.full(self._wiring.links, -1, np.int64)
        class_of[touched] = inverse
        capacity = self._wiring.capacity[touched[first]].tolist()
        # One link of each class stands for it: a pattern that loads one loads all.
        stands = np.zeros(self._wiring.links, np.bool_)
        stands[touched[first]] = True
        patterns: list[tuple[tuple[int, float], ...]] = []
        by_class: list[dict[int, float]] = [{} for _ in first]
        for index, (used, load) in enumerate(zip(links, loads, strict=True)):
            one = stands[used]
            pairs = tuple(zip(class_of[used[one]].tolist(), load[one].tolist(), strict=True))
            patterns.append(pairs)
            for found, much_here in pairs:
                by_class[found][index] = much_here
        members = np.split(touched[np.argsort(inverse, kind="stable")], np.cumsum(np.bincount(inverse))[:-1])
        return LinkClasses(
            capacity=capacity, members=members, patterns=patterns, binding=binding_links(by_class, capacity)
        )


def _summed(traffic: Traffic, links: int) -> tuple[Ints, NDArray[np.float64]]:
    """The links that a traffic loads, and how much. O(crossings * log crossings) or O(links), whichever is less."""
    if len(traffic.links) * 8 < links:
        used, inverse = np.unique(traffic.links, return_inverse=True)
        return used, np.bincount(inverse, weights=traffic.loads).astype(np.float64)
    total = np.bincount(traffic.links, weights=traffic.loads).astype(np.float64)
    found = np.flatnonzero(total)
    return found, total[found]
