"""Kernels: their FLOPs equal the published formulas, their bytes follow from what each operation touches."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Literal

import pytest
from blocks import block_of, head_of
from hypothesis import given
from hypothesis import strategies as st

from clustersim.hardware.kernel import Attention, Dtype, Gemm, Kernels, Memory
from clustersim.workload.layer_kernels import (
    accumulation_kernels,
    backward,
    embedding_backward,
    embedding_forward,
    flops_per_step,
    forward,
    head_backward,
    head_forward,
    optimizer_kernels,
    recomputed,
)
from clustersim.workload.model import Experts, Model, with_rows
from clustersim.workload.parameters import parameter_count, tensors
from clustersim.workload.presets import PRESET_NAMES, preset
from clustersim.workload.training import Training


def _gpt(layers: int, heads: int, head_dim: int, vocab: int = 1000, **changes: object) -> Model:
    h = heads * head_dim
    model = Model(
        name="g", layers=layers, hidden=h, heads=heads, kv_heads=heads, head_dim=head_dim, ffn_hidden=4 * h,
        vocab=vocab, positions=64,
    )  # fmt: skip
    return dataclasses.replace(model, **changes)  # type: ignore[arg-type]


def _flops(kernels: Kernels) -> int:
    return sum(kernel.flops * count for kernel, count in kernels)


def _bytes(kernels: Kernels) -> int:
    return sum(k.traffic_bytes * count for k, count in kernels if isinstance(k, Memory))


def _ops(kernels: Kernels) -> list[str]:
    return [kernel.op if isinstance(kernel, Memory) else kernel.kind for kernel, _ in kernels]


SIZES = {
    "layers": st.integers(1, 120),
    "heads": st.integers(1, 64),
    "head_dim": st.integers(1, 160),
    "vocab": st.integers(1, 300_000),
    "sequence": st.integers(1, 8192),
    "batch": st.integers(1, 4096),
}


@given(**SIZES)
def test_model_and_hardware_flops_of_a_gpt(
    layers: int, heads: int, head_dim: int, vocab: int, sequence: int, batch: int
) -> None:
    """Korthikanti et al. 2022, equation 7 and Narayanan et al. 2021, equation 3, as rationals."""
    model, h = _gpt(layers, heads, head_dim, vocab), heads * head_dim
    training = Training(global_batch=batch, sequence=sequence)
    unit = batch * sequence * layers * h * h
    attention, logits = Fraction(sequence, 6 * h), Fraction(vocab, layers * h)
    assert flops_per_step(model, training) == 72 * unit * (1 + attention + logits / 12)
    assert flops_per_step(model, training, "full") == 96 * unit * (1 + attention + logits / 16)
    assert flops_per_step(model, training, masked=True) == 72 * unit * (1 + attention / 2 + logits / 12)
    assert flops_per_step(model, training, "full", masked=True) == 96 * unit * (1 + attention / 2 + logits / 16)
    core = 4 * batch * sequence * sequence * h * layers
    assert flops_per_step(model, training, "selective") - flops_per_step(model, training) == core


def test_an_encoder_discards_no_scores() -> None:
    training = Training(global_batch=4, sequence=512)
    assert flops_per_step(preset("bert-large"), training, masked=True) == flops_per_step(preset("bert-large"), training)


@pytest.mark.parametrize("name", [n for n in PRESET_NAMES if preset(n).experts is None and n != "bert-large"])
def test_flops_are_six_per_parameter_and_token_besides_attention(name: str) -> None:
    """6 N per token for the N parameters in the GEMMs, and 12 L s a d for the scores."""
    model, s = preset(name), 256
    in_gemms = parameter_count(model) - _outside_gemms(model)
    expected = s * (6 * in_gemms + 12 * model.layers * s * model.query_width)
    assert flops_per_step(model, Training(global_batch=1, sequence=s)) == expected


def _outside_gemms(model: Model) -> int:
    """Parameters that are no GEMM's operand: embeddings (the tied one is, as the head), norms and biases."""
    total = 0
    for tensor in tensors(model):
        matrix = len(tensor.shape) == 2 and tensor.kind != "embedding"
        if not matrix and not (tensor.name == "embedding.word" and model.tied):
            total += tensor.elements * (model.layers if tensor.per_layer else 1)
    return total


def test_mixture_of_experts_flops() -> None:
    """Mixtral computes with two experts of eight: N = 12.88e9 active parameters, less the embedding."""
    model, s = preset("mixtral-8x7b"), 100
    active = 12_879_925_248 - 32000 * 4096 - 65 * 4096
    expected = s * (6 * active + 12 * 32 * s * 4096)
    assert flops_per_step(model, Training(global_batch=1, sequence=s)) == expected


