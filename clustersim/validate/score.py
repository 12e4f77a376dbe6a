"""What is predicted of a case, beside what was measured."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.estimate.estimate import estimate
from clustersim.hardware.framework import Framework
from clustersim.hardware.intervals import Kind, Outside
from clustersim.layout.illegal import why_illegal
from clustersim.layout.layout import Layout, describe
from clustersim.layout.memory import footprint
from clustersim.layout.space import layouts
from clustersim.program.lower import lower
from clustersim.scenario.load import question
from clustersim.scenario.question import Question
from clustersim.search.kind import interval_of, kind_of, outside_of, schemes_of
from clustersim.search.search import choices_of
from clustersim.simulate.simulate import simulate
from clustersim.validate.case import Case, Unmapped
from clustersim.validate.memory import DeviceUse

# Where keys of a layout have another name in files of rows.
_COLUMNS = {"micro_batch": "mbs", "virtual_stages": "vpp", "sequence_parallel": "sp", "sharded_stage": "shard"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A case with its prediction, and the 90 % interval of its kind; `outside`: in what it leaves the profiles and the
    validated runs; `coverage`: measured fraction of kernel time; `predicted_bytes`: memory of the fullest worker,
    of the level that the source states, `fits`: whether the layout is called feasible, `headroom`: how far below the
    capacity its need stays, relative to it. `devices`: their profiles, `schemes`: how the work is divided."""

    case: Case
    layout: str
    predicted_s: float
    low_s: float
    high_s: float
    coverage: float
    predicted_bytes: float
    fits: bool
    headroom: float = 1.0
    kind: Kind = ()
    outside: tuple[Outside, ...] = ()
    devices: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    ranks: int = 1

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted_s / self.case.measured_s - 1.0

    @property
    def covered(self) -> bool:
        """Whether the measured time lies in the 90 % interval."""
        return self.low_s <= self.case.measured_s <= self.high_s


def asked(case: Case, *, calibrated: bool = False) -> tuple[Question, Layout, DeviceUse, float]:
    """(question, layout, memory, coverage) of a case; ClustersimError where the product refuses it. What the row leaves
    open (stage boundaries) is as fast as fits. `calibrated`: with the user's calibration, where there is one."""
    found = question(case.scenario, case.id, calibrated=calibrated)
    space = layouts(found.workload, found.cluster, found.framework, choices_of(found))
    if not len(space):
        raise illegal(found)
    estimated = estimate(found.workload, space, found.cluster, found.framework)
    capacity = min(m.device.memory_bytes for m in found.cluster.workers if m.device is not None)
    held = footprint(found.workload, space, found.framework)
    fits = held.worker <= capacity
    row = int(np.argmin(np.where(fits | ~fits.any(), estimated.step_s, np.inf)))
    memory = DeviceUse.of(held, row, capacity)
    return found, space.layout(row), memory, float(estimated.coverage[row])


def illegal(found: Question) -> ClustersimError:
    """Why the layout of a row is not legal: the column to blame, and the equation that it breaks."""
    choices, batch = choices_of(found), found.workload.training.global_batch
    dp, size = choices.dp or 1, choices.micro_batch or 1
    # Rows fix all degrees, so that none of them can be blamed for what several break together.
    if batch < dp or -(-batch // dp) < size:
        rest = f"tp {choices.tp or 1} * pp {choices.pp or 1} * cp {choices.cp or 1}"
        why = f"gbs = {batch} has fewer samples than dp {dp} * mbs {size}; dp = gpus {found.cluster.devices} / ({rest})"
    elif (choices.sharded_stage or 1) > 1 and (choices.pp or 1) > 1:
        why = f"shard = ZeRO-{choices.sharded_stage}: only ZeRO-1 has a pipeline, and pp = {choices.pp}"
    elif (wrong := why_illegal(found.workload, found.cluster, found.framework, choices)) is not None:
        # What to write instead is said for searches; a row tells what ran.
        why = f"{_COLUMNS.get(wrong[0], wrong[0])} = {wrong[1].partition('; write ')[0]}"
    else:
        why = "no one of its degrees is to blame alone"
    return ClustersimError(f"the layout is not legal here: {why}")


def score(
    case: Case, framework: Callable[[Framework], Framework] | None = None, *, calibrated: bool = False
) -> Scored | Unmapped:
    """Predict one case as shipped, or with the user's calibrations (`calibrated`). `framework` may replace constants
    of the framework besides (a fit, an ablation)."""
    try:
        found, layout, memory, coverage = asked(case, calibrated=calibrated)
        software = found.framework if framework is None else framework(found.framework)
        program = lower(found.workload, layout, software, found.cluster.devices_per_node)
        step = simulate(program, found.cluster, software).step_s
    except ClustersimError as error:
        return Unmapped(id=case.id, line=case.line, reason=str(error).removeprefix(f"{case.id}: "))
    interval = interval_of(found)
    # What the run kept elsewhere is not known to be on the device.
    kept = 0.0 if case.kept_elsewhere else memory.needed
    return Scored(
        case=case, layout=describe(layout), predicted_s=step, low_s=step * interval.low, high_s=step * interval.high,
        coverage=coverage, predicted_bytes=memory.at(case.memory_level), fits=memory.fits, headroom=memory.headroom,
        kind=kind_of(found),
        outside=outside_of(found, layout, program, memory_bytes=kept, coverage=coverage),
        devices=tuple(machine.device.name for machine in found.cluster.workers if machine.device is not None),
        schemes=schemes_of(layout), ranks=found.cluster.devices,
    )  # fmt: skip


def score_all(
    cases: Sequence[Case], tell: Callable[[str], None], *, calibrated: bool = False
) -> Iterator[Scored | Unmapped]:
    """Predict all cases, on all cores; in order. Progress goes to `tell`."""
    each = functools.partial(score, calibrated=calibrated)
    workers = min(os.cpu_count() or 1, max(1, len(cases) // 8))
    begun = time.perf_counter()
    if workers == 1:
        results: Iterable[Scored | Unmapped] = map(each, cases)
        yield from _told(results, len(cases), begun, tell)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from _told(pool.map(each, cases, chunksize=4), len(cases), begun, tell)


def _told(
    results: Iterable[Scored | Unmapped], count: int, begun: float, tell: Callable[[str], None]
) -> Iterator[Scored | Unmapped]:
    for number, result in enumerate(results, start=1):
        tell(f"{number} of {count} runs predicted, {time.perf_counter() - begun:.0f} s")
        yield result
