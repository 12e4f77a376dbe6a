"""Weights and gradients of each bucket as one flat tensor, and the moment when a bucket's gradients are complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from clustersim.execute.clock import Clock, Mark
from clustersim.execute.gpt import Gpt
from clustersim.program.program import Bucket


def bucket_parameters(gpt: Gpt, bucket: Bucket) -> list[nn.Parameter]:
    """The parameters of a bucket's layers, in the order in which they lie in the flat tensors."""
    parameters = list(gpt.span_parameters(bucket.first_layer, bucket.last_layer))
    assert sum(p.numel() for p in parameters) == bucket.elements, bucket
    return parameters


class FlatBuckets:
    """Moves every parameter of `gpt` into `weights[bucket]`, and copies gradients into `gradients[bucket]` as the
    backward pass of an armed micro-batch completes them; `on_ready(bucket, when)` is called once per bucket, in order.

    A parameter's gradient is complete only after every op that reads the parameter has run backward, so that a ready
    bucket's weights may be overwritten at once.
    """

    def __init__(
        self,
        gpt: Gpt,
        buckets: Sequence[Bucket],
        gradient_dtype: torch.dtype,
        clock: Clock,
        on_ready: Callable[[int, Mark], None],
        multiple: int = 1,
    ) -> None:
        """`multiple`: the flat tensors are padded with zeros to a multiple of so many elements."""
        self.weights: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self._clock = clock
        self._on_ready = on_ready
        self._armed = False
        self._sizes: list[int] = []
        self._left: list[int] = []
        for bucket in buckets:
            parameters = bucket_parameters(gpt, bucket)
            flat = torch.cat([p.detach().flatten() for p in parameters])
            flat = torch.nn.functional.pad(flat, (0, -len(flat) % multiple))
            gradient = torch.zeros_like(flat, dtype=gradient_dtype)
            at = 0
            for parameter in parameters:
                stop = at + parameter.numel()
                parameter.data = flat[at:stop].view_as(parameter)
                piece = gradient[at:stop].view_as(parameter)
                hook = partial(self._accumulated, bucket.index, piece)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                at = stop
            self.weights.append(flat)
            self.gradients.append(gradient)
            self._sizes.append(len(parameters))

    def arm(self) -> None:
        """The next backward pass is the last one of the step."""
        self._left = list(self._sizes)
        self._armed = True

    def _accumulated(self, bucket: int, piece: Tensor, parameter: Tensor) -> None:
        if not self._armed:
            return
        assert parameter.grad is not None
        piece.copy_(parameter.grad)
        parameter.grad = None
        self._left[bucket] -= 1
        if self._left[bucket] == 0:
            assert not any(self._left[:bucket]), "buckets must become ready in order"
            self._armed = any(self._left)
            self._on_ready(bucket, self._clock.mark())
