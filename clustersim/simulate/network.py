"""The network on the clock: flow classes start, share their links, and end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import simpy
from simpy.events import EventPriority

from clustersim.simulate.sharing import Weights, max_min_rates

# Of a flow's bytes, what rounding may leave over when its finishing time has come.
_DUST = 1e-9
# SimPy runs the events of one instant by priority (urgent 0, normal 1), then in the order of scheduling.
_LAST = EventPriority(2)


class _Flow:
    __slots__ = ("bytes", "done", "left", "rate", "share", "since", "version", "weights")

    def __init__(self, size: float, weights: Weights, done: Callable[[], None], now: float) -> None:
        self.bytes = size
        self.left = size
        self.weights = weights
        self.done = done
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
        self._on_link: dict[int, set[int]] = {}
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
        for link, multiplicity in weights:
            self.carried[link] += size * multiplicity
        if size <= 0.0 or not weights:
            self.env.timeout(0.0).callbacks.append(lambda _: done())
            return
        number = self._next
        self._next += 1
        flow = self._flows[number] = _Flow(size, weights, done, self.env.now)
        for link, _ in weights:
            self._on_link.setdefault(link, set()).add(number)
        if all(len(self._on_link[link]) == 1 for link, _ in weights):
            # Alone on all of its links: the slowest of them decides.
            self._set_rate(number, flow, min(self.capacity[link] / m for link, m in weights))
        else:
            self._touch({number})

    def _touch(self, numbers: set[int]) -> None:
        """Have the rates around these flows recomputed once everything that happens now has happened."""
        self._touched |= numbers
        if not self._settling:
            self._settling = True
            event = self.env.event()
            event._ok, event._value = True, None
            event.callbacks.append(lambda _: self._settle())
            self.env.schedule(event, priority=_LAST)

    def _settle(self) -> None:
        self._settling = False
        touched, self._touched = self._touched & self._flows.keys(), set()
        while touched:
            touched -= self._share(min(touched))

    def _share(self, seed: int) -> set[int]:
        """Recompute the rates of the flows connected to `seed` by shared links; these flows."""
        flow = self._flows[seed]
        if all(len(self._on_link[link]) == 1 for link, _ in flow.weights):
            # Alone on all of its links: the slowest of them decides.
            self._set_rate(seed, flow, min(self.capacity[link] / m for link, m in flow.weights))
            return {seed}
        component = {seed}
        todo = [seed]
        seen: set[int] = set()
        while todo:
            for link, _ in self._flows[todo.pop()].weights:
                if link not in seen:
                    seen.add(link)
                    new = self._on_link[link] - component
                    component |= new
                    todo += new
        ordered = {number: self._flows[number].weights for number in sorted(component)}
        for number, rate in max_min_rates(ordered, self.capacity).items():
            self._set_rate(number, self._flows[number], rate)
        return component

    def _set_rate(self, number: int, flow: _Flow, share: float) -> None:
        now = self.env.now
        flow.share, rate = share, share * self._speed
        if rate == flow.rate:
            return
        flow.left = max(0.0, flow.left - flow.rate * (now - flow.since))
        flow.since, flow.rate = now, rate
        flow.version += 1
        if rate <= 0.0:
            return
        version = flow.version

        def ended(_: Any) -> None:
            if flow.version == version:
                self._end(number, flow)

        self.env.timeout(flow.left / rate).callbacks.append(ended)

    def _end(self, number: int, flow: _Flow) -> None:
        # The clock's own resolution may be worth some bytes, too.
        dust = _DUST * flow.bytes + 2.0 * math.ulp(self.env.now) * flow.rate
        assert flow.left - flow.rate * (self.env.now - flow.since) <= dust
        del self._flows[number]
        neighbours: set[int] = set()
        for link, _ in flow.weights:
            self._on_link[link].discard(number)
            neighbours |= self._on_link[link]
        flow.version += 1
        if neighbours:
            self._touch(neighbours)
        flow.done()
