"""Activations and collectives: the published formulas, and enumeration where they do not reach."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
from blocks import block_of
from hypothesis import given
from hypothesis import strategies as st

from clustersim.workload.activations import (
    Exchange,
    activation_bytes_per_layer,
    boundary_bytes,
    embedding_activation_bytes,
    embedding_collectives,
    ep_collectives,
    head_activation_bytes,
    head_collectives,
    loss_bytes,
    regather_collectives,
    stored_tensors,
    tp_collectives,
    working_set_bytes,
)
from clustersim.workload.block import Block
from clustersim.workload.layer_kernels import Recompute
from clustersim.workload.model import Model, with_rows
from clustersim.workload.presets import PRESET_NAMES, preset

GIB = 2**30


def _kept(block: Block, recompute: Recompute) -> int:
    return activation_bytes_per_layer(block, recompute, "core", fp8_inputs=False)


def _working(block: Block, recompute: Recompute) -> int:
    return working_set_bytes(block, recompute, "core", fp8_inputs=False)


@given(
    tp=st.sampled_from([1, 2, 3, 4, 8, 16]),
    heads_per_rank=st.integers(1, 16),
    head_dim=st.integers(1, 160),
    sequence_per_rank=st.integers(1, 512),
    batch=st.integers(1, 16),
)
def test_published_formulas(tp: int, heads_per_rank: int, head_dim: int, sequence_per_rank: int, batch: int) -> None:
    """Korthikanti et al. 2022, Table 2, as rationals."""
    a, s = heads_per_rank * tp, sequence_per_rank * tp
    h = a * head_dim
    model = Model(
        name="g",
        layers=1,
        hidden=h,
        heads=a,
        kv_heads=a,
        head_dim=head_dim,
        ffn_hidden=4 * h,
        vocab=1,
        positions=s,
    )
    sbh, core = s * batch * h, Fraction(5 * a * s, h)

    def kept(sp: bool, recompute: str) -> int:
        return _kept(
            block_of(model, s, micro_batch=batch, tp=tp, sequence_parallel=sp, attention_kind="unfused"), recompute
        )

    assert kept(False, "none") == sbh * (10 + Fraction(24, tp) + core / tp)
    assert kept(True, "none") == Fraction(sbh, tp) * (34 + core)
    assert kept(False, "selective") == sbh * (10 + Fraction(24, tp))
    assert kept(True, "selective") == Fraction(34 * sbh, tp)
    assert kept(False, "full") == 2 * sbh
    assert kept(True, "full") == Fraction(2 * sbh, tp)


# Figure 7 of the same paper, GiB on the first stage: tensor parallelism alone; with sequence parallelism and
# selective recomputation. 1F1B keeps the layers of a whole model, interleaving 1 + (p - 1)/(pv) times that.
PRINTED_GIB: dict[str, tuple[int, int | Fraction, float, float]] = {
    "megatron-22b": (4, 48, 59.25, 9.5625),
    "gpt3-175b": (1, 96 * (1 + Fraction(7, 8 * 3)), 66.84375, 12.3515625),
    "mt-nlg-530b": (1, 105 * (1 + Fraction(34, 35 * 3)), 114.0234375, 23.076171875),
    "megatron-1008b": (1, 128, 131.25, 26.5625),
}


@pytest.mark.parametrize("name", PRINTED_GIB)
def test_published_totals(name: str) -> None:
    batch, layers, plain, both = PRINTED_GIB[name]
    one = _kept(block_of(preset(name), 2048, micro_batch=batch, tp=8, attention_kind="unfused"), "none")
    two = _kept(
        block_of(preset(name), 2048, micro_batch=batch, tp=8, sequence_parallel=True, attention_kind="unfused"),
        "selective",
    )
    assert layers * one / GIB == plain
    assert layers * two / GIB == both


def test_a_llama_layer_by_hand() -> None:
    """Norm inputs, GEMM inputs, Q, K, V, log-sum-exp, gate, up and their product; no masks, no scores."""
    model, t = preset("llama3-8b"), 8192
    h, kv, f = 4096, 1024, 14336
    expected = 2 * t * (h + h + h + kv + kv + h + h + h + 2 * f + f) + 4 * t * 32
    assert _kept(block_of(model, 8192), "none") == expected
    assert _kept(block_of(model, 8192), "selective") == expected
    assert _kept(block_of(model, 8192), "full") == 2 * t * h
    assert _kept(block_of(model, 8192, tp=8, sequence_parallel=True), "none") == expected // 8


def test_flash_keeps_no_scores() -> None:
    for name in ("gpt3-1.3b", "llama2-7b"):
        model = preset(name)
        unfused = _kept(block_of(model, 2048, attention_kind="unfused"), "selective")
        flash = _kept(block_of(model, 2048), "none")
        assert flash - unfused == 4 * 2048 * model.heads


def test_dropout_masks_only_with_dropout() -> None:
    wet = preset("gpt3-1.3b")
    dry = dataclasses.replace(wet, dropout=False)
    scores, sbh = 16 * 2048 * 2048, 2048 * 2048
    difference = [_kept(block_of(model, 2048, attention_kind="unfused"), "none") for model in (wet, dry)]
    assert difference[0] - difference[1] == 3 * scores + 2 * sbh


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_each_step_of_recomputation_keeps_less(name: str) -> None:
    model = preset(name)
    none, selective, full = (
        _kept(block_of(model, 128, micro_batch=2, attention_kind="unfused"), how)
        for how in ("none", "selective", "full")
    )
    assert none > selective > full == boundary_bytes(model, tokens=256, dtype="bf16")
    assert _working(block_of(model, 128, micro_batch=2, attention_kind="unfused"), "full") == none - full
    assert _working(block_of(model, 128, micro_batch=2, attention_kind="unfused"), "selective") == none - selective
    assert _working(block_of(model, 128, micro_batch=2, attention_kind="unfused"), "none") == 0
    names = [
        tensor.name
        for tensor in stored_tensors(block_of(model, 128, micro_batch=2, attention_kind="unfused"), fp8_inputs=False)
    ]
    assert len(set(names)) == len(names)


def test_experts_keep_the_chosen_tokens() -> None:
    """A dense layer's tensors, the feed-forward ones twice (two experts a token), and the routed copies."""
    model = preset("mixtral-8x7b")
    dense = dataclasses.replace(model, experts=None)
    t, h, f = 2048, 4096, 14336
    more = 2 * t * 3 * f + 2 * (2 * t * 2 * h) + 4 * t * 8
    sparse_bytes = _kept(block_of(model, t), "none")
    assert sparse_bytes == _kept(block_of(dense, t), "none") + more


