"""The formats of files of measurements, told apart by their columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from clustersim.errors import InputError
from clustersim.files import load, shipped_folder
from clustersim.validate import collective_rows, image_rows, microbench_rows, sync_rows, training_rows
from clustersim.validate.family import Families, Family, Rows, rows_in
from clustersim.validate.point import Points
from clustersim.validate.rows import Row, read_rows

_Reader = Callable[[str, Sequence[Row]], Points]
_POINTS: tuple[tuple[Callable[[Sequence[str]], bool], _Reader], ...] = (
    (collective_rows.is_collectives, collective_rows.collective_points),
    (sync_rows.is_sync, sync_rows.sync_points),
    (image_rows.is_images, image_rows.image_points),
    (microbench_rows.is_microbench, microbench_rows.microbench_points),
)
# Of measurements that are no training steps.
_OTHER_TIMES = ("time_s", "time_us", "latency_us", "images_per_s", "value")
# Every column that some format reads.
KNOWN = frozenset().union(
    training_rows.COLUMNS, collective_rows.COLUMNS, sync_rows.COLUMNS, image_rows.COLUMNS, microbench_rows.COLUMNS
)


def read_cases(path: Path, defaults: Mapping[str, str], *, name: str | None = None) -> Rows | Points:
    """A file's training steps as cases to predict, or its other figures predicted. InputError where its columns are of
    no known format."""
    columns, rows = read_rows(path, defaults)
    known = (*columns, *defaults)
    if not training_rows.is_training(known):
        for fits, read in _POINTS:
            if fits(known):
                return read(name or path.stem, rows)
        raise InputError(
            f"{path}:1: the columns are of no known format; {_lacking(known)} (docs/validation.md has all formats)"
        )
    return rows_in(path, defaults, name=name)


def _lacking(columns: Sequence[str]) -> str:
    """What stands between the columns and a format, or that nothing there is a measurement."""
    times = {*training_rows.TIMES, *_OTHER_TIMES}
    if not times & set(columns):
        return f"none holds a measured time or rate ({', '.join(sorted(times))}, ...): there is nothing to score"
    lacking = training_rows.lacking(columns)
    if 0 < len(lacking) <= 2 or set(training_rows.TIMES) & set(columns):
        instead = " (or preset in place of hidden and layers)" if {"hidden", "layers"} & set(lacking) else ""
        return f"for training steps it lacks {', '.join(lacking)}{instead}"
    return "training steps have gpus, gbs, hidden and layers; collectives have collective, size_bytes and ranks"


def shipped_points() -> tuple[Family, ...]:
    """The shipped families of collectives and synchronisations."""
    found: Families = load(Families, shipped_folder("validation") / "synchronisation.yaml")
    return found.families


def points_of(family: Family) -> Points:
    """The predicted rows of a shipped family of points."""
    found = read_cases(shipped_folder("validation") / family.file, family.defaults, name=family.name)
    assert isinstance(found, Points)
    return found
