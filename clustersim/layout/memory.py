"""Memory of a layout: what the fullest worker and the fullest server hold, for many layouts at once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.hardware.framework import DeviceMemory, Framework
from clustersim.hardware.kernel import BYTES_OF
from clustersim.layout.buckets import cuts, expert_elements, layer_elements
from clustersim.layout.divisions import RECOMPUTES, SCHEDULES
from clustersim.layout.layout import AllReduce, ParameterServer, Precision, Schedule, Sharded
from clustersim.layout.moments import fullest_moments
from clustersim.layout.schedule import chunks_of, splits_backward, stage_of
from clustersim.layout.space import Space
from clustersim.workload.activations import (
    Loss,
    activation_bytes_per_layer,
    boundary_bytes,
    embedding_activation_bytes,
    gradient_working_set_bytes,
    head_activation_bytes,
    head_weight_gradient_bytes,
    loss_bytes,
    ring_buffer_bytes,
    weight_gradient_bytes,
    working_set_bytes,
)
from clustersim.workload.block import Block
from clustersim.workload.head import Head
from clustersim.workload.parameters import parameter_count
from clustersim.workload.training import STATE_TENSORS, Workload

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """Bytes per parameter: weights, gradients, optimizer state (the fp32 master copy included)."""

    weights: int
    gradients: int
    optimizer: int

    @classmethod
    def of(cls, precision: Precision, optimizer: str) -> StateBytes:
        """16 bytes in all for mixed-precision Adam with 16-bit gradients (Rajbhandari et al. 2020)."""
        mixed = precision.compute in ("bf16", "fp16", "fp8")
        width = BYTES_OF[precision.optimizer]
        return cls(
            # fp8 training keeps its weights in 16 bits.
            weights=2 if mixed else BYTES_OF[precision.compute],
            gradients=BYTES_OF[precision.gradient],
            optimizer=width * (STATE_TENSORS[optimizer] + int(mixed)),  # type: ignore[index]
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Footprint:
    """Bytes on the fullest worker of each row: model state, activations, buffers, what the optimizer's step needs once
    activations are gone, and what is no tensor (`context`); and of a server host.

    `server` is in the memory of hosts: a dedicated server's, or what a worker node's host holds for its co-located one.
    `fragmentation` is what the allocator adds to tensors. The levels that tools state: `allocated`, `reserved`, `used`.
    """

    state: Floats
    activations: Floats
    buffers: Floats
    step: Floats
    context: Floats
    fragmentation: float
    server: Floats

    @property
    def allocated(self) -> Floats:
        """The tensors of the fullest worker at their peak: in the passes, or at the optimizer's step."""
        return self.state + np.maximum(self.activations + self.buffers, self.step)

    @property
    def worker(self) -> Floats:
        """What the fullest worker cannot do without, as the allocator packs it: a device with less runs out."""
        return self.allocated * (1.0 + self.fragmentation) + self.context

    @property
    def reserved(self) -> Floats:
        """What the allocator ends up holding where there is room: large tensors of the step find no place in the freed
        segments of activations, so that both stay."""
        return (self.state + self.activations + self.buffers + self.step) * (1.0 + self.fragmentation)

    @property
    def used(self) -> Floats:
        """What the driver shows as used where there is room: what the allocator reserved, and the context."""
        return self.reserved + self.context


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """Forward passes whose backward pass has not run yet: of all chunks of a stage together, and of the first chunk of
    the first stage and the last chunk of the last stage, where there is an embedding and a head."""

    chunks: int
    first_chunk: int
    last_chunk: int


