"""Times of messages and of measured collectives over their size.

A link's curve is piecewise alpha-beta. The operation (one send, or one whole collective) pays the link's
launch once; each of its messages, or ring steps, pays alpha and the bandwidth term. Both are measured: small
collectives of 2, 4 and 8 ranks lie on launch + steps * alpha within a few percent, and no single alpha fits
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clustersim.errors import ProfileError
from clustersim.files import read_csv
from clustersim.hardware.device import TableRef
from clustersim.hardware.link import Link, Segment

Floats = NDArray[np.float64]
CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce"]

# A piece of a curve must lower the squared relative error by this share, or the curve does without it.
_WORTH_A_PIECE = 0.1


# ----------------------------------------------------------------------------------------------- links


@overload
def step_seconds(link: Link, size_bytes: float, rate_bytes_per_s: float | None = None) -> float: ...
@overload
def step_seconds(link: Link, size_bytes: Floats, rate_bytes_per_s: float | None = None) -> Floats: ...
def step_seconds(link: Link, size_bytes: float | Floats, rate_bytes_per_s: float | None = None) -> float | Floats:
    """Seconds of one message of `size_bytes` inside a running operation: alpha and bandwidth, no launch.

    `rate_bytes_per_s` replaces the datasheet rate (a what-if): the bandwidth term scales, alpha stays. Where
    a piece of the curve starts below the end of the piece before it, the end holds (running maximum), so that
    the time never falls with the size. O(sizes * log pieces).
    """
    rate = link.rate_bytes_per_s if rate_bytes_per_s is None else rate_bytes_per_s
    starts, alphas, per_byte = _pieces(link, rate)
    ends = alphas[:-1] + starts[1:] * per_byte[:-1]
    floors = np.concatenate(([0.0], np.maximum.accumulate(ends)))
    size = np.asarray(size_bytes, dtype=np.float64)
    piece = np.searchsorted(starts, size, side="right") - 1
    seconds = np.maximum(alphas[piece] + size * per_byte[piece], floors[piece])
    return seconds if isinstance(size_bytes, np.ndarray) else float(seconds)


@overload
def message_seconds(link: Link, size_bytes: float, rate_bytes_per_s: float | None = None) -> float: ...
@overload
def message_seconds(link: Link, size_bytes: Floats, rate_bytes_per_s: float | None = None) -> Floats: ...
def message_seconds(link: Link, size_bytes: float | Floats, rate_bytes_per_s: float | None = None) -> float | Floats:
    """Seconds of one send from one sender to one receiver on an idle link: the launch, and `step_seconds`."""
    return link.launch_s + step_seconds(link, size_bytes, rate_bytes_per_s)


def alpha_s(link: Link) -> float:
    """Seconds that one more message, or ring step, of no bytes costs inside a running operation."""
    return link.segments[0].alpha_s


@overload
def effective_rate(link: Link, size_bytes: float, rate_bytes_per_s: float | None = None) -> float: ...
@overload
def effective_rate(link: Link, size_bytes: Floats, rate_bytes_per_s: float | None = None) -> Floats: ...
def effective_rate(link: Link, size_bytes: float | Floats, rate_bytes_per_s: float | None = None) -> float | Floats:
    """Bytes a second of a message of `size_bytes` beyond its alpha: size / (step_seconds - alpha_s).

    With the first piece's alpha for every hop, this makes up the whole curve again, so that no larger message takes
    less time than a smaller one; the later pieces' larger alphas count as bandwidth.
    """
    rate = link.rate_bytes_per_s if rate_bytes_per_s is None else rate_bytes_per_s
    if len(link.segments) == 1:
        found = np.full_like(np.asarray(size_bytes, dtype=np.float64), rate * link.segments[0].efficiency)
    else:
        size = np.maximum(np.asarray(size_bytes, dtype=np.float64), 1.0)
        found = size / (step_seconds(link, size, rate) - alpha_s(link))
    return found if isinstance(size_bytes, np.ndarray) else float(found)


def _pieces(link: Link, rate: float) -> tuple[Floats, Floats, Floats]:
    starts = np.array([piece.from_bytes for piece in link.segments])
    alphas = np.array([piece.alpha_s for piece in link.segments])
    return starts, alphas, 1.0 / (rate * np.array([piece.efficiency for piece in link.segments]))


# --------------------------------------------------------------------------------------------- fitting


def fit_segments(
    sizes_bytes: ArrayLike, seconds: ArrayLike, rate_bytes_per_s: float, pieces: int
) -> tuple[Segment, ...]:
    """The piecewise alpha-beta curve of at most `pieces` pieces nearest to measured (size, time) points.

    Least squares on the relative error of the time; the break points by dynamic programming over the distinct
    sizes, two at least per piece; alpha >= 0 and efficiency <= 1 (no link beats its datasheet), so time grows
    with size. A piece that lowers the squared error by less than a tenth is left out. O(sizes^2 * pieces).
    ProfileError on unusable points.
    """
    size, time = np.asarray(sizes_bytes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if size.shape != time.shape or size.ndim != 1 or np.unique(size).size < 2:
        raise ProfileError("a curve needs a time per size, and two different sizes at least; measure more sizes")
    usable = np.isfinite(size) & np.isfinite(time) & (size >= 0.0) & (time > 0.0)
    if not np.all(usable):
        raise ProfileError("a curve needs sizes of 0 bytes or more, and times above 0 s; drop the other rows")
    assert pieces >= 1
    assert rate_bytes_per_s > 0.0
    distinct, where = np.unique(size, return_inverse=True)
    # Moments per distinct size of sum((a + b * size) / time - 1)^2, sizes in units of the largest one.
    scale = float(distinct[-1])
    one, x = 1.0 / time, size / scale / time
    moments = np.zeros((6, distinct.size))
    for row, weight in zip(moments, (one * one, one * x, x * x, one, x, np.ones_like(x)), strict=True):
        np.add.at(row, where, weight)
    slope_floor = scale / rate_bytes_per_s
    count = distinct.size
    error = np.full((count, count), np.inf)
    alpha, slope = np.zeros((count, count)), np.zeros((count, count))
    for first in range(count - 1):
        sums = np.cumsum(moments[:, first:], axis=1)[:, 1:]
        runs = slice(first + 1, None)
        alpha[first, runs], slope[first, runs], error[first, runs] = _lines(sums, slope_floor)
    groups = _partition(error, pieces)
    segments = []
    for number, (first, last) in enumerate(groups):
        start = 0.0
        if number > 0:
            start = _meeting(groups[number - 1], (first, last), alpha, slope, distinct)
        efficiency = min(1.0, float(slope_floor / slope[first, last]))
        segments.append(Segment(from_bytes=start, alpha_s=float(alpha[first, last]), efficiency=efficiency))
    return tuple(segments)


def _lines(sums: Floats, slope_floor: float) -> tuple[Floats, Floats, Floats]:
    """Per column of moments: the best alpha >= 0 and slope >= floor, and the squared error they leave."""
    aa, ab, bb, ra, rb, n = sums

    def squared(a: Floats, b: Floats) -> Floats:
        error: Floats = a * a * aa + 2 * a * b * ab + b * b * bb - 2 * a * ra - 2 * b * rb + n
        return np.maximum(error, 0.0)

    determinant = aa * bb - ab * ab
    safe = np.where(determinant > 1e-12 * aa * bb, determinant, 1.0)
    free_a, free_b = (ra * bb - rb * ab) / safe, (rb * aa - ra * ab) / safe
    inside = (determinant > 1e-12 * aa * bb) & (free_a >= 0.0) & (free_b >= slope_floor)
    floor = np.full_like(aa, slope_floor)
    candidates = (
        (np.where(inside, free_a, 0.0), np.where(inside, free_b, floor), inside),
        (np.maximum((ra - slope_floor * ab) / aa, 0.0), floor, np.ones_like(inside)),
        (np.zeros_like(aa), np.maximum(rb / bb, slope_floor), np.ones_like(inside)),
    )
    errors = np.stack([np.where(valid, squared(a, b), np.inf) for a, b, valid in candidates])
    best = np.argmin(errors, axis=0)
    pick = np.arange(aa.size)
    a_all, b_all = np.stack([c[0] for c in candidates]), np.stack([c[1] for c in candidates])
    return a_all[best, pick], b_all[best, pick], errors[best, pick]


def _partition(error: Floats, pieces: int) -> list[tuple[int, int]]:
    """The runs (first, last) of distinct sizes that minimise the summed error; as few as are worth it."""
    count = error.shape[0]
    cost = np.full((pieces + 1, count + 1), np.inf)
    cost[0, 0] = 0.0
    came = np.zeros((pieces + 1, count + 1), dtype=np.int64)
    for used in range(1, pieces + 1):
        for end in range(2, count + 1):
            through = cost[used - 1, :end] + error[:end, end - 1]
            came[used, end] = int(np.argmin(through))
            cost[used, end] = through[came[used, end]]
    chosen = 1
    # An error of rounding size is a perfect fit: nothing is worth another piece.
    for used in range(2, pieces + 1):
        best = cost[chosen, count]
        if best > 1e-12 * count and cost[used, count] < (1.0 - _WORTH_A_PIECE) * best:
            chosen = used
    groups: list[tuple[int, int]] = []
    end = count
    for used in range(chosen, 0, -1):
        groups.append((int(came[used, end]), end - 1))
        end = int(came[used, end])
    return groups[::-1]


def _meeting(left: tuple[int, int], right: tuple[int, int], alpha: Floats, slope: Floats, distinct: Floats) -> float:
    """Where the right piece starts: where the lines cross, if between their points; else its first size."""
    scale = distinct[-1]
    before, first = distinct[left[1]], distinct[right[0]]
    if slope[left] != slope[right]:
        crossing = scale * (alpha[right] - alpha[left]) / (slope[left] - slope[right])
        if before < crossing <= first:
            return float(crossing)
    return float(first)


# ----------------------------------------------------------------------------------------- collectives


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CollectiveTable:
    """Measured collectives of one kind of node: per (kind, ranks, nodes), ascending sizes in bytes and times in s.

    Ranks are spread evenly over the nodes. Sizes follow nccl-tests: for all_reduce, broadcast and reduce the
    buffer; for all_gather and reduce_scatter the whole (ranks times the share of one); for all_to_all the send
    buffer of one rank (its own share included).
    """

    curves: dict[tuple[CollectiveKind, int, int], tuple[Floats, Floats]]

    def ranks(self, kind: CollectiveKind, nodes: int = 1) -> tuple[int, ...]:
        """The rank counts that were measured on so many nodes, ascending."""
        return tuple(sorted(ranks for known, ranks, on in self.curves if (known, on) == (kind, nodes)))

    def seconds(self, kind: CollectiveKind, ranks: int, size_bytes: float, nodes: int = 1) -> float | None:
        """Seconds of one collective, launch included; None where nothing comparable was measured.

        Log-log interpolation over the size. Below the smallest measured size its time holds; above the
        largest its bandwidth holds. Between two measured groups it is interpolated, log-log too: on one node over
        the rank counts, on several over the node counts with as many ranks each; outside: None.
        """
        if ranks == 1:
            return 0.0
        if (kind, ranks, nodes) in self.curves:
            return self._along_size((kind, ranks, nodes), size_bytes)
        known = [
            key
            for key in sorted(self.curves)
            if key[0] == kind and (key[2] == 1 if nodes == 1 else key[2] > 1 and key[1] * nodes == ranks * key[2])
        ]
        below, above = [key for key in known if key[1] < ranks], [key for key in known if key[1] > ranks]
        if not below or not above:
            return None
        low, high = below[-1], above[0]
        share = np.log(ranks / low[1]) / np.log(high[1] / low[1])
        times = self._along_size(low, size_bytes), self._along_size(high, size_bytes)
        return float(np.exp((1.0 - share) * np.log(times[0]) + share * np.log(times[1])))

    def _along_size(self, key: tuple[CollectiveKind, int, int], size_bytes: float) -> float:
        sizes, times = self.curves[key]
        if size_bytes <= sizes[0]:
            return float(times[0])
        if size_bytes >= sizes[-1]:
            return float(times[-1] * size_bytes / sizes[-1])
        return float(np.exp(np.interp(np.log(size_bytes), np.log(sizes), np.log(times))))


def collective_table(refs: Sequence[TableRef], folder: Path) -> CollectiveTable:
    """The CSVs (`collective,ranks,bytes,time_us`, and `nodes` where not all is on one) of `refs`, looked for in
    `folder`, as one table.

    Rows of one (collective, ranks, nodes, bytes) are averaged (geometric mean). A larger buffer that was measured as
    faster is noise: such neighbours are pooled (isotonic regression of the log times), so that times never
    fall with the size.
    """
    points: dict[tuple[CollectiveKind, int, int], dict[float, list[float]]] = {}
    for ref in refs:
        path = folder / ref.file
        columns = read_csv(path)
        missing = [name for name in ("collective", "ranks", "bytes", "time_us") if name not in columns]
        if missing:
            raise ProfileError(f"{path}: has no column {missing[0]!r}; write collective,ranks,bytes,time_us")
        nodes = columns.get("nodes", ["1"] * len(columns["ranks"]))
        rows = zip(columns["collective"], columns["ranks"], nodes, columns["bytes"], columns["time_us"], strict=True)
        for number, (kind, ranks, on, size, time) in enumerate(rows, start=1):
            key, at, seconds = _row(kind, ranks, on, size, time, f"{path}: row {number}")
            points.setdefault(key, {}).setdefault(at, []).append(seconds)
    curves = {}
    for key, by_size in sorted(points.items()):
        sizes = np.array(sorted(by_size))
        logs = np.array([np.mean(np.log(by_size[size])) for size in sizes])
        curves[key] = (sizes, np.exp(_isotonic(logs)))
    return CollectiveTable(curves=curves)


def _row(
    kind: str, ranks: str, nodes: str, size: str, time: str, where: str
) -> tuple[tuple[CollectiveKind, int, int], float, float]:
    for known in get_args(CollectiveKind):
        if kind == known:
            break
    else:
        known_kinds = ", ".join(get_args(CollectiveKind))
        raise ProfileError(f"{where}: {kind!r} is no collective; write one of {known_kinds}")
    try:
        row = (known, int(ranks), int(nodes)), float(size), float(time) * 1e-6
    except ValueError:
        said = f"ranks, nodes, bytes, time_us = {ranks}, {nodes}, {size}, {time}"
        raise ProfileError(f"{where}: {said}: write numbers") from None
    if row[0][1] < 2 or not (0.0 < row[1] < np.inf and 0.0 < row[2] < np.inf):
        raise ProfileError(f"{where}: ranks, bytes, time_us = {ranks}, {size}, {time}: needs 2 ranks, 1 byte, time > 0")
    if row[0][2] < 1 or row[0][1] % row[0][2] != 0:
        raise ProfileError(f"{where}: {ranks} ranks on {nodes} nodes: write as many ranks for every node")
    return row


def _isotonic(values: Floats) -> Floats:
    """The non-decreasing sequence nearest to `values` in squares (pool adjacent violators); O(n)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        pools.append((mean, count))
    return np.repeat([mean for mean, _ in pools], [count for _, count in pools])
