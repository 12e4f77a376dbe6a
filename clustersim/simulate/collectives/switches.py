"""Reduction in the network: switches that add up what they are sent, and copy the sum."""

from __future__ import annotations

import numpy as np

from clustersim.cluster.wiring import Port, Traffic
from clustersim.simulate.collectives.blocks import Blocks
from clustersim.simulate.collectives.moves import Phase
from clustersim.simulate.collectives.rings import rails
from clustersim.simulate.collectives.trees import depth_of, tree_moves


def nvls(blocks: Blocks) -> Phase:
    """Allreduce by the switch of a node, which adds up what every device sends and copies the sum to all: each sends M
    and receives M. Over nodes, each device carries its part of the buffer through two trees over its rail."""
    ranks, local = blocks.ranks, blocks.local
    even = Blocks(wiring=blocks.wiring, ranks=ranks, alike=blocks.alike, shares=np.full(local, 1.0 / local))
    moves = [blocks.move(ranks, np.roll(ranks, -1, axis=2), 1.0)] if local > 1 else []
    if blocks.nodes > 1:
        moves += tree_moves(even, trees=2)
    return Phase(
        wiring=blocks.wiring,
        moves=tuple(moves),
        near_hops=2 if local > 1 else 0,
        far_hops=2 * depth_of(blocks.nodes),
        message=1.0 / (local if blocks.nodes == 1 else 2 * local),
    )


def sharp(blocks: Blocks) -> Phase:
    """Allreduce by the switches of the fabric: every NIC sends its part M/g of the buffer, summed in the node, up a
    tree of switches, and receives it back; a leaf sends up what it has summed. Inside nodes their switch where it can
    add, else rings. Two far hops: up the tree and down."""
    wiring, local = blocks.wiring, blocks.local
    machines = wiring.cluster.workers
    adds = all(machine.node.interconnect is not None and machine.node.interconnect.reduces for machine in machines)
    ranks = blocks.ranks
    moves = []
    if local > 1:
        inside = 1.0 if adds else 2.0 * (local - 1) / local
        moves.append(blocks.move(ranks, np.roll(ranks, -1, axis=2), inside))
    flat = ranks.ravel()
    nothing, part = np.zeros(len(flat)), np.full(len(flat), 1.0 / local)
    besides = wiring.spread(flat, nothing, part, nothing)
    if wiring.has_leaves:
        leaf = wiring.leaf_of(wiring.node_of(ranks), wiring.port_of(ranks))
        # Of every tree (a group's member of the same number on all nodes), each of its leaves once.
        tree = np.arange(ranks.shape[0])[:, None, None] * local + np.arange(local)
        keys = np.unique(tree * wiring.leaves + leaf)
        trees, leaves = np.divmod(keys, wiring.leaves)
        above = leaves[np.bincount(trees)[trees] > 1]
        for kind in (Port.LEAF_UP, Port.LEAF_DOWN):
            links, loads = wiring.through_leaf(kind, above, np.full(len(above), 1.0 / local))
            besides += Traffic(links=links, loads=loads, near=np.zeros(len(links), np.bool_))
    near_hops = 0
    if local > 1:
        near_hops = 2 if adds else 2 * (local - 1)
    return Phase(
        wiring=wiring,
        moves=tuple(moves),
        near_hops=near_hops,
        far_hops=2,
        message=1.0 / local,
        besides=besides,
    )


def nvls_gathering(blocks: Blocks) -> Phase:
    """All-gather by the switch of a node: what it copies is sent once and received by all. Rings over the rails."""
    ranks = blocks.ranks.ravel()
    out, into = (blocks.wiring.offset[kind] + ranks for kind in (Port.DEVICE_OUT, Port.DEVICE_IN))
    copied = Traffic(
        links=np.concatenate((out, into)),
        loads=np.repeat([1.0 / blocks.local, 1.0], len(ranks)),
        near=np.ones(2 * len(ranks), np.bool_),
    )
    across = rails(blocks, rounds=1) if blocks.nodes > 1 else None
    return Phase(
        wiring=blocks.wiring,
        moves=across.moves if across else (),
        near_hops=1,
        far_hops=across.far_hops if across else 0,
        message=1.0 / blocks.members,
        besides=copied,
    )
