"""simulate(): a program on a cluster, as a timeline."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from clustersim.cluster.cluster import Cluster
from clustersim.hardware.framework import Framework
from clustersim.program.program import Compute, Gate, Program, Read
from clustersim.simulate.engine import Engine
from clustersim.simulate.link_use import LinkUse, link_series, link_uses
from clustersim.simulate.noise import factors
from clustersim.simulate.prices.prices import Prices
from clustersim.simulate.queueing import QueueUse, queue_uses
from clustersim.simulate.stalls import input_stalls
from clustersim.simulate.tasks import Compiled, Compiler
from clustersim.timeline import RankClass, Span, Timeline, union_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassTime:
    """Where the time of one worker class went: computing (kernels and what drives them), communicating with nothing
    computed beside it (collectives inside a pass included), waiting for others, and for nothing but its input."""

    compute_s: float
    exposed_s: float
    waiting_s: float
    input_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a simulation found: the makespan, spans on demand, the links' use, and how much work it was."""

    makespan_s: float
    steps: int
    classes: int
    events: int
    links: tuple[LinkUse, ...]
    queues: tuple[QueueUse, ...]
    classes_s: tuple[ClassTime, ...]
    engine: Engine
    prices: Prices

    @property
    def step_s(self) -> float:
        """Seconds of one step, averaged over the steps."""
        return self.makespan_s / self.steps

    @property
    def input_stall_s(self) -> float:
        """Seconds, in all steps, in which the class that its input holds up most waits for it and for nothing else."""
        return max((time.input_s for time in self.classes_s), default=0.0)

    @property
    def step_times_s(self) -> tuple[float, ...]:
        """Seconds from the end of each step to that of the next, the first from the start; they add up to the makespan.
        O(tasks)."""
        ends, count = self.engine.end_s, len(self.engine.compiled.tasks)
        over = itertools.accumulate(
            (max(ends[step * count : (step + 1) * count], default=0.0) for step in range(self.steps)), max
        )
        return tuple(after - before for before, after in itertools.pairwise((0.0, *over)))

    def link_series(self) -> dict[str, list[tuple[float, float]]]:
        """The use of the busiest links of each kind over time: (seconds, per cent) where it changes."""
        return link_series(self.engine.compiled, self.engine, self.prices)

    def timeline(self) -> Timeline:
        """The spans of every class. O(tasks)."""
        return _timeline(self.engine.compiled, self.engine, self.prices)


def simulate(
    program: Program,
    cluster: Cluster,
    framework: Framework,
    *,
    steps: int = 1,
    fold: bool = True,
    seed: int | None = None,
) -> Simulated:
    """Run `program` on `cluster`, `steps` times. `fold=False` simulates every rank: the reference for the classes.
    A single step is one of many: what is read ahead has been read, and it reads ahead itself. Several steps begin with
    nothing read, so that the first of them show the warm-up.
    `seed` takes the place of that of the cluster's noise.

    Deterministic: the same input gives the same floats. Work grows with classes and ops, not with ranks.
    """
    prices = Prices(program, cluster, framework, every_rank=not fold)
    compiled = Compiler(prices, midway=steps == 1).compiled()
    drawn = None
    if cluster.noise is not None:
        noise = cluster.noise if seed is None else replace(cluster.noise, seed=seed)
        drawn = factors(compiled, prices, noise, steps, every_rank=not fold)
    engine = Engine(compiled, steps, framework.overlap.compute_slowdown, drawn)
    makespan = engine.run()
    return Simulated(
        makespan_s=makespan,
        steps=steps,
        classes=compiled.owners,
        events=engine.events,
        links=link_uses(compiled, engine, prices, makespan),
        queues=queue_uses(compiled, engine, prices, makespan),
        classes_s=_class_times(compiled, engine, prices, makespan),
        engine=engine,
        prices=prices,
    )


def _class_times(compiled: Compiled, engine: Engine, prices: Prices, makespan: float) -> tuple[ClassTime, ...]:
    workers = prices.placement.folding.classes
    compute: list[list[tuple[float, float]]] = [[] for _ in range(workers)]
    talk: list[list[tuple[float, float]]] = [[] for _ in range(workers)]
    inner = [0.0] * workers
    count = len(compiled.tasks)
    for number, task in enumerate(compiled.tasks):
        if task.owner >= workers or isinstance(task.op, Read):
            continue
        where = compute if isinstance(task.op, (Compute, Gate)) else talk
        for step in range(engine.steps):
            at = step * count + number
            where[task.owner].append((engine.start_s[at], engine.end_s[at]))
        if isinstance(task.op, Compute):
            inner[task.owner] += engine.steps * prices.compute.inner_s(task.op.work, task.owner)
    stalls = input_stalls(compiled, engine)
    result = []
    for owner, (busy, talking, inside) in enumerate(zip(compute, talk, inner, strict=True)):
        alone = union_s(busy)
        either = union_s(busy + talking)
        starved = union_s(busy + talking + stalls[owner]) - either if owner in stalls else 0.0
        result.append(
            ClassTime(
                compute_s=alone - inside, exposed_s=either - alone + inside, waiting_s=makespan - either - starved,
                input_s=starved,
            )
        )  # fmt: skip
    return tuple(result)


