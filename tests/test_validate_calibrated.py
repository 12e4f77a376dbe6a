"""Calibrating on a few measured steps: constants recovered from steps that the simulator made, and what is scored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from clustersim import files
from clustersim.app.door import run
from clustersim.calibrate.constants import STEP_PRIORS
from clustersim.calibrate.steps import Step, calibrate_steps, configurations, fit_nested, fit_steps, simulated_s
from clustersim.errors import InputError
from clustersim.hardware.calibration import Calibration, ConstantName, constant_of, with_constant
from clustersim.hardware.framework import Framework
from clustersim.validate.calibrated import step_of, validate_calibrated
from clustersim.validate.case import Case
from clustersim.validate.configurations import configuration, repeats, spread_out
from clustersim.validate.family import Family, Rows
from clustersim.validate.rows import Row
from clustersim.validate.score import Scored, score
from clustersim.validate.sources import Learned, leave_sources_out, with_learned
from clustersim.validate.training_rows import training_case

CELLS = {
    "gpu": "A100-SXM4-80GB", "gpus": "16", "inter_node": "8x200Gb/s HDR InfiniBand", "heads": "16", "vocab": "51200",
    "seq_len": "1024", "tp": "1", "pp": "1", "mbs": "4", "gbs": "64", "shard": "none", "recompute": "full",
    "precision": "fp16", "framework": "Megatron-LM", "sec_per_iter": "1",
}  # fmt: skip
# Launch-bound and compute-bound, with tensor parallelism and without, in one node and in several.
SHAPES = [
    ("24", "1024", "1", "1"), ("24", "4096", "1", "2"), ("12", "6144", "8", "4"), ("24", "1024", "2", "1"),
    ("12", "4096", "4", "8"), ("16", "2048", "1", "4"), ("24", "6144", "8", "1"), ("12", "1024", "1", "2"),
    ("16", "4096", "2", "4"), ("24", "2048", "4", "4"),
]  # fmt: skip
TRUE: dict[ConstantName, float] = {
    "compute_scale": 1.2, "scales.tensor_parallel": 2.0, "host.per_layer_forward": 1.2e-3,
    "host.per_layer_backward": 2.0e-3,
}  # fmt: skip


def case_of(name: str, **changed: str) -> Case:
    found = training_case(Row(line=2, cells={**CELLS, "id": name, **changed}))
    assert isinstance(found, Case), found
    return found


def shaped(number: int) -> Case:
    layers, hidden, tp, size = SHAPES[number]
    heads = str(int(hidden) // 64)
    return case_of(f"row{number}", layers=layers, hidden=hidden, tp=tp, mbs=size, heads=heads)


def true(framework: Framework) -> Framework:
    for name, value in TRUE.items():
        framework = with_constant(framework, name, value)
    return framework


def made(case: Case) -> tuple[Case, Step]:
    """The case as a machine with the constants of TRUE would measure it."""
    step = step_of(case)
    assert isinstance(step, Step), step
    seconds = simulated_s(step, true(step.framework))
    return replace(case, measured_s=seconds), replace(step, measured_s=seconds)


@pytest.fixture(scope="module")
def rows() -> list[tuple[Case, Step]]:
    return [made(shaped(number)) for number in range(len(SHAPES))]


def test_constants_of_few_steps_are_recovered_or_kept(rows: list[tuple[Case, Step]]) -> None:
    steps = [step for _, step in rows[:8]]
    found = calibrate_steps(steps, "rows.csv")
    before = steps[0].framework
    after = found.applied(before)
    by_name = {constant.name: constant for constant in found.constants}
    assert set(by_name) == set(STEP_PRIORS)
    assert by_name["compute_scale"].identified
    assert after.compute_scale == pytest.approx(TRUE["compute_scale"], rel=0.05)
    # The rows show the sum of forward, recomputed forward and backward; what each of them takes rests on the prior.
    driven = [2.0 * h.per_layer_forward_s + h.per_layer_backward_s for h in (after.host, true(before).host)]
    assert driven[0] == pytest.approx(driven[1], rel=0.1)
    for name, constant in by_name.items():
        assert constant.status in ("fitted", "kept")
        if not constant.identified:
            assert constant_of(after, name) == constant_of(before, name)
            assert name not in after.calibrated
    assert not by_name["scales.attention"].identified
    assert found.mean_error_before > 0.12
    assert found.mean_error_after < 0.03
    assert found.provenance.rows == 8


def test_one_odd_row_does_not_decide(rows: list[tuple[Case, Step]]) -> None:
    steps = [step for _, step in rows[:8]]
    odd = [replace(steps[0], measured_s=2.0 * steps[0].measured_s), *steps[1:]]
    clean, disturbed = (dict(zip(f.names, f.solution.values, strict=True)) for f in map(fit_steps, (steps, odd)))
    assert disturbed["compute_scale"] == pytest.approx(clean["compute_scale"], abs=0.03)


def test_right_constants_are_kept_as_shipped_though_some_rows_are_odd(rows: list[tuple[Case, Step]]) -> None:
    steps = [
        replace(
            step, measured_s=simulated_s(step, step.framework) * (1.9 if number == 3 else 1.0 + 0.01 * (-1) ** number)
        )
        for number, (_, step) in enumerate(rows[:8])
    ]
    found = fit_nested(steps)
    assert found.free == "none"
    assert found.names == ()
    assert found.change(steps[0].framework) == steps[0].framework
    kept = calibrate_steps(steps, "rows.csv")
    assert {constant.status for constant in kept.constants} == {"kept"}
    assert {constant.name for constant in kept.constants} == set(STEP_PRIORS)


def test_the_smallest_sufficient_set_of_constants_is_free(rows: list[tuple[Case, Step]]) -> None:
    steps = [
        replace(step, measured_s=simulated_s(step, replace(step.framework, compute_scale=1.4)) * 1.01 ** (-1) ** number)
        for number, (_, step) in enumerate(rows)
        if "1024" not in str(step.question.workload.model.hidden)
    ]
    one = fit_nested(steps)
    assert one.free == "compute_scale"
    assert one.change(steps[0].framework).compute_scale == pytest.approx(1.4, rel=0.05)
    assert one.inner["none"] > 0.2 > one.inner["compute_scale"]
    several = fit_nested([step for _, step in rows])
    assert several.free == "all"


def test_the_price_of_misaligned_products_is_found(rows: list[tuple[Case, Step]]) -> None:
    steps = []
    for heads, size in (("32", "1"), ("32", "2"), ("32", "4"), ("40", "1"), ("40", "2"), ("40", "4")):
        # 4,800 columns in 32 heads of 150 or 40 of 120.
        step = step_of(case_of(f"{heads}-{size}", layers="4", hidden="4800", heads=heads, mbs=size))
        assert isinstance(step, Step)
        true_scale = with_constant(step.framework, "scales.misaligned", 1.8)
        steps.append(replace(step, measured_s=simulated_s(step, true_scale)))
    found = fit_nested(steps)
    assert found.free == "kernels"
    assert found.change(steps[0].framework).scales.misaligned == pytest.approx(1.8, rel=0.1)


def test_constants_that_trade_are_told(rows: list[tuple[Case, Step]]) -> None:
    """Where the host is waited for in every pass, only the sum of what it takes forward and backward shows."""
    steps = [step for case, step in rows if "1024" in str(case.scenario["model"]["hidden"])]
    pairs = {(trade.one, trade.other): trade.correlation for trade in fit_steps(steps).trades}
    assert pairs["host.per_layer_forward", "host.per_layer_backward"] < -0.95


def test_rows_are_chosen_by_what_was_asked_and_not_by_what_was_measured(rows: list[tuple[Case, Step]]) -> None:
    steps = [step for _, step in rows]
    chosen = spread_out(steps, 5)
    assert len(set(chosen)) == 5
    assert spread_out([replace(step, measured_s=9.0 / (1 + i)) for i, step in enumerate(steps)], 5) == chosen
    # Each of them stands for itself; rows of one configuration for each other.
    assert sorted(spread_out(steps, 99)) == list(range(len(steps)))
    assert len(spread_out([steps[0]] * 4 + [steps[1]], 4)) == 2


def test_repeats_are_measured_where_a_source_repeats(rows: list[tuple[Case, Step]]) -> None:
    one, two = rows[0][0], rows[1][0]
    assert repeats([one, two]) is None
    again = [replace(one, id=str(f), measured_s=f * one.measured_s) for f in (0.9, 1.0, 1.1)]
    found = repeats([*again, two])
    assert found is not None
    assert (found.rows, found.configurations) == (3, 1)
    assert found.spread == pytest.approx(0.2 / 3)
    assert configuration(again[0]) != configuration(two)


def test_what_was_calibrated_on_is_not_scored(rows: list[tuple[Case, Step]]) -> None:
    repeated = [replace(rows[9][0], id="again", scenario={**rows[9][0].scenario, "name": "again"})]
    several = [case for case, _ in rows] + [
        made(case_of(f"more{gbs}-{tp}", layers="12", hidden="2048", gbs=gbs, tp=tp, heads="32"))[0]
        for gbs in ("64", "128", "256") for tp in ("1", "2")
    ]  # fmt: skip
    cases = tuple(several + repeated)
    (found,) = validate_calibrated([(Rows(name="made", cases=cases, unmapped=()), None)], 6, lambda _: None)
    assert (found.method, found.k) == ("k rows", 6)
    assert found.shipped is not None
    assert found.calibrated is not None
    known = {configuration(case) for case in cases if case.id in found.fitted_on}
    assert all(configuration(row.case) not in known for row in found.rows)
    assert found.calibrated.n == found.shipped.n == sum(configuration(case) not in known for case in cases)
    assert found.shipped.mean > 0.15
    assert found.calibrated.mean < 0.05


def test_small_sources_leave_one_configuration_out(rows: list[tuple[Case, Step]]) -> None:
    small = tuple(case for case, _ in rows[:4])
    few = tuple(replace(case, id=f"few{i}") for i, (case, _) in enumerate(rows[:2]))
    sets = [(Rows(name="small", cases=small, unmapped=()), None), (Rows(name="few", cases=few, unmapped=()), None)]
    one, other = validate_calibrated(sets, 8, lambda _: None)
    assert (one.method, one.k, other.method) == ("leave-one-out", 3, "too few")
    assert one.shipped is not None
    assert one.calibrated is not None
    assert one.calibrated.n == 4
    assert one.calibrated.mean < one.shipped.mean
    assert other.calibrated is None


def test_only_what_a_profile_learned_from_rows_is_replaced(rows: list[tuple[Case, Step]]) -> None:
    plain = rows[0][1].framework
    fitted = replace(plain.provenance, method="fitted", source="rows")
    what = Learned(per_layer_s=9e-4, per_layer_identified=True, jitter=0.05, jitter_identified=True)
    untouched = replace(plain, calibrated={})
    assert with_learned(untouched, what) == untouched
    found = with_learned(replace(plain, calibrated={"jitter": fitted}), what)
    assert (found.jitter, found.host) == (0.05, plain.host)
    found = with_learned(replace(plain, calibrated={"host": fitted}), what)
    assert (found.jitter, found.host.per_layer_forward_s, found.host.per_layer_backward_s) == (plain.jitter, 9e-4, 9e-4)


def test_a_source_is_predicted_with_what_the_others_say() -> None:
    # Every source is launch-bound, the third on a machine half as fast.
    sets = []
    for name, slower in (("one", 1.0), ("two", 1.0), ("three", 2.0)):
        family = Family(name=name, title=name, file="", source=f"{name}, a table", licence="")
        cases = []
        for layers, tp, hidden in (("24", "1", "1024"), ("16", "1", "1024"), ("8", "2", "6144"), ("12", "4", "8192")):
            heads = str(int(hidden) // 64)
            case = case_of(f"{name}{layers}", layers=layers, hidden=hidden, tp=tp, mbs="2", heads=heads)
            step = step_of(case)
            assert isinstance(step, Step)
            there = replace(step.framework, compute_scale=slower, jitter=0.0)
            host = replace(there.host, per_layer_forward_s=1.2e-3, per_layer_backward_s=1.2e-3)
            cases.append(replace(case, measured_s=simulated_s(step, replace(there, host=host))))
        sets.append((Rows(name=name, cases=tuple(cases), unmapped=()), family))
    first, second, _ = leave_sources_out(sets, lambda _: None)
    assert (first.source, first.others, first.fitted) == ("one", ("two", "three"), 8)
    assert (second.source, second.families) == ("two", ("two",))
    assert first.learned.per_layer_identified
    assert first.learned.per_layer_s == pytest.approx(1.2e-3, rel=0.2)
    assert first.left_out.mean < first.shipped.mean
    assert leave_sources_out(sets[:1], lambda _: None) == ()


def test_what_no_other_source_shows_is_what_is_known_in_general(rows: list[tuple[Case, Step]]) -> None:
    """Wide layers never wait for the host."""
    sets = []
    for name, several in (("one", rows[:2]), ("two", rows[2:3])):
        family = Family(name=name, title=name, file="", source=f"{name}, a table", licence="")
        sets.append((Rows(name=name, cases=tuple(case for case, _ in several), unmapped=()), family))
    first, _ = leave_sources_out(sets, lambda _: None)
    assert not first.learned.per_layer_identified
    assert first.learned.per_layer_s == pytest.approx(4e-4)
    assert (first.learned.jitter, first.learned.jitter_identified) == (0.0, False)


def test_the_scoreboard_is_as_shipped_though_the_user_has_calibrated(
    rows: list[tuple[Case, Step]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = rows[2][0]
    before = score(case)
    own = calibrate_steps([step for _, step in rows[:8]], "rows.csv")
    files.save(own, tmp_path / "hwprofiles" / "calibrations" / f"{own.name}.yaml")
    monkeypatch.chdir(tmp_path)
    shipped, calibrated = score(case), score(case, calibrated=True)
    assert isinstance(before, Scored)
    assert isinstance(calibrated, Scored)
    assert shipped == before
    assert calibrated.predicted_s > 1.1 * before.predicted_s
    step = step_of(case)
    assert isinstance(step, Step)
    assert step.question.framework.compute_scale == 1.0


def test_rows_of_two_clusters_are_refused(rows: list[tuple[Case, Step]]) -> None:
    other = step_of(case_of("core", layers="12", hidden="2048", heads="32", framework="NeMo Megatron-Core"))
    assert isinstance(other, Step)
    with pytest.raises(InputError, match="calibrate each framework"):
        calibrate_steps([rows[0][1], other], "rows.csv")
    with pytest.raises(InputError, match="no row could be predicted"):
        calibrate_steps([], "rows.csv")


def test_copies_of_a_row_are_no_configurations(rows: list[tuple[Case, Step]]) -> None:
    one = rows[0][1]
    for steps, words in (
        ([one], "1 row of 1 configuration; "),
        ([replace(one, name=str(number)) for number in range(4)], "4 rows of 1 configuration; "),
        (
            [step for _, step in rows[:3]],
            "3 rows of 3 configurations; calibrating needs at least 4 different ones: add 1 ",
        ),
    ):
        with pytest.raises(InputError, match=words):
            calibrate_steps(steps, "rows.csv")
    alone = fit_nested([one])
    assert (alone.free, alone.left_out[0]) == ("none", pytest.approx(alone.before[0]))


def test_rows_of_one_configuration_are_left_out_together(rows: list[tuple[Case, Step]]) -> None:
    steps = [step for _, step in rows[:4]]
    # The first is off in a way that no other row shows: only its copies could foretell it.
    steps[0] = replace(steps[0], measured_s=1.5 * steps[0].measured_s)
    copies = [replace(steps[0], name=f"copy{number}") for number in range(3)]
    assert configurations([*steps, *copies]).tolist() == [0, 1, 2, 3, 0, 0, 0]
    found = fit_nested([*steps, *copies])
    assert found.left_out[[0, 4, 5, 6]] == pytest.approx([found.left_out[0]] * 4)
    assert found.free == "none"
    assert abs(fit_steps([*steps, *copies]).left_out[0]) > 0.2
    assert found.inner["none"] == pytest.approx(fit_nested(steps).inner["none"])
    kept = calibrate_steps([*steps, *copies], "rows.csv")
    assert [step.configuration for step in kept.steps] == [0, 1, 2, 3, 0, 0, 0]
    assert {step.worker_nodes for step in kept.steps} == {2}
    assert kept.mean_error_before == pytest.approx(calibrate_steps(steps, "rows.csv").mean_error_before)


def test_the_command_calibrates_on_a_file_of_rows(
    rows: list[tuple[Case, Step]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["id,layers,hidden,tp,mbs,heads,sec_per_iter"]
    for number, (case, _) in enumerate(rows[:6]):
        layers, hidden, tp, size = SHAPES[number]
        lines.append(f"{case.id},{layers},{hidden},{tp},{size},{int(hidden) // 64},{case.measured_s}")
    lines.append("bad,12,1024,3,1,16,1")
    Path("own.csv").write_text("\n".join(lines) + "\n")
    shared = {key: cell for key, cell in CELLS.items() if key not in ("tp", "mbs", "heads", "sec_per_iter")}
    Path("more.yaml").write_text("".join(f"{key}: '{cell}'\n" for key, cell in shared.items()))
    output = Path("hwprofiles/calibrations/dgx-a100-80g--megatron-lm.yaml")
    assert run(["calibrate", "--cases", "own.csv", "--defaults", "more.yaml", "-o", str(output), "-q"]) == 0
    told = capsys.readouterr().out
    assert "6 measured steps" in told
    assert "not identified: kept" in told
    assert "own.csv: left out, line 8: " in told
    assert "plans on one node keep the interval as shipped" in told
    assert "plans on several nodes keep" not in told
    found: Calibration = files.load(Calibration, output)
    assert [step.row for step in found.steps] == [case.id for case, _ in rows[:6]]
    # Of one row, and one that the model refuses, nothing is learned; both are said in one line.
    Path("few.csv").write_text("\n".join([lines[0], lines[1], lines[-1]]) + "\n")
    assert run(["calibrate", "--cases", "few.csv", "--defaults", "more.yaml", "-o", "few.yaml", "-q"]) == 3
    told = capsys.readouterr().err
    assert "1 row of 1 configuration" in told
    assert "left out, line 3: " in told
    assert len(told.strip().splitlines()) == 1
    assert not Path("few.yaml").exists()
    # It is found again here, and the same rows are predicted better.
    errors = []
    for arguments in ([], ["--calibrated"]):
        assert run(["validate", "--cases", "own.csv", "--defaults", "more.yaml", "-q", "--json", *arguments]) == 0
        errors.append(json.loads(capsys.readouterr().out)["families"][0]["summary"]["mean"])
    assert errors[1] < 0.06 < errors[0]
    for arguments, words in (
        (["calibrate"], "PLAN RUN"), (["calibrate", "--defaults", "more.yaml"], "give both"),
        (["calibrate", "a.json", "b.json", "--cases", "own.csv"], "not both"),
        (["validate", "--calibrate", "4", "--cases", "own.csv"], "shipped families"),
        (["validate", "seqsl", "--calibrate", "4"], "no family"),
    ):  # fmt: skip
        assert run([*arguments, "-q"]) == 2
        assert words in capsys.readouterr().err
