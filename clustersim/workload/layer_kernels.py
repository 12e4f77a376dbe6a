"""The kernels of a layer, the embedding, the head and the optimizer on one rank; the FLOPs of a step.

`block.py` states the conventions. All functions return work, never seconds, and are cached: a search asks for
a few hundred combinations many times.
"""

from __future__ import annotations

import functools
from typing import Literal, assert_never

from clustersim.hardware.framework import Accumulation, Selective
from clustersim.hardware.kernel import BYTES_OF, Dtype, Gemm, Kernel, Kernels, Memory, MemoryOp
from clustersim.workload.block import AttentionKind, Block
from clustersim.workload.model import Model, vocab_per_rank
from clustersim.workload.parameters import stage_parameters
from clustersim.workload.training import STATE_TENSORS, Optimizer, Training

Recompute = Literal["none", "selective", "full"]


@functools.lru_cache(maxsize=4096)
def forward(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, attention: AttentionKind, fused: bool,
    dtype: Dtype, ep: int = 1, cp: int = 1, load: float = 1.0,
) -> Kernels:  # fmt: skip
    """The kernels of one layer's forward pass for one micro-batch on one rank.

    `tp` ranks share the layer (it must divide heads and feed-forward columns: `Model.splits_over`), `sp`
    splits what lies between the GEMMs too, `cp` ranks share each sequence, `ep` ranks share the experts; the
    tokens spread evenly over the experts of a rank, of which the fullest has `load` times the mean. Cached.
    """
    block = Block.of(model, sequence, micro_batch, tp, sp, attention, fused, dtype, ep, cp, load)
    return (*block.attention(), *block.feed_forward())


@functools.lru_cache(maxsize=4096)
def backward(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, attention: AttentionKind, fused: bool,
    dtype: Dtype, ep: int = 1, cp: int = 1, load: float = 1.0,
) -> Kernels:  # fmt: skip
    """The kernels of one layer's backward pass, without anything recomputed (see `recomputed`). Cached."""
    block = Block.of(model, sequence, micro_batch, tp, sp, attention, fused, dtype, ep, cp, load)
    return (*block.feed_forward_backward(), *block.attention_backward())


@functools.lru_cache(maxsize=4096)
def recomputed(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, attention: AttentionKind, fused: bool,
    dtype: Dtype, recompute: Recompute, ep: int = 1, cp: int = 1, load: float = 1.0, selective: Selective = "core",
) -> Kernels:  # fmt: skip
    """The forward kernels that run again before (or in) the backward pass of one layer.

    `full`: the whole layer. `selective`: attention without its projections (Korthikanti et al. 2022); nothing
    for flash attention, whose backward kernel recomputes the scores anyway; or, where the framework chooses so, every
    second product. Cached.
    """
    match recompute:
        case "none":
            return ()
        case "selective":
            block = Block.of(model, sequence, micro_batch, tp, sp, attention, fused, dtype, ep, cp, load)
            if selective == "alternate-products":
                return block.alternate_products()
            return () if block.flash else block.core()
        case "full":
            return forward(model, sequence, micro_batch, tp, sp, attention, fused, dtype, ep, cp, load)
        case _:
            assert_never(recompute)


@functools.lru_cache(maxsize=4096)
def layer_weight_gradients(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, attention: AttentionKind, fused: bool,
    dtype: Dtype, ep: int = 1, cp: int = 1, load: float = 1.0,
) -> Kernels:  # fmt: skip
    """The part of `backward` that only gradients of weights need, W in Qi et al. (ICLR'24): a GEMM for each linear
    layer. Sums over tokens for biases and norms stay with the gradient of the input, which reads the same. Cached."""
    block = Block.of(model, sequence, micro_batch, tp, sp, attention, fused, dtype, ep, cp, load)
    return _weight_gradients(without((*block.attention(), *block.feed_forward()), block.core()))


def _weight_gradients(linear: Kernels) -> Kernels:
    """The weight gradient of each (m, k) by (k, n) GEMM of a forward pass, which must be linear layers: (n, m) by
    (m, k); of grouped ones too."""
    gemms = [(kernel, count) for kernel, count in linear if isinstance(kernel, Gemm)]
    return tuple(
        (Gemm(m=kernel.n, n=kernel.k, k=kernel.m, batch=kernel.batch, dtype=kernel.dtype), count)
        for kernel, count in gemms
    )


def without(kernels: Kernels, taken: Kernels) -> Kernels:
    """`kernels`, each named once, less those `taken`, which must be among them."""
    left: dict[Kernel, int] = {}
    for kernel, count in kernels:
        left[kernel] = left.get(kernel, 0) + count
    for kernel, count in taken:
        assert left.get(kernel, 0) >= count, kernel
        left[kernel] -= count
    return tuple((kernel, count) for kernel, count in left.items() if count)


