"""Which points a probe measures, and in what order: the most useful ones first, so that a budget may end it anywhere.

A grid is measured from coarse to fine: the ends of every axis, then their middles, and so on. All kinds of kernel
advance together; what is left when the time is over are the finest points of each. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, product
from typing import NamedTuple

from clustersim.execute.probe_samples import (
    AttentionPoint,
    CopyPoint,
    Direction,
    Form,
    GemmPoint,
    LayerPoint,
    MemoryPoint,
    Point,
    SustainedPoint,
)
from clustersim.hardware.kernel import Dtype

# How fine, and within that how important: smaller comes first.
Rank = tuple[int, int, int]


def levels(count: int) -> list[int]:
    """For each of `count` values of an axis, at which refinement it appears: both ends at 0, the middle at 1, ..."""
    level = [0] * count
    known, depth = [0, count - 1], 0
    while any(right - left > 1 for left, right in pairwise(known)):
        depth += 1
        middles = [(left + right) // 2 for left, right in pairwise(known) if right - left > 1]
        for middle in middles:
            level[middle] = depth
        known = sorted({*known, *middles})
    return level


def refined(axes: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """The points of a grid with (deepest level, sum of levels)."""
    for place in product(*([*zip(axis, levels(len(axis)), strict=True)] for axis in axes)):
        depth = [level for _, level in place]
        yield max(depth), sum(depth), tuple(value for value, _ in place)


class Points(NamedTuple):
    """Points in their order; a profile cannot do without the first `needed` ones."""

    order: list[Point]
    needed: int


def _in_order(first: Sequence[Point], ranked: Iterable[tuple[Rank, Point]]) -> Points:
    rest = (point for _, point in sorted(ranked, key=lambda one: one[0]))
    return Points(list(dict.fromkeys((*first, *rest))), len(first))


def _models(dtype: Dtype, shapes: Sequence[tuple[int, int, int, int]]) -> list[Point]:
    """Each by hidden size, layers, tokens, and the length of a sequence."""
    return [
        LayerPoint(hidden=hidden, layers=layers, tokens=tokens, sequence=sequence, dtype=dtype)
        for hidden, layers, tokens, sequence in shapes
    ]


def _gemms(
    axes: Sequence[Sequence[int]], dtype: Dtype, shift: int = 0, form: Form = "forward"
) -> list[tuple[Rank, Point]]:
    return [
        ((deep + shift, total, 0), GemmPoint(dtype=dtype, m=m, n=n, k=k, form=form))
        for deep, total, (m, n, k) in refined(axes)
    ]


def _attention(axes: Sequence[Sequence[int]], dtype: Dtype) -> list[tuple[Rank, Point]]:
    """Axes: instances, sequence, group, head dimension. Heads of a group are in one sequence, so that there are at
    least as many instances."""
    return [
        ((deep, total, 1), AttentionPoint(dtype=dtype, instances=i, sequence=s, group=g, head_dim=d))
        for deep, total, (i, s, g, d) in refined(axes)
        if i >= g
    ]


def _sizes(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip(levels(len(sizes)), sizes, strict=True)


def cpu_points(sustained_s: float) -> Points:
    """What is measured of one rank on a CPU."""
    sides = (64, 128, 256, 512, 1024, 2048)
    few = (64, 256, 1024)
    ranked = _gemms(((16, 64, 128, 256, 512, 1024, 2048), sides, sides), "fp32")
    for dtype in ("bf16", "fp64"):
        ranked += _gemms((few, few, few), dtype, 1)
    ranked += _attention(((8, 32), (64, 128, 256, 512), (1, 4), (32, 64, 128)), "fp32")
    ranked += [
        ((level, level, 2), MemoryPoint(dtype="fp32", elements=size))
        for level, size in _sizes([2**p for p in range(12, 23, 2)])
    ]
    more = _models("fp32", ((512, 2, 512, 128), (512, 2, 2048, 512), (1024, 1, 512, 128)))
    ranked += [((1, number, 3), point) for number, point in enumerate(more)]
    ranked.append(((0, 99, 4), SustainedPoint(dtype="fp32", side=768, seconds=sustained_s)))
    first = [
        *_models("fp32", ((16, 2, 16, 16), (16, 6, 16, 16), (128, 2, 512, 128), (320, 2, 512, 128))),
        GemmPoint(dtype="fp32", m=256, n=256, k=256),
        AttentionPoint(dtype="fp32", instances=8, sequence=128, group=1, head_dim=64),
        MemoryPoint(dtype="fp32", elements=2**16),
    ]
    return _in_order(first, ranked)


def cuda_points(kinds: Sequence[Dtype], memory_bytes: int, sustained_s: float) -> Points:
    """What is measured of a GPU that has the dtypes `kinds` (16-bit one first) and so much memory."""
    half = kinds[0]
    rows = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    sides = (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384)
    ranked = _gemms((rows, sides, sides), half)
    for dtype in kinds[1:]:
        # The second 16-bit type runs at the first's speed on most devices: some points show it.
        ranked += _gemms(((128, 1024, 8192), (512, 2048, 8192), (512, 2048, 8192)), dtype, 1)
        if dtype == "fp8":
            ranked += _gemms((rows[2::2], (1024, 2048, 4096, 8192, 16384), (1024, 2048, 4096, 8192, 16384)), dtype, 2)
    backward: tuple[Form, ...] = ("dgrad", "wgrad")
    for form in backward:
        ranked += _gemms(((512, 2048, 8192), (1024, 4096), (1024, 4096)), half, 1, form)
    ranked += [
        ((2, level, 0), GemmPoint(dtype=half, m=s, n=n, k=k, batch=batch))
        for level, batch in _sizes((16, 64, 256))
        for s, n, k in ((512, 512, 64), (2048, 2048, 64), (2048, 128, 2048), (512, 512, 128))
    ]
    ranked += _attention(((8, 16, 32, 64, 128, 256), (128, 512, 1024, 2048, 4096, 8192), (1, 4, 8), (64, 128)), half)
    for backend in ("flash", "cudnn", "efficient"):
        ranked += [
            (
                (2, level, 1),
                AttentionPoint(dtype=half, instances=64, sequence=sequence, group=1, head_dim=128, backend=backend),
            )
            for level, sequence in _sizes((512, 2048, 8192))
        ]
    # The operations on so many elements keep about 100 bytes for each of them.
    sizes = [2**p for p in range(14, 29, 2) if 100 * 2**p < memory_bytes // 2]
    ranked += [((level, level, 2), MemoryPoint(dtype=half, elements=size)) for level, size in _sizes(sizes)]
    ends: tuple[Direction, ...] = ("host-to-device", "device-to-host", "device-to-device")
    ranked += [
        ((level + 1, level, 3), CopyPoint(direction=direction, bytes=size))
        for level, size in _sizes((2**12, 2**16, 2**20, 2**24, 2**28))
        for direction in ends
    ]
    more = _models(half, ((4096, 1, 4096, 2048), (2048, 2, 16384, 512), (768, 4, 16384, 1024)))
    ranked += [((1, number, 4), point) for number, point in enumerate(more)]
    ranked.append(((0, 99, 5), SustainedPoint(dtype=half, side=8192, seconds=sustained_s)))
    first = [
        *_models(half, ((64, 2, 64, 64), (64, 6, 64, 64), (1024, 2, 16384, 1024), (2048, 2, 8192, 2048))),
        GemmPoint(dtype=half, m=2048, n=2048, k=2048),
        AttentionPoint(dtype=half, instances=32, sequence=1024, group=1, head_dim=128),
        MemoryPoint(dtype=half, elements=2**20),
    ]
    return _in_order(first, ranked)
