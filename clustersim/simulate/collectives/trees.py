"""Binary trees over nodes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clustersim.simulate.collectives.blocks import Blocks
from clustersim.simulate.collectives.moves import Moves, Phase

Ints = NDArray[np.int64]


def tree_parents(n: int) -> Ints:
    """Parents in a binary tree over 0..n-1; the root is 0 (parent -1), its only child the topmost power of two.

    For r with lowest set bit b the parent is (r ^ b) | 2b, or r ^ b where that is not below n (NCCL's btree rule).
    """
    ranks = np.arange(n)
    low = ranks & -ranks
    up = (ranks ^ low) | (low << 1)
    parents = np.where(up < n, up, ranks ^ low)
    parents[0] = -1
    return parents


def tree_edges(count: int, trees: int) -> list[tuple[Ints, Ints]]:
    """(children, parents) of one binary tree over 0..count-1, or of two whose inner nodes differ."""
    parents = tree_parents(count)
    children = np.flatnonzero(parents >= 0)
    above = parents[children]
    found = [(children, above)]
    if trees == 2:
        mirrored = (count - 1 - children, count - 1 - above)
        found.append(mirrored if count % 2 == 0 else ((children + 1) % count, (above + 1) % count))
    return found


def tree_moves(blocks: Blocks, trees: int) -> list[Moves]:
    """What trees over the nodes carry up and down, between the same members of nodes."""
    found = []
    for low, high in tree_edges(blocks.nodes, trees):
        parents, children = blocks.ranks[:, high, :], blocks.ranks[:, low, :]
        up = blocks.across(children, parents, 1.0 / trees)
        found += [*up, *(move.reversed() for move in up)]
    return found


def depth_of(count: int) -> int:
    return (count - 1).bit_length()


def tree(blocks: Blocks, trees: int) -> Phase:
    """Binary trees over the nodes, chains inside; in a single node the trees run over its ranks.

    Two trees carry half each (Sanders et al. 2009; NCCL 2.4): every rank is an inner node of one only, so that it sends
    and receives at most 2 M over both trees and both passes, whatever the number of ranks. An inner node of a single
    tree receives from two children and sends to one parent, and the other way round: 3 M, since the broadcast of one
    piece runs beside the reduction of the next (in sequence it would take 4 M).
    """
    if blocks.nodes == 1:
        blocks = blocks.flat()
    depth, local = depth_of(blocks.nodes), blocks.local
    across = blocks.across_nodes
    return Phase(
        wiring=blocks.wiring,
        moves=tuple(tree_moves(blocks, trees) + blocks.around(2.0)),
        near_hops=2 * (local - 1) if across else 2 * depth,
        far_hops=2 * depth if across else 0,
        message=float(blocks.shares.max()) / trees,
    )
