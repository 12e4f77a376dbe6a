"""Models by name, and everything else a scenario may call a model."""

from __future__ import annotations

import difflib
import functools
import os
from dataclasses import replace
from pathlib import Path

from clustersim.errors import ScenarioError
from clustersim.workload.huggingface import model_from_config
from clustersim.workload.model import Dimensions, Experts, Model


def _gpt(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    vocab: int = 50257,
    positions: int = 2048,
    dropout: bool = True,
) -> Model:
    """A GPT-2 shaped decoder: f = 4h, LayerNorm, biases, learned positions, tied head."""
    return Model(
        name=name, layers=layers, hidden=hidden, heads=heads, kv_heads=heads, head_dim=hidden // heads,
        ffn_hidden=4 * hidden, vocab=vocab, positions=positions, dropout=dropout,
    )  # fmt: skip


def _llama(
    name: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    vocab: int,
    qkv_bias: bool = False,
    experts: Experts | None = None,
) -> Model:
    """A Llama shaped decoder: RMSNorm, SwiGLU, rotary positions, no biases, no dropout, a head of its own."""
    return Model(
        name=name, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=hidden // heads,
        ffn_hidden=ffn, vocab=vocab, gated=True, norm="rmsnorm", bias=False, qkv_bias=qkv_bias, rotary=True,
        dropout=False, tied=False, experts=experts,
    )  # fmt: skip


def _qwen3_moe(name: str, layers: int, hidden: int, heads: int, expert: int) -> Model:
    """128 experts in every layer, eight for each token; 4 K/V heads."""
    plain = _llama(
        name, layers, hidden, heads, 4, 3 * hidden, 151936, experts=Experts(count=128, per_token=8, hidden=expert)
    )
    return replace(plain, head_dim=128, qk_norm=True)


def _megatron(name: str, layers: int, hidden: int, heads: int) -> Model:
    return _gpt(name, layers, hidden, heads, vocab=51200)


_ALL = (
    # Brown et al. 2020, Table 2.1. The XL row prints 24 heads of 128 for h = 2048, and the 13B row h = 5140
    # for 40 heads of 128; 16 heads and h = 5120 are what those widths and heads allow.
    _gpt("gpt3-125m", 12, 768, 12),
    _gpt("gpt3-350m", 24, 1024, 16),
    _gpt("gpt3-760m", 24, 1536, 16),
    _gpt("gpt3-1.3b", 24, 2048, 16),
    _gpt("gpt3-2.7b", 32, 2560, 32),
    _gpt("gpt3-6.7b", 32, 4096, 32),
    _gpt("gpt3-13b", 40, 5120, 40),
    _gpt("gpt3-175b", 96, 12288, 96),
    # Radford et al. 2019.
    _gpt("gpt2", 12, 768, 12, positions=1024),
    _gpt("gpt2-xl", 48, 1600, 25, positions=1024),
    # Narayanan et al. 2021 (SC'21), Table 1.
    _megatron("megatron-1.7b", 24, 2304, 24),
    _megatron("megatron-3.6b", 30, 3072, 32),
    _megatron("megatron-7.5b", 36, 4096, 32),
    _megatron("megatron-18.4b", 40, 6144, 48),
    _megatron("megatron-39.1b", 48, 8192, 64),
    _megatron("megatron-76.1b", 60, 10240, 80),
    _megatron("megatron-145.6b", 80, 12288, 96),
    _megatron("megatron-310.1b", 96, 16384, 128),
    _megatron("megatron-529.6b", 105, 20480, 128),
    _megatron("megatron-1008b", 128, 25600, 160),
    # Korthikanti et al. 2022, Table 3.
    _megatron("megatron-22b", 48, 6144, 64),
    # Smith et al. 2022.
    _megatron("mt-nlg-530b", 105, 20480, 128),
    # Touvron et al. 2023; Dubey et al. 2024.
    _llama("llama2-7b", 32, 4096, 32, 32, 11008, 32000),
    _llama("llama2-13b", 40, 5120, 40, 40, 13824, 32000),
    _llama("llama2-70b", 80, 8192, 64, 8, 28672, 32000),
    _llama("llama3-8b", 32, 4096, 32, 8, 14336, 128256),
    _llama("llama3-70b", 80, 8192, 64, 8, 28672, 128256),
    _llama("llama3-405b", 126, 16384, 128, 8, 53248, 128256),
    # Jiang et al. 2023, 2024. The 4,096-token window of the first Mistral 7B is not modelled.
    _llama("mistral-7b", 32, 4096, 32, 8, 14336, 32000),
    _llama(
        "mixtral-8x7b", 32, 4096, 32, 8, 14336, 32000, experts=Experts(count=8, per_token=2, hidden=14336)
    ),
    _llama(
        "mixtral-8x22b", 56, 6144, 48, 8, 16384, 32768, experts=Experts(count=8, per_token=2, hidden=16384)
    ),
    _llama("qwen2.5-7b", 28, 3584, 28, 4, 18944, 152064, qkv_bias=True),
    # Yang et al. 2025 (Qwen3): heads of 128 whatever the width, and their norms.
    _qwen3_moe("qwen3-30b-a3b", 48, 2048, 32, 768),
    _qwen3_moe("qwen3-235b-a22b", 94, 4096, 64, 1536),
    # Devlin et al. 2019, with both pre-training heads.
    Model(
        name="bert-large", kind="encoder", layers=24, hidden=1024, heads=16, kv_heads=16, head_dim=64,
        ffn_hidden=4096, vocab=30522, positions=512, token_types=2, embedding_norm=True, final_norm=False,
        pooler=True, classes=2, head_transform=True,
    ),
    # Le Scao et al. 2022: ALiBi (no position parameters), a norm behind the embedding, no dropout.
    Model(
        name="bloom-176b", layers=70, hidden=14336, heads=112, kv_heads=112, head_dim=128,
        ffn_hidden=4 * 14336, vocab=250880, embedding_norm=True, dropout=False,
    ),
    # Small enough to train on a CPU: a vocabulary of bytes, sequences of 128.
    _gpt("tiny-1m", 6, 128, 4, vocab=256, positions=128, dropout=False),
    _gpt("tiny-4m", 4, 288, 4, vocab=256, positions=128, dropout=False),
    _gpt("tiny-10m", 8, 320, 8, vocab=256, positions=128, dropout=False),
    _gpt("tiny-25m", 8, 512, 8, vocab=256, positions=128, dropout=False),
)  # fmt: skip

