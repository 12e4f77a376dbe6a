"""Families of cases: the rows of one source on one cluster, and what a file of rows leaves out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from clustersim import files
from clustersim.errors import InputError
from clustersim.files import load, shipped_folder
from clustersim.mistakes import near
from clustersim.units import FILE, Fraction
from clustersim.validate.case import Case, Unmapped
from clustersim.validate.rows import read_rows
from clustersim.validate.training_rows import COLUMNS, is_training, training_case


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What another predictor says, or was said, about its mean absolute error on (about) these rows."""

    __pydantic_config__: ClassVar[Any] = FILE
    name: str
    mean_error: Fraction
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeated:
    """By how much repeated measurements of one configuration deviate, where the rows themselves do not show it."""

    __pydantic_config__: ClassVar[Any] = FILE
    spread: Fraction
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Rows of one source. `defaults` are cells that the source states once for all rows, or leaves to its reader;
    `assumed` says which of them are the latter, and why. `learned`: what the shipped profiles took from these rows.
    `causes`: facts about rows that explain their errors, by patterns of ids (* and ?)."""

    __pydantic_config__: ClassVar[Any] = FILE
    name: str
    title: str
    file: str
    source: str
    licence: str
    defaults: dict[str, str] = field(default_factory=dict)
    assumed: str = ""
    learned: str = ""
    memory: str = ""
    peers: tuple[Peer, ...] = ()
    repeats: Repeated | None = None
    causes: dict[str, str] = field(default_factory=dict)

    def cause(self, row: str) -> str:
        """What is known of the error of a row; empty where nothing is."""
        return next((why for pattern, why in self.causes.items() if fnmatchcase(row, pattern)), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Families:
    """`validation/families.yaml`: the validation set."""

    __pydantic_config__: ClassVar[Any] = FILE
    families: tuple[Family, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The cases of a file, and the rows that are none."""

    name: str
    cases: tuple[Case, ...]
    unmapped: tuple[Unmapped, ...]


def shipped_families() -> tuple[Family, ...]:
    """The families of the shipped validation set."""
    found: Families = load(Families, shipped_folder("validation") / "families.yaml")
    return found.families


def rows_of(family: Family) -> Rows:
    """The cases of a shipped family."""
    return rows_in(shipped_folder("validation") / family.file, family.defaults, name=family.name)


def rows_in(path: Path, defaults: Mapping[str, str], *, name: str | None = None) -> Rows:
    """The cases of a CSV file. InputError where its columns are of no known format."""
    columns, rows = read_rows(path, defaults)
    if not is_training((*columns, *defaults)):
        raise InputError(
            f"{path}:1: the columns are of no known format; training steps have gpus, gbs, hidden and layers (or "
            "preset), and a column of times (docs/validation.md)"
        )
    found = [training_case(row) for row in rows]
    return Rows(
        name=name or path.stem,
        cases=tuple(case for case in found if isinstance(case, Case)),
        unmapped=tuple(case for case in found if isinstance(case, Unmapped)),
    )


def read_defaults(path: Path, known: Collection[str] = COLUMNS) -> dict[str, str]:
    """A YAML file of `column: value`, for what a CSV leaves out; InputError for a column that is not `known`."""
    tree, _ = files.read_tree(path)
    if not isinstance(tree, dict) or any(isinstance(value, (dict, list)) for value in tree.values()):
        raise InputError(f"{path}: write one line `column: value` for each column that the rows leave out")
    for name, value in tree.items():
        if value is None:
            raise InputError(f"{path}: {name!r} has no value; write one, or remove the line")
        if name not in known:
            mend = near(str(name), known) or f"; known: {', '.join(sorted(known))}"
            raise InputError(f"{path}: {name!r} is no column of measured runs{mend}")
    return {str(key): str(value) for key, value in tree.items()}
