"""Noise on the tasks of a simulation: what each one's seconds are multiplied by.

A class of ranks that behave alike stands for its slowest rank: of n independent draws the largest has the distribution
F(x)^n, and F^-1(U^(1/n)) draws it at once. Ranks of a group that meets inside an op (tensor, context, expert
parallelism) go at the pace of the slowest in every op; replicas meet only at the next collective among them, so that
what counts is the slowest *sum* over the stretch of ops since the last one.

Where every op draws anew, a class draws normal scores for the ops of one replica and sets their mean, weighted by the
ops' prices, to the largest of r such means: for one op exactly F^-1(U^(1/n)). Where all ops of a step share a draw,
there are few: every replica draws, and the class takes the draws of the one whose pipeline takes longest.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from clustersim.cluster.noise import Distribution, Noise
from clustersim.program.program import Collective, Compute, Exchange, Group, Op, Update
from clustersim.simulate.draws import Draws, Floats, Unit
from clustersim.simulate.prices.prices import Prices
from clustersim.simulate.tasks import Compiled

# Groups whose members work at their own pace until a collective joins them.
_LOOSE: tuple[Group, ...] = ("dp", "node-dp", "expert-dp")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """An op of a worker that draws: its task, its name, its price, the groups that keep step in it."""

    task: int
    op: Compute
    name: int
    price_s: float
    kinds: tuple[Group, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Class:
    """The ops of a worker class that draw, in order. `begins`: the first op of each stretch; `wraps`: the last stretch
    goes on in the first one of the next step."""

    owner: int
    ops: tuple[_Drawn, ...]
    unit: Unit
    begins: tuple[int, ...]
    wraps: bool

    @property
    def tail(self) -> int:
        """Where the stretch that ends in the next step begins; behind the last op where there is none."""
        return self.begins[-1] if self.wraps else len(self.ops)


def factors(compiled: Compiled, prices: Prices, noise: Noise, steps: int, *, every_rank: bool) -> list[float]:
    """What the seconds of each task of each step are multiplied by, in the engine's order. Collectives inside an op
    keep their price. O(tasks * steps), in arrays, and O(replicas * steps) where a step shares a draw; where
    `every_rank` draws, O(ranks * ops * steps)."""
    found = np.ones((steps, len(compiled.tasks)))
    workers = prices.placement.folding.classes
    numbers_of = _by_owner(compiled)
    if noise.worker is not None:
        ops_of = {
            owner: tuple(_drawn(compiled, prices, number) for number in numbers)
            for owner, numbers in numbers_of.items()
            if owner < workers
        }
        for owner, values in _of_workers(prices, noise, noise.worker, steps, ops_of, every_rank).items():
            for column, drawn in enumerate(ops_of[owner]):
                inside = prices.compute.inner_s(drawn.op.work, owner) / drawn.price_s if drawn.price_s > 0.0 else 1.0
                found[:, drawn.task] += (1.0 - inside) * (values[:, column] - 1.0)
    if noise.server is not None:
        draws = Draws(noise, noise.server, steps)
        for owner, numbers in numbers_of.items():
            if owner < workers:
                continue
            those = [2 * share.server + 1 for share in prices.servers.classes[owner - workers].shares]
            unit = Unit(identity=those[0], ranks=those, size=len(those), replicas=1)
            # Workers wait for the part of every server. The parts of a bucket share its draw.
            for number in numbers:
                name = [_name(compiled.tasks[number].op)]
                values = draws.every_member(unit, name) if every_rank else draws.slowest_member(unit, name)
                found[:, number] = values[:, 0]
    return [float(value) for value in found.ravel()]


def _by_owner(compiled: Compiled) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for number, task in enumerate(compiled.tasks):
        if isinstance(task.op, (Compute, Update)):
            found.setdefault(task.owner, []).append(number)
    return found


def _name(op: Op) -> int:
    """A number for an op's identity that is the same in every process."""
    words = "/".join(map(str, (op.type, *op.id[1:])))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big")


def _drawn(compiled: Compiled, prices: Prices, number: int) -> _Drawn:
    task = compiled.tasks[number]
    assert isinstance(task.op, Compute)
    assert isinstance(task.work, float)
    meeting: set[Group] = {item.group for item in prices.placement.program.works[task.op.work].inner}
    return _Drawn(
        task=number, op=task.op, name=_name(task.op), price_s=task.work, kinds=("tp", *sorted(meeting - {"tp"}))
    )


def _of_workers(
    prices: Prices,
    noise: Noise,
    shape: Distribution,
    steps: int,
    ops_of: dict[int, tuple[_Drawn, ...]],
    every_rank: bool,
) -> dict[int, Floats]:
    """(steps, ops) draws of every worker class."""
    draws = Draws(noise, shape, steps)
    if every_rank:
        return {owner: _of_every_rank(draws, prices, owner, ops) for owner, ops in ops_of.items()}
    classes = [_class(prices, owner, ops) for owner, ops in ops_of.items()]
    if noise.every == "op":
        return {one.owner: _of_class(draws, one) for one in classes}
    found: dict[int, Floats] = {}
    for column in _columns(prices, classes):
        found.update(_of_column(draws, column))
    return found


# ----------------------------------------------------------------------------------------------------------- classes


def _unit(prices: Prices, owner: int, kinds: Iterable[Group]) -> Unit:
    """The ranks that keep step with the first rank of a class."""
    ranks = prices.placement.folding.members[owner][:1]
    while True:
        known = len(ranks)
        for kind in kinds:
            ranks = np.unique(prices.groups.members(kind, ranks))
        if len(ranks) == known:
            break
    classes = prices.placement.folding.class_of[ranks]
    members = prices.placement.folding.members
    return Unit(
        identity=min(2 * int(members[c][0]) for c in classes),
        ranks=(2 * ranks).tolist(),
        size=known,
        replicas=len(members[owner]) // int((classes == owner).sum()),
    )


