"""How busy every class of links was: by flows, and by the collectives inside compute ops."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.program.program import Compute
from clustersim.simulate.collectives.phases import wire_efficiency
from clustersim.simulate.engine import Engine
from clustersim.simulate.flows import Flows
from clustersim.simulate.prices.compute import INNER_ALGORITHM
from clustersim.simulate.prices.prices import Prices
from clustersim.simulate.tasks import Compiled

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUse:
    """How busy one class of links was: `count` links of `kind`, each of which carried `bytes_per_link` in flows and
    `inside_bytes_per_link` for collectives inside compute ops, in all steps, and was busy for the fraction
    `utilisation` of the makespan (losses on the wire and measured times counted)."""

    kind: str
    count: int
    bytes_per_link: float
    capacity_bytes_per_s: float
    utilisation: float
    inside_bytes_per_link: float = 0.0


def link_uses(compiled: Compiled, engine: Engine, prices: Prices, makespan: float) -> tuple[LinkUse, ...]:
    """The links that carried anything, the busiest first. O(tasks + links)."""
    wiring = prices.placement.wiring
    carried, occupied = _by_flows(compiled, engine)
    inside, inside_busy = _inside(compiled, engine, prices)
    others = (inside > 0.0) & np.isfinite(wiring.capacity)
    for members in compiled.links.members:
        others[members] = False
    # What flows load alike, collectives inside ops may not; links beside that only these use are told apart by kind.
    groups = [(index, members) for index, members in enumerate(compiled.links.members)]
    rest = np.flatnonzero(others)
    groups += [(-1, rest[wiring.kinds[rest] == kind]) for kind in np.unique(wiring.kinds[rest])]
    result = []
    for index, members in groups:
        loads, capacities = inside[members], wiring.capacity[members]
        digits = np.round(loads * 1e12 / max(1.0, float(loads.max())))
        if index < 0:
            digits = digits + 1e13 * np.unique(capacities, return_inverse=True)[1]
        _, first, count = np.unique(digits, return_index=True, return_counts=True)
        for at, many in zip(members[first].tolist(), count.tolist(), strict=True):
            capacity = float(wiring.capacity[at])
            busy = (occupied[index] if index >= 0 else 0.0) + float(inside_busy[at])
            result.append(
                LinkUse(
                    kind=wiring.kind_of(at).name.lower().replace("_", " "),
                    count=many,
                    bytes_per_link=carried[index] if index >= 0 else 0.0,
                    capacity_bytes_per_s=capacity,
                    # Ops were priced as if nothing else used their links: with flows they may claim too much.
                    utilisation=min(1.0, busy / (capacity * makespan)) if makespan > 0.0 else 0.0,
                    inside_bytes_per_link=float(inside[at]),
                )
            )
    return tuple(sorted(result, key=lambda use: (-use.utilisation, use.kind, -use.bytes_per_link)))


def _by_flows(compiled: Compiled, engine: Engine) -> tuple[list[float], list[float]]:
    """Bytes that one link of each class carried, and the same with what is lost on the wire."""
    size = len(compiled.links.capacity)
    carried, occupied = [0.0] * size, [0.0] * size
    times: dict[int, tuple[Flows, int]] = {}
    for number, task in enumerate(compiled.tasks):
        if isinstance(task.work, Flows) and (task.joint < 0 or compiled.joints[task.joint][0] == number):
            _, before = times.get(id(task.work), (None, 0))
            times[id(task.work)] = (task.work, before + engine.steps)
    for flows, count in times.values():
        for link, sent, busy in flows.carried:
            carried[link] += count * sent
            occupied[link] += count * busy
    return carried, occupied


def _inside(compiled: Compiled, engine: Engine, prices: Prices) -> tuple[Floats, Floats]:
    """Bytes that every link carried for collectives inside compute ops, and the same with losses."""
    links, near, far = [np.empty(0, np.int64)], [np.empty(0)], [np.empty(0)]
    workers = prices.placement.folding.classes
    works = Counter((task.owner, task.op.work) for task in compiled.tasks if isinstance(task.op, Compute))
    for (of, index), times in works.items():
        for item in prices.placement.program.works[index].inner if of < workers else ():
            classes, groups = prices.groups.of_class(item.group, of)
            # The groups of several classes are counted with the first of these.
            if of != classes[0] or groups.shape[1] == 1:
                continue
            algorithm = INNER_ALGORITHM.get(item.kind, "ring")
            scale = prices.placement.framework.collective_scale(item.group)
            found = prices.collectives.phases(item.group, of, item.kind, algorithm)
            measured = prices.collectives.measured_s(item.group, of, item.kind, item.bytes)
            moved = float(engine.steps * times * item.count * item.bytes)
            for phase in found:
                if measured is not None:
                    lost = prices.collectives.stretch(phase, item.bytes, measured / len(found) * scale)
                    losses = (lost, lost)
                else:
                    inside, beyond = wire_efficiency(prices.placement.machines[of], item.bytes * phase.message)
                    losses = (scale / inside, scale / beyond)
                links.append(phase.traffic.links)
                near.append(phase.traffic.loads * moved)
                far.append(near[-1] * np.where(phase.traffic.near, *losses))
    every, count = np.concatenate(links), prices.placement.wiring.links
    return (
        np.bincount(every, weights=np.concatenate(near), minlength=count).astype(np.float64),
        np.bincount(every, weights=np.concatenate(far), minlength=count).astype(np.float64),
    )


def link_series(compiled: Compiled, engine: Engine, prices: Prices) -> dict[str, list[tuple[float, float]]]:
    """For the busiest class of links of each kind, the share of its capacity in use: (seconds, per cent) where it
    changes. A flow counts with its mean rate; collectives inside compute ops do not. O(tasks * steps)."""
    count, wiring = len(compiled.tasks), prices.placement.wiring
    _, occupied = _by_flows(compiled, engine)
    busiest: dict[str, int] = {}
    for index, members in enumerate(compiled.links.members):
        kind = wiring.kind_of(int(members[0])).name.lower().replace("_", " ")
        capacity = compiled.links.capacity
        if kind not in busiest or occupied[index] / capacity[index] > occupied[busiest[kind]] / capacity[busiest[kind]]:
            busiest[kind] = index
    kind_of = {index: kind for kind, index in busiest.items()}
    changes: dict[str, dict[float, float]] = {kind: {} for kind in busiest}
    for number, (start, end) in enumerate(zip(engine.start_s, engine.end_s, strict=True)):
        task = compiled.tasks[number % count]
        if not isinstance(task.work, Flows) or end <= start:
            continue
        if task.joint >= 0 and compiled.joints[task.joint][0] != number % count:
            continue
        for link, _, busy in task.work.carried:
            if link in kind_of:
                share = 100.0 * busy / (end - start) / compiled.links.capacity[link]
                steps = changes[kind_of[link]]
                steps[start] = steps.get(start, 0.0) + share
                steps[end] = steps.get(end, 0.0) - share
    found = {}
    for kind, steps in sorted(changes.items()):
        level, series = 0.0, []
        for at in sorted(steps):
            level += steps[at]
            series.append((at, round(max(0.0, level), 3)))
        if series:
            found[f"{kind}, busy %"] = series
    return found