@functools.lru_cache(maxsize=1024)
def embedding_forward(model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, dtype: Dtype) -> Kernels:
    """Look-up and addition of the embeddings, their norm and their dropout, for one micro-batch."""
    ends = _Ends(model, sequence, micro_batch, tp, sp, dtype)
    full, local = ends.tokens * model.hidden, ends.local * model.hidden
    added = (model.positions > 0) + (model.token_types > 0)
    return (
        ends.moved("embedding", full, full),
        *(ends.moved("embedding", 2 * full, full) for _ in range(added)),
        *((ends.moved("norm", local, local),) if model.embedding_norm else ()),
        *((ends.moved("dropout", local, local, mask_written=local),) if model.dropout else ()),
    )


@functools.lru_cache(maxsize=1024)
def embedding_backward(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, dtype: Dtype, vocab_padded: bool = False
) -> Kernels:
    """The gradient of the embeddings: this rank's dense table is cleared, then the tokens' rows added."""
    ends = _Ends(model, sequence, micro_batch, tp, sp, dtype)
    full, local = ends.tokens * model.hidden, ends.local * model.hidden
    table = vocab_per_rank(model.vocab, tp, vocab_padded) * model.hidden
    added = (model.positions > 0) + (model.token_types > 0)
    return (
        *((ends.moved("dropout", local, local, mask_read=local),) if model.dropout else ()),
        *((ends.moved("norm", 2 * local, local),) if model.embedding_norm else ()),
        ends.moved("embedding", 0, table),
        ends.moved("embedding", 2 * full, full),
        *(ends.moved("embedding", full, 0) for _ in range(added)),
    )


