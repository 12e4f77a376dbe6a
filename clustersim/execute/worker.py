"""One process of a run: a worker or a dedicated server. Started by the launcher, or under torchrun or Slurm as
`python -m clustersim.execute.worker PLAN.json --out RUN.json`."""

from __future__ import annotations

import gc
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clustersim import files
from clustersim.compare import Run
from clustersim.errors import ClustersimError, ExecutionError
from clustersim.execute.batches import micro_batches
from clustersim.execute.clock import Clock, Mark, Notes
from clustersim.execute.data_parallel import FlatAllReduce, OverlappedAllReduce, Synchroniser, overlap_is_safe
from clustersim.execute.gpt import TORCH_DTYPE, Gpt
from clustersim.execute.gradients import bucket_parameters
from clustersim.execute.measured import Observed, assemble
from clustersim.execute.parameter_server import NodeGroups, ServedWorker, Server, node_groups
from clustersim.execute.surroundings import surroundings
from clustersim.execute.task import Task, server_rank
from clustersim.execute.text import Text
from clustersim.layout.layout import AllReduce, ParameterServer

_MOST_LINES = 20
# Reading a loss waits for the device, and then the device for the host: rarely on a GPU, or steps would be longer.
_TELL_EVERY_S = 2.0
_PINGS = 20


def run_local(*, rank: int, ranks: int, folder: Path, tell: Callable[[str], None], task: str, out: str) -> None:
    """A rank of a run on one host: the task is a file, processes meet at another one (no port is opened for that)."""
    whole: Task = files.load(Task, task)
    store = dist.FileStore(str(folder / "store"), ranks)  # type: ignore[attr-defined]
    run = perform(whole, rank=rank, local_rank=rank, store=store, tell=tell)
    if run is not None:
        files.save(run, out)
    leave()


def describe_devices(*, rank: int, ranks: int, folder: Path, tell: Callable[[str], None], out: str) -> None:
    """Which GPUs this host has: written to `out` as JSON."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(i) for i in range(count)]
    Path(out).write_text(json.dumps(names), encoding="utf-8")


def perform(task: Task, *, rank: int, local_rank: int, store: Any, tell: Callable[[str], None]) -> Run | None:
    """Meet the other processes, do this one's part, and (rank 0) return the measured run."""
    is_worker = rank < task.workers
    device, backend = _device_of(task, local_rank, is_worker)
    # Parameter servers talk over gloo whatever the device; NCCL is for all-reduces between GPUs.
    names = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"
    dist.init_process_group(
        names, store=store, rank=rank, world_size=task.processes, timeout=timedelta(seconds=task.timeout_s)
    )
    if task.workload.training.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    groups = node_groups(task, rank)
    offset = _clock_offset(rank, task.processes)
    notes = Notes(Clock.of(device))
    if is_worker:
        losses, ends, weights = _train(task, rank, device, groups, notes, tell)
    else:
        _serve(task, rank, notes)
        losses, ends, weights = [], [], {}
    mine = Observed(
        rank=rank, rows=notes.rows(), losses=losses, step_ends_s=ends, clock_offset_s=offset,
        environment=surroundings(device),
    )  # fmt: skip
    everything = _gather(rank, task.processes, json.dumps(asdict(mine)).encode())
    if rank != 0:
        return None
    if task.weights is not None:
        _save_weights(weights, task.weights)
    observed = [Observed(**json.loads(data)) for data in everything]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return assemble(task, observed, backend, name)


def leave() -> None:
    """Part from the other processes, together."""
    _meet()
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------- training


