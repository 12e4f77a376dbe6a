"""Measured steps in files: calibrating on them, and scoring what was calibrated on a few of them."""

from __future__ import annotations

from pathlib import Path

from clustersim.app import screen
from clustersim.errors import InputError, UsageError


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


def calibrate_on_rows(cases: Path, defaults: Path | None, output: Path | None, as_json: bool) -> None:
    """`calibrate --cases`: constants of the framework and kind of cluster that the rows of a file are of."""
    from rich.text import Text

    from clustersim import files
    from clustersim.calibrate.steps import Step, calibrate_steps
    from clustersim.report.run_screen import calibration_screen
    from clustersim.validate.calibrated import step_of
    from clustersim.validate.case import Unmapped
    from clustersim.validate.family import read_defaults, rows_in

    rows = rows_in(cases, read_defaults(defaults) if defaults is not None else {})
    read = [step_of(case) for case in rows.cases]
    steps = [step for step in read if isinstance(step, Step)]
    refused = sorted((*rows.unmapped, *(each for each in read if isinstance(each, Unmapped))), key=lambda row: row.line)
    if not steps:
        why = f"line {refused[0].line}: {refused[0].reason}" if refused else "it has no rows"
        raise InputError(f"{cases}: no row could be predicted; {why}")
    found = calibrate_steps(steps, cases.name)
    saved = output or files.user_folder() / "hwprofiles" / "calibrations" / f"{found.name}.yaml"
    files.save(found, saved)
    if as_json:
        screen.show_json(files.plain(found))
        return
    screen.show(calibration_screen(found))
    if all(constant.status == "kept" for constant in found.constants):
        screen.show("Each row left out in turn, no constant helps by more than chance: all are kept as shipped")
    for row in refused:
        screen.show(Text(f"{cases.name}, line {row.line}: {row.id}: left out: {row.reason}"))
    screen.show(f"\nCalibration written to {saved}; plans for these machines and this framework use it from now on")
