"""Parameter counts: exact where an exact count is published, and consistent under every split."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustersim.workload.model import Model, padded_vocab
from clustersim.workload.parameters import (
    embedding_parameters,
    head_parameters,
    layer_parameters,
    parameter_count,
    stage_parameters,
    tensors,
)
from clustersim.workload.presets import PRESET_NAMES, preset

# As the checkpoints hold them.
EXACT = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen2.5-7b": 7_615_616_512,
    "bloom-176b": 176_247_271_424,
    "bert-large": 336_226_108,
}

# As the papers print them: billions, and the digit of the last place.
PRINTED = {
    "gpt3-125m": (0.125, 0.001),
    "gpt3-760m": (0.760, 0.001),
    "gpt3-1.3b": (1.3, 0.1),
    "gpt3-2.7b": (2.7, 0.1),
    "gpt3-6.7b": (6.7, 0.1),
    "gpt3-13b": (13, 1),
    "gpt3-175b": (175, 1),
    "megatron-1.7b": (1.7, 0.1),
    "megatron-3.6b": (3.6, 0.1),
    "megatron-7.5b": (7.5, 0.1),
    "megatron-18.4b": (18.4, 0.1),
    "megatron-39.1b": (39.1, 0.1),
    "megatron-76.1b": (76.1, 0.1),
    "megatron-145.6b": (145.6, 0.1),
    "megatron-310.1b": (310.1, 0.1),
    "megatron-529.6b": (529.6, 0.1),
    "megatron-1008b": (1008.0, 0.1),
    "megatron-22b": (22, 1),
    "mt-nlg-530b": (530, 1),
    "tiny-1m": (0.001, 0.001),
    "tiny-4m": (0.004, 0.001),
    "tiny-10m": (0.010, 0.001),
    "tiny-25m": (0.025, 0.001),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_counts(name: str) -> None:
    assert parameter_count(preset(name)) == EXACT[name]


@pytest.mark.parametrize("name", PRINTED)
def test_printed_counts(name: str) -> None:
    printed, digit = PRINTED[name]
    billions = parameter_count(preset(name)) / 1e9
    assert round(billions / digit) == round(printed / digit), billions


def test_every_preset_has_a_published_count() -> None:
    # gpt3-350m is a loose name: its published dimensions have 355.9M parameters, and are known as 350M.
    assert set(PRESET_NAMES) - set(EXACT) - set(PRINTED) == {"gpt3-350m"}
    assert parameter_count(preset("gpt3-350m")) == 355_871_744


def test_bert_without_its_pretraining_heads() -> None:
    encoder = dataclasses.replace(preset("bert-large"), head_transform=False, classes=0)
    assert parameter_count(encoder) == 335_141_888


@given(
    layers=st.integers(1, 100),
    heads=st.integers(1, 128),
    head_dim=st.integers(1, 256),
    vocab=st.integers(1, 300_000),
    positions=st.integers(0, 8192),
)
def test_gpt_formula(layers: int, heads: int, head_dim: int, vocab: int, positions: int) -> None:
    """12 L h^2 (1 + 13/12h) + (V + s) h (Narayanan et al. 2021), and the final norm that it leaves out."""
    h = heads * head_dim
    model = _gpt(layers, heads, head_dim, vocab, positions)
    formula = layers * (12 * h * h + 13 * h) + (vocab + positions) * h
    assert parameter_count(model) == formula + 2 * h
    assert layer_parameters(model) == 12 * h * h + 13 * h
    assert embedding_parameters(model) == (vocab + positions) * h
    assert head_parameters(model) == 2 * h


def _gpt(layers: int, heads: int, head_dim: int, vocab: int, positions: int) -> Model:
    h = heads * head_dim
    return Model(
        name="g", layers=layers, hidden=h, heads=heads, kv_heads=heads, head_dim=head_dim, ffn_hidden=4 * h,
        vocab=vocab, positions=positions,
    )  # fmt: skip


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_stages_add_up(name: str) -> None:
    model = preset(name)
    whole = parameter_count(model)
    assert stage_parameters(model, range(model.layers), first=True, last=True, tp=1) == whole
    cut = model.layers // 3
    front = stage_parameters(model, range(cut), first=True, last=False, tp=1)
    middle = stage_parameters(model, range(cut, 2 * cut), first=False, last=False, tp=1)
    back = stage_parameters(model, range(2 * cut, model.layers), first=False, last=True, tp=1)
    shared = model.vocab * model.hidden if model.tied else 0
    assert front + middle + back == whole + shared
    assert middle == cut * layer_parameters(model)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_tensor_parallel_shards_cover_the_model(name: str) -> None:
    """Shards of 2 ranks hold everything once, replicated tensors twice; an odd vocabulary gets a row more."""
    model = preset(name)
    if not model.splits_over(2):
        assert name == "gpt2-xl"  # 25 heads
        return
    twice = 0
    for tensor in tensors(model):
        if tensor.tp == "replicated":
            twice += tensor.elements * (model.layers if tensor.per_layer else 1)
    shard = stage_parameters(model, range(model.layers), first=True, last=True, tp=2)
    odd_row = model.vocab % 2 * model.hidden
    assert 2 * shard == parameter_count(model) + twice + odd_row


def test_what_is_replicated() -> None:
    names = {t.name for t in tensors(preset("llama3-8b")) if t.tp == "replicated"}
    assert names == {"attention.norm.weight", "mlp.norm.weight", "final_norm.weight"}
    rows = {t.name for t in tensors(preset("gpt3-175b")) if t.tp == "row"}
    assert rows == {"attention.output.weight", "mlp.down.weight"}


def test_key_and_value_heads_are_copied_beyond_their_number() -> None:
    model = preset("llama3-8b")
    key = next(t for t in tensors(model) if t.name == "attention.key.weight")
    assert key.elements_per_rank(8) == key.elements // 8
    assert key.elements_per_rank(16) == key.elements // 8
    assert model.splits_over(16)
    assert not model.splits_over(3)


def test_vocabulary_padding() -> None:
    model = preset("gpt3-125m")
    assert padded_vocab(50257, 1) == 50304
    assert padded_vocab(50257, 8) == 51200
    assert padded_vocab(51200, 8) == 51200
    plain, padded = (
        stage_parameters(model, range(0), first=True, last=False, tp=8, vocab_padded=p) for p in (False, True)
    )
    assert padded - plain == (51200 // 8 - 6283) * model.hidden  # ceil(50257 / 8) = 6283
    assert stage_parameters(model, range(0), first=False, last=True, tp=8, vocab_padded=True) == 6400 * 768 + 2 * 768


def test_experts_apart() -> None:
    model = preset("mixtral-8x7b")
    layers = range(model.layers)
    every, dense, experts = (
        stage_parameters(model, layers, first=True, last=True, tp=1, part=part) for part in ("all", "dense", "experts")
    )
    assert experts == 32 * 8 * 3 * 4096 * 14336
    assert dense + experts == every
    assert stage_parameters(model, layers, first=True, last=True, tp=1, ep=4, part="experts") == experts // 4
    assert stage_parameters(model, layers, first=True, last=True, tp=1, ep=4, part="dense") == dense
    assert stage_parameters(preset("gpt2"), range(12), first=True, last=True, tp=1, part="experts") == 0
