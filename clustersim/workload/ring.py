"""Ring attention: how keys and values go round the ranks that share a sequence, and what hides that."""

from __future__ import annotations

import functools
from typing import NamedTuple

from clustersim.hardware.kernel import Kernels
from clustersim.workload.activations import kv_bytes
from clustersim.workload.block import Block
from clustersim.workload.layer_kernels import Recompute


class Shift(NamedTuple):
    """`times` times, every rank sends `bytes` to the next one of its ring, while it runs the kernels `beside`."""

    bytes: int
    times: int
    beside: Kernels


def ring_shifts(block: Block, recompute: Recompute) -> tuple[tuple[Shift, ...], tuple[Shift, ...]]:
    """The sends of one layer's ring attention on one of its context-parallel ranks: (forward, backward).

    Forward, the block for the next of `cp` steps arrives during each step but the last (Liu et al. 2023): cp - 1
    sends of a block of keys and values. Backward they go round the other way, a rank's own block last, and the
    gradients of a block follow it one step behind: cp - 1 sends of each, both at once in all steps but the first
    and the last. Full recomputation goes round forward once more.
    """
    forward, backward = _round(block)
    return forward, (*forward, *backward) if recompute == "full" else backward


@functools.lru_cache(maxsize=4096)
def _round(block: Block) -> tuple[tuple[Shift, ...], tuple[Shift, ...]]:
    cp = block.cp
    if cp == 1:
        return (), ()
    size = kv_bytes(block)
    ahead = (Shift(size, 1, block.own_step(backward=False)), Shift(size, cp - 2, block.ring_step(backward=False)))
    behind = (
        Shift(size, 1, block.ring_step(backward=True)),
        Shift(2 * size, cp - 2, block.ring_step(backward=True)),
        Shift(size, 1, block.own_step(backward=True)),
    )
    forward, backward = (tuple(shift for shift in way if shift.times) for way in (ahead, behind))
    return forward, backward
