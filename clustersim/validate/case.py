"""A validation case: a scenario whose layout is fixed, and what was measured of it; rows that are none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    its layout has on each device; then its memory is not compared. `assumed`: what the row leaves open that changes its
    prediction, and how it was read.
    """

    id: str
    line: int
    scenario: dict[str, Any]
    measured_s: float
    memory_bytes: float | None
    quality: str
    memory_level: MemoryLevel = "used"
    kept_elsewhere: str = ""
    assumed: tuple[str, ...] = ()

    @property
    def cluster(self) -> str:
        """The kinds of nodes and the framework: what constants may be calibrated for."""
        return f"{'+'.join(self.scenario['cluster']['nodes'])}--{self.scenario['framework']}"

    @property
    def group(self) -> str:
        """What layouts of one model, framework, cluster and batch share: the scenario without its name and layout, and
        without the vocabulary, which software rounds up or down to what tensor-parallel ranks can share."""
        shared = {key: value for key, value in self.scenario.items() if key not in ("name", "layout")}
        if isinstance(shared["model"], dict):
            shared["model"] = {key: value for key, value in shared["model"].items() if key != "vocab"}
        return repr(sorted((key, repr(value)) for key, value in shared.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmapped:
    """A row that is no case, and why: what it leaves out, or what is not modelled."""

    id: str
    line: int
    reason: str


def reasons(rows: Iterable[Unmapped]) -> list[tuple[str, tuple[int, ...]]]:
    """Why rows are no case, each reason once with the lines of its rows; the commonest first. O(rows log rows)."""
    lines: dict[str, list[int]] = {}
    for row in sorted(rows, key=lambda row: row.line):
        lines.setdefault(row.reason, []).append(row.line)
    return [(why, tuple(at)) for why, at in sorted(lines.items(), key=lambda item: (-len(item[1]), item[1][0]))]


def line_words(lines: Sequence[int], most: int = 8) -> str:
    """Ascending line numbers in words: `line 12`, `lines 3-9, 12`; beyond `most` stretches, how many rows follow."""
    stretches: list[list[int]] = []
    for line in lines:
        if stretches and line == stretches[-1][-1] + 1:
            stretches[-1].append(line)
        else:
            stretches.append([line])
    told = ", ".join(str(one[0]) if len(one) == 1 else f"{one[0]}-{one[-1]}" for one in stretches[:most])
    rest = sum(map(len, stretches[most:]))
    return f"line{'s' if len(lines) > 1 else ''} {told}{f' and {rest} more' if rest else ''}"
