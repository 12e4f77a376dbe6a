"""The queues of a simulation: requests at servers and reads at drives, and how long they stand in line."""

from __future__ import annotations

from dataclasses import dataclass

from clustersim.cluster.storage import delay_s, response_s, service_s
from clustersim.hardware.queues import in_system, mg1_wait_s
from clustersim.program.program import Read
from clustersim.simulate.engine import Engine
from clustersim.simulate.prices.prices import Prices
from clustersim.simulate.reading import read_of
from clustersim.simulate.tasks import Compiled


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueUse:
    """One kind of queue, `count` of them alike. `requests_per_s` reach each, which serves one for `service_s` on
    average and is busy for the fraction `utilisation`.

    `waited_s`: the mean time in line. `random_wait_s`: what it would be if requests came at random times, at the same
    rate (Pollaczek-Khinchine for servers). `present`: how many are in line or served, on average (Little's law).
    """

    kind: str
    count: int
    requests_per_s: float
    service_s: float
    utilisation: float
    waited_s: float
    random_wait_s: float
    present: float


def queue_uses(compiled: Compiled, engine: Engine, prices: Prices, makespan: float) -> tuple[QueueUse, ...]:
    """All queues that served anything: hosts of servers, then drives. O(tasks * steps)."""
    found = [_host_queue(compiled, engine, prices, server, makespan) for server in range(len(prices.servers.classes))]
    read = read_of(prices.placement.program)
    if read is not None and read.stored_bytes and makespan > 0.0:
        found += _drive_queues(prices, read, engine.steps, makespan)
    return tuple(queue for queue in found if queue is not None and queue.requests_per_s > 0.0)


def _host_queue(compiled: Compiled, engine: Engine, prices: Prices, server: int, makespan: float) -> QueueUse | None:
    """The requests of a class of servers, as they were simulated."""
    owner = prices.placement.folding.classes + server
    tasks, count = compiled.tasks, len(compiled.tasks)
    mine = [number for number, task in enumerate(tasks) if task.owner == owner]
    if not mine or makespan <= 0.0:
        return None
    every = [step * count + number for step in range(engine.steps) for number in mine]
    services = [engine.end_s[number] - engine.start_s[number] for number in every]
    waits = [engine.start_s[number] - engine.ready_s[number] for number in every]
    rate, mean, wait = len(every) / makespan, sum(services) / len(every), sum(waits) / len(every)
    return QueueUse(
        kind="server hosts",
        count=len(prices.servers.classes[server].shares),
        requests_per_s=rate,
        service_s=mean,
        utilisation=rate * mean,
        waited_s=wait,
        random_wait_s=mg1_wait_s(rate, mean, sum(seconds**2 for seconds in services) / len(services)),
        present=in_system(rate, wait + mean),
    )


def _drive_queues(prices: Prices, read: Read, steps: int, makespan: float) -> list[QueueUse | None]:
    """Drives that serve reads: M/D/1 (an object store: M/M/c) at the rate of the whole run; no more wait than there are
    readers."""
    cluster, wiring = prices.placement.cluster, prices.placement.wiring
    sample = float(read.sample_bytes)
    readers = prices.placement.folding.grid[0].ravel()
    result: list[QueueUse | None] = []
    machines = cluster.storage or cluster.workers
    node = 0
    for machine in machines:
        storage = machine.node.storage
        assert storage is not None
        if cluster.storage:
            hosts, mine = machine.count, len(readers)
        else:
            inside = wiring.node_of(readers)
            hosts, mine = 1, int((inside == node).sum())
            node += machine.count
        if not mine:
            continue
        rate = steps * mine * read.stored_bytes / sample / hosts / makespan
        service = service_s(storage, sample)
        random = response_s(storage, sample, rate) - delay_s(storage) - service
        wait = min(random, mine * read.readers / (hosts * storage.drives) * service)
        result.append(
            QueueUse(
                kind=f"drives ({machine.node.name})",
                count=machine.count * storage.drives,
                requests_per_s=rate / storage.drives,
                service_s=service,
                utilisation=rate * service / storage.drives,
                waited_s=wait,
                random_wait_s=random,
                present=in_system(rate / storage.drives, wait + service),
            )
        )
    return result
