"""A measured figure that is no training step (a collective, a synchronisation, a rate), beside what is predicted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from clustersim.errors import ClustersimError
from clustersim.validate.case import Unmapped
from clustersim.validate.rows import Missing, Row

Unit = Literal["s", "B/s", "FLOP/s"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One row: `measured` and `predicted` in `unit`, and the relative half-width `spread` of the 90 % interval.

    `basis` says what the prediction rests on; `source` who measured it, where the row says so; `seen`, that the profile
    which predicts the row was built from it, or from rows of its source. Points of one `group` are the same question
    answered by several `scheme`s, which can be ranked.
    """

    id: str
    line: int
    system: str
    subject: str
    measured: float
    predicted: float
    unit: Unit = "s"
    spread: float
    basis: str
    source: str | None = None
    seen: bool = False
    group: str = ""
    scheme: str = ""

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted / self.measured - 1.0

    @property
    def low(self) -> float:
        """The lower end of the 90 % interval."""
        return self.predicted / (1.0 + self.spread)

    @property
    def high(self) -> float:
        """The upper end of the 90 % interval."""
        return self.predicted * (1.0 + self.spread)

    @property
    def covered(self) -> bool:
        """Whether the measured figure lies in the 90 % interval."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """The predicted rows of a file, and those that are none."""

    name: str
    points: tuple[Point, ...]
    unmapped: tuple[Unmapped, ...]


def source_of(row: Row) -> str | None:
    """The repository, or whatever names the source of a row, as provenances write it; None where it names none."""
    text = row.text("source") or row.text("repo")
    return None if text is None else re.sub(r"^(https?://)?github\.com/([^/]+/[^/]+).*$", r"\2", text)


def named_in(source: str | None, provenance: str) -> bool:
    """Whether a row's source is named, as a whole, in the sources of the figures behind its prediction."""
    return source is not None and re.search(rf"(?<![\w./-]){re.escape(source)}(?![\w/-])", provenance) is not None


def each_point(name: str, rows: Sequence[Row], predict: Callable[[Row, str], Point]) -> Points:
    """Every row predicted by `predict` (of the row and what it is called), or the reason why it is not."""
    points, unmapped = [], []
    for row in rows:
        label = row.text("id") or f"line {row.line}"
        try:
            points.append(predict(row, label))
        except (Missing, ClustersimError) as reason:
            unmapped.append(Unmapped(id=label, line=row.line, reason=str(reason)))
    return Points(name=name, points=tuple(points), unmapped=tuple(unmapped))
