"""`run`, `compare` and `calibrate`: a plan on real devices, and what that says about the prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clustersim.app import planning, screen
from clustersim.app.quantities import quantity
from clustersim.errors import InputError, ToleranceExceeded, UsageError

if TYPE_CHECKING:
    from clustersim.compare import Comparison, Run
    from clustersim.plan import Plan
    from clustersim.timeline import Timeline


def add_to(app: typer.Typer) -> None:
    """Add this file's commands to `app`."""
    app.command("run")(run_command)
    app.command("compare")(compare_command)


def run_command(
    plan: Annotated[Path, typer.Argument(help="A plan.json for this machine.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Measured steps.")] = 20,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps before the measured ones.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Of the weights and the order of the text.")] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the run goes; default: <plan>.run.json here.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write the measured Chrome trace here (ui.perfetto.dev).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run as JSON.")] = False,
) -> None:
    """Train a small model for real, as a plan says, on ranks of this machine; and measure every op. Needs torch."""
    from clustersim import files

    saved = output if output is not None else Path(f"{plan.stem.removesuffix('.plan')}.run.json")
    files.check_writable(saved, trace)

    from clustersim.execute.execute import execute
    from clustersim.report.run_screen import run_screen

    found = planning.load_plan(plan)
    measured = execute(found, steps=steps, warmup=warmup, seed=seed, progress=screen.progress())
    files.save(measured, saved)
    if trace is not None:
        planning.write_trace(trace, measured.timeline)
    if as_json:
        screen.show_json(files.plain(measured))
        return
    screen.show(run_screen(found, measured))
    screen.show(f"\nRun written to {saved}. Next: clustersim compare {plan} {saved}")


def compare_command(
    plan: Annotated[Path, typer.Argument(help="The plan that was run.")],
    run: Annotated[Path, typer.Argument(help="The run of it.")],
    tolerance: Annotated[
        str | None, typer.Option("--tolerance", help="Exit with 6 if the step is further off, e.g. 15%.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write both timelines as one Chrome trace here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare what was predicted of a plan with what a run measured: step, phases, ops."""
    from clustersim import files
    from clustersim.report.compare_screen import compare_screen
    from clustersim.report.figures import signed_percent

    allowed = None if tolerance is None else quantity("--tolerance", tolerance, "Fraction")
    if allowed is not None and allowed > 1.0 and "%" not in str(tolerance):
        raise UsageError(f"--tolerance {tolerance}: is {allowed:.0%}; write {allowed:g}% or {allowed / 100.0:g}")
    files.check_writable(trace)
    found, measured = planning.load_plan(plan), load_run(run)
    comparison, predicted = compared(found, measured)
    if trace is not None:
        planning.write_trace(trace, predicted, measured.timeline)
    if as_json:
        screen.show_json(files.plain(comparison))
    else:
        screen.show(compare_screen(found.scenario.name, comparison, tolerance=allowed))
    error = comparison.step.error
    if allowed is not None and (error is None or abs(error) > allowed):
        told = "nothing was measured" if error is None else f"the step is off by {signed_percent(error)}"
        raise ToleranceExceeded(f"{told}, and {tolerance} is allowed; calibrate with this run, or allow more")


# --------------------------------------------------------------------------------------- shared by several commands


def load_run(path: Path) -> Run:
    """The run at `path`; InputError, one line, where it is none."""
    from clustersim import files
    from clustersim.compare import Run

    try:
        run: Run = files.load(Run, path)
    except InputError:
        tree, _ = files.read_tree(path)
        if isinstance(tree, dict) and "ranking" in tree:
            raise InputError(f"{path}: is a plan; give the run of it that clustersim run wrote") from None
        raise
    return run


def compared(plan: Plan, run: Run) -> tuple[Comparison, Timeline]:
    """The plan's layout simulated, joined with a run of it; and the simulated timeline."""
    from clustersim.compare import compare

    if run.program_digest != plan.program_digest:
        raise InputError(
            f"the run is of another program ({run.program_digest[:12]}, not {plan.program_digest[:12]}); "
            "give the plan that was run"
        )
    _, predicted = planning.simulated(plan, planning.question_of(plan))
    found = compare(predicted, run.timeline, step_s=run.step_s)
    factor = found.step.predicted_s / plan.prediction.step_s
    low, high = plan.prediction.low_s * factor, plan.prediction.high_s * factor
    return replace(found, interval_s=(low, high)), predicted
