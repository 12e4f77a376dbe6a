"""What predictions are off by, by kind of case: `hwprofiles/intervals.yaml`, recorded from the validation set."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

from clustersim.files import load, profile_folders
from clustersim.hardware.calibration import Calibration
from clustersim.hardware.provenance import Provenance
from clustersim.units import FILE, Fraction, Positive

LEVEL = 0.9
# What decides the error of a prediction, most general first. A kind's parents are its beginnings.
Feature = Literal[
    "measured kernels", "roofline kernels", "unfused attention", "fused layers", "flash attention", "cpu ranks",
    "one node", "several nodes",
]  # fmt: skip
Kind = tuple[Feature, ...]
# Student's t at 95 %, by degrees of freedom from 1.
_T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860)
# Fewer left-out errors than these say nothing about their spread.
FEWEST_LEFT_OUT = 3


class Outside(StrEnum):
    """Ways in which a prediction leaves what the profiles cover, or what any validated run covers."""

    roofline_device = "device priced by its datasheet"
    few_measured_kernels = "less than 80 % of the kernel time is measured"
    extrapolated_kernels = "kernels beyond twice the measured sizes"
    unmeasured_collectives = "collectives in a node that nobody measured"
    estimated_framework = "framework constants are estimates"
    calibrated_on_one_node = "calibrated on one node only"
    calibrated_on_several_nodes = "calibrated on several nodes only"
    unvalidated_kind = "no validated run of this kind"
    unvalidated_scheme = "no validated run divides the work like this"
    more_ranks = "more ranks than in any validated run"
    memory_nearly_full = "memory within 5 % of the device's"
    memory_beyond = "memory beyond the device's, by prediction"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Where a measured time lies with 90 %: `low` to `high` times the predicted one. `ratio`: within so much (of a
    logarithm) of each other, two layouts of one model, cluster and batch cannot be told apart; within `repeats`, two
    runs of one configuration. `kind`: whose residuals these are, and how many."""

    low: float
    high: float
    ratio: float
    repeats: float
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KindBand:
    """Residuals of a kind. `low` and `high` hold 90 % of measured / predicted over its rows, sources weighted alike up
    to a cap; the interval is wider by the margin of all kinds with such kernels."""

    __pydantic_config__: ClassVar[Any] = FILE
    kind: tuple[Feature, ...]
    rows: int
    sources: tuple[str, ...]
    low: Positive
    high: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResiduals:
    """Residuals of all predictions whose kernels have one origin.

    `margin`: the factor by which bands must be widened on either side to hold 90 % of the rows of a source that they
    were built without. `ratio`: 90 % of the `pairs` of layouts of one model, cluster and batch (of `groups` of layouts)
    were apart by the predicted factor, give or take this one. `left_out`: per source, the share of its rows inside
    intervals that were built without it; `ratio_left_out`: of its pairs.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    margin: Positive
    ratio: Positive
    groups: int
    pairs: int
    ratio_sources: tuple[str, ...]
    kinds: tuple[KindBand, ...]
    left_out: dict[str, Fraction]
    ratio_left_out: dict[str, Fraction]


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """`hwprofiles/intervals.yaml`. `repeats`: two runs of one configuration differ by no more than this factor, in 90 %
    of cases; `noisy` sources repeat worse than 10 % and are left out. From runs of `learned` sources shipped constants
    took something. `schemes` and `most_ranks`: what validated runs reach."""

    __pydantic_config__: ClassVar[Any] = FILE
    schema_version: Literal[1] = 1
    measured: KernelResiduals
    roofline: KernelResiduals
    repeats: Positive
    noisy: dict[str, Fraction]
    learned: tuple[str, ...] = ()
    most_ranks: int
    schemes: tuple[str, ...]
    provenance: Provenance

    def residuals(self, kind: Kind) -> KernelResiduals:
        """The residuals of predictions with this kind's kernels."""
        return self.measured if kind[0] == "measured kernels" else self.roofline

    def band(self, kind: Kind) -> KindBand:
        """The band of a kind, or of the nearest parent that has one."""
        known = {band.kind: band for band in self.residuals(kind).kinds}
        return next(known[kind[:size]] for size in range(len(kind), 0, -1) if kind[:size] in known)

    def interval(self, kind: Kind, calibration: Calibration | None = None) -> Interval:
        """The 90 % interval of a kind of case; of a calibrated cluster, from its own left-out errors, where enough of
        these are of this kind.

        Fewer runs were predicted without tables than with them, and who knows less must not be surer: the interval of
        a kind with roofline kernels holds that of the same kind with measured ones.
        """
        kinds: set[Kind] = {kind, ("measured kernels", *kind[1:])}
        band, repeats = self.band(kind), math.log(self.repeats)
        ratio = max(repeats, *(math.log(self.residuals(each).ratio) for each in kinds))
        own = None if calibration is None else left_out_spread(calibration, kind)
        if own is not None:
            half = max(repeats, own)
            # Two errors that have nothing in common.
            ratio = max(repeats, min(ratio, math.sqrt(2.0) * half))
            count = len(_left_out(calibration, kind)) if calibration is not None else 0
            return Interval(low=math.exp(-half), high=math.exp(half), ratio=ratio, repeats=repeats,
                            kind=f"calibrated: {count} left-out configurations")  # fmt: skip
        low = min(-repeats, *(math.log(self.band(each).low / self.residuals(each).margin) for each in kinds))
        high = max(repeats, *(math.log(self.band(each).high * self.residuals(each).margin) for each in kinds))
        return Interval(low=math.exp(low), high=math.exp(high), ratio=ratio, repeats=repeats,
                        kind=f"{', '.join(band.kind)}: {band.rows} rows")  # fmt: skip


def _left_out(calibration: Calibration, kind: Kind | None) -> tuple[float, ...]:
    """The left-out errors of its rows of this kind: on one node or on several, where the kind tells these apart."""
    several = None if kind is None or not {"one node", "several nodes"} & set(kind) else "several nodes" in kind
    return calibration.left_out(several_nodes=several)


def left_out_spread(calibration: Calibration, kind: Kind | None = None) -> float | None:
    """Half the 90 % interval of ln(measured / predicted) on a calibrated cluster, from the errors of the configurations
    of this kind that each fit left out: from nine of them on the split-conformal quantile (Lei et al. 2018), of fewer
    Student's prediction interval about 0; None of fewer than three, which a calibration of another kind has."""
    errors = sorted(_left_out(calibration, kind))
    count = len(errors)
    if count < FEWEST_LEFT_OUT:
        return None
    if count > len(_T95):
        return errors[math.ceil((count + 1) * LEVEL - 1e-9) - 1]
    mean_square = sum(error * error for error in errors) / count
    return _T95[count - 1] * math.sqrt(mean_square * (1.0 + 1.0 / count))


def load_intervals() -> Intervals:
    """The nearest `intervals.yaml`; read once for each file and time of change."""
    path = next(path for root in profile_folders() if (path := root / "intervals.yaml").is_file())
    return _read(str(path.resolve()), path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read(path: str, changed_ns: int) -> Intervals:
    found: Intervals = load(Intervals, Path(path))
    return found


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Shares with three decimals, sorted by name: what a file needs."""
    return {name: round(value, 3) for name, value in sorted(values.items())}
