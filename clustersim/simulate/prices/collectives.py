"""Prices of collectives: their seconds with the links to themselves, and what they put on the links as flows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Machine
from clustersim.program.program import Group
from clustersim.simulate.collectives.moves import Phase
from clustersim.simulate.collectives.phases import latency_s, phases, wire_efficiency
from clustersim.simulate.flows import Flows, Patterns, side_by_side
from clustersim.simulate.prices.groups import Groups
from clustersim.simulate.prices.placement import Placement


class CollectivePrices:
    """Collectives of the groups of each class; phases and shares of links are found once per kind of group."""

    def __init__(self, placement: Placement, groups: Groups, patterns: Patterns) -> None:
        self.placement = placement
        self.groups = groups
        self.patterns = patterns
        self._phases: dict[tuple[Group, tuple[int, ...], str, str], tuple[Phase, ...]] = {}
        self._phases_of_lanes: dict[tuple[Group, tuple[int, ...], str, str], list[tuple[Phase, ...]]] = {}
        self._all_groups: dict[tuple[Group, str, str, int], list[NDArray[np.float64]]] = {}
        self._shares_of: dict[
            tuple[Group, tuple[int, ...], str, str], list[tuple[NDArray[np.float64], NDArray[np.float64]]]
        ] = {}

    def phases(self, group: Group, of: int, kind: str, algorithm: str) -> tuple[Phase, ...]:
        """The phases of a collective of class `of`'s groups; computed once per kind of group."""
        classes, groups = self.groups.of_class(group, of)
        key = (group, classes, kind, algorithm)
        if key not in self._phases:
            self._phases[key] = phases(self.placement.wiring, groups, kind, algorithm)  # type: ignore[arg-type]
        return self._phases[key]

    def seconds(self, group: Group, of: int, kind: str, algorithm: str, size: int) -> float:
        """Seconds of a collective that shares the links with its like in all other groups, and with nothing else."""
        measured = self.measured_s(group, of, kind, size)
        if measured is not None:
            return measured * self.placement.framework.collective_scale(group)
        machine = self.placement.machines[of]
        total = 0.0
        mine = self.phases(group, of, kind, algorithm)
        for phase, (inside, beyond) in zip(mine, self._shares(group, of, kind, algorithm), strict=True):
            near, far = wire_efficiency(machine, size * phase.message)
            total += size * float((inside / near + beyond / far).max())
            total += latency_s(phase, machine, self.placement.cluster.fabric.hop_latency_s)
        launch = self._launch_s(machine, mine)
        return (total + launch) * self.placement.framework.collective_scale(group) if total else 0.0

    def _launch_s(self, machine: Machine, found: tuple[Phase, ...]) -> float:
        """What the whole operation pays once: the launch of the network where it leaves a node."""
        link = machine.nic if any(phase.far_hops for phase in found) else machine.interconnect
        return link.launch_s if link is not None else 0.0

    def _shares(
        self, group: Group, of: int, kind: str, algorithm: str
    ) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """For each phase of class `of`'s collective: how much of the capacities of the links it uses one byte of every
        group's buffer occupies, by traffic inside nodes and between them; of links that can decide only."""
        classes, _ = self.groups.of_class(group, of)
        key = (group, classes, kind, algorithm)
        if key not in self._shares_of:
            mine = self.phases(group, of, kind, algorithm)
            found = []
            for phase, together in zip(mine, self._together(group, kind, algorithm, len(mine)), strict=True):
                used = np.zeros(self.placement.wiring.links, np.bool_)
                used[phase.traffic.links] = True
                inside, beyond = together[:, used] / self.placement.wiring.capacity[used]
                # Of links that carry one sort of traffic only, the fullest can decide.
                some = np.flatnonzero((inside > 0.0) & (beyond > 0.0))
                some = np.concatenate((some, [inside.argmax(), beyond.argmax()]))
                found.append((inside[some], beyond[some]))
            self._shares_of[key] = found
        return self._shares_of[key]

    def _together(self, group: Group, kind: str, algorithm: str, count: int) -> list[NDArray[np.float64]]:
        """What every link carries, inside nodes (row 0) and between them (row 1), in each of `count` phases when all
        groups of a kind run their collectives at once, per byte of the buffer."""
        key = (group, kind, algorithm, count)
        if key not in self._all_groups:
            sums = [np.zeros((2, self.placement.wiring.links)) for _ in range(count)]
            seen: set[tuple[int, ...]] = set()
            for of in range(self.placement.folding.classes):
                classes, _ = self.groups.of_class(group, of)
                found = self.phases(group, of, kind, algorithm)
                if classes in seen or len(found) != count:
                    continue
                seen.add(classes)
                for phase, total in zip(found, sums, strict=True):
                    traffic, size = phase.traffic, self.placement.wiring.links
                    total[0] += np.bincount(traffic.links, weights=traffic.loads * traffic.near, minlength=size)
                    total[1] += np.bincount(traffic.links, weights=traffic.loads * ~traffic.near, minlength=size)
            self._all_groups[key] = sums
        return self._all_groups[key]

    def measured_s(self, group: Group, of: int, kind: str, size: int) -> float | None:
        """The measured time of a collective inside one node, where the node's profile has it."""
        table = self.placement.machines[of].collectives
        if table is None:
            return None
        _, groups = self.groups.of_class(group, of)
        nodes = self.placement.wiring.node_of(groups)
        if not bool((nodes == nodes[:, :1]).all()):
            return None
        return table.seconds(kind, groups.shape[1], size)  # type: ignore[arg-type]

    def flows(self, group: Group, of: int, kind: str, algorithm: str, size: int) -> Flows:
        """A collective as flows on link classes, the groups over different lanes side by side."""
        strands = self._strands(group, of, kind, algorithm)
        measured = self.measured_s(group, of, kind, size)
        scale = self.placement.framework.collective_scale(group)
        return side_by_side([self._strand_flows(of, found, measured, size, scale) for found in strands])

    def _strands(self, group: Group, of: int, kind: str, algorithm: str) -> list[tuple[Phase, ...]]:
        """The phases of a collective in the groups of each lane."""
        classes, groups = self.groups.of_class(group, of)
        key = (group, classes, kind, algorithm)
        if key not in self._phases_of_lanes:
            # Groups that share a lane are made up of the same lanes, of which the first tells them apart.
            first = np.sort(self.placement.folding.lane_of[groups], axis=1)[:, 0]
            lanes = [groups[first == lane] for lane in np.unique(first)]
            if len(lanes) == 1:
                self._phases_of_lanes[key] = [self.phases(group, of, kind, algorithm)]
            else:
                self._phases_of_lanes[key] = [phases(self.placement.wiring, some, kind, algorithm) for some in lanes]  # type: ignore[arg-type]
        return self._phases_of_lanes[key]

    def _strand_flows(
        self, of: int, found: tuple[Phase, ...], measured: float | None, size: int, scale: float
    ) -> Flows:
        """One strand of a collective; a measured one keeps its wires busy for as long as was measured."""
        machine = self.placement.machines[of]
        result = []
        launch = self._launch_s(machine, found)
        host = self.placement.framework.host.per_collective_s
        for phase in found:
            wait = launch + latency_s(phase, machine, self.placement.cluster.fabric.hop_latency_s)
            launch = 0.0
            if measured is not None:
                share = measured / len(found)
                factor = self.stretch(phase, size, max(share - wait, 0.5 * share) * scale)
                wait = min(wait, 0.5 * share)
                result.append((wait * scale + host, float(size), self.patterns.weights(phase.traffic, factor, factor)))
            else:
                near, beyond = wire_efficiency(machine, size * phase.message)
                weights = self.patterns.weights(phase.traffic, scale / near, scale / beyond)
                result.append((wait * scale + host, float(size), weights))
            host = 0.0
        return Flows(result)

    def stretch(self, phase: Phase, size: int, seconds: float) -> float:
        """The factor on the traffic of `phase` that makes it last `seconds` on idle links."""
        per_link = np.bincount(phase.traffic.links, weights=phase.traffic.loads)
        busy = np.flatnonzero(per_link)
        return seconds / (size * float((per_link[busy] / self.placement.wiring.capacity[busy]).max()))
