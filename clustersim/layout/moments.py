"""What a pipeline stage holds for weight gradients that wait, at its fullest moments."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from clustersim.hardware.framework import Schedule
from clustersim.layout.schedule import chunks_of, turns


class Held(NamedTuple):
    """What a stage holds at some moment of one of its chunks: micro-batches whose backward pass has not run (all that
    their layers kept), and those whose weight gradients have not (what these need)."""

    passes: int
    weights: int


@functools.lru_cache(maxsize=4096)
def fullest_moments(
    schedule: Schedule, stages: int, stage: int, count: int, virtual: int
) -> tuple[tuple[Held, ...], ...]:
    """What a stage holds, by chunk, at the moments at which no other holds as much of everything; for schedules that
    split the backward pass. The fullest of them all depends on what is kept of either kind.

    Found by walking through the turns of few enough micro-batches: once the pipeline is full, what is held repeats.
    O(stages).
    """
    chunks = chunks_of(schedule, stages, stage, virtual)
    held = dict.fromkeys(chunks, Held(0, 0))
    change = {"forward": (1, 0), "backward": (-1, 1), "weight-gradient": (0, -1)}
    found: dict[tuple[Held, ...], None] = {}
    for turn in turns(schedule, stages, stage, min(count, 3 * stages), virtual):
        more, later = change[turn.phase]
        passes, weights = held[turn.chunk]
        held[turn.chunk] = Held(passes + more, weights + later)
        found[tuple(held.values())] = None
    numbers = np.array(list(found)).reshape(len(found), -1)
    covered = (numbers[:, None, :] <= numbers[None, :, :]).all(axis=2).sum(axis=1) > 1
    return tuple(moment for moment, less in zip(found, covered, strict=True) if not less)
