"""Predicted against measured step times on this machine: ranks on its cores over gloo.

    python benchmarks/local_accuracy.py [--json FILE] [--profile NAME] [--repeats 4] [--quick]

Two model sizes are for calibration only, two others are for the test; layouts of 1 to 4 ranks, all-reduce and parameter
servers (dedicated and beside workers). Every round runs every layout of every size once, so that calibration and test
see the same drift. A run during which other processes took more than 8 % of the CPU time is repeated, up to
`--patience` times, and the least disturbed one counts. Needs torch (`clustersim[run]`) and Linux. Without `--profile`
the machine is profiled first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustersim import files
from clustersim.calibrate import calibrate
from clustersim.compare import Run, compare, quantile
from clustersim.execute.disturbance import QUIET, Others
from clustersim.execute.execute import run_task
from clustersim.execute.launch import Launcher, cores
from clustersim.execute.probe import Probe, probe
from clustersim.execute.profile_files import write_profiles
from clustersim.execute.task import Task
from clustersim.hardware.calibration import ScaleConstant
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
    describe,
)
from clustersim.program.lower import lower
from clustersim.scenario.load import question
from clustersim.scenario.question import Question
from clustersim.simulate.simulate import simulate

NAME = "benchmark-host"
# (layers, hidden)
CALIBRATION_SIZES = ((3, 128), (4, 256))
TEST_SIZES = ((4, 192), (6, 256))
HEAD_DIM = 64
SEQUENCE = 64
GLOBAL_BATCH = 12
MICRO_BATCH = 3
WARMUP_STEPS = 2
MEASURED_STEPS = 8
MOST_RANKS = 4
GOAL = 0.15


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- layouts


def all_reduce(overlap: bool) -> AllReduce:
    return AllReduce(algorithm="ring", bucket_bytes=4 * 2**20, overlap=overlap)


def served(dedicated: int, colocated: int) -> ParameterServer:
    return ParameterServer(
        dedicated=dedicated,
        colocated=colocated,
        dedicated_parts=1 if dedicated else 0,
        colocated_parts=1 if colocated else 0,
        consistency=Bsp(),
        bucket_bytes=4 * 2**20,
        partition_bytes=2 * 2**20,
        optimizer_at="server",
    )


def layout(dp: int, scheme: Scheme) -> Layout:
    return Layout(
        mesh=Mesh(dp=dp, tp=1, pp=1),
        micro_batch=MICRO_BATCH,
        sequence_parallel=False,
        pipeline=Pipeline(schedule="1f1b", virtual_stages=1, boundaries=(0,)),
        recompute="none",
        precision=Precision(compute="fp32", gradient="fp32", optimizer="fp32"),
        order="tp-dp-pp",
        sync=(SyncRule(reduce_in_node=False, scheme=scheme),),
    )


LAYOUTS = (
    layout(1, all_reduce(False)),
    layout(2, all_reduce(True)),
    layout(2, all_reduce(False)),
    layout(4, all_reduce(True)),
    layout(1, served(1, 0)),
    layout(2, served(2, 0)),
    layout(2, served(0, 2)),
    layout(4, served(0, 4)),
)


def ask(size: tuple[int, int], name: str, framework: str) -> Question:
    """The question of one model size on this host, with server processes beside the workers."""
    layers, hidden = size
    return question(
        {
            "schema_version": 1,
            "name": f"gpt-{layers}x{hidden}",
            "model": {"layers": layers, "hidden": hidden, "heads": hidden // HEAD_DIM, "vocab": 256},
            "training": {"global_batch": GLOBAL_BATCH, "sequence": SEQUENCE, "precision": "fp32"},
            "framework": framework,
            "cluster": {"nodes": {name: 1}, "servers": {name: f"0..{MOST_RANKS}"}},
        },
        "benchmark",
    )


# ------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One layout of one size: its runs, one per round."""

    question: Question
    layout: Layout
    size: tuple[int, int]
    test: bool
    runs: list[Run]

    @property
    def medians(self) -> list[float]:
        """The median step of every run."""
        return [statistics.median(run.step_s) for run in self.runs]

    @property
    def step_s(self) -> float:
        """The median over the runs."""
        return statistics.median(self.medians)


