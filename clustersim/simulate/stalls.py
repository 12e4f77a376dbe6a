"""When ranks had nothing to do but to wait for their input."""

from __future__ import annotations

from clustersim.program.program import Read
from clustersim.simulate.engine import Engine
from clustersim.simulate.tasks import Compiled

Interval = tuple[float, float]


def input_stalls(compiled: Compiled, engine: Engine) -> dict[int, list[Interval]]:
    """By owner: from when all else that a step's first pass waits for had happened to its beginning; where a step reads
    for the next one, from the end of all else to the end of that read. O(tasks * steps)."""
    tasks, count = compiled.tasks, len(compiled.tasks)
    reads = {task.owner: number for number, task in enumerate(tasks) if isinstance(task.op, Read)}
    if not reads:
        return {}
    held = {number for number, task in enumerate(tasks) if task.reads}
    others: dict[int, list[int]] = {number: [] for number in held}
    for number, task in enumerate(tasks):
        for successor in task.then:
            if successor in held and not isinstance(task.op, Read):
                others[successor].append(number)
    found: dict[int, list[Interval]] = {owner: [] for owner in reads}
    over = [[0.0] * compiled.owners for _ in range(engine.steps + 1)]
    for number, end in enumerate(engine.end_s):
        step, index = divmod(number, count)
        owner = tasks[index].owner
        if not isinstance(tasks[index].op, Read):
            over[step + 1][owner] = max(over[step + 1][owner], end)
    for number in held:
        owner = tasks[number].owner
        for step in range(engine.steps):
            at = step * count
            ready = max([over[step][owner], *(engine.end_s[at + other] for other in others[number])])
            found[owner].append((ready, engine.start_s[at + number]))
    if not held:
        for owner, number in reads.items():
            found[owner].append((over[1][owner], engine.end_s[number]))
    return {owner: [(start, end) for start, end in stalls if end > start] for owner, stalls in found.items()}
