"""Intervals: conformal bands of residuals, kinds of cases, ties, and in what a prediction leaves what is covered."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim import files
from clustersim.app.door import run
from clustersim.compare import Comparison
from clustersim.hardware.calibration import CalibratedRun, CalibratedStep, Calibration, TimeConstant
from clustersim.hardware.conformal import CAP, band, beyond, quantile
from clustersim.hardware.intervals import Intervals, Kind, Outside, left_out_spread, load_intervals
from clustersim.hardware.provenance import Provenance
from clustersim.plan import Plan
from clustersim.report.figures import with_interval
from clustersim.report.intervals_table import intervals_markdown
from clustersim.report.plan_screen import levers, sureness, ties
from clustersim.scenario.load import question
from clustersim.search.kind import interval_of, kind_of, outside_of, schemes_of
from clustersim.search.search import make_plan
from clustersim.search.ties import tied, what_if_result
from clustersim.validate.residuals import (
    Residual,
    bands_of,
    margin_of,
    nearest,
    pairs_of,
    repeat_spreads,
    some_of,
    summarised,
)
from tests.test_validate import case_of

Sources = dict[str, list[np.ndarray[Any, np.dtype[np.float64]]]]
ONE: Kind = ("measured kernels", "unfused attention", "one node")
MANY: Kind = ("measured kernels", "unfused attention", "several nodes")
FLASH: Kind = ("measured kernels", "flash attention", "one node")


def units(*values: float) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    return [np.array([value]) for value in values]


def residuals(source: str, values: np.ndarray[Any, Any] | list[float], kind: Kind = ONE) -> list[Residual]:
    return [
        Residual(source=source, kind=kind, group=f"{source} {index // 4}", layout=str(index), value=float(value))
        for index, value in enumerate(values)
    ]


# ------------------------------------------------------------------------------------------------------ conformal


@given(seed=st.integers(0, 10_000), count=st.integers(9, 60), level=st.sampled_from([0.5, 0.8, 0.9]))
@settings(max_examples=30, deadline=None)
def test_the_quantile_is_that_of_split_conformal_prediction(seed: int, count: int, level: float) -> None:
    """One source of so many exchangeable rows that the cap does not bind: the ceil((n + 1) level)-th smallest."""
    rows = np.sort(np.random.default_rng(seed).lognormal(size=min(count, CAP)))
    rank = math.ceil((len(rows) + 1) * level - 1e-9)
    expected = rows[rank - 1] if rank <= len(rows) else math.inf
    assert quantile({"one": units(*rows)}, level) == expected


def test_the_quantile_covers_a_new_row_as_often_as_it_says() -> None:
    """Exchangeable rows: coverage is at least the level, and no more than 1 / (n + 1) above it (Lei et al. 2018)."""
    draws = np.random.default_rng(1)
    inside = 0
    for _ in range(4000):
        rows = draws.standard_t(3, size=20)
        inside += abs(rows[-1]) <= quantile({"one": units(*np.abs(rows[:-1]))}, 0.9)
    assert 0.885 < inside / 4000 < 0.965


def test_too_few_rows_bound_nothing() -> None:
    assert quantile({"one": units(*range(8))}, 0.9) == math.inf
    assert quantile({"one": units(*range(9))}, 0.9) == 8.0


@given(
    values=st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=30), min_size=3, max_size=6),
    low=st.floats(0.1, 0.8), more=st.floats(0.0, 0.15),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_bands_and_quantiles_grow_with_the_level(values: list[list[float]], low: float, more: float) -> None:
    sources = {str(index): units(*rows) for index, rows in enumerate(values)}
    assert quantile(sources, low) <= quantile(sources, low + more)
    narrow, wide = band(sources, low), band(sources, low + more)
    assert wide[0] <= narrow[0] <= 0.0 <= narrow[1] <= wide[1]


def test_a_large_source_does_not_swamp_small_ones() -> None:
    """Ten times the rows beyond the cap move nothing; they would have without it."""
    small = {name: units(*np.linspace(0.2, 0.4, CAP)) for name in "abc"}
    once = quantile(small | {"large": units(*np.linspace(0.0, 0.1, CAP))}, 0.8)
    many = quantile(small | {"large": units(*np.repeat(np.linspace(0.0, 0.1, CAP), 10))}, 0.8)
    assert once == many
    assert once > 0.3


def test_a_bias_is_in_the_band() -> None:
    """Predictions that were all too short: the band lies above them, and still holds the prediction itself."""
    found = band({"one": units(*np.linspace(0.1, 0.3, 40)), "two": units(*np.linspace(0.2, 0.4, 40))}, 0.9)
    assert found[0] == 0.0
    assert 0.35 < found[1] <= 0.4
    assert beyond(np.array([-0.1, 0.2, 0.5]), (0.0, 0.4)) == pytest.approx([0.1, -0.2, 0.1])


# ----------------------------------------------------------------------------------------------- kinds of residuals


def test_a_kind_without_rows_or_with_one_source_takes_its_parents() -> None:
    rows = [
        *residuals("a", np.linspace(-0.1, 0.1, 30)),
        *residuals("b", np.linspace(-0.1, 0.1, 30)),
        *residuals("c", np.linspace(0.4, 0.5, 60), FLASH),
        *residuals("a", [0.3, 0.3], MANY),
    ]
    found = bands_of(rows)
    assert set(found) == {ONE[:1], ONE[:2], ONE}
    assert nearest(found, MANY) == found[ONE[:2]]
    assert nearest(found, FLASH) == found[ONE[:1]]
    assert found[ONE[:1]][1] > 0.4 > found[ONE][1]


@given(seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_sources_that_were_left_out_are_covered(seed: int) -> None:
    """Sources with a bias of their own each: without the margin the bands of the others would miss many rows."""
    draws = np.random.default_rng(seed)
    rows = [
        row
        for source in range(10)
        for row in residuals(f"s{source}", draws.normal(draws.normal(0.0, 0.1), 0.03, size=25))
    ]
    found = summarised(rows)
    assert found.margin >= 1.0
    assert len(found.left_out) == 10
    # Half a dozen biases bound the next one loosely.
    assert np.mean(list(found.left_out.values())) > 0.7
    assert margin_of(rows) == pytest.approx(math.log(found.margin), abs=1e-4)


def test_pairs_are_of_one_model_cluster_and_batch() -> None:
    rows = residuals("a", [0.1, 0.2, 0.4, 0.1, 9.0])
    (group,) = pairs_of(rows)["a"]
    assert sorted(group) == pytest.approx([0.0, 0.1, 0.1, 0.2, 0.3, 0.3])
    again = [replace(row, layout="same") for row in rows]
    assert pairs_of(again) == {}, "repeats of a layout are no pair"


def test_a_common_bias_is_no_difference() -> None:
    """Everything three times too slow: the interval is wide, and layouts are told apart as well as ever."""
    rows = [row for name in "ab" for row in residuals(name, math.log(3.0) + np.linspace(-0.01, 0.01, 40))]
    found = summarised(rows)
    assert found.kinds[0].high > 3.0
    assert found.ratio < 1.02


def test_a_sample_keeps_groups_whole() -> None:
    cases = [case_of(id=f"{batch} {tp}", gbs=str(batch), tp=str(tp)) for batch in (16, 32, 64, 128) for tp in (1, 2, 4)]
    some = some_of(cases, 6)  # type: ignore[arg-type]
    assert [case.id for case in some] == [f"{batch} {tp}" for batch in (16, 64) for tp in (1, 2, 4)]
    assert some_of(cases, 99) == cases  # type: ignore[arg-type]


def test_repeats_are_of_one_configuration() -> None:
    cases = [("a", case_of(id=str(index), sec_per_iter=seconds)) for index, seconds in enumerate(("1", "1.1", "2"))]
    other = ("a", case_of(id="other", mbs="4"))
    found = repeat_spreads([*cases, other])  # type: ignore[list-item]
    assert list(found) == ["a"]
    assert found["a"][0] == pytest.approx([math.log(1.1), 0.0, math.log(2.0 / 1.1)])


# ------------------------------------------------------------------------------------------------------- the file


def test_the_shipped_residuals_are_told_in_the_documentation() -> None:
    """The tables of docs/accuracy.md are those of the file: benchmarks/intervals.py writes both."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert intervals_markdown(load_intervals()) in page


