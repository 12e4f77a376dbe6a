"""Megatron-LM's cross-entropy: its bytes a logit, and that it runs where the profile says so."""

from __future__ import annotations

import pytest
from blocks import head_of

from clustersim.hardware.kernel import Kernels, Memory
from clustersim.hardware.load import load_framework
from clustersim.workload.layer_kernels import head_backward, head_forward
from clustersim.workload.model import Dimensions
from clustersim.workload.presets import model_of

SEQUENCE, BATCH, VOCAB = 1024, 2, 51200
MODEL = model_of(Dimensions(layers=2, hidden=1024, heads=16, vocab=VOCAB))


def _bytes(kernels: Kernels) -> float:
    """Bytes of the loss and its casts for each logit of a rank."""
    moved = sum(
        count * kernel.traffic_bytes
        for kernel, count in kernels
        if isinstance(kernel, Memory) and kernel.op in ("cast", "cross_entropy")
    )
    return moved / (SEQUENCE * BATCH * VOCAB)


@pytest.mark.parametrize("tp", [1, 4])
def test_every_step_reads_and_writes_fp32_logits(tp: int) -> None:
    """Cast 2 + 4, maximum 4, difference 8, exponential 8, sum 4, quotient 8; product 8, cast 4 + 2."""
    for in_steps, expected in ((True, (38, 14)), (False, (18, 6))):
        head = head_of(MODEL, SEQUENCE, micro_batch=BATCH, tp=tp, dtype="fp16", in_steps=in_steps)
        assert (_bytes(head_forward(head)) * tp, _bytes(head_backward(head)) * tp) == expected


def test_only_the_eager_megatrons_run_it() -> None:
    eager = ("megatron-lm", "megatron-deepspeed", "megatron-deepspeed-blocking")
    assert all(load_framework(name).loss_in_steps for name in eager)
    assert not any(load_framework(name).loss_in_steps for name in ("megatron-core", "nemo", "torch-fsdp", "clustersim"))