def test_ends() -> None:
    model = preset("gpt3-175b")
    padded = with_rows(model, 8 * 128)
    assert loss_bytes(block_of(padded, 2048, tp=8), "in-place") == (4 * 2048 * 6400, 4 * 2048 * 6400)
    assert loss_bytes(block_of(model, 2048), "in-place") == (4 * 2048 * 50257, 4 * 2048 * 50257)
    assert boundary_bytes(model, tokens=4096, dtype="bf16") == 2 * 2048 * 2 * 12288
    assert boundary_bytes(model, tokens=4096, dtype="fp32") == 4 * 2048 * 2 * 12288
    sbh = 2048 * 12288
    assert embedding_activation_bytes(block_of(model, 2048, tp=8, sequence_parallel=True)) == sbh // 8
    assert head_activation_bytes(block_of(model, 2048, tp=8)) == 4 * sbh
    assert head_activation_bytes(block_of(model, 2048, tp=8, sequence_parallel=True)) == 4 * sbh // 8
    bert = preset("bert-large")
    assert embedding_activation_bytes(block_of(bert, 512)) == 3 * 512 * 1024
    assert head_activation_bytes(block_of(bert, 512)) == 2 * 4 * 512 * 1024


@given(tp=st.sampled_from([2, 4, 8]), sequence=st.integers(1, 512), batch=st.integers(1, 16))
def test_four_all_reduces_a_layer(tp: int, sequence: int, batch: int) -> None:
    """Two forward, two backward, six with full recomputation; sequence parallelism sends the same bytes."""
    model = preset("gpt3-1.3b")
    s = sequence * tp
    for recompute, expected in (("none", 4), ("selective", 4), ("full", 6)):
        ahead, behind = tp_collectives(block_of(model, s, micro_batch=batch, tp=tp), recompute)
        assert {e.kind for e in (*ahead, *behind)} == {"all_reduce"}
        assert sum(e.times for e in (*ahead, *behind)) == expected
        assert {e.bytes for e in (*ahead, *behind)} == {boundary_bytes(model, tokens=s * batch, dtype="bf16")}
        both = [*ahead, *behind]
        split = [
            e
            for part in tp_collectives(block_of(model, s, micro_batch=batch, tp=tp, sequence_parallel=True), recompute)
            for e in part
        ]
        assert _sent(split, tp) == _sent(both, tp)
        assert sum(e.times for e in split) == 2 * expected