def test_shipped_intervals_hold_their_prediction_and_no_less_than_repeats() -> None:
    known = load_intervals()
    assert known.repeats > 1.0
    for residuals_ in (known.measured, known.roofline):
        for each in residuals_.kinds:
            found = known.interval(each.kind)
            assert found.low <= 1.0 / known.repeats <= known.repeats <= found.high
            assert found.low <= each.low
            assert found.high >= each.high
            assert found.ratio >= found.repeats
            # Who knows less is not surer.
            bare = known.interval(("roofline kernels", *each.kind[1:]))
            assert bare.low <= found.low <= found.high <= bare.high
            assert bare.ratio >= found.ratio
        coverage = list(residuals_.left_out.values())
        # Nothing promises 90 % of a source that nobody has seen; far from it would be a mistake of ours.
        assert 0.75 <= np.mean(coverage) <= 1.0


def test_no_interval_is_narrower_than_repeats() -> None:
    exact = load_intervals()
    sharp = replace(exact.measured, margin=1.0, ratio=1.0, kinds=tuple(
        replace(each, low=1.0, high=1.0) for each in exact.measured.kinds
    ))  # fmt: skip
    found = replace(exact, measured=sharp, repeats=1.05).interval(ONE)
    assert (found.low, found.high) == pytest.approx((1 / 1.05, 1.05))
    assert found.ratio == pytest.approx(math.log(1.05))


