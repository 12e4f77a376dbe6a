"""The optimizer step, over whatever tensors a scheme keeps: parameters, flat buckets, or a server's slices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clustersim.workload.training import Optimizer as Rule

# A scenario prices steps, it does not tune them: rates at which small models learn.
LEARNING_RATE: dict[Rule, float] = {"adam": 1e-3, "momentum": 0.02, "sgd": 0.1}
MOMENTUM = 0.9


class Optimizer:
    """Steps `weights` in place. Where their type is not `dtype`, a master copy of that type is kept and stepped."""

    def __init__(self, weights: Sequence[Tensor], rule: Rule, dtype: torch.dtype) -> None:
        self._weights = [weight.detach() for weight in weights]
        self._masters = [nn.Parameter(weight.to(dtype)) for weight in self._weights]
        self._step: torch.optim.Optimizer
        rate = LEARNING_RATE[rule]
        if rule == "adam":
            self._step = torch.optim.Adam(self._masters, lr=rate, fused=True)
        else:
            momentum = MOMENTUM if rule == "momentum" else 0.0
            self._step = torch.optim.SGD(self._masters, lr=rate, momentum=momentum, fused=True)

    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step with `gradients`, one per tensor, of any floating type."""
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = gradient.detach().to(master.dtype)
        self._step.step()
        for weight, master in zip(self._weights, self._masters, strict=True):
            master.grad = None
            if weight.data_ptr() != master.data_ptr():
                weight.copy_(master.detach())
