"""Memory of a layout: what the fullest worker and the fullest server hold, for many layouts at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import BYTES_OF
from clustersim.layout.buckets import cuts, layer_elements
from clustersim.layout.layout import AllReduce, ParameterServer, Precision, Schedule, Sharded, even_boundaries
from clustersim.layout.space import RECOMPUTES, SCHEDULES, Space
from clustersim.workload.activations import (
    activation_bytes_per_layer,
    boundary_bytes,
    embedding_activation_bytes,
    head_activation_bytes,
    logits_bytes,
    working_set_bytes,
)
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
    """Bytes on the fullest worker of each row: model state, activations, buffers and overhead; and of a server host.

    `server` is in the memory of hosts: a dedicated server's, or what a worker node's host holds for its co-located one.
    """

    state: Floats
    activations: Floats
    buffers: Floats
    overhead: Floats
    server: Floats

    @property
    def worker(self) -> Floats:
        """All bytes of the fullest worker."""
        return self.state + self.activations + self.buffers + self.overhead


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """Forward passes whose backward pass has not run yet: of all chunks of a stage together, and of the first chunk of
    the first stage and the last chunk of the last stage, where there is an embedding and a head."""

    chunks: int
    first_chunk: int
    last_chunk: int


def passes_in_flight(schedule: Schedule, pp: int, stage: int, count: int, virtual: int) -> InFlight:
    """What a stage holds at most (P13): min(m, pp - stage) passes under 1F1B, all m under GPipe, the warm-up and one
    more with virtual stages."""
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
    """Per division, for one stage of each: parameters, bytes of activations, and the elements of the largest bucket and
    of the largest three in a row, by bucket limit in bytes."""

    parameters: Floats
    activations: Floats
    largest: dict[float, tuple[Floats, Floats]]


def footprint(workload: Workload, space: Space, framework: Framework) -> Footprint:
    """Memory of every row of `space`. O(distinct divisions * layers) Python, the rest in arrays.

    The fullest worker is on the first stage (most micro-batches in flight, the embedding, a layer more where stages are
    uneven) or the last (logits, head); where the user named the stages' boundaries, every stage is looked at. State:
    per parameter weights, gradients and optimizer state, divided by dp as far as the scheme shards them; sharded
    weights need the gathered bucket, the one before it and the one being prefetched. Activations: what each layer
    keeps, times the micro-batches in flight, and the working set of one recomputed layer. Logits: fp32, and the
    gradient of one micro-batch's. The allocator adds `fragmentation` to all tensors.
    """
    divisions = space.divisions
    state_bytes = StateBytes.of(space.precision, workload.training.optimizer)
    row = space.division
    dp = divisions.dp[row].astype(np.float64)
    count = 2 if space.boundaries is None else int(divisions.pp.max(initial=1))
    limits = sorted({scheme.bucket_bytes for scheme in space.schemes if not isinstance(scheme, AllReduce)})
    results = []
    for number in range(count):
        stages = _stages(workload, space, framework, number, limits)
        state, buffers = _state(space, state_bytes, stages, dp)
        results.append((state, stages.activations[row], buffers))
    stacked = [np.stack(parts) for parts in zip(*results, strict=True)]
    worst = np.argmax(sum(stacked), axis=0)
    state, activation, buffers = (np.take_along_axis(part, worst[None], axis=0)[0] for part in stacked)
    return Footprint(
        state=state,
        activations=activation,
        buffers=buffers,
        overhead=framework.memory_overhead_bytes + framework.fragmentation * (state + activation + buffers),
        server=_server(workload, space, state_bytes),
    )


def _stages(workload: Workload, space: Space, framework: Framework, number: int, limits: list[float]) -> _Stages:
    """One stage of every division: the first (0) or the last (1), or stage `number` where boundaries are named."""
    divisions = space.divisions
    known: dict[tuple[int, ...], tuple[float, ...]] = {}
    columns = (
        divisions.tp, divisions.pp, divisions.micro_batch, divisions.micro_batches, divisions.virtual_stages,
        divisions.sequence_parallel.astype(np.int64), divisions.recompute, divisions.schedule,
    )  # fmt: skip
    result = np.empty((2 + 2 * len(limits), len(divisions)))
    for index, key in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        if key not in known:
            tp, pp, _, _, virtual, _, _, _ = key
            stage = min(number, pp - 1) if space.boundaries is not None or number == 0 else pp - 1
            spans = _spans(space, stage, pp, virtual)
            parameters, sizes = _parameters(workload, space, tp, pp, spans, limits)
            known[key] = (parameters, _activations(workload, framework, stage, spans, *key), *sizes)
        result[:, index] = known[key]
    largest = {limit: (result[2 + 2 * i], result[3 + 2 * i]) for i, limit in enumerate(limits)}
    return _Stages(parameters=result[0], activations=result[1], largest=largest)


def _spans(space: Space, stage: int, pp: int, virtual: int) -> tuple[range, ...]:
    """The layers of each chunk of a stage, the embedding (-1) and the head (L) included where it holds them."""
    starts = space.boundaries or even_boundaries(space.layers, pp * virtual)
    ends = (*starts[1:], space.layers)
    found = []
    for chunk in range(stage, pp * virtual, pp):
        first = -1 if chunk == 0 else starts[chunk]
        last = space.layers + 1 if chunk == pp * virtual - 1 else ends[chunk]
        found.append(range(first, last))
    return tuple(found)


def _parameters(
    workload: Workload, space: Space, tp: int, pp: int, spans: tuple[range, ...], limits: list[float]
) -> tuple[float, list[float]]:
    """Parameters of a stage; for each limit its largest bucket and its largest three neighbouring ones, in elements."""
    model = workload.model
    parameters = float(sum(layer_elements(model, tp, pp, layer) for span in spans for layer in span))
    sizes: list[float] = []
    for limit in limits:
        buckets = [
            [cut.elements for cut in cuts(model, tp, pp, span, limit, BYTES_OF[space.precision.gradient])]
            for span in spans
        ]
        sizes.append(float(max(max(chunk) for chunk in buckets)))
        sizes.append(float(max(sum(chunk[i : i + 3]) for chunk in buckets for i in range(max(1, len(chunk) - 2)))))
    return parameters, sizes


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
) -> float:
    """Bytes of activations on one rank of a stage at their peak."""
    model, sequence = workload.model, workload.training.sequence
    # fp8 training keeps its activations in 16 bits.
    width = max(2, BYTES_OF[workload.training.precision])
    shape = (model, sequence, micro_batch, tp, bool(sp))
    policy = RECOMPUTES[recompute]
    kept = activation_bytes_per_layer(*shape, policy, framework.attention, width)
    flying = passes_in_flight(SCHEDULES[schedule], pp, stage, count, virtual)
    # Chunks of different sizes (named boundaries): as if all in flight were of the largest.
    layers = max(len(range(max(0, span.start), min(model.layers, span.stop))) for span in spans)
    total = float(flying.chunks * kept * layers)
    total += working_set_bytes(*shape, policy, framework.attention, width)
    if stage == 0:
        total += flying.first_chunk * embedding_activation_bytes(*shape, width)
    if stage == pp - 1:
        total += flying.last_chunk * head_activation_bytes(*shape, width)
        # Half of it is the gradient, which one micro-batch at a time needs.
        total += (flying.last_chunk + 1) / 2 * logits_bytes(model, sequence, micro_batch, tp)
    if pp > 1:
        total += 2 * boundary_bytes(model, sequence, micro_batch, width)
    return total


def _state(space: Space, per: StateBytes, stages: _Stages, dp: Floats) -> tuple[Floats, Floats]:
    """(model state, buffers) in bytes by row."""
    weights, gradients, optimizer = (np.full(len(space), float(x)) for x in (per.weights, per.gradients, per.optimizer))
    buffers = np.zeros(len(space))
    for index, scheme in enumerate(space.schemes):
        rows = space.scheme == index
        at = space.division[rows]
        match scheme:
            case AllReduce():
                pass
            case Sharded():
                one, three = stages.largest[scheme.bucket_bytes]
                optimizer[rows] /= dp[rows]
                if scheme.stage >= 2:
                    gradients[rows] /= dp[rows]
                    buffers[rows] += one[at] * per.gradients
                if scheme.stage == 3:
                    weights[rows] /= dp[rows]
                    buffers[rows] += three[at] * per.weights
            case ParameterServer():
                if scheme.optimizer_at == "server":
                    one, _ = stages.largest[scheme.bucket_bytes]
                    optimizer[rows] = 0.0
                    # Pulled weights arrive beside those in use.
                    buffers[rows] += one[at] * per.weights
    return stages.parameters[space.division] * (weights + gradients + optimizer), buffers


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
            receiving = d.dp[at] * d.tp[at] * d.pp[at] * scheme.partition_bytes
            result[space.scheme == index] = share * total * kept + receiving
    return result
