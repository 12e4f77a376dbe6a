"""`clustersim validate`: predictions against published and own runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clustersim.app import screen
from clustersim.errors import InputError, UsageError

if TYPE_CHECKING:
    from clustersim.validate.family import Family, Rows


def add_to(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("validate")(validate_command)


def validate_command(
    families: Annotated[
        list[str] | None, typer.Argument(metavar="[FAMILY]...", help="Families of published runs. Default: all.")
    ] = None,
    cases: Annotated[Path | None, typer.Option("--cases", help="A CSV of measured runs to score instead.")] = None,
    defaults: Annotated[
        Path | None, typer.Option("--defaults", help="YAML, `column: value`: what the CSV leaves out.")
    ] = None,
    worst: Annotated[int, typer.Option("--worst", min=0, help="How many of the worst rows to list.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, every row included.")] = False,
) -> None:
    """Score predictions against measured training runs: errors, rankings, memory, beside what peers report."""
    from clustersim.report.validate_screen import rows_screen, scoreboard_document, scoreboard_screen
    from clustersim.validate.board import validate

    if cases is None and defaults is not None:
        raise UsageError("--defaults fills the rows of --cases; give both")
    if cases is not None and families:
        raise UsageError("give families or --cases, not both")
    sets = _own(cases, defaults) if cases is not None else _shipped(families or [])
    found = validate(sets, screen.progress())
    if cases is not None and not found[0].scored:
        first = found[0].unmapped[0] if found[0].unmapped else None
        why = f"line {first.line}: {first.reason}" if first is not None else "it has no rows"
        raise InputError(f"{cases}: no row could be predicted; {why}")
    if as_json:
        screen.show_json(scoreboard_document(found))
    elif cases is not None:
        screen.show(rows_screen(found[0]))
    else:
        screen.show(scoreboard_screen(found, worst=worst))


def _own(cases: Path, defaults: Path | None) -> list[tuple[Rows, Family | None]]:
    from clustersim.validate.family import read_defaults, rows_in

    return [(rows_in(cases, read_defaults(defaults) if defaults is not None else {}), None)]


def _shipped(names: list[str]) -> list[tuple[Rows, Family | None]]:
    from clustersim.mistakes import near
    from clustersim.validate.family import rows_of, shipped_families

    known = {family.name: family for family in shipped_families()}
    for name in names:
        if name not in known:
            mend = near(name, known) or f"; known: {', '.join(known)}"
            raise UsageError(f"{name!r} is no family of published runs{mend}")
    return [(rows_of(known[name]), known[name]) for name in names or known]
