"""`calibrate` on runs and on measured steps in files, and scores of what was calibrated on a few of these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clustersim.app import planning, running, screen
from clustersim.errors import InputError, UsageError

if TYPE_CHECKING:
    from clustersim.hardware.calibration import Calibration


def add_to(app: typer.Typer) -> None:
    """Add this file's command to `app`."""
    app.command("calibrate")(calibrate_command)


def show_calibrated(names: list[str], k: int | None, leave_out: bool, as_json: bool) -> None:
    """`validate --calibrate K`, `validate --leave-one-out`."""
    from rich.text import Text

    from clustersim.mistakes import near
    from clustersim.report.calibrated_screen import calibrated_document, calibrated_screen, left_out_screen
    from clustersim.validate.calibrated import validate_calibrated
    from clustersim.validate.family import rows_of, shipped_families
    from clustersim.validate.sources import leave_sources_out

    known = {family.name: family for family in shipped_families()}
    for name in names:
        if name not in known:
            raise UsageError(f"{name!r} is no family of measured steps{near(name, known) or ''}")
    sets = [(rows_of(known[name]), known[name]) for name in names or known]
    scores = validate_calibrated(sets, k, screen.progress()) if k is not None else []
    found = leave_sources_out(sets, screen.progress()) if leave_out else ()
    if leave_out and not found:
        raise UsageError("leaving a source out needs families of two sources")
    if as_json:
        screen.show_json(calibrated_document(scores, found))
        return
    if scores:
        screen.show(calibrated_screen(scores))
    if found:
        head = Text("What profiles learned from rows, learned from all other sources", style="bold")
        screen.show(*([Text()] if scores else []), head, left_out_screen(found))


def calibrate_command(
    pairs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PLAN RUN]...", help="Plans, each followed by a run of it."),
    ] = None,
    cases: Annotated[
        Path | None, typer.Option("--cases", help="A CSV of measured steps to fit to, in place of plans and runs.")
    ] = None,
    defaults: Annotated[
        Path | None, typer.Option("--defaults", help="YAML, `column: value`: what the CSV leaves out.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where it goes; default: where clustersim finds it again.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the calibration as JSON.")] = False,
) -> None:
    """Fit the constants of a framework on one kind of machine to runs, or to measured steps; later plans use them."""
    if cases is not None:
        if pairs:
            raise UsageError("give plans with their runs or --cases, not both")
        _on_rows(cases, defaults, output, as_json)
        return
    if defaults is not None:
        raise UsageError("--defaults fills the rows of --cases; give both")
    if not pairs:
        raise UsageError("give plans and runs in turn, PLAN RUN PLAN RUN, or --cases FILE.csv")
    if len(pairs) % 2:
        raise UsageError(f"{len(pairs)} files; give plans and runs in turn: PLAN RUN PLAN RUN")
    _on_runs(pairs, output, as_json)


def _on_runs(pairs: list[Path], output: Path | None, as_json: bool) -> None:
    """Constants of the framework and kind of cluster that plans were run with: PLAN RUN PLAN RUN."""
    from clustersim.calibrate.runs import calibrate

    triples = []
    for plan_path, run_path in zip(pairs[::2], pairs[1::2], strict=True):
        plan, run = planning.load_plan(plan_path), running.load_run(run_path)
        triples.append((planning.question_of(plan), plan.layout, run))
    _keep(calibrate(triples).calibration, output, as_json)


def _on_rows(cases: Path, defaults: Path | None, output: Path | None, as_json: bool) -> None:
    """Constants of the framework and kind of cluster that the rows of a file are of."""
    from clustersim.calibrate.steps import Step, calibrate_steps
    from clustersim.validate.calibrated import step_of
    from clustersim.validate.case import Unmapped, line_words, reasons
    from clustersim.validate.family import read_defaults, rows_in

    rows = rows_in(cases, read_defaults(defaults) if defaults is not None else {})
    read = [step_of(case) for case in rows.cases]
    steps = [step for step in read if isinstance(step, Step)]
    left_out = reasons((*rows.unmapped, *(each for each in read if isinstance(each, Unmapped))))
    why = [f"{line_words(lines)}: {reason}" for reason, lines in left_out]
    if not steps:
        raise InputError(f"{cases}: no row could be predicted; {'; '.join(why) or 'it has no rows'}")
    try:
        found = calibrate_steps(steps, cases.name)
    except InputError as error:
        raise InputError("; left out, ".join([str(error), *why])) from None
    notes = []
    if all(constant.status == "kept" for constant in found.constants):
        notes.append("Left out one at a time, no constant helps by more than chance: all are kept as shipped")
    notes += [f"{cases.name}: left out, {each}" for each in why]
    _keep(found, output, as_json, notes)


def _keep(found: Calibration, output: Path | None, as_json: bool, notes: Sequence[str] = ()) -> None:
    """Write a calibration where plans find it, or into `output`, and show it."""
    from rich.text import Text

    from clustersim import files
    from clustersim.report.run_screen import calibration_screen

    saved = output or files.user_folder() / "hwprofiles" / "calibrations" / f"{found.name}.yaml"
    files.save(found, saved)
    if as_json:
        screen.show_json(files.plain(found))
        return
    screen.show(calibration_screen(found), *(Text(note) for note in notes))
    found_again = {root.resolve() / "calibrations" / f"{found.name}.yaml" for root in files.profile_folders()}
    use = "plans for these machines and this framework use it from now on"
    if saved.resolve() not in found_again:
        use = f"plans use it once it is hwprofiles/calibrations/{found.name}.yaml"
    screen.show(f"\nCalibration written to {saved}; {use}")