def calibration(*left_out: float) -> Calibration:
    runs = tuple(
        CalibratedRun(
            model="m", layout=str(index), program_digest="", run_digests=(), step_s=1.0, error_before=0.5,
            error_after=0.0, error_left_out=error,
        )
        for index, error in enumerate(left_out)
    )  # fmt: skip
    return Calibration(
        nodes=("n",), framework="f", constants=(), runs=runs, mean_error_before=0.5, mean_error_after=0.0,
        mean_error_left_out=0.0, provenance=Provenance(method="fitted", source="here"),
    )  # fmt: skip


def test_a_calibrated_cluster_carries_its_own_left_out_errors() -> None:
    assert left_out_spread(calibration(0.1, -0.1)) is None
    few, many = left_out_spread(calibration(0.02, -0.02, 0.02)), left_out_spread(calibration(*[0.02, -0.02] * 20))
    assert few is not None and many is not None  # noqa: PT018
    assert many == pytest.approx(-math.log(0.98))
    assert few > 2.0 * many, "three runs leave room for one that is further off"
    known = load_intervals()
    found = known.interval(MANY, calibration(*[0.06, -0.06] * 6))
    assert found.kind == "calibrated: 12 left-out configurations"
    assert found.high == pytest.approx(max(known.repeats, 1 / 0.94))
    assert found.low == pytest.approx(1 / found.high)
    assert known.interval(MANY, calibration(0.5)).kind != found.kind


def measured_steps(*worker_nodes: int, fitted: bool = False) -> Calibration:
    """Six rows, or as many as told, each of its own configuration, on so many nodes."""
    steps = tuple(
        CalibratedStep(
            row=str(index), layout="", configuration=index, worker_nodes=count, step_s=1.0, error_before=0.5,
            error_after=0.0, error_left_out=0.06 if count == 1 else 0.1,
        )
        for index, count in enumerate(worker_nodes)
    )  # fmt: skip
    host = TimeConstant(
        name="host.per_step", value_s=1e-3, uncertainty_s=None, before_s=1e-3,
        status="fitted" if fitted else "kept", identified=fitted,
    )  # fmt: skip
    found = calibration()
    return replace(found, nodes=("dgx-a100-80g",), framework="megatron-core", constants=(host,), steps=steps)


def test_a_calibration_carries_its_errors_to_plans_of_its_kind_only() -> None:
    known = load_intervals()
    one, several = measured_steps(*[1] * 12), measured_steps(*[2, 4] * 6)
    assert known.interval(ONE, one).high == pytest.approx(max(known.repeats, 1.06))
    assert known.interval(MANY, several).high == pytest.approx(max(known.repeats, 1.1))
    assert known.interval(MANY, one) == known.interval(MANY)
    assert known.interval(ONE, several) == known.interval(ONE)
    # Of both kinds: each has its own. Two of a kind say nothing.
    both = replace(
        one, steps=(*one.steps, *(replace(each, configuration=99 + i) for i, each in enumerate(several.steps)))
    )
    assert known.interval(ONE, both) == known.interval(ONE, one)
    assert known.interval(MANY, both) == known.interval(MANY, several)
    assert known.interval(MANY, measured_steps(*[1] * 6, 2, 2)) == known.interval(MANY)
    # Older files do not say; their rows count as before.
    older = replace(one, steps=tuple(replace(each, worker_nodes=None, configuration=None) for each in one.steps))
    assert known.interval(ONE, older) == known.interval(MANY, older) == known.interval(ONE, one)


