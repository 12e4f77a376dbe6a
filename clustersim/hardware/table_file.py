"""The text of measured tables: CSV, units in the header, times in microseconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clustersim.errors import ProfileError


def words(columns: Mapping[str, list[str]], name: str, allowed: tuple[str, ...], path: Path) -> npt.NDArray[np.str_]:
    """A column of words out of `allowed`; ProfileError where it is missing or holds another."""
    if name not in columns:
        raise ProfileError(f"{path}: has no column {name}; its columns are {', '.join(columns)}")
    unknown = set(columns[name]) - set(allowed)
    if unknown:
        raise ProfileError(f"{path}: {name} {min(unknown)!r} is unknown; use one of {', '.join(allowed)}")
    return np.array(columns[name], dtype=np.str_)


def column(columns: Mapping[str, list[str]], name: str, path: Path) -> npt.NDArray[np.float64]:
    """A column of positive numbers; ProfileError where it is missing or holds anything else."""
    if name not in columns:
        raise ProfileError(f"{path}: has no column {name}; its columns are {', '.join(columns)}")
    try:
        values = np.array(columns[name], dtype=np.float64)
    except ValueError:
        raise ProfileError(f"{path}: column {name} holds something that is not a number; write e.g. 12.5") from None
    if values.size and not (np.isfinite(values).all() and float(values.min()) > 0.0):
        raise ProfileError(f"{path}: column {name} holds a number that is not positive and finite; remove the row")
    return values


def table_text(header: str, rows: Iterable[tuple[tuple[str | int, ...], float]]) -> str:
    """A CSV of keys and a time in microseconds, four significant digits."""
    lines = [header]
    lines += [",".join([*(str(cell) for cell in key), f"{float(f'{time:.4g}'):.12g}"]) for key, time in rows]
    return "\n".join(lines) + "\n"
