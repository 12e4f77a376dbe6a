"""What a probe measures on CPUs: kernels on one rank, and all cores together."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

from clustersim import files
from clustersim.execute import kernels
from clustersim.execute.probe_clocks import cpu_clocks
from clustersim.execute.probe_grid import cpu_points
from clustersim.execute.probe_host import host_memory_bytes
from clustersim.execute.probe_samples import (
    AttentionPoint,
    CopyPoint,
    DeviceProbe,
    GemmPoint,
    LayerPoint,
    MemoryPoint,
    Point,
    Sample,
    SustainedPoint,
    SustainedSample,
    Whole,
)
from clustersim.execute.probe_session import RefusedPoint, measure_points
from clustersim.execute.timing import summary, timed

_CPU = torch.device("cpu")
_BUDGET_S = 0.04
# Seconds of the sustained run in a short and in a long probe, and what is short.
_SUSTAINED_S, _SHORT_S = (2.0, 4.0), 150.0


class CpuDevice:
    """One rank on this host's cores, with the threads that torch has here."""

    def measure(self, point: Point) -> tuple[Sample, ...]:
        """Time what `point` asks."""
        match point:
            case GemmPoint():
                return (kernels.gemm(point, _CPU, timed, _BUDGET_S, torch.get_num_threads()),)
            case AttentionPoint():
                return (kernels.attention(point, _CPU, timed, _BUDGET_S),)
            case MemoryPoint():
                return kernels.memory(point, _CPU, timed, _BUDGET_S / 2)
            case LayerPoint():
                return (kernels.layer(point, _CPU, timed, 10 * _BUDGET_S),)
            case SustainedPoint():
                return (_sustained(point),)
            case CopyPoint():
                raise RefusedPoint("a CPU has no memory but the host's")


def _sustained(point: SustainedPoint) -> SustainedSample:
    """The rate after a pause, and the median rate of the second half of a run without one."""
    a, b = torch.randn(point.side, point.side), torch.randn(point.side, point.side)

    def run() -> None:
        torch.mm(a, b)

    run()
    time.sleep(0.5)
    burst = timed(run, 0.1, 10)
    begin, moments = time.perf_counter(), [time.perf_counter()]
    while moments[-1] - begin < point.seconds:
        run()
        moments.append(time.perf_counter())
    half = len(moments) // 2
    late = summary([after - before for before, after in zip(moments[half:-1], moments[half + 1 :], strict=True)])
    flops = 2.0 * point.side**3
    return SustainedSample(
        dtype=point.dtype, side=point.side, seconds=point.seconds, burst_flops=flops / burst.seconds,
        sustained_flops=flops / late.seconds, spread=max(burst.spread, late.spread),
    )  # fmt: skip


def measure_cpu(
    *, rank: int, ranks: int, folder: Path, tell: Callable[[str], None], until_s: float, record: str, out: str
) -> None:
    """Kernels on one rank that has the host to itself, with the threads that the launcher gave it, until
    time.monotonic() reaches `until_s`."""
    before = cpu_clocks()
    points = cpu_points(_SUSTAINED_S[until_s - time.monotonic() > _SHORT_S])
    floor = timed(lambda: torch.ones(8).add_(1.0), 0.05).seconds
    found = measure_points(
        CpuDevice(), points.order, needed=points.needed, until_s=until_s, record=Path(record), now=time.monotonic,
        tell=tell,
    )  # fmt: skip
    probe = DeviceProbe(
        kind="cpu",
        name=platform.machine(),
        memory_bytes=host_memory_bytes(),
        threads=torch.get_num_threads(),
        floor_s=floor,
        launch_s=0.0,  # A CPU's kernels run in the thread that calls them: their times hold all of it.
        power_w=0.0,
        software={"torch": torch.__version__, "python": platform.python_version()},
        before=before,
        after=cpu_clocks(),
        missed=found.missed_by_kind,
        refused=found.refusals,
        gemm=found.gemm,
        attention=found.attention,
        memory=found.memory,
        copies=(),
        layers=found.layers,
        sustained=found.sustained,
    )
    files.save(probe, out)


def measure_whole(*, rank: int, ranks: int, folder: Path, tell: Callable[[str], None], out: str) -> None:
    """All cores together: adding gradients, and some products."""
    n = 2**24
    total, pushed = torch.zeros(n), torch.ones(n)
    added = timed(lambda: total.add_(pushed), 0.5)
    threads = torch.get_num_threads()
    shapes = product((128, 1024), (256, 1024), (256, 1024))
    points = [GemmPoint(dtype="fp32", m=m, n=n, k=k) for m, n, k in shapes]
    whole = Whole(
        reduce_bytes_per_s=n * total.element_size() / added.seconds,
        gemm=tuple(kernels.gemm(point, _CPU, timed, 0.02, threads) for point in points),
        cuda=torch.version.cuda is not None,
    )
    files.save(whole, out)
