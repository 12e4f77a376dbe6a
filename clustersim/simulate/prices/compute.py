"""Prices of works: the kernels of a pass, the collectives inside it, and the host that drives both."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Machine
from clustersim.hardware.cost import DeviceCosts, device_costs
from clustersim.hardware.kernel import Kernels, linear_layers
from clustersim.hardware.scaled import device_s
from clustersim.program.program import Group, Work
from clustersim.simulate.prices.collectives import CollectivePrices
from clustersim.simulate.prices.groups import Groups
from clustersim.simulate.prices.placement import Placement

Ints = NDArray[np.int64]

# What a collective inside a pass runs; every other kind a ring.
INNER_ALGORITHM = {"all_to_all": "pairwise", "send_recv": "direct"}


class ComputePrices:
    """Works of the classes of a placement, each priced once."""

    def __init__(self, placement: Placement, groups: Groups, collectives: CollectivePrices) -> None:
        self.placement = placement
        self.groups = groups
        self.collectives = collectives
        self.costs: list[DeviceCosts] = [device_costs(_device_name(machine)) for machine in placement.machines]
        # A tensor-parallel group may span nodes of several kinds.
        self.costs_in = [self._costs_in(ranks) for ranks in placement.folding.members]
        self._works: dict[tuple[int, int], float] = {}
        self._inner: dict[tuple[int, int], float] = {}
        self._steps: dict[tuple[tuple[Group, ...], int], tuple[int, ...]] = {}

    def _costs_in(self, ranks: Ints) -> tuple[DeviceCosts, ...]:
        ends = np.cumsum([machine.count for machine in self.placement.cluster.workers])
        kinds = np.unique(np.searchsorted(ends, self.placement.wiring.node_of(ranks), side="right"))
        names = dict.fromkeys(_device_name(self.placement.cluster.workers[kind]) for kind in kinds)
        return tuple(device_costs(name) for name in names)

    def work_s(self, index: int, of: int) -> float:
        """Seconds of a work on class `of`: groups with a collective inside the work run in lockstep with their slowest.

        Device time (kernels and inner collectives) or the host's time to drive the layers and then the device's for
        what is behind them, whichever is larger: two machines in a row, of which the second waits for the first. Both
        times where the device is the CPU that drives it, or every launch waits for its kernel.
        """
        found = self._works.get((index, of))
        if found is None:
            found = self._works[index, of] = self._work_s(index, of)
        return found

    def inner_s(self, index: int, of: int) -> float:
        """The part of `work_s` that is communication: of tensor, context and expert parallelism, as far as the kernels
        beside it do not hide it.

        A framework that runs the gathers and scatters of sequence parallelism in pieces beside the linear layers that
        consume or produce them hides up to `overlap.tensor_parallel` of their time, and no more than those GEMMs take;
        the GEMMs take longer beside them, as other kernels do.
        """
        found = self._inner.get((index, of))
        if found is None:
            work, found, in_pieces = self.placement.program.works[index], 0.0, 0.0
            classes = self._lockstep(work, of) if work.inner else ()
            for item in work.inner:
                algorithm = INNER_ALGORITHM.get(item.kind, "ring")
                one = max(self.collectives.seconds(item.group, c, item.kind, algorithm, item.bytes) for c in classes)
                if item.beside:
                    # Kernels run slower while something is under way: what that adds is exposed in any case.
                    slowed = one * (1.0 - 1.0 / self.placement.framework.overlap.compute_slowdown)
                    one = max(slowed, one - self._kernels_s(item.beside, classes))
                found += item.count * one
                if item.group == "tp" and item.kind in ("all_gather", "reduce_scatter"):
                    in_pieces += item.count * one
            overlap = self.placement.framework.overlap.tensor_parallel
            if overlap and in_pieces:
                hidden = min(overlap * in_pieces, self._kernels_s(linear_layers(work.kernels), classes))
                found -= hidden / self.placement.framework.overlap.compute_slowdown
            self._inner[index, of] = found
        return found

    def _lockstep(self, work: Work, of: int) -> tuple[int, ...]:
        """The classes that keep step with class `of` in a work: those of its tensor-parallel group, and of every group
        that meets inside the work, and of their groups in turn."""
        kinds: tuple[Group, ...] = ("tp", *sorted({item.group for item in work.inner} - {"tp"}))
        key = (kinds, of)
        found = self._steps.get(key)
        if found is None:
            reached, border = {of}, {of}
            while border:
                border = {c for kind in kinds for one in border for c in self.groups.of_class(kind, one)[0]} - reached
                reached |= border
            found = self._steps[key] = tuple(sorted(reached))
        return found

    def _kernels_s(self, kernels: Kernels, classes: tuple[int, ...]) -> float:
        """Seconds of kernels on the slowest of some classes."""
        slowdown = max(self.placement.folding.slowdown[c] for c in classes)
        framework = self.placement.framework
        slowest = max(device_s(costs, kernels, framework) for c in classes for costs in self.costs_in[c])
        return slowest * slowdown * self.placement.sharing_slowdown(classes[0])

    def _work_s(self, index: int, of: int) -> float:
        work = self.placement.program.works[index]
        classes = self._lockstep(work, of)
        slowdown = max(self.placement.folding.slowdown[c] for c in classes)
        host = self.placement.framework.host
        launches = sum(count for _, count in work.kernels)
        driven = max(
            work.forward_layers * host.per_layer_forward_s
            + (work.backward_layers + 0.5 * work.split_layers) * host.per_layer_backward_s,
            launches * self.costs[of].device.launch_overhead_s,
        ) + host.per_collective_s * sum(item.count for item in work.inner)
        shared = self.placement.sharing_slowdown(of)
        device = self._kernels_s(work.kernels, classes) + self.inner_s(index, of)
        # More threads make kernels faster, but not the one that launches them.
        driven *= slowdown * max(1.0, shared)
        if self.costs[of].device.kind == "cpu" or host.blocking_launches:
            seconds = device + driven
        else:
            seconds = max(device, driven + self._kernels_s(work.tail, classes))
        placement = self.placement
        drawn = placement.cluster.noise is not None
        return seconds * (1.0 if drawn else placement.framework.slowest_of(placement.program.mesh.replicas))


def _device_name(machine: Machine) -> str:
    assert machine.device is not None
    return machine.device.name