def _sent(exchanges: list[Exchange], n: int) -> Fraction:
    """Bytes that one of n ranks sends in ring collectives."""
    passes = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
    return sum((Fraction(passes[kind] * size * times * (n - 1), n) for kind, size, times in exchanges), Fraction(0))


def test_no_collectives_without_tensor_parallelism() -> None:
    for model in (preset("gpt2"), preset("mixtral-8x7b")):
        assert tp_collectives(block_of(model, 128), "full") == ((), ())
        assert regather_collectives(block_of(model, 128)) == ()
        assert embedding_collectives(block_of(model, 128)) == ((), ())
        assert head_collectives(block_of(model, 128)) == ((), ())


def test_regathers_only_under_sequence_parallelism() -> None:
    model = preset("gpt3-1.3b")
    assert regather_collectives(block_of(model, 128, tp=4)) == ()
    assert regather_collectives(block_of(model, 128, tp=4, sequence_parallel=True)) == (
        ("all_gather", 128 * 2048 * 2, 2),
    )


def test_vocabulary_parallel_ends() -> None:
    model = preset("gpt3-1.3b")
    size = 128 * 2048 * 2
    assert embedding_collectives(block_of(model, 128, tp=4)) == ((("all_reduce", size, 1),), ())
    assert embedding_collectives(block_of(model, 128, tp=4, sequence_parallel=True)) == (
        (("reduce_scatter", size, 1),),
        (("all_gather", size, 1),),
    )
    loss = ("all_reduce", 4 * 128, 3)
    assert head_collectives(block_of(model, 128, tp=4)) == ((loss,), (("all_reduce", size, 1),))
    assert head_collectives(block_of(model, 128, tp=4, sequence_parallel=True)) == (
        (("all_gather", size, 1), loss),
        (("reduce_scatter", size, 1),),
    )


def test_four_all_to_alls_per_layer_of_experts() -> None:
    model = preset("mixtral-8x7b")
    ahead, behind = ep_collectives(block_of(model, 128, ep=4), "none")
    assert ahead == behind == (("all_to_all", 128 * 2 * 4096 * 2, 2),)
    assert sum(e.times for e in ep_collectives(block_of(model, 128, ep=4), "full")[1]) == 4
    assert (
        ep_collectives(block_of(model, 128, tp=4, sequence_parallel=True, ep=4), "none")[0][0].bytes
        == 128 * 2 * 4096 * 2 // 4
    )
    assert ep_collectives(block_of(model, 128), "none") == ((), ())
    assert ep_collectives(block_of(preset("gpt2"), 128, ep=2), "none") == ((), ())


def test_routed_tokens_are_gathered_after_dispatch() -> None:
    model = preset("mixtral-8x7b")
    dense, routed = 128 * 4096 * 2, 2 * 128 * 4096 * 2
    once = (
        ("all_gather", dense, 1),
        ("reduce_scatter", dense, 1),
        ("all_gather", routed, 1),
        ("reduce_scatter", routed, 1),
    )
    assert tp_collectives(block_of(model, 128, tp=4, sequence_parallel=True), "none") == (once, once)
    assert tp_collectives(block_of(model, 128, tp=4, sequence_parallel=True), "full") == (once, once + once)
    assert tp_collectives(block_of(model, 128, tp=4), "none")[0] == (("all_reduce", dense, 2),)
    assert regather_collectives(block_of(model, 128, tp=4, sequence_parallel=True)) == (("all_gather", dense, 1),)
