"""Activations: the bytes that a layer keeps for its backward pass, and those that ranks exchange."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, assert_never

from clustersim.hardware.framework import Selective
from clustersim.hardware.kernel import BYTES_OF, Dtype, Gemm, Kernels, activation_width
from clustersim.workload.block import Block
from clustersim.workload.head import Head
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


@functools.lru_cache(maxsize=4096)
def stored_tensors(block: Block, *, fp8_inputs: bool) -> tuple[Stored, ...]:
    """What one layer keeps of one micro-batch on one rank when nothing is recomputed.

    Of ranks that share a sequence each keeps its own keys and values, and sees the others' again in the backward pass.

    The first tensor is the layer's input. As in Korthikanti et al. 2022, a dropout mask takes one byte an
    element, and norm statistics and biases are neglected. Unfused attention keeps the probabilities, and with
    dropout the mask and the dropped probabilities too; flash attention keeps one fp32 log-sum-exp per query
    and head. A gated feed-forward keeps gate and up; their product is the input of the GEMM behind it. With
    `fp8_inputs` linear layers keep their inputs in the fp8 form in which they multiply them (Transformer Engine).
    """
    model, e = block.model, block.width
    drop, linear = model.dropout, 1 if fp8_inputs else e
    wide, q, kv = block.local * model.hidden, block.tokens * block.q, block.tokens * block.kv_heads * model.head_dim
    kept = [
        Stored("attention.norm.input", wide * e, False),
        Stored("attention.qkv.input", wide * linear, False),
        Stored("attention.query", q * e, False),
        Stored("attention.key", kv * e, False),
        Stored("attention.value", kv * e, False),
    ]
    if model.qk_norm:
        kept.append(Stored("attention.qk_norm.input", (q + kv) * e, False))
    if block.attention_kind != "unfused":
        kept.append(Stored("attention.log_sum_exp", 4 * block.tokens * block.heads, False))
    else:
        kept.append(Stored("attention.probabilities", block.scores * e, True))
        if drop:
            kept.append(Stored("attention.probabilities.mask", block.scores, True))
            kept.append(Stored("attention.probabilities.dropped", block.scores * e, True))
    kept.append(Stored("attention.output.input", q * linear, False))
    if fp8_inputs and block.attention_kind != "unfused":
        # Its backward pass needs the output as it was.
        kept.append(Stored("attention.output", q * e, False))
    if drop:
        kept.append(Stored("attention.mask", wide, False))
    kept.append(Stored("mlp.norm.input", wide * e, False))
    kept.append(Stored("mlp.input", wide * linear, False))
    rows, f = _feed_forward(block)
    if model.experts is not None:
        kept.append(Stored("router.scores", 4 * block.local * model.experts.count, False))
        kept.append(Stored("experts.input", rows * model.hidden * e, False))
        kept.append(Stored("experts.output", block.local * model.experts.per_token * model.hidden * e, False))
    kept.append(Stored("mlp.activation.input", rows * (2 * f if model.gated else f) * e, False))
    kept.append(Stored("mlp.down.input", rows * f * linear, False))
    if drop:
        kept.append(Stored("mlp.mask", wide, False))
    return tuple(kept)


def _feed_forward(block: Block) -> tuple[int, int]:
    """Tokens that enter a rank's feed-forward or its experts, and columns behind the activation."""
    experts = block.model.experts
    if experts is None:
        return block.tokens, block.model.ffn_hidden // block.tp
    return routed_tokens(block.tokens * experts.per_token, block.load), experts.hidden // block.tp


