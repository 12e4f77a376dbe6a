"""A bulk-synchronous parameter server on torch.distributed point-to-point messages (never RPC).

Servers are processes on CPUs, dedicated or beside a worker; each holds a slice of every bucket. A worker pushes a
bucket's gradients as soon as its backward pass has completed them; the server adds the pushes of all workers in the
order of their ranks, steps the optimizer (or leaves that to the workers), and sends the result back. All messages go
over gloo through host memory, whatever the workers' device: a GPU's gradients are copied to the host and its weights
back, as in BytePS (Jiang et al., OSDI'20).

Where several workers share a node, they may first sum their gradients among themselves (a reduce-scatter); each then
pushes and pulls its part of every bucket, and an all-gather puts the parts together again.

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
from clustersim.timeline import OpKind

_PUSH, _PULL = 0, 1
# Partitions of one bucket that tags can tell apart.
_MOST_PARTITIONS = 1 << 16


def _tag(piece: Slice, direction: int) -> int:
    assert piece.number < _MOST_PARTITIONS
    return (piece.bucket * _MOST_PARTITIONS + piece.number) * 2 + direction


# The groups in which a node's workers scatter sums and gather results: one for each of the two threads that call them,
# because two threads on one group would call in an order of their own.
NodeGroups = tuple[Any, Any]


def node_groups(task: Task, rank: int) -> NodeGroups | None:
    """Form the groups of every node; all processes must call this. This rank's, where it shares a node."""
    mine = None
    if task.peers > 1:
        for first in range(0, task.workers, task.peers):
            ranks = list(range(first, first + task.peers))
            pair = (dist.new_group(ranks, backend="gloo"), dist.new_group(ranks, backend="gloo"))
            mine = pair if rank in ranks else mine
    return mine


@dataclass(slots=True)
class Beside:
    """What a worker and the server in its own process hand to each other without messages: per bucket, a queue of the
    worker's host gradients and one of the server's host results, a tensor over the worker's part of the bucket each."""

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
        self._pushers = [task.pushers(part) for part in range(task.peers)]
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
                for worker in self._pushers[piece.part]:
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
                for worker in self._pushers[piece.part]:
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
        for number, worker in enumerate(self._pushers[piece.part]):
            pushed = self._inbox.get((piece, worker))
            if pushed is None:
                assert own is not None
                pushed = _of_part(own, piece)
            if number == 0:
                total.copy_(pushed)
            else:
                total.add_(pushed)

    def _answer(self, step: int, piece: Slice) -> None:
        """Return the result to every worker, and be ready for its next push."""
        out = self._out[piece]
        for worker in self._pushers[piece.part]:
            if (piece, worker) in self._inbox:
                if step < self._last_step:
                    self._receive(piece, worker)
                self._going.setdefault(piece, []).append(dist.isend(out, worker, tag=_tag(piece, _PULL)))
            else:
                assert self._beside is not None
                _of_part(self._beside.results[piece.bucket], piece).copy_(out)

    def close(self) -> None:
        """Wait until every answer has left."""
        for works in self._going.values():
            for work in works:
                work.wait()


def _of_part(part: Tensor, piece: Slice) -> Tensor:
    """The elements of `piece` in a tensor that holds its part of the bucket."""
    return part[piece.start - piece.first : piece.stop - piece.first]


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

    def __init__(
        self, task: Task, gpt: Gpt, notes: Notes, rank: int, device: torch.device, groups: NodeGroups | None
    ) -> None:
        scheme, precision = task.layout.scheme, task.layout.precision
        assert isinstance(scheme, ParameterServer)
        self.ready: list[Mark] = []
        self._gpt = gpt
        self._notes = notes
        self._rank = rank
        self._device = device
        self._step = 0
        gradient = TORCH_DTYPE[precision.gradient]
        self._groups = groups
        self._flat = FlatBuckets(gpt, task.program.buckets, gradient, notes.clock, self._on_ready, task.peers)
        self._at_server = scheme.optimizer_at == "server"
        # What comes back lands where it is used, or in host memory first.
        self._targets = self._flat.weights if self._at_server else self._flat.gradients
        self._host_gradients, self._host_targets = self._flat.gradients, self._targets
        if device.type != "cpu":
            self._host_gradients = [torch.empty_like(t, device="cpu", pin_memory=True) for t in self._flat.gradients]
            self._host_targets = [torch.empty_like(t, device="cpu", pin_memory=True) for t in self._targets]
        # This rank's part of each bucket: all of it, unless ranks of its node take parts.
        self._outgoing, self._incoming = self._host_gradients, self._host_targets
        if groups is not None:
            self._outgoing = [torch.empty_like(t[: len(t) // task.peers]) for t in self._host_gradients]
            self._incoming = [torch.empty_like(t[: len(t) // task.peers]) for t in self._host_targets]
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
                if rank in task.pushers(piece.part)
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
                [dist.irecv(_of_part(incoming, piece), server, tag=_tag(piece, _PULL)) for server, piece in pieces]
                for incoming, pieces in zip(self._incoming, self._remote, strict=True)
            ]
            self._running = [self._pull_thread.submit(self._pull, step, coming)]
            if self._server is not None:
                self._running.append(self._serve_thread.submit(self._server.run_step, step))
            self._flat.arm()
        yield

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """A CUDA stream of its own, in which copies run beside the backward pass."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            yield

    def _on_ready(self, bucket: int, when: Mark) -> None:
        self.ready.append(when)
        self._running.append(self._push_thread.submit(self._push, self._step, bucket, when))

    def _push(self, step: int, bucket: int, ready: Mark) -> None:
        """Send a bucket's slices to all servers at once, and wait until they have it."""
        outgoing, whole = self._outgoing[bucket], self._host_gradients[bucket]
        if isinstance(ready, torch.cuda.Event):
            with self._copying():
                torch.cuda.current_stream().wait_event(ready)
                whole.copy_(self._flat.gradients[bucket], non_blocking=True)
                torch.cuda.current_stream().synchronize()
        if self._groups is not None:
            begin = self._notes.clock.host()
            _reduce_scatter(outgoing, whole, self._groups[0])
            end = self._notes.clock.host()
            self._note(step, bucket, "reduce-scatter", begin, end, ready)
            ready = end
        start = self._notes.clock.host()
        if self._beside is not None:
            self._beside.pushed[bucket].put(outgoing)
        going = [
            dist.isend(_of_part(outgoing, piece), server, tag=_tag(piece, _PUSH))
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
            arrived = self._notes.clock.host()
            if self._groups is not None:
                _all_gather(self._host_targets[bucket], self._incoming[bucket], self._groups[1])
                self._note(step, bucket, "all-gather", arrived, self._notes.clock.host(), arrived)
            if self._device.type != "cpu":
                with self._copying():
                    self._targets[bucket].copy_(self._host_targets[bucket], non_blocking=True)
                    torch.cuda.current_stream().synchronize()
            self._notes.add(step, "synchronise", f"B{bucket}", "pull", "pull", arrived, arrived)

    def _note(self, step: int, bucket: int, kind: OpKind, start: Mark, end: Mark, ready: Mark) -> None:
        self._notes.add(step, "synchronise", f"B{bucket}", kind, "collective", start, end, ready=ready)

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


def _reduce_scatter(part: Tensor, whole: Tensor, group: Any) -> None:
    # torch 2.13 renamed this and the next, and warns about the old names.
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    call(part, whole, group=group)


def _all_gather(whole: Tensor, part: Tensor, group: Any) -> None:
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(whole, part, group=group)
