"""A whole training: what its steps take and cost together, and whether they end by the deadline."""

from __future__ import annotations

import math
from dataclasses import replace

from clustersim.errors import NoFeasibleLayout
from clustersim.hardware.device import Price
from clustersim.layout.layout import Layout, describe
from clustersim.plan import Prediction, WholeRun
from clustersim.scenario.question import Question
from clustersim.search.predict import servers_used
from clustersim.search.search import survey
from clustersim.units import human_days

_DAY_S = 86400.0


def whole_run(question: Question, layout: Layout, found: Prediction) -> WholeRun | None:
    """All steps of a training by a layout, of which `found` is predicted; None where the scenario has no
    training.tokens."""
    training = question.workload.training
    if training.tokens is None:
        return None
    steps = math.ceil(training.tokens / training.tokens_per_step)
    deadline_s = question.scenario.constraints.deadline_s
    return WholeRun(
        tokens=training.tokens,
        steps=steps,
        days=steps * found.step_s / _DAY_S,
        low_days=steps * found.low_s / _DAY_S,
        high_days=steps * found.high_s / _DAY_S,
        deadline_days=None if deadline_s is None else deadline_s / _DAY_S,
        usd=None if found.usd_per_step is None else steps * found.usd_per_step,
        prices={} if found.usd_per_step is None else _prices(question, servers_used(layout.scheme)),
    )


def _prices(question: Question, servers: int) -> dict[str, Price]:
    """The prices that dollars are counted with, by the profile that has them."""
    cluster = question.cluster
    hosts = (*cluster.workers, *(cluster.servers[:1] if servers else ()), *cluster.storage)
    found = {host.node.name: host.node.price for host in hosts}
    found |= {host.device.name: host.device.price for host in cluster.workers if host.device is not None}
    return {name: price for name, price in found.items() if price is not None}


def beyond_deadline(question: Question) -> str | None:
    """The fastest layout that there would be without the deadline, in words; None where the deadline is not to blame.
    Takes as long as the survey."""
    constraints, training = question.scenario.constraints, question.workload.training
    if constraints.deadline_s is None or training.tokens is None:
        return None
    scenario = replace(question.scenario, constraints=replace(constraints, deadline_s=None))
    try:
        found = survey(replace(question, scenario=scenario))
    except NoFeasibleLayout:
        return None
    row = found.feasible[found.estimate.step_s[found.feasible].argmin()]
    step_s = float(found.estimate.step_s[row])
    whole_s = step_s * math.ceil(training.tokens / training.tokens_per_step)
    return (
        f"the fastest that fits, {describe(found.space.layout(int(row)), question.workload.model.layers)}, takes an "
        f"estimated {human_days(whole_s)}, and the deadline is {human_days(constraints.deadline_s)}"
    )