_BY_NAME = {model.name: model for model in _ALL}
PRESET_NAMES = tuple(_BY_NAME)


def preset(name: str) -> Model:
    """The model called `name`; ScenarioError with the nearest names where there is none."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    close = difflib.get_close_matches(name.lower(), PRESET_NAMES, n=3)
    mend = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(PRESET_NAMES)}"
    raise ScenarioError(f"{name!r} is not a known model; {mend} (or give a path to a config.json, or dimensions)")


def model_of(spec: str | Dimensions, *, sequence: int = 2048) -> Model:
    """The model that a scenario means by `spec`: a preset, a path to a config.json, or dimensions.

    `sequence` is the number of learned positions of dimensions that name none and have no rotary positions.
    """
    if isinstance(spec, Dimensions):
        return _from_dimensions(spec, sequence)
    if spec in _BY_NAME:
        return _BY_NAME[spec]
    path = Path(spec)
    # Unlike Path.is_file, no error where the text is too long for a name.
    if path.suffix == ".json" or os.path.isfile(path / "config.json"):
        return model_from_config(path)
    if len(path.parts) > 1:
        raise ScenarioError(f"{spec}: no config.json there; give the path of a Hugging Face config.json")
    return preset(spec)


@functools.lru_cache(maxsize=256)
def _from_dimensions(given: Dimensions, sequence: int) -> Model:
    for name in ("layers", "hidden", "heads", "vocab"):
        if getattr(given, name) < 1:
            raise ScenarioError(f"model.{name} must be at least 1, not {getattr(given, name)}")
    if given.head_dim is None and given.hidden % given.heads:
        raise ScenarioError(f"model: hidden = {given.hidden} is no multiple of heads = {given.heads}; add head_dim")
    learned = 0 if given.rotary else sequence
    try:
        return Model(
            name=f"{given.layers}x{given.hidden}",
            layers=given.layers,
            hidden=given.hidden,
            heads=given.heads,
            kv_heads=given.heads if given.kv_heads is None else given.kv_heads,
            head_dim=given.hidden // given.heads if given.head_dim is None else given.head_dim,
            ffn_hidden=4 * given.hidden if given.ffn_hidden is None else given.ffn_hidden,
            vocab=given.vocab,
            positions=learned if given.positions is None else given.positions,
            gated=given.gated,
            norm=given.norm,
            bias=given.bias,
            rotary=given.rotary,
            dropout=given.dropout,
            tied=given.tied,
            pad_vocab=given.pad_vocab,
            experts=given.experts,
        )
    except ValueError as error:
        raise ScenarioError(f"model: {error}") from None
