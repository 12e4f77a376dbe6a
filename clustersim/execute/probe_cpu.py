"""What the ranks of a probe measure on CPUs: kernels alone, all cores together, several ranks at once, gloo."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from clustersim import files
from clustersim.execute import kernels
from clustersim.execute.gpt import Gpt
from clustersim.execute.probe import (
    Among,
    CollectiveSample,
    DeviceProbe,
    MessageSample,
    SharedSample,
    Whole,
    host_memory_bytes,
)
from clustersim.execute.timing import summary, timed
from clustersim.hardware.curve import CollectiveKind
from clustersim.hardware.kernel import Dtype

_CPU = torch.device("cpu")
_TIMEOUT_S = 60.0
# The layer that ranks run at once: big enough for its operands to leave the caches, small enough for many repeats.
_SHARED_HIDDEN, _SHARED_TOKENS, _SHARED_SEQUENCE = 256, 512, 128


def measure_cpu(*, rank: int, ranks: int, folder: Path, tell: Callable[[str], None], quick: bool, out: str) -> None:
    """Kernels on one rank that has the host to itself, with the threads that the launcher gave it."""
    threads = torch.get_num_threads()
    budget = 0.02 if quick else 0.06
    gemm = kernels.gemm(_gemm_grid(quick), "fp32", _CPU, timed, budget, threads)
    few: tuple[Dtype, ...] = ("bf16", "fp64")
    for dtype in few:
        gemm += kernels.gemm(_gemm_few(quick), dtype, _CPU, timed, budget, threads)
    floor = timed(lambda: torch.ones(8).add_(1.0), 0.05).seconds
    probe = DeviceProbe(
        kind="cpu",
        name=platform.machine(),
        memory_bytes=host_memory_bytes(),
        threads=threads,
        floor_s=floor,
        launch_s=0.0,  # A CPU's kernels run in the thread that calls them: their times hold all of it.
        power_w=0.0,
        software={"torch": torch.__version__, "python": platform.python_version()},
        gemm=tuple(gemm),
        attention=tuple(kernels.attention(_attention_grid(quick), "fp32", _CPU, timed, budget)),
        memory=tuple(kernels.memory(_memory_sizes(quick), "fp32", _CPU, timed, budget / 2)),
        copies=(),
        layers=tuple(kernels.layer(*shape, "fp32", _CPU, timed, 10 * budget) for shape in _models(quick)),
    )
    files.save(probe, out)


def _gemm_grid(quick: bool) -> Iterator[tuple[int, int, int]]:
    if quick:
        return product((32, 128, 512, 2048), (64, 256, 1024), (64, 256, 1024))
    sides = (64, 128, 256, 512, 1024, 2048)
    return product((16, 64, 128, 256, 512, 1024, 4096), sides, sides)


def _gemm_few(quick: bool) -> Iterator[tuple[int, int, int]]:
    if quick:
        return product((128, 1024), (256, 1024), (256, 1024))
    return product((64, 256, 1024), (128, 512, 1024), (128, 512, 1024))


def _attention_grid(quick: bool) -> Iterator[tuple[int, int, int, int]]:
    if quick:
        return product((8, 32), (64, 256), (1,), (32, 64))
    return product((8, 32, 128), (64, 128, 256, 512), (1, 4), (32, 64, 128))


def _memory_sizes(quick: bool) -> tuple[int, ...]:
    return (2**13, 2**17, 2**21) if quick else (2**12, 2**14, 2**16, 2**18, 2**20, 2**22, 2**24)


def _models(quick: bool) -> list[tuple[int, int, int, int]]:
    """(hidden, layers, tokens, sequence): two that cost the host only, and some that cost the device."""
    tiny = [(16, 2, 16, 16), (16, 6, 16, 16)]
    real = [(128, 2, 512, 128), (320, 2, 512, 128)]
    return [*tiny, *real] if quick else [*tiny, *real, (512, 2, 512, 128), (512, 2, 2048, 512), (1024, 1, 512, 128)]


def measure_whole(*, rank: int, ranks: int, folder: Path, tell: Callable[[str], None], quick: bool, out: str) -> None:
    """All cores together: adding gradients, and some products."""
    n = 2**24
    total, pushed = torch.zeros(n), torch.ones(n)
    added = timed(lambda: total.add_(pushed), 0.3 if quick else 1.0)
    shapes: Iterator[tuple[int, int, int]] = product((128, 1024), (256, 1024), (256, 1024))
    gemm = kernels.gemm(shapes, "fp32", _CPU, timed, 0.02, torch.get_num_threads())
    whole = Whole(
        reduce_bytes_per_s=n * total.element_size() / added.seconds,
        gemm=tuple(gemm),
        cuda=torch.version.cuda is not None,
    )
    files.save(whole, out)


def measure_among(*, rank: int, ranks: int, folder: Path, tell: Callable[[str], None], quick: bool, out: str) -> None:
    """`ranks` at once: a transformer layer on each, then gloo's collectives and messages. Rank 0 writes."""
    store = dist.FileStore(str(folder / "store"), ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=_TIMEOUT_S))
    shared = _layer_at_once(ranks, 0.6 if quick else 2.0)
    collectives: list[CollectiveSample] = []
    messages: list[MessageSample] = []
    if ranks > 1:
        sizes = [2**10, 2**14, 2**17, 2**20, 2**23] if quick else [2**p for p in range(10, 26)]
        repeats = 7 if quick else 15
        for kind in _KINDS:
            for size in sizes if kind == "all_reduce" else sizes[:: 2 if quick else 3]:
                seconds = _collective(kind, ranks, size, repeats)
                collectives.append(CollectiveSample(collective=kind, ranks=ranks, bytes=size, time=summary(seconds)))
        for size in sizes:
            messages.append(MessageSample(bytes=size, time=summary(_exchange(rank, size, repeats))))
    if rank == 0:
        files.save(Among(shared=shared, collectives=tuple(collectives), messages=tuple(messages)), out)
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


