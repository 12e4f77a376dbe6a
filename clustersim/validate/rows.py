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
            raise Missing(f"{column} is not stated; fill it with --defaults")
        return found

    def number(self, column: str) -> float | None:
        """The cell as a number; None where it is empty; Missing where it is no number."""
        found = self.text(column)
        if found is None:
            return None
        try:
            value = float(found)
        except ValueError:
            raise Missing(f"{column} = {found!r} is no number") from None
        if not math.isfinite(value):
            raise Missing(f"{column} = {found!r} is no number")
        return value

    def count(self, column: str) -> int | None:
        """The cell as a whole number; None where it is empty."""
        found = self.number(column)
        if found is not None and found != int(found):
            raise Missing(f"{column} = {found:g} is no whole number")
        return None if found is None else int(found)

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
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); write a UTF-8 CSV file") from None
    reader = csv.reader(io.StringIO(text))
    lines = list(_lines(reader))
    if not lines:
        raise InputError(f"{path}: is empty; write a header line with column names and a row per run")
    header = tuple(name.strip() for name in lines[0][1])
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise InputError(f"{path}:1: column {twice!r} stands there twice; name every column once")
    rows = []
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise InputError(f"{path}:{line}: {len(cells)} cells under {len(header)} columns; quote cells with commas")
        named = {name: cell.strip() for name, cell in zip(header, cells, strict=True) if cell.strip()}
        rows.append(Row(line=line, cells=named, defaults=dict(defaults or {})))
    return header, tuple(rows)


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
