"""record(): the residuals of the validation set, by kind of case, as the intervals of later predictions."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clustersim import __version__, files
from clustersim.hardware.conformal import CAP, LEAST_SOURCES, band, beyond, quantile
from clustersim.hardware.cost import load_device
from clustersim.hardware.device import DeviceTables
from clustersim.hardware.intervals import LEVEL, Intervals, KernelResiduals, Kind, KindBand, rounded
from clustersim.hardware.provenance import Provenance
from clustersim.validate.board import Scores
from clustersim.validate.case import Case
from clustersim.validate.configurations import configuration
from clustersim.validate.family import Family
from clustersim.validate.score import Scored, score_all

Floats = NDArray[np.float64]
Bands = dict[Kind, tuple[float, float]]
# Where more than one repeat in ten of a configuration is further than this from their median, a source measures its
# machine's mood: repeats elsewhere are within 0.05 to 9 %.
_NOISY = 0.10
# So many rows of a family say what happens without kernel tables: about as many as a source counts for.
_WITHOUT_TABLES = CAP


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """ln(measured / predicted) of a row of `source`; rows of a `group` are layouts of one model, cluster and batch."""

    source: str
    kind: Kind
    group: str
    layout: str
    value: float


def source_of(family: Family, case: Case) -> str:
    """What is left out together: a publisher's runs on one kind of node. The publisher stands first in `source`."""
    publisher = family.source.split(",")[0].split(" (")[0]
    return f"{publisher} on {'+'.join(case.scenario['cluster']['nodes'])}"


def some_of(cases: Sequence[Case], count: int) -> list[Case]:
    """About `count` of the cases, evenly over them, by whole groups: pairs within a group stay together."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.group].append(case)
    every = max(1, math.ceil(len(cases) / count))
    return [case for group in list(groups.values())[::every] for case in group]


def record(scores: Sequence[Scores], tell: Callable[[str], None]) -> Intervals:
    """The intervals that these scored families support. Predicts some of their rows again without kernel tables: under
    a minute. Families that are files of the user's are left alone."""
    shipped = [(found.family, each) for found in scores if found.family is not None for each in found.scored]
    spreads = repeat_spreads((source_of(family, each.case), each.case) for family, each in shipped)
    noisy = {source: math.expm1(_upper(units)) for source, units in spreads.items() if _upper(units) > _NOISY}
    kept = [(family, each) for family, each in shipped if source_of(family, each.case) not in noisy]
    repeats = quantile({source: units for source, units in spreads.items() if source not in noisy}, LEVEL)
    bare = _without_tables(scores, set(noisy), tell)
    schemes = sorted({name for _, each in kept for name in each.schemes})
    return Intervals(
        measured=summarised(_residuals(kept)),
        roofline=summarised(_residuals(bare)),
        repeats=round(math.exp(repeats), 4),
        noisy=rounded(noisy),
        learned=tuple(sorted({source_of(family, each.case) for family, each in kept if family.learned})),
        most_ranks=max(each.ranks for _, each in kept),
        schemes=tuple(schemes),
        provenance=Provenance(
            method="fitted", source="the published runs of validation/, predicted as shipped",
            software=f"clustersim {__version__}", date=datetime.date.today().isoformat(), rows=len(kept),
            notes="written by `python benchmarks/intervals.py`; docs/accuracy.md says how",
        ),
    )  # fmt: skip


def _upper(units: Sequence[Floats]) -> float:
    return float(np.quantile(np.concatenate(units), LEVEL))


