"""Pipeline schedules: in which order one stage runs the forward and backward passes of its micro-batches."""

from __future__ import annotations

from typing import NamedTuple

from clustersim.layout.layout import Schedule


class Turn(NamedTuple):
    """One pass of one micro-batch through one chunk of this stage (`virtual`: which of its chunks)."""

    micro_batch: int
    virtual: int
    backward: bool


def turns(schedule: Schedule, stages: int, stage: int, micro_batches: int, virtual_stages: int) -> list[Turn]:
    """The passes of `stage` (0-based, of `stages`) in order. O(micro_batches * virtual_stages).

    GPipe (Huang et al., 2019), 1F1B (Narayanan et al., PipeDream-Flush 2021) and interleaved 1F1B (Narayanan et al.,
    SC'21), whose `micro_batches` must be a multiple of `stages`.
    """
    total = micro_batches * virtual_stages
    if schedule == "gpipe":
        warmup = total
    elif schedule == "1f1b":
        warmup = min(total, stages - stage - 1)
    else:
        assert micro_batches % stages == 0, "interleaved needs micro-batches in multiples of the stages"
        ahead = 2 * (stages - stage - 1) + (virtual_stages - 1) * stages
        warmup = total if micro_batches == stages else min(total, ahead)
    order = [_forward(schedule, k, stages, virtual_stages) for k in range(total)]
    back = [_backward(schedule, k, stages, virtual_stages) for k in range(total)]
    result = order[:warmup]
    for k in range(warmup, total):
        result += (order[k], back[k - warmup])
    return result + back[total - warmup :]


def _forward(schedule: Schedule, k: int, stages: int, virtual_stages: int) -> Turn:
    if schedule != "interleaved":
        return Turn(k, 0, False)
    group, within = divmod(k, stages * virtual_stages)
    return Turn(group * stages + within % stages, within // stages, False)


def _backward(schedule: Schedule, k: int, stages: int, virtual_stages: int) -> Turn:
    if schedule != "interleaved":
        return Turn(k, 0, True)
    group, within = divmod(k, stages * virtual_stages)
    return Turn(group * stages + within % stages, virtual_stages - 1 - within // stages, True)


def in_flight(order: list[Turn]) -> int:
    """The largest number of forward passes whose backward has not run yet (docs/laws.md, P13)."""
    peak = held = 0
    for turn in order:
        held += -1 if turn.backward else 1
        peak = max(peak, held)
    return peak
