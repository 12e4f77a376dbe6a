"""Law P18 of docs/laws.md, and the memory of a layout against an evaluation stage by stage, pass by pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import pytest
from blocks import block_of
from clusters import framework_of, model_of
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.hardware.framework import DeviceMemory, Framework, StepGradients
from clustersim.hardware.kernel import BYTES_OF
from clustersim.layout.divisions import ORDERS, RECOMPUTES, SCHEDULES, Divisions
from clustersim.layout.layout import (
    AllReduce,
    Bsp,
    Layout,
    ParameterServer,
    Precision,
    Recompute,
    Schedule,
    Scheme,
    Sharded,
)
from clustersim.layout.memory import StateBytes, footprint
from clustersim.layout.schedule import splits_backward, turns
from clustersim.layout.space import Space
from clustersim.layout.split import even_boundaries
from clustersim.program.buckets import buckets, chunk_span
from clustersim.workload.activations import (
    activation_bytes_per_layer,
    boundary_bytes,
    embedding_activation_bytes,
    gradient_working_set_bytes,
    head_activation_bytes,
    working_set_bytes,
)
from clustersim.workload.model import Model
from clustersim.workload.parameters import stage_parameters
from clustersim.workload.training import STATE_TENSORS, Training, Workload

_BUCKET = 2e6
# Bytes of a parameter's 16-bit gradient that the optimizer's step adds, of all or of the rank's shard.
_STEP = {"as they are": (0, 0), "fp32": (4, 4), "flat fp32": (4, 6)}
# Bytes of a logit, kept and at the loss besides, by (eager, one kernel).
_LOSS = {(False, False): (4, 4), (True, False): (4, 8), (False, True): (2, 0), (True, True): (2, 0)}


def _server(optimizer_at: Literal["server", "worker"]) -> ParameterServer:
    return ParameterServer(
        dedicated=2, colocated=0, dedicated_parts=1, colocated_parts=0, consistency=Bsp(), bucket_bytes=_BUCKET,
        partition_bytes=4e5, optimizer_at=optimizer_at,
    )  # fmt: skip


SCHEMES: tuple[Scheme, ...] = (
    AllReduce(algorithm="ring", bucket_bytes=_BUCKET, overlap=True),
    Sharded(stage=1, bucket_bytes=_BUCKET, overlap=True),
    Sharded(stage=2, bucket_bytes=_BUCKET, overlap=True),
    Sharded(stage=3, bucket_bytes=_BUCKET, overlap=True),
    _server("server"),
    _server("worker"),
)


def _space(
    *,
    layers: int,
    precision: Precision,
    dp: int = 1,
    tp: int = 1,
    pp: int = 1,
    micro_batch: int = 1,
    micro_batches: int = 1,
    virtual_stages: int = 1,
    sp: bool = False,
    recompute: Recompute = "none",
    schedule: Schedule = "1f1b",
    schemes: tuple[Scheme, ...] = SCHEMES,
    boundaries: tuple[int, ...] | None = None,
) -> Space:
    """One division with every scheme."""
    numbers: dict[str, Any] = {
        "dp": dp, "tp": tp, "pp": pp, "cp": 1, "ep": 1, "micro_batch": micro_batch, "micro_batches": micro_batches,
        "virtual_stages": virtual_stages, "recompute": RECOMPUTES.index(recompute),
        "schedule": SCHEDULES.index(schedule), "order": ORDERS.index("tp-dp-pp"), "split": 0,
    }  # fmt: skip
    columns = {name: np.array([value], np.int64) for name, value in numbers.items()}
    return Space(
        divisions=Divisions(sequence_parallel=np.array([sp]), **columns),
        schemes=schemes,
        division=np.zeros(len(schemes), np.int64),
        scheme=np.arange(len(schemes)),
        precision=precision,
        splits=(boundaries or even_boundaries(layers, pp * virtual_stages),),
        layers=layers,
        reduce_in_node=True,
    )


# --------------------------------------------------------------------------------------------------------- P18


_HALF = Precision(compute="fp16", gradient="fp16", optimizer="fp32")


def _state(model: Model, ranks: int, scheme: Scheme) -> float:
    """Model state on a worker, from a framework that adds nothing."""
    space = _space(layers=model.layers, precision=_HALF, dp=ranks, schemes=(scheme,))
    training = Training(global_batch=ranks, sequence=1, precision="fp16")
    return float(footprint(Workload(model=model, training=training), space, framework_of()).state[0])


def _of_7_5_billion() -> Model:
    """Exactly 7.5e9 parameters, nearly all in the embedding of a model of one tiny layer."""
    tiny = model_of(
        layer_count=1, hidden=4, heads=1, kv_heads=1, head_dim=4, ffn_hidden=4, vocab=1, positions=0, tied=True
    )
    rest = stage_parameters(tiny, range(1), first=True, last=True, tp=1) - 4
    assert (7_500_000_000 - rest) % 4 == 0
    return replace(tiny, vocab=(7_500_000_000 - rest) // 4)


@pytest.mark.parametrize(
    ("scheme", "gigabytes"),
    [(SCHEMES[0], 120.0), (SCHEMES[1], 31.40625), (SCHEMES[2], 16.640625), (SCHEMES[3], 1.875)],
    ids=["allreduce", "sharded-1", "sharded-2", "sharded-3"],
)
def test_p18_the_zero_table(scheme: Scheme, gigabytes: float) -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5e9 parameters on 64 ranks need 120, 31.4, 16.6 and 1.9 GB."""
    assert _state(_of_7_5_billion(), 64, scheme) == pytest.approx(gigabytes * 1e9, rel=1e-12)


