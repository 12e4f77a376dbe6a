"""Which layers each chunk of a pipeline holds."""

from __future__ import annotations

import functools
import heapq
from typing import Literal

from clustersim.hardware.framework import Schedule
from clustersim.layout.schedule import chunks_of, stage_of

# What a balanced split has to save the slowest stage to be worth a look.
_LEAST_GAIN = 0.01


def even_boundaries(layers: int, chunks: int) -> tuple[int, ...]:
    """First layers of `chunks` chunks as equal as can be, the larger ones first."""
    base, extra = divmod(layers, chunks)
    return tuple(index * base + min(index, extra) for index in range(chunks))


def slot_boundaries(layers: int, chunks: int) -> tuple[int, ...] | None:
    """First layers where the embedding and the head take the place of a layer each, as Megatron-DeepSpeed runs do whose
    2 + L slots divide by pp; None where a chunk would have no layer."""
    slots = even_boundaries(layers + 2, chunks)
    first = (0, *(slot - 1 for slot in slots[1:]))
    return first if all(one < two for one, two in zip(first, (*first[1:], layers), strict=True)) else None


def stage_loads(
    boundaries: tuple[int, ...], layers: int, schedule: Schedule, pp: int, embedding: float, head: float
) -> list[float]:
    """What each stage computes, in layers; the embedding and the head count as much as is said."""
    loads = [0.0] * pp
    for chunk, (first, end) in enumerate(zip(boundaries, (*boundaries[1:], layers), strict=True)):
        loads[stage_of(schedule, pp, chunk)] += end - first
    loads[stage_of(schedule, pp, 0)] += embedding
    loads[stage_of(schedule, pp, len(boundaries) - 1)] += head
    return loads


@functools.lru_cache(maxsize=4096)
def balanced_boundaries(
    layers: int, schedule: Schedule, pp: int, virtual_stages: int, embedding: float, head: float
) -> tuple[int, ...]:
    """First layers of all chunks, such that the slowest stage has as little to do as it can, for any placement.

    Layers are alike and the ends cost `embedding` and `head` of them, so that only their numbers matter: with one layer
    in every chunk, each further one goes to the stage with the least to do, and there to the smallest chunk. Equal jobs
    dealt out like this finish as early as they can. O(layers log pp).
    """
    chunks = [list(chunks_of(schedule, pp, stage, virtual_stages)) for stage in range(pp)]
    sizes = [1] * (pp * virtual_stages)
    first, last = stage_of(schedule, pp, 0), stage_of(schedule, pp, len(sizes) - 1)
    loads = [
        (virtual_stages + (embedding if stage == first else 0.0) + (head if stage == last else 0.0), stage)
        for stage in range(pp)
    ]
    heapq.heapify(loads)
    for _ in range(layers - len(sizes)):
        load, stage = loads[0]
        heapq.heapreplace(loads, (load + 1.0, stage))
        sizes[min(chunks[stage], key=lambda chunk: sizes[chunk])] += 1
    return tuple(sum(sizes[:chunk]) for chunk in range(len(sizes)))


@functools.lru_cache(maxsize=65536)
def splits(
    layers: int,
    schedule: Schedule,
    pp: int,
    virtual_stages: int,
    embedding: float,
    head: float,
    asked: tuple[int, ...] | Literal["even", "balanced", "slots"] | None,
) -> tuple[tuple[int, ...], ...]:
    """Boundaries to consider: those asked for; or the even ones, and the balanced ones where their slowest stage has
    less to do."""
    if isinstance(asked, tuple):
        return (asked,)
    even = even_boundaries(layers, pp * virtual_stages)
    if asked == "even" or pp == 1:
        return (even,)
    if asked == "slots":
        slots = slot_boundaries(layers, pp * virtual_stages)
        return (slots,) if slots is not None else ()
    balanced = balanced_boundaries(layers, schedule, pp, virtual_stages, embedding, head)
    if asked == "balanced":
        return (balanced,)
    ends = (layers, schedule, pp, embedding, head)
    gain = 1.0 - max(stage_loads(balanced, *ends)) / max(stage_loads(even, *ends))
    return (even, balanced) if gain > _LEAST_GAIN else (even,)
