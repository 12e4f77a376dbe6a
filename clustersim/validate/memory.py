"""Predicted device memory beside what sources state, and whether layouts that ran are called feasible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from clustersim.layout.memory import Footprint
from clustersim.validate.case import MemoryLevel


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """Bytes on the fullest device: what it cannot do without (`needed`), the levels that tools state, its capacity."""

    needed: float
    allocated: float
    reserved: float
    used: float
    capacity: float

    @classmethod
    def of(cls, found: Footprint, row: int, capacity: float) -> DeviceUse:
        """Of one row of a space. What the allocator would like to keep beyond the capacity, it gives back."""
        context = float(found.context[row])
        return cls(
            needed=float(found.worker[row]),
            allocated=float(found.allocated[row]),
            reserved=min(float(found.reserved[row]), capacity - context),
            used=min(float(found.used[row]), capacity),
            capacity=capacity,
        )

    @property
    def fits(self) -> bool:
        """Whether the layout is called feasible."""
        return self.needed <= self.capacity

    @property
    def headroom(self) -> float:
        """How far the need stays below the capacity, relative to it; negative where the layout is called infeasible."""
        return 1.0 - self.needed / self.capacity

    def at(self, level: MemoryLevel) -> float:
        """The bytes that a tool would state."""
        match level:
            case "allocated":
                return self.allocated
            case "reserved":
                return self.reserved
            case "used":
                return self.used
            case _:
                assert_never(level)
