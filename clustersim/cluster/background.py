"""Traffic of other jobs: what they take of the links that they share with ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.units import FILE, Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """Other jobs use the fraction `share` of some links all the time, in both directions; ours share what is left.

    `link`: the NIC ports of nodes (worker nodes are numbered first, then server hosts), or the uplinks of leaves. `at`:
    the numbers of these nodes or leaves; without it, all. Shares of several entries on one link add up.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    link: Literal["nic", "leaf-uplink"]
    share: Fraction
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ValueError("share must be more than 0 and less than 1, e.g. 30%")
        if self.at is not None and not self.at:
            raise ValueError("at names no link; leave it out for all of them")
        if self.at is not None and len(set(self.at)) < len(self.at):
            raise ValueError("at names a link twice; write another entry to add to its share")
