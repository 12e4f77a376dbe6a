"""Tokens that experts receive."""

from __future__ import annotations

# Routed tokens are dealt out eight at a time where there are whole eights. Their numbers vary from step to step around
# these; what they must not do is to make every grouped GEMM one of odd rows, which the tensor cores are slow on.
_TOGETHER = 8


def routed_tokens(choices: int, load: float) -> int:
    """Tokens that the fullest expert-parallel rank receives, where `choices` is what each would on average."""
    each = dealt(choices)
    return choices if load == 1.0 else round(choices * load / each) * each


def dealt(tokens: int) -> int:
    """How many of so many tokens go to an expert at a time."""
    return _TOGETHER if tokens % _TOGETHER == 0 else 1
