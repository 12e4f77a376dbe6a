"""Kernels as work: shapes, bytes and types, never seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.units import FILE

Dtype = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8"]
# What gradients are summed and sent in. tf32 is a way to multiply, fp8 one to multiply and to keep inputs: no framework
# of the profiles adds gradients up in them.
GradientDtype = Literal["fp64", "fp32", "bf16", "fp16"]

# tf32 is stored as fp32.
BYTES_OF: dict[Dtype, int] = {"fp64": 8, "fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


def activation_width(dtype: Dtype) -> int:
    """Bytes of an element of what goes from layer to layer: fp8 covers the operands of linear layers only."""
    return BYTES_OF["bf16" if dtype == "fp8" else dtype]


# Generations of fused attention: FlashAttention 1 (in Triton), 2 and 3, and NVIDIA's own of cuDNN and TensorRT-LLM.
AttentionKernel = Literal["flash-1", "flash-2", "flash-3", "cudnn"]

MemoryOp = Literal[
    "norm",
    "softmax",
    "dropout",
    "activation",
    "residual",
    "rotary",
    "bias",
    "embedding",
    "cross_entropy",
    "optimizer",
    "reduce",
    "cast",
    "copy",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """`batch` independent products of (m, k) by (k, n)."""

    __pydantic_config__: ClassVar[Any] = FILE
    kind: Literal["gemm"] = "gemm"
    m: int
    n: int
    k: int
    batch: int = 1
    dtype: Dtype

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two."""
        return 2 * self.batch * self.m * self.n * self.k

    @property
    def traffic_bytes(self) -> int:
        """Bytes moved when each operand is touched once."""
        return BYTES_OF[self.dtype] * self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """A fused (flash) attention kernel: softmax(QK^T)V without the score matrix in memory.

    `generation`: which kernel runs; None: the one that the device's profile measured.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    kind: Literal["attention"] = "attention"
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    backward: bool
    dtype: Dtype
    generation: AttentionKernel | None = None

    @property
    def flops(self) -> int:
        """Operations of the two (forward) or five (backward) products; a causal mask halves them."""
        products = 5 if self.backward else 2
        full = 2 * products * self.batch * self.heads * self.queries * self.keys * self.head_dim
        return full // 2 if self.causal else full

    @property
    def traffic_bytes(self) -> int:
        """Bytes of Q, K, V and O (and of their gradients in the backward pass), each touched once."""
        once = self.batch * self.head_dim * (2 * self.heads * self.queries + 2 * self.kv_heads * self.keys)
        return BYTES_OF[self.dtype] * once * (2 if self.backward else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """An operation ruled by memory traffic: `read_bytes` in, `written_bytes` out, in one pass."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    kind: Literal["memory"] = "memory"
    op: MemoryOp
    read_bytes: int
    written_bytes: int

    @property
    def flops(self) -> int:
        """Not counted: the bytes decide."""
        return 0

    @property
    def traffic_bytes(self) -> int:
        """Bytes read and written."""
        return self.read_bytes + self.written_bytes


Kernel = Gemm | Attention | Memory

# Kernels with how many times each is launched.
Kernels = tuple[tuple[Kernel, int], ...]


def linear_layers(kernels: Kernels) -> Kernels:
    """The GEMMs among `kernels` that stand alone: of linear layers, not of attention's heads."""
    return tuple((kernel, count) for kernel, count in kernels if isinstance(kernel, Gemm) and kernel.batch == 1)
