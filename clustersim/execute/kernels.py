"""The operations that a probe times, on any device: products, attention, memory-bound operations, small models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clustersim.execute.gpt import TORCH_DTYPE, Gpt
from clustersim.execute.optimizer import Optimizer
from clustersim.execute.probe_samples import (
    AttentionPoint,
    AttentionSample,
    Backend,
    GemmPoint,
    GemmSample,
    LayerPoint,
    LayerSample,
    MemoryPoint,
    MemorySample,
    Timed,
)
from clustersim.execute.timing import Timer
from clustersim.hardware.kernel import BYTES_OF, Dtype, MemoryOp
from clustersim.workload.model import Model

_ROW = 512


def gemm(point: GemmPoint, device: torch.device, timer: Timer, budget_s: float, threads: int) -> GemmSample:
    """Time the products of `point`."""
    run = _fp8(point, device) if point.dtype == "fp8" else _product(point, device)
    with torch.no_grad():
        time = timer(run, budget_s)
    return GemmSample(
        dtype=point.dtype, m=point.m, n=point.n, k=point.k, batch=point.batch, form=point.form, threads=threads,
        time=time,
    )  # fmt: skip


def _product(point: GemmPoint, device: torch.device) -> Callable[[], object]:
    m, n, k, kind = point.m, point.n, point.k, TORCH_DTYPE[point.dtype]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32).to(kind)

    if point.batch > 1:
        a, b = drawn(point.batch, m, k), drawn(point.batch, n, k).transpose(1, 2)
        return lambda: torch.bmm(a, b)
    match point.form:
        case "forward":
            x, weight = drawn(m, k), drawn(n, k)
            return lambda: F.linear(x, weight)
        case "dgrad":
            y, weight = drawn(m, k), drawn(k, n)
            return lambda: torch.mm(y, weight)
        case "wgrad":
            y, x = drawn(k, m), drawn(k, n)
            return lambda: torch.mm(y.t(), x)


def _fp8(point: GemmPoint, device: torch.device) -> Callable[[], object]:
    """A product of fp8 (e4m3) operands with one scale each, bf16 out, sums as training libraries take them in the
    forward pass (`use_fast_accum`). The right-hand operand is column-major, as the library asks."""
    one = torch.ones((), device=device, dtype=torch.float32)
    a = torch.randn(point.m, point.k, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(point.n, point.k, device=device).to(torch.float8_e4m3fn).t()
    return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


_BACKENDS: dict[Backend, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _by(backend: Backend) -> AbstractContextManager[object]:
    return nullcontext() if backend == "default" else sdpa_kernel(_BACKENDS[backend])


def attention(point: AttentionPoint, device: torch.device, timer: Timer, budget_s: float) -> AttentionSample:
    """Time causal attention. The backward pass is timed alone, with the graph kept, so that it can be repeated."""
    heads = min(point.instances, max(8, point.group))
    batch = point.instances // heads

    def leaf(count: int) -> Tensor:
        x = torch.randn(batch, count, point.sequence, point.head_dim, device=device, dtype=torch.float32)
        return x.to(TORCH_DTYPE[point.dtype]).requires_grad_()

    q, k, v = leaf(heads), leaf(heads // point.group), leaf(heads // point.group)

    def run() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=point.group > 1)

    with _by(point.backend):
        forward = timer(run, budget_s)
        y = run()
    out = torch.randn_like(y)
    backward = timer(lambda: torch.autograd.grad(y, (q, k, v), out, retain_graph=True), budget_s)
    return AttentionSample(
        dtype=point.dtype, instances=point.instances, sequence=point.sequence, group=point.group,
        head_dim=point.head_dim, backend=point.backend, forward=forward, backward=backward,
    )  # fmt: skip


class _Pass(NamedTuple):
    """An operation with the bytes that the cost model counts for it."""

    bytes: int
    run: Callable[[], object]


def memory(point: MemoryPoint, device: torch.device, timer: Timer, budget_s: float) -> tuple[MemorySample, ...]:
    """Time every memory-bound operation on tensors of so many elements.

    Where an operation has a backward pass, the sample is the mean of both times at the mean of both passes' bytes: a
    step runs one of each, and their sum is what must be right.
    """
    return tuple(
        MemorySample(
            op=op,
            bytes=sum(one.bytes for one in passes) // len(passes),
            time=_mean(timer(one.run, budget_s) for one in passes),
        )
        for op, passes in _passes(point.elements, point.dtype, device).items()
    )


def _mean(found: Iterable[Timed]) -> Timed:
    times = list(found)
    return Timed(
        seconds=sum(t.seconds for t in times) / len(times),
        spread=max(t.spread for t in times),
        samples=min(t.samples for t in times),
        rejected=sum(t.rejected for t in times) / len(times),
    )


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
        "cross_entropy": both(lambda: F.cross_entropy(logits, labels, reduction="sum"), (logits,), 16 * n, 20 * n),
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


def layer(point: LayerPoint, device: torch.device, timer: Timer, budget_s: float) -> LayerSample:
    """Time a GPT's forward pass, its backward pass, and the optimizer over all of its parameters."""
    heads = max(1, point.hidden // 64)
    model = small_model(point.hidden, point.layers, heads, point.sequence)
    gpt = Gpt(model, seed=0, dtype=TORCH_DTYPE[point.dtype], device=device)
    inputs = torch.randint(0, 256, (point.tokens // point.sequence, point.sequence), device=device)
    parameters = list(gpt.parameters())
    forward = timer(lambda: gpt(inputs, inputs), budget_s)
    loss = gpt(inputs, inputs)
    backward = timer(lambda: torch.autograd.grad(loss, parameters, retain_graph=True), budget_s)
    gradients = list(torch.autograd.grad(loss, parameters, retain_graph=True))
    wide = torch.float64 if point.dtype == "fp64" else torch.float32
    optimizer = Optimizer(parameters, "adam", wide)
    update = timer(lambda: optimizer.step(gradients), budget_s)
    return LayerSample(
        layers=point.layers, hidden=point.hidden, heads=heads, tokens=point.tokens, sequence=point.sequence,
        dtype=point.dtype, forward=forward, backward=backward, update=update,
    )  # fmt: skip
