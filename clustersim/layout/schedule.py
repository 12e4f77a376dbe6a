"""Pipeline schedules: in which order one stage runs the passes of its micro-batches through its chunks."""

from __future__ import annotations

from typing import NamedTuple, assert_never

from clustersim.hardware.framework import Schedule
from clustersim.timeline import Phase


class Turn(NamedTuple):
    """One pass of one micro-batch through one chunk of the model.

    Where a schedule splits the backward pass, `backward` computes the gradient of the input (B) and `weight-gradient`
    that of the weights (W); where it does not, `backward` is both.
    """

    micro_batch: int
    chunk: int
    phase: Phase


def stage_of(schedule: Schedule, pp: int, chunk: int) -> int:
    """The stage that runs a chunk: chunks go round the stages; under ZB-V down to the last stage, and back."""
    return 2 * pp - 1 - chunk if schedule == "zb-v" and chunk >= pp else chunk % pp


def chunks_of(schedule: Schedule, pp: int, stage: int, virtual_stages: int) -> tuple[int, ...]:
    """The chunks of a stage, in the order of the forward pass."""
    return tuple(chunk for chunk in range(pp * virtual_stages) if stage_of(schedule, pp, chunk) == stage)


def splits_backward(schedule: Schedule) -> bool:
    """Whether gradients of weights are computed apart from those of inputs (Qi et al., ICLR'24)."""
    return schedule in ("zb-h1", "zb-v")


def turns(schedule: Schedule, stages: int, stage: int, micro_batches: int, virtual_stages: int) -> list[Turn]:
    """The passes of `stage` (0-based, of `stages`) in order. O(micro_batches * virtual_stages).

    GPipe (Huang et al., 2019), 1F1B (Narayanan et al., PipeDream-Flush 2021), interleaved 1F1B (Narayanan et al.,
    SC'21), whose `micro_batches` must be a multiple of `stages`, and the zero-bubble schedules ZB-H1 and ZB-V (Qi et
    al., ICLR'24; Qi et al., "Pipeline Parallelism with Controllable Memory", 2024).
    """
    chunks = chunks_of(schedule, stages, stage, virtual_stages)
    match schedule:
        case "gpipe":
            return _one_chunk(chunks[0], micro_batches, micro_batches)
        case "1f1b":
            return _one_chunk(chunks[0], micro_batches, stages - stage - 1)
        case "interleaved":
            return _interleaved(chunks, stages, stage, micro_batches)
        case "zb-h1":
            return _zero_bubble_h1(chunks[0], stages, stage, micro_batches)
        case "zb-v":
            return _zero_bubble_v(chunks, stages, stage, micro_batches)
        case _:
            assert_never(schedule)


def _one_chunk(chunk: int, count: int, warmup: int) -> list[Turn]:
    forward = [Turn(i, chunk, "forward") for i in range(count)]
    backward = [Turn(i, chunk, "backward") for i in range(count)]
    return _alternating(forward, backward, min(count, warmup))


def _alternating(forward: list[Turn], backward: list[Turn], warmup: int) -> list[Turn]:
    """`warmup` forward passes, then one forward and one backward in turn, then the backward passes that are left."""
    total = len(forward)
    result = forward[:warmup]
    for k in range(warmup, total):
        result += (forward[k], backward[k - warmup])
    return result + backward[total - warmup :]


def _interleaved(chunks: tuple[int, ...], stages: int, stage: int, count: int) -> list[Turn]:
    """Micro-batches in groups of `stages`: a group goes through all chunks before the next one starts."""
    assert count % stages == 0, "interleaved needs micro-batches in multiples of the stages"
    groups = range(0, count, stages)
    forward = [Turn(g + k, chunk, "forward") for g in groups for chunk in chunks for k in range(stages)]
    backward = [Turn(g + k, chunk, "backward") for g in groups for chunk in reversed(chunks) for k in range(stages)]
    ahead = 2 * (stages - stage - 1) + (len(chunks) - 1) * stages
    return _alternating(forward, backward, len(forward) if count == stages else min(len(forward), ahead))


def _zero_bubble_h1(chunk: int, stages: int, stage: int, count: int) -> list[Turn]:
    """1F1B whose weight gradients wait: stage i is i micro-batches behind with them, and so holds as many micro-batches
    as the first stage. They fill the time in which it would wait for the last backward passes."""
    result = []
    for turn in _one_chunk(chunk, count, stages - stage - 1):
        result.append(turn)
        if turn.phase == "backward" and turn.micro_batch >= stage:
            result.append(Turn(turn.micro_batch - stage, chunk, "weight-gradient"))
    return result + [Turn(i, chunk, "weight-gradient") for i in range(max(0, count - stage), count)]


def _zero_bubble_v(chunks: tuple[int, ...], stages: int, stage: int, count: int) -> list[Turn]:
    """Each stage has a chunk on the way down (`first`) and the one that mirrors it on the way back (`second`).

    Stage i forwards 2(p - i) - 1 micro-batches down, then i in both directions, then p - i that turn round at once; in
    the steady state it runs forward, B and W of one chunk and of the other in turn. At the end, the i last pairs of B
    go ahead of their W. Fewer micro-batches than 2p - 1 leave out the turns of those that are missing.
    """
    first, second = chunks
    done: dict[tuple[int, Phase], int] = {}
    result: list[Turn] = []
    full = max(count, 2 * stages - 1)

    def run(chunk: int, *phases: Phase) -> None:
        for phase in phases:
            number = done.get((chunk, phase), 0)
            done[chunk, phase] = number + 1
            if number < count:
                result.append(Turn(number, chunk, phase))

    def left(chunk: int, phase: Phase) -> bool:
        return done.get((chunk, phase), 0) < full

    for _ in range(2 * (stages - stage) - 1):
        run(first, "forward")
    for _ in range(stage):
        run(second, "forward")
        run(first, "forward")
    for _ in range(stages - stage):
        run(second, "forward", "backward", "weight-gradient")
    while left(second, "forward"):
        if left(first, "forward"):
            run(first, "forward")
        run(first, "backward", "weight-gradient")
        run(second, "forward", "backward", "weight-gradient")
    for _ in range(stage):
        run(first, "backward")
        run(second, "backward")
    for _ in range(stages - stage):
        run(first, "backward", "weight-gradient")
    for chunk in (second, first):
        while left(chunk, "weight-gradient"):
            run(chunk, "weight-gradient")
    return result
