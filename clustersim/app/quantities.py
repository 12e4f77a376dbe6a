"""Options that take a figure with its unit."""

from __future__ import annotations

from typing import get_args

from clustersim.errors import UsageError


def quantity(option: str, text: str, name: str) -> float:
    """`text` in the unit type `name` of `clustersim.units` ("Seconds": `30s`, `5min`); UsageError otherwise."""
    # Only commands that are run need the units' library.
    from clustersim import units

    unit = get_args(getattr(units, name))[1]
    assert isinstance(unit, units.Quantity)
    try:
        return unit.parse(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None
