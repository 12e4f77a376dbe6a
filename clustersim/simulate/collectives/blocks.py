"""The ranks of a collective by node, and the moves between them that algorithms are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.wiring import Wiring
from clustersim.simulate.collectives.moves import Moves

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blocks:
    """The ranks of a collective as (groups, nodes, members of a node), in order.

    A group that does not fill its nodes evenly counts as one member per node, whose neighbours may then share a node.
    `alike`: the members of every node stand at the same slots after its first one. `shares[j]` is the part of the
    buffer that channels through the NIC of member j of every node carry.
    """

    wiring: Wiring
    ranks: Ints
    alike: bool
    shares: Floats

    @property
    def nodes(self) -> int:
        """Nodes of a group."""
        return int(self.ranks.shape[1])

    @property
    def local(self) -> int:
        """Members of a group on one node."""
        return int(self.ranks.shape[2])

    @property
    def members(self) -> int:
        """Ranks of a group."""
        return self.nodes * self.local

    @property
    def across_nodes(self) -> bool:
        """Whether a group leaves its node."""
        if self.wiring.shared_host or self.nodes == 1:
            return False
        return self.local > 1 or not same_node(self.wiring, self.ranks, self.ranks[:, :1])

    def move(self, sources: Ints, targets: Ints, load: float) -> Moves:
        """Moves between arrays of ranks whose last axis runs over members of one node."""
        lanes = sources.shape[-1] if self.alike else 1
        return Moves(sources=sources.reshape(-1, lanes), targets=targets.reshape(-1, lanes), load=load)

    def across(self, sources: Ints, targets: Ints, load: float) -> list[Moves]:
        """The same member of another node gets its channels' share of `load`."""
        found = []
        for share in np.unique(self.shares):
            lanes = np.flatnonzero(self.shares == share)
            if share > 0.0:
                found.append(self.move(sources[..., lanes], targets[..., lanes], load * float(share)))
        return found

    def around(self, load: float, ranks: Ints | None = None) -> list[Moves]:
        """Channels inside every node (of `ranks`): each comes in at its own member, and visits all others in a circle,
        so that it leaves out one link."""
        if self.local == 1:
            return []
        places = self.ranks if ranks is None else ranks
        found = []
        for share in np.unique(self.shares):
            lanes = np.flatnonzero(self.shares == share)
            if share < 1.0:
                found.append(self.move(places[..., lanes - 1], places[..., lanes], load * (1.0 - float(share))))
        return found

    def flat(self) -> Blocks:
        """One member per node, whatever shares a node in truth."""
        if self.local == 1:
            return self
        groups = self.ranks.shape[0]
        return Blocks(wiring=self.wiring, ranks=self.ranks.reshape(groups, -1, 1), alike=True, shares=np.ones(1))


def blocks_of(wiring: Wiring, groups: Ints, channels: int | None = None) -> Blocks:
    """`groups` by node. `channels` divide the bytes, and enter and leave nodes by NICs of members spread evenly; by
    default every member has one, through its own NIC."""
    ordered = np.sort(groups, axis=1)
    count, members = ordered.shape
    ranks, alike = ordered.reshape(count, members, 1), True
    if wiring.shared_host:
        ranks = ordered.reshape(count, 1, members)
    else:
        nodes = wiring.node_of(ordered)
        per_node = int((nodes[0] == nodes[0, 0]).sum())
        if members % per_node == 0:
            found = ordered.reshape(count, members // per_node, per_node)
            inside = nodes.reshape(found.shape)
            if bool((inside == inside[:, :, :1]).all()) and bool((inside[:, 1:, 0] != inside[:, :-1, 0]).all()):
                ranks = found
                offsets = found - found[:, :, :1]
                alike = bool((offsets == offsets[:1, :1]).all())
    local = ranks.shape[2]
    uses = channels or local
    whole, rest = divmod(uses, local)
    entered = np.arange(rest) * local // max(1, rest)
    shares = (whole + np.bincount(entered, minlength=local)) / uses
    return Blocks(wiring=wiring, ranks=ranks, alike=alike, shares=shares)


def same_node(wiring: Wiring, sources: Ints, targets: Ints) -> bool:
    """Whether every source shares a node with the target beside it; what the last axis holds shares one anyway."""
    if wiring.shared_host:
        return True
    return bool((wiring.node_of(sources[..., 0]) == wiring.node_of(targets[..., 0])).all())