def test_rows_that_repeat_a_configuration_are_one_left_out_error() -> None:
    rows = measured_steps(1, 1, 1, 1)
    again = tuple(
        replace(each, row=f"{each.row}-{n}", error_left_out=0.01 * n) for n in range(4) for each in rows.steps
    )
    assert left_out_spread(replace(rows, steps=(*rows.steps, *again))) == left_out_spread(rows)
    assert left_out_spread(replace(rows, steps=tuple(replace(s, configuration=0) for s in rows.steps))) is None


# ------------------------------------------------------------------------------------------------- plans and screens

SCENARIO: dict[str, Any] = {
    "schema_version": 1,
    "name": "small",
    "model": "gpt3-1.3b",
    "training": {"global_batch": 64, "sequence": 2048, "precision": "bf16", "optimizer": "adam"},
    "framework": "megatron-lm",
    "cluster": {"nodes": {"dgx-a100-80g": 2}},
    "search": {"simulate": 4},
    "layout": {"recompute": "selective", "micro_batch": 2},
    "what_if": [
        {"name": "same", "set": {"training.global_batch": 64}},
        {"name": "half the batch", "set": {"training.global_batch": 32}},
        {"name": "H100", "set": {"cluster.nodes": {"hgx-h100": 2}}},
    ],
}


def with_h100() -> dict[str, Any]:
    return SCENARIO | {"cluster": {"nodes": {"hgx-h100": 2}}, "what_if": []}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(question(SCENARIO, "small"), workers=1)


def test_a_plan_carries_the_interval_of_its_kind(plan: Plan) -> None:
    asked = question(SCENARIO, "small")
    assert kind_of(asked) == MANY
    interval = interval_of(asked)
    for candidate in plan.ranking:
        found = candidate.prediction
        assert (found.low_s, found.high_s) == pytest.approx((found.step_s * interval.low, found.step_s * interval.high))
        assert found.kind == interval.kind
    assert plan.ratio == interval.ratio
    assert "intervals" in plan.digests


def test_ties_are_judged_by_ratios(plan: Plan) -> None:
    asked = question(SCENARIO, "small")
    first, last = plan.ranking[0].prediction.step_s, plan.ranking[-1].prediction.step_s
    assert tied(asked, plan.ranking, 0.0) == 1
    assert tied(asked, plan.ranking, math.log(last / first) + 1e-9) == len(plan.ranking)
    assert plan.tied == sum(each.prediction.step_s <= first * math.exp(plan.ratio) for each in plan.ranking)
    counts = [tied(asked, plan.ranking, ratio) for ratio in (0.0, 0.02, 0.1, 0.3, 1.0)]
    assert counts == sorted(counts)
    # Whichever of two stands first, they are a tie or they are not.
    two = [plan.ranking[0], plan.ranking[-1]]
    apart = abs(math.log(last / first))
    for ratio in (apart * 0.99, apart * 1.01):
        backwards = abs(math.log(first / last)) <= ratio
        assert (tied(asked, two, ratio) == 2) == backwards
    for other in plan.against:
        theirs = next(each for each in plan.best_of_family if each.family == other.family)
        assert other.tie == (math.log(theirs.prediction.step_s / first) <= plan.ratio)
        assert ("are a tie" in other.reason) == other.tie


def test_what_the_screen_says_of_ties(plan: Plan) -> None:
    (line,) = ties(replace(plan, tied=3, ratio=math.log(1.1)))
    assert line == "Tie: layouts 1 to 3 are closer than the model can tell apart (±10 %); the first is predicted best."
    (line,) = ties(replace(plan, tied=2))
    assert "layouts 1 and 2 are" in line
    (line,) = ties(replace(plan, tied=1))
    assert line.startswith("No tie")
    assert ties(replace(plan, ratio=0.0)) == [], "plans of before say nothing"


def test_levers_below_the_repeats_are_said_to_be(plan: Plan) -> None:
    told = {lever.resource: lever.told for lever in plan.levers}
    gains = {lever.resource: lever.gain for lever in plan.levers}
    limit = math.expm1(interval_of(question(SCENARIO, "small")).repeats)
    assert told == {name: gain > limit for name, gain in gains.items()}
    all_small = replace(plan, levers=tuple(replace(lever, told=False) for lever in plan.levers))
    assert "less than runs of one layout differ by" in levers(all_small)
    assert "shortens" not in levers(all_small)