_KINDS: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter")


def _layer_at_once(ranks: int, budget_s: float) -> SharedSample:
    """The slowest rank's time of one layer's forward and backward pass while all ranks run it."""
    model = kernels.small_model(_SHARED_HIDDEN, 2, 4, _SHARED_SEQUENCE)
    gpt = Gpt(model, seed=0, dtype=torch.float32, device=_CPU)
    inputs = torch.randint(0, 256, (_SHARED_TOKENS // _SHARED_SEQUENCE, _SHARED_SEQUENCE))
    samples: list[float] = []
    for _ in range(3):
        gpt(inputs, inputs).backward()
    dist.all_reduce(torch.zeros(1))
    end = time.perf_counter() + budget_s
    while len(samples) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        gpt(inputs, inputs).backward()
        samples.append(time.perf_counter() - begin)
    # Other processes only ever add time: the faster half tells more of this host.
    mine = summary(sorted(samples)[: max(3, len(samples) // 2)])
    slowest = torch.tensor([mine.seconds], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    calls = []
    small = torch.zeros(256)
    for _ in range(20 if ranks > 1 else 0):
        begin = time.perf_counter()
        work = dist.all_reduce(small, async_op=True)
        calls.append(time.perf_counter() - begin)
        assert work is not None
        work.wait()
    layer = summary([float(slowest)])
    return SharedSample(
        ranks=ranks,
        threads=torch.get_num_threads(),
        layer=type(layer)(seconds=layer.seconds, spread=mine.spread, samples=mine.samples),
        call_s=summary(calls).seconds if calls else 0.0,
    )


def _collective(kind: CollectiveKind, ranks: int, size: int, repeats: int) -> list[float]:
    """Times of one collective over `size` bytes (the whole buffer), the slowest rank's each time."""
    whole = torch.ones(size // 4)
    part = torch.ones(max(1, size // 4 // ranks))
    gathered = torch.empty(part.numel() * ranks)
    # torch 2.13 renamed these two, and warns about the old names.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    runs: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: gather(gathered, part),
        "reduce_scatter": lambda: scatter(part, gathered),
    }
    run = runs[kind]
    run()
    whole.zero_()
    times = torch.zeros(repeats, dtype=torch.float64)
    inner = _inner(size)
    for index in range(repeats):
        dist.all_reduce(torch.zeros(1))
        begin = time.perf_counter()
        for _ in range(inner):
            run()
        times[index] = (time.perf_counter() - begin) / inner
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return [float(t) for t in times]


def _inner(size: int) -> int:
    """Repeats inside one timing: ranks leave a barrier at different times, which a single small message would show."""
    return 10 if size <= 2**16 else 3 if size <= 2**20 else 1


def _exchange(rank: int, size: int, repeats: int) -> list[float]:
    """Ranks 0 and 1 send each other `size` bytes at once; the times of the slower one."""
    out, back = torch.ones(size // 4), torch.empty(size // 4)
    times = torch.zeros(repeats, dtype=torch.float64)
    for index in range(repeats + 1):
        dist.all_reduce(torch.zeros(1))
        if rank > 1:
            continue
        begin = time.perf_counter()
        for _ in range(_inner(size)):
            works = [dist.irecv(back, 1 - rank), dist.isend(out, 1 - rank)]
            for work in works:
                assert work is not None
                work.wait()
        if index:
            times[index - 1] = (time.perf_counter() - begin) / _inner(size)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return [float(t) for t in times]
