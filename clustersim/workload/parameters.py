"""Parameters: every tensor of a model, how tensor parallelism splits it, what a stage holds."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from clustersim.workload.model import Model, vocab_per_rank

Place = Literal["embedding", "layer", "head"]
Kind = Literal["attention", "mlp", "norm", "embedding", "head", "router", "expert"]
Split = Literal["column", "row", "replicated", "vocab"]
Part = Literal["all", "dense", "experts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One parameter tensor; matrices are (out, in), experts are stacked in front.

    `place`: before the layers, in each layer, or behind them. `tp`: which dimension tensor parallelism splits
    (column: out; row: in; vocab: rows of the vocabulary); `pieces`: into how many equal parts that dimension
    may be cut at most (heads, not columns, in attention); ranks beyond that hold copies.
    """

    name: str
    shape: tuple[int, ...]
    place: Place
    kind: Kind
    tp: Split
    pieces: int = 1

    @property
    def per_layer(self) -> bool:
        """Whether each layer has one."""
        return self.place == "layer"

    @property
    def elements(self) -> int:
        """Number of parameters in one such tensor, unsplit and unpadded."""
        return math.prod(self.shape)

    def elements_per_rank(self, tp: int, vocab_padded: bool = False, ep: int = 1) -> int:
        """Parameters of this tensor on (the fullest) one of `tp` tensor- and `ep` expert-parallel ranks."""
        if self.tp == "vocab":
            return self.elements // self.pieces * vocab_per_rank(self.pieces, tp, vocab_padded)
        pieces = 1 if self.tp == "replicated" else -(-self.pieces // tp)
        share = self.elements // self.pieces * pieces
        return share // ep if self.kind == "expert" else share


@functools.lru_cache(maxsize=1024)
def tensors(model: Model) -> tuple[Tensor, ...]:
    """Every parameter tensor of `model`, in the order of the forward pass; those of a layer stand once."""
    return (
        *_embedding_tensors(model),
        *_attention_tensors(model),
        *_mlp_tensors(model),
        *_head_tensors(model),
    )


def _embedding(name: str, *shape: int, tp: Split = "replicated", pieces: int = 1) -> Tensor:
    return Tensor(name=name, shape=shape, place="embedding", kind="embedding", tp=tp, pieces=pieces)


def _layer(name: str, kind: Kind, *shape: int, tp: Split = "replicated", pieces: int = 1) -> Tensor:
    return Tensor(name=name, shape=shape, place="layer", kind=kind, tp=tp, pieces=pieces)


def _head(name: str, *shape: int, tp: Split = "replicated", pieces: int = 1) -> Tensor:
    return Tensor(name=name, shape=shape, place="head", kind="head", tp=tp, pieces=pieces)


def _norm(model: Model, name: str, place: Place, width: int) -> list[Tensor]:
    parts = ["weight"] if model.norm == "rmsnorm" or not model.bias else ["weight", "bias"]
    return [Tensor(name=f"{name}.{part}", shape=(width,), place=place, kind="norm", tp="replicated") for part in parts]


def _embedding_tensors(model: Model) -> list[Tensor]:
    h, v = model.hidden, model.vocab
    found = [_embedding("embedding.word", v, h, tp="vocab", pieces=v)]
    if model.positions:
        found.append(_embedding("embedding.position", model.positions, h))
    if model.token_types:
        found.append(_embedding("embedding.token_type", model.token_types, h))
    if model.embedding_norm:
        found += _norm(model, "embedding.norm", "embedding", h)
    return found


def _attention_tensors(model: Model) -> list[Tensor]:
    h, d = model.hidden, model.head_dim
    found = _norm(model, "attention.norm", "layer", h)
    for name, heads in (("query", model.heads), ("key", model.kv_heads), ("value", model.kv_heads)):
        found.append(_layer(f"attention.{name}.weight", "attention", heads * d, h, tp="column", pieces=heads))
        if model.bias or model.qkv_bias:
            found.append(_layer(f"attention.{name}.bias", "attention", heads * d, tp="column", pieces=heads))
    if model.qk_norm:
        found += _norm(model, "attention.query_norm", "layer", d)
        found += _norm(model, "attention.key_norm", "layer", d)
    found.append(_layer("attention.output.weight", "attention", h, model.query_width, tp="row", pieces=model.heads))
    if model.bias:
        found.append(_layer("attention.output.bias", "attention", h))
    return found


def _mlp_tensors(model: Model) -> list[Tensor]:
    h, f, experts = model.hidden, model.ffn_hidden, model.experts
    found = _norm(model, "mlp.norm", "layer", h)
    kind: Kind = "mlp"
    stack: tuple[int, ...] = ()
    if experts is not None:
        kind, stack, f = "expert", (experts.count,), experts.hidden
        found.append(_layer("router.weight", "router", experts.count, h))
    for name in ("gate", "up") if model.gated else ("up",):
        found.append(_layer(f"mlp.{name}.weight", kind, *stack, f, h, tp="column", pieces=f))
        if model.bias:
            found.append(_layer(f"mlp.{name}.bias", kind, *stack, f, tp="column", pieces=f))
    found.append(_layer("mlp.down.weight", kind, *stack, h, f, tp="row", pieces=f))
    if model.bias:
        found.append(_layer("mlp.down.bias", kind, *stack, h))
    return found


def _head_tensors(model: Model) -> list[Tensor]:
    h, v = model.hidden, model.vocab
    found = _norm(model, "final_norm", "head", h) if model.final_norm else []
    if model.pooler:
        found += [_head("pooler.weight", h, h), _head("pooler.bias", h)]
    if model.classes:
        found += [_head("classifier.weight", model.classes, h), _head("classifier.bias", model.classes)]
    if model.head_transform:
        found += [_head("head.transform.weight", h, h), _head("head.transform.bias", h)]
        found += _norm(model, "head.transform.norm", "head", h)
        found.append(_head("head.bias", v, tp="vocab", pieces=v))
    if not model.tied:
        found.append(_head("head.weight", v, h, tp="vocab", pieces=v))
    return found


def parameter_count(model: Model) -> int:
    """Parameters of the whole model: unpadded vocabulary, a tied embedding counted once."""
    return embedding_parameters(model) + model.layers * layer_parameters(model) + head_parameters(model)


def embedding_parameters(model: Model) -> int:
    """Parameters before the first layer: word, position and token-type embeddings and their norm."""
    return _at(model, "embedding")


def layer_parameters(model: Model) -> int:
    """Parameters of one layer, all experts included."""
    return _at(model, "layer")


def head_parameters(model: Model) -> int:
    """Parameters behind the last layer: final norm, transform, pooler, output projection unless tied."""
    return _at(model, "head")


def _at(model: Model, place: Place) -> int:
    return sum(tensor.elements for tensor in tensors(model) if tensor.place == place)


@functools.lru_cache(maxsize=8192)
def stage_parameters(
    model: Model,
    layers: range,
    *,
    first: bool,
    last: bool,
    tp: int,
    vocab_padded: bool = False,
    ep: int = 1,
    part: Part = "all",
) -> int:
    """Parameters that one rank of a pipeline stage holds.

    `layers`: the stage's layers; `first` and `last`: whether it has the embedding and the head. Column- and
    row-split tensors are divided by `tp`, norms and row-parallel biases are not, the vocabulary is divided
    (after padding to a multiple of 128 * tp where `vocab_padded`). A tied word embedding stands on the first
    and on the last stage where these differ. `ep` divides the experts; `part` selects the experts, everything
    else, or all.
    """
    total = 0
    for tensor in tensors(model):
        if part != "all" and (tensor.kind == "expert") != (part == "experts"):
            continue
        copies = {"embedding": int(first), "layer": len(layers), "head": int(last)}[tensor.place]
        if tensor.name == "embedding.word" and model.tied and last and not first:
            copies += 1
        total += copies * tensor.elements_per_rank(tp, vocab_padded, ep)
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one of `tp` tensor- and `ep` expert-parallel ranks holds: `layers` layers, the embedding where `first`, the
    head where `last` (without a copy of a tied embedding that is there already)."""

    model: Model
    layers: int
    first: bool
    last: bool
    tp: int
    ep: int

    @property
    def parameters(self) -> int:
        """`stage_parameters` of these."""
        return stage_parameters(
            self.model, range(self.layers), first=self.first, last=self.last, tp=self.tp, ep=self.ep
        )  # fmt: skip