def test_what_ifs_say_when_they_change_nothing(plan: Plan) -> None:
    same, half, other_device = plan.what_if
    assert not same.told
    assert "less than the model can tell" in same.change
    assert half.told
    assert "less than" not in half.change
    # The errors of two kinds of devices have nothing in common: a tenth is too little to tell.
    today, then = question(SCENARIO, "small"), question(with_h100(), "small")
    winner = plan.ranking[0]
    step_s = winner.prediction.step_s
    for factor, told in ((0.9, False), (0.2, True)):
        other = replace(winner, prediction=replace(winner.prediction, step_s=step_s * factor))
        assert what_if_result("x", {}, then, [other], winner, today).told == told
    other = replace(winner, prediction=replace(winner.prediction, step_s=step_s * 0.9))
    assert what_if_result("x", {}, today, [other], winner, today).told
    assert other_device.step_s is not None


def test_another_layout_that_hardly_wins_is_a_tie(plan: Plan) -> None:
    asked = question(SCENARIO, "small")
    winner, second = plan.ranking[:2]
    faster = replace(second, prediction=replace(second.prediction, step_s=winner.prediction.step_s * 0.99))
    found = what_if_result("x", {}, asked, [faster, winner], winner, asked)
    assert "another layout wins by 1.0% (a tie)" in found.change
    assert not found.told
    much = replace(second, prediction=replace(second.prediction, step_s=winner.prediction.step_s * 0.3))
    found = what_if_result("x", {}, asked, [much, winner], winner, asked)
    assert "(a tie)" not in found.change
    assert what_if_result("x", {}, None, [], winner, asked).change == "nothing fits"


def test_digits_are_those_that_the_interval_supports() -> None:
    assert with_interval(15.93, 13.6, 22.9) == "16 (14-23) s"
    assert with_interval(0.04512, 0.0446, 0.0457) == "45.1 (44.6-45.7) ms"
    assert with_interval(3.2149, 3.2149, 3.2149) == "3.215 s"


def test_the_sure_line_names_the_kind_and_the_reasons(plan: Plan) -> None:
    found = replace(plan.prediction, kind="k: 9 rows", outside=(Outside.more_ranks, Outside.memory_nearly_full))
    line = sureness(found)
    assert "(k: 9 rows)" in line
    assert line.endswith(
        "Outside of what is covered: more ranks than in any validated run; memory within 5 % of the device's."
    )
    assert "Outside" not in sureness(replace(found, outside=()))


def reasons(tmp_path: Path, **changed: Any) -> set[Outside]:
    """Of the best layout of SCENARIO with some keys changed."""
    tree = {key: value for key, value in SCENARIO.items() if key != "what_if"} | changed
    return set(make_plan(question(tree, "changed"), workers=1).prediction.outside)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"layout": {"sync": "parameter-server", "micro_batch": 2}}, Outside.unvalidated_scheme),
        ({"cluster": {"nodes": {"dgx-a100-80g": 640}}, "training": SCENARIO["training"] | {"global_batch": 10240}},
         Outside.more_ranks),
        # Its host's times are estimates, its memory is measured.
        ({"framework": "megatron-core"}, Outside.estimated_framework),
    ],
)  # fmt: skip
def test_reasons_are_found(tmp_path: Path, changed: dict[str, Any], reason: Outside) -> None:
    assert reason not in reasons(tmp_path)
    assert reason in reasons(tmp_path, **changed)


