"""The operations that a probe times, on any device: products, attention, memory-bound operations, small models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clustersim.execute.gpt import TORCH_DTYPE, Gpt
from clustersim.execute.optimizer import Optimizer
from clustersim.execute.probe import AttentionSample, GemmSample, LayerSample, MemorySample, Timed
from clustersim.hardware.kernel import BYTES_OF, Dtype, MemoryOp
from clustersim.workload.model import Model

_ROW = 512


class Timer(Protocol):
    """Times a function within a budget in seconds."""

    def __call__(self, function: Callable[[], object], budget_s: float) -> Timed: ...


def gemm(
    shapes: Iterator[tuple[int, int, int]],
    dtype: Dtype,
    device: torch.device,
    timer: Timer,
    budget_s: float,
    threads: int,
) -> list[GemmSample]:
    """Time F.linear for every (m, n, k)."""
    result = []
    kind = TORCH_DTYPE[dtype]
    for m, n, k in shapes:
        a = torch.randn(m, k, device=device, dtype=torch.float32).to(kind)
        b = torch.randn(n, k, device=device, dtype=torch.float32).to(kind)
        with torch.no_grad():
            time = timer(lambda a=a, b=b: F.linear(a, b), budget_s)  # type: ignore[misc]
        result.append(GemmSample(dtype=dtype, m=m, n=n, k=k, threads=threads, time=time))
    return result


def attention(
    shapes: Iterator[tuple[int, int, int, int]], dtype: Dtype, device: torch.device, timer: Timer, budget_s: float
) -> list[AttentionSample]:
    """Time causal attention for every (instances, sequence, group, head_dim). The backward pass is timed alone, with
    the graph kept, so that it can be repeated."""
    result = []
    for instances, sequence, group, head_dim in shapes:
        heads = min(instances, 8)
        batch = instances // heads

        def leaf(count: int, batch: int = batch, sequence: int = sequence, head_dim: int = head_dim) -> Tensor:
            x = torch.randn(batch, count, sequence, head_dim, device=device, dtype=torch.float32)
            return x.to(TORCH_DTYPE[dtype]).requires_grad_()

        q, k, v = leaf(heads), leaf(heads // group), leaf(heads // group)

        def run(q: Tensor = q, k: Tensor = k, v: Tensor = v, grouped: bool = group > 1) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        forward = timer(run, budget_s)
        y = run()
        out = torch.randn_like(y)
        backward = timer(
            lambda y=y, q=q, k=k, v=v, out=out: torch.autograd.grad(y, (q, k, v), out, retain_graph=True),  # type: ignore[misc]
            budget_s,
        )
        result.append(
            AttentionSample(
                dtype=dtype, instances=instances, sequence=sequence, group=group, head_dim=head_dim,
                forward=forward, backward=backward,
            )
        )  # fmt: skip
    return result


class _Pass(NamedTuple):
    """An operation with the bytes that the cost model counts for it."""

    bytes: int
    run: Callable[[], object]


def memory(
    sizes: tuple[int, ...], dtype: Dtype, device: torch.device, timer: Timer, budget_s: float
) -> list[MemorySample]:
    """Time every memory-bound operation on tensors of `sizes` elements.

    Where an operation has a backward pass, the sample is the mean of both times at the mean of both passes' bytes: a
    step runs one of each, and their sum is what must be right.
    """
    result = []
    for size in sizes:
        for op, passes in _passes(size, dtype, device).items():
            times = [timer(one.run, budget_s) for one in passes]
            result.append(
                MemorySample(
                    op=op,
                    bytes=sum(one.bytes for one in passes) // len(passes),
                    time=Timed(
                        seconds=sum(t.seconds for t in times) / len(times),
                        spread=max(t.spread for t in times),
                        samples=min(t.samples for t in times),
                    ),
                )
            )
    return result


def _passes(n: int, dtype: Dtype, device: torch.device) -> dict[MemoryOp, tuple[_Pass, ...]]:
    e = BYTES_OF[dtype]
    kind = TORCH_DTYPE[dtype]
    rows = n // _ROW

    def leaf() -> Tensor:
        return torch.randn(rows, _ROW, device=device, dtype=torch.float32).to(kind).requires_grad_()

    x, other, gradient = leaf(), leaf().detach(), leaf().detach()
    plain = x.detach()
    weight = torch.ones(_ROW, device=device, dtype=kind, requires_grad=True)
    bias = torch.zeros(_ROW, device=device, dtype=kind, requires_grad=True)

    def both(
        function: Callable[[], Tensor], inputs: tuple[Tensor, ...], forward: int, backward: int
    ) -> tuple[_Pass, _Pass]:
        y = function()
        out = torch.randn_like(y) if y.dim() else None
        return (
            _Pass(forward, function),
            _Pass(backward, lambda: torch.autograd.grad(y, inputs, out, retain_graph=True)),
        )

    # Logits as a head makes them: fp32, one row per token.
    logits = torch.randn(rows, _ROW, device=device, requires_grad=True)
    labels = torch.randint(0, _ROW, (rows,), device=device)
    table = torch.randn(256, _ROW, device=device).to(kind).requires_grad_()
    tokens = torch.randint(0, 256, (rows,), device=device)
    master, moment = torch.randn(n, device=device), torch.randn(n, device=device)
    optimizer = Optimizer([master], "adam", torch.float32)
    half = x.view(rows, 2, _ROW // 2)
    return {
        "norm": both(lambda: F.layer_norm(x, (_ROW,), weight, bias), (x, weight, bias), 2 * n * e, 3 * n * e),
        "softmax": both(lambda: F.softmax(x, dim=-1), (x,), 2 * n * e, 3 * n * e),
        "dropout": both(lambda: F.dropout(x, 0.1), (x,), 2 * n * e + n, 2 * n * e + n),
        "activation": both(lambda: F.gelu(x, approximate="tanh"), (x,), 2 * n * e, 3 * n * e),
        "residual": (_Pass(3 * n * e, lambda: plain + other),),
        "rotary": (_Pass(2 * n * e, lambda: torch.cat((half[:, :1] * 0.5 - half[:, 1:], half[:, 1:] * 0.5), 1)),),
        "bias": (_Pass(n * e, lambda: gradient.sum(0)),),
        "embedding": both(lambda: F.embedding(tokens, table), (table,), 2 * n * e, 3 * n * e + 256 * _ROW * e),
        "cross_entropy": both(lambda: F.cross_entropy(logits, labels, reduction="sum"), (logits,), 32 * n, 8 * n),
        "optimizer": (_Pass(28 * n, lambda: optimizer.step([moment])),),
        "reduce": (_Pass(3 * n * e, lambda: plain.add_(other)),),
        "cast": (_Pass(12 * n, lambda: master.double()),) if e == 4 else (_Pass((e + 4) * n, lambda: plain.float()),),
        "copy": (_Pass(2 * n * e, lambda: gradient.copy_(other)),),
    }


def small_model(hidden: int, layers: int, heads: int, sequence: int) -> Model:
    """A GPT with a vocabulary of bytes."""
    return Model(
        name="probe", layers=layers, hidden=hidden, heads=heads, kv_heads=heads, head_dim=hidden // heads,
        ffn_hidden=4 * hidden, vocab=256, positions=sequence, dropout=False,
    )  # fmt: skip


def layer(
    hidden: int,
    layers: int,
    tokens: int,
    sequence: int,
    dtype: Dtype,
    device: torch.device,
    timer: Timer,
    budget_s: float,
) -> LayerSample:
    """Time a GPT's forward pass, its backward pass, and the optimizer over all of its parameters."""
    heads = max(1, hidden // 64)
    model = small_model(hidden, layers, heads, sequence)
    gpt = Gpt(model, seed=0, dtype=TORCH_DTYPE[dtype], device=device)
    inputs = torch.randint(0, 256, (tokens // sequence, sequence), device=device)
    parameters = list(gpt.parameters())
    forward = timer(lambda: gpt(inputs, inputs), budget_s)
    loss = gpt(inputs, inputs)
    backward = timer(lambda: torch.autograd.grad(loss, parameters, retain_graph=True), budget_s)
    gradients = list(torch.autograd.grad(loss, parameters, retain_graph=True))
    wide = torch.float64 if dtype == "fp64" else torch.float32
    optimizer = Optimizer(parameters, "adam", wide)
    update = timer(lambda: optimizer.step(gradients), budget_s)
    return LayerSample(
        layers=layers, hidden=hidden, heads=heads, tokens=tokens, sequence=sequence, dtype=dtype,
        forward=forward, backward=backward, update=update,
    )  # fmt: skip
