"""Data parallelism, one all-reduce per bucket: DistributedDataParallel where it overlaps, flat buckets where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clustersim.errors import ExecutionError
from clustersim.execute.clock import Mark, Notes
from clustersim.execute.gpt import TORCH_DTYPE, Gpt
from clustersim.execute.gradients import FlatBuckets, bucket_parameters
from clustersim.execute.optimizer import Optimizer
from clustersim.execute.task import Task
from clustersim.program.program import Bucket


class Synchroniser(Protocol):
    """How a worker's gradients become the weights of the next step."""

    ready: list[Mark]
    """When each bucket's gradients were complete in this step, in order."""

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The summed loss of a micro-batch, by the model that this scheme wraps."""

    def micro_batch(self, step: int, last: bool) -> Any:
        """A context for the forward and the backward pass of one micro-batch."""

    def finish(self, step: int) -> None:
        """After the last backward pass: everything until the weights of the next step are in place."""

    def close(self) -> None:
        """After the last step."""


def note_update(notes: Notes, step: int, update: Callable[[], None]) -> None:
    """Run and record the optimizer step of a worker."""
    start = notes.clock.mark()
    update()
    notes.add(step, "update", "all", "compute", "compute", start, notes.clock.mark())


class FlatAllReduce:
    """All-reduce of flat buckets after the whole backward pass; with one rank, none at all."""

    def __init__(self, task: Task, gpt: Gpt, notes: Notes) -> None:
        precision = task.layout.precision
        self.ready: list[Mark] = []
        self._gpt = gpt
        self._notes = notes
        self._ranks = task.layout.mesh.dp
        self._flat = FlatBuckets(
            gpt, task.program.buckets, TORCH_DTYPE[precision.gradient], notes.clock, self._on_ready
        )
        rule = task.workload.training.optimizer
        self._optimizer = Optimizer(self._flat.weights, rule, TORCH_DTYPE[precision.optimizer])

    def _on_ready(self, bucket: int, when: Mark) -> None:
        self.ready.append(when)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self._gpt(tokens, targets)  # type: ignore[no-any-return]

    @contextmanager
    def micro_batch(self, step: int, last: bool) -> Iterator[None]:
        if last:
            self.ready.clear()
            self._flat.arm()
        yield

    def finish(self, step: int) -> None:
        if self._ranks > 1:
            for index, gradient in enumerate(self._flat.gradients):
                start = self._notes.clock.mark()
                dist.all_reduce(gradient)
                end = self._notes.clock.mark()
                self._notes.add(
                    step, "synchronise", f"B{index}", "all-reduce", "collective", start, end, ready=self.ready[index]
                )
        note_update(self._notes, step, lambda: self._optimizer.step(self._flat.gradients))

    def close(self) -> None:
        pass


# From here on the future of a gloo collective on GPU tensors orders the streams (pytorch pull request 170812); before,
# it could hand over what was not summed yet.
_SAFE_GLOO_FUTURES = (2, 11)


def overlap_is_safe(task: Task, torch_version: str) -> bool:
    """Whether all-reduces may run beside the backward pass: over gloo, GPU tensors need a PyTorch that waits for them.

    Ranks that share a GPU talk over gloo."""
    major, minor = torch_version.split(".")[:2]
    over_gloo = task.device_kind == "gpu" and task.share_devices
    return not over_gloo or (int(major), int(minor)) >= _SAFE_GLOO_FUTURES


class Stage(nn.Module):
    """The layers of one bucket."""

    def __init__(self, gpt: Gpt, bucket: Bucket, layers: int) -> None:
        super().__init__()
        self.layers = gpt.span(bucket.first_layer, bucket.last_layer)
        self.has_head = bucket.last_layer == layers

    def forward(self, x: Tensor, targets: Tensor, tied: Tensor | None) -> Tensor:
        *body, last = self.layers
        for layer in body:
            x = layer(x)
        y: Tensor = last(x, targets, tied) if self.has_head else last(x)
        return y


class OverlappedAllReduce:
    """One DistributedDataParallel per bucket, with room for exactly that bucket, so that PyTorch's own machinery starts
    the plan's all-reduces during the backward pass. A bucket that PyTorch divides otherwise is an error."""

    def __init__(self, task: Task, gpt: Gpt, notes: Notes) -> None:
        precision = task.layout.precision
        self.ready: list[Mark] = []
        self._notes = notes
        self._gpt = gpt
        self._travel = TORCH_DTYPE[precision.gradient]
        self._step = 0
        self._stages: list[DistributedDataParallel] = []
        for bucket in task.program.buckets:
            parameters = bucket_parameters(gpt, bucket)
            size = sum(p.numel() * p.element_size() for p in parameters)
            stage = DistributedDataParallel(
                Stage(gpt, bucket, task.workload.model.layers),
                gradient_as_bucket_view=True,
                bucket_cap_mb=size // 2**20 + 2,
            )
            # A lambda: PyTorch compares a hook's annotations with types, and here they are strings.
            stage.register_comm_hook(bucket, lambda state, bucket: self._all_reduce(state, bucket))
            self._stages.append(stage)
        self._parameters = [p for bucket in task.program.buckets for p in bucket_parameters(gpt, bucket)]
        rule = task.workload.training.optimizer
        self._optimizer = Optimizer(self._parameters, rule, TORCH_DTYPE[precision.optimizer])

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = tokens
        for stage in reversed(self._stages):
            x = stage(x, targets, self._gpt.word)
        return x

    @contextmanager
    def micro_batch(self, step: int, last: bool) -> Iterator[None]:
        self._step = step
        self.ready.clear()
        with ExitStack() as stack:
            if not last:
                for stage in self._stages:
                    stack.enter_context(stage.no_sync())
            yield

    def _all_reduce(self, bucket: Bucket, found: Any) -> torch.futures.Future[Tensor]:
        """The communication hook: the sum over all ranks, in the type in which gradients travel."""
        ready = self._notes.clock.mark()
        gradient: Tensor = found.buffer()
        if found.index() != 0 or not found.is_last() or gradient.numel() != bucket.elements:
            raise ExecutionError(
                f"bucket B{bucket.index} has {bucket.elements} elements in the plan, but PyTorch {torch.__version__} "
                f"sends {gradient.numel()}; set overlap: false in the plan's scheme"
            )
        assert len(self.ready) == bucket.index, "buckets must become ready in order"
        self.ready.append(ready)
        step = self._step
        sent = gradient.to(self._travel)
        work = dist.all_reduce(sent, async_op=True)
        assert work is not None

        def done(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            summed = future.value()[0]
            end = self._notes.clock.mark()
            self._notes.add(step, "synchronise", f"B{bucket.index}", "all-reduce", "collective", ready, end)
            return gradient if summed.data_ptr() == gradient.data_ptr() else gradient.copy_(summed)

        result: torch.futures.Future[Tensor] = work.get_future().then(done)
        return result

    def finish(self, step: int) -> None:
        gradients = []
        for parameter in self._parameters:
            assert parameter.grad is not None
            gradients.append(parameter.grad)
        note_update(self._notes, step, lambda: self._optimizer.step(gradients))
        for parameter in self._parameters:
            parameter.grad = None

    def close(self) -> None:
        pass
