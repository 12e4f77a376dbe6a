"""make_plan(): every legal layout estimated, the best simulated, ranked, explained."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from clustersim import __version__
from clustersim.errors import NoFeasibleLayout
from clustersim.estimate.estimate import Estimate, estimate
from clustersim.files import digest
from clustersim.hardware.intervals import load_intervals
from clustersim.layout.choices import Choices
from clustersim.layout.divisions import LARGEST_MICRO_BATCH, MOST_MICRO_BATCHES
from clustersim.layout.illegal import why_illegal
from clustersim.layout.layout import Layout, ParameterServer, degrees, family
from clustersim.layout.memory import Footprint, footprint
from clustersim.layout.space import FAMILIES, Space, layouts
from clustersim.plan import Candidate, Counts, Machines, Plan
from clustersim.program.lower import lower
from clustersim.scenario.question import Question
from clustersim.scenario.what_if import with_settings
from clustersim.search.explain import against, lever_questions, levers
from clustersim.search.kind import interval_of, outside_of
from clustersim.search.predict import objective_of, predict, rates, servers_used
from clustersim.search.ties import tied, what_if_result
from clustersim.simulate.simulate import critical_resource, simulate
from clustersim.units import human_bytes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Progress = Callable[[str], None]

# Families are compared by simulation: the best by estimate need not be the best.
_OF_EVERY_FAMILY = 3
# A what-if needs the new winner, not a ranking: the best of every family is simulated, today's winner, and the rest of
# what a plan would simulate while all of them have no more ops (`_work_of`) than this: half a second or so.
_WHAT_IF_WORK = 6000.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Survey:
    """Every legal layout of a question with its memory and its estimate; `feasible` are the rows that fit."""

    question: Question
    space: Space
    footprint: Footprint
    estimate: Estimate
    feasible: Ints
    infeasible: dict[str, int]
    score: Floats

    def best_rows(self, count: int, *, of_every_family: int) -> list[int]:
        """The rows to simulate: the best scheme of each division and family, by score, `count` of them, and so many of
        every family in any case."""
        order = self.feasible[np.argsort(self.score[self.feasible], kind="stable")]
        families = self.space.family_of()
        keys = self.space.division[order] * len(FAMILIES) + families[order]
        _, first = np.unique(keys, return_index=True)
        unique = order[np.sort(first)]
        rows = [int(row) for row in unique[:count]]
        for index in range(len(FAMILIES)):
            of_family = unique[families[unique] == index]
            rows += [int(row) for row in of_family[:of_every_family] if int(row) not in rows]
        return rows


def choices_of(question: Question) -> Choices:
    """What the scenario fixed, and what it leaves to the search."""
    spec, fixed = question.scenario.search, question.scenario.layout
    families = spec.sync if fixed.sync is None else (fixed.sync,)
    return Choices(
        families=families,
        least_servers=question.servers.least,
        most_servers=question.servers.most,
        **{field.name: getattr(fixed, field.name) for field in fields(fixed)},
    )


def survey(question: Question) -> Survey:
    """All legal layouts, which of them fit, and an estimate of each. NoFeasibleLayout where none does."""
    space = layouts(question.workload, question.cluster, question.framework, choices_of(question))
    if not len(space):
        raise _nothing_legal(question)
    memory = footprint(question.workload, space, question.framework)
    estimated = estimate(question.workload, space, question.cluster, question.framework)
    fits = np.ones(len(space), np.bool_)
    infeasible: dict[str, int] = {}

    def rule(reason: str, good: NDArray[np.bool_]) -> None:
        nonlocal fits
        failed = int((fits & ~good).sum())
        if failed:
            infeasible[reason] = failed
        fits &= good

    capacity = min(m.device.memory_bytes for m in question.cluster.workers if m.device is not None)
    headroom = question.scenario.constraints.memory_headroom
    rule("worker memory", memory.worker <= capacity * (1.0 - headroom))
    hosts = [m.node.host.memory_bytes for m in (*question.cluster.workers, *question.cluster.servers)]
    rule("server memory", memory.server <= min(hosts))
    deadline, tokens = question.scenario.constraints.deadline_s, question.workload.training.tokens
    if deadline is not None and tokens is not None:
        steps = tokens / question.workload.training.tokens_per_step
        rule("deadline", estimated.step_s * steps <= deadline)
    feasible = np.flatnonzero(fits)
    if not len(feasible):
        raise NoFeasibleLayout(_nothing_fits(question, space, memory, capacity * (1.0 - headroom), infeasible))
    return Survey(
        question=question, space=space, footprint=memory, estimate=estimated, feasible=feasible,
        infeasible=infeasible, score=_score(question, space, estimated.step_s),
    )  # fmt: skip


def _score(question: Question, space: Space, step_s: Floats) -> Floats:
    """What the search minimises: seconds, or dollars, of a step."""
    if question.scenario.objective == "step_time":
        return step_s
    price = [rates(question.cluster, servers_used(scheme)).usd_per_s for scheme in space.schemes]
    if any(usd is None for usd in price):
        raise NoFeasibleLayout("objective: usd needs a price of every machine; write nodes: {NAME: {price: ...}}")
    dollars: Floats = step_s * np.array([usd or 0.0 for usd in price])[space.scheme]
    return dollars


def _nothing_legal(question: Question) -> NoFeasibleLayout:
    model, training = question.workload.model, question.workload.training
    wrong = why_illegal(question.workload, question.cluster, question.framework, choices_of(question))
    if wrong is not None:
        return NoFeasibleLayout(f"layout.{wrong[0]}: {wrong[1]}", ("layout", wrong[0]))
    most = question.cluster.devices * LARGEST_MICRO_BATCH * MOST_MICRO_BATCHES
    if training.global_batch > most:
        return NoFeasibleLayout(
            f"training.global_batch: {training.global_batch} samples are more than {MOST_MICRO_BATCHES} "
            f"micro-batches of {LARGEST_MICRO_BATCH} on each device; write less",
            ("training", "global_batch"),
        )
    return NoFeasibleLayout(
        f"no layout divides {question.cluster.devices} devices and a global batch of {training.global_batch} for "
        f"{model.name} ({model.layers} layers, {model.heads} heads) as the scenario asks; "
        "change global_batch, the node count, or what layout: and search: fix"
    )


def _nothing_fits(
    question: Question, space: Space, memory: Footprint, capacity: float, infeasible: dict[str, int]
) -> str:
    least = int(np.argmin(memory.worker))
    layout = space.layout(least)
    counts = ", ".join(f"{count} by {reason}" for reason, count in infeasible.items())
    message = f"none of {len(space)} legal layouts fits ({counts})"
    if memory.worker[least] > capacity:
        message += (
            f"; the smallest ({degrees(layout.mesh)}, micro-batch {layout.micro_batch}, recompute "
            f"{layout.recompute}) needs {human_bytes(float(memory.worker[least]))} on a worker that has "
            f"{human_bytes(capacity)}: use more nodes, larger devices, or a smaller model"
        )
    elif "deadline" in infeasible:
        message += "; use more nodes, a longer deadline, or fewer tokens"
    else:
        message += "; use more server hosts, or hosts with more memory"
    return message


# ---------------------------------------------------------------------------------------------------- simulating


def _simulate_row(found: Survey, row: int) -> Candidate:
    question = found.question
    layout = found.space.layout(row)
    program = lower(question.workload, layout, question.framework, question.cluster.devices_per_node)
    simulated = simulate(program, question.cluster, question.framework)
    name, use = critical_resource(simulated)
    # Sorted by utilisation; ports inside a node are no network, nor is what the input comes from.
    inside = ("device", "pcie", "switch", "readers", "drives")
    network = next((link for link in simulated.links if not link.kind.startswith(inside)), None)
    memory, coverage = float(found.footprint.worker[row]), float(found.estimate.coverage[row])
    return Candidate(
        layout=layout,
        family=family(layout.scheme),
        estimated_s=float(found.estimate.step_s[row]),
        prediction=predict(
            question,
            layout,
            simulated,
            memory_bytes=memory,
            server_bytes=float(found.footprint.server[row]),
            coverage=coverage,
            interval=interval_of(question),
            outside=outside_of(question, layout, program, memory_bytes=memory, coverage=coverage),
        ),
        bottleneck=f"{name} {use:.0%}",
        network_link=network.kind if network is not None else "none",
        network_bytes=network.bytes_per_link if network is not None else 0.0,
    )


# Inherited by forked workers, so that a survey of many megabytes is never pickled.
_shared: dict[int, Survey] = {}


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle, which drops what waits: a worker that took it for the error of its task, or
    died of it with the queue in its hands, would leave the others waiting for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()


def _simulate_shared(task: tuple[int, int]) -> Candidate:
    return _simulate_row(_shared[task[0]], task[1])


def _simulated(found: list[tuple[Survey, int]], workers: int, progress: Progress) -> list[Candidate]:
    """Candidates of (survey, row) tasks, in order; over forked processes where that is safe."""
    for survey_, _ in found:
        _shared[id(survey_)] = survey_
    tasks = [(id(survey_), row) for survey_, row in found]
    try:
        alone = "torch" in sys.modules or threading.active_count() > 1 or not hasattr(os, "fork")
        if workers <= 1 or len(tasks) < 2 or alone:
            return list(_counted(map(_simulate_shared, tasks), len(tasks), progress))
        # The longest first, so that no process is left alone with one at the end.
        order = sorted(range(len(tasks)), key=lambda index: (-_work_of(*found[index]), index))
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=_start_worker) as pool:
            longest_first = pool.map(_simulate_shared, [tasks[index] for index in order])
            done = dict(zip(order, _counted(longest_first, len(tasks), progress), strict=True))
        return [done[index] for index in range(len(tasks))]
    finally:
        _shared.clear()


def _work_of(survey_: Survey, row: int) -> float:
    """How long a simulation will take, in no unit: its ops, more of them where faults split classes."""
    divisions, at = survey_.space.divisions, int(survey_.space.division[row])
    ops = float(divisions.micro_batches[at] * divisions.virtual_stages[at] * divisions.pp[at])
    served = isinstance(survey_.space.schemes[int(survey_.space.scheme[row])], ParameterServer)
    return ops * (2.0 if served else 1.0) * (8.0 if survey_.question.cluster.faults else 1.0)


def _counted(candidates: Iterable[Candidate], total: int, progress: Progress) -> Iterator[Candidate]:
    for number, candidate in enumerate(candidates, start=1):
        progress(f"simulated {number} of {total} layouts")
        yield candidate


# ---------------------------------------------------------------------------------------------------- the plan


@contextlib.contextmanager
def _no_cycle_collection() -> Iterator[None]:
    """Surveys and simulations allocate much and drop it all at once: the cycle collector would only scan it in vain."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_no_cycle_collection()
