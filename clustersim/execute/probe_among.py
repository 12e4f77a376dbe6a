"""What ranks measure together: a small model on each at once, gloo's collectives and messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from clustersim import files
from clustersim.execute import kernels
from clustersim.execute.gpt import Gpt
from clustersim.execute.probe_grid import levels
from clustersim.execute.probe_samples import Among, CollectiveSample, MessageSample, SharedSample
from clustersim.execute.timing import summary
from clustersim.hardware.curve import CollectiveKind

_TIMEOUT_S = 60.0
_REPEATS, _FEW_REPEATS = 11, 5
# The layer that ranks run at once: big enough for its operands to leave the caches, small enough for many repeats.
_SHARED_HIDDEN, _SHARED_TOKENS, _SHARED_SEQUENCE = 256, 512, 128


def measure_among(
    *, rank: int, ranks: int, folder: Path, tell: Callable[[str], None], until_s: float, out: str
) -> None:
    """`ranks` at once: a transformer layer on each, then gloo's collectives and messages, sizes from coarse to fine
    until time.monotonic() reaches `until_s` on rank 0. Rank 0 writes."""
    store = dist.FileStore(str(folder / "store"), ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=_TIMEOUT_S))
    shared = _layer_at_once(ranks, min(2.0, max(0.3, 0.2 * (until_s - time.monotonic()))))
    collectives: list[CollectiveSample] = []
    messages: list[MessageSample] = []
    if ranks > 1:
        sizes = [2**p for p in range(10, 26)]
        known = levels(len(sizes))
        for index in sorted(range(len(sizes)), key=lambda index: known[index]):
            # At least both ends of the curves that a profile needs; rank 0 decides for all when the time is over.
            if known[index] > 0 and not _time_left(until_s):
                break
            size = sizes[index]
            repeats = _REPEATS if size <= 2**22 else _FEW_REPEATS
            for kind in _KINDS if known[index] < 3 else _KINDS[:1]:
                if kind == "all_reduce" or _time_left(until_s):
                    seconds = _collective(kind, ranks, size, repeats)
                    sample = CollectiveSample(collective=kind, ranks=ranks, bytes=size, time=summary(seconds))
                    collectives.append(sample)
            messages.append(MessageSample(bytes=size, time=summary(_exchange(rank, size, repeats))))
            if rank == 0:
                tell(f"{ranks} ranks: {len(messages)} of {len(sizes)} sizes")
    if rank == 0:
        files.save(Among(shared=shared, collectives=tuple(collectives), messages=tuple(messages)), out)
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


def _time_left(until_s: float) -> bool:
    late = torch.tensor([time.monotonic() >= until_s], dtype=torch.int32)
    dist.broadcast(late, 0)
    return not bool(late)


_KINDS: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter")


def _layer_at_once(ranks: int, budget_s: float) -> SharedSample:
    """The slowest rank's time of one layer's forward and backward pass while all ranks run it."""
    model = kernels.small_model(_SHARED_HIDDEN, 2, 4, _SHARED_SEQUENCE)
    gpt = Gpt(model, seed=0, dtype=torch.float32, device=torch.device("cpu"))
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
