"""measure_points(): points one after the other within a budget, each written down as soon as it is known.

The file is a line of JSON for each point: an interrupted probe reads it and goes on with what is missing. The device
stands behind one narrow door (`Measures`), so that this file knows neither torch nor a clock of its own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from clustersim import files
from clustersim.errors import ClustersimError, ExecutionError
from clustersim.execute.probe_samples import (
    PLAIN,
    AttentionPoint,
    AttentionSample,
    CopySample,
    GemmPoint,
    GemmSample,
    LayerSample,
    MemorySample,
    Point,
    Sample,
    SustainedPoint,
    SustainedSample,
)

# How often a line says how far the work is.
_TELL_EVERY_S = 1.0


class RefusedPoint(Exception):
    """The device cannot do what a point asks: it has no such kernel, or too little memory."""


class Measures(Protocol):
    """A device that measures points."""

    def measure(self, point: Point) -> tuple[Sample, ...]:
        """What `point` gives; RefusedPoint where this device cannot do it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A point, and what it gave, or why it could not be done; `took_s` with everything around it."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    point: Point
    samples: tuple[Sample, ...]
    refused: str | None
    took_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """All entries in the order of the points, and those points that there was no time for."""

    entries: tuple[Entry, ...]
    missed: tuple[Point, ...]

    def samples(self, kind: type[Any]) -> tuple[Any, ...]:
        """All samples of one type."""
        return tuple(sample for entry in self.entries for sample in entry.samples if isinstance(sample, kind))

    @property
    def missed_by_kind(self) -> dict[str, int]:
        """How many points of each kind were not measured."""
        return dict(Counter(point.kind for point in self.missed))

    @property
    def refusals(self) -> dict[str, str]:
        """Per kind and variant, how many points the device refused and the first reason."""
        found: dict[str, list[str]] = {}
        for entry in self.entries:
            if entry.refused is not None:
                found.setdefault(_variant(entry.point), []).append(entry.refused)
        return {variant: f"{len(reasons)}: {reasons[0]}" for variant, reasons in found.items()}

    @property
    def gemm(self) -> tuple[GemmSample, ...]:
        return self.samples(GemmSample)

    @property
    def attention(self) -> tuple[AttentionSample, ...]:
        return self.samples(AttentionSample)

    @property
    def memory(self) -> tuple[MemorySample, ...]:
        return self.samples(MemorySample)

    @property
    def copies(self) -> tuple[CopySample, ...]:
        return self.samples(CopySample)

    @property
    def layers(self) -> tuple[LayerSample, ...]:
        return self.samples(LayerSample)

    @property
    def sustained(self) -> tuple[SustainedSample, ...]:
        return self.samples(SustainedSample)


def measure_points(
    device: Measures,
    points: Sequence[Point],
    *,
    needed: int,
    until_s: float,
    record: Path,
    now: Callable[[], float],
    tell: Callable[[str], None],
) -> Measured:
    """Measure `points` in their order until `now()` reaches `until_s`; what `record` holds already is not repeated.

    A point is begun only where the longest time that one of its kind took so far (of any, for the first) still fits:
    the order of `points` has the largest of each kind among the first. The first `needed` ones are measured in any
    case. ExecutionError where the device measured nothing at all.
    """
    known: Mapping[Point, Entry] = read_record(record)
    entries: list[Entry] = []
    missed: list[Point] = []
    longest_s: dict[str, float] = {p.kind: p.seconds for p in points if isinstance(p, SustainedPoint)}
    any_s = max((entry.took_s for entry in known.values()), default=0.0)
    for entry in known.values():
        longest_s[entry.point.kind] = max(longest_s.get(entry.point.kind, 0.0), entry.took_s)
    told = now()
    with record.open("a", encoding="utf-8") as file:
        for number, point in enumerate(points):
            if point in known:
                entry = known[point]
            else:
                begin = now()
                if number >= needed and begin + longest_s.get(point.kind, any_s) >= until_s:
                    missed.append(point)
                    continue
                entry = _measure(device, point, begin, now)
                longest_s[point.kind] = max(longest_s.get(point.kind, 0.0), entry.took_s)
                any_s = max(any_s, entry.took_s)
                file.write(json.dumps(files.plain(entry)) + "\n")
                file.flush()
            entries.append(entry)
            if now() - told >= _TELL_EVERY_S:
                told = now()
                left_s = max(0.0, until_s - told)
                tell(f"{number + 1} of {len(points)} kernels ({point.kind}), at most {left_s:.0f} s left")
    if not any(entry.samples for entry in entries):
        reason = next((entry.refused for entry in entries), "the budget is too short")
        raise ExecutionError(f"nothing could be measured: {reason}")
    return Measured(tuple(entries), tuple(missed))


def read_record(path: Path) -> dict[Point, Entry]:
    """The points that an interrupted probe wrote down; a last line that was cut off is taken away from the file."""
    if not path.exists():
        return {}
    found: dict[Point, Entry] = {}
    good = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry: Entry = files.validated(Entry, json.loads(line), str(path))
        except (ValueError, ClustersimError):
            break
        if not line.endswith(b"\n"):
            break
        found[entry.point] = entry
        good += len(line)
    if good < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(good)
    return found


def _measure(device: Measures, point: Point, begin: float, now: Callable[[], float]) -> Entry:
    samples: tuple[Sample, ...] = ()
    refused = None
    try:
        samples = device.measure(point)
    except RefusedPoint as error:
        refused = str(error)
    return Entry(point=point, samples=samples, refused=refused, took_s=now() - begin)


def _variant(point: Point) -> str:
    match point:
        case GemmPoint():
            return f"gemm {point.dtype}"
        case AttentionPoint():
            return f"attention {point.backend}"
        case _:
            return point.kind
