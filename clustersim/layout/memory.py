"""Memory of a layout: what the fullest worker and the fullest server hold, for many layouts at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import BYTES_OF
from clustersim.layout.layout import AllReduce, ParameterServer, Precision, Sharded
from clustersim.layout.space import RECOMPUTES, SCHEDULES, Divisions, Space
from clustersim.workload.activations import (
    activation_bytes_per_layer,
    boundary_bytes,
    embedding_activation_bytes,
    head_activation_bytes,
    logits_bytes,
    working_set_bytes,
)
from clustersim.workload.parameters import parameter_count, stage_parameters
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


def footprint(workload: Workload, space: Space, framework: Framework) -> Footprint:
    """Memory of every row of `space`. O(distinct divisions) Python, the rest in arrays.

    The fullest worker is on the first stage (most micro-batches in flight, the embedding) or the last (logits, head).
    State: per parameter weights, gradients and optimizer state, divided by dp as far as the scheme shards them;
    sharded weights need the gathered bucket, the one before it and the one being prefetched. Activations: what each
    layer keeps, times the micro-batches in flight (1F1B: min(m, pp - stage); GPipe: m; interleaved: its warm-up), and
    the working set of one recomputed layer. Logits: fp32 with their gradient. The allocator adds `fragmentation` to
    all tensors.
    """
    divisions = space.divisions
    state_bytes = StateBytes.of(space.precision, workload.training.optimizer)
    first, last = (_ends(workload, divisions, framework, end) for end in (True, False))
    row = space.division
    dp = divisions.dp[row].astype(np.float64)
    results = []
    for parameters, activations, layer in (first, last):
        state, buffers = _state(space, state_bytes, parameters[row], layer[row], dp)
        results.append((state, activations[row], buffers))
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


def _ends(workload: Workload, divisions: Divisions, framework: Framework, first: bool) -> tuple[Floats, Floats, Floats]:
    """(parameters, activation bytes, parameters of one layer) of the first or last stage, by division."""
    known: dict[tuple[int, ...], tuple[float, float, float]] = {}
    columns = (
        divisions.tp, divisions.pp, divisions.micro_batch, divisions.micro_batches, divisions.virtual_stages,
        divisions.sequence_parallel.astype(np.int64), divisions.recompute, divisions.schedule,
    )  # fmt: skip
    result = np.empty((3, len(divisions)))
    for index, key in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        if key not in known:
            known[key] = _end(workload, framework, first, *key)
        result[:, index] = known[key]
    return result[0], result[1], result[2]


def _end(
    workload: Workload,
    framework: Framework,
    first: bool,
    tp: int,
    pp: int,
    micro_batch: int,
    count: int,
    virtual: int,
    sp: int,
    recompute: int,
    schedule: int,
) -> tuple[float, float, float]:
    model, sequence = workload.model, workload.training.sequence
    is_first, is_last = first or pp == 1, not first or pp == 1
    # Uneven stages: the first hold one layer more.
    layers = -(-model.layers // pp) if first else model.layers // pp
    width = min(2, BYTES_OF[workload.training.precision]) if workload.training.precision != "fp8" else 2
    if workload.training.precision in ("fp32", "tf32", "fp64"):
        width = BYTES_OF[workload.training.precision]
    shape = (model, sequence, micro_batch, tp, bool(sp))
    policy = RECOMPUTES[recompute]
    kept = activation_bytes_per_layer(*shape, policy, framework.attention, width)
    stage = 0 if first else pp - 1
    flying = _in_flight(SCHEDULES[schedule], pp, stage, count, virtual)
    activations = flying * kept * layers / virtual
    activations += working_set_bytes(*shape, policy, framework.attention, width)
    in_whole = max(1.0, flying / virtual)
    if is_first:
        activations += in_whole * embedding_activation_bytes(*shape, width)
    if is_last:
        activations += head_activation_bytes(*shape, width)
        activations += logits_bytes(model, sequence, micro_batch, tp)
    if pp > 1:
        activations += 2 * boundary_bytes(model, sequence, micro_batch, width)
    span = range(layers)
    parameters = stage_parameters(model, span, first=is_first, last=is_last, tp=tp)
    one = stage_parameters(model, range(1), first=False, last=False, tp=tp)
    return float(parameters), float(activations), float(one)


def _in_flight(schedule: str, pp: int, stage: int, count: int, virtual: int) -> float:
    """Chunk passes whose activations a stage holds at most (theory: P13)."""
    if schedule == "gpipe":
        return float(count)
    if schedule == "1f1b":
        return float(min(count, pp - stage))
    total = count * virtual
    warmup = total if count == pp else min(total, 2 * (pp - stage - 1) + (virtual - 1) * pp)
    return float(min(total, warmup + 1))


def _state(space: Space, per: StateBytes, parameters: Floats, layer: Floats, dp: Floats) -> tuple[Floats, Floats]:
    """(model state, buffers) in bytes by row."""
    weights, gradients, optimizer = (np.full(len(space), float(x)) for x in (per.weights, per.gradients, per.optimizer))
    buffers = np.zeros(len(space))
    for index, scheme in enumerate(space.schemes):
        rows = space.scheme == index
        bucket = np.minimum(np.maximum(layer, scheme.bucket_bytes / per.gradients), parameters)[rows]
        match scheme:
            case AllReduce():
                pass
            case Sharded():
                optimizer[rows] /= dp[rows]
                if scheme.stage >= 2:
                    gradients[rows] /= dp[rows]
                    buffers[rows] += bucket * per.gradients
                if scheme.stage == 3:
                    weights[rows] /= dp[rows]
                    buffers[rows] += 3 * bucket * per.weights
            case ParameterServer():
                if scheme.optimizer_at == "server":
                    optimizer[rows] = 0.0
                    # Pulled weights arrive beside those in use.
                    buffers[rows] += bucket * per.weights
    return parameters * (weights + gradients + optimizer), buffers


def _server(workload: Workload, space: Space, per: StateBytes) -> Floats:
    """Host memory of the fullest server: its share of accumulators and, where it steps, of master copy and state."""
    total = float(parameter_count(workload.model))
    result = np.zeros(len(space))
    for index, scheme in enumerate(space.schemes):
        if isinstance(scheme, ParameterServer):
            share = max(scheme.dedicated_parts, scheme.colocated_parts) / scheme.parts
            kept = per.gradients
            if scheme.optimizer_at == "server":
                width = BYTES_OF[space.precision.optimizer]
                kept += width * (1 + STATE_TENSORS[workload.training.optimizer])
            workers = space.divisions.dp[space.division[space.scheme == index]]
            receiving = workers * scheme.partition_bytes
            result[space.scheme == index] = share * total * kept + receiving
    return result
