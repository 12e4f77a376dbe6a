"""The finaliser of SplitMix64 (Steele et al., OOPSLA'14): a hash of 64-bit numbers for folding, link classes, ECMP."""

from __future__ import annotations

from typing import overload

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


@overload
def scramble(value: int) -> int: ...
@overload
def scramble(value: Hashes) -> Hashes: ...


def scramble(value: int | Hashes) -> int | Hashes:
    """The next output of SplitMix64 from the state `value`, or from each of an array: a bijection of 64-bit numbers.
    A number and an array that holds it give the same."""
    if isinstance(value, int):
        value = (value + _GOLDEN) & _MASK
        value = ((value ^ (value >> 30)) * _FIRST) & _MASK
        value = ((value ^ (value >> 27)) * _SECOND) & _MASK
        return value ^ (value >> 31)
    value = value.astype(np.uint64) + np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_FIRST)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_SECOND)
    return value ^ (value >> np.uint64(31))
