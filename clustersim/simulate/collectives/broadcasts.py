"""Broadcasts from the first rank of every group; a reduction is the mirror image."""

from __future__ import annotations

import numpy as np

from clustersim.program.program import CollectiveAlgorithm
from clustersim.simulate.collectives.blocks import Blocks, same_node
from clustersim.simulate.collectives.moves import Phase
from clustersim.simulate.collectives.rings import ring
from clustersim.simulate.collectives.trees import depth_of


def broadcast(blocks: Blocks, algorithm: CollectiveAlgorithm) -> tuple[Phase, ...]:
    """From the first rank of every group; a reduction is the mirror image, in the other order."""
    match algorithm:
        case "chain":
            return (_chain(blocks),)
        case "binomial":
            return tuple(_binomial(blocks, scatter=False))
        case "scatter-allgather":
            return (*_binomial(blocks, scatter=True), ring(blocks, rounds=1))
        case _:
            raise AssertionError(f"{algorithm} is no broadcast")


def _chain(blocks: Blocks) -> Phase:
    """A pipeline through all ranks, one per channel: M/B and (n-1) alpha in the limit of small pieces."""
    ranks, nodes, local = blocks.ranks, blocks.nodes, blocks.local
    moves = []
    if local > 1:
        moves.append(blocks.move(ranks[:, 0, :-1], ranks[:, 0, 1:], 1.0))
    if nodes > 1:
        moves += blocks.around(1.0, ranks[:, 1:]) + blocks.across(ranks[:, :-1], ranks[:, 1:], 1.0)
    return Phase(
        wiring=blocks.wiring,
        moves=tuple(moves),
        near_hops=blocks.members - nodes,
        far_hops=nodes - 1,
        message=1.0 / blocks.members,
    )


def _binomial(blocks: Blocks, *, scatter: bool) -> list[Phase]:
    """ceil(lg n) steps; in each, every rank that has the data sends it to one that has not, or (scatter) that one's
    share of it and the shares of those behind it (Thakur et al. 2005)."""
    flat = blocks.flat()
    ranks, members = flat.ranks, flat.members
    result = []
    distance = 1 << (depth_of(members) - 1)
    while distance:
        senders = np.arange(0, members - distance, 2 * distance)
        if scatter:
            behind = np.minimum(distance, members - distance - senders)
            loads = behind / members
        else:
            loads = np.ones(len(senders))
        moves = [
            flat.move(ranks[:, senders[loads == load]], ranks[:, senders[loads == load] + distance], float(load))
            for load in np.unique(loads)
        ]
        near = same_node(flat.wiring, ranks[:, senders], ranks[:, senders + distance])
        result.append(
            Phase(
                wiring=flat.wiring,
                moves=tuple(moves),
                near_hops=1 if near else 0,
                far_hops=0 if near else 1,
                message=float(loads.max()),
            )
        )
        distance //= 2
    return result