def make_plan(question: Question, *, progress: Progress = lambda _: None, workers: int | None = None) -> Plan:
    """Plan a question: survey all layouts, simulate the best, rank them, explain the winner, answer the what-ifs.

    Deterministic, whatever `workers` (default: one per CPU): ties are broken by the order of the space.
    NoFeasibleLayout where nothing is legal or fits.
    """
    started = time.monotonic()
    progress("estimating every legal layout")
    found = survey(question)
    rows = found.best_rows(question.scenario.search.simulate, of_every_family=_OF_EVERY_FAMILY)
    variants = [
        (entry, _survey_or_none(with_settings(question.scenario, entry))) for entry in question.scenario.what_if
    ]
    done = _simulated([(found, row) for row in rows], workers or _cpus(), progress)
    ranking = sorted(done, key=lambda candidate: objective_of(question, candidate.prediction))
    winner, interval = ranking[0], interval_of(question)
    tried = [_what_if_rows(other, winner) if other is not None else [] for _, other in variants]
    tasks = [
        (other, row) for (_, other), theirs in zip(variants, tried, strict=True) for row in theirs if other is not None
    ]
    trials = lever_questions(question)
    best_row = rows[done.index(winner)]
    tasks += [(replace(found, question=trial), best_row) for trial in trials.values()]
    changed = iter(_simulated(tasks, workers or _cpus(), progress))
    results = [
        what_if_result(
            entry.name, entry.set, other.question if other is not None else None,
            list(itertools.islice(changed, len(theirs))), winner, question,
        )
        for (entry, other), theirs in zip(variants, tried, strict=True)
    ]  # fmt: skip
    faster = dict(zip(trials, changed, strict=True))
    progress("explaining")
    best = tuple(
        next(candidate for candidate in ranking if candidate.family == name)
        for name in FAMILIES
        if any(candidate.family == name for candidate in ranking)
    )
    program = lower(question.workload, winner.layout, question.framework, question.cluster.devices_per_node)
    return Plan(
        clustersim=__version__,
        scenario=question.scenario,
        workload=question.workload,
        framework=question.framework,
        machines=_machines(question, winner.layout),
        layout=winner.layout,
        program_digest=digest(program),
        prediction=winner.prediction,
        ranking=tuple(ranking),
        best_of_family=best,
        pareto=_pareto(ranking),
        against=against(question, found.space, found.feasible, found.estimate, winner, best, interval.ratio),
        levers=levers(winner, faster, interval.repeats),
        ratio=interval.ratio,
        tied=tied(question, ranking, interval.ratio),
        counts=Counts(
            legal=len(found.space),
            feasible=len(found.feasible),
            distinct=found.space.distinct(found.feasible),
            simulated=len(rows),
            infeasible=found.infeasible,
            wall_s=time.monotonic() - started,
        ),
        what_if=tuple(results),
        digests=question.digests | {"intervals": digest(load_intervals())},
    )


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _what_if_rows(other: Survey, winner: Candidate) -> list[int]:
    """What to simulate for a what-if: the best of every family by estimate, what else a plan of it would simulate as
    long as that is little work, and today's winner, if it is still there."""
    rows = other.best_rows(0, of_every_family=1)
    work = sum(_work_of(other, row) for row in rows)
    for row in other.best_rows(other.question.scenario.search.simulate, of_every_family=_OF_EVERY_FAMILY):
        if row not in rows:
            work += _work_of(other, row)
            rows += [row] if work <= _WHAT_IF_WORK else []
    same = other.space.row_of(winner.layout)
    return rows if same is None or same in rows or same not in other.feasible else [*rows, same]


def _survey_or_none(question: Question) -> Survey | None:
    try:
        return survey(question)
    except NoFeasibleLayout:
        return None


def _machines(question: Question, layout: Layout) -> Machines:
    device = question.cluster.workers[0].device
    assert device is not None
    used = servers_used(layout.scheme)
    return Machines(
        nodes={machine.node.name: machine.count for machine in question.cluster.workers},
        devices_per_node=question.cluster.devices_per_node,
        device=device.name,
        device_kind=device.kind,
        servers={question.cluster.servers[0].node.name: used} if used else {},
    )


def _pareto(ranking: list[Candidate]) -> tuple[Candidate, ...]:
    """Candidates that no other beats in step time, dollars, worker memory and energy at once."""
    points = np.array(
        [
            (c.prediction.step_s, c.prediction.usd_per_step or 0.0, c.prediction.memory_bytes, c.prediction.energy_j)
            for c in ranking
        ]
    )
    front = []
    for index, point in enumerate(points):
        dominated = (points <= point).all(axis=1) & (points < point).any(axis=1)
        if not dominated.any():
            front.append(ranking[index])
    return tuple(front)