@given(ranks=st.sampled_from([1, 2, 3, 8, 64, 1024]), layers=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_p18_what_is_sharded_adds_up_to_the_whole(ranks: int, layers: int) -> None:
    """Over the ranks, sharded state is one copy of it: 16 bytes a parameter, together with what is not sharded."""
    model = model_of(layer_count=layers)
    psi = stage_parameters(model, range(layers), first=True, last=True, tp=1)
    whole = [16, 4, 2, 0]
    for scheme, kept in zip(SCHEMES[:4], whole, strict=True):
        state = _state(model, ranks, scheme)
        assert state == pytest.approx((kept + (16 - kept) / ranks) * psi, rel=1e-12)
        assert ranks * (state - kept * psi) + kept * psi == pytest.approx(16 * psi, rel=1e-9)


@pytest.mark.parametrize(
    ("precision", "optimizer", "expected"),
    [
        (Precision(compute="bf16", gradient="bf16", optimizer="fp32"), "adam", 16),
        (Precision(compute="bf16", gradient="fp32", optimizer="fp32"), "adam", 18),
        (Precision(compute="fp32", gradient="fp32", optimizer="fp32"), "adam", 16),
        (Precision(compute="fp32", gradient="fp32", optimizer="fp32"), "momentum", 12),
        (Precision(compute="fp16", gradient="fp16", optimizer="fp32"), "sgd", 8),
        (Precision(compute="fp64", gradient="fp64", optimizer="fp64"), "sgd", 16),
    ],
)
def test_p18_bytes_of_a_parameter(precision: Precision, optimizer: str, expected: int) -> None:
    each = StateBytes.of(precision, optimizer)
    assert each.weights + each.gradients + each.optimizer == expected


# ------------------------------------------------------------------------------------------------- stage by stage


@st.composite
def _rows(draw: st.DrawFn) -> tuple[Workload, Space, Framework]:
    tp = draw(st.sampled_from([1, 2, 4, 8]))
    pp = draw(st.sampled_from([1, 2, 3, 4, 6]))
    schedule: Schedule = draw(st.sampled_from(get_args(Schedule))) if pp > 1 else "1f1b"
    virtual = draw(st.integers(2, 3)) if schedule == "interleaved" else 2 if schedule == "zb-v" else 1
    uneven = schedule != "interleaved"
    layers = pp * virtual * draw(st.integers(1, 3)) + (draw(st.integers(0, pp - 1)) if uneven else 0)
    named = None
    if uneven and layers > pp * virtual and draw(st.booleans()):
        inner = st.lists(st.integers(1, layers - 1), min_size=pp * virtual - 1, max_size=pp * virtual - 1, unique=True)
        named = (0, *sorted(draw(inner)))
    sequence = draw(st.sampled_from([64, 512]))
    precision = draw(
        st.sampled_from(
            [
                Precision(compute="bf16", gradient="fp32", optimizer="fp32"),
                Precision(compute="fp8", gradient="bf16", optimizer="fp32"),
                Precision(compute="fp16", gradient="fp16", optimizer="fp32"),
                Precision(compute="fp32", gradient="fp32", optimizer="fp32"),
            ]
        )
    )
    model = model_of(
        layer_count=layers,
        vocab=draw(st.sampled_from([500, 40_000])),
        tied=draw(st.booleans()),
        dropout=draw(st.booleans()),
        gated=draw(st.booleans()),
    )
    count = pp * draw(st.integers(1, 3)) if schedule == "interleaved" else draw(st.integers(1, 14))
    dp, size = draw(st.sampled_from([1, 2, 16])), draw(st.sampled_from([1, 4]))
    optimizer = draw(st.sampled_from(["adam", "momentum", "sgd"]))
    training = Training(
        global_batch=dp * size * count, sequence=sequence, precision=precision.compute, optimizer=optimizer
    )
    space = _space(
        layers=layers, precision=precision, dp=dp, tp=tp, pp=pp, micro_batch=size, micro_batches=count,
        virtual_stages=virtual, sp=tp > 1 and draw(st.booleans()), recompute=draw(st.sampled_from(get_args(Recompute))),
        schedule=schedule, boundaries=named,
    )  # fmt: skip
    framework = framework_of(
        attention=draw(st.sampled_from(["flash", "unfused"])), fragmentation=0.05, memory_overhead_bytes=1e9,
        in_place_loss=draw(st.booleans()),
        device_memory=DeviceMemory(
            fp32_shards=draw(st.booleans()), step_gradients=draw(st.sampled_from(get_args(StepGradients))),
            stage_outputs=draw(st.booleans()), eager_loss=draw(st.booleans()),
            reduce_buffer_bytes=draw(st.sampled_from([0.0, 1e6, 1e9])), communicator_bytes=3e8,
        ),
    )  # fmt: skip
    return Workload(model=model, training=training), space, framework


def _stage_bytes(workload: Workload, layout: Layout, framework: Framework, stage: int) -> float:
    """Bytes on one rank of a stage: its ops walked through in order."""
    model, training, scheme = workload.model, workload.training, layout.scheme
    tp, pp, dp = layout.mesh.tp, layout.mesh.pp, layout.mesh.dp
    width = 2 if layout.precision.compute in ("bf16", "fp16", "fp8") else 4
    block = block_of(
        model, training.sequence, micro_batch=layout.micro_batch, tp=tp, sequence_parallel=layout.sequence_parallel,
        dtype=layout.precision.compute, attention_kind=framework.attention,
    )  # fmt: skip
    assert block.width == width
    kept = activation_bytes_per_layer(block, layout.recompute, "core", fp8_inputs=False)
    kept_logits, at_loss = _LOSS[framework.device_memory.eager_loss, framework.in_place_loss]
    logits = training.sequence * layout.micro_batch * -(-model.vocab // tp)
    working = working_set_bytes(block, layout.recompute, "core", fp8_inputs=False) + gradient_working_set_bytes(block)
    boundary = boundary_bytes(model, tokens=block.tokens, dtype=block.dtype) if pp > 1 else 0
    held = most = 0.0
    heads = 0
    count = layout.micro_batches(training.global_batch)
    schedule = layout.pipeline.schedule
    tokens, h = training.sequence * layout.micro_batch, model.hidden
    q, kv = model.query_width // tp, model.kv_heads_per_rank(tp) * model.head_dim
    up, down = (2 if model.gated else 1) * model.ffn_hidden // tp, model.ffn_hidden // tp
    # Inputs of the four linear layers of a layer, and the gradients of their outputs.
    waits = width * tokens * ((h + q + 2 * kv) + (q + h) + (h + up) + (down + h))
    for turn in turns(schedule, pp, stage, count, layout.pipeline.virtual_stages):
        chunk = turn.chunk
        number = len(layout.chunk_layers(chunk, model.layers))
        size, later = kept * number, waits * number
        size += boundary if framework.device_memory.stage_outputs else 0
        if chunk == 0:
            size += embedding_activation_bytes(block)
            later += width * tokens * h
        last = chunk == layout.chunks - 1
        if last:
            size += head_activation_bytes(block)
            later += width * tokens * (h + -(-model.vocab // tp))
        if turn.phase == "weight-gradient":
            held -= later
            continue
        held += -size if turn.phase == "backward" else size
        heads += 0 if not last else -1 if turn.phase == "backward" else 1
        if turn.phase == "backward" and splits_backward(schedule):
            held += later
        layer = working + max(0, heads - 1) * kept_logits * logits
        most = max(most, held + layer, held + (heads * kept_logits + at_loss if heads else 0) * logits)
    most += 2 * boundary
    mine = [bucket for bucket in buckets(model, layout) if layout.stage_of(bucket.stage) == stage]
    psi = sum(bucket.elements for bucket in mine)
    chunks = [chunk for chunk in range(layout.chunks) if layout.stage_of(chunk) == stage]
    spans = [chunk_span(model, layout, chunk) for chunk in chunks]
    layers = sum(1 for span in spans for layer in span if 0 <= layer < model.layers)
    first, end = stage == layout.ends[0], stage == layout.ends[1]
    assert psi == stage_parameters(model, range(layers), first=first, last=end, tp=tp)
    weights, gradients = width * psi, BYTES_OF[layout.precision.gradient] * psi
    master = 1 if width == 2 else 0
    optimizer = 4 * (STATE_TENSORS[training.optimizer] + master) * psi
    extra = step = 0.0
    copied, sharded = (0, 0) if gradients > 2 * psi else _STEP[framework.device_memory.step_gradients]
    copy, shard_copy = copied * psi, sharded * psi
    buffer = min(framework.device_memory.reduce_buffer_bytes, gradients)
    largest = max(bucket.elements for bucket in mine)
    match scheme:
        case AllReduce():
            state, step = float(weights + gradients + optimizer), copy
        case Sharded(stage=1):
            state, extra, step = weights + gradients + optimizer / dp, buffer, shard_copy / dp
        case Sharded(stage=2):
            state, step = weights + (gradients + optimizer) / dp, shard_copy / dp
            extra = buffer + largest * BYTES_OF[layout.precision.gradient]
        case Sharded():
            state, step = (weights + gradients + optimizer) / dp, shard_copy / dp
            extra = buffer + largest * BYTES_OF[layout.precision.gradient]
            rows = [[b.elements for b in mine if b.stage == chunk] for chunk in {b.stage for b in mine}]
            extra += width * max(sum(row[i : i + 3]) for row in rows for i in range(len(row)))
            if framework.device_memory.fp32_shards and width == 2:
                state = 4 * (1 + 1 + STATE_TENSORS[training.optimizer]) * psi / dp
                extra += largest * width
        case ParameterServer(optimizer_at="server"):
            state = float(weights + gradients)
            extra = largest * width
        case _:
            state, step = float(weights + gradients + optimizer), copy
    kinds = [dp > 1, tp > 1, pp > 1]
    groups = sum(kinds) + (sum(kinds) > 1)
    return 1e9 + 3e8 * groups + 1.05 * (state + max(most + extra, step))


@given(_rows())
@settings(max_examples=150, deadline=None)
def test_memory_of_the_fullest_stage(case: tuple[Workload, Space, Framework]) -> None:
    workload, space, framework = case
    found = footprint(workload, space, framework).worker
    for row in range(len(space)):
        layout = space.layout(row)
        stages = [_stage_bytes(workload, layout, framework, stage) for stage in range(layout.mesh.pp)]
        assert found[row] == pytest.approx(max(stages), rel=1e-12), (layout, stages)


def test_memory_of_many_divisions_is_that_of_each() -> None:
    """Rows are independent: a space of several divisions and schemes holds the figures of spaces of one."""
    precision = Precision(compute="bf16", gradient="fp32", optimizer="fp32")
    model = model_of(layer_count=12)
    spaces = [
        _space(layers=12, precision=precision, dp=4, tp=tp, pp=pp, micro_batches=12, micro_batch=2)
        for tp in (1, 2, 4) for pp in (1, 2, 3)
    ]  # fmt: skip
    workload = Workload(model=model, training=Training(global_batch=96, sequence=128))
    apart = np.concatenate([footprint(workload, space, framework_of()).worker for space in spaces])
    columns = {
        name: np.concatenate([getattr(space.divisions, name) for space in spaces])
        for name in Divisions.__dataclass_fields__
    }
    columns["split"] = np.arange(len(spaces))
    every = replace(
        spaces[0],
        divisions=Divisions(**columns),
        splits=tuple(space.splits[0] for space in spaces),
        division=np.repeat(np.arange(len(spaces)), len(SCHEMES)),
        scheme=np.tile(np.arange(len(SCHEMES)), len(spaces)),
    )
    assert footprint(workload, every, framework_of()).worker == pytest.approx(apart, rel=1e-15)