def wait_until_quiet(limit_s: float) -> None:
    """Wait until others leave the CPU alone for a second, at most so long."""
    begin = time.monotonic()
    while time.monotonic() - begin < limit_s:
        others = Others()
        time.sleep(1.0)
        if others.share() < QUIET:
            return


def measure(cases: Sequence[Measured], repeats: int, patience: int) -> list[float]:
    """Round by round, every case once; the sizes of one layout follow each other. How much others disturbed."""
    begin = time.monotonic()
    disturbed: list[float] = []
    with Launcher() as launcher:
        for number in range(repeats):
            for index, case in enumerate(cases):
                tries: list[tuple[float, Run]] = []
                while not tries or (tries[-1][0] > QUIET and len(tries) <= patience):
                    if tries:
                        wait_until_quiet(10.0)
                    others = Others()
                    run = run_task(task_of(case, number), progress=lambda _: None, launcher=launcher)
                    tries.append((others.share(), run))
                share, run = min(tries, key=lambda one: one[0])
                disturbed.append(share)
                case.runs.append(run)
                say(
                    f"[{time.monotonic() - begin:5.0f} s] round {number + 1}/{repeats}, {index + 1}/{len(cases)}: "
                    f"{case.size[0]}x{case.size[1]} {describe(case.layout)}: {case.medians[-1] * 1e3:.1f} ms, "
                    f"others {share:.0%}" + (f" ({len(tries)} tries)" if len(tries) > 1 else "")
                )
    return disturbed


def task_of(case: Measured, seed: int) -> Task:
    program = lower(case.question.workload, case.layout, case.question.framework, MOST_RANKS)
    return Task(
        workload=case.question.workload, layout=case.layout, program=program, program_digest=files.digest(program),
        device_kind="cpu", steps=MEASURED_STEPS, warmup=WARMUP_STEPS, seed=seed, timeout_s=60.0,
        devices_per_node=MOST_RANKS, share_devices=False, weights=None,
    )  # fmt: skip


def profile(folder: Path, quick: bool, patience: int) -> str:
    """Profile this host into `folder`; the name of the framework."""
    tries: list[tuple[float, Probe]] = []
    while not tries or (tries[-1][0] > QUIET and len(tries) <= patience):
        wait_until_quiet(60.0)
        say("profiling this machine")
        others = Others()
        found = probe(quick=quick, ranks=(1, 2, MOST_RANKS), progress=say)
        tries.append((others.share(), found))
        say(f"profiled in {found.took_s:.0f} s; others took {tries[-1][0]:.0%} of the CPU time")
    return write_profiles(min(tries, key=lambda one: one[0])[1], NAME, folder / "hwprofiles").framework


# ------------------------------------------------------------------------------------------------------- scoring


def predicted_s(case: Measured, framework: Framework) -> float:
    program = lower(case.question.workload, case.layout, framework, MOST_RANKS)
    return simulate(program, case.question.cluster, framework).step_s