def repeat_spreads(cases: Iterable[tuple[str, Case]]) -> dict[str, list[Floats]]:
    """Per source, for every configuration that was run more than once: how far (in logarithms) its measured times lie
    from their median."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for source, case in cases:
        found[source, configuration(case)].append(math.log(case.measured_s))
    result: dict[str, list[Floats]] = defaultdict(list)
    for (source, _), times in found.items():
        if len(times) > 1:
            result[source].append(np.abs(np.array(times) - np.median(times)))
    return dict(result)


def _residuals(rows: Iterable[tuple[Family, Scored]]) -> list[Residual]:
    result = []
    for family, each in rows:
        result.append(
            Residual(
                source=source_of(family, each.case), kind=each.kind, group=each.case.group, layout=each.layout,
                value=math.log(each.case.measured_s / each.predicted_s),
            )
        )  # fmt: skip
    return result


# ------------------------------------------------------------------------------------------------- what they support


def summarised(residuals: Sequence[Residual]) -> KernelResiduals:
    """Bands by kind, the margin that sources which were left out ask for, and what pairs of layouts were apart."""
    bands = bands_of(residuals)
    pairs = pairs_of(residuals)
    sources = sorted({row.source for row in residuals})
    left_out, ratio_left_out = {}, {}
    for source in sources:
        others = [row for row in residuals if row.source != source]
        mine = [row for row in residuals if row.source == source]
        wider, known = margin_of(others), bands_of(others)
        outside = [float(beyond(np.array([row.value]), nearest(known, row.kind))[0]) for row in mine]
        left_out[source] = float(np.mean(np.array(outside) <= wider))
        apart = {other: units for other, units in pairs.items() if other != source}
        if source in pairs and apart:
            limit = quantile(apart, LEVEL)
            ratio_left_out[source] = float(np.mean(np.concatenate(pairs[source]) <= limit))
    return KernelResiduals(
        margin=round(math.exp(margin_of(residuals)), 4),
        ratio=round(math.exp(quantile(pairs, LEVEL)), 4),
        groups=sum(map(len, pairs.values())),
        pairs=sum(len(unit) for units in pairs.values() for unit in units),
        ratio_sources=tuple(sorted(pairs)),
        kinds=tuple(
            KindBand(
                kind=kind, rows=sum(row.kind[: len(kind)] == kind for row in residuals),
                sources=tuple(sorted({row.source for row in residuals if row.kind[: len(kind)] == kind})),
                low=round(math.exp(low), 4), high=round(math.exp(high), 4),
            )
            for kind, (low, high) in sorted(bands.items())
        ),
        left_out=rounded(left_out),
        ratio_left_out=rounded(ratio_left_out),
    )  # fmt: skip


def bands_of(residuals: Sequence[Residual]) -> Bands:
    """The 90 % band of every kind with enough rows and sources, and of the most general ones in any case."""
    found: dict[Kind, dict[str, list[Floats]]] = defaultdict(lambda: defaultdict(list))
    for row in residuals:
        for size in range(1, len(row.kind) + 1):
            found[row.kind[:size]][row.source].append(np.array([row.value]))
    return {
        kind: band(sources, LEVEL)
        for kind, sources in found.items()
        if len(kind) == 1 or (len(sources) >= LEAST_SOURCES and sum(map(len, sources.values())) >= CAP)
    }


def nearest(bands: Bands, kind: Kind) -> tuple[float, float]:
    """The band of a kind or of its nearest parent that has one."""
    return next(bands[kind[:size]] for size in range(len(kind), 0, -1) if kind[:size] in bands)


def margin_of(residuals: Sequence[Residual]) -> float:
    """What bands must be widened by (in logarithms) to hold 90 % of the rows of sources they were built without; 0 of
    one source alone."""
    scores: dict[str, list[Floats]] = {}
    sources = sorted({row.source for row in residuals})
    if len(sources) < LEAST_SOURCES:
        return 0.0
    for source in sources:
        known = bands_of([row for row in residuals if row.source != source])
        mine = [row for row in residuals if row.source == source]
        scores[source] = [beyond(np.array([row.value]), nearest(known, row.kind)) for row in mine]
    return max(0.0, quantile(scores, LEVEL))


def pairs_of(residuals: Sequence[Residual]) -> dict[str, list[Floats]]:
    """Per source, for every group of layouts: by how much (in logarithms) the errors of two of them differ."""
    groups: dict[tuple[str, str], list[Residual]] = defaultdict(list)
    for row in residuals:
        groups[row.source, row.group].append(row)
    result: dict[str, list[Floats]] = defaultdict(list)
    for (source, _), rows in sorted(groups.items()):
        apart = [abs(one.value - two.value) for one, two in combinations(rows, 2) if one.layout != two.layout]
        if apart:
            result[source].append(np.array(apart))
    return dict(result)


# -------------------------------------------------------------------------------------------------- without tables


def _without_tables(
    scores: Sequence[Scores], noisy: set[str], tell: Callable[[str], None]
) -> list[tuple[Family, Scored]]:
    """Some rows of every family, evenly over it, predicted as if nobody had measured their devices."""
    result: list[tuple[Family, Scored]] = []
    names = {name for found in scores for each in found.scored for name in each.devices}
    with _bare_devices(names):
        for found in scores:
            family = found.family
            if family is None:
                continue
            cases = [each.case for each in found.scored if source_of(family, each.case) not in noisy]

            def say(text: str, name: str = family.name) -> None:
                tell(f"{name}, without tables: {text}")

            some = some_of(cases, _WITHOUT_TABLES)
            result += [(family, each) for each in score_all(some, say) if isinstance(each, Scored)]
    return result


@contextlib.contextmanager
def _bare_devices(names: Iterable[str]) -> Iterator[None]:
    """A working folder whose device profiles have no tables: profiles of the working folder come first."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(names):
            bare = replace(load_device(name), tables=DeviceTables())
            files.save(bare, Path(folder) / "hwprofiles" / "devices" / f"{name}.yaml")
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
