"""A decoder transformer in torch, as a list of layers: -1 the embedding, 0 to L-1 the blocks, L norm, head and loss."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clustersim.hardware.kernel import Dtype
from clustersim.layout.layout import Recompute
from clustersim.workload.model import Model

TORCH_DTYPE: dict[Dtype, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

_DROPOUT = 0.1
# Standard deviation of the initial weights (Radford et al. 2019); projections into the residual stream are scaled down
# by the square root of their number.
_INITIAL_STD = 0.02
_ROTARY_BASE = 10000.0


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension."""

    def __init__(self, model: Model, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.centred = model.norm == "layernorm"
        self.bias = nn.Parameter(torch.empty(width)) if self.centred and model.bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias)
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class Embedding(nn.Module):
    """Layer -1: tokens (b, s) to activations (b, s, h)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.word = nn.Parameter(torch.empty(model.vocab, model.hidden))
        self.position = nn.Parameter(torch.empty(model.positions, model.hidden)) if model.positions else None
        self.norm = Norm(model, model.hidden) if model.embedding_norm else None
        self.dropout = _DROPOUT if model.dropout else 0.0

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.word)
        if self.position is not None:
            x = x + self.position[: tokens.shape[1]]
        if self.norm is not None:
            x = self.norm(x)
        return F.dropout(x, self.dropout) if self.dropout else x


class Attention(nn.Module):
    """Causal self-attention, Q, K and V from one product. Dropout is left out of the scores: no fused kernel has it
    on every device."""

    def __init__(self, model: Model, recompute: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = model.heads, model.kv_heads, model.head_dim
        width = model.query_width + 2 * model.key_width
        self.qkv = nn.Linear(model.hidden, width, bias=model.bias or model.qkv_bias)
        self.output = nn.Linear(model.query_width, model.hidden, bias=model.bias)
        self.query_norm = Norm(model, model.head_dim) if model.qk_norm else None
        self.key_norm = Norm(model, model.head_dim) if model.qk_norm else None
        self.rotary = model.rotary
        self.recompute = recompute

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = self.heads != self.kv_heads
        y: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return y

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        d = self.head_dim
        q, k, v = self.qkv(x).split((self.heads * d, self.kv_heads * d, self.kv_heads * d), dim=-1)
        q = q.view(batch, length, self.heads, d)
        k = k.view(batch, length, self.kv_heads, d)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        v = v.view(batch, length, self.kv_heads, d).transpose(1, 2)
        if self.rotary:
            cosine, sine = _rotary_tables(length, d, x.device, x.dtype)
            q, k = _rotate(q, cosine, sine), _rotate(k, cosine, sine)
        core = checkpoint(self.core, q, k, v, use_reentrant=False) if self.recompute else self.core(q, k, v)
        y: Tensor = self.output(core.transpose(1, 2).reshape(batch, length, self.heads * d))
        return y


def _rotary_tables(length: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, each (length, width / 2) (Su et al. 2021)."""
    key = (length, width, device, dtype)
    if key not in _ROTARY:
        frequency = _ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        angle = torch.arange(length, dtype=torch.float64, device=device).outer(frequency)
        _ROTARY[key] = (angle.cos().to(dtype), angle.sin().to(dtype))
    return _ROTARY[key]


_ROTARY: dict[tuple[int, int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)


class FeedForward(nn.Module):
    """GELU, or SiLU of a gate times a second projection (SwiGLU), both from one product."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.gated = model.gated
        self.up = nn.Linear(model.hidden, model.ffn_hidden * (2 if model.gated else 1), bias=model.bias)
        self.down = nn.Linear(model.ffn_hidden, model.hidden, bias=model.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = F.gelu(x, approximate="tanh")
        y: Tensor = self.down(x)
        return y


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then the same with the feed-forward."""

    def __init__(self, model: Model, recompute: Recompute) -> None:
        super().__init__()
        self.attention_norm = Norm(model, model.hidden)
        self.attention = Attention(model, recompute == "selective")
        self.mlp_norm = Norm(model, model.hidden)
        self.mlp = FeedForward(model)
        self.dropout = _DROPOUT if model.dropout else 0.0
        self.recompute = recompute == "full"

    def run(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x)))
        return x + self.drop(self.mlp(self.mlp_norm(x)))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout else x

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.run, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self.run(x)


class Head(nn.Module):
    """Layer L: final norm, logits, and the summed cross-entropy of all tokens. `tied` is the embedding's matrix, where
    the model has no output projection of its own."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.norm = Norm(model, model.hidden) if model.final_norm else None
        self.weight = None if model.tied else nn.Parameter(torch.empty(model.vocab, model.hidden))

    def forward(self, x: Tensor, targets: Tensor, tied: Tensor | None) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        weight = self.weight if tied is None else tied
        assert weight is not None
        logits = F.linear(x, weight).flatten(0, 1)
        if logits.element_size() < 4:
            logits = logits.float()
        return F.cross_entropy(logits, targets.flatten(), reduction="sum")


def build_layer(
    model: Model, layer: int, *, seed: int, dtype: torch.dtype, device: torch.device, recompute: Recompute = "none"
) -> nn.Module:
    """Layer `layer` with weights that only (seed, layer, shapes) decide, rounded to `dtype`.

    Every process can so build any layer alone, and all processes get the same one. Weights are drawn in fp32 on the
    CPU, from a normal distribution; norms start at one, biases at zero.
    """
    with torch.device("meta"):
        module: nn.Module
        if layer == -1:
            module = Embedding(model)
        elif layer < model.layers:
            module = Block(model, recompute)
        else:
            module = Head(model)
    module = module.to(dtype).to_empty(device=device)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer + 1)
    into_residual = _INITIAL_STD / math.sqrt(2 * model.layers)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                std = into_residual if name in ("attention.output.weight", "mlp.down.weight") else _INITIAL_STD
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
    return module


class Gpt(nn.Module):
    """All layers in one process. `layers[i]` is layer i - 1."""

    def __init__(
        self, model: Model, *, seed: int, dtype: torch.dtype, device: torch.device, recompute: Recompute = "none"
    ) -> None:
        super().__init__()
        self.tied = model.tied
        self.layers = nn.ModuleList(
            build_layer(model, layer, seed=seed, dtype=dtype, device=device, recompute=recompute)
            for layer in range(-1, model.layers + 1)
        )

    def span(self, first: int, last: int) -> nn.Sequential:
        """Layers `first` to `last`, both included, in the order of the forward pass."""
        return nn.Sequential(*(self.layers[layer + 1] for layer in range(first, last + 1)))

    def span_parameters(self, first: int, last: int) -> Iterator[nn.Parameter]:
        """Their parameters. A tied matrix is the embedding's."""
        for layer in range(first, last + 1):
            yield from self.layers[layer + 1].parameters()

    @property
    def word(self) -> Tensor | None:
        """The embedding's matrix where the head shares it."""
        embedding = self.layers[0]
        assert isinstance(embedding, Embedding)
        return embedding.word if self.tied else None

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy of `targets` (b, s) given `tokens` (b, s)."""
        x = tokens
        for layer in self.layers[:-1]:
            x = layer(x)
        return self.layers[-1](x, targets, self.word)  # type: ignore[no-any-return]
