"""What-ifs answer as a plan of the changed scenario does."""

from __future__ import annotations

from typing import Any

import pytest

from clustersim.plan import Plan
from clustersim.scenario.load import question
from clustersim.search.search import make_plan

# Estimates of pipelines and servers are off on such boxes: the best by estimate is not the fastest.
_SCENARIO: dict[str, Any] = {
    "schema_version": 1,
    "name": "small",
    "model": "gpt2-xl",
    "training": {"global_batch": 64, "sequence": 1024, "precision": "bf16", "optimizer": "adam"},
    "framework": "torch-fsdp",
    "cluster": {"nodes": {"pcie-l40s-8": 2}, "fabric": "one-switch"},
    "what_if": [
        {"name": "one box", "set": {"cluster.nodes.pcie-l40s-8": 1}},
        {"name": "faster card", "set": {"cluster.nodes.pcie-l40s-8.nic.link": "roce-400"}},
        {"name": "half the batch", "set": {"training.global_batch": 32}},
    ],
}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(question(_SCENARIO, "small"), workers=1)


def _changed(**changes: Any) -> Plan:
    return make_plan(question(_SCENARIO | {"what_if": []} | changes, "small"), workers=1)


@pytest.mark.parametrize(
    ("index", "changes"),
    [
        (0, {"cluster": {"nodes": {"pcie-l40s-8": 1}, "fabric": "one-switch"}}),
        (1, {"cluster": {"nodes": {"pcie-l40s-8": {"count": 2, "nic": {"link": "roce-400"}}}, "fabric": "one-switch"}}),
        (2, {"training": _SCENARIO["training"] | {"global_batch": 32}}),
    ],
)
def test_the_winner_of_a_what_if_is_that_of_a_plan_of_it(plan: Plan, index: int, changes: dict[str, Any]) -> None:
    found, asked = plan.what_if[index], _changed(**changes)
    assert found.layout == asked.layout
    assert found.step_s == pytest.approx(asked.prediction.step_s, rel=1e-12)