def _train(
    task: Task,
    rank: int,
    device: torch.device,
    groups: NodeGroups | None,
    notes: Notes,
    tell: Callable[[str], None],
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """All steps of one worker: its share of each step's mean loss, when each step ended, the final weights."""
    training, layout = task.workload.training, task.layout
    torch.manual_seed(task.seed + rank)
    gpt = Gpt(
        task.workload.model, seed=task.seed, dtype=TORCH_DTYPE[layout.precision.compute], device=device,
        recompute=layout.recompute,
    )  # fmt: skip
    gpt.train()
    sync = _synchroniser(task, gpt, notes, rank, device, groups, tell)
    text = Text(task.seed, training.global_batch, training.sequence)
    mine = micro_batches(layout, training.global_batch, layout.coordinates(rank)[1])
    losses: list[Tensor] = []
    ends: list[Mark] = []
    total = task.warmup + task.steps
    every = max(1, -(-total // _MOST_LINES))
    _meet()
    gc.collect()
    gc.disable()  # A collection in the middle of a step would be measured as work.
    before, told = time.monotonic(), -1
    for step in range(total):
        losses.append(_step(task, step, mine, text, sync, notes, device))
        ends.append(notes.clock.mark())
        due = step % every == 0 if device.type == "cpu" else time.monotonic() - before >= _TELL_EVERY_S
        if rank == 0 and (due or step in (0, total - 1)):
            share = sum(len(sequences) for sequences in mine) / training.global_batch
            value = float(losses[-1]) / share
            now = time.monotonic()
            took = (now - before) / (step - told)
            before, told = now, step
            kind = "warm-up" if step < task.warmup else "step"
            tell(f"{kind} {step + 1}/{total}: {took * 1e3:.1f} ms, loss {value:.4f} on rank 0's sequences")
    gc.enable()
    sync.close()
    weights = {}
    if rank == 0 and task.weights is not None:
        for bucket in task.program.buckets:
            for number, parameter in enumerate(bucket_parameters(gpt, bucket)):
                weights[f"B{bucket.index}.{number}"] = parameter.detach()
    return [float(loss) for loss in losses], [notes.clock.seconds(end) for end in ends], weights


def _synchroniser(
    task: Task,
    gpt: Gpt,
    notes: Notes,
    rank: int,
    device: torch.device,
    groups: NodeGroups | None,
    tell: Callable[[str], None],
) -> Synchroniser:
    scheme = task.layout.scheme
    if isinstance(scheme, ParameterServer):
        return ServedWorker(task, gpt, notes, rank, device, groups)
    assert isinstance(scheme, AllReduce)
    if scheme.overlap and task.layout.mesh.dp > 1:
        if overlap_is_safe(task, torch.__version__):
            return OverlappedAllReduce(task, gpt, notes)
        if rank == 0:
            tell(
                f"no overlap: gloo in PyTorch {torch.__version__} hands over GPU tensors before they are summed (until "
                "2.11); all-reduces run after the backward pass"
            )
    return FlatAllReduce(task, gpt, notes)


def _step(
    task: Task, step: int, mine: tuple[range, ...], text: Text, sync: Synchroniser, notes: Notes, device: torch.device
) -> Tensor:
    """One training step: this rank's share of the mean loss over the whole batch."""
    clock = notes.clock
    whole = task.workload.training.tokens_per_step
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for i, sequences in enumerate(mine):
        last = i == len(mine) - 1
        start = clock.mark()
        if len(sequences) == 0:
            notes.add(step, "forward", "all", "compute", "compute", start, start, micro_batch=i)
            notes.add(step, "backward", "all", "compute", "compute", start, start, micro_batch=i)
            continue
        tokens, targets = text.batch(step, sequences, device)
        with sync.micro_batch(step, last):
            start = clock.mark()
            # Scaled by the whole batch, so that sums over micro-batches and ranks are the gradient of its mean.
            loss = sync.loss(tokens, targets) / whole
            middle = clock.mark()
            loss.backward()  # type: ignore[no-untyped-call]
            end = clock.mark()
        loss_sum += loss.detach()
        notes.add(step, "forward", "all", "compute", "compute", start, middle, micro_batch=i)
        if last:
            for index, ready in enumerate(sync.ready):
                notes.add(step, "backward", f"B{index}", "compute", "compute", middle, ready, micro_batch=i)
                middle = ready
        else:
            notes.add(step, "backward", "all", "compute", "compute", middle, end, micro_batch=i)
    sync.finish(step)
    return loss_sum


def _serve(task: Task, rank: int, notes: Notes) -> None:
    """All steps of one dedicated server."""
    mine = [share.server for share in task.program.servers if server_rank(task, share.server) == rank]
    server = Server(task, mine[0], notes, None)
    _meet()
    for step in range(task.warmup + task.steps):
        server.run_step(step)
    server.close()


# ------------------------------------------------------------------------------------------------- among ranks


def _meet() -> None:
    """Wait for every process; a tiny all-reduce on the CPU, which every backend here has."""
    dist.all_reduce(torch.zeros(1))


def _clock_offset(rank: int, ranks: int) -> float:
    """This host's clock minus that of rank 0's host, by the quickest of some ping-pongs; 0 on the same host."""
    here = torch.zeros(64, dtype=torch.uint8)
    name = f"{socket.gethostname()}:{_boot()}".encode()[:64]
    here[: len(name)] = torch.frombuffer(bytearray(name), dtype=torch.uint8)
    hosts = [torch.empty_like(here) for _ in range(ranks)]
    dist.all_gather(hosts, here)
    offset = 0.0
    for other in range(1, ranks):
        if torch.equal(hosts[other], hosts[0]) or rank not in (0, other):
            continue
        best = float("inf")
        for _ in range(_PINGS):
            there = torch.zeros(1, dtype=torch.float64)
            sent = time.monotonic()
            if rank == 0:
                dist.send(there, other)
                dist.recv(there, other)
            else:
                dist.recv(there, 0)
                dist.send(torch.tensor([time.monotonic()], dtype=torch.float64), 0)
            took = time.monotonic() - sent
            if rank == 0 and took < best:
                best, offset = took, float(there) - (sent + took / 2)
        result = torch.tensor([offset], dtype=torch.float64)
        if rank == 0:
            dist.send(result, other)
            offset = 0.0
        else:
            dist.recv(result, 0)
            offset = float(result)
    return offset


def _boot() -> str:
    """What tells containers of equal host names apart: monotonic clocks agree exactly where this does."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _gather(rank: int, ranks: int, data: bytes) -> list[bytes]:
    """The bytes of every process, on rank 0; an empty list elsewhere."""
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64))
    if rank != 0:
        dist.send(mine, 0)
        return []
    result = [data]
    for other in range(1, ranks):
        theirs = torch.empty(int(sizes[other]), dtype=torch.uint8)
        dist.recv(theirs, other)
        result.append(theirs.numpy().tobytes())
    return result


# ------------------------------------------------------------------------------------------------- this process


def _device_of(task: Task, local_rank: int, is_worker: bool) -> tuple[torch.device, str]:
    """The device that this process computes on, and the backend of the run's collectives."""
    if task.device_kind == "cpu" or not is_worker:
        return torch.device("cpu"), "gloo"
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found == 0 or (local_rank >= found and not task.share_devices):
        raise ExecutionError(
            f"local rank {local_rank} needs a GPU of its own, and this host has {found}; run on the hosts that the "
            "plan names, or let ranks share devices"
        )
    device = torch.device("cuda", local_rank % found)
    torch.cuda.set_device(device)
    served = isinstance(task.layout.scheme, ParameterServer)
    # One rank sends nothing: it needs no NCCL.
    alone = task.workers == 1 and not dist.is_nccl_available()
    return device, "gloo" if served or task.share_devices or alone else "nccl"


def _save_weights(weights: dict[str, Tensor], path: str) -> None:
    import io

    import numpy as np

    plain = {name: (w.float() if w.element_size() < 4 else w).cpu().numpy() for name, w in weights.items()}
    stream = io.BytesIO()
    np.savez(stream, **plain)  # type: ignore[arg-type]
    files.write_bytes(path, stream.getvalue())


# ------------------------------------------------------------------------------------------------------ torchrun


def main(arguments: list[str] | None = None) -> int:
    """The entry under torchrun and Slurm; RANK, WORLD_SIZE and LOCAL_RANK (or SLURM_*) say who this is."""
    import argparse

    from clustersim.execute.execute import prepare
    from clustersim.execute.zygote import explain
    from clustersim.plan import Plan

    parser = argparse.ArgumentParser(prog="python -m clustersim.execute.worker")
    parser.add_argument("plan", help="the plan file")
    parser.add_argument("--out", required=True, help="where rank 0 writes the measured run")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that a rank waits for a message")
    parser.add_argument("--share-devices", action="store_true", help="several ranks may use one GPU")
    given = parser.parse_args(arguments)
    try:
        rank, ranks, local = (
            _from_environment(*names)
            for names in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID"))
        )
        task = prepare(
            files.load(Plan, given.plan), steps=given.steps, warmup=given.warmup, seed=given.seed,
            timeout_s=given.timeout, share_devices=given.share_devices,
        )  # fmt: skip
        if task.processes != ranks:
            servers = task.processes - task.workers
            raise ExecutionError(
                f"the plan has {task.processes} processes ({task.workers} workers, {servers} dedicated servers), but "
                f"{ranks} were started; start {task.processes}"
            )
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if address is None or port is None:
            raise ExecutionError("MASTER_ADDR and MASTER_PORT are not set; start with torchrun, or export them")
        serves = rank == 0 and not _agent_has_store()
        store = dist.TCPStore(address, int(port), ranks, serves)  # type: ignore[attr-defined]
        run = perform(task, rank=rank, local_rank=local, store=store, tell=lambda text: print(text, flush=True))
        if run is not None:
            files.save(run, given.out)
        leave()
    except ClustersimError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Threads may hang in receives from processes that are gone; nothing is left to save.
        os._exit(error.exit_code)
    except Exception as error:
        print(f"error: {explain(error)}", file=sys.stderr, flush=True)
        os._exit(5)
    return 0


def _agent_has_store() -> bool:
    """torchrun's agent serves the store itself, on the master's address and port."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _from_environment(name: str, slurm: str) -> int:
    value = os.environ.get(name, os.environ.get(slurm))
    if value is None:
        raise ExecutionError(f"{name} is not set; start with torchrun --nproc-per-node=N -m clustersim.execute.worker")
    return int(value)


if __name__ == "__main__":
    # Where this file runs as __main__, the one that others import must be the same.
    from clustersim.execute.worker import main as entry

    sys.exit(entry())
