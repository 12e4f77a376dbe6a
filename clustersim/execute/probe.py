"""probe(): what this host can do, measured in processes of its own: kernels, messages, collectives, shared cores.

A Probe holds plain tables; `profile_files` turns one into the profiles that predictions use. No torch here.
"""

from __future__ import annotations

import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from clustersim import files
from clustersim.errors import ExecutionError
from clustersim.execute.launch import Launcher, cores, threads_per_rank
from clustersim.hardware.curve import CollectiveKind
from clustersim.hardware.kernel import Dtype, MemoryOp

PLAIN: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """The median of `samples` timings, and the distance between their quartiles over the median."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    seconds: float
    spread: float
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmSample:
    """A product (m, k) by (k, n), as a linear layer calls it, with `threads` threads (0: on a GPU)."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    dtype: Dtype
    m: int
    n: int
    k: int
    threads: int
    time: Timed


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSample:
    """Causal scaled-dot-product attention, forward and backward; `group` is heads over kv_heads."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    dtype: Dtype
    instances: int
    sequence: int
    group: int
    head_dim: int
    forward: Timed
    backward: Timed


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample:
    """A memory-bound operation by the bytes that it reads and writes; forward and backward are averaged."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    op: MemoryOp
    bytes: int
    time: Timed


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySample:
    """A copy between host and device memory, or within a device's."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    direction: Literal["host-to-device", "device-to-host", "device-to-device"]
    bytes: int
    time: Timed


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSample:
    """A GPT of `layers` layers, one micro-batch of `tokens` tokens in sequences of `sequence`: forward, backward, and
    the optimizer's step. Small ones take what the host takes to drive them."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    layers: int
    hidden: int
    heads: int
    tokens: int
    sequence: int
    dtype: Dtype
    forward: Timed
    backward: Timed
    update: Timed


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProbe:
    """One device. `threads` it computed with (0: a GPU); `floor_s` is the time of the smallest kernel, `launch_s` what
    the host spends to launch one. `software` says driver, clocks, libraries."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    kind: Literal["cpu", "gpu"]
    name: str
    memory_bytes: int
    threads: int
    floor_s: float
    launch_s: float
    power_w: float
    software: dict[str, str]
    gemm: tuple[GemmSample, ...]
    attention: tuple[AttentionSample, ...]
    memory: tuple[MemorySample, ...]
    copies: tuple[CopySample, ...]
    layers: tuple[LayerSample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveSample:
    """A gloo collective among `ranks` processes of this host."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    collective: CollectiveKind
    ranks: int
    bytes: int
    time: Timed


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageSample:
    """Two processes send each other `bytes` at once."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    bytes: int
    time: Timed


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSample:
    """`ranks` processes at once, each with `threads` threads, each running the same small model; the slowest's time.
    `call_s`: what starting one collective takes of the caller's time (0 with one rank)."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    ranks: int
    threads: int
    layer: Timed
    call_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was measured on one host. `reduce_bytes_per_s`: all cores adding gradients, bytes of input a second.
    `alone`: one rank with as many threads as the kernel tables were measured with; `shared`: 1, 2, ... ranks."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    schema_version: Literal[1] = 1
    date: str
    quick: bool
    took_s: float
    cpu: str
    cores: int
    sockets: int
    memory_bytes: int
    reduce_bytes_per_s: float
    devices: tuple[DeviceProbe, ...]
    alone: SharedSample
    shared: tuple[SharedSample, ...]
    collectives: tuple[CollectiveSample, ...]
    messages: tuple[MessageSample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Among:
    """What ranks measured together."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    shared: SharedSample
    collectives: tuple[CollectiveSample, ...]
    messages: tuple[MessageSample, ...]


def probe(quick: bool, ranks: Sequence[int], progress: Callable[[str], None]) -> Probe:
    """Measure this host: one process per device, and `ranks` processes at once for each number in `ranks`.

    `quick`: coarser tables, in about a quarter of the time. A rank's threads are what the launcher gives it; kernel
    tables are measured with the threads of the largest number of ranks.
    """
    most, begin = max(ranks, default=1), time.monotonic()
    if most > 4 * cores() or min(ranks, default=1) < 1:
        asked = ", ".join(map(str, ranks))
        raise ExecutionError(f"ranks = {asked}: this host has {cores()} cores; probe 1 to {4 * cores()}")
    with tempfile.TemporaryDirectory(prefix="clustersim-probe-") as name, Launcher() as launcher:
        folder = Path(name)

        def job(function: str, count: int, threads: int, spawn: bool = False) -> Path:
            out = folder / "out.json"
            launcher.run(
                f"clustersim.execute.{function}",
                ranks=count,
                folder=folder,
                progress=progress,
                threads=threads,
                spawn=spawn,
                arguments={"quick": quick, "out": str(out)},
            )
            return out

        base = threads_per_rank(most)
        progress(f"kernels on the CPU, {base} thread{'s' if base > 1 else ''}")
        devices: list[DeviceProbe] = [files.load(DeviceProbe, job("probe_cpu:measure_cpu", 1, base))]
        progress(f"all {cores()} cores together")
        whole: Whole = files.load(Whole, job("probe_cpu:measure_whole", 1, cores()))
        devices[0] = replace(devices[0], gemm=(*devices[0].gemm, *(whole.gemm if base != cores() else ())))
        if whole.cuda:
            progress("kernels on the GPU")
            gpu: DeviceProbe | None = files.load(
                DeviceProbe | None, job("probe_cuda:measure_cuda", 1, cores(), spawn=True)
            )
            devices += [gpu] if gpu is not None else []
        among: list[Among] = []
        for count, threads in ((1, base), *((count, threads_per_rank(count)) for count in sorted({1, *ranks}))):
            progress(f"{count} rank{'s' if count > 1 else ''} at once")
            (folder / "store").unlink(missing_ok=True)
            among.append(files.load(Among, job("probe_cpu:measure_among", count, threads)))
    return Probe(
        date=datetime.date.today().isoformat(),
        quick=quick,
        took_s=time.monotonic() - begin,
        cpu=_cpu_name(),
        cores=cores(),
        sockets=_sockets(),
        memory_bytes=devices[0].memory_bytes,
        reduce_bytes_per_s=whole.reduce_bytes_per_s,
        devices=tuple(devices),
        alone=among[0].shared,
        shared=tuple(one.shared for one in among[1:]),
        collectives=tuple(sample for one in among for sample in one.collectives),
        messages=next((one.messages for one in among if one.messages), ()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What all cores do together, and whether torch can use GPUs."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    reduce_bytes_per_s: float
    gemm: tuple[GemmSample, ...]
    cuda: bool


def _cpu_info(key: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def _cpu_name() -> str:
    return next(iter(_cpu_info("model name")), platform.processor() or platform.machine())


def _sockets() -> int:
    return max(1, len(set(_cpu_info("physical id"))))


def host_memory_bytes() -> int:
    """Memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
