"""Estimates against simulations (docs/laws.md, Estimate): two computations of the same step that share kernel and link
costs, and neither schedules nor networks."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from clustersim.estimate.estimate import estimate
from clustersim.layout.choices import Choices
from clustersim.layout.layout import describe
from clustersim.layout.space import FAMILIES, layouts
from clustersim.program.lower import lower
from clustersim.scenario import Question, question
from clustersim.search.search import survey
from clustersim.simulate.simulate import simulate

Floats = NDArray[np.float64]

_SCENARIOS: dict[str, dict[str, Any]] = {
    "eight DGX A100, unfused, nothing overlaps": {
        "model": "gpt3-13b",
        "training": {"global_batch": 256, "sequence": 2048},
        "framework": "megatron-lm",
        "cluster": {"nodes": {"dgx-a100-80g": 8}, "servers": {"cpu-server-200g": "0..4"}, "fabric": "rail-optimized"},
    },
    "four HGX H100, everything overlaps": {
        "model": "gpt3-1.3b",
        "training": {"global_batch": 256, "sequence": 2048},
        "framework": "megatron-core",
        "cluster": {"nodes": {"hgx-h100": 4}, "servers": {"cpu-server-100g": "0..3"}, "fabric": "leaf-spine-2to1"},
    },
    "eight p3.2xlarge, 10 Gb/s": {
        "model": "gpt3-125m",
        "training": {"global_batch": 64, "sequence": 512, "precision": "fp16"},
        "framework": "clustersim",
        "cluster": {"nodes": {"p3-2xlarge": 8}, "servers": {"cpu-server-100g": "0..3"}, "fabric": "one-switch"},
    },
}  # fmt: skip
_PER_FAMILY = 14


def _compared(asked: Question, rows: int, seed: int) -> tuple[Floats, Floats, list[str]]:
    """Estimated and simulated seconds of random feasible layouts, `rows` of each family."""
    found = survey(asked)
    rng = random.Random(seed)
    families = found.space.family_of()
    chosen: list[int] = []
    for index in range(len(FAMILIES)):
        mine = [int(row) for row in found.feasible if families[row] == index]
        chosen += rng.sample(mine, min(rows, len(mine)))
    simulated, names = [], []
    for row in chosen:
        layout = found.space.layout(row)
        program = lower(asked.workload, layout, asked.framework, asked.cluster.devices_per_node)
        simulated.append(simulate(program, asked.cluster, asked.framework).makespan_s)
        names.append(describe(layout))
    return found.estimate.step_s[chosen], np.array(simulated), names


def _rank_correlation(one: Floats, two: Floats) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (one, two)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


@pytest.mark.parametrize("name", list(_SCENARIOS))
def test_estimates_rank_layouts_as_simulations_do(name: str) -> None:
    asked = question({"schema_version": 1, "name": "estimates", **_SCENARIOS[name]}, "estimates")
    estimated, simulated, names = _compared(asked, _PER_FAMILY, seed=7)
    bias = estimated / simulated - 1.0
    correlation = _rank_correlation(estimated, simulated)
    worst = int(np.argmax(np.abs(bias)))
    print(
        f"{name}: {len(bias)} layouts, rank correlation {correlation:.4f}, median bias {np.median(bias):+.2%}, "
        f"median |bias| {np.median(np.abs(bias)):.2%}, worst {bias[worst]:+.1%} ({names[worst]})"
    )
    assert correlation >= 0.95
    assert np.median(np.abs(bias)) <= 0.10


def test_estimates_follow_named_boundaries() -> None:
    """A stage with most of the layers is the slowest one, in estimates as in simulations."""
    tree = _SCENARIOS["four HGX H100, everything overlaps"]
    asked = question({"schema_version": 1, "name": "estimates", **tree}, "estimates")
    seconds = []
    for boundaries in ((0, 6, 12, 18), (0, 2, 12, 22), (0, 14, 16, 18)):
        choices = Choices(
            families=("allreduce",), least_servers=0, most_servers=0, dp=4, tp=2, pp=4, micro_batch=2,
            sequence_parallel=False, schedule="1f1b", recompute="none", algorithm="ring", boundaries=boundaries,
        )  # fmt: skip
        space = layouts(asked.workload, asked.cluster, asked.framework, choices)
        assert len(space) == 1
        estimated = float(estimate(asked.workload, space, asked.cluster, asked.framework).step_s[0])
        program = lower(asked.workload, space.layout(0), asked.framework, asked.cluster.devices_per_node)
        simulated = simulate(program, asked.cluster, asked.framework).makespan_s
        assert estimated == pytest.approx(simulated, rel=0.15)
        seconds.append(estimated)
    assert seconds[0] < seconds[1] < seconds[2]


def test_estimates_of_rows_do_not_depend_on_the_other_rows() -> None:
    asked = question({"schema_version": 1, "name": "estimates", **_SCENARIOS["eight p3.2xlarge, 10 Gb/s"]}, "x")
    found = survey(asked)
    some = np.random.default_rng(5).permutation(len(found.space))[:200]
    again = estimate(asked.workload, found.space.subset(some), asked.cluster, asked.framework)
    assert again.step_s == pytest.approx(found.estimate.step_s[some], rel=1e-12)
    slower = replace(asked.framework, network_scale=2.0)
    assert (estimate(asked.workload, found.space, asked.cluster, slower).step_s >= found.estimate.step_s).all()
