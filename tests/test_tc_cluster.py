"""Twelve measured ring allreduces against the simulator: the profile of the machines, the shaped rate, nothing fitted.

Measured by BinhangYuan/tc_cluster_setting (github.com, commit 75581a5b; no licence stated, figures only): AWS
p3.2xlarge, one V100 each, NCCL allreduce of 256 MiB over TCP whose rate `tc` limits. The efficiency of the link profile
comes from sends between two of these machines, not from these allreduces.
"""

from __future__ import annotations

import numpy as np
import pytest
from clusters import collective_program, framework_of

from clustersim.layout.layout import Mesh
from clustersim.scenario.load import question
from clustersim.simulate.simulate import simulate

SIZE = 256 * 2**20
# Gb/s -> machines -> milliseconds.
MEASURED = {
    1: {4: 3298, 8: 3841, 16: 4114, 32: 4251},
    2: {4: 1650, 8: 1921, 16: 2057, 32: 2124},
    5: {4: 655, 8: 763, 16: 817, 32: 844},
}


def simulated_s(machines: int, gigabits: int) -> float:
    """Seconds of one ring allreduce on `machines` p3.2xlarge whose cards are limited to `gigabits` Gb/s."""
    tree = {
        "schema_version": 1,
        "name": "tc-cluster",
        "model": "gpt3-125m",
        "training": {"global_batch": 32, "sequence": 128, "precision": "fp16"},
        "cluster": {"nodes": {"p3-2xlarge": {"count": machines, "nic": {"rate": f"{gigabits}Gb/s"}}}},
    }
    program = collective_program(Mesh(dp=machines, tp=1, pp=1), "all_reduce", "ring", SIZE)
    return simulate(program, question(tree, "tc-cluster").cluster, framework_of()).makespan_s


@pytest.mark.parametrize(("gigabits", "machines"), [(rate, n) for rate, row in MEASURED.items() for n in row])
def test_measured_allreduce_over_a_shaped_network(gigabits: int, machines: int) -> None:
    measured = MEASURED[gigabits][machines] / 1e3
    error = simulated_s(machines, gigabits) / measured - 1.0
    print(f"{gigabits} Gb/s, {machines:2} machines: measured {measured:.3f} s, simulated {error:+.2%}")
    assert abs(error) <= 0.025


def test_measured_allreduces_together() -> None:
    errors = [
        simulated_s(machines, rate) / (milliseconds / 1e3) - 1.0
        for rate, row in MEASURED.items()
        for machines, milliseconds in row.items()
    ]
    print(f"mean of the twelve absolute errors: {np.abs(errors).mean():.2%}")
    assert np.abs(errors).mean() <= 0.015
