"""Logs of nccl-tests (all_reduce_perf and its siblings) as measured collectives.

Format and conventions as NVIDIA/nccl-tests prints them (doc/PERFORMANCE.md there for what size, algbw and busbw mean);
launchers put their own words before each line, and people strip the `#`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import exp, isclose, isfinite, log
from typing import get_args

from clustersim.errors import InputError
from clustersim.hardware.curve import CollectiveKind
from clustersim.mistakes import near

# What each program measures.
_PROGRAMS: dict[str, CollectiveKind] = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all", "broadcast": "broadcast", "reduce": "reduce",
}  # fmt: skip
_OTHER_PROGRAMS = ("sendrecv", "gather", "scatter", "hypercube")
_STARTS = re.compile(r"nThread\s+(\d+)\s+nGpus\s+(\d+)")
_RANK = re.compile(r"Rank\s+(\d+)\s+(?:Group\s+\d+\s+)?Pid\s+(\d+)\s+on\s+(\S+)\s+device\s+(\d+)\s+\[[^\]]*\]\s*(.*)$")
_PROGRAM = re.compile(r"\b([a-z_]+)_perf(?:_mpi)?\b")
_TYPES = "int8|uint8|int32|uint32|int64|uint64|half|float|double|bfloat16|f8e4m3|f8e5m2|fp8_e4m3|fp8_e5m2"
_ROW = re.compile(rf"(?<![\w.])(\d+)\s+(\d+)\s+({_TYPES})\s+(\S.*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One size: seconds and bus bandwidth, in and out of place; None where the log has no figure."""

    line: int
    size_bytes: int
    dtype: str
    out_of_place_s: float | None
    in_place_s: float | None
    busbw_bytes_per_s: float | None
    algbw_bytes_per_s: float | None
    wrong: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """One run of one program. None: not stated. `how` says where `kind` comes from; `redop` as printed."""

    line: int
    kind: CollectiveKind | None
    how: str
    ranks: int | None
    nodes: int | None
    devices: tuple[str, ...]
    software: str | None
    rows: tuple[Row, ...]

    def seconds(self, in_place: bool = False) -> dict[int, float]:
        """Seconds by size in bytes, without wrong results; rows of one size are averaged (geometric mean)."""
        times: dict[int, list[float]] = {}
        for row in self.rows:
            time = row.in_place_s if in_place else row.out_of_place_s
            if time is not None and time > 0.0 and row.size_bytes > 0 and not row.wrong:
                times.setdefault(row.size_bytes, []).append(time)
        return {size: exp(sum(map(log, found)) / len(found)) for size, found in sorted(times.items())}

    @property
    def bus_bytes_per_s(self) -> float | None:
        """The largest bus bandwidth of all rows."""
        return max((row.busbw_bytes_per_s for row in self.rows if row.busbw_bytes_per_s is not None), default=None)


@dataclass(slots=True)
class _Draft:
    line: int
    program: str | None
    ranks: dict[tuple[int, str, str, str], str] = field(default_factory=dict)
    threads_gpus: tuple[int, int] | None = None
    software: str | None = None
    rows: list[Row] = field(default_factory=list)
    redops: set[str] = field(default_factory=set)
    roots: set[int] = field(default_factory=set)


def read_log(text: str, name: str) -> tuple[Sweep, ...]:
    """The runs in a log of nccl-tests. O(lines). InputError, one line, for a log without a result."""
    drafts = list(_drafts(text, name))
    found = [_sweep(draft, name) for draft in drafts if draft.rows]
    if not found:
        raise InputError(f"{name}: has no result of nccl-tests (size count type ... time algbw busbw); save its output")
    return tuple(found)


