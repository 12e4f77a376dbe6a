"""The data that training reads: how large a sample is, and how workers fetch it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from clustersim.units import FILE, Bytes, Fraction, Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The `data:` block. A sample (one sequence) is `sample` bytes on storage, and one request.

    Every rank of the first stage reads its part of its replica's batch, with `readers` threads that each fetch a sample
    and then decode it for `decode` of one core's time. `prefetch` batches are read ahead of the one that trains; 0
    reads a batch once the step before is over. `cache`: the fraction of samples that the workers hold in memory.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    sample_bytes: Bytes
    prefetch: int = 2
    readers: int = 8
    decode_s: Seconds = 0.0
    cache: Fraction = 0.0

    def __post_init__(self) -> None:
        if self.sample_bytes < 1.0:
            raise ValueError("sample must be at least 1B, e.g. 8KiB")
        if self.prefetch < 0:
            raise ValueError(f"prefetch must be at least 0, not {self.prefetch}")
        if self.readers < 1:
            raise ValueError(f"readers must be at least 1, not {self.readers}")
        if not 0.0 <= self.cache <= 1.0:
            raise ValueError("cache must be at least 0 and at most 1, e.g. 20%")

    def busy_readers(self, samples: float) -> int:
        """How many of a rank's readers have something to fetch: the samples of the batches that it may have under way,
        `samples` (its part) of each."""
        return min(self.readers, math.ceil(samples * max(1, self.prefetch)))
