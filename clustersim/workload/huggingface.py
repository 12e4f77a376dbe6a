"""Models from the config.json of a Hugging Face checkpoint, read as plain JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustersim.errors import ScenarioError
from clustersim.files import read_tree
from clustersim.workload.model import Experts, Model

_LARGEST_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class _Config:
    """The keys of one file, with the file's name for complaints."""

    path: Path
    keys: Mapping[str, Any]

    def whole(self, *names: str) -> int:
        """The integer under the first of `names` (spellings of one key) that is there."""
        for name in names:
            if self.keys.get(name) is not None:
                return self._whole(name)
        raise ScenarioError(f"{self.path}: the key {' or '.join(map(repr, names))} is missing; add it")

    def whole_or(self, default: int, *names: str) -> int:
        return self.whole(*names) if any(self.keys.get(name) is not None for name in names) else default

    def flag(self, name: str, default: bool) -> bool:
        value = self.keys.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ScenarioError(f"{self.path}: {name!r} must be true or false, not {_short(value)}")
        return value

    def dropout(self, default: float, *names: str) -> bool:
        """Whether a probability under `names` is above zero; an absent one is `default`, the library's."""
        return any(self._number(name, default) > 0 for name in names)

    def refuse(self, name: str, why: str, *allowed: object) -> None:
        """ScenarioError if `name` has a value not in `allowed`: the model would be counted wrongly."""
        value = self.keys.get(name)
        if value is not None and value not in allowed:
            raise ScenarioError(f"{self.path}: {name!r} = {_short(value)} is not supported: {why}")

    def _whole(self, name: str) -> int:
        value = self.keys[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ScenarioError(f"{self.path}: {name!r} must be a whole number, not {_short(value)}")
        return value

    def _number(self, name: str, default: float) -> float:
        value = self.keys.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ScenarioError(f"{self.path}: {name!r} must be a number, not {_short(value)}")
        return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def model_from_config(path: str | Path) -> Model:
    """The model that a config.json (or the folder that holds one) describes, named after the folder.

    Understands the model types bert, bloom, gpt2, llama, mistral, mixtral, qwen2, qwen3 and qwen3_moe.
    Attention is taken over the whole sequence: a sliding window in the file is not modelled. ScenarioError,
    one line, for another type, a missing key, or an option that would change the parameters in a way that the
    model cannot express.
    """
    path = Path(path)
    if os.path.isfile(path / "config.json"):
        path = path / "config.json"
    if os.path.isfile(path) and path.stat().st_size > _LARGEST_BYTES:
        raise ScenarioError(f"{path}: is larger than {_LARGEST_BYTES} bytes; name the config.json, not the weights")
    try:
        tree, _ = read_tree(path)
    except RecursionError:
        raise ScenarioError(f"{path}: nested too deeply for a config.json") from None
    if not isinstance(tree, dict):
        raise ScenarioError(f"{path}: must hold an object of keys, as a Hugging Face config.json does")
    config = _Config(path, tree)
    name = path.resolve().parent.name
    try:
        return _build(config, name)
    except ValueError as error:
        raise ScenarioError(f"{path}: {error}") from None


def _build(config: _Config, name: str) -> Model:
    match config.keys.get("model_type"):
        case "gpt2":
            return _gpt2(config, name)
        case "llama":
            return _llama(config, name)
        case "mistral" | "mixtral":
            return _llama_like(config, name)
        case "qwen2":
            return _llama_like(config, name, qkv_bias=True)
        case "qwen3" | "qwen3_moe":
            config.refuse("attention_bias", "only models without it", False)
            config.refuse("decoder_sparse_step", "every layer must have experts", 1)
            config.refuse("mlp_only_layers", "every layer must have experts", [])
            return _llama_like(config, name, qk_norm=True)
        case "bert":
            return _bert(config, name)
        case "bloom":
            return _bloom(config, name)
        case None:
            raise ScenarioError(f"{config.path}: the key 'model_type' is missing; is this a Hugging Face config.json?")
        case other:
            raise ScenarioError(
                f"{config.path}: model_type {_short(other)} is not supported; supported: bert, bloom, gpt2, "
                "llama, mistral, mixtral, qwen2, qwen3, qwen3_moe; or write the dimensions in the scenario"
            )


def _even(config: _Config, hidden: int, heads: int) -> int:
    """h / a, or the complaint."""
    if heads < 1 or hidden % heads:
        raise ScenarioError(f"{config.path}: hidden size {hidden} is no multiple of {heads} heads; add 'head_dim'")
    return hidden // heads


def _gpt2(config: _Config, name: str) -> Model:
    config.refuse("add_cross_attention", "only decoders without cross-attention", False)
    hidden, heads = config.whole("n_embd"), config.whole("n_head")
    return Model(
        name=name,
        layers=config.whole("n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=_even(config, hidden, heads),
        ffn_hidden=config.whole_or(4 * hidden, "n_inner"),
        vocab=config.whole("vocab_size"),
        positions=config.whole("n_positions", "n_ctx"),
        dropout=config.dropout(0.1, "attn_pdrop", "resid_pdrop", "embd_pdrop"),
        tied=config.flag("tie_word_embeddings", True),
    )


def _llama(config: _Config, name: str) -> Model:
    config.refuse("attention_bias", "only models without it", False)
    config.refuse("mlp_bias", "only models without it", False)
    return _llama_like(config, name)


def _llama_like(config: _Config, name: str, qkv_bias: bool = False, qk_norm: bool = False) -> Model:
    """RMSNorm, a gated feed-forward, rotary positions, no biases but those named."""
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    ffn = config.whole("intermediate_size")
    experts = None
    if config.keys["model_type"] in ("mixtral", "qwen3_moe"):
        experts = Experts(
            count=config.whole("num_local_experts", "num_experts"),
            per_token=config.whole("num_experts_per_tok"),
            hidden=config.whole_or(ffn, "moe_intermediate_size"),
        )
    given = config.keys.get("head_dim") is not None
    return Model(
        name=name,
        layers=config.whole("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=config.whole_or(heads, "num_key_value_heads"),
        head_dim=config.whole("head_dim") if given else _even(config, hidden, heads),
        ffn_hidden=ffn,
        vocab=config.whole("vocab_size"),
        gated=True,
        norm="rmsnorm",
        bias=False,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        rotary=True,
        dropout=config.dropout(0.0, "attention_dropout"),
        tied=config.flag("tie_word_embeddings", False),
        experts=experts,
    )


def _bert(config: _Config, name: str) -> Model:
    config.refuse("position_embedding_type", "only absolute positions", "absolute")
    config.refuse("is_decoder", "only encoders", False)
    named = config.keys.get("architectures") or ["BertForPreTraining"]
    if named not in (["BertForPreTraining"], ["BertForMaskedLM"]):
        raise ScenarioError(
            f"{config.path}: 'architectures' = {_short(named)} is not supported: write BertForPreTraining or "
            "BertForMaskedLM, which have a loss to train with"
        )
    both = named == ["BertForPreTraining"]
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    return Model(
        name=name,
        kind="encoder",
        layers=config.whole("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=_even(config, hidden, heads),
        ffn_hidden=config.whole("intermediate_size"),
        vocab=config.whole("vocab_size"),
        positions=config.whole("max_position_embeddings"),
        token_types=config.whole_or(2, "type_vocab_size"),
        embedding_norm=True,
        final_norm=False,
        dropout=config.dropout(0.1, "attention_probs_dropout_prob", "hidden_dropout_prob"),
        tied=config.flag("tie_word_embeddings", True),
        pooler=both,
        classes=2 if both else 0,
        head_transform=True,
    )


def _bloom(config: _Config, name: str) -> Model:
    hidden, heads = config.whole("hidden_size", "n_embed"), config.whole("n_head", "num_attention_heads")
    return Model(
        name=name,
        layers=config.whole("n_layer", "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=_even(config, hidden, heads),
        ffn_hidden=4 * hidden,
        vocab=config.whole("vocab_size"),
        embedding_norm=True,
        dropout=config.dropout(0.0, "hidden_dropout", "attention_dropout"),
        tied=config.flag("tie_word_embeddings", True),
    )