def _drafts(text: str, name: str) -> Iterator[_Draft]:
    draft: _Draft | None = None
    program = software = None
    for number, line in enumerate(text.splitlines(), start=1):
        named = _PROGRAM.search(line)
        if named and (named.group(1) in _PROGRAMS or named.group(1) in _OTHER_PROGRAMS):
            program = named.group(1)
        told = re.search(r"Collective test starting:\s*(\w+?)_perf", line)
        if told:
            program = told.group(1)
        version = re.search(r"NCCL version:?\s*([\d.]+\S*)", line)
        if version:
            software = f"NCCL {version.group(1)}"
            if draft is not None:
                draft.software = software
        library = re.search(r"nccl-library=(\d+)(\d\d)(\d\d)\b", line)
        if library:
            program, software = None, f"NCCL {'.'.join(str(int(part)) for part in library.groups())}"
        starts = _STARTS.search(line)
        # Without MPI every process prints a head of its own: a head ends a run only after results.
        if starts and (draft is None or draft.rows):
            if draft is not None:
                yield draft
            draft = _Draft(line=number, program=program, software=software)
        if draft is None:
            draft = _Draft(line=number, program=program, software=software)
        if not draft.rows:
            draft.program = draft.program or program
        if starts:
            draft.threads_gpus = int(starts.group(1)), int(starts.group(2))
        rank = _RANK.search(line)
        if rank:
            draft.ranks[int(rank.group(1)), rank.group(2), rank.group(3), rank.group(4)] = rank.group(5).strip()
        row = _ROW.search(line.rstrip())
        if row and not rank:
            _row(draft, row, number, name)
    if draft is not None:
        yield draft


def _row(draft: _Draft, found: re.Match[str], number: int, name: str) -> None:
    size, _, dtype, rest = found.groups()
    figures = rest.split()
    redop = figures.pop(0) if re.fullmatch(r"[a-z]\w*", figures[0]) and figures[0] not in ("inf", "nan") else "none"
    # time algbw busbw and (newer: how much was wrong), out of place and in place; a root makes their number odd.
    root = figures.pop(0) if len(figures) > 4 and len(figures) % 2 else None
    if len(figures) not in (3, 4, 6, 8):
        raise InputError(
            f"{name}:{number}: {len(figures)} figures are no result of nccl-tests; keep the lines as printed"
        )
    wide = len(figures) // 2 if len(figures) > 4 else len(figures)
    first, second = figures[:wide], figures[wide:]
    try:
        out, in_place = _figure(first[0]), _figure(second[0]) if second else None
        algbw, busbw = _figure(first[1]), _figure(first[2])
        if root is not None:
            draft.roots.add(int(root))
        wrong = any(_bad(part[3]) for part in (first, second) if len(part) > 3)
    except ValueError:
        raise InputError(f"{name}:{number}: {rest!r} are no times and bandwidths; keep the lines as printed") from None
    draft.redops.add(redop)
    draft.rows.append(
        Row(
            line=number,
            size_bytes=int(size),
            dtype=dtype,
            out_of_place_s=out * 1e-6 if out is not None else None,
            in_place_s=in_place * 1e-6 if in_place is not None else None,
            busbw_bytes_per_s=busbw * 1e9 if busbw is not None else None,
            algbw_bytes_per_s=algbw * 1e9 if algbw is not None else None,
            wrong=wrong,
        )
    )


def _figure(text: str) -> float | None:
    value = float("nan") if text == "N/A" else float(text)
    return value if isfinite(value) else None


def _bad(text: str) -> bool:
    """Whether a result was wrong: newer versions count wrong elements, older ones print the largest error."""
    if text == "N/A":
        return False
    return float(text) > (0.0 if re.fullmatch(r"\d+", text) else 1e-1)


def _sweep(draft: _Draft, name: str) -> Sweep:
    hosts = {host for _, _, host, _ in draft.ranks}
    # Rank lines of several processes of one rank each, built without MPI, are all rank 0: then nothing is known.
    numbers = [number for number, *_ in draft.ranks]
    whole = bool(numbers) and sorted(numbers) == list(range(len(numbers)))
    ranks = len(numbers) if whole else None
    kind, how = _kind(draft, ranks)
    return Sweep(
        line=draft.line,
        kind=kind,
        how=how,
        ranks=ranks,
        nodes=len(hosts) if whole else None,
        devices=tuple(dict.fromkeys(draft.ranks.values())),
        software=draft.software,
        rows=tuple(draft.rows),
    )


