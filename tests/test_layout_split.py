"""Which layers a stage holds: even, balanced and slotted boundaries, and how the search considers them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.errors import ScenarioError
from clustersim.estimate.estimate import estimate
from clustersim.hardware.framework import Schedule
from clustersim.layout.divisions import SCHEDULES
from clustersim.layout.ends import end_loads
from clustersim.layout.schedule import stage_of
from clustersim.layout.space import Space
from clustersim.layout.split import balanced_boundaries, even_boundaries, slot_boundaries, splits, stage_loads
from clustersim.program.lower import lower
from clustersim.scenario.load import question
from clustersim.scenario.question import Question
from clustersim.search.search import choices_of, survey
from clustersim.simulate.simulate import simulate

ENDS = st.floats(0.0, 4.0).map(lambda x: round(x, 2))


def _all_boundaries(layers: int, chunks: int) -> list[tuple[int, ...]]:
    return [(0, *inner) for inner in itertools.combinations(range(1, layers), chunks - 1)]


@given(
    schedule=st.sampled_from(["1f1b", "zb-h1", "interleaved", "zb-v"]), pp=st.integers(1, 4), more=st.integers(0, 5),
    embedding=ENDS, head=ENDS,
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_no_boundaries_balance_better(schedule: Schedule, pp: int, more: int, embedding: float, head: float) -> None:
    """Against all boundaries there are: no other lets the slowest stage do less."""
    virtual = 2 if schedule in ("interleaved", "zb-v") else 1
    chunks = pp * virtual
    layers = chunks + more
    found = balanced_boundaries(layers, schedule, pp, virtual, embedding, head)
    assert found in _all_boundaries(layers, chunks)
    ends = (layers, schedule, pp, embedding, head)
    best = min(max(stage_loads(other, *ends)) for other in _all_boundaries(layers, chunks))
    assert max(stage_loads(found, *ends)) == pytest.approx(best, abs=1e-9)


@given(layers=st.integers(1, 60), pp=st.integers(1, 12), data=st.data())
@settings(max_examples=100, deadline=None)
def test_loads_add_up_and_light_ends_leave_the_even_split(layers: int, pp: int, data: st.DataObject) -> None:
    pp = min(pp, layers)
    schedule: Schedule = data.draw(st.sampled_from(["1f1b", "zb-v"]))
    virtual = 2 if schedule == "zb-v" and layers >= 2 * pp else 1
    schedule = schedule if virtual == 2 else "1f1b"
    embedding, head = data.draw(ENDS), data.draw(ENDS)
    even = even_boundaries(layers, pp * virtual)
    loads = stage_loads(even, layers, schedule, pp, embedding, head)
    assert sum(loads) == pytest.approx(layers + embedding + head)
    assert len(loads) == pp
    # Without ends to balance there is nothing better than the even split, and it is the only one considered.
    if schedule == "1f1b":
        assert splits(layers, schedule, pp, virtual, 0.0, 0.0, None) == (even,)
    both = splits(layers, schedule, pp, virtual, embedding, head, None)
    assert both[0] == even
    if len(both) == 2:
        assert max(stage_loads(both[1], layers, schedule, pp, embedding, head)) < max(loads)
    # The head is where the last chunk is.
    assert stage_of(schedule, pp, pp * virtual - 1) == (0 if schedule == "zb-v" else pp - 1)


def test_slots_of_a_seventy_layer_model() -> None:
    """70 layers, the embedding and the head over 12 stages: six slots each (BigScience's 176B model)."""
    found = slot_boundaries(70, 12)
    assert found is not None
    sizes = np.diff([*found, 70])
    assert sizes.tolist() == [5, *[6] * 10, 5]
    assert slot_boundaries(10, 4) == (0, 2, 5, 8)
    # A stage would have the head and no layer.
    assert slot_boundaries(4, 4) is None


_LARGE_VOCABULARY: dict[str, Any] = {
    "schema_version": 1,
    "name": "large vocabulary",
    "model": {"layers": 24, "hidden": 4096, "heads": 32, "vocab": 256000, "tied": False},
    "training": {"global_batch": 128, "sequence": 2048},
    "framework": "megatron-lm",
    "cluster": {"nodes": {"dgx-a100-80g": 2}, "fabric": "rail-optimized"},
    "layout": {
        "dp": 2,
        "tp": 2,
        "pp": 4,
        "micro_batch": 1,
        "sync": "allreduce",
        "algorithm": "ring",
        "recompute": "full",
    },
}


def _asked(**layout: Any) -> Question:
    tree = {**_LARGE_VOCABULARY, "layout": {**_LARGE_VOCABULARY["layout"], **layout}}
    return question(tree, "large vocabulary")


def _space(asked: Question) -> Space:
    return survey(asked).space


def test_a_large_vocabulary_makes_the_balanced_split_worth_considering() -> None:
    """A head of several layers' work: the last stage gets fewer layers, and the step is shorter, estimated as well as
    simulated."""
    asked = _asked(schedule="1f1b", sequence_parallel=True)
    space = _space(asked)
    embedding, head = end_loads(asked.workload, asked.cluster, asked.framework, 2, "full")
    assert embedding < 0.5
    assert head > 2.0
    layouts = [space.layout(row) for row in range(len(space))]
    boundaries = [layout.pipeline.boundaries for layout in layouts]
    assert boundaries[0] == (0, 6, 12, 18)
    assert len(set(boundaries)) == 2
    estimated = estimate(asked.workload, space, asked.cluster, asked.framework).step_s
    simulated = [
        simulate(lower(asked.workload, layout, asked.framework, 8), asked.cluster, asked.framework).makespan_s
        for layout in layouts
    ]
    assert estimated == pytest.approx(simulated, rel=0.03)
    assert simulated[1] < 0.95 * simulated[0]
    assert estimated[1] < 0.95 * estimated[0]
    found = survey(asked)
    assert found.best_rows(1, of_every_family=0) == [1]


@pytest.mark.parametrize(
    ("named", "sizes"), [("even", [6, 6, 6, 6]), ("slots", [6, 7, 6, 5]), ([0, 8, 12, 20], [8, 4, 8, 4])]
)
def test_boundaries_by_name(named: Any, sizes: list[int]) -> None:
    space = _space(_asked(schedule="1f1b", sequence_parallel=True, boundaries=named))
    assert [np.diff([*split, 24]).tolist() for split in space.splits] == [sizes]


def test_balanced_by_name() -> None:
    space = _space(_asked(schedule="1f1b", sequence_parallel=True, boundaries="balanced"))
    (split,) = space.splits
    sizes = np.diff([*split, 24]).tolist()
    assert max(sizes[:3]) > sizes[3]


def test_only_schedules_of_the_framework_are_considered() -> None:
    asked = _asked()
    able: tuple[Schedule, ...] = ("1f1b", "zb-h1", "zb-v")
    wider = replace(asked, framework=replace(asked.framework, schedules=able))
    for one, wanted in ((asked, {"1f1b", "interleaved"}), (wider, {"1f1b", "zb-h1", "zb-v"})):
        space = _space(one)
        assert {SCHEDULES[index] for index in space.divisions.schedule.tolist()} == wanted
        for row in range(len(space)):
            layout = space.layout(row)
            assert space.row_of(layout) == row
    alone = replace(asked, scenario=replace(asked.scenario, layout=replace(asked.scenario.layout, pp=1, dp=8)))
    lonely = replace(alone, framework=wider.framework)
    assert choices_of(lonely).pp == 1
    assert set(_space(lonely).divisions.schedule.tolist()) == {SCHEDULES.index("1f1b")}
    with pytest.raises(ScenarioError, match="megatron-lm does not run it; write one of 1f1b, interleaved, gpipe"):
        _asked(schedule="zb-v")
