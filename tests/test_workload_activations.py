"""Activations and collectives: the published formulas, and enumeration where they do not reach."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
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
    logits_bytes,
    regather_collectives,
    stored_tensors,
    tp_collectives,
    working_set_bytes,
)
from clustersim.workload.model import Model
from clustersim.workload.presets import PRESET_NAMES, preset

GIB = 2**30


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
        return activation_bytes_per_layer(model, s, batch, tp, sp, recompute, "unfused")

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
    one = activation_bytes_per_layer(preset(name), 2048, batch, 8, False, "none", "unfused")
    two = activation_bytes_per_layer(preset(name), 2048, batch, 8, True, "selective", "unfused")
    assert layers * one / GIB == plain
    assert layers * two / GIB == both


def test_a_llama_layer_by_hand() -> None:
    """Norm inputs, GEMM inputs, Q, K, V, log-sum-exp, gate, up and their product; no masks, no scores."""
    model, t = preset("llama3-8b"), 8192
    h, kv, f = 4096, 1024, 14336
    expected = 2 * t * (h + h + h + kv + kv + h + h + h + 2 * f + f) + 4 * t * 32
    assert activation_bytes_per_layer(model, 8192, 1, 1, False, "none", "flash") == expected
    assert activation_bytes_per_layer(model, 8192, 1, 1, False, "selective", "flash") == expected
    assert activation_bytes_per_layer(model, 8192, 1, 1, False, "full", "flash") == 2 * t * h
    assert activation_bytes_per_layer(model, 8192, 1, 8, True, "none", "flash") == expected // 8


def test_flash_keeps_no_scores() -> None:
    for name in ("gpt3-1.3b", "llama2-7b"):
        model = preset(name)
        unfused = activation_bytes_per_layer(model, 2048, 1, 1, False, "selective", "unfused")
        flash = activation_bytes_per_layer(model, 2048, 1, 1, False, "none", "flash")
        assert flash - unfused == 4 * 2048 * model.heads


def test_dropout_masks_only_with_dropout() -> None:
    wet = preset("gpt3-1.3b")
    dry = dataclasses.replace(wet, dropout=False)
    scores, sbh = 16 * 2048 * 2048, 2048 * 2048
    difference = [activation_bytes_per_layer(model, 2048, 1, 1, False, "none", "unfused") for model in (wet, dry)]
    assert difference[0] - difference[1] == 3 * scores + 2 * sbh


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_each_step_of_recomputation_keeps_less(name: str) -> None:
    model = preset(name)
    none, selective, full = (
        activation_bytes_per_layer(model, 128, 2, 1, False, how, "unfused") for how in ("none", "selective", "full")
    )
    assert none > selective > full == boundary_bytes(model, 128, 2)
    assert working_set_bytes(model, 128, 2, 1, False, "full", "unfused") == none - full
    assert working_set_bytes(model, 128, 2, 1, False, "selective", "unfused") == none - selective
    assert working_set_bytes(model, 128, 2, 1, False, "none", "unfused") == 0
    names = [tensor.name for tensor in stored_tensors(model, 128, 2, 1, False, "unfused")]
    assert len(set(names)) == len(names)


def test_experts_keep_the_chosen_tokens() -> None:
    """A dense layer's tensors, the feed-forward ones twice (two experts a token), and the routed copies."""
    model = preset("mixtral-8x7b")
    dense = dataclasses.replace(model, experts=None)
    t, h, f = 2048, 4096, 14336
    more = 2 * t * 3 * f + 2 * (2 * t * 2 * h) + 4 * t * 8
    sparse_bytes = activation_bytes_per_layer(model, t, 1, 1, False, "none", "flash")
    assert sparse_bytes == activation_bytes_per_layer(dense, t, 1, 1, False, "none", "flash") + more


def test_ends() -> None:
    model = preset("gpt3-175b")
    assert logits_bytes(model, 2048, 1, 8, True) == 8 * 2048 * 6400
    assert logits_bytes(model, 2048, 1, 1) == 8 * 2048 * 50257
    assert boundary_bytes(model, 2048, 2) == 2 * 2048 * 2 * 12288
    assert boundary_bytes(model, 2048, 2, 4) == 4 * 2048 * 2 * 12288
    sbh = 2048 * 12288
    assert embedding_activation_bytes(model, 2048, 1, 8, True) == sbh // 8
    assert head_activation_bytes(model, 2048, 1, 8, False) == 4 * sbh
    assert head_activation_bytes(model, 2048, 1, 8, True) == 4 * sbh // 8
    bert = preset("bert-large")
    assert embedding_activation_bytes(bert, 512, 1, 1, False) == 3 * 512 * 1024
    assert head_activation_bytes(bert, 512, 1, 1, False) == 2 * 4 * 512 * 1024


