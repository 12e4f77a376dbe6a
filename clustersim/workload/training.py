"""How a model is trained: batch, sequence, precision, optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.hardware.kernel import Dtype
from clustersim.units import FILE, Count, Fraction
from clustersim.workload.data import Data
from clustersim.workload.model import Model

Optimizer = Literal["adam", "sgd", "momentum"]

# fp32 (or fp64) state per parameter that the optimizer keeps besides a master copy of the weights.
STATE_TENSORS: dict[Optimizer, int] = {"adam": 2, "momentum": 1, "sgd": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """`global_batch` in sequences of `sequence` tokens; `tokens`: how many the whole training sees.

    `expert_imbalance`: tokens that the fullest of the ranks that share the experts receives, relative to their mean. At
    most all tokens go to one rank, so that more than ep counts as ep. `predicted`: the part of the tokens that the head
    sees, where only some are predicted and picked out before it (15 % in masked language modelling).
    """

    __pydantic_config__: ClassVar[Any] = FILE
    global_batch: int
    sequence: int
    precision: Dtype = "bf16"
    optimizer: Optimizer = "adam"
    tokens: Count | None = None
    expert_imbalance: float = 1.0
    predicted: Fraction = 1.0

    def __post_init__(self) -> None:
        for name in ("global_batch", "sequence"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 1.0 <= self.expert_imbalance < math.inf:
            raise ValueError(f"expert_imbalance must be at least 1, not {self.expert_imbalance:g}")

    def head_sequence(self, sequence: int, tp: int) -> int:
        """Tokens of a sequence (of `sequence` tokens on a rank) that the head sees: where some are left out, so many
        that tensor cores are aligned and `tp` ranks can share them."""
        unit = math.lcm(8, tp)
        seen = unit * max(1, round(sequence * self.predicted / unit))
        return sequence if self.predicted == 1.0 else min(sequence, seen)

    def expert_load(self, ep: int) -> float:
        """What the fullest of `ep` ranks that share the experts receives, relative to their mean."""
        return min(self.expert_imbalance, float(ep))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.global_batch * self.sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model and its training; and the data that it reads, where that is modelled."""

    __pydantic_config__: ClassVar[Any] = FILE
    model: Model
    training: Training
    data: Data | None = None