def _timeline(compiled: Compiled, engine: Engine, prices: Prices) -> Timeline:
    workers = prices.placement.folding.classes
    classes = []
    for c, members in enumerate(prices.placement.folding.members):
        label = f"stage {prices.placement.folding.stage[c]}, rank {int(members[0])}"
        classes.append(RankClass(rank=c, label=label, members=tuple(int(rank) for rank in members)))
    first_server = prices.placement.program.mesh.workers
    for s, server in enumerate(prices.servers.classes):
        members_of = tuple(first_server + share.server for share in server.shares)
        where = "on hosts of their own" if server.shares[0].host == "server" else "beside workers"
        classes.append(RankClass(rank=workers + s, label=f"servers {where}", members=members_of))
    spans = tuple(_spans(compiled, engine, prices))
    return Timeline(source="simulated", steps=engine.steps, classes=tuple(classes), spans=spans)


def _spans(compiled: Compiled, engine: Engine, prices: Prices) -> Iterator[Span]:
    """The spans of every step, in the order of the tasks; the parts of a bucket make one span."""
    count = len(compiled.tasks)
    parts: dict[int, list[int]] = {}
    for number, task in enumerate(compiled.tasks):
        parts.setdefault(task.span, []).append(number)
    position = {number: at for at, numbers in enumerate(parts.values()) for number in numbers}
    before = _before(compiled, engine)
    ends = [
        max(engine.end_s[step * count + number] for number in numbers)
        for step in range(engine.steps)
        for numbers in parts.values()
    ]
    for step in range(engine.steps):
        for numbers in parts.values():
            task = compiled.tasks[numbers[0]]
            mine = [step * count + number for number in numbers]
            start = min(engine.start_s[number] for number in mine)
            earlier = {other for number in mine for other in before[number]}
            after = {other // count * len(parts) + position[other % count] for other in earlier}
            after.discard(step * len(parts) + position[numbers[0]])
            # Parts of a bucket overlap with those of what they follow: a span comes after only what ended before it.
            over = {index for index in after if ends[index] <= start + 1e-12 * max(1.0, start)}
            op, end = task.op, ends[step * len(parts) + position[numbers[0]]]
            busy = sum(engine.end_s[number] - engine.start_s[number] for number in mine)
            yield Span(
                op=op.id._replace(step=step),
                rank=task.owner,
                start_s=start,
                end_s=end,
                ready_s=min(start, engine.ready_s[mine[0]]),
                resource=compiled.streams[task.stream][1],
                after=tuple(sorted(over)),
                follows=tuple(sorted(after - over)),
                inside_s=prices.compute.inner_s(op.work, task.owner) if isinstance(op, Compute) else 0.0,
                idle_s=max(0.0, end - start - busy) if len(mine) > 1 else 0.0,
            )


def _before(compiled: Compiled, engine: Engine) -> list[list[int]]:
    """What each task of each step waited for: tasks by dependency, the one before it on its stream, for the first tasks
    of a step the end of the owner's last step; and for those that happen together what any of them waited for."""
    tasks, count = compiled.tasks, len(compiled.tasks)
    before: list[list[int]] = [[] for _ in engine.start_s]
    on_stream: list[list[int]] = [[] for _ in compiled.streams]
    last_of: dict[tuple[int, int], int] = {}
    for number in range(len(before)):
        step, task = number // count, tasks[number % count]
        on_stream[task.stream].append(number)
        for other in task.then:
            before[step * count + other].append(number)
        last = last_of.setdefault((task.owner, step), number)
        if engine.end_s[number] > engine.end_s[last]:
            last_of[task.owner, step] = number
    for stream, numbers in enumerate(on_stream):
        if compiled.streams[stream][1] == "host":
            numbers.sort(key=lambda number: engine.end_s[number])
        for one, two in itertools.pairwise(numbers):
            before[two].append(one)
    for number in range(count, len(before)):
        step, task = number // count, tasks[number % count]
        if task.waits == task.reads and step > task.ahead:
            before[number].append(last_of[task.owner, step - 1 - task.ahead])
    for members in compiled.joints:
        for step in range(engine.steps):
            together = {other for member in members for other in before[step * count + member]}
            for member in members:
                before[step * count + member] = sorted(together)
    return before


def critical_resource(simulated: Simulated) -> tuple[str, float]:
    """What limits the step: the compute of the busiest class, or the busiest link, and its utilisation."""
    busiest = max((time.compute_s for time in simulated.classes_s), default=0.0)
    compute = busiest / simulated.makespan_s if simulated.makespan_s else 0.0
    link = simulated.links[0] if simulated.links else None
    if link is not None and link.utilisation > compute:
        return link.kind, link.utilisation
    return "compute", compute