@functools.lru_cache(maxsize=1024)
def head_forward(
    model: Model,
    sequence: int,
    micro_batch: int,
    tp: int,
    sp: bool,
    fused: bool,
    dtype: Dtype,
    vocab_padded: bool = False,
    in_place: bool = False,
    metrics: int = 0,
    in_steps: bool = False,
) -> Kernels:
    """Final norm, logits and cross-entropy of every token on one rank, which has 1/tp of the vocabulary.

    Cross-entropy runs on fp32 logits. Unfused (PyTorch's log_softmax) it reads them for the maximum, for the sum and
    for what it writes; fused, it reads twice and writes the probabilities once; `in_place`, it reads the 16-bit logits
    twice and writes their log-sum-exp alone; `in_steps`, every step is a kernel: maximum, difference, exponential, sum
    and quotient. `metrics`: further, unfused cross-entropies of the same logits.
    A head transform and a pooler are whole on every rank.
    """
    ends = _Ends(model, sequence, micro_batch, tp, sp, dtype)
    n, logits = ends.local * model.hidden, ends.tokens * vocab_per_rank(model.vocab, tp, vocab_padded)
    return (
        *((ends.moved("norm", n, n),) if model.final_norm else ()),
        *ends.pooler(micro_batch),
        *ends.transform(),
        ends.gemm(ends.tokens, logits // ends.tokens, model.hidden),
        *_loss_forward(logits, ends.width, fused, in_place, in_steps),
        *_loss_forward(logits, ends.width, False, False, False) * metrics,
    )


def _loss_forward(logits: int, width: int, fused: bool, in_place: bool, in_steps: bool) -> Kernels:
    if in_place:
        return ((Memory(op="cross_entropy", read_bytes=2 * width * logits, written_bytes=0), 1),)
    cast = (Memory(op="cast", read_bytes=logits * width, written_bytes=4 * logits), 1)
    if in_steps:
        reduction = Memory(op="cross_entropy", read_bytes=4 * logits, written_bytes=0)
        return cast, (reduction, 2), (_step(logits), 3)
    reads, writes = (2, 1) if fused else (3, 1)
    return (
        cast,
        (Memory(op="cross_entropy", read_bytes=4 * reads * logits, written_bytes=4 * writes * logits), 1),
    )


def _step(logits: int) -> Memory:
    """One pass over fp32 logits."""
    return Memory(op="cross_entropy", read_bytes=4 * logits, written_bytes=4 * logits)


@functools.lru_cache(maxsize=1024)
def head_backward(
    model: Model,
    sequence: int,
    micro_batch: int,
    tp: int,
    sp: bool,
    fused: bool,
    dtype: Dtype,
    vocab_padded: bool = False,
    in_place: bool = False,
    in_steps: bool = False,
) -> Kernels:
    """The backward pass of `head_forward`; `fused` writes the gradient of the logits without a cast, `in_place` over
    the logits, `in_steps` over the probabilities, before a cast. Unfused, the gradient of the picked probabilities is a
    tensor like the logits: cleared, read for its sums, and read with the probabilities for what is written."""
    ends = _Ends(model, sequence, micro_batch, tp, sp, dtype)
    n, logits = ends.local * model.hidden, ends.tokens * vocab_per_rank(model.vocab, tp, vocab_padded)
    v = logits // ends.tokens
    read, written = (ends.width, ends.width) if in_place else (4, ends.width) if fused else (12, 8)
    cast = ((Memory(op="cast", read_bytes=4 * logits, written_bytes=logits * ends.width), 1),)
    loss = Memory(op="cross_entropy", read_bytes=read * logits, written_bytes=written * logits)
    return (
        (_step(logits) if in_steps else loss, 1),
        *(() if (fused and not in_steps) or in_place else cast),
        ends.gemm(ends.tokens, model.hidden, v),
        ends.gemm(v, model.hidden, ends.tokens),
        *ends.transform_backward(),
        *ends.pooler_backward(micro_batch),
        *((ends.moved("norm", 2 * n, n),) if model.final_norm else ()),
    )


def embedding_weight_gradients(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, dtype: Dtype
) -> Kernels:
    """The part of `embedding_backward` that fills the tables' gradients."""
    found = embedding_backward(model, sequence, micro_batch, tp, sp, dtype)
    return tuple((kernel, n) for kernel, n in found if isinstance(kernel, Memory) and kernel.op == "embedding")


def head_weight_gradients(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, fused: bool, dtype: Dtype
) -> Kernels:
    """The part of `head_backward` that only gradients of weights need."""
    return _weight_gradients(head_forward(model, sequence, micro_batch, tp, sp, fused, dtype))


class _Ends:
    """Tokens and types at the two ends of a model."""

    def __init__(self, model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, dtype: Dtype) -> None:
        self.model = model
        self.tokens = sequence * micro_batch
        assert not sp or self.tokens % tp == 0, (self.tokens, tp)
        self.local = self.tokens // tp if sp else self.tokens
        self.dtype: Dtype = "bf16" if dtype == "fp8" else dtype
        self.width = BYTES_OF[self.dtype]

    def moved(
        self, op: MemoryOp, read: int, written: int, mask_read: int = 0, mask_written: int = 0
    ) -> tuple[Kernel, int]:
        kernel = Memory(
            op=op, read_bytes=read * self.width + mask_read, written_bytes=written * self.width + mask_written
        )
        return kernel, 1

    def gemm(self, m: int, n: int, k: int) -> tuple[Kernel, int]:
        return Gemm(m=m, n=n, k=k, dtype=self.dtype), 1

    def pooler(self, batch: int) -> Kernels:
        """One token of each sequence through the pooler and the classifier."""
        h, classes = self.model.hidden, self.model.classes
        return tuple(self.gemm(batch, n, h) for n in (h, classes) if self.model.pooler and n)

    def pooler_backward(self, batch: int) -> Kernels:
        h, classes = self.model.hidden, self.model.classes
        outputs = [n for n in (classes, h) if self.model.pooler and n]
        return tuple(kernel for n in outputs for kernel in (self.gemm(batch, h, n), self.gemm(n, h, batch)))

    def transform(self) -> Kernels:
        if not self.model.head_transform:
            return ()
        h, n = self.model.hidden, self.local * self.model.hidden
        return self.gemm(self.local, h, h), self.moved("activation", n, n), self.moved("norm", n, n)

    def transform_backward(self) -> Kernels:
        if not self.model.head_transform:
            return ()
        h, n = self.model.hidden, self.local * self.model.hidden
        return (
            self.moved("norm", 2 * n, n),
            self.moved("activation", 2 * n, n),
            self.gemm(self.local, h, h),
            self.gemm(h, h, self.local),
        )


@functools.lru_cache(maxsize=1024)
def optimizer_kernels(
    parameters: int, precision: Dtype, optimizer: Optimizer, gradient: Dtype | None = None, fused: bool = True,
    clips: bool = False,
) -> Kernels:  # fmt: skip
    """One pass of the optimizer over `parameters` parameters.

    It reads gradient, weights and state and writes weights and state; in 16-bit and 8-bit training the
    weights are an fp32 master copy, and a 16-bit copy is written besides. State and master copy are fp32
    (fp64 in fp64 training), and so is the gradient unless `gradient` names its type.

    Not `fused`, every operation reads and writes its own operands: for Adam (PyTorch's single-tensor and foreach
    loops) scaling, averaging, squaring, root, division and the rest touch 20 tensors of fp32. `clips`: the norm of the
    gradients reads them once, their scaling reads and writes them.
    """
    mixed = precision in ("bf16", "fp16", "fp8")
    wide = BYTES_OF["fp64" if precision == "fp64" else "fp32"]
    kept = wide * (1 + STATE_TENSORS[optimizer])
    of_gradient = wide if gradient is None else BYTES_OF[gradient]
    read, written = kept + of_gradient, kept + (BYTES_OF["bf16"] if mixed else 0)
    if not fused:
        tensors_read, tensors_written = _EAGER_OPTIMIZER[optimizer]
        read, written = tensors_read * wide, tensors_written * wide
    if clips:
        read, written = read + 2 * of_gradient, written + of_gradient
    return ((Memory(op="optimizer", read_bytes=parameters * read, written_bytes=parameters * written), 1),)


# (tensors read, tensors written) by the operations of one step. Adam: decay or first scaling 1+1, average 2+1, scaling
# of the squares 1+1, their sum 2+1, root 1+1, bias correction 1+1, epsilon 1+1, step 3+1.
_EAGER_OPTIMIZER: dict[Optimizer, tuple[int, int]] = {"adam": (12, 8), "momentum": (5, 3), "sgd": (2, 1)}


@functools.lru_cache(maxsize=1024)
def accumulation_kernels(parameters: int, dtype: Dtype, gradient: Dtype, how: Accumulation = "added") -> Kernels:
    """Adding one micro-batch's weight gradients, of type `dtype`, to a sum of type `gradient`.

    `added`: one kernel reads both and writes the sum (autograd's accumulation; Megatron-LM's main_grad). `copied`:
    DeepSpeed's BF16 optimizer; autograd adds to a cleared gradient of type `dtype`, which is converted, added to the
    sum and cleared again: 26 bytes a parameter for bf16 and fp32 against 10; where the types are one, it adds only.
    `fused`: the weight gradient's GEMM adds, and its epilogue hides it.
    """
    kept, fresh = BYTES_OF[gradient], BYTES_OF["bf16" if dtype == "fp8" else dtype]
    match how:
        case "fused":
            return ()
        case "copied" if kept != fresh:
            passes: tuple[tuple[int, int], ...] = ((2 * fresh, fresh), (fresh, kept), (2 * kept, kept), (0, fresh))
        case "added" | "copied":
            passes = ((kept + fresh, kept),)
        case _:
            assert_never(how)
    return tuple(
        (Memory(op="reduce", read_bytes=parameters * read, written_bytes=parameters * written), 1)
        for read, written in passes
    )


@functools.lru_cache(maxsize=4096)
def accumulation_of(
    model: Model, layers: int, first: bool, last: bool, tp: int, ep: int, dtype: Dtype, gradient: Dtype,
    how: Accumulation,
) -> Kernels:  # fmt: skip
    """`accumulation_kernels` of some layers, with the embedding and the head where `first` and `last` ask. Cached."""
    parameters = stage_parameters(model, range(layers), first=first, last=last, tp=tp, ep=ep)
    return accumulation_kernels(parameters, dtype, gradient, how) if parameters else ()


@functools.lru_cache(maxsize=1024)
def flops_per_step(model: Model, training: Training, recompute: Recompute = "none", *, masked: bool = False) -> int:
    """Floating-point operations of one optimizer step over all ranks: every GEMM, attention included.

    The convention of Megatron-LM and of PaLM (Chowdhery et al. 2022, appendix B: 12 L s a d a token for the scores): a
    multiply-add is two, scores that a causal mask discards are counted, the vocabulary is not padded, norms and other
    element-wise work is not counted. With `none` these are the model FLOPs of MFU, for a GPT
    72 B s L h^2 (1 + s/6h + V/12Lh) (Korthikanti et al. 2022); with `selective` or `full`, the hardware FLOPs of HFU,
    for a fully recomputed GPT 96 B s L h^2 (1 + s/6h + V/16Lh) (Narayanan et al. 2021).

    `masked`: without the half of the scores that a decoder's mask discards, which fused kernels skip (s/12h in place
    of s/6h).
    """
    s = training.sequence
    layer = (
        *forward(model, s, 1, 1, False, "unfused", True, "bf16"),
        *backward(model, s, 1, 1, False, "unfused", True, "bf16"),
        *recomputed(model, s, 1, 1, False, "unfused", True, "bf16", recompute),
    )
    head = (
        *head_forward(model, s, 1, 1, False, True, "bf16"),
        *head_backward(model, s, 1, 1, False, True, "bf16"),
    )
    flops = model.layers * _flops(layer) + _flops(head)
    if masked and model.kind == "decoder":
        # Two products forward, four backward, and two where they are recomputed.
        core = _flops(recomputed(model, s, 1, 1, False, "unfused", True, "bf16", "selective"))
        flops -= model.layers * core * (3 if recompute == "none" else 4) // 2
    return training.global_batch * flops


def _flops(kernels: Kernels) -> int:
    return sum(kernel.flops * count for kernel, count in kernels)