def ranks_of(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [statistics.mean(i + 1 for i, v in enumerate(ordered) if v == value) for value in values]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.correlation(ranks_of(one), ranks_of(other))


def scored(cases: Sequence[Measured], shipped: Framework, calibrated: Framework) -> dict[str, Any]:
    """Rows per layout, and the summary over them."""
    rows: list[dict[str, Any]] = []
    deviations: list[float] = []
    for case in cases:
        step = case.step_s
        off = [abs(x / step - 1.0) for x in case.medians]
        deviations += off
        before, after = predicted_s(case, shipped), predicted_s(case, calibrated)
        rows.append(
            {
                "model": f"{case.size[0]}x{case.size[1]}",
                "layout": describe(case.layout) + overlapped(case.layout),
                "measured_s": step,
                "low_s": quantile(case.medians, 0.1),
                "high_s": quantile(case.medians, 0.9),
                "repeat_p90": quantile(off, 0.9),
                "profiled_s": before,
                "calibrated_s": after,
                "profiled_error": before / step - 1.0,
                "calibrated_error": after / step - 1.0,
            }
        )
    rankings = []
    for size in dict.fromkeys(case.size for case in cases):
        model = f"{size[0]}x{size[1]}"
        mine = [row for row in rows if row["model"] == model]
        seconds = [float(row["measured_s"]) for row in mine]
        guess = [float(row["calibrated_s"]) for row in mine]
        picked = mine[guess.index(min(guess))]
        rankings.append(
            {
                "model": model,
                "spearman_profiled": spearman([float(row["profiled_s"]) for row in mine], seconds),
                "spearman_calibrated": spearman(guess, seconds),
                "best": mine[seconds.index(min(seconds))]["layout"],
                "picked": picked["layout"],
                "lost_by_picking": float(picked["measured_s"]) / min(seconds) - 1.0,
            }
        )
    repeat = quantile(deviations, 0.9)
    return {
        "rows": rows,
        "rankings": rankings,
        "repeat_p90": repeat,
        "profiled_mean": statistics.mean(abs(float(row["profiled_error"])) for row in rows),
        "calibrated_mean": statistics.mean(abs(float(row["calibrated_error"])) for row in rows),
        "goal": max(GOAL, repeat),
    }


def overlapped(layout: Layout) -> str:
    scheme = layout.scheme
    return (
        ""
        if not isinstance(scheme, AllReduce) or layout.mesh.dp == 1
        else (" overlapped" if scheme.overlap else " after")
    )


def phases(cases: Sequence[Measured], framework: Framework) -> list[dict[str, Any]]:
    """Per layout and phase, predicted against measured seconds of the busiest rank, in the first round."""
    found = []
    for case in cases:
        program = lower(case.question.workload, case.layout, framework, MOST_RANKS)
        timeline = simulate(program, case.question.cluster, framework).timeline()
        comparison = compare(timeline, case.runs[0].timeline, step_s=case.runs[0].step_s)
        row: dict[str, Any] = {"model": f"{case.size[0]}x{case.size[1]}", "layout": describe(case.layout)}
        row["joined_ops"], row["joined_time"] = comparison.joined_ops, comparison.joined_time
        for phase in comparison.phases:
            row[phase.phase] = (phase.seconds.predicted_s, phase.seconds.measured_s)
        row["exposed"] = (comparison.exposed.predicted_s, comparison.exposed.measured_s)
        found.append(row)
    return found


def show(result: dict[str, Any]) -> None:
    """The result as text."""
    print(f"{'model':8} {'layout':44} {'measured':>9} {'p10..p90 of repeats':>20} {'profiled':>16} {'calibrated':>16}")
    for row in result["rows"]:
        print(
            f"{row['model']:8} {row['layout']:44} {row['measured_s'] * 1e3:6.1f} ms "
            f"{row['low_s'] * 1e3:6.1f}..{row['high_s'] * 1e3:6.1f} ({row['repeat_p90']:4.0%}) "
            f"{row['profiled_s'] * 1e3:6.1f} {row['profiled_error']:+7.1%} "
            f"{row['calibrated_s'] * 1e3:8.1f} {row['calibrated_error']:+7.1%}"
        )
    print("busiest rank, predicted/measured in ms:")
    for row in result["phases"]:
        parts = [
            f"{name} {row[name][0] * 1e3:.1f}/{row[name][1] * 1e3:.1f}"
            for name in ("forward", "backward", "synchronise", "update", "exposed")
            if name in row
        ]
        joined = f"joined {row['joined_ops']:.0%} of ops, {row['joined_time']:.0%} of time"
        print(f"  {row['model']:8} {row['layout']:32} {'  '.join(parts)}  {joined}")
    for row in result["constants"]:
        spread = "?" if row["uncertainty"] is None else f"{row['uncertainty']:.3g}"
        print(f"  {row['name']:26} {row['before']:.4g} -> {row['value']:.4g} +- {spread} ({row['status']})")
    print(f"left-out error of the {len(result['calibration_runs'])} calibration programs: {result['left_out']:.1%}")
    for row in result["rankings"]:
        print(
            f"{row['model']}: Spearman {row['spearman_profiled']:.2f} as profiled, "
            f"{row['spearman_calibrated']:.2f} calibrated; picked {row['picked']!r}, best {row['best']!r}: "
            f"{row['lost_by_picking']:.1%} slower"
        )
    print(
        f"other processes took {result['others_median']:.0%} (p90 {result['others_p90']:.0%}) of the CPU time of a run"
    )
    met = "met" if result["calibrated_mean"] <= result["goal"] else "missed"
    print(
        f"mean |error| on the test sizes: {result['profiled_mean']:.1%} as profiled, {result['calibrated_mean']:.1%} "
        f"calibrated on other sizes; repeats p90 {result['repeat_p90']:.1%}; goal {result['goal']:.1%} {met}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything here, too")
    parser.add_argument("--profile", help="a host profile made by `clustersim profile`, instead of a fresh one")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--patience", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="coarser kernel tables")
    parser.add_argument("--keep", type=Path, help="keep the profile and all runs in this folder")
    given = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="clustersim-benchmark-") as name:
        folder = given.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        # Profiles of this run go before the user's own, and nothing is written among them.
        target = given.json.resolve() if given.json else None
        folder = folder.resolve()
        os.chdir(folder)
        if given.profile:
            host, framework = given.profile, f"clustersim-{given.profile}"
        else:
            host, framework = NAME, profile(folder, given.quick, given.patience)
        result = benchmark(host, framework, given.repeats, given.patience, folder if given.keep else None)
    result["took_s"] = time.monotonic() - begin
    result["cores"] = cores()
    show(result)
    say(f"took {result['took_s']:.0f} s")
    if target is not None:
        files.write_text(target, json.dumps(result, indent=1) + "\n")


