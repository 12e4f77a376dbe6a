"""Models by name, by config.json and by dimensions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clustersim.errors import ScenarioError
from clustersim.workload.huggingface import model_from_config
from clustersim.workload.model import Dimensions, Experts, Model
from clustersim.workload.parameters import parameter_count
from clustersim.workload.presets import PRESET_NAMES, model_of, preset

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257,
        "n_positions": 1024, "n_inner": None, "attn_pdrop": 0.1,
    },
    "llama3-8b": LLAMA,
    "mistral-7b": {**LLAMA, "model_type": "mistral", "vocab_size": 32000, "sliding_window": 4096},
    "mixtral-8x7b": {
        **LLAMA, "model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2.5-7b": {
        **LLAMA, "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "bert-large": {
        "model_type": "bert", "architectures": ["BertForPreTraining"], "hidden_size": 1024,
        "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "vocab_size": 30522,
        "max_position_embeddings": 512, "type_vocab_size": 2, "position_embedding_type": "absolute",
    },
    "bloom-176b": {
        "model_type": "bloom", "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112,
        "vocab_size": 250880, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    },
}  # fmt: skip


def _write(folder: Path, name: str, config: object) -> Path:
    path = folder / name / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_equal_presets(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path, name, CONFIGS[name])
    assert model_from_config(path) == preset(name)
    assert model_of(str(path)) == preset(name)
    assert model_of(str(path.parent)) == preset(name)


def test_qwen3_counts(tmp_path: Path) -> None:
    """Published checkpoints: 8,190,735,360 and 30,532,122,624 parameters."""
    dense = {
        **LLAMA, "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "vocab_size": 151936, "head_dim": 128, "attention_bias": False,
    }  # fmt: skip
    assert parameter_count(model_from_config(_write(tmp_path, "dense", dense))) == 8_190_735_360
    sparse = {
        **dense, "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    model = model_from_config(_write(tmp_path, "sparse", sparse))
    assert model.query_width == 4096  # head_dim is honoured: not h
    assert parameter_count(model) == 30_532_122_624


def test_tied_llama_has_no_head(tmp_path: Path) -> None:
    tied = model_from_config(_write(tmp_path, "a", {**LLAMA, "tie_word_embeddings": True}))
    untied = model_from_config(_write(tmp_path, "b", {k: v for k, v in LLAMA.items() if k[:3] != "tie"}))
    assert parameter_count(untied) - parameter_count(tied) == 128256 * 4096


def test_masked_lm_has_no_pooler(tmp_path: Path) -> None:
    config = {**CONFIGS["bert-large"], "architectures": ["BertForMaskedLM"]}
    h = 1024
    less = h * h + h + 2 * h + 2
    path = _write(tmp_path, "bert", config)
    assert parameter_count(model_from_config(path)) == 336_226_108 - less


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "t5"}, "'t5' is not supported"),
        ({"model_type": None}, "'model_type' is missing"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": "4096"}, "'hidden_size' must be a whole number, not '4096'"),
        ({"hidden_size": True}, "'hidden_size' must be a whole number"),
        ({"num_attention_heads": 0}, "no multiple of 0 heads"),
        ({"num_attention_heads": 31}, "no multiple of 31 heads"),
        ({"num_hidden_layers": 0}, "layers must be at least 1"),
        ({"num_key_value_heads": 5}, "must be a multiple of kv_heads"),
        ({"num_key_value_heads": 0}, "kv_heads must be at least 1"),
        ({"attention_bias": True}, "'attention_bias' = True is not supported"),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
        ({"attention_dropout": "high"}, "must be a number"),
        ({"model_type": "mixtral"}, "'num_local_experts' or 'num_experts' is missing"),
        (
            {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 4},
            "per_token = 4 must be at most",
        ),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "'mlp_only_layers' = [0] is not supported"),
        ({**CONFIGS["bert-large"], "architectures": ["BertModel"]}, "'architectures' = ['BertModel']"),
        ({**CONFIGS["bert-large"], "position_embedding_type": "relative_key"}, "only absolute positions"),
    ],
)
def test_wrong_configs_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = _write(tmp_path, "wrong", {**LLAMA, **change})
    with pytest.raises(ScenarioError) as caught:
        model_from_config(path)
    message = str(caught.value)
    assert said in message
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "must hold an object"),
        ("{", "config.json:1:"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[" * 200_000, "nested too deeply"),
        (" " * 1_000_001, "is larger than"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=said):
        model_of(str(path))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="no such file"):
        model_of(str(tmp_path / "config.json"))
    with pytest.raises(ScenarioError, match=r"no config\.json there"):
        model_of(str(tmp_path / "nowhere"))


def test_names() -> None:
    for name in PRESET_NAMES:
        assert model_of(name) is preset(name)
        assert preset(name).name == name
    with pytest.raises(ScenarioError, match=r"did you mean gpt3-175b") as caught:
        model_of("GPT3-175B")
    assert "\n" not in str(caught.value)
    with pytest.raises(ScenarioError, match="known: gpt3-125m"):
        preset("zzz")


def test_dimensions_of_a_gpt() -> None:
    model = model_of(Dimensions(layers=12, hidden=768, heads=12, vocab=50257, dropout=True), sequence=1024)
    assert parameter_count(model) == parameter_count(preset("gpt2"))
    assert (model.ffn_hidden, model.head_dim, model.positions) == (3072, 64, 1024)


def test_dimensions_of_a_llama() -> None:
    model = model_of(
        Dimensions(
            layers=32, hidden=4096, heads=32, kv_heads=8, ffn_hidden=14336, vocab=32000, gated=True,
            norm="rmsnorm", bias=False, rotary=True, tied=False,
            experts=Experts(count=8, per_token=2, hidden=14336),
        )
    )  # fmt: skip
    assert parameter_count(model) == parameter_count(preset("mixtral-8x7b"))
    assert model.positions == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 7}, "no multiple of heads = 7"),
        ({"heads": 0}, "model.heads must be at least 1"),
        ({"kv_heads": 5}, "multiple of kv_heads = 5"),
        ({"ffn_hidden": 0}, "ffn_hidden must be at least 1"),
        ({"positions": -1}, "positions must not be negative"),
    ],
)
def test_wrong_dimensions(change: dict[str, int], said: str) -> None:
    given = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 100, **change}
    with pytest.raises(ScenarioError, match=said):
        model_of(Dimensions(**given))


def test_models_check_themselves() -> None:
    with pytest.raises(ValueError, match="per_token = 3"):
        Experts(count=2, per_token=3, hidden=8)
    fields = {"layers": 1, "hidden": 8, "heads": 1, "kv_heads": 1, "head_dim": 8, "ffn_hidden": 8, "vocab": 8}
    with pytest.raises(ValueError, match="classes > 0 needs pooler"):
        Model(name="m", classes=2, **fields)
