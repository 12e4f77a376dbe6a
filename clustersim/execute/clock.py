"""When things happened on one rank: host time on a CPU, stream time on a GPU, both in seconds of the host's clock."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from clustersim.timeline import OpKind, Phase

# A moment: seconds of time.monotonic(), or an event in a CUDA stream that `Clock.seconds` turns into them.
Mark = float | torch.cuda.Event


def timing_event() -> torch.cuda.Event:
    """An event that records a time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class Clock:
    """Takes marks and resolves them. time.monotonic() is one clock for all processes of a host."""

    def __init__(self, device: torch.device) -> None:
        self._anchor: tuple[float, torch.cuda.Event] | None = None
        if device.type == "cuda":
            event = timing_event()
            torch.cuda.synchronize(device)
            event.record()
            event.synchronize()
            self._anchor = (time.monotonic(), event)

    def host(self) -> float:
        """Now, on the host."""
        return time.monotonic()

    def mark(self) -> Mark:
        """Now: when everything issued before this call in the current stream is done."""
        if self._anchor is None:
            return time.monotonic()
        event = timing_event()
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
