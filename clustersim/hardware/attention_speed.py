"""How fast the generations of fused attention are next to each other."""

from __future__ import annotations

from math import log2

from clustersim.hardware.kernel import AttentionKernel

# Speed of a kernel over FlashAttention-2's: (forward, backward) at a head dimension of 64 and of 128.
# flash-3 and cudnn, which need Hopper: geometric means over sequences of 512 to 16384 tokens of the rates in
# FlashAttention-3 (Shah et al. 2024), H100 SXM5, figures 5 (forward, causal) and 6 (backward).
# flash-1: FlashAttention-2 (Dao 2023), section 4.1, against FlashAttention in Triton on A100: 1.3 to 1.5 times as
# fast forward, about twice backward; against the first CUDA kernels about twice both ways.
_SPEED: dict[AttentionKernel, tuple[tuple[float, float], tuple[float, float]]] = {
    "flash-1": ((1 / 1.4, 1 / 2.0), (1 / 1.4, 1 / 2.0)),
    "flash-2": ((1.0, 1.0), (1.0, 1.0)),
    "cudnn": ((1.27, 1.46), (1.61, 1.57)),
    "flash-3": ((1.37, 1.56), (1.72, 1.68)),
}
_HOPPER: frozenset[AttentionKernel] = frozenset({"cudnn", "flash-3"})


def times_slower(ran: AttentionKernel, measured: AttentionKernel, head_dim: float, backward: bool) -> float:
    """The time of kernel `ran` over that of `measured`, the newest that the device runs.

    Kernels made for Hopper do not exist where an older one was the newest: that one runs in their place. Between the
    head dimensions of the papers the speeds are interpolated in the logarithm, outside they hold.
    """
    if ran in _HOPPER and measured not in _HOPPER:
        return 1.0
    wide = min(1.0, max(0.0, log2(head_dim) - 6.0))
    way = int(backward)
    fast, slow = (narrow[way] * (1.0 - wide) + broad[way] * wide for narrow, broad in (_SPEED[measured], _SPEED[ran]))
    return fast / slow
