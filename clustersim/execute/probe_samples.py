"""What a probe asks for (points) and what it finds (samples), as plain records. No torch here.

A point names one measurement; it is written down beside what it gave, so that a probe that was interrupted can go on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from clustersim.hardware.curve import CollectiveKind
from clustersim.hardware.kernel import Dtype, MemoryOp

PLAIN: dict[str, Any] = {"extra": "forbid"}

# A product as a linear layer calls it (x W^T), the gradient of its input (y W) and of its weights (y^T x).
Form = Literal["forward", "dgrad", "wgrad"]
# Who computes attention: what PyTorch picks by itself, or one that is named.
Backend = Literal["default", "flash", "cudnn", "efficient"]
Direction = Literal["host-to-device", "device-to-host", "device-to-device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """The median of `samples` timings, and the distance between their quartiles over the median; `rejected` is the
    share of all timings that were too far from the others to count."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    seconds: float
    spread: float
    samples: int
    rejected: float = 0.0


# ----------------------------------------------------------------------------------------------------------- points


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmPoint:
    """`batch` products (m, k) by (k, n)."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    kind: Literal["gemm"] = "gemm"
    dtype: Dtype
    m: int
    n: int
    k: int
    batch: int = 1
    form: Form = "forward"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPoint:
    """Causal attention over `instances` (sequence of the batch, head) pairs; `group` is heads over kv_heads."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    kind: Literal["attention"] = "attention"
    dtype: Dtype
    instances: int
    sequence: int
    group: int
    head_dim: int
    backend: Backend = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPoint:
    """Every memory-bound operation on tensors of so many elements."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    kind: Literal["memory"] = "memory"
    dtype: Dtype
    elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPoint:
    """A copy between host and device memory, or within a device's."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    kind: Literal["copy"] = "copy"
    direction: Direction
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPoint:
    """A GPT of `layers` layers on one micro-batch of `tokens` tokens in sequences of `sequence`."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    kind: Literal["layer"] = "layer"
    layers: int
    hidden: int
    tokens: int
    sequence: int
    dtype: Dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class SustainedPoint:
    """A square product, first alone and then without a pause for `seconds`."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    kind: Literal["sustained"] = "sustained"
    dtype: Dtype
    side: int
    seconds: float


Point = Annotated[
    GemmPoint | AttentionPoint | MemoryPoint | CopyPoint | LayerPoint | SustainedPoint, Field(discriminator="kind")
]


# ---------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmSample:
    """A product of a `GemmPoint` with `threads` threads (0: on a GPU)."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    kind: Literal["gemm"] = "gemm"
    dtype: Dtype
    m: int
    n: int
    k: int
    batch: int = 1
    form: Form = "forward"
    threads: int
    time: Timed


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSample:
    """Causal scaled-dot-product attention, forward and backward; `group` is heads over kv_heads."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    kind: Literal["attention"] = "attention"
    dtype: Dtype
    instances: int
    sequence: int
    group: int
    head_dim: int
    backend: Backend = "default"
    forward: Timed
    backward: Timed


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample:
    """A memory-bound operation by the bytes that it reads and writes; forward and backward are averaged."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    kind: Literal["memory"] = "memory"
    op: MemoryOp
    bytes: int
    time: Timed


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySample:
    """A copy between host and device memory, or within a device's."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    kind: Literal["copy"] = "copy"
    direction: Direction
    bytes: int
    time: Timed


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSample:
    """A GPT of `layers` layers, one micro-batch of `tokens` tokens in sequences of `sequence`: forward, backward, and
    the optimizer's step. Small ones take what the host takes to drive them."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    kind: Literal["layer"] = "layer"
    layers: int
    hidden: int
    heads: int
    tokens: int
    sequence: int
    dtype: Dtype
    forward: Timed
    backward: Timed
    update: Timed


@dataclass(frozen=True, slots=True, kw_only=True)
class SustainedSample:
    """The rate of one large product as the tables' rows are timed, and after `seconds` without a pause: what power
    and heat take from a long step."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    kind: Literal["sustained"] = "sustained"
    dtype: Dtype
    side: int
    seconds: float
    burst_flops: float
    sustained_flops: float
    spread: float

    @property
    def derate(self) -> float:
        """Sustained over burst rate; 1 where the difference is within the spread of the timings."""
        ratio = self.sustained_flops / self.burst_flops
        return 1.0 if ratio > 1.0 - self.spread else ratio


Sample = Annotated[
    GemmSample | AttentionSample | MemorySample | CopySample | LayerSample | SustainedSample,
    Field(discriminator="kind"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveSample:
    """A gloo collective among `ranks` processes of this host."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    collective: CollectiveKind
    ranks: int
    bytes: int
    time: Timed


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageSample:
    """Two processes send each other `bytes` at once."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    bytes: int
    time: Timed


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSample:
    """`ranks` processes at once, each with `threads` threads, each running the same small model; the slowest's time.
    `call_s`: what starting one collective takes of the caller's time (0 with one rank)."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    ranks: int
    threads: int
    layer: Timed
    call_s: float


# ------------------------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProbe:
    """One device. `threads` it computed with (0: a GPU); `floor_s` is the time of the smallest kernel, `launch_s` what
    the host spends to launch one. `software` says driver and libraries, `before` and `after` clocks, temperature and
    limits when the measurements began and ended. `missed`: per kind, points that the budget had no time for;
    `refused`: points that the device could not do, with the first reason of each kind."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    kind: Literal["cpu", "gpu"]
    name: str
    memory_bytes: int
    threads: int
    floor_s: float
    launch_s: float
    power_w: float
    software: dict[str, str]
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    gemm: tuple[GemmSample, ...]
    attention: tuple[AttentionSample, ...]
    memory: tuple[MemorySample, ...]
    copies: tuple[CopySample, ...]
    layers: tuple[LayerSample, ...]
    sustained: tuple[SustainedSample, ...] = ()

    @property
    def rejected(self) -> float:
        """The mean share of timings that did not count."""
        times = [s.time for s in self.gemm] + [s.time for s in self.memory] + [s.time for s in self.copies]
        times += [t for s in self.attention for t in (s.forward, s.backward)]
        return sum(t.rejected for t in times) / len(times) if times else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What all cores do together, and whether torch can use GPUs."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    reduce_bytes_per_s: float
    gemm: tuple[GemmSample, ...]
    cuda: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Among:
    """What ranks measured together."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    shared: SharedSample
    collectives: tuple[CollectiveSample, ...]
    messages: tuple[MessageSample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was measured on one host. `reduce_bytes_per_s`: all cores adding gradients, bytes of input a second.
    `alone`: one rank with as many threads as the kernel tables were measured with; `shared`: 1, 2, ... ranks."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    schema_version: Literal[1] = 1
    date: str
    quick: bool
    took_s: float
    cpu: str
    cores: int
    sockets: int
    memory_bytes: int
    reduce_bytes_per_s: float
    devices: tuple[DeviceProbe, ...]
    alone: SharedSample
    shared: tuple[SharedSample, ...]
    collectives: tuple[CollectiveSample, ...]
    messages: tuple[MessageSample, ...]
