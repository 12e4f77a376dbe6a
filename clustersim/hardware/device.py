"""A device: what one accelerator (or one CPU socket used as one) can do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from clustersim.hardware.kernel import AttentionKernel, Dtype, MemoryOp
from clustersim.hardware.provenance import Provenance
from clustersim.units import FILE, Bytes, BytesPerS, Flops, Fraction, Seconds, UsdPerHour, Watts


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """A dated price of one device for one hour."""

    __pydantic_config__: ClassVar[Any] = FILE
    hourly_usd_per_hour: UsdPerHour
    date: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRef:
    """A CSV beside the device file, and where its rows come from."""

    __pydantic_config__: ClassVar[Any] = FILE
    file: str
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTables:
    """The measured tables of a device; an empty one falls back to the roofline, and every prediction says so.

    `attention_kernel`: whose times the attention tables hold (and, without tables, the roofline's efficiencies): the
    newest that the device runs; older ones follow by published ratios. `attention_prepared`: the times include a pass
    over Q, K and V ahead of the kernel, as inference servers rotate Q and K and store K and V; it is taken off.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    gemm: tuple[TableRef, ...] = ()
    attention: tuple[TableRef, ...] = ()
    attention_kernel: AttentionKernel = "flash-2"
    attention_prepared: bool = False
    memory: tuple[TableRef, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What to assume where nothing was measured: fractions of the datasheet's peaks, and the floor of any kernel."""

    __pydantic_config__: ClassVar[Any] = FILE
    gemm_efficiency: Fraction
    attention_efficiency: Fraction
    attention_backward_efficiency: Fraction
    memory_efficiency: Fraction
    memory_op_efficiency: dict[MemoryOp, Fraction] = field(default_factory=dict)
    kernel_floor_s: Seconds
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device profile, `hwprofiles/devices/<name>/device.yaml`.

    `peak` maps a dtype to its dense peak; a dtype that is absent is refused by every kernel that needs it.
    `launch_overhead_s` is what the host spends to launch one kernel; `sustained_clock` is the fraction of the tables'
    speed (short bursts) that a long training step keeps.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    schema_version: Literal[1] = 1
    name: str
    kind: Literal["gpu", "cpu"]
    memory_bytes: Bytes
    memory_bandwidth_bytes_per_s: BytesPerS
    peak: dict[Dtype, Flops]
    power_w: Watts
    idle_power_w: Watts
    price: Price | None = None
    launch_overhead_s: Seconds
    sustained_clock: Fraction = 1.0
    roofline: Roofline
    tables: DeviceTables = field(default_factory=DeviceTables)
    provenance: Provenance
