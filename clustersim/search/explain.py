"""Why the winner wins: against the best of every other family, and what would change the answer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.estimate.estimate import Estimate, estimate
from clustersim.layout.choices import Choices
from clustersim.layout.layout import Family, ParameterServer, describe_scheme
from clustersim.layout.space import FAMILIES, Space, layouts
from clustersim.plan import Against, Candidate, Lever
from clustersim.scenario.question import Question
from clustersim.units import human_bytes, human_seconds

Ints = NDArray[np.int64]

_RATE_FACTORS = tuple(2.0**exponent for exponent in range(-4, 5))
# Rows of each family that a crossover is looked for among.
_ROWS = 64


def with_nic_rate(cluster: Cluster, factor: float) -> Cluster:
    """The cluster with every NIC, of workers, servers and storage, `factor` times as fast."""

    def faster(machine: Machine) -> Machine:
        nic = replace(machine.node.nic, rate_bytes_per_s=machine.nic_rate_bytes_per_s * factor)
        return replace(machine, node=replace(machine.node, nic=nic))

    return replace(
        cluster,
        workers=tuple(faster(machine) for machine in cluster.workers),
        servers=tuple(faster(machine) for machine in cluster.servers),
        storage=tuple(faster(machine) for machine in cluster.storage),
    )


def with_storage_rate(cluster: Cluster, factor: float) -> Cluster:
    """The cluster with the drives of all hosts `factor` times as fast."""

    def faster(machine: Machine) -> Machine:
        storage = machine.node.storage
        if storage is None:
            return machine
        rate, latency = storage.read_rate_bytes_per_s * factor, storage.read_latency_s / factor
        drives = replace(storage, read_rate_bytes_per_s=rate, read_latency_s=latency)
        return replace(machine, node=replace(machine.node, storage=drives))

    return replace(
        cluster,
        workers=tuple(faster(machine) for machine in cluster.workers),
        storage=tuple(faster(machine) for machine in cluster.storage),
    )


def lever_questions(question: Question) -> dict[str, Question]:
    """The question with 10 % more of one resource, by the resource's name."""
    faster = replace(question.framework, compute_scale=question.framework.compute_scale / 1.1)
    found = {
        "NIC bandwidth": replace(question, cluster=with_nic_rate(question.cluster, 1.1)),
        "device speed": replace(question, framework=faster),
    }
    if question.workload.data is not None:
        found["storage"] = replace(question, cluster=with_storage_rate(question.cluster, 1.1))
    return found


def levers(winner: Candidate, faster: dict[str, Candidate], repeats: float) -> tuple[Lever, ...]:
    """What 10 % more of each resource buys: the relative gain in step time, simulated, largest first. What is less than
    `repeats`, by which (in logarithms) runs of one configuration differ, nobody could measure."""
    gains = {name: winner.prediction.step_s / other.prediction.step_s for name, other in faster.items()}
    found = [Lever(resource=name, gain=gain - 1.0, told=math.log(gain) > repeats) for name, gain in gains.items()]
    return tuple(sorted(found, key=lambda lever: -lever.gain))


def against(
    question: Question,
    space: Space,
    feasible: Ints,
    estimated: Estimate,
    winner: Candidate,
    best: tuple[Candidate, ...],
    ratio: float,
) -> tuple[Against, ...]:
    """The winner against the best of each other family: seconds, bytes, and where the answer would change. Within
    `ratio` (of a logarithm) the two are a tie."""
    few = _few(space, feasible, estimated)
    result = []
    for other in best:
        if other.family == winner.family:
            continue
        slower = other.prediction.step_s - winner.prediction.step_s
        tie = abs(math.log(other.prediction.step_s / winner.prediction.step_s)) <= ratio
        result.append(
            Against(
                family=other.family,
                slower_s=slower,
                reason=_reason(winner, other, slower, tie=tie),
                crossover=_crossover(question, space, few, winner, other),
                tie=tie,
            )
        )
    return tuple(result)


def _few(space: Space, feasible: Ints, estimated: Estimate) -> Ints:
    """The best rows of each family, by estimate."""
    families = space.family_of()
    order = feasible[np.argsort(estimated.step_s[feasible], kind="stable")]
    return np.concatenate([order[families[order] == index][:_ROWS] for index in range(len(FAMILIES))])


