"""When things happened on one rank: host time on a CPU, stream time on a GPU, both in seconds of the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from clustersim.timeline import OpKind, Phase


class Event(Protocol):
    """A point in a device's stream, as torch.cuda.Event is one."""

    def record(self) -> None:
        """Put it into the current stream."""

    def synchronize(self) -> None:
        """Wait until the device has come to it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this one to another."""


# A moment: seconds of time.monotonic(), or an event that `Clock.seconds` turns into them.
Mark = float | Event


def timing_event() -> torch.cuda.Event:
    """An event that records a time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Clock:
    """Takes marks and resolves them. time.monotonic() is one clock for all processes of a host."""

    def __init__(self, new_event: Callable[[], Event] | None) -> None:
        """`new_event`: what makes an event of the current device's stream; None for a device without streams."""
        self._new_event = new_event
        self._anchor: tuple[float, Event] | None = None
        if new_event is not None:
            for _ in range(2):  # The first event costs what starting the device costs.
                event = new_event()
                event.record()
                event.synchronize()
                self._anchor = (time.monotonic(), event)

    @classmethod
    def of(cls, device: torch.device) -> Clock:
        """The clock of a rank that computes on `device`, which is the current one."""
        return cls(timing_event if device.type == "cuda" else None)

    def host(self) -> float:
        """Now, on the host."""
        return time.monotonic()

    def mark(self) -> Mark:
        """Now: when everything issued before this call in the current stream is done."""
        if self._new_event is None:
            return time.monotonic()
        event = self._new_event()
        event.record()
        return event

    def seconds(self, mark: Mark) -> float:
        """A mark on the host's clock. Waits for the event."""
        if isinstance(mark, float):
            return mark
        assert self._anchor is not None
        base, first = self._anchor
        mark.synchronize()
        return base + float(first.elapsed_time(mark)) * 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One op as a rank saw it. `step` counts from the first of all, warm-up included."""

    step: int
    micro_batch: int
    stage: int
    phase: Phase
    part: str
    kind: OpKind
    resource: str
    ready: Mark
    start: Mark
    end: Mark


class Notes:
    """What one rank observed. Threads may add at the same time (appending to a list is atomic)."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._notes: list[Note] = []

    def add(
        self,
        step: int,
        phase: Phase,
        part: str,
        kind: OpKind,
        resource: str,
        start: Mark,
        end: Mark,
        *,
        micro_batch: int = -1,
        stage: int = 0,
        ready: Mark | None = None,
    ) -> None:
        """Record an op of step `step` from `start` to `end`."""
        self._notes.append(
            Note(
                step=step, micro_batch=micro_batch, stage=stage, phase=phase, part=part, kind=kind,
                resource=resource, ready=start if ready is None else ready, start=start, end=end,
            )
        )  # fmt: skip

    def rows(self) -> list[list[int | str | float]]:
        """All of them as plain rows: step, micro-batch, stage, phase, part, kind, resource, ready, start, end."""
        at = self.clock.seconds
        return [
            [n.step, n.micro_batch, n.stage, n.phase, n.part, n.kind, n.resource, at(n.ready), at(n.start), at(n.end)]
            for n in self._notes
        ]
