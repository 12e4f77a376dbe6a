"""Prices of sends between stages: the flows that activations and their gradients put on the links."""

from __future__ import annotations

from clustersim.cluster.wiring import Traffic
from clustersim.simulate.collectives.phases import wire_efficiency
from clustersim.simulate.flows import Flows, Patterns, side_by_side
from clustersim.simulate.prices.placement import Placement


class SendPrices:
    """Sends of the ranks of each class to their peers at other stages; the traffic of each pair is found once."""

    def __init__(self, placement: Placement, patterns: Patterns) -> None:
        self.placement = placement
        self.patterns = patterns
        self._sends: dict[tuple[int, int], list[tuple[Traffic, tuple[int, int]]]] = {}

    def flows(self, of: int, to_stage: int, size: int) -> Flows:
        """Every rank of class `of` sends `size` bytes to its peer at another stage."""
        return side_by_side([self._lane_sends(traffic, way, size) for traffic, way in self._send_lanes(of, to_stage)])

    def _send_lanes(self, of: int, to_stage: int) -> list[tuple[Traffic, tuple[int, int]]]:
        """The traffic of each lane's sends, and one rank of it with its peer."""
        found = self._sends.get((of, to_stage))
        if found is None:
            ranks = self.placement.folding.members[of]
            _, dp, tp = self.placement.coordinates(ranks)
            peers = self.placement.folding.grid[to_stage, dp, tp]
            found = self._sends[of, to_stage] = [
                (self.placement.wiring.between(ranks[lane], peers[lane]), (int(ranks[lane[0]]), int(peers[lane[0]])))
                for lane in self.placement.folding.lanes(ranks)
            ]
        return found

    def _lane_sends(self, traffic: Traffic, way: tuple[int, int], size: int) -> Flows:
        machine = self.placement.machine_of_rank(way[0])
        near, far = wire_efficiency(machine, size)
        inside = bool(traffic.near.all()) and len(traffic.near) > 0
        link = machine.interconnect if inside and machine.interconnect is not None else machine.nic
        switches = self.placement.wiring.hops(*way)[1]
        wait = link.launch_s + link.segments[0].alpha_s + switches * self.placement.cluster.fabric.hop_latency_s
        scale = self.placement.framework.send_scale
        host = self.placement.framework.host.per_collective_s
        return Flows([(wait * scale + host, float(size), self.patterns.weights(traffic, scale / near, scale / far))])
