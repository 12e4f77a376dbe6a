"""A transformer, described by its dimensions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from clustersim.units import FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Experts in place of the feed-forward block: `per_token` of `count` experts see each token."""

    __pydantic_config__: ClassVar[Any] = FILE
    count: int
    per_token: int
    hidden: int

    def __post_init__(self) -> None:
        for name in ("count", "per_token", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.per_token > self.count:
            raise ValueError(f"per_token = {self.per_token} must be at most count = {self.count}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder or encoder transformer.

    `hidden` h, `layers` L, `heads` a, `kv_heads` (grouped-query attention), `ffn_hidden` f, `vocab` V.
    `positions` is the number of learned position embeddings (0: rotary or ALiBi). `gated` feed-forwards have
    three matrices. `bias` covers every linear layer and LayerNorm; `qkv_bias` adds it to Q, K and V alone
    (Qwen2); `qk_norm` normalises each head of Q and K (Qwen3). `tied` models share the input embedding with
    the output projection. `head_transform`: a dense layer and a norm before the logits, and a bias on them
    (BERT); `pooler`: a dense layer on one token of each sequence, followed by a classifier of `classes`
    outputs where there are any. Attention covers the whole sequence: sliding windows are not modelled.
    Frameworks pad the vocabulary in compute and in memory, never in the published count; with `pad_vocab` off they
    compute with it as it is (Megatron-Bridge's should_pad_vocab).
    """

    __pydantic_config__: ClassVar[Any] = FILE
    name: str
    kind: Literal["decoder", "encoder"] = "decoder"
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_hidden: int
    vocab: int
    positions: int = 0
    token_types: int = 0
    gated: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    bias: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    embedding_norm: bool = False
    final_norm: bool = True
    rotary: bool = False
    dropout: bool = True
    tied: bool = True
    pad_vocab: bool = True
    pooler: bool = False
    classes: int = 0
    head_transform: bool = False
    experts: Experts | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn_hidden", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.heads % self.kv_heads != 0:
            raise ValueError(f"heads = {self.heads} must be a multiple of kv_heads = {self.kv_heads}")
        for name in ("positions", "token_types", "classes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        if self.classes and not self.pooler:
            raise ValueError("classes > 0 needs pooler: true")

    @property
    def query_width(self) -> int:
        """Width of Q, and of what the output projection reads: heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of K and of V: kv_heads * head_dim."""
        return self.kv_heads * self.head_dim

    def splits_over(self, tp: int) -> bool:
        """Whether `tp` ranks can share every layer evenly: heads, K/V heads (or copies), feed-forward."""
        ffn = self.experts.hidden if self.experts else self.ffn_hidden
        kv_fits = self.kv_heads % tp == 0 or tp % self.kv_heads == 0
        return self.heads % tp == 0 and kv_fits and ffn % tp == 0

    def kv_heads_per_rank(self, tp: int) -> int:
        """K/V heads on one of `tp` ranks; beyond `kv_heads` ranks each holds a copy of one."""
        return max(1, self.kv_heads // tp)


def padded_vocab(vocab: int, tp: int, multiple: int = 128) -> int:
    """`vocab` rounded up to a multiple of `multiple * tp`, as Megatron-LM does by default."""
    unit = multiple * tp
    return -(-vocab // unit) * unit


def with_rows(model: Model, multiple: int) -> Model:
    """`model` with its vocabulary rounded up to a multiple, as it is computed with, unless it is not padded."""
    vocab = -(-model.vocab // multiple) * multiple if model.pad_vocab else model.vocab
    return model if vocab == model.vocab else replace(model, vocab=vocab)


def vocab_per_rank(vocab: int, tp: int, padded: bool) -> int:
    """Vocabulary rows on the fullest of `tp` ranks, with or without padding."""
    return (padded_vocab(vocab, tp) if padded else vocab + -vocab % tp) // tp


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """A model written out in a scenario; what is left out follows from the rest (GPT: f = 4h, d = h/a)."""

    __pydantic_config__: ClassVar[Any] = FILE
    layers: int
    hidden: int
    heads: int
    vocab: int
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn_hidden: int | None = None
    positions: int | None = None
    gated: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    bias: bool = True
    rotary: bool = False
    dropout: bool = False
    tied: bool = True
    pad_vocab: bool = True
    experts: Experts | None = None