@pytest.mark.parametrize(
    ("own", "nodes", "expected"),
    [
        (measured_steps(1, 1, 1, 1), 2, {Outside.calibrated_on_one_node, Outside.estimated_framework}),
        (measured_steps(1, 1, 1, 1), 1, {Outside.estimated_framework}),
        (measured_steps(2, 2, 4, 4), 1, {Outside.calibrated_on_several_nodes, Outside.estimated_framework}),
        (measured_steps(2, 2, 4, 4, fitted=True), 2, set()),
        (measured_steps(1, 1, 2, 2, fitted=True), 2, set()),
    ],
)
def test_where_a_calibration_ends_is_said(
    own: Calibration, nodes: int, expected: set[Outside], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.save(own, tmp_path / "hwprofiles" / "calibrations" / f"{own.name}.yaml")
    monkeypatch.chdir(tmp_path)
    tree = {**SCENARIO, "framework": "megatron-core", "cluster": {"nodes": {"dgx-a100-80g": nodes}}, "what_if": []}
    asked = question(tree, "own")
    plan = make_plan(asked, workers=1)
    about = {Outside.calibrated_on_one_node, Outside.calibrated_on_several_nodes, Outside.estimated_framework}
    assert set(plan.prediction.outside) & about == expected
    there = sum((each.worker_nodes or 0) > 1 if nodes > 1 else each.worker_nodes == 1 for each in own.steps)
    assert plan.prediction.kind.startswith("calibrated") == (there >= 3)


def test_collectives_of_a_node_that_nobody_measured_are_a_reason() -> None:
    from clustersim.program.lower import lower

    asked = question(SCENARIO | {"layout": {"tp": 8, "pp": 1, "micro_batch": 2}, "what_if": []}, "small")
    layout = make_plan(asked, workers=1).layout
    program = lower(asked.workload, layout, asked.framework, 8)
    machine = asked.cluster.workers[0]
    for measured in (True, False):
        node = machine if measured else replace(machine, collectives=None)
        here = replace(asked, cluster=replace(asked.cluster, workers=(node,)))
        found = outside_of(here, layout, program, memory_bytes=1.0, coverage=1.0)
        assert (Outside.unmeasured_collectives in found) != measured


def test_memory_near_the_edge_is_a_reason(plan: Plan) -> None:
    from clustersim.program.lower import lower

    asked = question(SCENARIO, "small")
    program = lower(asked.workload, plan.layout, asked.framework, 8)
    for used, said, over in ((0.94, False, False), (0.96, True, False), (1.0, True, False), (1.01, False, True)):
        capacity = asked.cluster.workers[0].device.memory_bytes  # type: ignore[union-attr]
        found = outside_of(asked, plan.layout, program, memory_bytes=used * capacity, coverage=0.5)
        assert (Outside.memory_nearly_full in found) == said
        assert (Outside.memory_beyond in found) == over
        assert Outside.few_measured_kernels in found
    assert "tensor parallel" in schemes_of(replace(plan.layout, mesh=replace(plan.layout.mesh, tp=2)))


def test_intervals_of_the_working_folder_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure of the file moves an answer."""
    shipped = load_intervals()
    asked = question(SCENARIO, "small")
    before = interval_of(asked)
    monkeypatch.chdir(tmp_path)

    def now(changed: Intervals) -> Any:
        files.save(changed, tmp_path / "hwprofiles" / "intervals.yaml")
        return interval_of(asked)

    kinds = tuple(
        replace(each, low=each.low * 0.5, high=each.high * 2.0, rows=each.rows + 1) for each in shipped.measured.kinds
    )
    assert now(replace(shipped, measured=replace(shipped.measured, margin=1.5))).high > before.high
    assert now(replace(shipped, measured=replace(shipped.measured, ratio=1.9))).ratio > before.ratio
    changed = now(replace(shipped, measured=replace(shipped.measured, kinds=kinds)))
    assert changed.low < before.low < before.high < changed.high
    assert changed.kind != before.kind
    assert now(replace(shipped, repeats=5.0)).low == pytest.approx(0.2)
    now(replace(shipped, most_ranks=4, schemes=()))
    found = make_plan(question({**SCENARIO, "what_if": []}, "small"), workers=1).prediction.outside
    assert {Outside.more_ranks, Outside.unvalidated_scheme} <= set(found)


def test_commands_say_the_interval(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files.save(plan, "small.plan.json")
    assert run(["simulate", "small.plan.json", "-q"]) == 0
    assert "90 % interval" in capsys.readouterr().out
    assert run(["simulate", "small.plan.json", "-q", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["low_s"] < document["step_s"] < document["high_s"]
    assert document["kind"] == plan.prediction.kind
    assert document["outside"] == [reason.value for reason in plan.prediction.outside]
    assert Comparison.__dataclass_fields__["interval_s"].default is None


def test_compare_says_whether_the_run_lies_in_the_interval() -> None:
    from rich.console import Console

    from clustersim.compare import Figure
    from clustersim.report.compare_screen import compare_screen

    def said(interval: tuple[float, float] | None) -> str:
        step = Figure(predicted_s=1.0, measured_s=1.2, low_s=1.1, high_s=1.3, samples=3, error=1 / 1.2 - 1.0)
        found = Comparison(
            step=step, exposed=step, phases=(), ops=(), joined_ops=1.0, joined_time=1.0, predicted_only=(),
            measured_only=(), interval_s=interval,
        )  # fmt: skip
        console = Console(width=120, file=io.StringIO())
        with console.capture() as captured:
            console.print(compare_screen("run", found))
        return captured.get()

    assert "inside the 90 % interval 1.00 (0.90-1.50) s" in said((0.9, 1.5))
    assert "outside the 90 % interval" in said((0.9, 1.1))
    assert "interval" not in said(None)
