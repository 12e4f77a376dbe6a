"""Copies of weights and gradients that a framework makes around gathers and reductions, or between types."""

from __future__ import annotations

import functools
from typing import assert_never

from clustersim.hardware.framework import Unsharding
from clustersim.hardware.kernel import BYTES_OF, Dtype, Kernels, Memory
from clustersim.workload.parameters import Held


@functools.lru_cache(maxsize=1024)
def sharding_kernels(parameters: int, dtype: Dtype, gradient: Dtype, how: Unsharding) -> tuple[Kernels, Kernels]:
    """Copies of weights and gradients around the gathers and reductions of sharded weights, of one micro-batch:
    (forward, backward), on top of the collectives.

    `in-place`: none. `flat` (PyTorch's FullyShardedDataParallel): weights are views of what is gathered; backward, the
    gradients are put together, converted to the type they are reduced in, and divided by the number of ranks. `split`
    (fully_shard): what is gathered is copied out into the weights, both ways, and gradients are put together in the
    type they are reduced in. `autocast`: weights are fp32 and not sharded; they are converted for every micro-batch,
    and so are their gradients, back.
    """
    width, wide = BYTES_OF["bf16" if dtype == "fp8" else dtype], BYTES_OF[gradient]

    def copies(*sizes: tuple[int, int]) -> Kernels:
        return tuple(
            (Memory(op="copy", read_bytes=parameters * read, written_bytes=parameters * written), 1)
            for read, written in sizes
        )

    match how:
        case "in-place":
            return (), ()
        case "flat":
            converted = ((width, wide),) if width != wide else ()
            return (), copies((width, width), *converted, (wide, wide))
        case "split":
            return copies((width, width)), copies((width, width), (width, wide))
        case "autocast":
            return (copies((4, width)), copies((width, 4))) if width < 4 else ((), ())
        case _:
            assert_never(how)


@functools.lru_cache(maxsize=4096)
def sharding_of(held: Held, *, dtype: Dtype, gradient: Dtype, how: Unsharding) -> tuple[Kernels, Kernels]:
    """`sharding_kernels` of what a rank holds. Cached."""
    return sharding_kernels(held.parameters, dtype, gradient, how) if held.parameters else ((), ())
