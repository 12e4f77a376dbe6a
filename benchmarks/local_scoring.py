"""Measured runs against predictions: errors before and after calibration, rankings, phases, how they are printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clustersim.calibrate.runs import calibrate
from clustersim.compare import Run, compare, quantile
from clustersim.hardware.calibration import ScaleConstant
from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import BYTES_OF
from clustersim.layout.layout import AllReduce, Layout, ParameterServer, describe
from clustersim.program.lower import lower
from clustersim.scenario.question import Question
from clustersim.simulate.simulate import simulate

MOST_RANKS = 4
# A calibrated prediction may miss by so much, or by as much as repeats of a run miss each other.
GOAL = 0.10


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
                "layout": said(case.layout),
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
        "layouts": len({row["layout"] for row in rows}),
        "rounds": min(len(case.runs) for case in cases),
        "repeat_p90": repeat,
        "profiled_mean": statistics.mean(abs(float(row["profiled_error"])) for row in rows),
        "calibrated_mean": statistics.mean(abs(float(row["calibrated_error"])) for row in rows),
        "goal": max(GOAL, repeat),
    }


def said(layout: Layout) -> str:
    """A layout with everything in which the layouts here differ."""
    scheme = layout.scheme
    parts = [describe(layout)]
    if layout.mesh.dp > 1 and BYTES_OF[layout.precision.gradient] < BYTES_OF[layout.precision.compute]:
        parts.append(f"{layout.precision.gradient} gradients")
    match scheme:
        case AllReduce() if layout.mesh.dp > 1:
            parts.append(f"{'overlapped' if scheme.overlap else 'after'} {scheme.bucket_bytes / 2**20:g}M")
        case ParameterServer():
            parts.append(f"cut {scheme.partition_bytes / 2**20:g}M")
        case _:
            pass
    return " ".join(parts)


def phases(cases: Sequence[Measured], framework: Framework) -> list[dict[str, Any]]:
    """Per layout and phase, predicted against measured seconds of the busiest rank, in the first round."""
    found = []
    for case in cases:
        program = lower(case.question.workload, case.layout, framework, MOST_RANKS)
        timeline = simulate(program, case.question.cluster, framework).timeline()
        comparison = compare(timeline, case.runs[0].timeline, step_s=case.runs[0].step_s)
        row: dict[str, Any] = {"model": f"{case.size[0]}x{case.size[1]}", "layout": said(case.layout)}
        row["joined_ops"], row["joined_time"] = comparison.joined_ops, comparison.joined_time
        for phase in comparison.phases:
            row[phase.phase] = (phase.seconds.predicted_s, phase.seconds.measured_s)
        row["exposed"] = (comparison.exposed.predicted_s, comparison.exposed.measured_s)
        found.append(row)
    return found


def show(result: dict[str, Any]) -> None:
    """The result as text."""
    print(f"{'model':8} {'layout':58} {'measured':>9} {'p10..p90 of repeats':>20} {'profiled':>16} {'calibrated':>16}")
    for row in result["rows"]:
        print(
            f"{row['model']:8} {row['layout']:58} {row['measured_s'] * 1e3:6.1f} ms "
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
        print(f"  {row['model']:8} {row['layout']:58} {'  '.join(parts)}  {joined}")
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
    print(f"{result['layouts']} layouts, {len(result['rows'])} runs scored, {result['rounds']} repeats of each")
    print(
        f"mean |error| on the test sizes: {result['profiled_mean']:.1%} as profiled, {result['calibrated_mean']:.1%} "
        f"calibrated on other sizes; repeats p90 {result['repeat_p90']:.1%}; goal max({GOAL:.0%}, repeats p90) = "
        f"{result['goal']:.1%}: {met}"
    )


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
