"""Activations: the bytes that a layer keeps for its backward pass, and those that ranks exchange."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, assert_never

from clustersim.hardware.framework import Selective
from clustersim.hardware.kernel import Gemm, Kernels
from clustersim.workload.block import AttentionKind
from clustersim.workload.layer_kernels import Recompute, head_weight_gradients, layer_weight_gradients
from clustersim.workload.model import Model, vocab_per_rank
from clustersim.workload.routing import routed_tokens

Loss = Literal["fused", "in-place", "eager"]
CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


class Stored(NamedTuple):
    """A tensor kept from the forward to the backward pass; `core`: between QK^T and the product with V."""

    name: str
    bytes: int
    core: bool


class Exchange(NamedTuple):
    """`times` collectives of `bytes` each.

    `bytes` is the whole buffer: what an all_reduce reduces, an all_gather ends with, a reduce_scatter starts
    with, and what one rank sends in an all_to_all (its own part included).
    """

    kind: CollectiveKind
    bytes: int
    times: int


def _local(tokens: int, tp: int, sp: bool) -> int:
    """Tokens of a rank between the split GEMMs."""
    assert not sp or tokens % tp == 0, (tokens, tp)
    return tokens // tp if sp else tokens


@functools.lru_cache(maxsize=4096)
def stored_tensors(
    model: Model,
    sequence: int,
    micro_batch: int,
    tp: int,
    sp: bool,
    attention: AttentionKind,
    dtype_bytes: int = 2,
    cp: int = 1,
    load: float = 1.0,
    fp8_inputs: bool = False,
) -> tuple[Stored, ...]:
    """What one layer keeps of one micro-batch on one of `tp` ranks when nothing is recomputed.

    `cp` ranks share each sequence: a rank keeps its own keys and values, and sees the others' again in the backward
    pass. `load`: the routed tokens of the fullest expert-parallel rank, relative to the mean.

    The first tensor is the layer's input. As in Korthikanti et al. 2022, a dropout mask takes one byte an
    element, and norm statistics and biases are neglected. Unfused attention keeps the probabilities, and with
    dropout the mask and the dropped probabilities too; flash attention keeps one fp32 log-sum-exp per query
    and head. A gated feed-forward keeps gate and up; their product is the input of the GEMM behind it. With
    `fp8_inputs` linear layers keep their inputs in the fp8 form in which they multiply them (Transformer Engine).
    """
    assert model.splits_over(tp), (model.name, tp)
    tokens = sequence // cp * micro_batch
    local = _local(tokens, tp, sp)
    e, drop, linear = dtype_bytes, model.dropout, 1 if fp8_inputs else dtype_bytes
    wide = local * model.hidden
    q = tokens * model.query_width // tp
    kv = tokens * model.kv_heads_per_rank(tp) * model.head_dim
    scores = micro_batch * (model.heads // tp) * sequence * sequence
    kept = [
        Stored("attention.norm.input", wide * e, False),
        Stored("attention.qkv.input", wide * linear, False),
        Stored("attention.query", q * e, False),
        Stored("attention.key", kv * e, False),
        Stored("attention.value", kv * e, False),
    ]
    if model.qk_norm:
        kept.append(Stored("attention.qk_norm.input", (q + kv) * e, False))
    match attention:
        case "flash" | "flash-1" | "flash-2" | "flash-3" | "cudnn":
            kept.append(Stored("attention.log_sum_exp", 4 * tokens * (model.heads // tp), False))
        case "unfused":
            kept.append(Stored("attention.probabilities", scores * e, True))
            if drop:
                kept.append(Stored("attention.probabilities.mask", scores, True))
                kept.append(Stored("attention.probabilities.dropped", scores * e, True))
        case _:
            assert_never(attention)
    kept.append(Stored("attention.output.input", q * linear, False))
    if fp8_inputs and attention != "unfused":
        # Its backward pass needs the output as it was.
        kept.append(Stored("attention.output", q * e, False))
    if drop:
        kept.append(Stored("attention.mask", wide, False))
    kept.append(Stored("mlp.norm.input", wide * e, False))
    kept.append(Stored("mlp.input", wide * linear, False))
    rows, hidden = tokens, model.ffn_hidden
    if model.experts is not None:
        rows, hidden = routed_tokens(tokens * model.experts.per_token, load), model.experts.hidden
        kept.append(Stored("router.scores", 4 * local * model.experts.count, False))
        kept.append(Stored("experts.input", rows * model.hidden * e, False))
        kept.append(Stored("experts.output", local * model.experts.per_token * model.hidden * e, False))
    f = hidden // tp
    kept.append(Stored("mlp.activation.input", rows * (2 * f if model.gated else f) * e, False))
    kept.append(Stored("mlp.down.input", rows * f * linear, False))
    if drop:
        kept.append(Stored("mlp.mask", wide, False))
    return tuple(kept)


def activation_bytes_per_layer(
    model: Model,
    sequence: int,
    micro_batch: int,
    tp: int,
    sp: bool,
    recompute: Recompute,
    attention: AttentionKind,
    dtype_bytes: int = 2,
    cp: int = 1,
    load: float = 1.0,
    fp8_inputs: bool = False,
    selective: Selective = "core",
) -> int:
    """Bytes that one layer keeps of one micro-batch until its backward pass, on one of `tp` ranks.

    A GPT with dropout and unfused attention keeps (Korthikanti et al. 2022), in 16 bits: s b h (34 + 5 a s /
    h); s b h (10 + 24/t + 5 a s / (h t)) with tensor parallelism; s b h / t (34 + 5 a s / h) with sequence
    parallelism too; 34 s b h / t with selective recomputation besides; 2 s b h (over t with sequence
    parallelism) with full. Selective recomputation of alternate products keeps the layer's input, what attention keeps
    but its inputs, and the outputs of every second linear layer of q, k, v, o, gate, up, down (torchtitan).
    """
    kept = stored_tensors(model, sequence, micro_batch, tp, sp, attention, dtype_bytes, cp, load, fp8_inputs)
    match recompute:
        case "none":
            return sum(tensor.bytes for tensor in kept)
        case "selective" if selective == "alternate-products":
            tokens = sequence // cp * micro_batch
            q, kv = model.query_width // tp, model.kv_heads_per_rank(tp) * model.head_dim
            up = [model.ffn_hidden // tp] * (2 if model.gated else 1)
            products = [q, kv, kv, model.hidden, *up, model.hidden][::2]
            core = sum(tensor.bytes for tensor in kept if tensor.core or tensor.name == "attention.log_sum_exp")
            return kept[0].bytes + core + tokens * dtype_bytes * (q + sum(products))
        case "selective":
            return sum(tensor.bytes for tensor in kept if not tensor.core)
        case "full":
            return kept[0].bytes
        case _:
            assert_never(recompute)


def working_set_bytes(
    model: Model,
    sequence: int,
    micro_batch: int,
    tp: int,
    sp: bool,
    recompute: Recompute,
    attention: AttentionKind,
    dtype_bytes: int = 2,
    cp: int = 1,
    load: float = 1.0,
    fp8_inputs: bool = False,
    selective: Selective = "core",
) -> int:
    """Bytes that one layer needs beyond what it kept, while its backward pass runs on what was recomputed.

    Layers are recomputed one after the other, so a rank needs this once. The layer's gradients are not in it
    (`gradient_working_set_bytes`), nor are the inputs that sequence parallelism gathers again.
    """
    shape, rest = (model, sequence, micro_batch, tp, sp), (dtype_bytes, cp, load, fp8_inputs, selective)
    whole = activation_bytes_per_layer(*shape, "none", attention, *rest)
    return max(0, whole - activation_bytes_per_layer(*shape, recompute, attention, *rest))


def gradient_working_set_bytes(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, attention: AttentionKind, dtype_bytes: int = 2,
    cp: int = 1, load: float = 1.0,
) -> int:  # fmt: skip
    """Bytes of the gradients of activations that one layer has at once at its fullest: that of the residual stream, and
    either those of the feed-forward's activation (output and input) or those of the attention core: of probabilities
    and scores, or of query, key, value and output."""
    tokens = sequence // cp * micro_batch
    rows, hidden = tokens, model.ffn_hidden
    if model.experts is not None:
        rows, hidden = routed_tokens(tokens * model.experts.per_token, load), model.experts.hidden
    feed_forward = rows * (hidden // tp) * (3 if model.gated else 2)
    q = tokens * model.query_width // tp
    kv = tokens * model.kv_heads_per_rank(tp) * model.head_dim
    scores = 0 if attention != "unfused" else micro_batch * (model.heads // tp) * sequence * sequence
    return dtype_bytes * (_local(tokens, tp, sp) * model.hidden + max(feed_forward, 2 * scores, 2 * q + 2 * kv))


@functools.lru_cache(maxsize=4096)
def weight_gradient_bytes(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, attention: AttentionKind, fused: bool,
    dtype_bytes: int = 2, ep: int = 1, cp: int = 1, load: float = 1.0,
) -> int:  # fmt: skip
    """Bytes that one layer keeps of one micro-batch from its backward pass to its weight gradients, where these wait:
    the input of every linear layer, gathered under sequence parallelism, and the gradient of its output.

    32 s b h for a GPT in 16 bits (Qi et al., ICLR'24).
    """
    found = layer_weight_gradients(model, sequence, micro_batch, tp, sp, attention, fused, "bf16", ep, cp, load)
    return _operand_bytes(found, dtype_bytes)


def head_weight_gradient_bytes(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, fused: bool, dtype_bytes: int = 2
) -> int:
    """Bytes that the head keeps of one micro-batch from its backward pass to its weight gradients, where these wait."""
    return _operand_bytes(head_weight_gradients(model, sequence, micro_batch, tp, sp, fused, "bf16"), dtype_bytes)


def _operand_bytes(gemms: Kernels, dtype_bytes: int) -> int:
    """Both operands of GEMMs, of m k and k n elements."""
    return sum(n * dtype_bytes * gemm.k * (gemm.m + gemm.n) for gemm, n in gemms if isinstance(gemm, Gemm))


def embedding_activation_bytes(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, dtype_bytes: int = 2
) -> int:
    """Bytes that the embedding keeps of one micro-batch: its dropout mask, and the input of its norm."""
    wide = _local(sequence * micro_batch, tp, sp) * model.hidden
    return wide * (int(model.dropout) + dtype_bytes * int(model.embedding_norm))


def head_activation_bytes(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, dtype_bytes: int = 2
) -> int:
    """Bytes that the head keeps of one micro-batch besides the logits: the inputs of its norms and GEMMs."""
    wide = _local(sequence * micro_batch, tp, sp) * model.hidden
    return wide * dtype_bytes * (1 + int(model.final_norm) + 3 * int(model.head_transform))


def logits_bytes(model: Model, sequence: int, micro_batch: int, tp: int, vocab_padded: bool = False) -> int:
    """Bytes of the fp32 logits of one micro-batch and of their fp32 gradient, on a rank of the last stage."""
    return 2 * 4 * sequence * micro_batch * vocab_per_rank(model.vocab, tp, vocab_padded)


class LossBytes(NamedTuple):
    """What the logits of one micro-batch take: `kept` until its backward pass, `passing` at the loss besides."""

    kept: int
    passing: int


def loss_bytes(model: Model, sequence: int, micro_batch: int, tp: int, loss: Loss) -> LossBytes:
    """Bytes of logits on a rank of the last stage. Per logit, kept and passing: 2 and 0 where one kernel puts the
    gradient in place of 16-bit logits; 4 and 4 where the gradient takes the place of the softmax (that softmax in
    fp32, and the fp32 logits it was made of: Megatron-LM); 4 and 8 in eager torch (fp32 log-probabilities; their
    gradient and that of the logits)."""
    each = logits_bytes(model, sequence, micro_batch, tp) // 8
    match loss:
        case "fused":
            return LossBytes(2 * each, 0)
        case "in-place":
            return LossBytes(4 * each, 4 * each)
        case "eager":
            return LossBytes(4 * each, 8 * each)
        case _:
            assert_never(loss)


def boundary_bytes(model: Model, sequence: int, micro_batch: int, dtype_bytes: int = 2) -> int:
    """Bytes of the activation of one micro-batch between two pipeline stages: s b h elements."""
    return sequence * micro_batch * model.hidden * dtype_bytes


def kv_bytes(model: Model, sequence: int, micro_batch: int, tp: int, dtype_bytes: int = 2) -> int:
    """Bytes of the keys and values of `sequence` tokens of a micro-batch in one layer, on one of `tp` ranks."""
    return 2 * sequence * micro_batch * model.kv_heads_per_rank(tp) * model.head_dim * dtype_bytes


def ring_buffer_bytes(model: Model, sequence: int, micro_batch: int, tp: int, cp: int, dtype_bytes: int = 2) -> int:
    """Bytes that ring attention holds besides a rank's own keys and values: the block in use and the one that
    arrives, and the same of their gradients."""
    return 4 * kv_bytes(model, sequence // cp, micro_batch, tp, dtype_bytes) if cp > 1 else 0


# ---------------------------------------------------------------------------------------------- collectives


@functools.lru_cache(maxsize=4096)
def tp_collectives(
    model: Model,
    sequence: int,
    micro_batch: int,
    tp: int,
    sp: bool,
    recompute: Recompute,
    dtype_bytes: int = 2,
    load: float = 1.0,
    gathered_bytes: int | None = None,
) -> tuple[tuple[Exchange, ...], tuple[Exchange, ...]]:
    """The tensor-parallel collectives of one layer that compute waits for: (forward, backward).

    Without sequence parallelism two all-reduces of b s h elements each way; with it each is an all-gather and
    a reduce-scatter (the same bytes on the wire). Full recomputation repeats the forward ones in the backward
    pass. Under sequence parallelism routed tokens are gathered after they were dispatched: those buffers hold
    b s k h, times `load` on the fullest expert-parallel rank. `sequence` is what one rank has of it. An element takes
    `dtype_bytes`, or `gathered_bytes` where dense inputs of linear layers are gathered (Transformer Engine casts to fp8
    before it gathers; sums are taken in 16 bits). The gathers for the weight gradients, which run beside compute, are
    in `regather_collectives`.
    """
    if tp == 1:
        return (), ()
    dense = boundary_bytes(model, sequence, micro_batch, dtype_bytes)
    if not sp:
        once: tuple[Exchange, ...] = (Exchange("all_reduce", dense, 2),)
    elif model.experts is None:
        gathered = boundary_bytes(model, sequence, micro_batch, gathered_bytes or dtype_bytes)
        once = Exchange("all_gather", gathered, 2), Exchange("reduce_scatter", dense, 2)
    else:
        routed = routed_tokens(sequence * micro_batch * model.experts.per_token, load) * model.hidden * dtype_bytes
        once = (
            Exchange("all_gather", dense, 1),
            Exchange("reduce_scatter", dense, 1),
            Exchange("all_gather", routed, 1),
            Exchange("reduce_scatter", routed, 1),
        )
    return once, (*once, *once) if recompute == "full" else once


def regather_collectives(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, dtype_bytes: int = 2
) -> tuple[Exchange, ...]:
    """The backward all-gathers of column-parallel inputs, of which sequence parallelism kept a share.

    Weight gradients need them; they run beside the GEMM of the input's gradient. Routed tokens are kept
    whole.
    """
    if tp == 1 or not sp:
        return ()
    times = 2 if model.experts is None else 1
    return (Exchange("all_gather", boundary_bytes(model, sequence, micro_batch, dtype_bytes), times),)


def ep_collectives(
    model: Model,
    sequence: int,
    micro_batch: int,
    tp: int,
    sp: bool,
    ep: int,
    recompute: Recompute,
    dtype_bytes: int = 2,
    load: float = 1.0,
) -> tuple[tuple[Exchange, ...], tuple[Exchange, ...]]:
    """The expert-parallel collectives of one layer and micro-batch: (forward, backward).

    Dispatch and combine are an all-to-all each, both ways: b s k h elements, 1/tp of them under sequence
    parallelism, and `load` times as many through the port of the fullest rank, which takes in what is dispatched
    and gives out what is combined. `sequence` is what one rank has of it.
    """
    if ep == 1 or model.experts is None:
        return (), ()
    tokens = _local(sequence * micro_batch, tp, sp)
    routed = routed_tokens(tokens * model.experts.per_token, load) * model.hidden * dtype_bytes
    once = Exchange("all_to_all", routed, 2)
    return (once,), (once, once) if recompute == "full" else (once,)


def embedding_collectives(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, dtype_bytes: int = 2
) -> tuple[tuple[Exchange, ...], tuple[Exchange, ...]]:
    """The tensor-parallel collectives of the vocabulary-parallel embedding: (forward, backward)."""
    if tp == 1:
        return (), ()
    size = boundary_bytes(model, sequence, micro_batch, dtype_bytes)
    if sp:
        return (Exchange("reduce_scatter", size, 1),), (Exchange("all_gather", size, 1),)
    return (Exchange("all_reduce", size, 1),), ()


def head_collectives(
    model: Model, sequence: int, micro_batch: int, tp: int, sp: bool, dtype_bytes: int = 2
) -> tuple[tuple[Exchange, ...], tuple[Exchange, ...]]:
    """The tensor-parallel collectives of logits and cross-entropy: (forward, backward).

    Vocabulary-parallel cross-entropy all-reduces three fp32 numbers per token: maximum, the target's logit,
    and sum.
    """
    if tp == 1:
        return (), ()
    size = boundary_bytes(model, sequence, micro_batch, dtype_bytes)
    loss = Exchange("all_reduce", 4 * sequence * micro_batch, 3)
    if sp:
        return (Exchange("all_gather", size, 1), loss), (Exchange("reduce_scatter", size, 1),)
    return (loss,), (Exchange("all_reduce", size, 1),)