@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    batch=st.integers(1, 4),
    attention=st.sampled_from(["flash", "unfused"]),
    sp=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    gated=st.booleans(),
    ep=st.sampled_from([1, 2, 4]),
    moe=st.booleans(),
)
def test_tensor_parallel_ranks_share_the_gemms(
    tp: int,
    batch: int,
    attention: Literal["flash", "unfused"],
    sp: bool,
    kv_heads: int,
    gated: bool,
    ep: int,
    moe: bool,
) -> None:
    """t ranks together do the GEMM work of one (K and V are copied where there are fewer heads of them)."""
    experts = Experts(count=4, per_token=2, hidden=64) if moe else None
    model = _gpt(2, 8, 8, kv_heads=kv_heads, gated=gated, experts=experts)
    tokens = 24 * batch

    def work(t: int, s: bool, e: int) -> int:
        block = block_of(
            model, 24, micro_batch=batch, tp=t, sequence_parallel=s, ep=e, attention_kind=attention
        )  # fmt: skip
        assert 2 * _gemm_flops(forward(block)) == _gemm_flops(backward(block))
        return _gemm_flops(forward(block))

    copies = max(1, tp // kv_heads) - 1
    router = 2 * tokens * 64 * 4 * (0 if sp else tp - 1) if moe else 0
    copied = copies * 2 * tokens * 64 * 2 * model.key_width
    assert tp * work(tp, sp, ep) == work(1, False, 1) + copied + router


def _gemm_flops(kernels: Kernels) -> int:
    return sum(kernel.flops * count for kernel, count in kernels if isinstance(kernel, Gemm))


@given(tokens=st.integers(1, 500), ep=st.sampled_from([1, 2, 3, 6]), per_token=st.integers(1, 6))
def test_every_choice_of_every_token_meets_an_expert(tokens: int, ep: int, per_token: int) -> None:
    model = _gpt(1, 2, 8, experts=Experts(count=6, per_token=per_token, hidden=40))
    kernels = forward(block_of(model, tokens, ep=ep))
    up = [(k.m, count * k.batch) for k, count in kernels if isinstance(k, Gemm) and k.n == 40]
    assert len(up) <= 2
    alone = forward(block_of(model, tokens, ep=ep, fused=False))
    assert [(k.m, count) for k, count in alone if isinstance(k, Gemm) and k.n == 40] == up
    assert sum(m * count for m, count in up) == tokens * per_token
    # Eight at a time, where there are whole eights.
    dealt = 8 if tokens * per_token % 8 == 0 else 1
    assert sum(count for _, count in up) == min(6 // ep, tokens * per_token // dealt)
    assert max(m for m, _ in up) - min(m for m, _ in up) <= dealt
    assert all(m % dealt == 0 for m, _ in up)


def test_shapes_of_a_llama_layer() -> None:
    kernels = forward(block_of(preset("llama3-8b"), 8192, tp=4, sequence_parallel=True))
    gemms = [(k.m, k.n, k.k) for k, _ in kernels if isinstance(k, Gemm)]
    assert gemms == [
        (8192, (4096 + 2 * 1024) // 4, 4096),
        (8192, 4096, 1024),
        (8192, 2 * 14336 // 4, 4096),
        (8192, 4096, 14336 // 4),
    ]
    attention = next(k for k, _ in kernels if isinstance(k, Attention))
    assert (attention.heads, attention.kv_heads, attention.causal) == (8, 2, True)
    assert _ops(kernels) == [
        "norm", "gemm", "rotary", "attention", "gemm", "residual",
        "norm", "gemm", "activation", "gemm", "residual",
    ]  # fmt: skip


def test_encoders_see_both_sides() -> None:
    kernels = forward(block_of(preset("bert-large"), 512, dtype="fp16"))
    assert [k.causal for k, _ in kernels if isinstance(k, Attention)] == [False]


def test_backward_gemms_transpose_the_forward_ones() -> None:
    gemms = [k for k, _ in backward(block_of(_gpt(1, 4, 16), 32, micro_batch=2)) if isinstance(k, Gemm)]
    shapes = [(k.m, k.n, k.k) for k in gemms]
    t, h = 64, 64
    assert shapes == [
        (t, 4 * h, h), (h, 4 * h, t), (t, h, 4 * h), (4 * h, h, t),
        (t, h, h), (h, h, t), (t, h, 3 * h), (3 * h, h, t)
    ]  # fmt: skip


def test_memory_operations_of_a_gpt_layer() -> None:
    """b s h elements between the GEMMs; 4 h inside the feed-forward; s x s per head in the core."""
    model, s, b = _gpt(1, 4, 16), 32, 2
    n, scores = s * b * 64, b * 4 * s * s
    kernels = forward(block_of(model, s, micro_batch=b, attention_kind="unfused"))
    seen = {(k.op, k.read_bytes, k.written_bytes) for k, _ in kernels if isinstance(k, Memory)}
    assert seen == {
        ("norm", 2 * n, 2 * n),
        ("softmax", 2 * scores, 2 * scores),
        ("dropout", 2 * scores, 3 * scores),
        ("residual", 4 * n, 3 * n),
        ("activation", 8 * n, 8 * n),
    }


def test_sequence_parallelism_divides_what_lies_between_the_gemms() -> None:
    model = _gpt(1, 8, 16)
    for fused in (True, False):
        for step in (forward, backward):
            plain = step(block_of(model, 64, micro_batch=2, tp=4, fused=fused))
            parallel = step(block_of(model, 64, micro_batch=2, tp=4, sequence_parallel=True, fused=fused))
            for (one, _), (other, _) in zip(plain, parallel, strict=True):
                if isinstance(one, Memory) and isinstance(other, Memory):
                    between = one.read_bytes >= 64 * 2 * 128 * 2
                    split = one.op in ("norm", "residual", "dropout") or (one.op == "bias" and one != other)
                    assert one.traffic_bytes == other.traffic_bytes * (4 if split else 1)
                    assert between or not split
                else:
                    assert one == other


def test_fusion_saves_bytes_and_no_flops() -> None:
    for name in ("gpt3-1.3b", "llama2-7b", "bert-large", "mixtral-8x7b"):
        for step in (forward, backward):
            fused = step(block_of(preset(name), 512, micro_batch=2, tp=2, attention_kind="unfused"))
            loose = step(block_of(preset(name), 512, micro_batch=2, tp=2, attention_kind="unfused", fused=False))
            assert _flops(fused) == _flops(loose)
            assert _bytes(fused) < _bytes(loose)
            assert len(fused) < len(loose)


def test_dropout_only_where_the_model_has_it() -> None:
    for fused in (True, False):
        for step in (forward, backward):
            dry = step(
                block_of(_gpt(1, 4, 16, dropout=False), 32, micro_batch=2, attention_kind="unfused", fused=fused)
            )
            wet = step(block_of(_gpt(1, 4, 16), 32, micro_batch=2, attention_kind="unfused", fused=fused))
            assert "dropout" not in _ops(dry)
            assert _bytes(dry) < _bytes(wet)


def test_biases_only_where_the_model_has_them() -> None:
    assert "bias" not in _ops(backward(block_of(preset("llama2-7b"), 64, fused=False)))
    qwen = backward(block_of(preset("qwen2.5-7b"), 64, fused=False))
    assert _ops(qwen).count("bias") == 1
    assert _ops(backward(block_of(_gpt(1, 4, 16), 64))).count("bias") == 4


def test_recomputation() -> None:
    model = _gpt(1, 4, 16)
    flash, unfused = (block_of(model, 64, micro_batch=2, tp=2, attention_kind=kind) for kind in ("flash", "unfused"))
    assert recomputed(unfused, "none", "core") == ()
    assert recomputed(flash, "selective", "core") == ()
    assert recomputed(unfused, "full", "core") == forward(unfused)
    core = recomputed(unfused, "selective", "core")
    assert _ops(core) == ["gemm", "softmax", "dropout", "gemm"]
    assert _flops(core) == 4 * 2 * 64 * 64 * 64 // 2


def test_fp8_covers_the_linear_layers_only() -> None:
    kernels = forward(block_of(preset("llama3-8b"), 128, dtype="fp8", attention_kind="unfused"))
    dtypes = [(k.batch > 1, k.dtype) for k, _ in kernels if isinstance(k, Gemm)]
    assert set(dtypes) == {(False, "fp8"), (True, "bf16")}
    assert _ops(kernels).count("cast") == 4
    assert "cast" not in _ops(forward(block_of(preset("llama3-8b"), 128, attention_kind="unfused")))
    head = head_forward(head_of(preset("llama3-8b"), 128, dtype="fp8"))
    assert {k.dtype for k, _ in head if isinstance(k, Gemm)} == {"bf16"}


def test_query_and_key_norms_and_rotary_positions() -> None:
    model = _gpt(1, 4, 16, kv_heads=2, rotary=True, qk_norm=True)
    kernels = forward(block_of(model, 32))
    touched = 2 * 32 * (64 + 32)
    rotary = [k for k, _ in kernels if isinstance(k, Memory) and k.op == "rotary"]
    assert [(k.read_bytes, k.written_bytes) for k in rotary] == [(touched, touched)]
    assert _ops(kernels)[:5] == ["norm", "gemm", "norm", "rotary", "attention"]


def test_embedding() -> None:
    model, n = _gpt(1, 4, 16), 2 * 32 * 2 * 64
    kernels = embedding_forward(block_of(model, 32, micro_batch=2))
    assert [(k.traffic_bytes) for k, _ in kernels] == [2 * n, 3 * n, 2 * n + n // 2]
    back = embedding_backward(block_of(model, 32, micro_batch=2, tp=4, sequence_parallel=True))
    dropout, cleared, added, positions = [k.traffic_bytes for k, _ in back]
    assert (dropout, cleared) == ((2 * n + n // 2) // 4, 250 * 64 * 2)
    assert (added, positions) == (3 * n, n)
    bert = embedding_forward(block_of(preset("bert-large"), 32, micro_batch=2))
    assert _ops(bert) == ["embedding", "embedding", "embedding", "norm", "dropout"]


def test_head() -> None:
    model, t = dataclasses.replace(preset("gpt3-125m"), heads=16, kv_heads=16, head_dim=48), 2048
    for fused in (True, False):
        padded = head_of(
            with_rows(model, 8 * 128), 1024, micro_batch=2, tp=8, sequence_parallel=True, fused=fused
        )  # fmt: skip
        ahead, behind = head_forward(padded), head_backward(padded)
        logits = t * 6400  # 51,200 padded columns over 8 ranks
        assert [k.flops for k, _ in ahead if isinstance(k, Gemm)] == [2 * logits * 768]
        assert 2 * _flops(ahead) == _flops(behind)
        cross = next(k for k, _ in ahead if isinstance(k, Memory) and k.op == "cross_entropy")
        assert cross.traffic_bytes == 4 * logits * (3 if fused else 4)
    odd = head_forward(head_of(model, 1024, micro_batch=2, tp=8))
    assert [k.n for k, _ in odd if isinstance(k, Gemm)] == [6283]


def test_bert_head_has_its_transform_pooler_and_classifier() -> None:
    kernels = head_forward(head_of(preset("bert-large"), 128, micro_batch=4, dtype="fp16"))
    shapes = [(k.m, k.n) for k, _ in kernels if isinstance(k, Gemm)]
    assert shapes == [(4, 1024), (4, 2), (512, 1024), (512, 30522)]
    assert 2 * _flops(kernels) == _flops(head_backward(head_of(preset("bert-large"), 128, micro_batch=4, dtype="fp16")))


@pytest.mark.parametrize(
    ("precision", "optimizer", "gradient", "read", "written"),
    [
        ("bf16", "adam", None, 16, 14),
        ("bf16", "adam", "bf16", 14, 14),
        ("fp16", "momentum", None, 12, 10),
        ("fp8", "sgd", "bf16", 6, 6),
        ("fp32", "adam", None, 16, 12),
        ("tf32", "sgd", None, 8, 4),
        ("fp64", "adam", None, 32, 24),
    ],
)
def test_optimizer_traffic(
    precision: Dtype,
    optimizer: Literal["adam", "sgd", "momentum"],
    gradient: Dtype | None,
    read: int,
    written: int,
) -> None:
    ((kernel, count),) = optimizer_kernels(1000, precision, optimizer, gradient)
    assert isinstance(kernel, Memory)
    assert (kernel.read_bytes, kernel.written_bytes, count) == (1000 * read, 1000 * written, 1)


def test_accumulation_traffic() -> None:
    ((kernel, _),) = accumulation_kernels(10, "bf16", "fp32")
    assert isinstance(kernel, Memory)
    assert (kernel.read_bytes, kernel.written_bytes) == (60, 40)


def test_accumulation_by_deepspeed_goes_through_a_cleared_copy() -> None:
    """Autograd adds in bf16 (2 reads, 1 write), the copy is converted, added in fp32 and cleared: 26 bytes."""
    copied = accumulation_kernels(10, "bf16", "fp32", "copied")
    assert sum(kernel.traffic_bytes for kernel, _ in copied if isinstance(kernel, Memory)) == 260
    assert accumulation_kernels(10, "fp16", "fp16", "copied") == accumulation_kernels(10, "fp16", "fp16", "added")
    assert accumulation_kernels(10, "bf16", "fp32", "fused") == ()


def test_kernels_are_cached() -> None:
    one, same = (block_of(preset("gpt3-175b"), 2048, tp=8, sequence_parallel=True) for _ in range(2))
    assert one is not same
    assert forward(one) is forward(same)
    # What the hash leaves out tells blocks apart all the same.
    other = dataclasses.replace(one, model=preset("gpt3-13b"))
    assert hash(one) == hash(same) == hash(other)
    assert forward(other) != forward(one)
    assert forward(dataclasses.replace(one, fused=False)) != forward(one)
