"""Prices of a program on a folded cluster: how long works, updates and collectives take, and what flows carry."""

from __future__ import annotations

from clustersim.cluster.cluster import Cluster
from clustersim.hardware.framework import Framework
from clustersim.program.program import Program, Read
from clustersim.simulate.flows import Flows, Patterns
from clustersim.simulate.prices.collectives import CollectivePrices
from clustersim.simulate.prices.compute import ComputePrices
from clustersim.simulate.prices.groups import Groups
from clustersim.simulate.prices.placement import place
from clustersim.simulate.prices.sends import SendPrices
from clustersim.simulate.prices.servers import ServerPrices
from clustersim.simulate.reading import read_flows


class Prices:
    """Prices of one program on one cluster, by what is priced.

    The parts share the placement, which none changes, the groups, and the patterns, to which every flow adds the links
    that it uses.
    """

    def __init__(self, program: Program, cluster: Cluster, framework: Framework, *, every_rank: bool) -> None:
        self.placement = place(program, cluster, framework, every_rank=every_rank)
        self.patterns = Patterns(self.placement.wiring)
        self.groups = Groups(self.placement)
        self.collectives = CollectivePrices(self.placement, self.groups, self.patterns)
        self.compute = ComputePrices(self.placement, self.groups, self.collectives)
        self.sends = SendPrices(self.placement, self.patterns)
        self.servers = ServerPrices(self.placement, self.patterns)

    def read_flows(self, of: int, read: Read) -> Flows:
        """Every rank of class `of` reads its part of a step's batch."""
        at = self.placement
        return read_flows(
            read, at.folding.members[of], at.machines[of], at.wiring, at.folding, self.patterns,
            at.framework.network_scale,
        )  # fmt: skip
