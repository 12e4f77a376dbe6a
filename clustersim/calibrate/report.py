"""What a fit says of a constant, as calibrations hold it."""

from __future__ import annotations

import math

from clustersim.calibrate.constants import is_scale, unit_s, value_at
from clustersim.hardware.calibration import ConstantName, ScaleConstant, Status, TimeConstant, constant_of
from clustersim.hardware.framework import Framework


def constant_at(
    before: Framework, name: ConstantName, at: float, error: float, status: Status
) -> ScaleConstant | TimeConstant:
    """The constant at a coordinate with its standard error (infinite: nothing is known)."""
    value = value_at(before, name, at)
    if is_scale(name):
        error *= value
    elif name.startswith("host."):
        error *= unit_s(before, name)
    uncertainty = error if math.isfinite(error) else None
    identified = status == "fitted"
    # mypy does not narrow a Literal by membership, so the two kinds are told apart by their members.
    match name:
        case (
            "host.per_layer_forward" | "host.per_layer_backward" | "host.per_micro_batch" | "host.per_step"
            | "host.per_collective"
        ):  # fmt: skip
            return TimeConstant(
                name=name, value_s=value, uncertainty_s=uncertainty, before_s=constant_of(before, name), status=status,
                identified=identified,
            )  # fmt: skip
        case _:
            return ScaleConstant(
                name=name, value=value, uncertainty=uncertainty, before=constant_of(before, name), status=status,
                identified=identified,
            )  # fmt: skip
