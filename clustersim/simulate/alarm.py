"""An event of SimPy's clock that calls one function: what most of a simulation consists of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import simpy
from simpy.events import NORMAL, EventPriority

# SimPy runs the events of one instant by priority (urgent 0, normal 1), then in the order of scheduling.
LAST = EventPriority(2)


class Alarm:
    """Calls `call` after `delay` seconds. What SimPy's `Timeout` would do, without what only processes need: it cannot
    be yielded, has no value, and costs half as much."""

    __slots__ = ("callbacks",)
    _ok = True

    def __init__(
        self, env: simpy.Environment, delay: float, call: Callable[[Any], None], priority: EventPriority = NORMAL
    ) -> None:
        self.callbacks: list[Callable[[Any], None]] | None = [call]
        env.schedule(self, priority, delay)  # type: ignore[arg-type]
