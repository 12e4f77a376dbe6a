"""A program on a folded cluster as tasks: how long each computes, what each sends over which link classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from clustersim.program.program import (
    Collective,
    Compute,
    Exchange,
    Gate,
    Op,
    Read,
    Transfer,
    Update,
)
from clustersim.simulate.flows import Flows, LinkClasses
from clustersim.simulate.prices.prices import Prices

Ints = NDArray[np.int64]
# The partitions of a bucket are simulated one by one up to this many; more would only sharpen the pipeline's fill.
MOST_PARTS = 4


@dataclass(slots=True)
class Task:
    """One op of one class (or one of a bucket's parts). `work` is its duration in seconds, or flows. `threads`: how
    many threads of a shared host it keeps busy on all ranks of the class.

    `joint` numbers the tasks that happen together: a collective that several classes take part in. `reads` of the
    `waits` are for input; a task that waits for nothing else begins once the step 1 + `ahead` before its own is over.
    """

    owner: int
    stream: int
    op: Op
    span: int
    work: float | Flows
    threads: int = 0
    waits: int = 0
    reads: int = 0
    ahead: int = 0
    joint: int = -1
    then: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Compiled:
    """Tasks in emission order, the streams' names, the joints' members, and the links they run on. `cores`: of the one
    host on which everything runs, or 0."""

    tasks: list[Task]
    streams: list[tuple[int, str]]
    joints: list[list[int]]
    links: LinkClasses
    owners: int
    cores: int


class Compiler:
    """Turns every op of every class into tasks; owners are the worker classes, then the server classes.

    `midway`: the step is one of many, so that its input was read during the one before (where that is read ahead), and
    what it reads is the next one's.
    """

    def __init__(self, prices: Prices, *, midway: bool = False) -> None:
        self.prices = prices
        self.midway = midway
        self.program = prices.placement.program
        self.tasks: list[Task] = []
        self.streams: dict[tuple[int, str], int] = {}
        self.joints: list[list[int]] = []
        self._joint_of: dict[tuple[object, ...], int] = {}
        # The first task of each owner; those of its ops follow each other. Of each position, where the tasks of its ops
        # begin, and after the last.
        self._base: list[int] = []
        self._begins: dict[int, list[int]] = {}
        self._known_peers: dict[tuple[int, int], list[int]] = {}
        self._spans = 0
        self._flow_cache: dict[tuple[object, ...], Flows] = {}
        # (owner, micro-batch or -1) whose host time has been charged
        self._driven: set[tuple[int, int]] = set()

    def compiled(self) -> Compiled:
        """All tasks, with who waits for whom."""
        owners = self._owners()
        for owner, position in owners:
            self._emit(owner, position)
        for owner, position in owners:
            self._wait(owner, position)
        links = self.prices.patterns.classes()
        for flows in self._flow_cache.values():
            flows.resolve(links)
        return Compiled(
            tasks=self.tasks, streams=list(self.streams), joints=self.joints, links=links, owners=len(owners),
            cores=self.prices.placement.shared_cores,
        )  # fmt: skip

    def _owners(self) -> list[tuple[int, int]]:
        workers = [(c, stage) for c, stage in enumerate(self.prices.placement.folding.stage)]
        first = len(workers)
        return workers + [(first + s, len(self.program.positions) - 1) for s in range(len(self.prices.servers.classes))]

    def _emit(self, owner: int, position: int) -> None:
        """The tasks of one owner."""
        tasks, streams = self.tasks, self.streams
        base = len(tasks)
        self._base.append(base)
        begins = [0]
        mine: dict[str, int] = {}
        shared = self.prices.placement.shared_cores
        for op in self.program.positions[position].ops:
            stream = mine.get(op.stream)
            if stream is None:
                stream = mine[op.stream] = streams.setdefault((owner, op.stream), len(streams))
            threads = self._threads(owner, op) if shared else 0
            ahead = op.prefetch if isinstance(op, Read) else 0
            span, self._spans = self._spans, self._spans + 1
            first = len(tasks)
            for work in self._works(owner, op):
                tasks.append(Task(owner, stream, op, span, work, threads, ahead=ahead))
            begins.append(len(tasks) - base)
            if isinstance(op, Collective):
                classes, _ = self.prices.groups.of_class(op.group, owner)
                key = (op.id, op.group, classes)
                joint = self._joint_of.setdefault(key, len(self.joints))
                if joint == len(self.joints):
                    self.joints.append([])
                self.joints[joint].append(first)
                tasks[first].joint = joint
        self._begins[position] = begins

    def _threads(self, owner: int, op: Op) -> int:
        """Threads of the shared host that an op of a class keeps busy: each process computes with its share of the
        cores; a thread at either end moves bytes."""
        placement, servers = self.prices.placement, self.prices.servers.classes
        each = max(1, placement.shared_cores // placement.processes)
        first = placement.folding.classes
        ranks = len(placement.folding.members[owner]) if owner < first else len(servers[owner - first].shares)
        match op:
            case Compute() | Update():
                return ranks * each
            case Transfer() | Exchange():
                return 2 * ranks
            case Collective() | Read():
                return ranks
            case Gate():
                return 0
            case _:
                assert_never(op)

    def _works(self, owner: int, op: Op) -> list[float | Flows]:
        prices = self.prices
        match op:
            case Compute():
                return [prices.compute.work_s(op.work, owner) + self._host_s(owner, op)]
            case Transfer():
                return [
                    self._cached(("send", owner, op.to, op.bytes), lambda: prices.sends.flows(owner, op.to, op.bytes))
                ]
            case Collective():
                classes, _ = prices.groups.of_class(op.group, owner)
                key = (op.group, classes, op.kind, op.algorithm, op.bytes)
                return [
                    self._cached(
                        key, lambda: prices.collectives.flows(op.group, owner, op.kind, op.algorithm, op.bytes)
                    )
                ]
            case Exchange():
                parts = min(op.partitions, MOST_PARTS)
                exchange = (op.direction, owner, op.bytes, op.partitions)
                flows = self._cached(
                    exchange,
                    lambda: prices.servers.exchange_flows(
                        owner, op.direction, op.bytes / parts, op.bytes / op.partitions
                    ),
                )
                return [flows] * parts
            case Update():
                parts = min(op.partitions, MOST_PARTS)
                server = owner - prices.placement.folding.classes
                return [prices.servers.update_s(server, op, parts)] * parts
            case Gate():
                return [self._host_s(owner, op)]
            case Read():
                return [self._cached(("read", owner), lambda: prices.read_flows(owner, op))]
            case _:
                assert_never(op)

    def _host_s(self, owner: int, op: Compute | Gate) -> float:
        """What the host spends besides driving layers: once a micro-batch before its first forward pass here, and once
        a step, with the optimizer or (where that runs on servers) at the gate."""
        host = self.prices.placement.framework.host
        if op.id.phase == "forward":
            once = (owner, op.id.micro_batch)
        elif op.id.phase == "update" or isinstance(op, Gate):
            once = (owner, -1)
        else:
            return 0.0
        if once in self._driven:
            return 0.0
        self._driven.add(once)
        return host.per_step_s if once[1] < 0 else host.per_micro_batch_s

    def _cached(self, key: tuple[object, ...], make: object) -> Flows:
        found = self._flow_cache.get(key)
        if found is None:
            found = self._flow_cache[key] = make()  # type: ignore[operator]
        return found

    def _wait(self, owner: int, position: int) -> None:
        """Have the tasks of one owner wait for what they come after."""
        tasks, positions = self.tasks, self.program.positions
        base, begins = self._base[owner], self._begins[position]
        for index, op in enumerate(positions[position].ops):
            first, last = base + begins[index], base + begins[index + 1]
            for where, which in op.after:
                before = positions[where].ops[which]
                read = isinstance(before, Read)
                if self.midway and isinstance(before, Read) and before.prefetch:
                    continue
                theirs = self._begins[where]
                begin, end = theirs[which], theirs[which + 1]
                for other in self._who(owner, position, where):
                    at = self._base[other]
                    if last - first == end - begin == 1:
                        task = tasks[first]
                        task.waits += 1
                        task.reads += read
                        tasks[at + begin].then.append(first)
                        continue
                    for number in range(first, last):
                        # Part k of a bucket needs part k of what it follows; a whole needs the last part.
                        part = begin + number - first if end - begin == last - first else end - 1
                        tasks[at + part].then.append(number)
                        task = tasks[number]
                        task.waits += 1
                        task.reads += read

    def _who(self, owner: int, position: int, where: int) -> list[int]:
        """Which owners at position `where` an owner at `position` depends on."""
        found = self._known_peers.get((owner, where))
        if found is None:
            found = self._known_peers[owner, where] = self._peers(owner, position, where)
        return found

    def _peers(self, owner: int, position: int, where: int) -> list[int]:
        folding = self.prices.placement.folding
        if where == position:
            return [owner]
        workers = folding.classes
        if self.program.positions[where].role == "server":
            return [workers + s for s in range(len(self.prices.servers.classes))]
        if owner >= workers:
            return [c for c, stage in enumerate(folding.stage) if stage == where]
        rank = folding.members[owner][:1]
        _, dp, tp = self.prices.placement.coordinates(rank)
        return [int(folding.class_of[folding.grid[where, int(dp[0]), int(tp[0])]])]
