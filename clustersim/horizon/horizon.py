"""Days of training with failures: what is kept, and what is lost to checkpoints, rollbacks, restarts and waiting."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, assert_never

import numpy as np
import simpy
from numpy.typing import NDArray

from clustersim.errors import InputError
from clustersim.horizon.failures import Failure, Failures
from clustersim.horizon.job import Job, Threat

Floats = NDArray[np.float64]
# What interrupts a run besides failures: a node that comes back, a stop that was planned.
Cause = Threat | Literal["node", "planned"]
Phase = Literal["train", "checkpoint", "restart", "wait", "planned"]
Waiting = Generator[simpy.Event, Any, None]

# Of all runs together: a second or two for every million.
_MOST_FAILURES = 2e7


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean, and the 5th, 50th and 95th percentile over the seeds; `error` is the standard error of the mean."""

    mean: float
    low: float
    median: float
    high: float
    error: float

    @classmethod
    def of(cls, values: Floats) -> Spread:
        """Of one value a seed."""
        low, median, high = (float(q) for q in np.quantile(values, (0.05, 0.5, 0.95)))
        error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return cls(mean=float(values.mean()), low=low, median=median, high=high, error=error)


@dataclass(slots=True)
class Ledger:
    """Seconds of one run by what they went into; they add up to the horizon.

    `useful`: work that was kept, at full speed. `degraded`: what running on fewer nodes cost of the time worked.
    `checkpoint`: pauses to write. `lost`: work that was rolled back. `restart`: detection, rescheduling, loading.
    `wait`: for a node. `planned`: interruptions that were announced. Besides, how often it failed and rolled back.
    """

    useful: float = 0.0
    degraded: float = 0.0
    checkpoint: float = 0.0
    lost: float = 0.0
    restart: float = 0.0
    wait: float = 0.0
    planned: float = 0.0
    failures: int = 0
    rollbacks: int = 0


