"""Blocks and heads for tests, named where they differ from one rank that computes all of a layer in 16 bits."""

from __future__ import annotations

from typing import Any

from clustersim.workload.block import Block
from clustersim.workload.head import Head
from clustersim.workload.model import Model


def block_of(model: Model, sequence: int, **changes: Any) -> Block:
    """One sequence of `sequence` tokens on one rank, with fused attention and element-wise passes, in bf16."""
    usual: dict[str, Any] = {
        "micro_batch": 1, "tp": 1, "sequence_parallel": False, "cp": 1, "ep": 1, "load": 1.0, "dtype": "bf16",
        "attention_kind": "flash", "fused": True,
    }  # fmt: skip
    return Block(model=model, sequence=sequence, **usual | changes)


def head_of(model: Model, sequence: int, *, in_place: bool = False, in_steps: bool = False, **changes: Any) -> Head:
    """The plain head behind `block_of` the same."""
    return Head.plain(block_of(model, sequence, **changes), in_place=in_place, in_steps=in_steps)