@given(tp=st.sampled_from([2, 4, 8]), sequence=st.integers(1, 512), batch=st.integers(1, 16))
def test_four_all_reduces_a_layer(tp: int, sequence: int, batch: int) -> None:
    """Two forward, two backward, six with full recomputation; sequence parallelism sends the same bytes."""
    model = preset("gpt3-1.3b")
    s = sequence * tp
    for recompute, expected in (("none", 4), ("selective", 4), ("full", 6)):
        ahead, behind = tp_collectives(model, s, batch, tp, False, recompute)
        assert {e.kind for e in (*ahead, *behind)} == {"all_reduce"}
        assert sum(e.times for e in (*ahead, *behind)) == expected
        assert {e.bytes for e in (*ahead, *behind)} == {boundary_bytes(model, s, batch)}
        both = [*ahead, *behind]
        split = [e for part in tp_collectives(model, s, batch, tp, True, recompute) for e in part]
        assert _sent(split, tp) == _sent(both, tp)
        assert sum(e.times for e in split) == 2 * expected


def _sent(exchanges: list[Exchange], n: int) -> Fraction:
    """Bytes that one of n ranks sends in ring collectives."""
    passes = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
    return sum((Fraction(passes[kind] * size * times * (n - 1), n) for kind, size, times in exchanges), Fraction(0))


def test_no_collectives_without_tensor_parallelism() -> None:
    for model in (preset("gpt2"), preset("mixtral-8x7b")):
        assert tp_collectives(model, 128, 1, 1, False, "full") == ((), ())
        assert regather_collectives(model, 128, 1, 1, False) == ()
        assert embedding_collectives(model, 128, 1, 1, False) == ((), ())
        assert head_collectives(model, 128, 1, 1, False) == ((), ())


def test_regathers_only_under_sequence_parallelism() -> None:
    model = preset("gpt3-1.3b")
    assert regather_collectives(model, 128, 1, 4, False) == ()
    assert regather_collectives(model, 128, 1, 4, True) == (("all_gather", 128 * 2048 * 2, 2),)


def test_vocabulary_parallel_ends() -> None:
    model = preset("gpt3-1.3b")
    size = 128 * 2048 * 2
    assert embedding_collectives(model, 128, 1, 4, False) == ((("all_reduce", size, 1),), ())
    assert embedding_collectives(model, 128, 1, 4, True) == (
        (("reduce_scatter", size, 1),),
        (("all_gather", size, 1),),
    )
    loss = ("all_reduce", 4 * 128, 3)
    assert head_collectives(model, 128, 1, 4, False) == ((loss,), (("all_reduce", size, 1),))
    assert head_collectives(model, 128, 1, 4, True) == (
        (("all_gather", size, 1), loss),
        (("reduce_scatter", size, 1),),
    )


def test_four_all_to_alls_per_layer_of_experts() -> None:
    model = preset("mixtral-8x7b")
    ahead, behind = ep_collectives(model, 128, 1, 1, False, 4, "none")
    assert ahead == behind == (("all_to_all", 128 * 2 * 4096 * 2, 2),)
    assert sum(e.times for e in ep_collectives(model, 128, 1, 1, False, 4, "full")[1]) == 4
    assert ep_collectives(model, 128, 1, 4, True, 4, "none")[0][0].bytes == 128 * 2 * 4096 * 2 // 4
    assert ep_collectives(model, 128, 1, 1, False, 1, "none") == ((), ())
    assert ep_collectives(preset("gpt2"), 128, 1, 1, False, 2, "none") == ((), ())


def test_routed_tokens_are_gathered_after_dispatch() -> None:
    model = preset("mixtral-8x7b")
    dense, routed = 128 * 4096 * 2, 2 * 128 * 4096 * 2
    once = (
        ("all_gather", dense, 1),
        ("reduce_scatter", dense, 1),
        ("all_gather", routed, 1),
        ("reduce_scatter", routed, 1),
    )
    assert tp_collectives(model, 128, 1, 4, True, "none") == (once, once)
    assert tp_collectives(model, 128, 1, 4, True, "full") == (once, once + once)
    assert tp_collectives(model, 128, 1, 4, False, "none")[0] == (("all_reduce", dense, 2),)
    assert regather_collectives(model, 128, 1, 4, True) == (("all_gather", dense, 1),)