def _class(prices: Prices, owner: int, ops: tuple[_Drawn, ...]) -> _Class:
    """A class with its stretches.

    A collective that waits for the op before the one that waits for it joins replicas there. One that was issued an op
    or more ahead (the gather of the next bucket) leaves replicas a lead that noise seldom uses up: it joins none.
    """
    stage = prices.placement.folding.stage[owner]
    every = prices.placement.program.positions[stage].ops
    index_of = {id(op): index for index, op in enumerate(every)}
    place = {index_of[id(drawn.op)]: at for at, drawn in enumerate(ops)}
    joins: dict[int, int] = {}
    latest = -1
    for index, op in enumerate(every):
        latest = place.get(index, latest)
        if isinstance(op, Exchange):
            # It waits for servers, and they for the gradients of all.
            joins[index] = latest
        elif isinstance(op, Collective) and op.group in _LOOSE:
            mine = [place[which] for where, which in op.after if where == stage and which in place]
            joins[index] = max(mine, default=-1)
    begins, at_start = [0], False
    for index, at in place.items():
        needed = [joins[which] for where, which in every[index].after if where == stage and which in joins]
        if needed and max(needed) >= max(begins[-1], at - 1):
            begins.append(at)
        at_start = at_start or (len(begins) == 1 and -1 in needed)
    at_end = max(joins.values(), default=-1) >= begins[-1]
    return _Class(
        owner=owner,
        ops=ops,
        unit=_unit(prices, owner, sorted({kind for drawn in ops for kind in drawn.kinds})),
        begins=tuple(begins),
        wraps=len(begins) > 1 and not at_start and not at_end,
    )


def _columns(prices: Prices, classes: Sequence[_Class]) -> list[list[_Class]]:
    """The classes that the stages of the same replicas belong to; every stage has as many replicas."""
    grid, class_of = prices.placement.folding.grid, prices.placement.folding.class_of
    found: dict[tuple[object, ...], list[_Class]] = {}
    for one in classes:
        _, dp, tp = prices.placement.coordinates(prices.placement.folding.members[one.owner][:1])
        column = class_of[grid[:, dp[0], tp[0]]].tolist()
        found.setdefault((one.unit.replicas, *column), []).append(one)
    return list(found.values())


# ------------------------------------------------------------------------------------------------------------- draws


def _of_every_rank(draws: Draws, prices: Prices, owner: int, ops: tuple[_Drawn, ...]) -> Floats:
    """(steps, ops) draws of one group that keeps step, from one of each of its ranks."""
    found = np.empty((draws.steps, len(ops)))
    for kinds in sorted({drawn.kinds for drawn in ops}):
        columns = [column for column, drawn in enumerate(ops) if drawn.kinds == kinds]
        names = [ops[column].name for column in columns]
        found[:, columns] = draws.every_member(_unit(prices, owner, kinds), names)
    return found


def _of_class(draws: Draws, one: _Class) -> Floats:
    """(steps, ops) draws of the slowest replica of a class, stretch by stretch."""
    names, seconds = [drawn.name for drawn in one.ops], [drawn.price_s for drawn in one.ops]
    if one.unit.replicas == 1:
        return draws.slowest_member(one.unit, names)
    found = np.empty((draws.steps, len(one.ops)))
    for begin, end in itertools.pairwise([*one.begins, len(one.ops)]):
        if begin == 0 and one.wraps:
            # The last stretch of the step before, then the first of this one.
            mine = [*range(one.tail, len(one.ops)), *range(end)]
            before = len(one.ops) - one.tail
            values = draws.slowest_replica(one.unit, [names[i] for i in mine], [seconds[i] for i in mine], before)
            found[:, :end] = values[:-1, before:]
            found[:, one.tail :] = values[1:, :before]
        elif begin < one.tail:
            found[:, begin:end] = draws.slowest_replica(one.unit, names[begin:end], seconds[begin:end], 0)
    return found


def _of_column(draws: Draws, stages: list[_Class]) -> dict[int, Floats]:
    """(steps, ops) draws of the slowest of the replicas that the classes of `stages` share, for ops of which all in a
    step share a draw. The slowest is that with the longest pipeline (P12), beginning with its end of the step before.
    """
    drawn = np.stack([draws.every_replica(stage.unit) for stage in stages])
    first = np.array([sum(op.price_s for op in stage.ops[: stage.tail]) for stage in stages])
    last = np.array([sum(op.price_s for op in stage.ops[stage.tail :]) for stage in stages])
    passes = max(1, *(len({op.op.id.micro_batch for op in stage.ops if op.op.id.micro_batch >= 0}) for stage in stages))
    work = drawn * first[:, None, None]
    time = work.sum(axis=0) / passes + work.max(axis=0) * (1.0 - 1.0 / passes)
    time[1:] += (drawn * last[:, None, None]).max(axis=0)[:-1]
    slowest = np.argmax(time, axis=1)
    steps = np.arange(1, draws.steps + 1)
    found = {}
    for values, stage in zip(drawn, stages, strict=True):
        result = np.empty((draws.steps, len(stage.ops)))
        result[:, : stage.tail] = values[steps, slowest[steps]][:, None]
        result[:, stage.tail :] = values[steps, slowest[steps + 1]][:, None]
        found[stage.owner] = result
    return found
