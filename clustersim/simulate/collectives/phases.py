"""Collectives as phases of flows on links: what each algorithm sends over which wires, and how many hops it waits for.

A collective of k identical steps is one fluid phase: the bytes of all steps, and the sum over its hops of each hop's
alpha. Pipelined algorithms (rings, trees, chains) are taken in the limit of small pieces: a hop's alpha is waited for
once, and no link waits for a whole buffer. `groups` arrays are (groups, members): all groups that run the collective at
once, so that what they share (a NIC, a leaf's uplinks) is counted. The first member is the root.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Machine
from clustersim.cluster.wiring import Wiring
from clustersim.hardware.curve import alpha_s, effective_rate
from clustersim.program.program import CollectiveAlgorithm, CollectiveKind
from clustersim.simulate.collectives.blocks import Blocks, blocks_of
from clustersim.simulate.collectives.broadcasts import broadcast
from clustersim.simulate.collectives.exchanges import all_to_all, doubling, exchange, halving_doubling
from clustersim.simulate.collectives.moves import Phase
from clustersim.simulate.collectives.rings import inside_nodes, rails, ring
from clustersim.simulate.collectives.switches import nvls, nvls_gathering, sharp
from clustersim.simulate.collectives.trees import tree

Ints = NDArray[np.int64]

ALGORITHMS_OF: dict[CollectiveKind, tuple[CollectiveAlgorithm, ...]] = {
    "all_reduce": ("ring", "tree", "binary-tree", "halving-doubling", "hierarchical", "nvls", "sharp"),
    "all_gather": ("ring", "halving-doubling", "hierarchical", "nvls"),
    "reduce_scatter": ("ring", "halving-doubling", "hierarchical", "nvls"),
    "all_to_all": ("pairwise", "per-rail"),
    "broadcast": ("chain", "binomial", "scatter-allgather"),
    "reduce": ("chain", "binomial"),
    "send_recv": ("direct",),
}
# Of these, copies run side by side, each over a NIC of its own; the others use all NICs of a node by themselves.
CHANNELLED: frozenset[CollectiveAlgorithm] = frozenset({"ring", "tree", "binary-tree", "chain"})


def phases(
    wiring: Wiring, groups: Ints, kind: CollectiveKind, algorithm: CollectiveAlgorithm, channels: int | None = None
) -> tuple[Phase, ...]:
    """The phases of a collective; none for groups of one rank. O(ranks * log members).

    All-to-all between whole nodes is pairwise unless the algorithm says `per-rail`.
    """
    if groups.shape[1] == 1:
        return ()
    blocks = blocks_of(wiring, groups, channels)
    match kind:
        case "all_reduce":
            return _all_reduce(blocks, algorithm)
        case "all_gather":
            return _gathering(blocks, algorithm)
        case "reduce_scatter":
            return tuple(phase.reversed() for phase in reversed(_gathering(blocks, algorithm)))
        case "all_to_all":
            return all_to_all(blocks, per_rail=algorithm == "per-rail")
        case "broadcast":
            return broadcast(blocks, algorithm)
        case "reduce":
            return tuple(phase.reversed() for phase in reversed(broadcast(blocks, algorithm)))
        case "send_recv":
            flat = blocks.flat().ranks
            return (exchange(blocks, flat, np.roll(flat, -1, axis=1), 1.0),)


def _all_reduce(blocks: Blocks, algorithm: CollectiveAlgorithm) -> tuple[Phase, ...]:
    match algorithm:
        case "ring":
            return (ring(blocks, rounds=2),)
        case "tree":
            return (tree(blocks, trees=2),)
        case "binary-tree":
            return (tree(blocks, trees=1),)
        case "hierarchical":
            return _hierarchical(blocks)
        case "halving-doubling":
            return halving_doubling(blocks)
        case "nvls":
            return (nvls(blocks),)
        case "sharp":
            return (sharp(blocks),)
        case _:
            raise AssertionError(f"{algorithm} is no allreduce")


def _hierarchical(blocks: Blocks) -> tuple[Phase, ...]:
    """Reduce-scatter in the node, allreduce of each part per rail, all-gather in the node."""
    if blocks.nodes == 1 or blocks.local == 1:
        return (ring(blocks, rounds=2),)
    inside = inside_nodes(blocks)
    return (inside, rails(blocks, rounds=2), inside)


def _gathering(blocks: Blocks, algorithm: CollectiveAlgorithm) -> tuple[Phase, ...]:
    """All-gather; a reduce-scatter is its mirror image, in the other order."""
    match algorithm:
        case "ring":
            return (ring(blocks, rounds=1),)
        case "hierarchical":
            if blocks.nodes == 1 or blocks.local == 1:
                return (ring(blocks, rounds=1),)
            return (rails(blocks, rounds=1), inside_nodes(blocks))
        case "halving-doubling":
            steps = doubling(blocks, times=1)
            return tuple(steps)
        case "nvls":
            return (nvls_gathering(blocks),)
        case _:
            raise AssertionError(f"{algorithm} is no all-gather")


# ------------------------------------------------------------------------------------------------ wires


def wire_efficiency(machine: Machine, message_bytes: float) -> tuple[float, float]:
    """Fractions of the datasheet rate that messages of this size reach: inside a node, and between nodes."""
    far = effective_rate(machine.nic, message_bytes) / machine.nic.rate_bytes_per_s
    if machine.interconnect is None:
        return far, far
    near = effective_rate(machine.interconnect, message_bytes) / machine.interconnect.rate_bytes_per_s
    return near, far


def latency_s(phase: Phase, machine: Machine, hop_latency_s: float, switches: int | None = None) -> float:
    """Seconds that the hops of a phase wait: the sum of their alphas, and of the fabric switches on the way, which the
    phase counts unless they are known."""
    near = alpha_s(machine.interconnect) if machine.interconnect is not None else 0.0
    if not phase.far_hops:
        return phase.near_hops * near
    crossed = phase.switches if switches is None else switches
    return phase.near_hops * near + phase.far_hops * (alpha_s(machine.nic) + crossed * hop_latency_s)


def launch_s(found: Sequence[Phase], machine: Machine) -> float:
    """What the whole operation pays once: the launch of the network where it leaves a node."""
    link = machine.nic if any(phase.far_hops for phase in found) else machine.interconnect
    return link.launch_s if link is not None else 0.0