def passes_in_flight(schedule: Schedule, pp: int, stage: int, count: int, virtual: int) -> InFlight:
    """What a stage holds at most (P13): min(m, pp - stage) passes under 1F1B, all m under GPipe, the warm-up and one
    more with virtual stages. (Where the backward pass is split, `fullest_moments`.)"""
    if schedule == "gpipe":
        return InFlight(chunks=count, first_chunk=count, last_chunk=count)
    if schedule == "1f1b":
        held = min(count, pp - stage)
        return InFlight(chunks=held, first_chunk=held, last_chunk=held)
    if count == pp:
        # As few micro-batches as stages: all run forward first.
        return InFlight(chunks=count * virtual, first_chunk=count, last_chunk=count)
    held = min(count * virtual, 2 * (pp - stage - 1) + (virtual - 1) * pp + 1)
    return InFlight(chunks=held, first_chunk=min(count, 2 * pp), last_chunk=1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stages:
    """Per division, for one stage of each: parameters that all replicas hold and those of the rank's experts where
    these are shared, bytes of activations, and the elements of the largest bucket and of the largest three in a row, by
    bucket limit in bytes."""

    parameters: Floats
    experts: Floats
    activations: Floats
    largest: dict[float, tuple[Floats, Floats]]


def footprint(workload: Workload, space: Space, framework: Framework) -> Footprint:
    """Memory of every row of `space`. O(distinct divisions * layers) Python, the rest in arrays.

    The fullest worker is on the first stage (most micro-batches in flight, the embedding), on the last (logits, head),
    or on one that holds more layers than those before it; these are looked at. State: per parameter weights, gradients
    and optimizer state, divided by the ranks that hold the same parameter (dp * cp, and 1/ep of these for experts) as
    far as the scheme shards them; sharded weights need the gathered bucket, the one before it and the one being
    prefetched. Activations: what each layer keeps, times the micro-batches in flight, and the working set of one
    recomputed layer with the gradients of its activations, or the logits with what the loss needs. The allocator adds
    `fragmentation` to all tensors, every group of ranks that communicates its buffers.
    """
    divisions = space.divisions
    state_bytes = StateBytes.of(space.precision, workload.training.optimizer)
    row = space.division
    candidates = [_fullest_stages(space, *key) for key in _keys(divisions.schedule, divisions.pp, divisions.split)]
    count = max((len(stages) for stages in candidates), default=0)
    limits = sorted({scheme.bucket_bytes for scheme in space.schemes if not isinstance(scheme, AllReduce)})
    results = []
    for number in range(count):
        stages = _stages(workload, space, framework, number, limits)
        state, buffers, step = _state(space, state_bytes, stages, framework.device_memory)
        results.append((state, stages.activations[row], buffers, step))
    stacked = [np.stack(parts) for parts in zip(*results, strict=True)]
    worst = np.argmax(stacked[0] + np.maximum(stacked[1] + stacked[2], stacked[3]), axis=0)
    state, activation, buffers, step = (np.take_along_axis(part, worst[None], axis=0)[0] for part in stacked)
    return Footprint(
        state=state,
        activations=activation,
        buffers=buffers,
        step=step,
        context=framework.memory_overhead_bytes + framework.device_memory.communicator_bytes * _groups(space),
        fragmentation=framework.fragmentation,
        server=_server(workload, space, state_bytes),
    )


def _groups(space: Space) -> Floats:
    """The groups of ranks that a worker communicates in: tensor-parallel, replicas, context, experts and pipeline; and
    all ranks together (norms, flags) where these are several."""
    d, row = space.divisions, space.division
    kinds = np.stack([degree[row] > 1 for degree in (d.tp, d.replicas, d.cp, d.ep, d.pp)]).sum(axis=0)
    return np.asarray(kinds + (kinds > 1), dtype=np.float64)


def _stages(workload: Workload, space: Space, framework: Framework, number: int, limits: list[float]) -> _Stages:
    """One stage of every division: number `number` of those that may be the fullest."""
    divisions = space.divisions
    known: dict[tuple[int, ...], tuple[float, ...]] = {}
    # Parameters by stage alone: micro-batches, recomputation and context parallelism do not change them.
    held: dict[tuple[int, int, int, tuple[range, ...]], tuple[float, float, list[float]]] = {}
    columns = (
        divisions.tp, divisions.pp, divisions.micro_batch, divisions.micro_batches, divisions.virtual_stages,
        divisions.sequence_parallel.astype(np.int64), divisions.recompute, divisions.schedule, divisions.cp,
        divisions.ep, divisions.split,
    )  # fmt: skip
    result = np.empty((3 + 2 * len(limits), len(divisions)))
    for index, key in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        if key not in known:
            tp, pp, virtual, schedule, ep, split = key[0], key[1], key[4], key[7], key[9], key[10]
            stages = _fullest_stages(space, schedule, pp, split)
            stage = stages[min(number, len(stages) - 1)]
            spans = _spans(space, SCHEDULES[schedule], stage, pp, virtual, split)
            # Where one stage holds both ends, tied embeddings are there once.
            apart = 1 if stage_of(SCHEDULES[schedule], pp, pp * virtual - 1) == 0 else pp
            of = (tp, apart, ep, spans)
            if of not in held:
                held[of] = _parameters(workload, space, *of, limits)
            *parameters, sizes = held[of]
            known[key] = (*parameters, _activations(workload, framework, stage, spans, *key[:10]), *sizes)
        result[:, index] = known[key]
    largest = {limit: (result[3 + 2 * i], result[4 + 2 * i]) for i, limit in enumerate(limits)}
    return _Stages(parameters=result[0], experts=result[1], activations=result[2], largest=largest)


def _keys(*columns: NDArray[np.int64]) -> list[tuple[int, ...]]:
    """The distinct rows of some columns."""
    return [tuple(row) for row in np.unique(np.stack(columns), axis=1).T.tolist()]


def _fullest_stages(space: Space, schedule: int, pp: int, split: int) -> tuple[int, ...]:
    """The stages one of which is the fullest, whatever a layer and the ends keep: the two ends, and those with more
    layers than any before. Where weight gradients wait, later stages hold more of what these need, so that those with
    more layers than any after count too; and either of a V's two ways may."""
    return _candidates(space.splits[split], space.layers, SCHEDULES[schedule], pp)


@functools.lru_cache(maxsize=4096)
def _candidates(boundaries: tuple[int, ...], layers: int, schedule: Schedule, pp: int) -> tuple[int, ...]:
    ends = (*boundaries[1:], layers)
    sizes = np.array([end - first for first, end in zip(boundaries, ends, strict=True)])
    virtual = len(boundaries) // pp
    ways = [sizes[[chunks_of(schedule, pp, stage, virtual)[way] for stage in range(pp)]] for way in range(virtual)]
    found = {0, pp - 1}
    for loads in (*ways, np.sum(ways, axis=0)):
        found |= set(_records(loads))
        if splits_backward(schedule):
            found |= {pp - 1 - stage for stage in _records(loads[::-1])}
    return tuple(sorted(found))


def _records(values: NDArray[np.int64]) -> list[int]:
    """Where a value is larger than all before it."""
    before = np.maximum.accumulate(np.concatenate([[-1], values[:-1]]))
    return [int(index) for index in np.flatnonzero(values > before)]


def _spans(space: Space, schedule: Schedule, stage: int, pp: int, virtual: int, split: int) -> tuple[range, ...]:
    """The layers of each chunk of a stage, the embedding (-1) and the head (L) included where it holds them."""
    starts = space.splits[split]
    ends = (*starts[1:], space.layers)
    found = []
    for chunk in chunks_of(schedule, pp, stage, virtual):
        first = -1 if chunk == 0 else starts[chunk]
        last = space.layers + 1 if chunk == pp * virtual - 1 else ends[chunk]
        found.append(range(first, last))
    return tuple(found)


def _parameters(
    workload: Workload, space: Space, tp: int, pp: int, ep: int, spans: tuple[range, ...], limits: list[float]
) -> tuple[float, float, list[float]]:
    """Parameters of a stage, shared experts apart; for each limit its largest bucket and its largest three neighbouring
    ones, in elements."""
    model = workload.model
    parameters = float(sum(layer_elements(model, tp, pp, layer, ep) for span in spans for layer in span))
    experts = float(sum(expert_elements(model, tp, layer, ep) for span in spans for layer in span))
    sizes: list[float] = []
    for limit in limits:
        buckets = [
            [cut.elements for cut in cuts(model, tp, pp, span, limit, BYTES_OF[space.precision.gradient], ep)]
            for span in spans
        ]
        sizes.append(float(max(max(chunk) for chunk in buckets)))
        sizes.append(float(max(sum(chunk[i : i + 3]) for chunk in buckets for i in range(max(1, len(chunk) - 2)))))
    return parameters - experts, experts, sizes


def _activations(
    workload: Workload,
    framework: Framework,
    stage: int,
    spans: tuple[range, ...],
    tp: int,
    pp: int,
    micro_batch: int,
    count: int,
    virtual: int,
    sp: int,
    recompute: int,
    schedule: int,
    cp: int,
    ep: int,
) -> float:
    """Bytes of activations on one rank of a stage at their peak."""
    model, training = workload.model, workload.training
    block = Block.of(
        workload, framework, micro_batch=micro_batch, tp=tp, sequence_parallel=bool(sp), cp=cp, ep=ep,
        dtype=training.precision,
    )  # fmt: skip
    policy = RECOMPUTES[recompute], framework.selective
    # fp8 training keeps its activations in 16 bits, the inputs of linear layers apart.
    fp8_inputs = framework.device_memory.fp8_inputs and training.precision == "fp8"
    kept = activation_bytes_per_layer(block, *policy, fp8_inputs=fp8_inputs)
    layers = [len(range(max(0, span.start), min(model.layers, span.stop))) for span in spans]
    working = working_set_bytes(block, *policy, fp8_inputs=fp8_inputs) + gradient_working_set_bytes(block)
    boundary = boundary_bytes(model, tokens=block.tokens, dtype=block.dtype)
    loss: Loss = "fused" if framework.in_place_loss else "eager" if framework.device_memory.eager_loss else "in-place"
    head = loss_bytes(block, loss)
    total = float(ring_buffer_bytes(block))
    if pp > 1:
        total += 2 * boundary
    # What each micro-batch in flight takes besides what layers keep.
    extra = boundary if pp > 1 and framework.device_memory.stage_outputs else 0

    def moment(heads: int) -> float:
        """The larger of a layer's backward pass and the loss, with `heads` micro-batches behind the last chunk."""
        return max(working + head.kept * max(0, heads - 1), head.kept * heads + head.passing if heads else 0)

    if splits_backward(SCHEDULES[schedule]):
        needed = weight_gradient_bytes(block)
        ahead, later = [kept * n + extra for n in layers], [needed * n for n in layers]
        for index, span in enumerate(spans):
            if span.start == -1:
                ahead[index] += embedding_activation_bytes(block)
                later[index] += boundary
            if span.stop == model.layers + 1:
                ahead[index] += head_activation_bytes(block)
                later[index] += head_weight_gradient_bytes(Head.plain(block, in_place=False, in_steps=False))
        return total + max(
            moment(sum(held.passes for held, span in zip(now, spans, strict=True) if span.stop == model.layers + 1))
            + sum(held.passes * a + held.weights * w for held, a, w in zip(now, ahead, later, strict=True))
            for now in fullest_moments(SCHEDULES[schedule], pp, stage, count, virtual)
        )
    flying = passes_in_flight(SCHEDULES[schedule], pp, stage, count, virtual)
    # Chunks of different sizes: as if all in flight were of the largest.
    total += flying.chunks * (float(kept) * max(layers) + extra)
    if stage == 0:
        total += flying.first_chunk * embedding_activation_bytes(block)
    if stage == pp - 1:
        total += flying.last_chunk * head_activation_bytes(block)
    return total + moment(flying.last_chunk if stage == pp - 1 else 0)


def _state(space: Space, per: StateBytes, stages: _Stages, software: DeviceMemory) -> tuple[Floats, Floats, Floats]:
    """(model state, buffers, what the optimizer's step needs besides) in bytes by row."""
    d, row = space.divisions, space.division
    whole, experts = stages.parameters[row], stages.experts[row]
    # What a rank keeps of the parameters that it uses, if all ranks that hold the same ones share them out.
    shards = whole / d.replicas[row] + experts * d.ep[row] / d.replicas[row]
    kept = whole + experts
    weights, gradients, optimizer = (kept * x for x in (per.weights, per.gradients, per.optimizer))
    copied = software.step_gradients != "as they are" and per.gradients == 2
    copy, flat = 4 * copied, 2 * copied * (software.step_gradients == "flat fp32")
    buffers, step = np.zeros(len(space)), copy * kept
    for index, scheme in enumerate(space.schemes):
        rows = space.scheme == index
        at = space.division[rows]
        match scheme:
            case AllReduce():
                pass
            case Sharded():
                one, three = stages.largest[scheme.bucket_bytes]
                optimizer[rows], step[rows] = shards[rows] * per.optimizer, shards[rows] * (copy + flat)
                buffers[rows] += np.minimum(software.reduce_buffer_bytes, gradients[rows])
                if scheme.shards_gradients:
                    gradients[rows] = shards[rows] * per.gradients
                    buffers[rows] += one[at] * per.gradients
                if scheme.shards_weights:
                    weights[rows] = shards[rows] * per.weights
                    buffers[rows] += three[at] * per.weights
                    if software.fp32_shards and per.weights == 2:
                        # The optimizer's master copy is all there is; gradients, computed in 16 bits, end in its type.
                        weights[rows], gradients[rows] = 0.0, shards[rows] * 4
                        buffers[rows] += one[at] * per.weights
            case ParameterServer():
                if scheme.optimizer_at == "server":
                    one, _ = stages.largest[scheme.bucket_bytes]
                    optimizer[rows] = step[rows] = 0.0
                    # Pulled weights arrive beside those in use.
                    buffers[rows] += one[at] * per.weights
    return weights + gradients + optimizer, buffers, step


def _server(workload: Workload, space: Space, per: StateBytes) -> Floats:
    """Host memory of the fullest server: its share of accumulators and, where it steps, of master copy and state, and
    one partition of every rank, on its way in."""
    total = float(parameter_count(workload.model))
    result = np.zeros(len(space))
    for index, scheme in enumerate(space.schemes):
        if isinstance(scheme, ParameterServer):
            share = max(scheme.dedicated_parts, scheme.colocated_parts) / scheme.parts
            kept = per.gradients
            if scheme.optimizer_at == "server":
                width = BYTES_OF[space.precision.optimizer]
                kept += width * (1 + STATE_TENSORS[workload.training.optimizer])
            d, at = space.divisions, space.division[space.scheme == index]
            receiving = d.replicas[at] * d.tp[at] * d.pp[at] * scheme.partition_bytes
            result[space.scheme == index] = share * total * kept + receiving
    return result
