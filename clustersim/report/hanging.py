"""Prose on a screen of any width: what does not fit on its line goes on below its own words, not at the left edge."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

# Words in fewer columns than these are no easier to read than words on lines of their own.
_LEAST_BESIDE = 20
_LEAST_NAME = 8


@dataclass(frozen=True, slots=True)
class Name:
    """The first cell of a row of a table; where it is too long it goes on below itself, indented."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(wrapped(self.text, max(_LEAST_NAME, options.max_width), 2), no_wrap=True, overflow="ignore")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(len(self.text), _LEAST_NAME), len(self.text))


def hanging(items: Iterable[tuple[str, str]], style: str = "", right: bool = False) -> Table:
    """A line each of a head and its words, which wrap below themselves; heads flush right where they are figures."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True, justify="right" if right else "left")
    table.add_column(overflow="fold", ratio=1)
    for head, words in items:
        table.add_row(Text(head, style), Text(words, style))
    return table


def wrapped(text: str, width: int, indent: int) -> str:
    """Plain text in lines of at most `width` columns, those after the first indented."""
    if len(text) <= width:
        return text
    return "\n".join(textwrap.wrap(text, width, subsequent_indent=" " * indent, break_on_hyphens=False))


def figure_lines(rows: Sequence[tuple[str, ...]], right: int, width: int) -> str:
    """Rows of cells in columns, the first `right` of them flush right, and of words in what is left of `width`, or
    below the cells where that is too little. The first row is the head. O(cells)."""
    sizes = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    left = sum(sizes) + len(sizes)
    beside = width - left >= _LEAST_BESIDE
    lines = []
    for row in rows:
        cells = " ".join(
            cell.rjust(size) if at < right else cell.ljust(size)
            for at, (cell, size) in enumerate(zip(row, sizes, strict=False))
        )
        if beside:
            lines.append(wrapped(f"{cells} {row[-1]}", width, left))
        else:
            lines += [cells.rstrip(), wrapped(f"{'':{sizes[0]}} {row[-1]}", width, sizes[0] + 3)]
    return "\n".join(lines)
