"""The network on the clock: flow classes start, share their links, and end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import simpy

from clustersim.simulate.alarm import LAST, Alarm
from clustersim.simulate.sharing import Weights, max_min_rates

# Of a flow's bytes, what rounding may leave over when its finishing time has come.
_DUST = 1e-9
# Flows that lack no more than this part of their bytes when one that they share links with ends, end with it. Rounding
# would set apart what ends at once; what one of them starts next would then have all links to itself for a moment, and
# be ahead by many times that moment when it ends: errors would grow from collective to collective.
_AT_ONCE = 1e-11

# What is called when some of the strands of one start have ended: with their numbers.
Ended = Callable[[Sequence[int]], None]


class Bundle:
    """Flow classes that start together: `strands[k]` are the weights of the k-th. `alike` are (rate on idle links,
    weights, members) of strands that are equally fast there and share no link with one another; empty where some do."""

    __slots__ = ("alike", "strands")

    def __init__(self, strands: Sequence[Weights], capacity: Sequence[float]) -> None:
        self.strands = strands
        self.alike: list[tuple[float, Weights, list[tuple[int, Weights]]]] = []
        links = [link for weights in strands for link, _ in weights]
        if all(strands) and len(set(links)) == len(links):
            rates: dict[float, list[tuple[int, Weights]]] = {}
            for number, weights in enumerate(strands):
                rates.setdefault(min([capacity[link] / m for link, m in weights]), []).append((number, weights))
            for rate, members in rates.items():
                self.alike.append((rate, [pair for _, weights in members for pair in weights], members))


class _Flow:
    """One flow class, or several strands of one start that nothing tells apart so far."""

    __slots__ = ("bytes", "ended", "left", "rate", "share", "since", "strands", "version", "weights")

    def __init__(
        self, size: float, weights: Weights, strands: Sequence[tuple[int, Weights]], ended: Ended, now: float
    ) -> None:
        self.bytes = size
        self.left = size
        self.weights = weights
        self.strands = strands
        self.ended = ended
        self.rate = 0.0
        self.share = 0.0
        self.since = now
        self.version = 0


class Network:
    """Flow classes on links of given capacities, shared max-min fairly.

    Rates change only for flows that share a link, directly or through others, with one that starts or ends; once for
    all that start and end at the same instant, since rates do not matter before time passes. `set_speed` slows all of
    them down where what moves the bytes has other things to do.
    `carried[link]` counts what every link was given to carry, the losses on the wire included.
    """

    def __init__(self, env: simpy.Environment, capacity: Sequence[float]) -> None:
        self.env = env
        self.capacity = capacity
        self.carried = [0.0] * len(capacity)
        self._flows: dict[int, _Flow] = {}
        self._on_link: list[set[int] | None] = [None] * len(capacity)
        self._next = 0
        self._touched: set[int] = set()
        self._settling = False
        self._speed = 1.0

    def set_speed(self, speed: float) -> None:
        """From now on, all flows progress at `speed` times their share of the links."""
        if speed != self._speed:
            self._speed = speed
            for number, flow in list(self._flows.items()):
                self._set_rate(number, flow, flow.share)

    def start(self, size: float, weights: Weights, done: Callable[[], None]) -> None:
        """Start a flow class of `size` bytes a flow; `done` is called when it has ended."""
        self.start_bundle(size, Bundle((weights,), self.capacity), lambda _: done())

    def start_bundle(self, size: float, bundle: Bundle, ended: Ended) -> None:
        """Start flow classes of `size` bytes a flow; `ended` is called with the numbers of the strands that end
        together, until all have. Strands that are alone on their links and equally fast cost no more than one flow,
        until others join them there."""
        if size <= 0.0:
            Alarm(self.env, 0.0, lambda _: ended(range(len(bundle.strands))))
            return
        carried, on_link = self.carried, self._on_link
        idle = True
        for weights in bundle.strands:
            for link, multiplicity in weights:
                carried[link] += size * multiplicity
                if on_link[link]:
                    idle = False
        if idle and bundle.alike:
            for rate, weights, members in bundle.alike:
                self._launch(size, weights, members, ended, rate)
            return
        free = [number for number, weights in enumerate(bundle.strands) if not weights]
        if free:
            Alarm(self.env, 0.0, lambda _: ended(free))
        for number, weights in enumerate(bundle.strands):
            if weights:
                self._launch(size, weights, ((number, weights),), ended, None)

    def _launch(
        self,
        size: float,
        weights: Weights,
        strands: Sequence[tuple[int, Weights]],
        ended: Ended,
        alone_rate: float | None,
    ) -> None:
        number = self._next
        self._next += 1
        self._flows[number] = flow = _Flow(size, weights, strands, ended, self.env.now)
        on_link = self._on_link
        if alone_rate is not None:
            for link, _ in weights:
                on_link[link] = {number}
            self._set_rate(number, flow, alone_rate)
            return
        for link, _ in weights:
            here = on_link[link]
            if here is None:
                on_link[link] = {number}
                continue
            for other in [other for other in here if len(self._flows[other].strands) > 1]:
                self._tell_apart(other)
            here.add(number)
        self._touch({number})

    def _tell_apart(self, number: int) -> None:
        """Make a flow of each of the strands that were one so far."""
        whole = self._flows.pop(number)
        whole.version += 1
        self._touched.discard(number)
        for strand in whole.strands:
            own = self._next
            self._next += 1
            flow = self._flows[own] = _Flow(whole.bytes, strand[1], (strand,), whole.ended, whole.since)
            flow.left = whole.left
            for link, _ in flow.weights:
                here = self._on_link[link]
                assert here is not None
                here.discard(number)
                here.add(own)
            self._set_rate(own, flow, whole.share, whole.rate)

    def _touch(self, numbers: set[int]) -> None:
        """Have the rates around these flows recomputed once everything that happens now has happened."""
        self._touched |= numbers
        if not self._settling:
            self._settling = True
            Alarm(self.env, 0.0, self._settle, LAST)

    def _settle(self, _: Any) -> None:
        self._settling = False
        touched, self._touched = self._touched & self._flows.keys(), set()
        while touched:
            touched -= self._share(min(touched))

    def _share(self, seed: int) -> set[int]:
        """Recompute the rates of the flows connected to `seed` by shared links, or end those that are over; these
        flows."""
        component = self._component(seed)
        now = self.env.now
        over = []
        for number in sorted(component):
            flow = self._flows[number]
            left = flow.left - flow.rate * (now - flow.since)
            if left <= _AT_ONCE * flow.bytes + 2.0 * math.ulp(now) * flow.rate:
                over.append((number, flow))
        if over:
            # What they start, and those that are left, share the links when this has happened, too.
            self._touch(component)
            for number, flow in over:
                self._end(number, flow)
            return component
        if len(component) == 1:
            # Alone on all of its links: the slowest of them decides.
            flow = self._flows[seed]
            self._set_rate(seed, flow, min([self.capacity[link] / m for link, m in flow.weights]))
            return component
        ordered = {number: self._flows[number].weights for number in sorted(component)}
        for number, rate in max_min_rates(ordered, self.capacity).items():
            self._set_rate(number, self._flows[number], rate)
        return component

    def _component(self, seed: int) -> set[int]:
        """The flows connected to `seed` by shared links."""
        component = {seed}
        todo = [seed]
        seen: set[int] = set()
        while todo:
            for link, _ in self._flows[todo.pop()].weights:
                if link not in seen:
                    seen.add(link)
                    here = self._on_link[link]
                    assert here is not None
                    if len(here) > 1:
                        new = here - component
                        component |= new
                        todo += new
        return component

    def _set_rate(self, number: int, flow: _Flow, share: float, before: float | None = None) -> None:
        """Let a flow progress at its share from now on; `before`: the rate it had since `flow.since`, if not known."""
        now = self.env.now
        flow.share, rate = share, share * self._speed
        if before is not None:
            flow.rate = before
        elif rate == flow.rate:
            return
        if now > flow.since:
            flow.left = max(0.0, flow.left - flow.rate * (now - flow.since))
            flow.since = now
        flow.rate = rate
        flow.version += 1
        if rate <= 0.0:
            return
        version = flow.version

        def over(_: Any) -> None:
            if flow.version == version:
                self._end(number, flow)

        Alarm(self.env, flow.left / rate, over)

    def _end(self, number: int, flow: _Flow) -> None:
        now = self.env.now
        # The clock's own resolution may be worth some bytes, too.
        dust = _DUST * flow.bytes + 4.0 * math.ulp(now) * flow.rate
        assert flow.left - flow.rate * (now - flow.since) <= dust
        del self._flows[number]
        neighbours: set[int] = set()
        for link, _ in flow.weights:
            here = self._on_link[link]
            assert here is not None
            if len(here) == 1:
                self._on_link[link] = None
            else:
                here.discard(number)
                neighbours |= here
        flow.version += 1
        if neighbours:
            self._touch(neighbours)
        flow.ended([index for index, _ in flow.strands])
