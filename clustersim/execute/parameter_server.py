"""A bulk-synchronous parameter server on torch.distributed point-to-point messages (never RPC).

Servers are processes on CPUs, dedicated or beside a worker; each holds a slice of every bucket. A worker pushes a bucket's
gradients as soon as its backward pass has completed them; the server adds the pushes of all workers in the order of their
ranks, steps the optimizer (or leaves that to the workers), and sends the result back. All messages go over gloo through
host memory, whatever the workers' device: a GPU's gradients are copied to the host and its weights back, as in BytePS
(Jiang et al., OSDI'20).

Nothing here blocks on a send: gloo's blocking send waits for the peer's receive, and two of them deadlock. Receives are
posted before the matching send can be issued; tags tell bucket, partition and direction apart.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clustersim.execute.clock import Mark, Notes
from clustersim.execute.data_parallel import note_update
from clustersim.execute.gpt import TORCH_DTYPE, Gpt, build_layer
from clustersim.execute.gradients import FlatBuckets
from clustersim.execute.optimizer import Optimizer
from clustersim.execute.task import Slice, Task, server_rank, server_slices
from clustersim.layout.layout import ParameterServer
from clustersim.program.program import Bucket

_PUSH, _PULL = 0, 1
# Partitions of one bucket that tags can tell apart.
_MOST_PARTITIONS = 1 << 16


def _tag(piece: Slice, direction: int) -> int:
    assert piece.number < _MOST_PARTITIONS
    return (piece.bucket * _MOST_PARTITIONS + piece.number) * 2 + direction


@dataclass(slots=True)
class Beside:
    """What a worker and the server in its own process hand to each other without messages: per bucket, a queue of the
    worker's host gradients and one of the server's host results, a tensor over the whole bucket each."""

    pushed: list[queue.SimpleQueue[Tensor]]
    pulled: list[queue.SimpleQueue[None]]
    results: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, buckets: int) -> Beside:
        return cls([queue.SimpleQueue() for _ in range(buckets)], [queue.SimpleQueue() for _ in range(buckets)])


class Server:
    """One server: its slices of every bucket, their optimizer state, and the receives that are under way.

    `beside`: the hand-over to the worker in the same process, which sends no messages.
    """

    def __init__(self, task: Task, server: int, notes: Notes, beside: Beside | None) -> None:
        scheme, precision = task.layout.scheme, task.layout.precision
        assert isinstance(scheme, ParameterServer)
        self._notes = notes
        self._beside = beside
        self._rank = server_rank(task, server)
        self._workers = range(task.workers)
        self._last_step = task.warmup + task.steps - 1
        self._slices = server_slices(task, server)
        self._at_server = scheme.optimizer_at == "server"
        gradient, wide = TORCH_DTYPE[precision.gradient], TORCH_DTYPE[precision.optimizer]
        self._sums: dict[Slice, Tensor] = {}
        self._out: dict[Slice, Tensor] = {}
        self._optimizers: dict[Slice, Optimizer] = {}
        self._inbox: dict[tuple[Slice, int], Tensor] = {}
        self._coming: dict[tuple[Slice, int], Any] = {}
        self._going: dict[Slice, list[Any]] = {}
        rule = task.workload.training.optimizer
        for bucket, pieces in zip(task.program.buckets, self._slices, strict=True):
            weights = initial_weights(task, bucket) if self._at_server else torch.empty(0)
            for piece in pieces:
                size = piece.stop - piece.start
                self._sums[piece] = torch.empty(size, dtype=wide if self._at_server else gradient)
                self._out[piece] = self._sums[piece]
                if self._at_server:
                    self._out[piece] = weights[piece.start : piece.stop].clone()
                    self._optimizers[piece] = Optimizer([self._out[piece]], rule, wide)
                for worker in self._workers:
                    if beside is None or worker != self._rank:
                        self._inbox[piece, worker] = torch.empty(size, dtype=gradient)
                        self._receive(piece, worker)

    def _receive(self, piece: Slice, worker: int) -> None:
        self._coming[piece, worker] = dist.irecv(self._inbox[piece, worker], worker, tag=_tag(piece, _PUSH))

    def run_step(self, step: int) -> None:
        """Serve one step: bucket by bucket, partition by partition."""
        for bucket, pieces in enumerate(self._slices):
            own = self._beside.pushed[bucket].get() if self._beside is not None else None
            started: Mark | None = None
            ended: Mark = 0.0
            for piece in pieces:
                for worker in self._workers:
                    if (piece, worker) in self._coming:
                        self._coming.pop((piece, worker)).wait()
                for work in self._going.pop(piece, ()):
                    work.wait()
                started = self._notes.clock.mark() if started is None else started
                self._add(piece, own)
                if self._at_server:
                    self._optimizers[piece].step([self._sums[piece]])
                ended = self._notes.clock.mark()
                self._answer(step, piece)
            if started is not None:
                self._notes.add(step, "update", f"B{bucket}", "update", "host", started, ended, stage=-1)
            if self._beside is not None:
                self._beside.pulled[bucket].put(None)

    def _add(self, piece: Slice, own: Tensor | None) -> None:
        """The sum of all workers' gradients, always in the order of their ranks."""
        total = self._sums[piece]
        for worker in self._workers:
            pushed = self._inbox.get((piece, worker))
            if pushed is None:
                assert own is not None
                pushed = own[piece.start : piece.stop]
            if worker == 0:
                total.copy_(pushed)
            else:
                total.add_(pushed)

    def _answer(self, step: int, piece: Slice) -> None:
        """Return the result to every worker, and be ready for its next push."""
        out = self._out[piece]
        for worker in self._workers:
            if (piece, worker) in self._inbox:
                if step < self._last_step:
                    self._receive(piece, worker)
                self._going.setdefault(piece, []).append(dist.isend(out, worker, tag=_tag(piece, _PULL)))
            else:
                assert self._beside is not None
                self._beside.results[piece.bucket][piece.start : piece.stop].copy_(out)

    def close(self) -> None:
        """Wait until every answer has left."""
        for works in self._going.values():
            for work in works:
                work.wait()


