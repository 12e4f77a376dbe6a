"""Rows of a CSV of measured runs, with what a file leaves out filled in."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clustersim.errors import InputError

# Beyond any count of GPUs, layers or sequences; what has more is a mistake, and would take for ever.
_MOST = 10_000_000
# Of the separators that spreadsheets write for a comma.
_SEPARATORS = {";": "semicolons", "\t": "tabs"}
_TOLD = 40
# Of columns whose words follow a form.
_EXAMPLES = {"inter_node": "8x200Gb/s InfiniBand"}


class Missing(Exception):
    """A row does not say something, or says it in a way that is not understood; the text says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: its cells by column name (stripped; empty ones left out), what fills its gaps, its line in the file."""

    line: int
    cells: Mapping[str, str]
    defaults: Mapping[str, str] = field(default_factory=dict)

    def text(self, column: str) -> str | None:
        """The cell, else the default, else None."""
        return self.cells.get(column) or self.defaults.get(column)

    def required(self, column: str) -> str:
        """The cell or its default; Missing where there is neither."""
        found = self.text(column)
        if found is None:
            example = f", e.g. {column}: {_EXAMPLES[column]}" if column in _EXAMPLES else ""
            raise Missing(f"{column} is not stated; fill it with --defaults{example}")
        return found

    def number(self, column: str) -> float | None:
        """The cell as a number; None where it is empty; Missing where it is no number."""
        found = self.text(column)
        if found is None:
            return None
        try:
            value = float(found)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise Missing(f"{column} = {_short(found)!r} is no number; write digits, a decimal point, and no unit")
        return value

    def positive(self, column: str) -> float | None:
        """The cell as a number above 0; None where it is empty."""
        found = self.number(column)
        if found is not None and found <= 0.0:
            raise Missing(f"{column} = {found:g}; it must be more than 0")
        return found

    def required_positive(self, column: str) -> float:
        """A number above 0 that must be there."""
        self.required(column)
        return self.positive(column) or 0.0

    def count(self, column: str) -> int | None:
        """The cell as a whole number that files may have; None where it is empty."""
        found = self.number(column)
        if found is not None and found != int(found):
            raise Missing(f"{column} = {found:g} is no whole number; write one")
        if found is not None and abs(found) > _MOST:
            raise Missing(f"{column} = {found:g} is too large; write at most {_MOST:,}")
        return None if found is None else int(found)

    def yes(self, column: str, *, otherwise: bool) -> bool:
        """What a column of yes or no says, `otherwise` where it is empty; Missing where it says something else."""
        text = self.text(column)
        if text is None:
            return otherwise
        found = first_match(text, {r"^(1|1\.0|yes|true|on)$": "on", r"^(0|0\.0|no|false|off)$": "off"})
        if found is None:
            raise Missing(f"{column} = {text!r}: write 1 (yes) or 0 (no)")
        return found == "on"

    def required_count(self, column: str) -> int:
        """A whole number that must be there, and at least 1."""
        found = self.count(column)
        if found is None:
            raise Missing(f"{column} is not stated; fill it with --defaults")
        if found < 1:
            raise Missing(f"{column} = {found}; it must be at least 1")
        return found


def read_rows(path: Path, defaults: Mapping[str, str] | None = None) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    """(column names, rows) of a CSV file. InputError where it cannot be read as one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name the file in it") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: is not UTF-8 text; save it as CSV in UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    reader = csv.reader(io.StringIO(text))
    try:
        lines = list(_lines(reader))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: {error}; write short cells, and close every quote") from None
    if not lines:
        raise InputError(f"{path}:1: is empty; write a header line with column names and a row per run")
    at = lines[0][0]
    header = tuple(name.strip() for name in lines[0][1])
    separator = next((one for one in _SEPARATORS if one in header[0]), None) if len(header) == 1 else None
    if separator is not None:
        raise InputError(f"{path}:{at}: cells are separated by {_SEPARATORS[separator]}; write commas")
    # Spreadsheets write empty columns behind the last one.
    named_columns = [name for name in header if name]
    if len(set(named_columns)) != len(named_columns):
        twice = next(name for name in named_columns if named_columns.count(name) > 1)
        raise InputError(f"{path}:{at}: column {_short(twice)!r} stands there twice; name every column once")
    if len(lines) == 1:
        raise InputError(f"{path}:{at}: has no rows; write one for each run below the header")
    rows = []
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise InputError(
                f"{path}:{line}: {len(cells)} cells under {len(header)} columns; quote cells with commas, and close "
                "every quote"
            )
        named = {name: cell.strip() for name, cell in zip(header, cells, strict=True) if name and cell.strip()}
        rows.append(Row(line=line, cells=named, defaults=dict(defaults or {})))
    return header, tuple(rows)


def _short(text: str) -> str:
    return text if len(text) <= _TOLD else f"{text[:_TOLD]}..."


def _lines(reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every row that is neither empty nor a comment; the line is that of the row's first cell."""
    before = 0
    for cells in reader:
        line, before = before + 1, reader.line_num  # type: ignore[attr-defined]
        if cells and not cells[0].lstrip().startswith("#"):
            yield line, cells


def first_match(text: str, table: Mapping[str, str]) -> str | None:
    """The value of the first pattern (a regular expression, any case) of `table` that is found in `text`."""
    for pattern, value in table.items():
        if re.search(pattern, text, re.IGNORECASE):
            return value
    return None
