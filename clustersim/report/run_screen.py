"""What `clustersim run` and `clustersim calibrate` say when they are done."""

from __future__ import annotations

import statistics

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clustersim.compare import Run, quantile
from clustersim.hardware.calibration import Calibration, ScaleConstant, Status
from clustersim.hardware.intervals import FEWEST_LEFT_OUT
from clustersim.layout.layout import describe
from clustersim.plan import Plan
from clustersim.report.figures import counted, percent, signed_percent, significant
from clustersim.units import human_seconds


def run_screen(plan: Plan, run: Run) -> Group:
    """The measured step beside the predicted one, and how the loss went."""
    middle = statistics.median(run.step_s)
    spread = f"{human_seconds(quantile(run.step_s, 0.1))} to {human_seconds(quantile(run.step_s, 0.9))}"
    tokens = plan.workload.training.tokens_per_step
    lines: list[RenderableType] = [
        Text.assemble(
            (plan.scenario.name, "bold"), f": {describe(plan.layout)}; {run.ranks} ranks, {run.backend}, {run.device}"
        ),
        Text.assemble(
            ("step ", "bold"), (human_seconds(middle), "bold"), f" (10 to 90 %: {spread}; {len(run.step_s)} steps ",
            f"after {run.warmup_steps} of warm-up), {counted(tokens / middle)} tokens/s",
        ),
        Text(
            f"predicted {human_seconds(plan.prediction.step_s)}, "
            f"{signed_percent(plan.prediction.step_s / middle - 1.0)} of the measured"
        ),
    ]  # fmt: skip
    if run.losses:
        lines.append(Text(f"loss {run.losses[0]:.3f} in the first step, {run.losses[-1]:.3f} in the last"))
    return Group(*lines)


_STATUS: dict[Status, str] = {
    "fitted": "identified", "kept": "not identified: kept", "bound": "not identified: at its bound",
}  # fmt: skip


def calibration_screen(found: Calibration) -> Group:
    """The constants that the runs determined, and what to expect of other runs."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("constant")
    for name in ("before", "now", "uncertainty"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status")
    for constant in found.constants:
        if isinstance(constant, ScaleConstant):
            before, now = significant(constant.before, 3), significant(constant.value, 3)
            doubt = "-" if constant.uncertainty is None else significant(constant.uncertainty, 2)
        else:
            before, now = human_seconds(constant.before_s), human_seconds(constant.value_s)
            doubt = "-" if constant.uncertainty_s is None else human_seconds(constant.uncertainty_s)
        table.add_row(constant.name, before, now, doubt, _STATUS[constant.status])
    runs = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    runs.add_column("row" if found.steps else "program")
    for name in ("measured", "error before", "now", "left out"):
        runs.add_column(name, justify="right", no_wrap=True)
    for run in found.runs:
        errors = (signed_percent(e) for e in (run.error_before, run.error_after, run.error_left_out))
        runs.add_row(f"{run.model}, {run.layout}", human_seconds(run.step_s), *errors)
    for step in found.steps:
        errors = (signed_percent(e) for e in (step.error_before, step.error_after, step.error_left_out))
        runs.add_row(f"{step.row}, {step.layout}", human_seconds(step.step_s), *errors)
    of = f"{len(found.steps)} measured steps" if found.steps else f"{len(found.runs)} programs"
    trades = [
        Text(f"{pair.one} and {pair.other} trade against each other (correlation {pair.correlation:+.2f})")
        for pair in found.trades
    ]
    reach = [
        Text(f"Fewer than {FEWEST_LEFT_OUT} configurations on {kind}: plans on {kind} keep the interval as shipped")
        for kind in ("one node", "several nodes")
        if found.steps and len(found.left_out(several_nodes=kind == "several nodes")) < FEWEST_LEFT_OUT
    ]
    return Group(
        Text.assemble((found.name, "bold"), f": {of}"),
        table,
        *trades,
        Text(),
        runs,
        Text(
            f"mean error {percent(found.mean_error_before)} before, {percent(found.mean_error_after)} now; expect "
            f"{percent(found.mean_error_left_out)} of a program that was left out"
        ),
        *reach,
    )