@functools.lru_cache(maxsize=4096)
def activation_bytes_per_layer(block: Block, recompute: Recompute, selective: Selective, *, fp8_inputs: bool) -> int:
    """Bytes that one layer keeps of one micro-batch until its backward pass, on one rank.

    A GPT with dropout and unfused attention keeps (Korthikanti et al. 2022), in 16 bits: s b h (34 + 5 a s /
    h); s b h (10 + 24/t + 5 a s / (h t)) with tensor parallelism; s b h / t (34 + 5 a s / h) with sequence
    parallelism too; 34 s b h / t with selective recomputation besides; 2 s b h (over t with sequence
    parallelism) with full. Selective recomputation of alternate products keeps the layer's input, what attention keeps
    but its inputs, and the outputs of every second linear layer of q, k, v, o, gate, up, down (torchtitan).
    """
    kept = stored_tensors(block, fp8_inputs=fp8_inputs)
    match recompute:
        case "none":
            return sum(tensor.bytes for tensor in kept)
        case "selective" if selective == "alternate-products":
            model, q, kv = block.model, block.q, block.kv_heads * block.model.head_dim
            up = [model.ffn_hidden // block.tp] * (2 if model.gated else 1)
            products = [q, kv, kv, model.hidden, *up, model.hidden][::2]
            core = sum(tensor.bytes for tensor in kept if tensor.core or tensor.name == "attention.log_sum_exp")
            return kept[0].bytes + core + block.tokens * block.width * (q + sum(products))
        case "selective":
            return sum(tensor.bytes for tensor in kept if not tensor.core)
        case "full":
            return kept[0].bytes
        case _:
            assert_never(recompute)


@functools.lru_cache(maxsize=4096)
def working_set_bytes(block: Block, recompute: Recompute, selective: Selective, *, fp8_inputs: bool) -> int:
    """Bytes that one layer needs beyond what it kept, while its backward pass runs on what was recomputed.

    Layers are recomputed one after the other, so a rank needs this once. The layer's gradients are not in it
    (`gradient_working_set_bytes`), nor are the inputs that sequence parallelism gathers again.
    """
    whole = activation_bytes_per_layer(block, "none", selective, fp8_inputs=fp8_inputs)
    return max(0, whole - activation_bytes_per_layer(block, recompute, selective, fp8_inputs=fp8_inputs))


@functools.lru_cache(maxsize=4096)
def gradient_working_set_bytes(block: Block) -> int:
    """Bytes of the gradients of activations that one layer has at once at its fullest: that of the residual stream, and
    either those of the feed-forward's activation (output and input) or those of the attention core: of probabilities
    and scores, or of query, key, value and output."""
    model, (rows, columns) = block.model, _feed_forward(block)
    feed_forward = rows * columns * (3 if model.gated else 2)
    scores = 0 if block.attention_kind != "unfused" else block.scores
    core = 2 * block.tokens * (block.q + block.kv_heads * model.head_dim)
    return block.width * (block.local * model.hidden + max(feed_forward, 2 * scores, core))


@functools.lru_cache(maxsize=4096)
def weight_gradient_bytes(block: Block) -> int:
    """Bytes that one layer keeps of one micro-batch from its backward pass to its weight gradients, where these wait:
    the input of every linear layer, gathered under sequence parallelism, and the gradient of its output.

    32 s b h for a GPT in 16 bits (Qi et al., ICLR'24).
    """
    return _operand_bytes(layer_weight_gradients(block), block.width)


def head_weight_gradient_bytes(head: Head) -> int:
    """Bytes that the head keeps of one micro-batch from its backward pass to its weight gradients, where these wait."""
    return _operand_bytes(head_weight_gradients(head), head.block.width)


def _operand_bytes(gemms: Kernels, dtype_bytes: int) -> int:
    """Both operands of GEMMs, of m k and k n elements."""
    return sum(n * dtype_bytes * gemm.k * (gemm.m + gemm.n) for gemm, n in gemms if isinstance(gemm, Gemm))


def embedding_activation_bytes(block: Block) -> int:
    """Bytes that the embedding keeps of one micro-batch: its dropout mask, and the input of its norm."""
    model = block.model
    return block.local * model.hidden * (int(model.dropout) + block.width * int(model.embedding_norm))


def head_activation_bytes(block: Block) -> int:
    """Bytes that the head keeps of one micro-batch besides the logits: the inputs of its norms and GEMMs."""
    model = block.model
    return block.local * model.hidden * block.width * (1 + int(model.final_norm) + 3 * int(model.head_transform))


class LossBytes(NamedTuple):
    """What the logits of one micro-batch take: `kept` until its backward pass, `passing` at the loss besides."""

    kept: int
    passing: int


def loss_bytes(block: Block, loss: Loss) -> LossBytes:
    """Bytes of logits on a rank of the last stage. Per logit, kept and passing: 2 and 0 where one kernel puts the
    gradient in place of 16-bit logits; 4 and 4 where the gradient takes the place of the softmax (that softmax in
    fp32, and the fp32 logits it was made of: Megatron-LM); 4 and 8 in eager torch (fp32 log-probabilities; their
    gradient and that of the logits)."""
    each = block.tokens * vocab_per_rank(block.model.vocab, block.tp, padded=False)
    match loss:
        case "fused":
            return LossBytes(2 * each, 0)
        case "in-place":
            return LossBytes(4 * each, 4 * each)
        case "eager":
            return LossBytes(4 * each, 8 * each)
        case _:
            assert_never(loss)


def boundary_bytes(model: Model, *, tokens: int, dtype: Dtype) -> int:
    """Bytes of the activation of `tokens` tokens between two pipeline stages: s b h elements."""
    return tokens * model.hidden * activation_width(dtype)


def kv_bytes(block: Block) -> int:
    """Bytes of the keys and values of a rank's own tokens of a micro-batch in one layer."""
    return 2 * block.tokens * block.kv_heads * block.model.head_dim * block.width


def ring_buffer_bytes(block: Block) -> int:
    """Bytes that ring attention holds besides a rank's own keys and values: the block in use and the one that
    arrives, and the same of their gradients."""
    return 4 * kv_bytes(block) if block.cp > 1 else 0


# ---------------------------------------------------------------------------------------------- collectives


def _dense_bytes(block: Block) -> int:
    """Bytes of the residual stream of a rank's tokens, gathered."""
    return boundary_bytes(block.model, tokens=block.tokens, dtype=block.dtype)


@functools.lru_cache(maxsize=4096)
def tp_collectives(block: Block, recompute: Recompute) -> tuple[tuple[Exchange, ...], tuple[Exchange, ...]]:
    """The tensor-parallel collectives of one layer that compute waits for: (forward, backward).

    Without sequence parallelism two all-reduces of b s h elements each way; with it each is an all-gather and
    a reduce-scatter (the same bytes on the wire). Full recomputation repeats the forward ones in the backward
    pass. Under sequence parallelism routed tokens are gathered after they were dispatched: those buffers hold
    b s k h, times the load on the fullest expert-parallel rank. Dense inputs of linear layers are gathered in the type
    of their GEMMs (Transformer Engine casts to fp8 before it gathers), sums are taken in 16 bits. The gathers for the
    weight gradients, which run beside compute, are in `regather_collectives`.
    """
    if block.tp == 1:
        return (), ()
    model, dense = block.model, _dense_bytes(block)
    if not block.sequence_parallel:
        once: tuple[Exchange, ...] = (Exchange("all_reduce", dense, 2),)
    elif model.experts is None:
        gathered = block.tokens * model.hidden * BYTES_OF[block.dtype]
        once = Exchange("all_gather", gathered, 2), Exchange("reduce_scatter", dense, 2)
    else:
        routed = routed_tokens(block.tokens * model.experts.per_token, block.load) * model.hidden * block.width
        once = (
            Exchange("all_gather", dense, 1),
            Exchange("reduce_scatter", dense, 1),
            Exchange("all_gather", routed, 1),
            Exchange("reduce_scatter", routed, 1),
        )
    return once, (*once, *once) if recompute == "full" else once


def regather_collectives(block: Block) -> tuple[Exchange, ...]:
    """The backward all-gathers of column-parallel inputs, of which sequence parallelism kept a share.

    Weight gradients need them; they run beside the GEMM of the input's gradient. Routed tokens are kept
    whole.
    """
    if block.tp == 1 or not block.sequence_parallel:
        return ()
    return (Exchange("all_gather", _dense_bytes(block), 2 if block.model.experts is None else 1),)


def ep_collectives(block: Block, recompute: Recompute) -> tuple[tuple[Exchange, ...], tuple[Exchange, ...]]:
    """The expert-parallel collectives of one layer and micro-batch: (forward, backward).

    Dispatch and combine are an all-to-all each, both ways: b s k h elements, 1/tp of them under sequence
    parallelism, and the load times as many through the port of the fullest rank, which takes in what is dispatched
    and gives out what is combined.
    """
    model = block.model
    if block.ep == 1 or model.experts is None:
        return (), ()
    routed = routed_tokens(block.local * model.experts.per_token, block.load) * model.hidden * block.width
    once = Exchange("all_to_all", routed, 2)
    return (once,), (once, once) if recompute == "full" else (once,)


def embedding_collectives(block: Block) -> tuple[tuple[Exchange, ...], tuple[Exchange, ...]]:
    """The tensor-parallel collectives of the vocabulary-parallel embedding: (forward, backward)."""
    if block.tp == 1:
        return (), ()
    size = _dense_bytes(block)
    if block.sequence_parallel:
        return (Exchange("reduce_scatter", size, 1),), (Exchange("all_gather", size, 1),)
    return (Exchange("all_reduce", size, 1),), ()


def head_collectives(block: Block) -> tuple[tuple[Exchange, ...], tuple[Exchange, ...]]:
    """The tensor-parallel collectives of logits and cross-entropy: (forward, backward).

    Vocabulary-parallel cross-entropy all-reduces three fp32 numbers per token: maximum, the target's logit,
    and sum.
    """
    if block.tp == 1:
        return (), ()
    size = _dense_bytes(block)
    loss = Exchange("all_reduce", 4 * block.tokens, 3)
    if block.sequence_parallel:
        return (Exchange("all_gather", size, 1), loss), (Exchange("reduce_scatter", size, 1),)
    return (loss,), (Exchange("all_reduce", size, 1),)
