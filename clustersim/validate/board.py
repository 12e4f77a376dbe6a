"""validate(): families of cases scored, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clustersim.validate.case import Unmapped
from clustersim.validate.family import Family, Rows
from clustersim.validate.score import Scored, score_all
from clustersim.validate.scoreboard import MemorySummary, Summary, memory_summary, summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """A scored family, or file (`family` None): its rows, those that are no case, and the figures of the others."""

    name: str
    family: Family | None
    scored: tuple[Scored, ...]
    unmapped: tuple[Unmapped, ...]
    summary: Summary | None
    memory: MemorySummary | None


def validate(
    sets: Sequence[tuple[Rows, Family | None]], tell: Callable[[str], None], *, calibrated: bool = False
) -> list[Scores]:
    """Predict every case of every set, as shipped or with the user's calibrations (`calibrated`). Minutes for all
    shipped families; progress goes to `tell`."""
    result = []
    for rows, family in sets:

        def say(message: str, name: str = rows.name) -> None:
            tell(f"{name}: {message}")

        found = list(score_all(rows.cases, say, calibrated=calibrated))
        scored = tuple(each for each in found if isinstance(each, Scored))
        refused = tuple(each for each in found if isinstance(each, Unmapped))
        result.append(
            Scores(
                name=rows.name, family=family, scored=scored, unmapped=(*rows.unmapped, *refused),
                summary=summary(scored) if scored else None, memory=memory_summary(scored) if scored else None,
            )
        )  # fmt: skip
    return result