KINDS = tuple(field.name for field in fields(Ledger) if field.name not in ("failures", "rollbacks"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Horizon:
    """What `seeds` runs of a job over `seconds` found. `goodput`: useful time by all time; `ettr`: the time in which
    work was done that was kept, at whatever speed, by all time."""

    seconds: float
    seeds: int
    goodput: Spread
    ettr: Spread
    seconds_by_kind: dict[str, float]
    failures: Spread
    rollbacks: Spread
    failures_by_cause: dict[str, float]


def horizon(job: Job, *, days: float, seeds: int, seed: int = 0) -> Horizon:
    """Run `job` for `days`, `seeds` times with different failures.

    Failures that all roll back to a restart of constant length leave independent stretches of training, of which each
    is accounted for in closed form, all at once; spares, repairs, elastic jobs, planned stops and servers with copies
    are a process on SimPy's clock. O(seeds * failures) either way; InputError where
    these are too many. The failures of run i depend on (seed, i) and on
    each hazard's cause and component, not on how many runs or other hazards there are.
    """
    whole = days * 86400.0
    expected = seeds * whole * sum(threat.rate_per_s for threat in job.threats)
    if expected > _MOST_FAILURES:
        raise InputError(
            f"reliability.failures: {expected:.3g} failures in {seeds} runs of {days:g} days; at most "
            f"{_MOST_FAILURES:g} are simulated: write fewer --days or --seeds, or rarer failures"
        )
    ledgers = []
    causes = np.zeros(len(job.threats))
    for run in range(seeds):
        failures = Failures(job, whole, seed, run)
        causes += failures.by_threat
        if _memoryless(job):
            ledgers.append(stretches(job, failures.times, whole))
        else:
            ledgers.append(process(job, failures.listed(), whole))
    kinds = {kind: np.array([getattr(ledger, kind) for ledger in ledgers]) for kind in KINDS}
    by_cause: dict[str, float] = {}
    for threat, count in zip(job.threats, causes, strict=True):
        by_cause[threat.hazard.cause] = by_cause.get(threat.hazard.cause, 0.0) + float(count) / seeds
    return Horizon(
        seconds=whole,
        seeds=seeds,
        goodput=Spread.of(kinds["useful"] / whole),
        ettr=Spread.of((kinds["useful"] + kinds["degraded"]) / whole),
        seconds_by_kind={kind: float(values.mean()) for kind, values in kinds.items()},
        failures=Spread.of(np.array([float(ledger.failures) for ledger in ledgers])),
        rollbacks=Spread.of(np.array([float(ledger.rollbacks) for ledger in ledgers])),
        failures_by_cause=dict(sorted(by_cause.items(), key=lambda item: (-item[1], item[0]))),
    )


def _memoryless(job: Job) -> bool:
    """Whether every failure rolls back to a restart of one length: then only the times of failures matter."""
    lasting = job.repair_s is None and job.planned_every_s is None
    return lasting and all(threat.recovery == "rollback" for threat in job.threats if threat.count)


# ------------------------------------------------------------------------------------------------ the closed account


def stretches(job: Job, times: Floats, whole_s: float) -> Ledger:
    """The ledger of a run whose failures at `times` all roll back. The time between two failures is a restart (which
    the next failure may cut short) and a stretch of training that begins at a checkpoint. O(failures), in arrays."""
    ends = np.concatenate([times, [whole_s]])
    length = np.diff(ends, prepend=0.0)
    restart = np.minimum(length, job.restart_s)
    restart[0] = 0.0
    worked, kept, paused = account(job, length - restart)
    # What the end of the horizon interrupts is not lost.
    kept[-1] = worked[-1]
    return Ledger(
        useful=float(kept.sum()), checkpoint=float(paused.sum()), lost=float((worked - kept).sum()),
        restart=float(restart.sum()), failures=len(times), rollbacks=len(times),
    )  # fmt: skip


def account(job: Job, up_s: Floats) -> tuple[Floats, Floats, Floats]:
    """Of stretches of `up_s` seconds that began at a checkpoint: the seconds worked, those that checkpoints have made
    safe, and those that writing paused."""
    interval = min(job.interval_s, 1e18)
    cycle = interval + job.pause_s
    done = np.floor(up_s / cycle)
    rest = up_s - done * cycle
    paused = done * job.pause_s + np.maximum(0.0, rest - interval)
    safe = np.clip(np.floor((up_s - job.persist_s) / cycle), 0.0, done)
    return up_s - paused, safe * interval, paused


# ------------------------------------------------------------------------------------------------------ the process


def process(job: Job, failures: Sequence[Failure], whole_s: float) -> Ledger:
    """The ledger of a run on SimPy's clock. O(failures) events."""
    return _Run(job, failures, whole_s).ledger


class _Run:
    """One run. The job trains, restarts, waits for nodes, or stands still while something is replaced; failures, nodes
    that come back and planned stops interrupt it. Failures of places where no node stands do not happen."""

    def __init__(self, job: Job, failures: Sequence[Failure], whole_s: float) -> None:
        self.env = simpy.Environment()
        self.job = job
        self.ledger = Ledger()
        self.spares = job.spares
        self.vacant: set[int] = set()
        # Copies of servers' parts that are gone for now, how long the way back takes, whether a planned stop is due.
        self.copies_down = 0
        self.rest_s = 0.0
        self.due = False
        # Seconds of training since the last rollback or stop, pauses to write included, and from which second of work
        # on at which speed.
        self.up_s = 0.0
        self.speeds: list[tuple[float, float]] = [(0.0, 1.0)]
        self.phase: tuple[Phase, float] = ("train", 0.0)
        self.main = self.env.process(self._main())
        self.env.process(self._fail(failures))
        if job.planned_every_s is not None:
            self.env.process(self._plan(job.planned_every_s))
        self.env.run(until=whole_s)
        self._spent()
        # What the end of the horizon interrupts is not lost.
        self._settle(rolled_back=False)

    # ------------------------------------------------------------------------------------ what happens to the job

    def _fail(self, failures: Sequence[Failure]) -> Waiting:
        for failure in failures:
            yield self.env.timeout(failure.at_s - self.env.now)
            threat = self.job.threats[failure.threat]
            place = self._place(threat, failure.component)
            if place in self.vacant:
                continue
            self.ledger.failures += 1
            if place is not None and self.job.repair_s is not None and threat.hazard.replace:
                self._lose(place, self.job.repair_s)
            self.main.interrupt(threat)

    def _place(self, threat: Threat, component: int) -> int | None:
        """The worker node that a failure strikes."""
        match threat.hazard.component:
            case "node":
                return component
            case "device":
                return component // self.job.devices_per_node
            case "server":
                return None
            case _:
                assert_never(threat.hazard.component)

    def _lose(self, place: int, repair_s: float) -> None:
        if self.spares:
            self.spares -= 1
        else:
            self.vacant.add(place)
        back = self.env.timeout(repair_s)
        assert back.callbacks is not None
        back.callbacks.append(self._back)

    def _back(self, _: object) -> None:
        """A node is repaired: it fills the vacant place of the lowest number, or stands by."""
        if not self.vacant:
            self.spares += 1
            return
        before = self._possible()
        self.vacant.remove(min(self.vacant))
        if self._possible() > before:
            self.main.interrupt("node")

    def _possible(self) -> float:
        """The speed that the nodes at hand allow."""
        if not self.vacant:
            return 1.0
        return self.job.speed(self.job.nodes - len(self.vacant)) if self.job.elastic else 0.0

    def _plan(self, every_s: float) -> Waiting:
        while True:
            yield self.env.timeout(every_s)
            self.main.interrupt("planned")

    # ------------------------------------------------------------------------------------------------- what it does

    def _main(self) -> Waiting:
        while True:
            cause = yield from self._spend("train", math.inf)
            if isinstance(cause, Threat):
                yield from self._come_back(cause)
            else:
                self.due = self.due or cause == "planned"
                yield from self._stop()
            while self.due:
                yield from self._stop()

    def _spend(self, phase: Phase, seconds: float) -> Generator[simpy.Event, Any, Cause | None]:
        """Be in a phase for so long, or until something happens: what."""
        self.phase = (phase, self.env.now)
        cause: Cause | None = None
        try:
            yield self.env.event() if math.isinf(seconds) else self.env.timeout(seconds)
        except simpy.Interrupt as interrupt:
            cause = interrupt.cause
        self._spent()
        return cause

    def _spent(self) -> None:
        """Enter the time of the current phase, up to now."""
        phase, since = self.phase
        passed = self.env.now - since
        self.phase = (phase, self.env.now)
        if phase == "train":
            self.up_s += passed
        else:
            setattr(self.ledger, phase, getattr(self.ledger, phase) + passed)

    def _pass(self, phase: Phase, seconds: float, *, idle: bool = False) -> Generator[simpy.Event, Any, Threat | None]:
        """Be in a phase for `seconds`, or until a failure, which does not matter where the job stands `idle`."""
        end = self.env.now + seconds
        while self.env.now < end:
            cause = yield from self._spend(phase, end - self.env.now)
            if isinstance(cause, Threat) and not idle:
                return cause
            self.due = self.due or cause == "planned"
        return None

    def _come_back(self, threat: Threat | None) -> Waiting:
        """From a failure to training: detection, a node for every place, and the rest of the way."""
        while threat is not None:
            self._struck(threat)
            threat = yield from self._pass("restart", self.job.detection_s)
            if threat is None:
                threat = yield from self._start()
        self.copies_down, self.rest_s = 0, 0.0
        speed = self._possible()
        if speed != self.speeds[-1][1]:
            self.speeds.append((self._worked(), speed))

    def _start(self) -> Generator[simpy.Event, Any, Threat | None]:
        """Wait until there are nodes enough, and start."""
        while self._possible() == 0.0:
            cause = yield from self._spend("wait", math.inf)
            if isinstance(cause, Threat):
                return cause
            self.due = self.due or cause == "planned"
        return (yield from self._pass("restart", self.rest_s))

    def _struck(self, threat: Threat) -> None:
        """What a failure costs, and how long the way back is."""
        self.copies_down += threat.takes_copy
        if threat.recovery == "rollback" or self.copies_down > self.job.server_replicas:
            self.ledger.rollbacks += 1
            self._settle(rolled_back=True)
            self.rest_s = max(self.rest_s, self.job.reschedule_s + self.job.load_s)
            return
        self.rest_s = max(self.rest_s, threat.hold_s)
        # The step under way is done again.
        position = self.up_s % (self.job.interval_s + self.job.pause_s)
        if position < self.job.interval_s:
            part = position % (self.job.step_s / self.speeds[-1][1])
            self.ledger.lost += part
            self.up_s -= part

    def _stop(self) -> Waiting:
        """Write a checkpoint, stand still where that was planned, and start again on the nodes that there are."""
        if self.up_s > 0.0:
            threat = yield from self._pass("checkpoint", self.job.pause_s + self.job.persist_s)
            if threat is not None:
                yield from self._come_back(threat)
                return
            self._settle(rolled_back=False)
        if self.due:
            self.due = False
            yield from self._pass("planned", self.job.planned_lasts_s, idle=True)
        self.rest_s = self.job.reschedule_s + self.job.load_s
        yield from self._come_back((yield from self._start()))

    # ------------------------------------------------------------------------------------------------------ account

    def _worked(self) -> float:
        return float(account(self.job, np.array([self.up_s]))[0][0])

    def _settle(self, *, rolled_back: bool) -> None:
        """Enter the training since the last settlement, of which a rollback keeps what checkpoints have made safe."""
        worked, safe, paused = (float(part[0]) for part in account(self.job, np.array([self.up_s])))
        kept = safe if rolled_back else worked
        ends = [*(begin for begin, _ in self.speeds[1:]), math.inf]
        for (begin, speed), end in zip(self.speeds, ends, strict=True):
            here = max(0.0, min(kept, end) - begin)
            self.ledger.useful += here * speed
            self.ledger.degraded += here * (1.0 - speed)
        self.ledger.checkpoint += paused
        self.ledger.lost += worked - kept
        self.up_s = 0.0
        self.speeds = [(0.0, self.speeds[-1][1])]