def initial_weights(task: Task, bucket: Bucket) -> Tensor:
    """The flat weights of a bucket as every worker builds them, one layer in memory at a time."""
    model, precision = task.workload.model, task.layout.precision
    flat = []
    for layer in range(bucket.first_layer, bucket.last_layer + 1):
        built = build_layer(
            model, layer, seed=task.seed, dtype=TORCH_DTYPE[precision.compute], device=torch.device("cpu")
        )
        flat += [parameter.detach().flatten() for parameter in built.parameters()]
    return torch.cat(flat)


class ServedWorker:
    """A worker that pushes and pulls. Pushes and pulls have a thread each, as they have a stream each in a program: a
    bucket goes out after the one before it, beside the backward pass."""

    def __init__(self, task: Task, gpt: Gpt, notes: Notes, rank: int, device: torch.device) -> None:
        scheme, precision = task.layout.scheme, task.layout.precision
        assert isinstance(scheme, ParameterServer)
        self.ready: list[Mark] = []
        self._gpt = gpt
        self._notes = notes
        self._rank = rank
        self._device = device
        self._step = 0
        self._flat = FlatBuckets(gpt, task.program.buckets, TORCH_DTYPE[precision.gradient], notes.clock, self._on_ready)
        self._at_server = scheme.optimizer_at == "server"
        # What comes back lands where it is used, or in host memory first.
        self._targets = self._flat.weights if self._at_server else self._flat.gradients
        self._outgoing, self._incoming = self._flat.gradients, self._targets
        if device.type != "cpu":
            self._outgoing = [torch.empty_like(t, device="cpu", pin_memory=True) for t in self._flat.gradients]
            self._incoming = [torch.empty_like(t, device="cpu", pin_memory=True) for t in self._targets]
        self._optimizer: Optimizer | None = None
        if not self._at_server:
            rule = task.workload.training.optimizer
            self._optimizer = Optimizer(self._flat.weights, rule, TORCH_DTYPE[precision.optimizer])
        mine = [share.server for share in task.program.servers if server_rank(task, share.server) == rank]
        assert len(mine) <= 1
        others = [share.server for share in task.program.servers if share.server not in mine]
        # Per bucket: (server's rank, slice), the servers in order.
        self._remote = [
            [
                (server_rank(task, server), piece)
                for server in others
                for piece in server_slices(task, server)[bucket.index]
            ]
            for bucket in task.program.buckets
        ]
        self._beside: Beside | None = None
        self._server: Server | None = None
        if mine:
            self._beside = Beside.of(len(task.program.buckets))
            self._beside.results = self._incoming
            self._server = Server(task, mine[0], notes, self._beside)
        self._push_thread = ThreadPoolExecutor(1, "push")
        self._pull_thread = ThreadPoolExecutor(1, "pull")
        self._serve_thread = ThreadPoolExecutor(1, "serve")
        self._running: list[Future[None]] = []

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self._gpt(tokens, targets)  # type: ignore[no-any-return]

    @contextmanager
    def micro_batch(self, step: int, last: bool) -> Iterator[None]:
        if last:
            self.ready.clear()
            self._step = step
            coming = [
                [
                    dist.irecv(incoming[piece.start : piece.stop], server, tag=_tag(piece, _PULL))
                    for server, piece in pieces
                ]
                for incoming, pieces in zip(self._incoming, self._remote, strict=True)
            ]
            self._running = [self._pull_thread.submit(self._pull, step, coming)]
            if self._server is not None:
                self._running.append(self._serve_thread.submit(self._server.run_step, step))
            self._flat.arm()
        yield

    def _on_ready(self, bucket: int, when: Mark) -> None:
        self.ready.append(when)
        self._running.append(self._push_thread.submit(self._push, self._step, bucket, when))

    def _push(self, step: int, bucket: int, ready: Mark) -> None:
        """Send a bucket's slices to all servers at once, and wait until they have it."""
        outgoing = self._outgoing[bucket]
        if isinstance(ready, torch.cuda.Event):
            with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)) as _:
                torch.cuda.current_stream().wait_event(ready)
                outgoing.copy_(self._flat.gradients[bucket], non_blocking=True)
                torch.cuda.current_stream().synchronize()
        start = self._notes.clock.host()
        if self._beside is not None:
            self._beside.pushed[bucket].put(outgoing)
        going = [
            dist.isend(outgoing[piece.start : piece.stop], server, tag=_tag(piece, _PUSH))
            for server, piece in self._remote[bucket]
        ]
        for work in going:
            assert work is not None
            work.wait()
        end = self._notes.clock.host()
        self._notes.add(step, "synchronise", f"B{bucket}", "push", "push", start, end, ready=ready)

    def _pull(self, step: int, coming: list[list[Any]]) -> None:
        """Wait for the answers of all servers, bucket by bucket. When they began to send, they know."""
        for bucket, works in enumerate(coming):
            for work in works:
                work.wait()
            if self._beside is not None:
                self._beside.pulled[bucket].get()
            if self._device.type != "cpu":
                with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)) as _:
                    self._targets[bucket].copy_(self._incoming[bucket], non_blocking=True)
                    torch.cuda.current_stream().synchronize()
            end = self._notes.clock.host()
            self._notes.add(step, "synchronise", f"B{bucket}", "pull", "pull", end, end)

    def finish(self, step: int) -> None:
        done, _ = wait(self._running, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        if self._optimizer is not None:
            optimizer = self._optimizer
            note_update(self._notes, step, lambda: optimizer.step(self._flat.gradients))
        now = self._notes.clock.mark()
        self._notes.add(step, "synchronise", "all", "gate", "compute", now, now)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
