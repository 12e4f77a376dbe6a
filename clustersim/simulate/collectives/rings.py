"""Rings: over all ranks, over the same members of nodes (rails), and inside nodes."""

from __future__ import annotations

import numpy as np

from clustersim.simulate.collectives.blocks import Blocks
from clustersim.simulate.collectives.moves import Phase


def ring(blocks: Blocks, rounds: int) -> Phase:
    """Rings, one per channel, each leaving the node through its own NIC port.

    `rounds` is 2 for an allreduce (reduce-scatter and all-gather), 1 for either alone. Every rank sends
    rounds (n-1)/n M (Patarasuk & Yuan 2009).
    """
    members, nodes = blocks.members, blocks.nodes
    sent = rounds * (members - 1) / members
    ranks = blocks.ranks
    if nodes == 1:
        moves = [blocks.move(ranks, np.roll(ranks, -1, axis=2), sent)]
    else:
        moves = blocks.around(sent) + blocks.across(ranks, np.roll(ranks, -1, axis=1), sent)
    return Phase(
        wiring=blocks.wiring,
        moves=tuple(moves),
        near_hops=rounds * (members - nodes),
        far_hops=rounds * (nodes - 1),
        message=1.0 / members,
    )


def rails(blocks: Blocks, rounds: int) -> Phase:
    """A ring through the same member of every node, over that member's part of the buffer."""
    nodes = blocks.nodes
    sent = rounds * (nodes - 1) / nodes / blocks.local
    return Phase(
        wiring=blocks.wiring,
        moves=(blocks.move(blocks.ranks, np.roll(blocks.ranks, -1, axis=1), sent),),
        near_hops=0,
        far_hops=rounds * (nodes - 1),
        message=1.0 / blocks.members,
    )


def inside_nodes(blocks: Blocks) -> Phase:
    """A ring over the members of every node, once round."""
    local = blocks.local
    return Phase(
        wiring=blocks.wiring,
        moves=(blocks.move(blocks.ranks, np.roll(blocks.ranks, -1, axis=2), (local - 1) / local),),
        near_hops=local - 1,
        far_hops=0,
        message=1.0 / local,
    )
