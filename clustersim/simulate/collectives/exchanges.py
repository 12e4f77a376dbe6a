"""Exchanges between pairs of ranks: halving and doubling, all-to-all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.wiring import Wiring
from clustersim.simulate.collectives.blocks import Blocks, same_node
from clustersim.simulate.collectives.moves import Phase

Ints = NDArray[np.int64]


def halving_doubling(blocks: Blocks) -> tuple[Phase, ...]:
    """Recursive halving and doubling (Thakur et al. 2005), nearest partner first; other counts than powers of two fold
    the extra ranks into partners before and after."""
    members = blocks.members
    power = 1 << (members.bit_length() - 1)
    extra = members - power
    steps = doubling(blocks, times=2)
    if not extra:
        return tuple(steps)
    ranks = _by_powers(blocks)
    per_node = ranks.shape[2]
    away, home = ranks[:, power // per_node :], ranks[:, : extra // per_node]
    return (exchange(blocks, away, home, 1.0), *steps, exchange(blocks, home, away, 1.0))


def _by_powers(blocks: Blocks) -> Ints:
    """The ranks by node where a node holds a power of two of them, else one by one."""
    local = blocks.local
    return blocks.ranks if local & (local - 1) == 0 else blocks.flat().ranks


def doubling(blocks: Blocks, times: int) -> list[Phase]:
    """The exchanges with the partner at distance 1, 2, 4, .. of the first power of two of ranks: half the buffer with
    the nearest, a quarter with the next; `times` over (2: halving on the way there, doubling on the way back)."""
    ranks = _by_powers(blocks)
    local = ranks.shape[2]
    power = 1 << (blocks.members.bit_length() - 1)
    active = ranks[:, : power // local]
    result = []
    distance = 1
    while distance < power:
        if distance < local:
            partner = active[:, :, np.arange(local) ^ distance]
        else:
            partner = active[:, np.arange(power // local) ^ (distance // local)]
        result.append(exchange(blocks, active, partner, 0.5 / distance, times=times))
        distance *= 2
    return result


def exchange(blocks: Blocks, sources: Ints, targets: Ints, share: float, times: int = 1) -> Phase:
    """One step in which some ranks send `share` of the buffer each, `times` over; near where no route leaves a node."""
    near = same_node(blocks.wiring, sources, targets)
    return Phase(
        wiring=blocks.wiring,
        moves=(blocks.move(sources, targets, share * times),),
        near_hops=times if near else 0,
        far_hops=0 if near else times,
        message=share,
    )


def all_to_all(blocks: Blocks, *, per_rail: bool) -> tuple[Phase, ...]:
    """Every rank sends every other its n-th part of M.

    Pairwise: one exchange with each. Per rail: what goes to another node is first handed, in the node, to the member
    that stands at the receiver's place there, so that between nodes only members of the same place talk.
    """
    wiring = blocks.wiring
    groups, nodes, local = blocks.ranks.shape
    if per_rail and nodes > 1 and local > 1:
        inside = blocks.ranks.reshape(groups * nodes, local)
        rails = blocks.ranks.transpose(0, 2, 1).reshape(groups * local, nodes)
        return (_pairwise(wiring, inside), _pairwise(wiring, rails))
    return (_pairwise(wiring, blocks.ranks.reshape(groups, -1)),)


def _pairwise(wiring: Wiring, groups: Ints) -> Phase:
    """Bytes by arithmetic: of a rank's n - 1 partners, those in its node, those below its leaf, and the others."""
    count, members = groups.shape
    ranks = groups.ravel()
    group = np.repeat(np.arange(count), members)
    node = np.zeros_like(ranks) if wiring.shared_host else wiring.node_of(ranks)
    beside = _alike(group * wiring.nodes + node)
    beyond = np.zeros(len(ranks))
    if wiring.has_leaves and not wiring.shared_host:
        leaf = wiring.leaf_of(node, wiring.port_of(ranks))
        below = _alike(group * wiring.leaves + leaf)
        both = _alike((group * wiring.nodes + node) * wiring.leaves + leaf)
        beyond = (members - beside - below + both) / members
    apart = np.zeros(len(ranks))
    if wiring.switches_per_node and not wiring.shared_host:
        apart = (beside - _alike(group * wiring.nodes * wiring.switches_per_node + wiring.switch_of(ranks))) / members
    fewest = int(beside.min())
    return Phase(
        wiring=wiring,
        moves=(),
        near_hops=fewest - 1,
        far_hops=members - fewest,
        message=1.0 / members,
        besides=wiring.spread(ranks, (beside - 1) / members, (members - beside) / members, beyond, apart),
    )


def _alike(keys: Ints) -> Ints:
    """How many keys are the same as each."""
    _, inverse, count = np.unique(keys, return_inverse=True, return_counts=True)
    return count[inverse]
