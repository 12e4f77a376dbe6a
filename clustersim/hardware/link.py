"""A link: one direction of one wire, with the measured time of a message over its size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.hardware.provenance import Provenance
from clustersim.units import FILE, Bytes, BytesPerS, Fraction, Seconds

LinkKind = Literal["nvlink", "pcie", "infiniband", "roce", "ethernet", "socket", "memory", "loopback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One piece of a piecewise alpha-beta curve: from `from_bytes` on, t = alpha + bytes / (efficiency * rate)."""

    __pydantic_config__: ClassVar[Any] = FILE
    from_bytes: Bytes
    alpha_s: Seconds
    efficiency: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link profile, `hwprofiles/links/<name>.yaml`. `rate` is the datasheet's, **per direction**.

    `segments` describe one message from one sender to one receiver inside a running operation; the first starts at
    zero bytes. `launch` is what the operation (a send, or a whole collective) pays once: the software's share.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    schema_version: Literal[1] = 1
    name: str
    kind: LinkKind
    rate_bytes_per_s: BytesPerS
    launch_s: Seconds = 0.0
    segments: tuple[Segment, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        starts = [segment.from_bytes for segment in self.segments]
        if not starts or starts[0] != 0.0 or starts != sorted(set(starts)):
            raise ValueError("segments must start at 0B and grow, e.g. - {from: 0B, alpha: 2us, efficiency: 0.9}")
        if any(segment.efficiency <= 0.0 for segment in self.segments):
            raise ValueError("a segment's efficiency must be more than 0")
