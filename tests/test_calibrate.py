"""calibrate(): constants recovered from runs that the simulator made with other constants, and noise."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from clustersim import files
from clustersim.calibrate.constants import RUN_CONSTANTS
from clustersim.calibrate.runs import calibrate
from clustersim.compare import Run
from clustersim.errors import InputError
from clustersim.hardware.calibration import (
    Calibration,
    ConstantName,
    ScaleConstant,
    TimeConstant,
    calibration_name,
    constant_of,
    find_calibration,
    with_constant,
)
from clustersim.hardware.framework import Framework
from clustersim.layout.layout import (
    AllReduce,
    Bsp,
    Layout,
    Mesh,
    ParameterServer,
    Pipeline,
    Precision,
    Scheme,
    SyncRule,
)
from clustersim.program.lower import lower
from clustersim.scenario.load import question
from clustersim.scenario.question import Question
from clustersim.simulate.simulate import simulate
from clustersim.timeline import RankClass, Span, Timeline

TRUE: dict[ConstantName, float] = {
    "compute_scale": 1.3,
    "network_scale": 1.6,
    "overlap.compute_slowdown": 1.25,
    "host.per_layer_forward": 1.5e-3,
    "host.per_layer_backward": 2.5e-3,
    "host.per_micro_batch": 1.4e-3,
    "host.per_step": 6e-3,
    "host.per_collective": 400e-6,
}


def asked(layers: int, hidden: int, batch: int = 32) -> Question:
    return question(
        {
            "schema_version": 1,
            "name": "small",
            "model": {"layers": layers, "hidden": hidden, "heads": hidden // 64, "vocab": 1024},
            "training": {"global_batch": batch, "sequence": 512, "precision": "fp16"},
            "cluster": {"nodes": {"p3-2xlarge": 4}, "servers": {"cpu-server-100g": "0..2"}},
        },
        "small",
    )


def laid_out(dp: int, scheme: Scheme, micro_batch: int) -> Layout:
    return Layout(
        mesh=Mesh(dp=dp, tp=1, pp=1),
        micro_batch=micro_batch,
        sequence_parallel=False,
        pipeline=Pipeline(schedule="1f1b", virtual_stages=1, boundaries=(0,)),
        recompute="none",
        precision=Precision(compute="fp16", gradient="fp32", optimizer="fp32"),
        order="tp-dp-pp",
        sync=(SyncRule(reduce_in_node=False, scheme=scheme),),
    )


RING = AllReduce(algorithm="ring", bucket_bytes=8e6, overlap=True)
LATE_RING = AllReduce(algorithm="ring", bucket_bytes=1e6, overlap=False)
SERVED = ParameterServer(
    dedicated=2, colocated=0, dedicated_parts=1, colocated_parts=0, consistency=Bsp(), bucket_bytes=8e6,
    partition_bytes=4e6, optimizer_at="server",
)  # fmt: skip


def measured(asked: Question, layout: Layout, framework: Framework, noise: float, seed: int, steps: int = 5) -> Run:
    """What a machine with the constants of `framework` measures: every op of every rank off by a random factor."""
    program = lower(asked.workload, layout, asked.framework, asked.cluster.devices_per_node)
    simulated = simulate(program, asked.cluster, framework)
    clean = simulated.timeline()
    rng = random.Random(seed)
    spans, step_s, base = [], [], 0.0
    for step in range(steps):
        for span in clean.spans:
            took = (span.end_s - span.start_s) * math.exp(rng.gauss(0.0, noise))
            rank = next(c.members[0] for c in clean.classes if c.rank == span.rank)
            spans.append(
                Span(
                    op=span.op._replace(step=step), rank=rank, start_s=base + span.start_s,
                    end_s=base + span.start_s + took, ready_s=base + span.ready_s, resource=span.resource,
                )
            )  # fmt: skip
        step_s.append(simulated.step_s * math.exp(rng.gauss(0.0, noise)))
        base += 2 * simulated.step_s
    ranks = sorted({span.rank for span in spans})
    return Run(
        clustersim="test", program_digest=files.digest(program), backend="gloo", device="test", ranks=len(ranks),
        environment={}, warmup_steps=0, step_s=tuple(step_s), losses=(),
        timeline=Timeline(
            source="measured", steps=steps,
            classes=tuple(RankClass(rank=r, label=f"rank {r}", members=(r,)) for r in ranks), spans=tuple(spans),
        ),
    )  # fmt: skip


def changed(framework: Framework, constants: dict[ConstantName, float]) -> Framework:
    for name, value in constants.items():
        framework = with_constant(framework, name, value)
    return framework


def value(constant: ScaleConstant | TimeConstant) -> float:
    return constant.value if isinstance(constant, ScaleConstant) else constant.value_s


def error(constant: ScaleConstant | TimeConstant) -> float | None:
    return constant.uncertainty if isinstance(constant, ScaleConstant) else constant.uncertainty_s


SIZES = ((4, 256), (8, 2048))
LAYOUTS = ((1, RING, 4), (1, RING, 16), (4, RING, 8), (2, LATE_RING, 4), (4, SERVED, 4))


@pytest.fixture(scope="module")
def runs() -> list[tuple[Question, Layout, Run]]:
    found = []
    for size in SIZES:
        small = asked(*size)
        machine = changed(small.framework, TRUE)
        for number, (dp, scheme, micro_batch) in enumerate(LAYOUTS):
            layout = laid_out(dp, scheme, micro_batch)
            found.append((small, layout, measured(small, layout, machine, 0.01, 100 * size[0] + size[1] + number)))
    return found


def test_known_constants_are_recovered_within_their_uncertainty(runs: list[tuple[Question, Layout, Run]]) -> None:
    found = calibrate(runs)
    by_name = {constant.name: constant for constant in found.calibration.constants}
    assert set(by_name) == set(RUN_CONSTANTS)
    for name, true in TRUE.items():
        constant = by_name[name]
        assert constant.identified, constant
        spread = error(constant)
        assert spread is not None
        assert spread < 0.35 * true
        assert abs(value(constant) - true) < 3.5 * spread + 0.005 * true, constant
        assert constant_of(found.framework, name) == value(constant)
        assert found.framework.calibrated[name].method == "fitted"
    assert found.calibration.mean_error_before > 0.15
    assert found.calibration.mean_error_after < 0.02
    assert found.calibration.mean_error_left_out < 0.03
    assert len(found.calibration.runs) == len(runs)


def test_what_the_runs_do_not_show_keeps_its_value(runs: list[tuple[Question, Layout, Run]]) -> None:
    alone = [(asked, layout, run) for asked, layout, run in runs if layout.mesh.dp == 1]
    found = calibrate(alone)
    before = alone[0][0].framework
    by_name = {constant.name: constant for constant in found.calibration.constants}
    for name in ("network_scale", "overlap.compute_slowdown", "host.per_collective"):
        constant = by_name[name]
        assert not constant.identified
        assert constant.status == "kept"
        assert error(constant) is None
        assert value(constant) == constant_of(before, name)
        assert name not in found.framework.calibrated
    assert by_name["compute_scale"].identified
    assert by_name["compute_scale"].value == pytest.approx(TRUE["compute_scale"], rel=0.05)  # type: ignore[union-attr]


def test_a_host_that_is_never_waited_for_leaves_no_trace() -> None:
    pairs = []
    for hidden in (1024, 2048):
        small = asked(4, hidden)
        # Launching a layer's kernels one by one takes this device's host longer.
        machine = with_constant(small.framework, "host.per_layer_forward", 0.9e-3)
        for number, micro_batch in enumerate((4, 8, 16)):
            layout = laid_out(1, RING, micro_batch)
            pairs.append((small, layout, measured(small, layout, machine, 0.01, hidden + number)))
    found = {constant.name: constant for constant in calibrate(pairs).calibration.constants}["host.per_layer_forward"]
    assert not found.identified
    assert value(found) == pairs[0][0].framework.host.per_layer_forward_s


def test_one_program_cannot_tell_eight_constants_apart(runs: list[tuple[Question, Layout, Run]]) -> None:
    found = calibrate(runs[:1])
    assert sum(constant.identified for constant in found.calibration.constants) <= 2


def test_a_profile_that_is_right_stays(runs: list[tuple[Question, Layout, Run]]) -> None:
    small = asked(8, 1024)
    pairs = []
    for number, (dp, scheme, micro_batch) in enumerate(LAYOUTS):
        layout = laid_out(dp, scheme, micro_batch)
        pairs.append((small, layout, measured(small, layout, small.framework, 0.01, number)))
    found = calibrate(pairs)
    assert found.calibration.mean_error_before < 0.02
    assert found.calibration.mean_error_after < 0.02
    assert found.framework.compute_scale == pytest.approx(1.0, abs=0.05)
    assert found.framework.network_scale == pytest.approx(1.0, abs=0.1)


def test_a_calibration_is_a_file_and_resolve_applies_it(
    runs: list[tuple[Question, Layout, Run]], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    calibration = calibrate(runs[:3]).calibration
    path = tmp_path / "hwprofiles" / "calibrations" / f"{calibration.name}.yaml"
    files.save(calibration, path)
    assert files.load(Calibration, path) == calibration
    before = asked(4, 256)
    assert f"calibrations/{calibration.name}" not in before.digests
    monkeypatch.chdir(tmp_path)
    assert find_calibration(["p3-2xlarge"], "clustersim") == calibration
    after = asked(4, 256)
    assert after.framework == calibration.applied(before.framework)
    assert after.digests[f"calibrations/{calibration.name}"] == files.digest(calibration)
    assert find_calibration(["p3-2xlarge"], "megatron-lm") is None


def test_the_name_does_not_depend_on_order() -> None:
    assert calibration_name(["b", "a", "b"], "f") == "a+b--f"


def test_bad_runs_are_refused(runs: list[tuple[Question, Layout, Run]]) -> None:
    with pytest.raises(InputError, match="at least one run"):
        calibrate([])
    small, layout, run = runs[0]
    with pytest.raises(InputError, match="another program"):
        calibrate([(small, layout, replace(run, program_digest="0" * 64))])
    other = replace(small, framework=with_constant(small.framework, "compute_scale", 2.0))
    with pytest.raises(InputError, match="constants that differ"):
        calibrate([runs[0], (other, layout, run)])


def test_per_collective_delays_every_message(runs: list[tuple[Question, Layout, Run]]) -> None:
    small = asked(4, 1024)
    for scheme in (LATE_RING, SERVED):
        layout = laid_out(4, scheme, 8)
        program = lower(small.workload, layout, small.framework, small.cluster.devices_per_node)
        before = simulate(program, small.cluster, with_constant(small.framework, "host.per_collective", 0.0))
        after = simulate(program, small.cluster, with_constant(small.framework, "host.per_collective", 1e-3))
        assert after.step_s > before.step_s + 1e-3
