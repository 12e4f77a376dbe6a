"""Launches that wait for their kernels: the host's time and the device's add up, in both predictions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clustersim.estimate.estimate import estimate
from clustersim.hardware.framework import Framework
from clustersim.hardware.load import load_framework
from clustersim.layout.space import layouts
from clustersim.program.lower import lower
from clustersim.scenario.load import question
from clustersim.search.search import choices_of
from clustersim.simulate.simulate import simulate
from clustersim.validate.case import Case
from clustersim.validate.rows import Row
from clustersim.validate.training_rows import training_case

LAYERS, MICRO_BATCHES = 6, 4
CELLS = {
    "gpu": "A100-SXM4-80GB", "gpus": "1", "framework": "Megatron-DeepSpeed", "layers": str(LAYERS), "hidden": "4096",
    "heads": "32", "vocab": "51200", "seq_len": "2048", "gbs": str(2 * MICRO_BATCHES), "mbs": "2", "tp": "1", "pp": "1",
    "shard": "none", "recompute": "full", "precision": "fp16", "sec_per_iter": "1",
}  # fmt: skip


def _case(**changes: str) -> Case:
    found = training_case(Row(line=2, cells={**CELLS, **changes}))
    assert isinstance(found, Case)
    return found


def _steps(framework: Framework) -> tuple[float, float]:
    """(estimated, simulated) seconds of the step under a framework."""
    asked = question(_case().scenario, "blocking")
    space = layouts(asked.workload, asked.cluster, framework, choices_of(asked))
    program = lower(asked.workload, space.layout(0), framework, asked.cluster.devices_per_node)
    estimated = estimate(asked.workload, space, asked.cluster, framework)
    return float(estimated.step_s[0]), simulate(program, asked.cluster, framework).step_s


def test_blocking_launches_add_what_the_host_takes_for_every_layer() -> None:
    """Device-bound layers hide the host's time; a full recomputation drives each layer forward twice."""
    plain = load_framework("megatron-deepspeed")
    host = plain.host
    ahead, behind = _steps(plain), _steps(replace(plain, host=replace(host, blocking_launches=True)))
    each = 2 * host.per_layer_forward_s + host.per_layer_backward_s
    for one, other in zip(ahead, behind, strict=True):
        # What is left are the launches of embedding and head, whose time the estimate adds.
        assert other - one == pytest.approx(MICRO_BATCHES * LAYERS * each, rel=0.02)


def test_the_profile_is_that_of_the_framework_and_blocks() -> None:
    plain, blocking = load_framework("megatron-deepspeed"), load_framework("megatron-deepspeed-blocking")
    assert blocking.host == replace(plain.host, blocking_launches=True)
    assert blocking == replace(plain, name=blocking.name, host=blocking.host, provenance=blocking.provenance)
    assert _case(framework="Megatron-DeepSpeed, CUDA_LAUNCH_BLOCKING=1").scenario["framework"] == blocking.name


def test_a_vocabulary_rounded_for_its_ranks_does_not_part_layouts() -> None:
    one, two = _case(), _case(vocab="51202", tp="2", gpus="2")
    assert one.group != two.group  # other GPUs
    assert one.group == _case(vocab="51202", mbs="1").group
    assert one.group != _case(hidden="2048", mbs="1").group
