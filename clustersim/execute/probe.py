"""probe(): what this host can do, measured in processes of its own: kernels, messages, collectives, shared cores.

A Probe holds plain tables; `profile_files` turns one into the profiles that predictions use. No torch here.
"""

from __future__ import annotations

import datetime
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from clustersim import files
from clustersim.errors import ClustersimError, ExecutionError
from clustersim.execute.launch import Launcher, cores, threads_per_rank
from clustersim.execute.probe_host import Identity, identity, sockets
from clustersim.execute.probe_samples import Among, DeviceProbe, Probe, Whole

QUICK_S, FULL_S = 110.0, 840.0
"""Seconds of measuring that a quick and a full probe may take; starting and writing come on top."""

# The parts of the time that is left when a job begins: kernels on the CPU of a host without a GPU, and with one; on the
# GPU; one rank alone. Several ranks at once share the rest.
_CPU, _CPU_BESIDE_GPU, _GPU, _ALONE = 0.65, 0.15, 0.8, 0.05
# A point that is running when the time is over is finished.
_MARGIN = 0.97


def probe(budget_s: float, ranks: Sequence[int], progress: Callable[[str], None], keep: Path | None = None) -> Probe:
    """Measure this host: one process per device, and `ranks` processes at once for each number in `ranks`.

    `budget_s` decides how fine the tables get: coarse points are measured first. A rank's threads are what the
    launcher gives it; kernel tables are measured with the threads of the largest number of ranks. `keep`: a folder
    where everything is written as soon as it is measured; what an interrupted probe of the same machine left there is
    used. Whoever called removes it when the result is safe. ExecutionError where nothing could be measured.
    """
    most = max(ranks, default=1)
    if most > 4 * cores() or min(ranks, default=1) < 1:
        asked = ", ".join(map(str, ranks))
        raise ExecutionError(f"ranks = {asked}: this host has {cores()} cores; probe 1 to {4 * cores()}")
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="clustersim-probe-") as name:
            return probe(budget_s, ranks, progress, Path(name))
    me = identity(tuple(sorted({1, *ranks})))
    _ready(keep, me, progress)
    begin = time.monotonic()
    with Launcher() as launcher:
        return _Probing(launcher, keep, me, begin, begin + _MARGIN * budget_s, progress).all(budget_s <= QUICK_S)


def _ready(folder: Path, me: Identity, progress: Callable[[str], None]) -> None:
    """Make `folder` hold measurements of this machine only."""
    path = folder / "identity.json"
    if path.exists():
        try:
            found: Identity = files.load(Identity, path)
            same = found == me
        except ClustersimError:
            same = False
        if same:
            progress("an interrupted profile of this machine goes on")
            return
        progress("an interrupted profile was of another machine; starting afresh")
        shutil.rmtree(folder)
    files.save(me, path)


class _Probing:
    """One probe on its way: its jobs, each with a part of what is left of the time."""

    def __init__(
        self, launcher: Launcher, folder: Path, me: Identity, begin_s: float, until_s: float,
        progress: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._launcher = launcher
        self._folder = folder
        self._me = me
        self._begin_s = begin_s
        self._until_s = until_s
        self._progress = progress

    def all(self, quick: bool) -> Probe:
        """Every job, and the whole."""
        base = threads_per_rank(max(self._me.ranks))
        self._progress(f"all {cores()} cores together")
        whole: Whole = self._job(Whole, "whole", "probe_cpu:measure_whole", 1, cores(), {})
        devices = self._devices(whole, base)
        among = []
        counts = [(1, base), *((count, threads_per_rank(count)) for count in self._me.ranks)]
        for number, (count, threads) in enumerate(counts):
            self._progress(f"{count} rank{'s' if count > 1 else ''} at once")
            # One rank has nobody to talk to: it takes a few seconds.
            after = sum(other > 1 for other, _ in counts[number:])
            until_s = self._part(1.0 / after if count > 1 else _ALONE)
            name = f"among-{number}-{count}"
            among.append(self._job(Among, name, "probe_among:measure_among", count, threads, {"until_s": until_s}))
        return Probe(
            date=datetime.date.today().isoformat(),
            quick=quick,
            took_s=time.monotonic() - self._begin_s,
            cpu=self._me.cpu,
            cores=self._me.cores,
            sockets=sockets(),
            memory_bytes=self._me.memory_bytes,
            reduce_bytes_per_s=whole.reduce_bytes_per_s,
            devices=devices,
            alone=among[0].shared,
            shared=tuple(one.shared for one in among[1:]),
            collectives=tuple(sample for one in among for sample in one.collectives),
            messages=next((one.messages for one in among if one.messages), ()),
        )

    def _part(self, share: float) -> float:
        """When a job has to end that gets `share` of the time that is left."""
        now = time.monotonic()
        return now + share * max(0.0, self._until_s - now)

    def _devices(self, whole: Whole, base: int) -> tuple[DeviceProbe, ...]:
        self._progress(f"kernels on the CPU, {base} thread{'s' if base > 1 else ''}")
        share = _CPU_BESIDE_GPU if whole.cuda else _CPU
        arguments = {"until_s": self._part(share), "record": str(self._folder / "cpu.jsonl")}
        cpu: DeviceProbe = self._job(DeviceProbe, "cpu", "probe_cpu:measure_cpu", 1, base, arguments)
        if base != cores():
            cpu = replace(cpu, gemm=(*cpu.gemm, *whole.gemm))
        if not whole.cuda:
            return (cpu,)
        self._progress("kernels on the GPU")
        arguments = {"until_s": self._part(_GPU), "record": str(self._folder / "gpu.jsonl")}
        gpu: DeviceProbe | None = self._job(
            DeviceProbe | None, "gpu", "probe_cuda:measure_cuda", 1, cores(), arguments, spawn=True
        )
        return (cpu,) if gpu is None else (cpu, gpu)

    def _job(
        self, kind: Any, name: str, function: str, ranks: int, threads: int, arguments: Mapping[str, Any],
        spawn: bool = False,
    ) -> Any:  # fmt: skip
        """What one job found; a job that has finished before is not repeated. One with a record of points is: it goes
        on with those that its time did not suffice for."""
        out = self._folder / f"{name}.json"
        if "record" in arguments:
            out.unlink(missing_ok=True)
        elif out.exists():
            try:
                return files.load(kind, out)
            except ClustersimError as error:
                self._progress(f"measured again, what an interrupted profile left cannot be read: {error}")
        with _own_folder(self._folder / name) as folder:
            self._launcher.run(
                f"clustersim.execute.{function}", ranks=ranks, folder=folder, progress=self._progress,
                threads=threads, spawn=spawn, arguments={**arguments, "out": str(out)},
            )  # fmt: skip
        return files.load(kind, out)


@contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    """Where the ranks of one job meet; nothing of an earlier try may be in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)
