"""One transformer layer on one rank: its shard's widths, and the kernels of each of its parts.

Conventions, for one micro-batch of b sequences of s tokens on one of t tensor-parallel ranks:

- GEMMs are (m, k) by (k, n): m = b s tokens, n outputs, k inputs; Q, K and V are one GEMM, and so are gate
  and up. The backward pass has two GEMMs of the same size for each: the gradients of the input and of the
  weight.
- A Memory kernel reads and writes each of its large operands once. Operands of h elements (norm weights,
  biases) and of one per token (norm statistics) are not counted. A dropout mask takes one byte an element.
- Without sequence parallelism every tensor-parallel rank does all of the norms, residuals and dropouts
  between the split GEMMs; with it, 1/t of them (Korthikanti et al. 2022).
- A bias goes with the activation or into the GEMM (cuBLASLt's epilogue; PyTorch's addmm); its gradient is a pass.
- `fused`: dropout and residual are one pass, and so are scale, mask and softmax. Otherwise each is a pass of its own.
- fp8 covers the GEMMs of the layers, each with a cast of its inputs; everything else stays in bf16.
- Of c context-parallel ranks each has s/c tokens of every sequence, two of 2c equal pieces: the i-th from the
  front and the i-th from the back, so that under a causal mask each does 1/c of the attention. Attention takes
  c steps, one for each block of keys and values as it comes round (ring attention, Liu et al. 2023): its own
  block under the mask, then every query against the earlier half of a block, or the later half of the queries
  against all of it, which is as much work. The first of these is what is enumerated.
- Of e expert-parallel ranks each has 1/e of the experts. `load` is what the fullest of them computes, relative
  to the mean; the others wait for it. `fused`: experts with as many tokens are one grouped GEMM (a batch), and
  one pass over all their tokens; otherwise they run one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import (
    BYTES_OF,
    Attention,
    AttentionKernel,
    Dtype,
    Gemm,
    Kernel,
    Kernels,
    Memory,
    MemoryOp,
)
from clustersim.workload.elementwise import activation, activation_backward, norm, rotary
from clustersim.workload.model import Model
from clustersim.workload.routing import dealt, routed_tokens
from clustersim.workload.training import Workload

# Fused attention of the generation that the device measured, or of a named one; or score matrices in memory.
AttentionKind = Literal["flash", "unfused", "flash-1", "flash-2", "flash-3", "cudnn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What one rank computes of one layer for one micro-batch, and how: all that its kernels, the tensors that it keeps
    and its collectives follow from.

    Of `micro_batch` sequences of `sequence` tokens, whole, the rank has 1/`cp`; `tp` ranks share the layer (it must
    divide heads and feed-forward columns: `Model.splits_over`), under `sequence_parallel` what lies between the split
    GEMMs too; `ep` ranks share the experts, of which the fullest sees `load` times the mean.
    """

    model: Model
    sequence: int
    micro_batch: int
    tp: int
    sequence_parallel: bool
    cp: int
    ep: int
    load: float
    dtype: Dtype
    attention_kind: AttentionKind
    fused: bool

    def __post_init__(self) -> None:
        assert self.cp == 1 or (self.sequence % (2 * self.cp) == 0 and self.attention_kind != "unfused"), self
        assert self.model.splits_over(self.tp), (self.model.name, self.tp)
        assert not self.sequence_parallel or self.tokens % self.tp == 0, (self.tokens, self.tp)
        assert self.model.experts is None or self.model.experts.count % self.ep == 0, (self.model.name, self.ep)

    def __hash__(self) -> int:
        # Blocks are keys of caches, and a process has few models: their thirty fields tell nothing more apart.
        return hash((self.sequence, self.micro_batch, self.tp, self.sequence_parallel, self.cp, self.ep, self.dtype))

    @classmethod
    def of(
        cls, workload: Workload, framework: Framework, *, micro_batch: int, tp: int, sequence_parallel: bool, cp: int,
        ep: int, dtype: Dtype,
    ) -> Block:  # fmt: skip
        """A rank's share of a workload's layers under these degrees, as the framework computes it."""
        return cls(
            model=workload.model, sequence=workload.training.sequence, micro_batch=micro_batch, tp=tp,
            sequence_parallel=sequence_parallel, cp=cp, ep=ep, load=workload.training.expert_load(ep), dtype=dtype,
            attention_kind=framework.attention, fused=framework.fused_elementwise,
        )  # fmt: skip

    @property
    def rank_sequence(self) -> int:
        """Tokens of each sequence on this rank."""
        return self.sequence // self.cp

    @property
    def tokens(self) -> int:
        """Tokens that enter the GEMMs."""
        return self.rank_sequence * self.micro_batch

    @property
    def local(self) -> int:
        """Tokens that enter norms, residuals and dropouts."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens

    @property
    def generation(self) -> AttentionKernel | None:
        """The named generation of fused attention; None: the one that the device measured, or unfused."""
        kind = self.attention_kind
        return None if kind == "flash" or kind == "unfused" else kind

    @property
    def soft_dtype(self) -> Dtype:
        """The type of everything that fp8 does not cover."""
        return "bf16" if self.dtype == "fp8" else self.dtype

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return BYTES_OF[self.soft_dtype]

    @property
    def heads(self) -> int:
        return self.model.heads // self.tp

    @property
    def kv_heads(self) -> int:
        return self.model.kv_heads_per_rank(self.tp)

    @property
    def q(self) -> int:
        return self.heads * self.model.head_dim

    @property
    def qkv(self) -> int:
        return self.q + 2 * self.kv_heads * self.model.head_dim

    @property
    def scores(self) -> int:
        """Elements of the attention scores of the shard."""
        return self.micro_batch * self.heads * self.sequence * self.sequence

    def expert_tokens(self) -> tuple[tuple[int, int], ...]:
        """(tokens, experts with that many) on the fullest rank: its choices, as even as can be dealt."""
        experts = self.model.experts
        assert experts is not None
        here = experts.count // self.ep
        routed = routed_tokens(self.tokens * experts.per_token, self.load)
        together = dealt(routed)
        each, more = divmod(routed // together, here)
        shares = ((each + 1) * together, more), (each * together, here - more)
        return tuple((m, count) for m, count in shares if m and count)

    # ---------------------------------------------------------------------------------------- single kernels

    def moved(self, op: MemoryOp, read: int, written: int, mask: int = 0, writes_mask: bool = False) -> Kernels:
        """A Memory kernel of `read` and `written` elements, and a mask of `mask` bytes, read or written."""
        kernel = Memory(
            op=op,
            read_bytes=read * self.width + (0 if writes_mask else mask),
            written_bytes=written * self.width + (mask if writes_mask else 0),
        )
        return ((kernel, 1),)

    def linear(self, m: int, n: int, k: int, count: int = 1, group: int = 1) -> Kernels:
        """A linear layer's forward GEMM, with the cast of its input where the GEMM is fp8; `group` of them at once."""
        return (*self._cast(group * m * k, count), (Gemm(m=m, n=n, k=k, batch=group, dtype=self.dtype), count))

    def linear_backward(self, m: int, n: int, k: int, count: int = 1, group: int = 1) -> Kernels:
        """Its two backward GEMMs: gradient of the input, gradient of the weight."""
        return (
            *self._cast(group * m * n, count),
            (Gemm(m=m, n=k, k=n, batch=group, dtype=self.dtype), count),
            (Gemm(m=n, n=k, k=m, batch=group, dtype=self.dtype), count),
        )

    def _cast(self, elements: int, count: int) -> Kernels:
        if self.dtype != "fp8":
            return ()
        # Written as it is and transposed: Hopper multiplies in fp8 along the rows of both operands only.
        return ((Memory(op="cast", read_bytes=elements * self.width, written_bytes=2 * elements), count),)

    def batched(self, m: int, n: int, k: int) -> tuple[Kernel, int]:
        """A GEMM for every head and sequence."""
        return Gemm(m=m, n=n, k=k, batch=self.micro_batch * self.heads, dtype=self.soft_dtype), 1

    # ----------------------------------------------------------------------------------------------- forward

    def norm(self) -> Kernels:
        return self._norm(self.local * self.model.hidden)

    def _norm(self, elements: int, backward: bool = False) -> Kernels:
        return norm(elements, self.width, self.model.norm == "rmsnorm" and not self.fused, backward)

    def join(self) -> Kernels:
        """From the output of a row-parallel GEMM to the residual stream: bias, dropout, addition."""
        n = self.local * self.model.hidden
        drop = self.model.dropout
        if self.fused:
            return self.moved("residual", 2 * n, n, mask=n if drop else 0, writes_mask=True)
        dropout = self.moved("dropout", n, n, mask=n, writes_mask=True) if drop else ()
        return (*dropout, *self.moved("residual", 2 * n, n))

    def core(self) -> Kernels:
        """Attention without its projections."""
        if self.attention_kind != "unfused":
            return self._rounds(backward=False)
        s, d, n = self.sequence, self.model.head_dim, self.scores
        mask = () if self.fused else self.moved("softmax", n, n)
        dropout = self.moved("dropout", n, n, mask=n, writes_mask=True) if self.model.dropout else ()
        return (self.batched(s, s, d), *mask, *self.moved("softmax", n, n), *dropout, self.batched(s, d, s))

    def _rounds(self, backward: bool) -> Kernels:
        """Fused attention, in as many steps as there are context-parallel ranks."""
        later = self.ring_step(backward) if self.cp > 1 else ()
        return (*self.own_step(backward), *((kernel, count * (self.cp - 1)) for kernel, count in later))

    def own_step(self, backward: bool) -> Kernels:
        """Attention of the rank's queries to its own keys and values."""
        return ((self._attention(self.rank_sequence, self.model.kind == "decoder", backward), 1),)

    def ring_step(self, backward: bool) -> Kernels:
        """Attention to a block of keys and values from another rank, and the addition of what comes of it to the
        output, or to the gradients of the queries and of the block."""
        decoder = self.model.kind == "decoder"
        keys = self.rank_sequence // (2 if decoder else 1)
        queries = self.tokens * self.q
        block = self.micro_batch * keys * 2 * self.kv_heads * self.model.head_dim
        return (
            (self._attention(keys, False, backward), 1),
            *self.moved("residual", 2 * queries, queries),
            *(self.moved("residual", 2 * block, block) if backward else ()),
        )

    def _attention(self, keys: int, causal: bool, backward: bool) -> Attention:
        return Attention(
            batch=self.micro_batch, queries=self.rank_sequence, keys=keys, heads=self.heads,
            kv_heads=self.kv_heads, head_dim=self.model.head_dim, causal=causal, backward=backward,
            dtype=self.soft_dtype, generation=self.generation,
        )  # fmt: skip

    def shaped_qk(self, backward: bool) -> Kernels:
        """Norms of Q and K, and rotary positions."""
        n = self.tokens * (self.qkv + self.q) // 2  # Q and K
        normed = self._norm(n, backward) if self.model.qk_norm else ()
        turned = rotary(n, self.width, not self.fused) if self.model.rotary else ()
        return (*turned, *normed) if backward else (*normed, *turned)

    def attention(self) -> Kernels:
        model, t = self.model, self.tokens
        return (
            *self.norm(),
            *self.linear(t, self.qkv, model.hidden),
            *self.shaped_qk(backward=False),
            *self.core(),
            *self.linear(t, model.hidden, self.q),
            *self.join(),
        )

    def feed_forward(self) -> Kernels:
        model = self.model
        if model.experts is not None:
            return (*self.norm(), *self._experts(), *self.join())
        f, inner = self._ffn(model.ffn_hidden)
        return (*self.norm(), *self._mlp(self.tokens, f, inner, 1), *self.join())

    def _ffn(self, hidden: int) -> tuple[int, int]:
        """Columns of the shard behind the activation, and before it."""
        f = hidden // self.tp
        return f, 2 * f if self.model.gated else f

    def _mlp(self, m: int, f: int, inner: int, experts: int) -> Kernels:
        """Feed-forwards of `experts` experts (1: of a dense layer) on `m` tokens each."""
        group, count = (experts, 1) if self.fused else (1, experts)
        rows = m * group
        return (
            *self.linear(m, inner, self.model.hidden, count, group),
            *((kernel, count) for kernel, _ in activation(rows * inner, rows * f, self.width, not self.fused)),
            *self.linear(m, self.model.hidden, f, count, group),
        )

    def _experts(self) -> Kernels:
        experts, h = self.model.experts, self.model.hidden
        assert experts is not None
        f, inner = self._ffn(experts.hidden)
        chosen = self.local * experts.per_token * h
        scores = Memory(
            op="softmax",
            read_bytes=4 * self.local * experts.count,
            written_bytes=4 * self.local * experts.count,
        )
        return (
            (Gemm(m=self.local, n=experts.count, k=h, dtype=self.soft_dtype), 1),
            (scores, 1),
            *self.moved("copy", self.local * h, chosen),
            *self.sorted_by_expert(),
            *(kernel for m, count in self.expert_tokens() for kernel in self._mlp(m, f, inner, count)),
            *self.sorted_by_expert(),
            *self.moved("copy", chosen, self.local * h),
        )

    def sorted_by_expert(self) -> Kernels:
        """Tokens that came from several ranks, put in the order of the rank's experts, or back."""
        experts = self.model.experts
        assert experts is not None
        if self.ep in (1, experts.count):
            return ()
        rows = routed_tokens(self.local * experts.per_token, self.load) * self.model.hidden
        return self.moved("copy", rows, rows)

    def alternate_products(self) -> Kernels:
        """What runs again where every second product of a layer's (q, k, v, o, gate, up, down) is not kept, and nothing
        between them but attention's output. Experts are kept."""
        model, t = self.model, self.tokens
        first = (
            *self.norm(),
            *self.linear(t, self.kv_heads * model.head_dim, model.hidden),
            *self.shaped_qk(backward=False),
            *self.linear(t, model.hidden, self.q),
            *self.join(),
            *self.norm(),
        )
        if model.experts is not None:
            return first
        f, inner = self._ffn(model.ffn_hidden)
        again = (t, f, model.hidden) if model.gated else (t, model.hidden, f)
        return (*first, *self.linear(*again), *activation(t * inner, t * f, self.width, not self.fused))

    # ---------------------------------------------------------------------------------------------- backward

    def bias_gradient(self, elements: int, has: bool) -> Kernels:
        """The sum of a gradient over the tokens."""
        return self.moved("bias", elements, 0) if has else ()

    def norm_backward(self) -> Kernels:
        """Gradient of a norm, then its addition to the gradient that came past it."""
        n = self.local * self.model.hidden
        return (*self._norm(n, backward=True), *self.moved("residual", 2 * n, n))

    def join_backward(self) -> Kernels:
        n = self.local * self.model.hidden
        dropout = self.moved("dropout", n, n, mask=n) if self.model.dropout else ()
        return (*dropout, *self.bias_gradient(n, self.model.bias))

    def core_backward(self) -> Kernels:
        if self.attention_kind != "unfused":
            return self._rounds(backward=True)
        s, d, n = self.sequence, self.model.head_dim, self.scores
        dropout = self.moved("dropout", n, n, mask=n) if self.model.dropout else ()
        mask = () if self.fused else self.moved("softmax", n, n)
        return (
            self.batched(s, s, d),
            self.batched(s, d, s),
            *dropout,
            *self.moved("softmax", 2 * n, n),
            *mask,
            self.batched(s, d, s),
            self.batched(s, d, s),
        )

    def attention_backward(self) -> Kernels:
        model, t = self.model, self.tokens
        return (
            *self.join_backward(),
            *self.linear_backward(t, model.hidden, self.q),
            *self.core_backward(),
            *self.shaped_qk(backward=True),
            *self.bias_gradient(t * self.qkv, model.bias or model.qkv_bias),
            *self.linear_backward(t, self.qkv, model.hidden),
            *self.norm_backward(),
        )

    def feed_forward_backward(self) -> Kernels:
        model = self.model
        if model.experts is not None:
            return (*self.join_backward(), *self._experts_backward(), *self.norm_backward())
        f, inner = self._ffn(model.ffn_hidden)
        return (*self.join_backward(), *self._mlp_backward(self.tokens, f, inner, 1), *self.norm_backward())

    def _mlp_backward(self, m: int, f: int, inner: int, experts: int) -> Kernels:
        group, count = (experts, 1) if self.fused else (1, experts)
        rows = m * group
        passes = (
            *activation_backward(rows * inner, rows * f, self.width, not self.fused),
            *self.bias_gradient(rows * inner, self.model.bias),
        )
        return (
            *self.linear_backward(m, self.model.hidden, f, count, group),
            *((kernel, count) for kernel, _ in passes),
            *self.linear_backward(m, inner, self.model.hidden, count, group),
        )

    def _experts_backward(self) -> Kernels:
        experts, h = self.model.experts, self.model.hidden
        assert experts is not None
        f, inner = self._ffn(experts.hidden)
        chosen = self.local * experts.per_token * h
        scores = Memory(
            op="softmax",
            read_bytes=8 * self.local * experts.count,
            written_bytes=4 * self.local * experts.count,
        )
        router = (self.local, experts.count, h)
        return (
            # The gradient of the router's weights needs the experts' outputs.
            *self.moved("copy", self.local * h + chosen, chosen),
            *self.sorted_by_expert(),
            *(kernel for m, count in self.expert_tokens() for kernel in self._mlp_backward(m, f, inner, count)),
            *self.sorted_by_expert(),
            *self.moved("copy", chosen, self.local * h),
            (scores, 1),
            (Gemm(m=router[0], n=router[2], k=router[1], dtype=self.soft_dtype), 1),
            (Gemm(m=router[1], n=router[2], k=router[0], dtype=self.soft_dtype), 1),
        )
