"""Predictions of one source's rows with the constants that profiles learned from rows learned without that source.

Two shipped constants are of that kind: the host times of eager Megatron, and how much replicas' times vary. They alone
are found anew, from eight rows of every other source, each (nodes, framework) with factors of its own on its kernels
and its messages, which take up what else is odd about it. What the others do not show starts, and stays, at what is
known in general; the left-out source is predicted with its own factors at 1.
"""

from __future__ import annotations

import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from clustersim.calibrate.fit import Floats
from clustersim.calibrate.steps import Step, simulated_s
from clustersim.estimate.estimate import estimate
from clustersim.hardware.framework import Framework
from clustersim.validate.calibrated import scored_both, step_of
from clustersim.validate.case import Case
from clustersim.validate.configurations import spread_out
from clustersim.validate.family import Family, Rows
from clustersim.validate.scoreboard import Summary, summary

# Rows of each other source that are learned from: a source with many has no more say than one with few.
_ROWS_EACH = 8
# What is known in general of an eager layer: about 40 operations, each of which takes PyTorch 5 to 15 us of the host on
# the way forward, and autograd's engine about as long on the way back.
_LAYER_S, _LAYER_WIDTH = 40 * 10e-6, 0.7
# Nothing is known in general of how much replicas' times vary: from not at all to some per cent.
_JITTER_WIDTH = 0.01
_SCALE_WIDTH, _STEP_OFF = 0.3, 0.05
_NARROWED, _ROUNDS = 0.8, 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What was learned without a source: the host time of an eager layer, either way, and the jitter; and of each
    whether the rows determine it, for else it is what is known in general."""

    per_layer_s: float
    per_layer_identified: bool
    jitter: float
    jitter_identified: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """The rows of one source: as shipped, and with the constants `learned` from `fitted` rows of the `others`, which
    nothing of this source went into."""

    source: str
    families: tuple[str, ...]
    frameworks: tuple[str, ...]
    others: tuple[str, ...]
    fitted: int
    learned: Learned
    shipped: Summary
    left_out: Summary


def leave_sources_out(sets: Sequence[tuple[Rows, Family | None]], tell: Callable[[str], None]) -> tuple[LeftOut, ...]:
    """Every source left out in turn. Minutes for all shipped families; progress goes to `tell`."""
    sources: dict[str, list[tuple[str, Case]]] = defaultdict(list)
    for rows, family in sets:
        source = rows.name if family is None else family.source.split(",")[0]
        sources[source] += [(rows.name, case) for case in rows.cases]
    if len(sources) < 2:
        return ()
    begun, found = time.perf_counter(), []
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(sources))) as pool:
        few = dict(zip(sources, pool.map(_few, sources.values()), strict=True))
        tasks = [(source, cases, few) for source, cases in sources.items()]
        for number, one in enumerate(pool.map(_left_out, tasks), start=1):
            tell(f"{number} of {len(tasks)} sources left out, {time.perf_counter() - begun:.0f} s")
            found.append(one)
    return tuple(one for one in found if one is not None)


_Few = list[tuple[Step, float]]


def _left_out(task: tuple[str, list[tuple[str, Case]], dict[str, _Few]]) -> LeftOut | None:
    source, cases, few = task
    others = {name: steps for name, steps in few.items() if name != source and steps}
    learned = learn([pair for steps in others.values() for pair in steps])
    change = functools.partial(with_learned, learned=learned)
    shipped, left_out = scored_both((case, change) for _, case in cases)
    if not shipped:
        return None
    return LeftOut(
        source=source, families=tuple(dict.fromkeys(name for name, _ in cases)),
        frameworks=tuple(sorted({case.scenario["framework"] for _, case in cases})), others=tuple(others),
        fitted=sum(map(len, others.values())), learned=learned, shipped=summary(shipped), left_out=summary(left_out),
    )  # fmt: skip


def with_learned(framework: Framework, learned: Learned) -> Framework:
    """A framework with what its profile learned from rows replaced: host times of a layer where it learned these."""
    return _with(framework, learned.per_layer_s, learned.jitter)


def _with(framework: Framework, per_layer_s: float, jitter: float) -> Framework:
    if _learned(framework, "host"):
        host = replace(framework.host, per_layer_forward_s=per_layer_s, per_layer_backward_s=per_layer_s)
        framework = replace(framework, host=host)
    return replace(framework, jitter=jitter) if _learned(framework, "jitter") else framework


def _learned(framework: Framework, name: str) -> bool:
    found = framework.calibrated.get(name)
    return found is not None and found.method == "fitted"


def _few(cases: Sequence[tuple[str, Case]]) -> _Few:
    """The rows of a source that others learn from, each with what its simulated seconds are of its estimated ones."""
    steps = [step for _, case in cases if isinstance(step := step_of(case), Step)]
    some = [steps[index] for index in spread_out(steps, _ROWS_EACH)] if steps else []
    return [(step, simulated_s(step, step.framework) / _estimated_s(step, step.framework)) for step in some]


def _estimated_s(step: Step, framework: Framework) -> float:
    return float(estimate(step.question.workload, step.space, step.question.cluster, framework).step_s[0])


def learn(pairs: Sequence[tuple[Step, float]]) -> Learned:
    """The host time of a layer and the jitter that steps show, each (nodes, framework) with two factors of its own:
    the most probable ones, under Cauchy's loss, with normal priors; a constant whose prior these rows do not narrow
    to 0.8 of its width stays at it."""
    groups = {_group(step): None for step, _ in pairs}
    place = {group: 2 + 2 * index for index, group in enumerate(groups)}

    def predicted(at: Floats, index: int) -> float:
        step, ratio = pairs[index]
        here = place[_group(step)]
        framework = _with(step.framework, _LAYER_S * float(np.exp(at[0])), abs(float(at[1])))
        framework = replace(
            framework, compute_scale=framework.compute_scale * float(np.exp(at[here])),
            network_scale=framework.network_scale * float(np.exp(at[here + 1])),
        )  # fmt: skip
        return float(np.log(ratio * _estimated_s(step, framework) / step.measured_s))

    widths = np.array([_LAYER_WIDTH, _JITTER_WIDTH] + [_SCALE_WIDTH] * (2 * len(groups)))

    def loss(off: Floats) -> Floats:
        """Signed roots of Cauchy's loss."""
        return np.asarray(np.sign(off) * np.sqrt(np.log1p(off * off)))

    def residuals(at: Floats) -> Floats:
        off = np.array([predicted(at, index) for index in range(len(pairs))]) / _STEP_OFF
        return np.concatenate([loss(off), at / widths])

    def slopes(at: Floats, base: Floats) -> Floats:
        found = np.vstack([np.zeros((len(pairs), len(at))), np.diag(1.0 / widths)])
        for index, (step, _) in enumerate(pairs):
            here = place[_group(step)]
            for column in (0, 1, here, here + 1):
                moved = at.copy()
                width = 0.002 if column == 1 else 0.02
                moved[column] += width
                found[index, column] = (
                    float(loss(np.array(predicted(moved, index) / _STEP_OFF))) - base[index]
                ) / width
        return found

    at = np.zeros(len(widths))
    # Where both show: below its launches a layer's host time leaves no trace, nor does the sign of a jitter of 0.
    at[:2] = np.log(4.0), 0.005
    base, damping = residuals(at), 1e-2
    lines = slopes(at, base)
    for _ in range(_ROUNDS):
        normal = lines.T @ lines
        moved = at - np.linalg.solve(normal + damping * np.diag(np.diag(normal)), lines.T @ base)
        there = residuals(moved)
        gain = float(base @ base - there @ there)
        if gain > 0.0:
            at, base, damping = moved, there, damping / 5.0
            lines = slopes(at, base)
            if gain < 1e-3 * float(base @ base):
                break
        else:
            damping *= 6.0
    spread = np.sqrt(np.diag(np.linalg.inv(lines.T @ lines)))
    known = spread[:2] <= _NARROWED * widths[:2]
    return Learned(
        per_layer_s=_LAYER_S * float(np.exp(at[0] if known[0] else 0.0)), per_layer_identified=bool(known[0]),
        jitter=abs(float(at[1])) if known[1] else 0.0, jitter_identified=bool(known[1]),
    )  # fmt: skip


def _group(step: Step) -> tuple[str, str]:
    return "+".join(sorted({machine.node.name for machine in step.question.cluster.workers})), step.framework.name
