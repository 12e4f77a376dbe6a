"""A validation case: a scenario whose layout is fixed, and what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measured training step. `scenario` is the plain data of a scenario file that fixes every choice the row
    states; `line` is the row's in the file it came from. `cluster` names nodes and framework as calibrations are keyed.

    `memory_bytes` is what the source calls used memory of the fullest device, None where it says nothing.
    """

    id: str
    line: int
    scenario: dict[str, Any]
    measured_s: float
    memory_bytes: float | None
    quality: str

    @property
    def cluster(self) -> str:
        """The kinds of nodes and the framework: what constants may be calibrated for."""
        return f"{'+'.join(self.scenario['cluster']['nodes'])}--{self.scenario['framework']}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmapped:
    """A row that is no case, and why: what it leaves out, or what is not modelled."""

    id: str
    line: int
    reason: str
