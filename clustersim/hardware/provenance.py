"""Where a figure comes from. Every table and every fitted constant carries one of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.units import FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Source, method and licence of a figure or a table; `datasheet` and `estimate` say that nobody measured it;
    `imported`: read from a file that another program wrote, `source`."""

    __pydantic_config__: ClassVar[Any] = FILE
    method: Literal["measured", "fitted", "datasheet", "estimate", "imported"]
    source: str
    software: str = "not stated"
    licence: str = "not stated"
    measured_by: str = "not stated"
    date: str = "not stated"
    clock: str = "not stated"
    rows: int = 0
    notes: str = ""
