"""Estimates against simulations (docs/laws.md, Estimate): two computations of the same step that share kernel and link
costs, and neither schedules nor networks."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from clusters import agreement, cluster_of, framework_of, pipeline_program, workers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from clustersim import files
from clustersim.estimate.estimate import estimate
from clustersim.estimate.pipeline import waiting_s
from clustersim.hardware.framework import Schedule
from clustersim.layout.choices import Choices
from clustersim.layout.divisions import SCHEDULES
from clustersim.layout.layout import describe, family
from clustersim.layout.space import FAMILIES, layouts
from clustersim.program.lower import lower
from clustersim.scenario.load import question
from clustersim.search.search import Survey, survey
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
_FRAMEWORKS = sorted(path.stem for path in (files.shipped_folder("hwprofiles") / "frameworks").glob("*.yaml"))
_SMALL: dict[str, dict[str, Any]] = {
    "the device rules": {
        "model": "gpt3-1.3b",
        "training": {"global_batch": 128, "sequence": 1024},
        "cluster": {"nodes": {"dgx-a100-80g": 2}, "fabric": "one-switch"},
    },
    "the host rules": {
        "model": "gpt3-125m",
        "training": {"global_batch": 64, "sequence": 256},
        "cluster": {"nodes": {"hgx-h100": 1}, "fabric": "one-switch"},
    },
}  # fmt: skip


def _some_of_each_family(found: Survey, count: int, seed: int) -> list[int]:
    """Random feasible layouts, `count` of each family."""
    rng = random.Random(seed)
    families = found.space.family_of()
    chosen: list[int] = []
    for index in range(len(FAMILIES)):
        mine = [int(row) for row in found.feasible if families[row] == index]
        chosen += rng.sample(mine, min(count, len(mine)))
    return chosen


@pytest.mark.parametrize("name", list(_SCENARIOS))
def test_estimates_rank_layouts_as_simulations_do(name: str) -> None:
    asked = question({"schema_version": 1, "name": "estimates", **_SCENARIOS[name]}, "estimates")
    found = survey(asked)
    correlation, bias = agreement(name, asked, found, _some_of_each_family(found, _PER_FAMILY, seed=7))
    assert correlation >= 0.95
    assert bias <= 0.10


@pytest.mark.parametrize("framework", _FRAMEWORKS)
@pytest.mark.parametrize("name", list(_SMALL))
def test_estimates_know_what_every_framework_does(name: str, framework: str) -> None:
    """What the shipped frameworks do with gradients and weights between passes, what runs beside what, and the host:
    under every kind of synchronisation and stage of sharding, of a model that the device rules and one that the host
    does. Within 15 % each, and 3 % as a rule."""
    tree = {"schema_version": 1, "name": "estimates", "framework": framework, **_SMALL[name]}
    found = survey(question(tree, "estimates"))
    kinds = [f"{family(scheme)} {getattr(scheme, 'stage', '')}" for scheme in found.space.schemes]
    rng = random.Random(5)
    bias = []
    for kind in dict.fromkeys(kinds):
        mine = [int(row) for row in found.feasible if kinds[int(found.space.scheme[row])] == kind]
        for row in rng.sample(mine, min(4, len(mine))):
            layout, asked = found.space.layout(row), found.question
            program = lower(asked.workload, layout, asked.framework, asked.cluster.devices_per_node)
            simulated = simulate(program, asked.cluster, asked.framework).makespan_s
            bias.append(float(found.estimate.step_s[row]) / simulated - 1.0)
            assert abs(bias[-1]) <= 0.15, describe(layout)
    assert float(np.mean(np.abs(bias))) <= 0.03


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


def test_estimates_rank_all_schedules_of_a_large_model() -> None:
    """175B parameters on 1,024 GPUs: layouts of every schedule, zero bubble and uneven splits included."""
    tree = {
        "model": "gpt3-175b",
        "training": {"global_batch": 1536, "sequence": 2048},
        "framework": "megatron-lm",
        "cluster": {"nodes": {"dgx-a100-80g": 128}, "fabric": "rail-optimized"},
        "search": {"sync": ["allreduce", "sharded"]},
    }
    asked = question({"schema_version": 1, "name": "estimates", **tree}, "estimates")
    able: tuple[Schedule, ...] = ("1f1b", "interleaved", "zb-h1", "zb-v")
    found = survey(replace(asked, framework=replace(asked.framework, schedules=able)))
    d, at = found.space.divisions, found.space.division
    # Programs of moderate length, to be simulated quickly.
    short = d.pp[at] * d.micro_batches[at] * d.virtual_stages[at] <= 600
    rng = random.Random(11)
    chosen: list[int] = []
    for name in able:
        of_it = (d.schedule[at] == SCHEDULES.index(name)) & short & (d.pp[at] > 1)
        mine = [int(row) for row in found.feasible if of_it[row]]
        chosen += rng.sample(mine, min(6, len(mine)))
    assert len(chosen) == 6 * len(able)
    correlation, bias = agreement("175B", asked, found, chosen)
    assert correlation >= 0.99
    assert bias <= 0.02


@given(
    schedule=st.sampled_from(["1f1b", "gpipe", "zb-h1"]),
    loads=st.one_of(
        st.lists(st.integers(1, 6), min_size=2, max_size=8),
        # A layer more on some stages, and the head on the last.
        st.tuples(st.integers(1, 4), st.lists(st.booleans(), min_size=2, max_size=8), st.integers(0, 1)).map(
            lambda drawn: [drawn[0] + more for more in drawn[1][:-1]] + [drawn[0] + drawn[1][-1] + drawn[2]]
        ),
    ),
    count=st.integers(1, 14),
    passes=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
)
@settings(max_examples=150, deadline=None)
def test_waiting_of_uneven_stages(
    schedule: Schedule, loads: list[int], count: int, passes: tuple[int, int, int]
) -> None:
    """The slowest chain through any stage is what GPipe takes, and 1F1B where stages differ by a layer; nothing less
    otherwise. ZB-H1 takes no less than its own."""
    f, b, w = passes if schedule == "zb-h1" else (*passes[:2], 0)
    program = pipeline_program(schedule, len(loads), count, 1, passes=(f, b, w), loads=loads)
    found = simulate(program, cluster_of(workers(len(loads))), framework_of(pass_s=1.0)).makespan_s
    stages = np.array([f, b, w], float)[:, None, None] * np.array(loads, float)
    waits = waiting_s(schedule, np.array([[count]]), stages, np.zeros((1, 1)))
    closed = float((count * stages.sum(axis=0) + waits).max())
    assert closed <= found * (1 + 1e-9)
    alike = max(loads[:-1]) - min(loads) <= 1 and loads[-1] <= min(loads) + 2
    if schedule == "gpipe" or (schedule == "1f1b" and alike and count >= len(loads)):
        assert closed == pytest.approx(found, rel=1e-9)
