"""The engine: tasks on streams, flows on the network, on SimPy's clock."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import simpy

from clustersim.simulate.alarm import Alarm
from clustersim.simulate.flows import Flows
from clustersim.simulate.network import Network
from clustersim.simulate.tasks import Compiled, Task


class Engine:
    """Runs compiled tasks `steps` times. Streams run their tasks in order, one at a time; a task starts when the one
    before it has ended and all that it waits for has happened. A server's host stream serves whatever is ready first. A
    step begins for an owner when its last step is over.

    `slowdown`: how much longer compute takes on an owner while it communicates. Where everything runs on the cores of
    one host (`compiled.cores`), whatever is busy gets an equal share of them, thread by thread. `factors[k]` multiplies
    the seconds of task k (noise). After `run`, `start_s[k]`, `end_s[k]` and `ready_s[k]` hold the times of task k (of
    step k div len(tasks)).
    """

    def __init__(self, compiled: Compiled, steps: int, slowdown: float, factors: Sequence[float] | None = None) -> None:
        self.env = simpy.Environment()
        self.compiled = compiled
        self.steps = steps
        self.slowdown = slowdown
        self.factors = factors
        self.network = Network(self.env, compiled.links.capacity)
        count = len(compiled.tasks)
        self.start_s = [0.0] * (count * steps)
        self.end_s = [0.0] * (count * steps)
        self.ready_s = [0.0] * (count * steps)
        self.events = 0
        self._tasks = compiled.tasks * steps
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
        # Threads that want a core of the shared host: of compute and updates, and of traffic.
        self._computing = 0
        self._moving = 0
        self._share = 1.0

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
        return self._tasks[number]

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
        if head == len(queue):
            return
        number = queue[head]
        if self._waits[number] == 0:
            step = number // len(self.compiled.tasks)
            task = self._task(number)
            if step > task.ahead and task.waits == task.reads:
                before = (step - 1 - task.ahead) * self.compiled.owners + task.owner
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
        tasks, waits = self.compiled.tasks, self._waits
        count = len(tasks)
        index = number % count
        offset = number - index
        task = tasks[index]
        self.end_s[number] = now
        own = task.stream
        self._head[own] += 1
        if own in self._busy:
            self._busy[own] = False
        woken = [own]
        ready, queues, heads = self._ready, self._queues, self._head
        for successor in task.then:
            other = offset + successor
            left = waits[other] - 1
            waits[other] = left
            if left == 0:
                self.ready_s[other] = now
                stream = tasks[successor].stream
                if stream in ready:
                    heapq.heappush(ready[stream], (now, other))
                    if stream != own:
                        woken.append(stream)
                elif stream != own and queues[stream][heads[stream]] == other:
                    woken.append(stream)
        place = number // count * self.compiled.owners + task.owner
        self._left_in_step[place] -= 1
        if self._left_in_step[place] == 0 and place in self._parked:
            woken += self._parked.pop(place)
        for stream in woken:
            self._advance(stream)

    # ------------------------------------------------------------------------------------------------ work

    def _perform(self, number: int, task: Task, numbers: list[int]) -> None:
        work = task.work
        if isinstance(work, Flows):
            if work.single is not None:
                self._send_once(work, *work.single, numbers)
            else:
                sending = _Sending(self, work, numbers)
                sending.next(range(sending.left), 0)
        elif self._share_of_cores(task) or (self.slowdown > 1.0 and task.op.type == "compute"):
            self._computing += task.threads
            self._running[task.owner] = _Running(self, number, task)
            self._divide_cores()
        else:
            self.events += 1
            Alarm(self.env, self.seconds(number, work), lambda _: self._finish(number))

    def seconds(self, number: int, work: float) -> float:
        """What task `number` takes where its work is priced at `work` seconds."""
        return work if self.factors is None else work * self.factors[number]

    def _share_of_cores(self, task: Task) -> bool:
        return self.compiled.cores > 0 and task.threads > 0

    def _divide_cores(self) -> None:
        """Give every thread that wants a core of the shared host an equal share of them. Traffic, which one thread a
        process moves, was measured with the whole host to itself and never wants more."""
        cores = self.compiled.cores
        if cores:
            wanted = self._computing + min(cores, self._moving)
            share = min(1.0, cores / wanted) if wanted else 1.0
            if share != self._share:
                self._share = share
                self.network.set_speed(share)
                for running in self._running.values():
                    running.set_speed()

    def speed(self, task: Task) -> float:
        """Of a computing task, now."""
        talks = self.slowdown > 1.0 and task.op.type == "compute" and self._talking[task.owner] > 0
        return self._share / self.slowdown if talks else self._share

    def move(self, threads: int) -> None:
        """So many more threads move bytes from now on."""
        self._moving += threads
        self._divide_cores()

    def _send_once(self, flows: Flows, wait: float, size: float, numbers: list[int]) -> None:
        """A communication task of one phase: what `_Sending` does, without what only several phases need."""
        left = 1 + len(flows.beside)
        threads = self.begin_sending(numbers)

        def ended(which: Sequence[int]) -> None:
            nonlocal left
            left -= len(which)
            if left == 0:
                if threads:
                    self.move(-threads)
                self.end_sending(numbers)

        def send(_: Any) -> None:
            self.events += 1
            if threads:
                self.move(threads)
            self.network.start_bundle(size, flows.bundle(0, range(left), self.network.capacity), ended)

        self.events += 1
        Alarm(self.env, wait, send)

    def begin_sending(self, numbers: list[int]) -> int:
        """A communication task of these members begins; the threads that move its bytes."""
        if self._slows_compute(numbers):
            for number in numbers:
                self._talk(self._task(number).owner, 1)
        return sum([self._task(number).threads for number in numbers]) if self.compiled.cores else 0

    def end_sending(self, numbers: list[int]) -> None:
        """A communication task is over, for all that took part."""
        if self._slows_compute(numbers):
            for number in numbers:
                self._talk(self._task(number).owner, -1)
        for number in numbers:
            self._finish(number)

    def _slows_compute(self, numbers: list[int]) -> bool:
        """Communication among devices takes some of them away from compute; the input goes to the host."""
        return self.slowdown > 1.0 and self._task(numbers[0]).op.type != "read"

    def _talk(self, owner: int, change: int) -> None:
        before = self._talking[owner] > 0
        self._talking[owner] += change
        after = self._talking[owner] > 0
        running = self._running.get(owner)
        if before != after and running is not None:
            running.set_speed()

    def ended(self, number: int, task: Task) -> None:
        """A computing task is over."""
        del self._running[task.owner]
        self._computing -= task.threads
        self._divide_cores()
        self._finish(number)


class _Sending:
    """A communication task on its way: strands, each with phases one after the other. Strands that wait equally long
    for equally many bytes go together until the network tells them apart."""

    __slots__ = ("engine", "flowing", "flows", "left", "numbers", "strands", "threads")

    def __init__(self, engine: Engine, flows: Flows, numbers: list[int]) -> None:
        self.engine = engine
        self.numbers = numbers
        self.flows = flows
        self.strands = [strand.phases for strand in flows.strands]
        self.left = len(self.strands)
        self.flowing = 0
        self.threads = engine.begin_sending(numbers)

    def next(self, which: Sequence[int], phase: int) -> None:
        """Have strands go on with a phase, which they have come to at the same time."""
        strands = self.strands
        if len(which) == 1 and phase < len(strands[which[0]]):
            wait, size, _ = strands[which[0]][phase]
            self._wait(wait, size, which, phase)
            return
        alike: dict[tuple[float, float], list[int]] = {}
        for strand in which:
            if phase == len(strands[strand]):
                self.left -= 1
            else:
                wait, size, _ = strands[strand][phase]
                alike.setdefault((wait, size), []).append(strand)
        if self.left == 0:
            self.engine.end_sending(self.numbers)
        for (wait, size), together in alike.items():
            self._wait(wait, size, together, phase)

    def _wait(self, wait: float, size: float, which: Sequence[int], phase: int) -> None:
        engine = self.engine

        def ended(numbers: Sequence[int]) -> None:
            if self.threads:
                self._flow(-len(numbers))
            self.next([which[number] for number in numbers], phase + 1)

        def send(_: Any) -> None:
            engine.events += 1
            if self.threads:
                self._flow(len(which))
            network = engine.network
            network.start_bundle(size, self.flows.bundle(phase, which, network.capacity), ended)

        engine.events += 1
        Alarm(engine.env, wait, send)

    def _flow(self, change: int) -> None:
        """So many strands more are on their wires; threads move bytes while any is."""
        before = self.flowing > 0
        self.flowing += change
        if (self.flowing > 0) != before:
            self.engine.move(-self.threads if before else self.threads)


class _Running:
    """A computing task whose speed depends on what else happens at the time."""

    __slots__ = ("engine", "left", "number", "since", "speed", "task", "version")

    def __init__(self, engine: Engine, number: int, task: Task) -> None:
        assert not isinstance(task.work, Flows)
        self.engine = engine
        self.number = number
        self.task = task
        self.left = engine.seconds(number, task.work)
        self.since = engine.env.now
        self.speed = engine.speed(task)
        self.version = 0
        self._schedule()

    def set_speed(self) -> None:
        """Change the speed to what it is from now on."""
        speed = self.engine.speed(self.task)
        if speed == self.speed:
            return
        now = self.engine.env.now
        self.left = max(0.0, self.left - (now - self.since) * self.speed)
        self.since, self.speed = now, speed
        self.version += 1
        self._schedule()

    def _schedule(self) -> None:
        version = self.version

        def over(_: Any) -> None:
            if self.version == version:
                self.engine.ended(self.number, self.task)

        self.engine.events += 1
        Alarm(self.engine.env, self.left / self.speed, over)
