"""A calibration: what runs on one kind of cluster say about the constants of one framework."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, assert_never

from clustersim.files import load, profile_folders
from clustersim.hardware.framework import Framework
from clustersim.hardware.provenance import Provenance
from clustersim.units import FILE, Fraction, Positive, Seconds

# Constants of a framework by their keys in its file.
ScaleName = Literal[
    "compute_scale", "network_scale", "overlap.compute_slowdown", "scales.memory", "scales.misaligned",
    "scales.attention", "scales.tensor_parallel", "scales.synchronisation", "scales.send",
]  # fmt: skip
TimeName = Literal[
    "host.per_layer_forward", "host.per_layer_backward", "host.per_micro_batch", "host.per_step", "host.per_collective"
]
ConstantName = ScaleName | TimeName

# fitted: the runs determine it. kept: they do not, and the value from before stands. bound: it ended at the edge of
# what is possible, and the runs exclude the value from before; no measurement, but the nearest possible value.
Status = Literal["fitted", "kept", "bound"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleConstant:
    """A factor, with its standard error; None where the runs say nothing about it."""

    __pydantic_config__: ClassVar[Any] = FILE
    name: ScaleName
    value: Positive
    uncertainty: Fraction | None
    before: Positive
    status: Status
    identified: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeConstant:
    """A time, with its standard error; None where the runs say nothing about it."""

    __pydantic_config__: ClassVar[Any] = FILE
    name: TimeName
    value_s: Seconds
    uncertainty_s: Seconds | None
    before_s: Seconds
    status: Status
    identified: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedRun:
    """A program that was run (once or several times), and the errors of its step time: predicted / measured - 1 with
    the constants from before, with the fitted ones, and with ones fitted to all other programs. `worker_nodes`: on how
    many; older files do not say."""

    __pydantic_config__: ClassVar[Any] = FILE
    model: str
    layout: str
    program_digest: str
    run_digests: tuple[str, ...]
    worker_nodes: int | None = None
    step_s: Seconds
    error_before: float
    error_after: float
    error_left_out: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedStep:
    """A row of measured steps, and the errors of its step time, as of a `CalibratedRun`. Rows of one number of
    `configuration` repeat each other, and are left out together; older files do not say."""

    __pydantic_config__: ClassVar[Any] = FILE
    row: str
    layout: str
    configuration: int | None = None
    worker_nodes: int | None = None
    step_s: Seconds
    error_before: float
    error_after: float
    error_left_out: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trade:
    """Two constants whose estimates hang together: what one gains, the other loses (a correlation near -1), or both
    gain. Only a combination of the two is determined."""

    __pydantic_config__: ClassVar[Any] = FILE
    one: ConstantName
    other: ConstantName
    correlation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """`calibrations/<nodes>--<framework>.yaml`: constants of `framework` on clusters of `nodes` (kinds of worker nodes,
    sorted), from `runs` of clustersim's own or from rows of measured `steps`. The mean errors are of
    |predicted / measured - 1| over them, every configuration counted once; the left-out one is what to expect of a
    program that was not run. `trades`: constants that these rows do not tell apart."""

    __pydantic_config__: ClassVar[Any] = FILE
    schema_version: Literal[1] = 1
    nodes: tuple[str, ...]
    framework: str
    constants: tuple[ScaleConstant | TimeConstant, ...]
    runs: tuple[CalibratedRun, ...] = ()
    steps: tuple[CalibratedStep, ...] = ()
    trades: tuple[Trade, ...] = ()
    mean_error_before: float
    mean_error_after: float
    mean_error_left_out: float
    provenance: Provenance

    @property
    def name(self) -> str:
        """The name of its file."""
        return calibration_name(self.nodes, self.framework)

    def left_out(self, *, several_nodes: bool | None = None) -> tuple[float, ...]:
        """The left-out errors, in logarithms and without sign: the largest of every configuration. `several_nodes`:
        only of those on several nodes, or on one; None: of all. Rows of which the file does not say it count always."""
        found: dict[tuple[str, int], float] = {}
        measured: tuple[CalibratedRun | CalibratedStep, ...] = (*self.runs, *self.steps)
        for index, each in enumerate(measured):
            repeated = each.configuration if isinstance(each, CalibratedStep) else None
            key = ("alone", index) if repeated is None else ("repeated", repeated)
            if several_nodes is None or each.worker_nodes is None or (each.worker_nodes > 1) == several_nodes:
                found[key] = max(found.get(key, 0.0), abs(math.log1p(each.error_left_out)))
        return tuple(found.values())

    def applied(self, framework: Framework) -> Framework:
        """`framework` with the constants found here, each with its provenance."""
        for constant in self.constants:
            if constant.status != "kept":
                value = constant.value if isinstance(constant, ScaleConstant) else constant.value_s
                framework = with_constant(framework, constant.name, value)
                framework = replace(framework, calibrated={**framework.calibrated, constant.name: self.provenance})
        return framework


def calibration_name(nodes: Iterable[str], framework: str) -> str:
    """The name of the calibration of a framework on clusters of these kinds of worker nodes."""
    return f"{'+'.join(sorted(set(nodes)))}--{framework}"


def with_constant(framework: Framework, name: ConstantName, value: float) -> Framework:
    """`framework` with one constant replaced."""
    match name:
        case "compute_scale":
            return replace(framework, compute_scale=value)
        case "network_scale":
            return replace(framework, network_scale=value)
        case "overlap.compute_slowdown":
            return replace(framework, overlap=replace(framework.overlap, compute_slowdown=value))
        case "scales.memory":
            return replace(framework, scales=replace(framework.scales, memory=value))
        case "scales.misaligned":
            return replace(framework, scales=replace(framework.scales, misaligned=value))
        case "scales.attention":
            return replace(framework, scales=replace(framework.scales, attention=value))
        case "scales.tensor_parallel":
            return replace(framework, scales=replace(framework.scales, tensor_parallel=value))
        case "scales.synchronisation":
            return replace(framework, scales=replace(framework.scales, synchronisation=value))
        case "scales.send":
            return replace(framework, scales=replace(framework.scales, send=value))
        case "host.per_layer_forward":
            return replace(framework, host=replace(framework.host, per_layer_forward_s=value))
        case "host.per_layer_backward":
            return replace(framework, host=replace(framework.host, per_layer_backward_s=value))
        case "host.per_micro_batch":
            return replace(framework, host=replace(framework.host, per_micro_batch_s=value))
        case "host.per_step":
            return replace(framework, host=replace(framework.host, per_step_s=value))
        case "host.per_collective":
            return replace(framework, host=replace(framework.host, per_collective_s=value))
        case _:
            assert_never(name)


def constant_of(framework: Framework, name: ConstantName) -> float:
    """The value of a constant: a factor, or seconds."""
    match name:
        case "compute_scale":
            return framework.compute_scale
        case "network_scale":
            return framework.network_scale
        case "overlap.compute_slowdown":
            return framework.overlap.compute_slowdown
        case "scales.memory":
            return framework.scales.memory
        case "scales.misaligned":
            return framework.scales.misaligned
        case "scales.attention":
            return framework.scales.attention
        case "scales.tensor_parallel":
            return framework.scales.tensor_parallel
        case "scales.synchronisation":
            return framework.scales.synchronisation
        case "scales.send":
            return framework.scales.send
        case "host.per_layer_forward":
            return framework.host.per_layer_forward_s
        case "host.per_layer_backward":
            return framework.host.per_layer_backward_s
        case "host.per_micro_batch":
            return framework.host.per_micro_batch_s
        case "host.per_step":
            return framework.host.per_step_s
        case "host.per_collective":
            return framework.host.per_collective_s
        case _:
            assert_never(name)


def find_calibration(nodes: Iterable[str], framework: str) -> Calibration | None:
    """The nearest calibration for these kinds of worker nodes and this framework, where there is one."""
    name = f"{calibration_name(nodes, framework)}.yaml"
    for root in profile_folders():
        path = root / "calibrations" / name
        if path.is_file():
            return _read(str(path.resolve()), path.stat().st_mtime_ns)
    return None


# Keyed by when the file changed, too: calibrating replaces it.
@functools.lru_cache(maxsize=32)
def _read(path: str, changed_ns: int) -> Calibration:
    found: Calibration = load(Calibration, Path(path))
    return found
