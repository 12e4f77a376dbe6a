"""Who meets whom: the groups of ranks that run collectives together, and the classes that take part in them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clustersim.layout.layout import node_peers
from clustersim.program.program import Group
from clustersim.simulate.fold import replica_groups
from clustersim.simulate.prices.placement import Placement

Ints = NDArray[np.int64]


class Groups:
    """The groups of the classes of a placement, by kind; each found once."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._groups: dict[tuple[Group, int], tuple[tuple[int, ...], Ints]] = {}

    def of_class(self, kind: Group, of: int) -> tuple[tuple[int, ...], Ints]:
        """The classes that take part in class `of`'s groups of this kind, and all such groups as (groups, members)."""
        found = self._groups.get((kind, of))
        if found is None:
            mine = self.members(kind, self.placement.folding.members[of])
            classes = tuple(int(c) for c in np.unique(self.placement.folding.class_of[mine[0]]))
            assert kind != "tp" or classes == (of,)
            if len(classes) > 1 or kind == "embedding":
                every = np.concatenate([self.placement.folding.members[c] for c in classes])
                mine = self.members(kind, every)
            found = self._groups[kind, of] = (classes, mine)
        return found

    def members(self, kind: Group, ranks: Ints) -> Ints:
        """The distinct groups of a kind that hold any of `ranks`, one a row."""
        grid = self.placement.folding.grid
        stage, dp, tp = self.placement.coordinates(ranks)
        if kind == "tp":
            keys = np.unique(stage * grid.shape[1] + dp)
            return grid[keys // grid.shape[1], keys % grid.shape[1], :]
        if kind == "embedding":
            keys = np.unique(dp * grid.shape[2] + tp)
            return grid[[0, -1]][:, keys // grid.shape[2], keys % grid.shape[2]].T
        if kind in ("cp", "ep", "expert-dp"):
            groups = replica_groups(self.placement.program.mesh, kind)
            group_of = np.empty(self.placement.program.mesh.replicas, np.int64)
            group_of[groups] = np.arange(len(groups))[:, None]
            lanes = np.unique((stage * grid.shape[2] + tp) * len(groups) + group_of[dp])
            place, which = np.divmod(lanes, len(groups))
            found: Ints = grid[(place // grid.shape[2])[:, None], groups[which], (place % grid.shape[2])[:, None]]
            return found
        keys = np.unique(stage * grid.shape[2] + tp)
        whole = grid[keys // grid.shape[2], :, keys % grid.shape[2]]
        if kind == "dp":
            return whole
        program, devices = self.placement.program, self.placement.wiring.devices_per_node
        split = whole.reshape(-1, node_peers(program.mesh, program.order, devices))
        return split[np.isin(split, ranks).any(axis=1)]
