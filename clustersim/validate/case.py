"""A validation case: a scenario whose layout is fixed, and what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# Tensors at their peak, what the allocator reserved for them, what the driver shows as used.
MemoryLevel = Literal["allocated", "reserved", "used"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measured training step. `scenario` is the plain data of a scenario file that fixes every choice the row
    states; `line` is the row's in the file it came from. `cluster` names nodes and framework as calibrations are keyed.

    `memory_bytes` is memory of the fullest device as the source states it, None where it says nothing, and
    `memory_level` which memory that is. `kept_elsewhere`: what the run kept in host memory, or on other ranks, of what
    its layout has on each device; then its memory is not compared.
    """

    id: str
    line: int
    scenario: dict[str, Any]
    measured_s: float
    memory_bytes: float | None
    quality: str
    memory_level: MemoryLevel = "used"
    kept_elsewhere: str = ""

    @property
    def cluster(self) -> str:
        """The kinds of nodes and the framework: what constants may be calibrated for."""
        return f"{'+'.join(self.scenario['cluster']['nodes'])}--{self.scenario['framework']}"

    @property
    def group(self) -> str:
        """What layouts of one model, framework, cluster and batch share: the scenario without its name and layout."""
        return repr(sorted((key, repr(value)) for key, value in self.scenario.items() if key not in ("name", "layout")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmapped:
    """A row that is no case, and why: what it leaves out, or what is not modelled."""

    id: str
    line: int
    reason: str
