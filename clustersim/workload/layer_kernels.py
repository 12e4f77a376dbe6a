"""The kernels of a layer, the embedding, the head and the optimizer on one rank; the FLOPs of a step.

`block.py` states the conventions. All functions return work, never seconds, and are cached: a search asks for
a few hundred combinations many times.
"""

from __future__ import annotations

import functools
from typing import Literal, assert_never

from clustersim.hardware.framework import Accumulation, Selective
from clustersim.hardware.kernel import BYTES_OF, Dtype, Gemm, Kernel, Kernels, Memory
from clustersim.workload.block import Block
from clustersim.workload.head import Head
from clustersim.workload.model import Model, vocab_per_rank
from clustersim.workload.parameters import Held
from clustersim.workload.training import STATE_TENSORS, Optimizer, Training

Recompute = Literal["none", "selective", "full"]


@functools.lru_cache(maxsize=4096)
def forward(block: Block) -> Kernels:
    """The kernels of one layer's forward pass for one micro-batch on one rank. Cached."""
    return (*block.attention(), *block.feed_forward())


@functools.lru_cache(maxsize=4096)
def backward(block: Block) -> Kernels:
    """The kernels of one layer's backward pass, without anything recomputed (see `recomputed`). Cached."""
    return (*block.feed_forward_backward(), *block.attention_backward())


@functools.lru_cache(maxsize=4096)
def recomputed(block: Block, recompute: Recompute, selective: Selective) -> Kernels:
    """The forward kernels that run again before (or in) the backward pass of one layer.

    `full`: the whole layer. `selective`: attention without its projections (Korthikanti et al. 2022); nothing
    for flash attention, whose backward kernel recomputes the scores anyway; or, where the framework chooses so, every
    second product. Cached.
    """
    match recompute:
        case "none":
            return ()
        case "selective":
            if selective == "alternate-products":
                return block.alternate_products()
            return block.core() if block.attention_kind == "unfused" else ()
        case "full":
            return forward(block)
        case _:
            assert_never(recompute)


@functools.lru_cache(maxsize=4096)
def layer_weight_gradients(block: Block) -> Kernels:
    """The part of `backward` that only gradients of weights need, W in Qi et al. (ICLR'24): a GEMM for each linear
    layer. Sums over tokens for biases and norms stay with the gradient of the input, which reads the same. Cached."""
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
def embedding_forward(block: Block) -> Kernels:
    """Look-up and addition of the embeddings, their norm and their dropout, for one micro-batch."""
    model = block.model
    full, local = block.tokens * model.hidden, block.local * model.hidden
    added = (model.positions > 0) + (model.token_types > 0)
    return (
        *block.moved("embedding", full, full),
        *block.moved("embedding", 2 * full, full) * added,
        *(block.moved("norm", local, local) if model.embedding_norm else ()),
        *(block.moved("dropout", local, local, mask=local, writes_mask=True) if model.dropout else ()),
    )


@functools.lru_cache(maxsize=1024)
def embedding_backward(block: Block) -> Kernels:
    """The gradient of the embeddings: this rank's dense table is cleared, then the tokens' rows added."""
    model = block.model
    full, local = block.tokens * model.hidden, block.local * model.hidden
    table = vocab_per_rank(model.vocab, block.tp, padded=False) * model.hidden
    added = (model.positions > 0) + (model.token_types > 0)
    return (
        *(block.moved("dropout", local, local, mask=local) if model.dropout else ()),
        *(block.moved("norm", 2 * local, local) if model.embedding_norm else ()),
        *block.moved("embedding", 0, table),
        *block.moved("embedding", 2 * full, full),
        *block.moved("embedding", full, 0) * added,
    )


