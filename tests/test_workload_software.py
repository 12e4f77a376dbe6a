"""What software adds to a model's kernels: generations of attention, eager passes, copies, losses, optimizers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from blocks import block_of, head_of
from hypothesis import given
from hypothesis import strategies as st

from clustersim.files import profile_path
from clustersim.hardware.attention_speed import times_slower
from clustersim.hardware.cost import DeviceCosts, device_costs, load_device
from clustersim.hardware.kernel import Attention, AttentionKernel, Gemm, Kernels, Memory
from clustersim.hardware.load import load_framework
from clustersim.layout.layout import Layout
from clustersim.layout.space import layouts
from clustersim.program.lower import lower
from clustersim.scenario.load import question
from clustersim.search.search import choices_of
from clustersim.simulate.simulate import simulate
from clustersim.workload.block import AttentionKind
from clustersim.workload.layer_kernels import (
    backward,
    forward,
    head_backward,
    head_forward,
    optimizer_kernels,
    recomputed,
)
from clustersim.workload.model import with_rows
from clustersim.workload.presets import preset
from clustersim.workload.sharding_kernels import sharding_kernels
from clustersim.workload.training import Training

KERNELS: tuple[AttentionKernel, ...] = ("flash-1", "flash-2", "cudnn", "flash-3")


def _attention(**changes: Any) -> Attention:
    usual = Attention(
        batch=2, queries=8192, keys=8192, heads=32, kv_heads=8, head_dim=128, causal=True, backward=False, dtype="bf16"
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)


def _memory(kernels: Kernels, op: str) -> list[tuple[int, int]]:
    return [(k.read_bytes, k.written_bytes) for k, _ in kernels if isinstance(k, Memory) and k.op == op]


# ----------------------------------------------------------------------------------- generations of attention


@given(
    st.sampled_from(KERNELS), st.sampled_from(KERNELS), st.sampled_from(KERNELS), st.integers(16, 512), st.booleans()
)
def test_ratios_of_speeds_chain(
    a: AttentionKernel, b: AttentionKernel, newest: AttentionKernel, head_dim: int, backward_: bool
) -> None:
    """Ratios multiply, a kernel is as fast as itself, and kernels for Hopper run nowhere else."""
    assert times_slower(a, a, head_dim, backward_) == pytest.approx(1.0)
    through = times_slower(a, "flash-3", head_dim, backward_) / times_slower(b, "flash-3", head_dim, backward_)
    assert through == pytest.approx(
        times_slower(a, "cudnn", head_dim, backward_) / times_slower(b, "cudnn", head_dim, backward_)
    )
    if newest in ("flash-1", "flash-2"):
        assert times_slower("flash-3", newest, head_dim, backward_) == 1.0


@pytest.mark.parametrize(
    ("ran", "measured", "head_dim", "backward_", "ratio"),
    [
        # FlashAttention-2 against 3 at 16k tokens, head dimension 128: 335 and 616 TFLOP/s, 322 and 561 backward.
        ("flash-2", "flash-3", 128, False, 616 / 335), ("flash-2", "flash-3", 128, True, 561 / 322),
        ("flash-2", "cudnn", 128, False, 539 / 335), ("flash-2", "cudnn", 64, False, 388 / 299),
        # Section 4.1 of FlashAttention-2.
        ("flash-1", "flash-2", 64, False, 1.4), ("flash-1", "flash-2", 128, True, 2.0),
    ],
)  # fmt: skip
def test_generations_are_as_far_apart_as_published(
    ran: AttentionKernel, measured: AttentionKernel, head_dim: int, backward_: bool, ratio: float
) -> None:
    assert times_slower(ran, measured, head_dim, backward_) == pytest.approx(ratio, rel=0.1)


def test_an_older_kernel_takes_longer_but_is_not_held_back_by_power() -> None:
    """Measured at c of the clock in long runs; a kernel r times slower may run at c r^(1/3) of it, at most at all."""
    costs = device_costs("h100-sxm")
    clock = costs.device.sustained_clock
    newest = costs.cost(_attention()).seconds
    assert costs.cost(_attention(generation="cudnn")).seconds == pytest.approx(newest)
    for generation, backward_ in (("flash-2", False), ("flash-1", False), ("flash-1", True)):
        times = times_slower(generation, "cudnn", 128, backward_)  # type: ignore[arg-type]
        faster = min(1.0, clock * times ** (1 / 3)) / clock
        found = costs.cost(_attention(generation=generation, backward=backward_)).seconds
        usual = costs.cost(_attention(backward=backward_)).seconds
        assert found / usual == pytest.approx(times / faster, rel=0.01)
    flat = DeviceCosts(dataclasses.replace(costs.device, tables=type(costs.device.tables)()), Path())
    slow, fast = (flat.cost(_attention(generation=g)).seconds for g in ("flash-1", "flash-2"))
    assert slow / fast == pytest.approx(1.4, rel=0.01)


def test_hopper_kernels_are_the_newest_there_is_on_an_a100() -> None:
    costs = device_costs("a100-sxm-80g")
    assert costs.cost(_attention(generation="flash-3")).seconds == pytest.approx(costs.cost(_attention()).seconds)


def test_the_pass_ahead_of_the_kernel_is_taken_off() -> None:
    """Q, K and V of 2 sequences, 32 heads and 8 key heads, in and out once, at 0.887 of 3.35 TB/s."""
    device = load_device("h100-sxm")
    costs = device_costs("h100-sxm")
    tables = dataclasses.replace(device.tables, attention_prepared=False)
    folder = profile_path("devices", "h100-sxm").resolve().parent
    raw = DeviceCosts(dataclasses.replace(device, tables=tables), folder)
    moved = 2 * 2 * 2 * 8192 * 128 * (32 + 2 * 8)
    off = (raw.cost(_attention()).seconds - costs.cost(_attention()).seconds) * device.sustained_clock
    assert off == pytest.approx(moved / (3.35e12 * 0.887), rel=0.25)


def test_a_named_generation_is_in_the_program() -> None:
    for kind, generation in (("flash", None), ("flash-1", "flash-1"), ("cudnn", "cudnn")):
        given_: AttentionKind = kind  # type: ignore[assignment]
        for step in (forward, backward):
            kernels = step(block_of(preset("gpt3-1.3b"), 2048, attention_kind=given_, fused=False))
            assert {k.generation for k, _ in kernels if isinstance(k, Attention)} == {generation}


# --------------------------------------------------------------------------------------------- eager passes


def test_eager_llama_layers_by_hand() -> None:
    """Bytes an element in 16 bits: a norm 36 and 76 (backward), rotary positions 20, a gate 6 + 4 and 3 times 6."""
    model = preset("llama2-7b")
    n, f = 128 * model.hidden, 128 * model.ffn_hidden
    ahead = forward(block_of(model, 128, fused=False))
    assert _memory(ahead, "norm") == _memory(ahead, "rotary") == []
    passes = [read + written for read, written in _memory(ahead, "activation")]
    assert passes == [36 * n, 2 * n * 20, 36 * n, 4 * f, 6 * f]
    behind = [read + written for read, written in _memory(backward(block_of(model, 128, fused=False)), "activation")]
    assert sorted(behind) == sorted([6 * f, 6 * f, 6 * f, 76 * n, 2 * n * 20, 76 * n])
    fused = forward(block_of(model, 128))
    assert _memory(fused, "norm") == [(2 * n, 2 * n)] * 2
    assert _memory(fused, "activation") == [(4 * f, 2 * f)]


def test_layer_norms_and_gelus_are_one_kernel_in_eager_frameworks_too() -> None:
    for step in (forward, backward):
        eager, fused = (step(block_of(preset("gpt3-1.3b"), 128, fused=way)) for way in (False, True))
        assert _memory(eager, "norm") == _memory(fused, "norm")
        assert _memory(eager, "activation") == _memory(fused, "activation")


def test_a_bias_rides_on_its_product() -> None:
    assert _memory(forward(block_of(preset("gpt3-1.3b"), 128, fused=False)), "bias") == []


def test_every_second_product_runs_again() -> None:
    """Of q, k, v, o, gate, up and down: k, o and up."""
    model = preset("llama3-8b")
    again = recomputed(block_of(model, 64), "selective", "alternate-products")
    shapes = [(k.m, k.n, k.k) for k, _ in again if isinstance(k, Gemm)]
    assert shapes == [(64, 1024, 4096), (64, 4096, 4096), (64, 14336, 4096)]
    assert recomputed(block_of(model, 64), "selective", "core") == ()
    plain = recomputed(block_of(preset("gpt3-1.3b"), 64), "selective", "alternate-products")
    assert [(k.n, k.k) for k, _ in plain if isinstance(k, Gemm)] == [(2048, 2048), (2048, 2048), (2048, 8192)]
    experts = preset("mixtral-8x7b")
    kept = recomputed(block_of(experts, 64), "selective", "alternate-products")
    assert len([k for k, _ in kept if isinstance(k, Gemm)]) == 2


# ------------------------------------------------------------------------------------------- the loss, the head


def test_bytes_of_a_logit() -> None:
    """In 16 bits: in place 4 forward and 4 backward; eager 6 + 16 and 20 + 6; a metric 22 more."""
    model = preset("gpt3-125m")
    logits = 256 * model.vocab

    def touched(kernels: Kernels) -> float:
        return (
            sum(k.traffic_bytes for k, _ in kernels if isinstance(k, Memory) and k.op in ("cast", "cross_entropy"))
            / logits
        )

    assert touched(head_forward(head_of(model, 256, fused=False))) == 22
    assert touched(head_backward(head_of(model, 256, fused=False))) == 26
    assert touched(head_forward(head_of(model, 256, fused=True))) == 18
    for fused in (True, False):
        head = head_of(model, 256, fused=fused, in_place=True)
        assert touched(head_forward(head)) == 4
        assert touched(head_backward(head)) == 4
        assert touched(head_forward(dataclasses.replace(head, metrics=2))) == 4 + 44


def test_tokens_that_the_head_sees() -> None:
    training = Training(global_batch=8, sequence=512, predicted=0.15)
    assert training.head_sequence(512, 1) == 80
    assert training.head_sequence(512, 16) == 80
    assert training.head_sequence(8, 1) == 8
    assert Training(global_batch=8, sequence=512).head_sequence(512, 1) == 512
    assert with_rows(preset("bert-large"), 8).vocab == 30528
    assert with_rows(preset("bert-large"), 1) is preset("bert-large")


# --------------------------------------------------------------------------------------- copies, the optimizer


def _sizes(kernels: Kernels) -> list[tuple[int, int]]:
    return [(k.read_bytes, k.written_bytes) for k, _ in kernels if isinstance(k, Memory)]


def test_copies_around_sharded_weights() -> None:
    assert sharding_kernels(10, "bf16", "fp32", "in-place") == ((), ())
    ahead, behind = sharding_kernels(10, "bf16", "fp32", "flat")
    assert (_sizes(ahead), _sizes(behind)) == ([], [(20, 20), (20, 40), (40, 40)])
    assert _sizes(sharding_kernels(10, "bf16", "bf16", "flat")[1]) == [(20, 20), (20, 20)]
    ahead, behind = sharding_kernels(10, "bf16", "fp32", "split")
    assert (_sizes(ahead), _sizes(behind)) == ([(20, 20)], [(20, 20), (20, 40)])
    ahead, behind = sharding_kernels(10, "fp16", "fp32", "autocast")
    assert (_sizes(ahead), _sizes(behind)) == ([(40, 20)], [(20, 40)])
    assert sharding_kernels(10, "fp32", "fp32", "autocast") == ((), ())


def test_an_eager_optimizer_touches_twenty_tensors() -> None:
    """Adam in fp32: 20 reads and writes of 4 bytes; clipping reads the gradient twice and writes it once."""
    ((eager, _),) = optimizer_kernels(10, "bf16", "adam", None, False)
    ((clipped, _),) = optimizer_kernels(10, "bf16", "adam", None, False, True)
    assert eager.traffic_bytes == 10 * 80
    assert clipped.traffic_bytes == 10 * (80 + 12)
    ((fused, _),) = optimizer_kernels(10, "bf16", "adam", None, True, True)
    assert fused.traffic_bytes == 10 * (30 + 12)


_TREE: dict[str, Any] = {
    "schema_version": 1,
    "name": "software",
    "model": "gpt3-1.3b",
    "training": {"global_batch": 32, "sequence": 2048, "precision": "bf16"},
    "framework": "llm-foundry",
    "cluster": {"nodes": {"dgx-a100-40g": 1}, "fabric": "rail-optimized"},
    "layout": {
        "dp": 8, "tp": 1, "pp": 1, "micro_batch": 2, "recompute": "none", "schedule": "1f1b", "sync": "sharded",
        "sharded_stage": 3,
    },
}  # fmt: skip


def _step_s(**changes: Any) -> float:
    asked = question(_TREE, "software")
    framework = dataclasses.replace(asked.framework, **changes)
    layout: Layout = layouts(asked.workload, asked.cluster, framework, choices_of(asked)).layout(0)
    program = lower(asked.workload, layout, framework, 8)
    return simulate(program, asked.cluster, framework).step_s


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "flash-2"}, {"in_place_loss": False}, {"loss_metrics": 0}, {"fused_optimizer": True},
        {"clips_gradients": False}, {"unsharding": "in-place"}, {"fused_elementwise": True},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_habit_of_a_framework_moves_its_step(change: dict[str, Any]) -> None:
    usual, other = _step_s(), _step_s(**change)
    slower = change in ({"in_place_loss": False},)
    if change == {"fused_elementwise": True}:
        # Layer norms, GELUs without dropout: nothing left to fuse but in the loss, which is in place here.
        assert other == pytest.approx(usual, rel=0.02)
    else:
        assert (other > usual) == slower
        assert abs(other / usual - 1.0) > 1e-3


def test_copies_are_counted_where_weights_are_sharded() -> None:
    """Two micro-batches: each puts gradients together (4 bytes a parameter), converts (6) and divides (8) them."""
    asked = question(_TREE, "software")
    micro_batches = 32 // (8 * 2)
    parameters = 1.3e9
    device = load_device("a100-sxm-40g")
    rate = device.memory_bandwidth_bytes_per_s * device.roofline.memory_efficiency
    assert asked.framework.gradient_dtype == "fp32"
    expected = micro_batches * parameters * 18 / rate
    assert _step_s() - _step_s(unsharding="in-place") == pytest.approx(expected, rel=0.15)


def test_profiles_of_frameworks_name_what_they_run() -> None:
    assert load_framework("llm-foundry").attention == "flash-1"
    assert load_framework("torchtitan").attention == load_framework("torchtitan-compile").attention == "flash-2"
    assert load_framework("torchtitan").selective == "alternate-products"
    assert load_framework("torch-ddp").unsharding == "autocast"
    kept = 0.862 * (430 / 630) ** (1 / 3) * 912 / 989
    assert load_device("h100-sxm-96g").sustained_clock == pytest.approx(kept, abs=1e-3)
