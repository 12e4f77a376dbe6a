"""The engine: tasks on streams, flows on the network, on SimPy's clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import simpy

from clustersim.simulate.network import Network
from clustersim.simulate.tasks import Compiled, Flows, Task


class Engine:
    """Runs compiled tasks `steps` times. Streams run their tasks in order, one at a time; a task starts when the one
    before it has ended and all that it waits for has happened. A server's host stream serves whatever is ready first. A
    step begins for an owner when its last step is over.

    `slowdown`: how much longer compute takes on an owner while it communicates. After `run`, `start_s[k]`, `end_s[k]`
    and `ready_s[k]` hold the times of task k (of step k div len(tasks)).
    """

    def __init__(self, compiled: Compiled, steps: int, slowdown: float) -> None:
        self.env = simpy.Environment()
        self.compiled = compiled
        self.steps = steps
        self.slowdown = slowdown
        self.network = Network(self.env, compiled.links.capacity)
        count = len(compiled.tasks)
        self.start_s = [0.0] * (count * steps)
        self.end_s = [0.0] * (count * steps)
        self.ready_s = [0.0] * (count * steps)
        self.events = 0
        self._waits = [task.waits for task in compiled.tasks] * steps
        self._queues = self._make_queues()
        self._head = [0] * len(self._queues)
        # Of streams that serve in order of readiness: (ready time, task) heaps, and whether a task runs.
        self._ready: dict[int, list[tuple[float, int]]] = {
            index: [] for index, (_, name) in enumerate(compiled.streams) if name == "host"
        }
        self._busy = dict.fromkeys(self._ready, False)
        self._arrived = [0] * (len(compiled.joints) * steps)
        self._left_in_step = [0] * (compiled.owners * steps)
        for task in compiled.tasks:
            for step in range(steps):
                self._left_in_step[step * compiled.owners + task.owner] += 1
        self._parked: dict[int, list[int]] = {}
        self._talking = [0] * compiled.owners
        self._running: dict[int, _Running] = {}

    def _make_queues(self) -> list[list[int]]:
        count = len(self.compiled.tasks)
        queues: list[list[int]] = [[] for _ in self.compiled.streams]
        for step in range(self.steps):
            for number, task in enumerate(self.compiled.tasks):
                queues[task.stream].append(step * count + number)
        return queues

    def run(self) -> float:
        """Run everything; the makespan in seconds."""
        for stream in self._ready:
            for number in self._queues[stream]:
                if self._waits[number] == 0:
                    heapq.heappush(self._ready[stream], (0.0, number))
        for stream in range(len(self._queues)):
            self._advance(stream)
        self.env.run()
        assert all(head == len(queue) for head, queue in zip(self._head, self._queues, strict=True)), "deadlock"
        return max(self.end_s, default=0.0)

    # ------------------------------------------------------------------------------------------------ order

    def _task(self, number: int) -> Task:
        return self.compiled.tasks[number % len(self.compiled.tasks)]

    def _advance(self, stream: int) -> None:
        """Start the head of a stream if nothing holds it back."""
        waiting = self._ready.get(stream)
        if waiting is not None:
            if waiting and not self._busy[stream]:
                number = heapq.heappop(waiting)[1]
                self._busy[stream] = True
                self._start(number, self._task(number), number // len(self.compiled.tasks))
            return
        queue, head = self._queues[stream], self._head[stream]
        if head < len(queue) and self._waits[queue[head]] == 0:
            number = queue[head]
            step = number // len(self.compiled.tasks)
            task = self._task(number)
            if step > 0 and task.waits == 0:
                before = (step - 1) * self.compiled.owners + task.owner
                if self._left_in_step[before] > 0:
                    self._parked.setdefault(before, []).append(stream)
                    return
            self._waits[number] = -1
            self._start(number, task, step)

    def _start(self, number: int, task: Task, step: int) -> None:
        now = self.env.now
        if task.joint < 0:
            self.start_s[number] = now
            self._perform(number, task, [number])
            return
        joint = step * len(self.compiled.joints) + task.joint
        members = self.compiled.joints[task.joint]
        self.ready_s[number] = max(self.ready_s[number], now)
        self._arrived[joint] += 1
        if self._arrived[joint] == len(members):
            offset = step * len(self.compiled.tasks)
            numbers = [offset + member for member in members]
            for member in numbers:
                self.start_s[member] = now
            self._perform(number, task, numbers)

    def _finish(self, number: int) -> None:
        now = self.env.now
        task = self._task(number)
        self.end_s[number] = now
        step = number // len(self.compiled.tasks)
        offset = step * len(self.compiled.tasks)
        self._head[task.stream] += 1
        if task.stream in self._busy:
            self._busy[task.stream] = False
        woken = [task.stream]
        for other in task.then:
            self._waits[offset + other] -= 1
            if self._waits[offset + other] == 0:
                self.ready_s[offset + other] = now
                stream = self._task(other).stream
                if stream in self._ready:
                    heapq.heappush(self._ready[stream], (now, offset + other))
                if stream != task.stream:
                    woken.append(stream)
        place = step * self.compiled.owners + task.owner
        self._left_in_step[place] -= 1
        if self._left_in_step[place] == 0:
            woken += self._parked.pop(place, ())
        for stream in woken:
            self._advance(stream)

    # ------------------------------------------------------------------------------------------------ work

    def _perform(self, number: int, task: Task, numbers: list[int]) -> None:
        if isinstance(task.work, Flows):
            owners = [self._task(member).owner for member in numbers]
            if self.slowdown > 1.0:
                for owner in owners:
                    self._talk(owner, 1)
            self._next_phase(task.work, 0, numbers, owners)
        elif self.slowdown > 1.0 and task.op.type == "compute":
            self._running[task.owner] = _Running(self, number, task.work, self._talking[task.owner] > 0)
        elif self.slowdown > 1.0 and task.op.type == "update" and self.compiled.shared_cores:
            # A server takes cores from every worker, as traffic does.
            for owner in range(self.compiled.owners):
                self._talk(owner, 1)
            self._after(task.work, lambda _: self._served(number))
        else:
            self._after(task.work, lambda _: self._finish(number))

    def _served(self, number: int) -> None:
        for owner in range(self.compiled.owners):
            self._talk(owner, -1)
        self._finish(number)

    def _after(self, delay: float, then: Callable[[Any], None]) -> None:
        self.events += 1
        self.env.timeout(delay).callbacks.append(then)

    def _next_phase(self, flows: Flows, index: int, numbers: list[int], owners: list[int]) -> None:
        if index == len(flows.phases):
            if self.slowdown > 1.0:
                for owner in owners:
                    self._talk(owner, -1)
            for member in numbers:
                self._finish(member)
            return
        wait, size, weights = flows.phases[index]

        def send(_: Any) -> None:
            self.events += 1
            self.network.start(size, weights, lambda: self._next_phase(flows, index + 1, numbers, owners))

        self._after(wait, send)

    def _talk(self, owner: int, change: int) -> None:
        before = self._talking[owner] > 0
        self._talking[owner] += change
        after = self._talking[owner] > 0
        running = self._running.get(owner)
        if before != after and running is not None:
            running.set_slow(after)

    def ended(self, owner: int, number: int) -> None:
        """A slowed-down compute task is over."""
        del self._running[owner]
        self._finish(number)


class _Running:
    """A compute task whose speed depends on whether its owner communicates at the time."""

    __slots__ = ("engine", "left", "number", "since", "slow", "version")

    def __init__(self, engine: Engine, number: int, work: float, slow: bool) -> None:
        self.engine = engine
        self.number = number
        self.left = work
        self.since = engine.env.now
        self.slow = slow
        self.version = 0
        self._schedule()

    def set_slow(self, slow: bool) -> None:
        """Change the speed from now on."""
        now = self.engine.env.now
        speed = 1.0 / self.engine.slowdown if self.slow else 1.0
        self.left = max(0.0, self.left - (now - self.since) * speed)
        self.since, self.slow = now, slow
        self.version += 1
        self._schedule()

    def _schedule(self) -> None:
        version = self.version
        owner = self.engine._task(self.number).owner

        def over(_: Any) -> None:
            if self.version == version:
                self.engine.ended(owner, self.number)

        self.engine._after(self.left * (self.engine.slowdown if self.slow else 1.0), over)