def benchmark(host: str, framework: str, repeats: int, patience: int, keep: Path | None) -> dict[str, Any]:
    cases = [
        Measured(question=ask(size, host, framework), layout=one, size=size, test=size in TEST_SIZES, runs=[])
        for one in LAYOUTS
        for size in sorted((*CALIBRATION_SIZES, *TEST_SIZES))
    ]
    disturbed = measure(cases, repeats, patience)
    if keep is not None:
        for case in cases:
            for number, run in enumerate(case.runs):
                label = f"{case.size[0]}x{case.size[1]}-{LAYOUTS.index(case.layout)}-{number}.json"
                files.save(run, keep / "runs" / label)
    return {**evaluate(cases), "others_median": statistics.median(disturbed), "others_p90": quantile(disturbed, 0.9)}


def evaluate(cases: Sequence[Measured]) -> dict[str, Any]:
    """Calibrate on the calibration sizes, score the others."""
    shipped = cases[0].question.framework
    found = calibrate([(case.question, case.layout, run) for case in cases if not case.test for run in case.runs])
    tested = [case for case in cases if case.test]
    result = scored(tested, shipped, found.framework)
    result["phases"] = phases(tested, found.framework)
    result["left_out"] = found.calibration.mean_error_left_out
    result["calibration_runs"] = [
        {
            "model": run.model, "layout": run.layout, "measured_s": run.step_s, "error_before": run.error_before,
            "error_after": run.error_after, "error_left_out": run.error_left_out,
        }
        for run in found.calibration.runs
    ]  # fmt: skip
    result["constants"] = [
        {
            "name": constant.name,
            "before": constant.before if isinstance(constant, ScaleConstant) else constant.before_s,
            "value": constant.value if isinstance(constant, ScaleConstant) else constant.value_s,
            "uncertainty": constant.uncertainty if isinstance(constant, ScaleConstant) else constant.uncertainty_s,
            "status": constant.status,
        }
        for constant in found.calibration.constants
    ]
    assert all(math.isfinite(row["calibrated_s"]) for row in result["rows"])
    return result


if __name__ == "__main__":
    main()