def _kind(draft: _Draft, ranks: int | None) -> tuple[CollectiveKind | None, str]:
    """The collective by the program's name, else by its operation and the ratio of bus to algorithm bandwidth."""
    if draft.program is not None:
        if draft.program in _PROGRAMS:
            return _PROGRAMS[draft.program], f"{draft.program}_perf"
        return None, f"{draft.program}_perf, which no table holds"
    rooted = any(root >= 0 for root in draft.roots)
    reduces = draft.redops - {"none"}
    if ranks is None or ranks < 3:
        return None, "not stated"
    if reduces and not rooted:
        wanted: tuple[tuple[CollectiveKind, float], ...] = (
            ("all_reduce", 2.0 * (ranks - 1) / ranks), ("reduce_scatter", (ranks - 1) / ranks),
        )  # fmt: skip
        largest = max(draft.rows, key=lambda row: row.algbw_bytes_per_s or 0.0)
        if largest.algbw_bytes_per_s and largest.busbw_bytes_per_s:
            ratio = largest.busbw_bytes_per_s / largest.algbw_bytes_per_s
            for kind, factor in wanted:
                if isclose(ratio, factor, rel_tol=0.03):
                    return kind, f"{'/'.join(sorted(reduces))}, busbw/algbw {ratio:.3g}"
    if rooted:
        return ("reduce", "root and operation") if reduces else ("broadcast", "root, no operation")
    return None, "not stated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """t = alpha + bytes / beta, least squares on the relative error; the errors that it leaves."""

    alpha_s: float
    beta_bytes_per_s: float
    median_error: float
    worst_error: float


def fit(seconds: dict[int, float]) -> Fit | None:
    """The line nearest to measured times, alpha >= 0; None for fewer than two sizes. O(sizes)."""
    if len(seconds) < 2:
        return None
    aa = ab = bb = ra = rb = 0.0
    for size, time in seconds.items():
        one, x = 1.0 / time, size / time
        aa, ab, bb, ra, rb = aa + one * one, ab + one * x, bb + x * x, ra + one, rb + x
    determinant = aa * bb - ab * ab
    alpha = (ra * bb - rb * ab) / determinant
    slope = (rb * aa - ra * ab) / determinant
    if alpha < 0.0:
        alpha, slope = 0.0, rb / bb
    if slope <= 0.0:
        return None
    errors = sorted(abs((alpha + slope * size) / time - 1.0) for size, time in seconds.items())
    middle = len(errors) // 2
    median = errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2
    return Fit(alpha_s=alpha, beta_bytes_per_s=1.0 / slope, median_error=median, worst_error=errors[-1])


def said_sweep(sweep: Sweep, name: str, collective: str | None, ranks: int | None, nodes: int | None) -> Sweep:
    """A run with what the user says of it where its log does not. InputError where the log says otherwise."""
    kind = next((known for known in get_args(CollectiveKind) if known == collective), None)
    if collective is not None and kind is None:
        known = ", ".join(get_args(CollectiveKind))
        raise InputError(f"--collective {collective}: write one of {known}{near(collective, get_args(CollectiveKind))}")
    for flag, stated, said in (
        ("--collective", sweep.kind, kind), ("--ranks", sweep.ranks, ranks), ("--nodes", sweep.nodes, nodes),
    ):  # fmt: skip
        if stated is not None and said is not None and stated != said:
            raise InputError(f"{name}:{sweep.line}: the log says {stated}; leave out {flag} {said}")
    return replace(
        sweep, kind=sweep.kind or kind, ranks=sweep.ranks or ranks, nodes=sweep.nodes or nodes,
        how=sweep.how if sweep.kind is not None or kind is None else "the command line",
    )  # fmt: skip
