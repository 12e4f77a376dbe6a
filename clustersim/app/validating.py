"""`clustersim validate`: predictions against published and own measurements."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clustersim.app import screen
from clustersim.errors import InputError, UsageError

if TYPE_CHECKING:
    from clustersim.validate.board import Scores
    from clustersim.validate.case import Unmapped
    from clustersim.validate.family import Family, Rows
    from clustersim.validate.point_board import PointScores


def add_to(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("validate")(validate_command)


def validate_command(
    families: Annotated[
        list[str] | None, typer.Argument(metavar="[FAMILY]...", help="Families of published rows. Default: all.")
    ] = None,
    cases: Annotated[Path | None, typer.Option("--cases", help="A CSV of measurements to score instead.")] = None,
    defaults: Annotated[
        Path | None, typer.Option("--defaults", help="YAML, `column: value`: what the CSV leaves out.")
    ] = None,
    worst: Annotated[int, typer.Option("--worst", min=0, help="How many of the worst rows to list.")] = 10,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw predicted against measured steps, as .svg or .png.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--record", help="Write the figures of all families as JSON, for --markdown.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Print the tables of such a record, and predict nothing.")
    ] = None,
    calibrate: Annotated[
        int | None, typer.Option("--calibrate", min=1, help="Calibrate on so many rows of each source; score the rest.")
    ] = None,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Score each source with constants fitted to all others.")
    ] = False,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="With your own calibrations, where there are any.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, every row included.")] = False,
) -> None:
    """Score predictions against measurements: training steps, collectives, synchronisations.

    Predictions are as shipped, also where you have a calibration of your own, unless you ask for --calibrated.
    Errors, rankings, memory, beside what others report. docs/validation.md has the columns of files of your own.
    """
    if markdown is not None:
        if families or cases or plot or record or as_json:
            raise UsageError("--markdown prints what was recorded; leave the other options out")
        screen.show_text(_markdown(markdown))
        return
    if calibrate is not None or leave_one_out:
        if cases or plot or record or calibrated:
            raise UsageError("--calibrate and --leave-one-out score the shipped families; leave other files out")
        from clustersim.app.calibrating import show_calibrated

        show_calibrated(families or [], calibrate, leave_one_out, as_json)
        return
    if cases is None and defaults is not None:
        raise UsageError("--defaults fills the rows of --cases; give both")
    if cases is not None and families:
        raise UsageError("give families or --cases, not both")
    if record is not None and (families or cases or calibrated):
        raise UsageError("--record holds all families as shipped; leave FAMILY, --cases and --calibrated out")
    if plot is not None:
        from clustersim.report import drawing

        drawing.check(plot)
    steps, points = _own(cases, defaults, calibrated) if cases is not None else _shipped(families or [], calibrated)
    if plot is not None:
        _draw(plot, steps)
    if record is not None:
        _record(record, steps, points)
    if as_json:
        screen.show_json(_document(steps, points))
    elif cases is not None:
        _show_file(steps, points, worst)
    else:
        _show_board(steps, points, worst)


# ------------------------------------------------------------------------------------------------ scoring


def _own(cases: Path, defaults: Path | None, calibrated: bool) -> tuple[list[Scores], list[PointScores]]:
    from clustersim.validate.board import validate
    from clustersim.validate.family import Rows, read_defaults
    from clustersim.validate.formats import KNOWN, read_cases
    from clustersim.validate.point_board import score_points

    found = read_cases(cases, read_defaults(defaults, KNOWN) if defaults is not None else {})
    if isinstance(found, Rows):
        steps, points = validate([(found, None)], screen.progress(), calibrated=calibrated), []
        predicted, refused = len(steps[0].scored), steps[0].unmapped
    else:
        steps, points = [], [score_points(found, None)]
        predicted, refused = len(found.points), found.unmapped
    if not predicted:
        raise InputError(f"{cases}:{refused[0].line}: no row could be predicted: {_reasons(refused)}")
    return steps, points


def _reasons(refused: Iterable[Unmapped]) -> str:
    """Why rows are no case: the commonest reasons, each with the lines of its rows."""
    from clustersim.validate.case import line_words, reasons

    told = [f"{line_words(lines)}: {reason}" for reason, lines in reasons(refused)]
    rest = [f"{len(told) - 3} other reasons"] if len(told) > 3 else []
    return "; ".join(told[:3] + rest)


def _shipped(names: list[str], calibrated: bool) -> tuple[list[Scores], list[PointScores]]:
    from clustersim.mistakes import near
    from clustersim.validate.board import validate
    from clustersim.validate.family import rows_of, shipped_families
    from clustersim.validate.formats import points_of, shipped_points
    from clustersim.validate.point_board import score_points

    steps = {family.name: family for family in shipped_families()}
    points = {family.name: family for family in shipped_points()}
    for name in names:
        if name not in steps and name not in points:
            known = (*steps, *points)
            mend = near(name, known) or f"; known: {', '.join(known)}"
            raise UsageError(f"{name!r} is no family of published rows{mend}")
    sets: list[tuple[Rows, Family | None]] = [
        (rows_of(family), family) for family in steps.values() if not names or family.name in names
    ]
    tell = screen.progress()
    scores = validate(sets, tell, calibrated=calibrated)
    found = []
    for family in points.values():
        if not names or family.name in names:
            tell(f"{family.name}: collectives and synchronisations")
            found.append(score_points(points_of(family), family))
    return scores, found


# ------------------------------------------------------------------------------------------------ saying


def _show_board(steps: list[Scores], points: list[PointScores], worst: int) -> None:
    from rich.text import Text

    from clustersim.report.points_screen import points_screen
    from clustersim.report.validate_screen import scoreboard_screen

    if steps:
        screen.show(scoreboard_screen(steps, worst=worst))
    if points:
        head = "Synchronisation and collectives"
        screen.show(*([Text()] if steps else []), Text(head, style="bold"), points_screen(points, worst=worst))


def _show_file(steps: list[Scores], points: list[PointScores], worst: int) -> None:
    from clustersim.report.points_screen import file_screen, point_lines
    from clustersim.report.validate_screen import rows_screen

    for scores in steps:
        screen.show(rows_screen(scores, screen.width()))
    for found in points:
        screen.show_text(point_lines(found, screen.width()))
        screen.show(file_screen(found, worst=worst))


def _draw(path: Path, steps: list[Scores]) -> None:
    from clustersim.report.drawing import write
    from clustersim.report.validate_plot import picture

    if not any(found.scored for found in steps):
        raise UsageError(f"--plot {path}: it draws training steps, and none was predicted here")
    write(picture(steps), path)


def _document(steps: list[Scores], points: list[PointScores]) -> dict[str, Any]:
    from clustersim.report.points_screen import points_document
    from clustersim.report.validate_screen import scoreboard_document

    return scoreboard_document(steps) | {"synchronisation": [points_document(found) for found in points]}


def _record(path: Path, steps: list[Scores], points: list[PointScores]) -> None:
    """The figures without their rows."""
    import json

    from clustersim import files
    from clustersim.report.points_screen import points_summary

    whole = _document(steps, [])
    document = {
        "schema_version": 1,
        "families": [
            {key: value for key, value in family.items() if key not in ("rows", "unmapped")}
            for family in whole["families"]
        ],
        "synchronisation": [points_summary(found) for found in points],
    }
    files.write_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _markdown(path: Path) -> str:
    import json

    from clustersim.report.validate_markdown import markdown

    try:
        return markdown(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; write one with --record") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no record of scores ({error}); write one with --record") from None
