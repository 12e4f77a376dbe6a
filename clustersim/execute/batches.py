"""Which sequences a rank trains on, and in which micro-batches. No torch here."""

from __future__ import annotations

from clustersim.layout.layout import Layout


def rank_sequences(global_batch: int, dp: int, rank: int) -> range:
    """The sequences of the global batch that data-parallel rank `rank` sees: contiguous, as even as can be, the
    larger shares first."""
    base, extra = divmod(global_batch, dp)
    first = rank * base + min(rank, extra)
    return range(first, first + base + (rank < extra))


def micro_batches(layout: Layout, global_batch: int, rank: int) -> tuple[range, ...]:
    """The sequences of each micro-batch of data-parallel rank `rank`.

    Every rank has the same number of micro-batches. They are full until just enough sequences are left to give each
    of the others one; where a rank has fewer sequences than micro-batches, its first ones are empty, so that the last
    one, whose backward pass starts the synchronisation, never is.
    """
    mine = rank_sequences(global_batch, layout.mesh.dp, rank)
    count = layout.micro_batches(global_batch)
    empty = max(0, count - len(mine))
    result = [range(mine.start, mine.start)] * empty
    at = mine.start
    for left in range(count - empty - 1, -1, -1):
        size = min(layout.micro_batch, mine.stop - at - left)
        result.append(range(at, at + size))
        at += size
    assert at == mine.stop, (global_batch, layout.mesh.dp, rank)
    return tuple(result)
