"""A framework: what the software does with the hardware."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from clustersim.hardware.kernel import Dtype
from clustersim.hardware.provenance import Provenance
from clustersim.units import FILE, Bytes, Fraction, Positive, Seconds

Schedule = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCost:
    """CPU time the framework spends to drive the device; a step takes the larger of it and the device's time.

    `per_collective` is spent before every collective, pipeline send, push and pull begins.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    per_layer_forward_s: Seconds
    per_layer_backward_s: Seconds
    per_micro_batch_s: Seconds
    per_step_s: Seconds
    per_collective_s: Seconds = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """What runs beside what, and how much it slows down the other (1 = not at all).

    `tensor_parallel`: the part of the gathers and scatters of sequence parallelism that runs in pieces beside the GEMMs
    which consume or produce them.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    gradient_reduce: bool
    parameter_gather: bool
    pipeline_send: bool
    tensor_parallel: Fraction = 0.0
    compute_slowdown: Positive = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Framework:
    """A framework profile, `hwprofiles/frameworks/<name>.yaml`.

    `scatter_gather`: a pipeline send carries 1/tp of the activations from each tensor-parallel rank, gathered after.
    `memory_overhead_bytes`: context, communicators and workspaces; `fragmentation`: what the allocator adds to the
    tensors it holds. `schedules`: the pipeline schedules that it can run. `compute_scale` and `network_scale` multiply
    kernel and collective times: 1 unless calibrated.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    schema_version: Literal[1] = 1
    name: str
    attention: Literal["flash", "unfused"]
    fused_elementwise: bool
    gradient_dtype: Dtype
    host: HostCost
    overlap: Overlap
    scatter_gather: bool
    schedules: tuple[Schedule, ...] = ("1f1b", "interleaved", "gpipe")
    memory_overhead_bytes: Bytes
    fragmentation: Fraction
    compute_scale: Positive = 1.0
    network_scale: Positive = 1.0
    provenance: Provenance
    calibrated: dict[str, Provenance] = field(default_factory=dict)