@functools.lru_cache(maxsize=1024)
def head_forward(head: Head) -> Kernels:
    """Final norm, logits and cross-entropy of every token on one rank, which has 1/tp of the vocabulary.

    Cross-entropy runs on fp32 logits. Unfused (PyTorch's log_softmax) it reads them for the maximum, for the sum and
    for what it writes; fused, it reads twice and writes the probabilities once; `in_place`, it reads the 16-bit logits
    twice and writes their log-sum-exp alone; `in_steps`, every step is a kernel: maximum, difference, exponential, sum
    and quotient. `metrics`: further, unfused cross-entropies of the same logits.
    A head transform and a pooler are whole on every rank.
    """
    block, hidden, logits = head.block, head.block.model.hidden, head.tokens * head.columns
    n = head.local * hidden
    return (
        *(block.moved("norm", n, n) if block.model.final_norm else ()),
        *head.pooler(),
        *head.transform(),
        head.gemm(head.tokens, head.columns, hidden),
        *_loss_forward(logits, block.width, fused=block.fused, in_place=head.in_place, in_steps=head.in_steps),
        *_loss_forward(logits, block.width, fused=False, in_place=False, in_steps=False) * head.metrics,
    )


def _loss_forward(logits: int, width: int, *, fused: bool, in_place: bool, in_steps: bool) -> Kernels:
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
def head_backward(head: Head) -> Kernels:
    """The backward pass of `head_forward`; `fused` writes the gradient of the logits without a cast, `in_place` over
    the logits, `in_steps` over the probabilities, before a cast. Unfused, the gradient of the picked probabilities is a
    tensor like the logits: cleared, read for its sums, and read with the probabilities for what is written."""
    block, hidden, logits = head.block, head.block.model.hidden, head.tokens * head.columns
    n, width = head.local * hidden, block.width
    read, written = (width, width) if head.in_place else (4, width) if block.fused else (12, 8)
    cast = ((Memory(op="cast", read_bytes=4 * logits, written_bytes=logits * width), 1),)
    loss = Memory(op="cross_entropy", read_bytes=read * logits, written_bytes=written * logits)
    return (
        (_step(logits) if head.in_steps else loss, 1),
        *(() if (block.fused and not head.in_steps) or head.in_place else cast),
        head.gemm(head.tokens, hidden, head.columns),
        head.gemm(head.columns, hidden, head.tokens),
        *head.transform_backward(),
        *head.pooler_backward(),
        *(block.moved("norm", 2 * n, n) if block.model.final_norm else ()),
    )


def embedding_weight_gradients(block: Block) -> Kernels:
    """The part of `embedding_backward` that fills the tables' gradients."""
    found = embedding_backward(block)
    return tuple((kernel, n) for kernel, n in found if isinstance(kernel, Memory) and kernel.op == "embedding")


def head_weight_gradients(head: Head) -> Kernels:
    """The part of `head_backward` that only gradients of weights need."""
    return _weight_gradients(head_forward(head))


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
def accumulation_of(held: Held, *, dtype: Dtype, gradient: Dtype, how: Accumulation) -> Kernels:
    """`accumulation_kernels` of what a rank holds. Cached."""
    return accumulation_kernels(held.parameters, dtype, gradient, how) if held.parameters else ()


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
    block = Block(
        model=model, sequence=training.sequence, micro_batch=1, tp=1, sequence_parallel=False, cp=1, ep=1, load=1.0,
        dtype="bf16", attention_kind="unfused", fused=True,
    )  # fmt: skip
    layer = (*forward(block), *backward(block), *recomputed(block, recompute, "core"))
    end = Head.plain(block, in_place=False, in_steps=False)
    head = (*head_forward(end), *head_backward(end))
    flops = model.layers * _flops(layer) + _flops(head)
    if masked and model.kind == "decoder":
        # Two products forward, four backward, and two where they are recomputed.
        core = _flops(recomputed(block, "selective", "core"))
        flops -= model.layers * core * (3 if recompute == "none" else 4) // 2
    return training.global_batch * flops


def _flops(kernels: Kernels) -> int:
    return sum(kernel.flops * count for kernel, count in kernels)