def _reason(winner: Candidate, other: Candidate, slower: float, *, tie: bool) -> str:
    mine, theirs = winner.prediction, other.prediction
    parts = {
        "compute": theirs.compute_s - mine.compute_s,
        "waiting in the pipeline": theirs.bubble_s - mine.bubble_s,
        "exposed communication": theirs.exposed_communication_s - mine.exposed_communication_s,
        "waiting for input": theirs.input_stall_s - mine.input_stall_s,
    }
    name, seconds = max(parts.items(), key=lambda item: item[1])
    text = (
        f"{describe_scheme(winner.layout.scheme)} {'and' if tie else 'beats'} {describe_scheme(other.layout.scheme)} "
        + (f"are a tie, {human_seconds(slower)} a step apart" if tie else f"by {human_seconds(slower)} a step")
    )
    if seconds > 0.0:
        text += f": {human_seconds(seconds)} more {name}"
    if winner.network_bytes and other.network_bytes:
        text += (
            f"; its busiest link ({other.network_link}) carries {human_bytes(other.network_bytes)} a step, "
            f"the winner's ({winner.network_link}) {human_bytes(winner.network_bytes)}"
        )
    return text


def _crossover(question: Question, space: Space, few: Ints, winner: Candidate, other: Candidate) -> str:
    """Where the family of `other` would win, by estimates of the best rows of both families."""
    found = []
    rate = _nic_crossover(question, space, few, winner.family, other.family)
    if rate is not None:
        found.append(rate)
    if other.family == "parameter-server" and question.cluster.servers:
        servers = _server_crossover(question, space, winner, other)
        if servers is not None:
            found.append(servers)
    if not found:
        low, high = _RATE_FACTORS[0], _RATE_FACTORS[-1]
        return f"{other.family} does not win at any NIC speed from {low:g} to {high:g} times today's"
    return f"{other.family} would win " + " or ".join(found)


def _nic_crossover(question: Question, space: Space, few: Ints, mine: Family, theirs: Family) -> str | None:
    families = space.family_of()[few]
    subset = space.subset(few)
    own, others = families == FAMILIES.index(mine), families == FAMILIES.index(theirs)
    nearest: float | None = None
    for factor in _RATE_FACTORS:
        cluster = with_nic_rate(question.cluster, factor)
        step = estimate(question.workload, subset, cluster, question.framework).step_s
        if step[others].min() < step[own].min() and (nearest is None or abs(np.log(factor)) < abs(np.log(nearest))):
            nearest = factor
    if nearest is None or nearest == 1.0:
        return None
    rate = question.cluster.workers[0].nic_rate_bytes_per_s * nearest * 8.0 / 1e9
    return f"with NICs {'below' if nearest < 1.0 else 'above'} about {rate:.3g} Gb/s"


def _server_crossover(question: Question, space: Space, winner: Candidate, other: Candidate) -> str | None:
    """The least number of dedicated server hosts at which the best parameter-server division beats the winner."""
    scheme = other.layout.scheme
    assert isinstance(scheme, ParameterServer)
    most = question.cluster.worker_nodes
    hosts = replace(question.cluster.servers[0], count=most)
    cluster = replace(question.cluster, servers=(hosts,))
    layout = other.layout
    choices = Choices(
        families=("parameter-server",), least_servers=1, most_servers=most, dp=layout.mesh.dp, tp=layout.mesh.tp,
        pp=layout.mesh.pp, cp=layout.mesh.cp, ep=1, micro_batch=layout.micro_batch,
        sequence_parallel=layout.sequence_parallel,
        schedule=layout.pipeline.schedule, virtual_stages=layout.pipeline.virtual_stages, recompute=layout.recompute,
        order=layout.order, placement="dedicated", optimizer_at=scheme.optimizer_at,
    )  # fmt: skip
    wider = layouts(question.workload, cluster, question.framework, choices)
    if not len(wider):
        return None
    step = estimate(question.workload, wider, cluster, question.framework).step_s
    enough = np.flatnonzero(step < winner.estimated_s)
    if not len(enough):
        return None
    first = wider.schemes[int(wider.scheme[enough[0]])]
    assert isinstance(first, ParameterServer)
    return f"from {first.dedicated} dedicated server hosts" if first.dedicated > question.servers.most else None
