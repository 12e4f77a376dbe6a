"""Prices of a program on a folded cluster: how long works, updates and collectives take, and what flows carry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.cluster.exchanges import server_traffic
from clustersim.cluster.wiring import Traffic, Wiring
from clustersim.hardware.cost import DeviceCosts, device_costs
from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import Kernel, Kernels, Memory, linear_layers
from clustersim.layout.layout import node_peers
from clustersim.program.program import (
    Collective,
    Group,
    Program,
    Read,
    ServerShare,
    Update,
    Work,
)
from clustersim.simulate.collectives import latency_s, phases, wire_efficiency
from clustersim.simulate.flows import Flows, Patterns, side_by_side
from clustersim.simulate.fold import Folding, fold, rank_grid, replica_groups
from clustersim.simulate.moves import Phase
from clustersim.simulate.reading import open_storage, read_flows, read_of

Ints = NDArray[np.int64]

# What a collective inside a pass runs; every other kind a ring.
INNER_ALGORITHM = {"all_to_all": "pairwise", "send_recv": "direct"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerClass:
    """Servers that behave alike: on the same kind of host, with the same share."""

    shares: tuple[ServerShare, ...]
    machine: Machine


class Prices:
    """Prices of works, collectives and exchanges of one program on one cluster."""

    def __init__(self, program: Program, cluster: Cluster, framework: Framework, *, every_rank: bool) -> None:
        self.program = program
        self.cluster = cluster
        self.framework = framework
        self.wiring = Wiring(cluster)
        self.folding: Folding = fold(
            program.mesh, program.order, cluster, self.wiring, program.servers, _uneven(program, self.wiring),
            every_rank=every_rank,
        )  # fmt: skip
        read = read_of(program)
        if read is not None:
            open_storage(read, cluster, self.wiring, self.folding.grid[0].ravel())
        self.machines = [cluster.machine_of(int(self.wiring.node_of(m[:1])[0])) for m in self.folding.members]
        self.costs: list[DeviceCosts] = [device_costs(_device_name(machine)) for machine in self.machines]
        # A tensor-parallel group may span nodes of several kinds.
        self.costs_in = [self._costs_in(ranks) for ranks in self.folding.members]
        self.servers = _server_classes(program.servers, cluster, self.wiring)
        self._groups: dict[tuple[Group, int], tuple[tuple[int, ...], Ints]] = {}
        self._phases: dict[tuple[Group, tuple[int, ...], str, str], tuple[Phase, ...]] = {}
        self.patterns = Patterns(self.wiring)
        self._exchanges: dict[tuple[int, str], list[tuple[Traffic, Machine]]] = {}
        self._sends: dict[tuple[int, int], list[tuple[Traffic, tuple[int, int]]]] = {}
        self._works: dict[tuple[int, int], float] = {}
        self._inner: dict[tuple[int, int], float] = {}
        self._steps: dict[tuple[tuple[Group, ...], int], tuple[int, ...]] = {}
        self._all_groups: dict[tuple[Group, str, str, int], list[NDArray[np.float64]]] = {}
        self._phases_of_lanes: dict[tuple[Group, tuple[int, ...], str, str], list[tuple[Phase, ...]]] = {}
        self._shares_of: dict[
            tuple[Group, tuple[int, ...], str, str], list[tuple[NDArray[np.float64], NDArray[np.float64]]]
        ] = {}

    def _costs_in(self, ranks: Ints) -> tuple[DeviceCosts, ...]:
        ends = np.cumsum([machine.count for machine in self.cluster.workers])
        kinds = np.unique(np.searchsorted(ends, self.wiring.node_of(ranks), side="right"))
        names = dict.fromkeys(_device_name(self.cluster.workers[kind]) for kind in kinds)
        return tuple(device_costs(name) for name in names)

    # ------------------------------------------------------------------------------------------------ groups

    def group(self, kind: Group, of: int) -> tuple[tuple[int, ...], Ints]:
        """The classes that take part in class `of`'s groups of this kind, and all such groups as (groups, members)."""
        found = self._groups.get((kind, of))
        if found is None:
            mine = self._members(kind, self.folding.members[of])
            classes = tuple(int(c) for c in np.unique(self.folding.class_of[mine[0]]))
            assert kind != "tp" or classes == (of,)
            if len(classes) > 1 or kind == "embedding":
                every = np.concatenate([self.folding.members[c] for c in classes])
                mine = self._members(kind, every)
            found = self._groups[kind, of] = (classes, mine)
        return found

    def _members(self, kind: Group, ranks: Ints) -> Ints:
        """The distinct groups of a kind that hold any of `ranks`, one a row."""
        grid = self.folding.grid
        stage, dp, tp = self._coordinates(ranks)
        if kind == "tp":
            keys = np.unique(stage * grid.shape[1] + dp)
            return grid[keys // grid.shape[1], keys % grid.shape[1], :]
        if kind == "embedding":
            keys = np.unique(dp * grid.shape[2] + tp)
            return grid[[0, -1]][:, keys // grid.shape[2], keys % grid.shape[2]].T
        if kind in ("cp", "ep", "expert-dp"):
            groups = replica_groups(self.program.mesh, kind)
            group_of = np.empty(self.program.mesh.replicas, np.int64)
            group_of[groups] = np.arange(len(groups))[:, None]
            lanes = np.unique((stage * grid.shape[2] + tp) * len(groups) + group_of[dp])
            place, which = np.divmod(lanes, len(groups))
            found: Ints = grid[(place // grid.shape[2])[:, None], groups[which], (place % grid.shape[2])[:, None]]
            return found
        keys = np.unique(stage * grid.shape[2] + tp)
        whole = grid[keys // grid.shape[2], :, keys % grid.shape[2]]
        if kind == "dp":
            return whole
        split = whole.reshape(-1, node_peers(self.program.mesh, self.program.order, self.wiring.devices_per_node))
        return split[np.isin(split, ranks).any(axis=1)]

    def _coordinates(self, ranks: Ints) -> tuple[Ints, Ints, Ints]:
        mesh = self.program.mesh
        tp, rest = ranks % mesh.tp, ranks // mesh.tp
        if self.program.order == "tp-dp-pp":
            return rest // mesh.replicas, rest % mesh.replicas, tp
        return rest % mesh.pp, rest // mesh.pp, tp

    # ------------------------------------------------------------------------------------------------ compute

    def work_s(self, index: int, of: int) -> float:
        """Seconds of a work on class `of`: groups with a collective inside the work run in lockstep with their slowest.

        Device time (kernels and inner collectives) or the host's time to drive it, whichever is larger; both where the
        device is the CPU that drives it.
        """
        found = self._works.get((index, of))
        if found is None:
            found = self._works[index, of] = self._work_s(index, of)
        return found

    def inner_s(self, index: int, of: int) -> float:
        """The part of `work_s` that is communication: of tensor, context and expert parallelism, as far as the kernels
        beside it do not hide it.

        A framework that runs the gathers and scatters of sequence parallelism in pieces beside the linear layers that
        consume or produce them hides up to `overlap.tensor_parallel` of their time, and no more than those GEMMs take.
        """
        found = self._inner.get((index, of))
        if found is None:
            work, found, in_pieces = self.program.works[index], 0.0, 0.0
            classes = self._lockstep(work, of) if work.inner else ()
            for item in work.inner:
                algorithm = INNER_ALGORITHM.get(item.kind, "ring")
                one = max(self.collective_s(item.group, c, item.kind, algorithm, item.bytes) for c in classes)
                if item.beside:
                    # Kernels run slower while something is under way: what that adds is exposed in any case.
                    slowed = one * (1.0 - 1.0 / self.framework.overlap.compute_slowdown)
                    one = max(slowed, one - self._kernels_s(item.beside, classes))
                found += item.count * one
                if item.group == "tp" and item.kind in ("all_gather", "reduce_scatter"):
                    in_pieces += item.count * one
            overlap = self.framework.overlap.tensor_parallel
            if overlap and in_pieces:
                found -= min(overlap * in_pieces, self._kernels_s(linear_layers(work.kernels), classes))
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
                border = {c for kind in kinds for one in border for c in self.group(kind, one)[0]} - reached
                reached |= border
            found = self._steps[key] = tuple(sorted(reached))
        return found

    def _kernels_s(self, kernels: Kernels, classes: tuple[int, ...]) -> float:
        """Seconds of kernels on the slowest of some classes."""
        slowdown = max(self.folding.slowdown[c] for c in classes)
        slowest = max(costs.seconds(kernels) for c in classes for costs in self.costs_in[c])
        return slowest * slowdown * self._sharing_slowdown(classes[0]) * self.framework.compute_scale

    def _work_s(self, index: int, of: int) -> float:
        work = self.program.works[index]
        classes = self._lockstep(work, of)
        slowdown = max(self.folding.slowdown[c] for c in classes)
        host = self.framework.host
        launches = sum(count for _, count in work.kernels)
        driven = max(
            work.forward_layers * host.per_layer_forward_s
            + (work.backward_layers + 0.5 * work.split_layers) * host.per_layer_backward_s,
            launches * self.costs[of].device.launch_overhead_s,
        )
        shared = self._sharing_slowdown(of)
        device = self._kernels_s(work.kernels, classes) + self.inner_s(index, of)
        # More threads make kernels faster, but not the one that launches them.
        driven *= slowdown * max(1.0, shared)
        return device + driven if self.costs[of].device.kind == "cpu" else max(device, driven)

    def _sharing_slowdown(self, of: int) -> float:
        """How much slower a rank computes because others of its node use the same cores (CPU nodes only).

        Where all processes share one host, the engine shares out its cores among those that are busy: what is left here
        is contention (caches, memory, switching between processes), and the threads that each of them has.
        """
        host = self.machines[of].node.host
        table = host.rank_slowdown
        if not table:
            return 1.0
        together = min(self.wiring.devices_per_node, self.program.mesh.workers)
        if self.wiring.shared_host:
            together = min(len(table), max(self.program.mesh.workers, min(self.processes, host.cores)))
            return table[together - 1] / max(1.0, together / host.cores)
        return table[min(together, len(table)) - 1]

    @property
    def processes(self) -> int:
        """Worker ranks, and servers that run as processes of their own."""
        return self.program.mesh.workers + sum(share.host == "server" for share in self.program.servers)

    @property
    def shared_cores(self) -> int:
        """Cores of the one host that all processes share; 0 where they do not."""
        return self.machines[0].node.host.cores if self.wiring.shared_host else 0

    # ------------------------------------------------------------------------------------------------ collectives

    def collective_phases(self, group: Group, of: int, kind: str, algorithm: str) -> tuple[Phase, ...]:
        """The phases of a collective of class `of`'s groups; computed once per kind of group."""
        classes, groups = self.group(group, of)
        key = (group, classes, kind, algorithm)
        if key not in self._phases:
            self._phases[key] = phases(self.wiring, groups, kind, algorithm)  # type: ignore[arg-type]
        return self._phases[key]

    def collective_s(self, group: Group, of: int, kind: str, algorithm: str, size: int) -> float:
        """Seconds of a collective that shares the links with its like in all other groups, and with nothing else."""
        measured = self._measured_s(group, of, kind, size)
        if measured is not None:
            return measured * self.framework.network_scale
        machine = self.machines[of]
        total = 0.0
        mine = self.collective_phases(group, of, kind, algorithm)
        for phase, (inside, beyond) in zip(mine, self._shares(group, of, kind, algorithm), strict=True):
            near, far = wire_efficiency(machine, size * phase.message)
            total += size * float((inside / near + beyond / far).max())
            total += latency_s(phase, machine, self.cluster.fabric.hop_latency_s)
        launch = self._launch_s(machine, mine)
        return (total + launch) * self.framework.network_scale if total else 0.0

    def _launch_s(self, machine: Machine, found: tuple[Phase, ...]) -> float:
        """What the whole operation pays once: the launch of the network where it leaves a node."""
        link = machine.nic if any(phase.far_hops for phase in found) else machine.interconnect
        return link.launch_s if link is not None else 0.0

    def _shares(
        self, group: Group, of: int, kind: str, algorithm: str
    ) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """For each phase of class `of`'s collective: how much of the capacities of the links it uses one byte of every
        group's buffer occupies, by traffic inside nodes and between them; of links that can decide only."""
        classes, _ = self.group(group, of)
        key = (group, classes, kind, algorithm)
        if key not in self._shares_of:
            mine = self.collective_phases(group, of, kind, algorithm)
            found = []
            for phase, together in zip(mine, self._together(group, kind, algorithm, len(mine)), strict=True):
                used = np.zeros(self.wiring.links, np.bool_)
                used[phase.traffic.links] = True
                inside, beyond = together[:, used] / self.wiring.capacity[used]
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
            sums = [np.zeros((2, self.wiring.links)) for _ in range(count)]
            seen: set[tuple[int, ...]] = set()
            for of in range(self.folding.classes):
                classes, _ = self.group(group, of)
                found = self.collective_phases(group, of, kind, algorithm)
                if classes in seen or len(found) != count:
                    continue
                seen.add(classes)
                for phase, total in zip(found, sums, strict=True):
                    traffic, size = phase.traffic, self.wiring.links
                    total[0] += np.bincount(traffic.links, weights=traffic.loads * traffic.near, minlength=size)
                    total[1] += np.bincount(traffic.links, weights=traffic.loads * ~traffic.near, minlength=size)
            self._all_groups[key] = sums
        return self._all_groups[key]

    def _measured_s(self, group: Group, of: int, kind: str, size: int) -> float | None:
        """The measured time of a collective inside one node, where the node's profile has it."""
        table = self.machines[of].collectives
        if table is None:
            return None
        _, groups = self.group(group, of)
        nodes = self.wiring.node_of(groups)
        if not bool((nodes == nodes[:, :1]).all()):
            return None
        return table.seconds(kind, groups.shape[1], size)  # type: ignore[arg-type]

    def collective_flows(self, group: Group, of: int, kind: str, algorithm: str, size: int) -> Flows:
        """A collective as flows on link classes, the groups over different lanes side by side."""
        strands = self._strands(group, of, kind, algorithm)
        measured = self._measured_s(group, of, kind, size)
        return side_by_side([self._strand_flows(of, found, measured, size) for found in strands])

    def _strands(self, group: Group, of: int, kind: str, algorithm: str) -> list[tuple[Phase, ...]]:
        """The phases of a collective in the groups of each lane."""
        classes, groups = self.group(group, of)
        key = (group, classes, kind, algorithm)
        if key not in self._phases_of_lanes:
            # Groups that share a lane are made up of the same lanes, of which the first tells them apart.
            first = np.sort(self.folding.lane_of[groups], axis=1)[:, 0]
            lanes = [groups[first == lane] for lane in np.unique(first)]
            if len(lanes) == 1:
                self._phases_of_lanes[key] = [self.collective_phases(group, of, kind, algorithm)]
            else:
                self._phases_of_lanes[key] = [phases(self.wiring, some, kind, algorithm) for some in lanes]  # type: ignore[arg-type]
        return self._phases_of_lanes[key]

    def _strand_flows(self, of: int, found: tuple[Phase, ...], measured: float | None, size: int) -> Flows:
        """One strand of a collective; a measured one keeps its wires busy for as long as was measured."""
        machine = self.machines[of]
        scale = self.framework.network_scale
        result = []
        launch = self._launch_s(machine, found)
        host = self.framework.host.per_collective_s
        for phase in found:
            wait = launch + latency_s(phase, machine, self.cluster.fabric.hop_latency_s)
            launch = 0.0
            if measured is not None:
                share = measured / len(found)
                factor = self._stretch(phase, size, max(share - wait, 0.5 * share) * scale)
                wait = min(wait, 0.5 * share)
                result.append((wait * scale + host, float(size), self.patterns.weights(phase.traffic, factor, factor)))
            else:
                near, beyond = wire_efficiency(machine, size * phase.message)
                weights = self.patterns.weights(phase.traffic, scale / near, scale / beyond)
                result.append((wait * scale + host, float(size), weights))
            host = 0.0
        return Flows(result)

    def _stretch(self, phase: Phase, size: int, seconds: float) -> float:
        """The factor on the traffic of `phase` that makes it last `seconds` on idle links."""
        per_link = np.bincount(phase.traffic.links, weights=phase.traffic.loads)
        busy = np.flatnonzero(per_link)
        return seconds / (size * float((per_link[busy] / self.wiring.capacity[busy]).max()))

    # ------------------------------------------------------------------------------------------------ sends, servers

    def send_flows(self, of: int, to_stage: int, size: int) -> Flows:
        """Every rank of class `of` sends `size` bytes to its peer at another stage."""
        return side_by_side([self._lane_sends(traffic, way, size) for traffic, way in self._send_lanes(of, to_stage)])

    def _send_lanes(self, of: int, to_stage: int) -> list[tuple[Traffic, tuple[int, int]]]:
        """The traffic of each lane's sends, and one rank of it with its peer."""
        found = self._sends.get((of, to_stage))
        if found is None:
            ranks = self.folding.members[of]
            _, dp, tp = self._coordinates(ranks)
            peers = self.folding.grid[to_stage, dp, tp]
            found = self._sends[of, to_stage] = [
                (self.wiring.between(ranks[lane], peers[lane]), (int(ranks[lane[0]]), int(peers[lane[0]])))
                for lane in self.folding.lanes(ranks)
            ]
        return found

    def _lane_sends(self, traffic: Traffic, way: tuple[int, int], size: int) -> Flows:
        machine = self._machine_of_rank(way[0])
        near, far = wire_efficiency(machine, size)
        inside = bool(traffic.near.all()) and len(traffic.near) > 0
        link = machine.interconnect if inside and machine.interconnect is not None else machine.nic
        switches = self.wiring.hops(*way)[1]
        wait = link.launch_s + link.segments[0].alpha_s + switches * self.cluster.fabric.hop_latency_s
        scale = self.framework.network_scale
        host = self.framework.host.per_collective_s
        return Flows([(wait * scale + host, float(size), self.patterns.weights(traffic, scale / near, scale / far))])

    def _machine_of_rank(self, rank: int) -> Machine:
        return self.cluster.machine_of(rank // self.wiring.devices_per_node)

    def exchange_flows(self, of: int, direction: str, size: float, message: float) -> Flows:
        """Every rank of class `of` exchanges `size` bytes with all servers, in messages of `message` bytes."""
        lanes = self._exchanges.get((of, direction))
        if lanes is None:
            ranks = self.folding.members[of]
            lanes = self._exchanges[of, direction] = [
                (self._with_servers(ranks[lane], push=direction == "push"), self._machine_of_rank(int(ranks[lane[0]])))
                for lane in self.folding.lanes(ranks)
            ]
        return side_by_side([self._lane_exchange(traffic, machine, size, message) for traffic, machine in lanes])

    def _lane_exchange(self, traffic: Traffic, machine: Machine, size: float, message: float) -> Flows:
        near, far = wire_efficiency(machine, message)
        wait = machine.nic.launch_s + machine.nic.segments[0].alpha_s
        wait += (3 if self.wiring.has_leaves else 1) * self.cluster.fabric.hop_latency_s
        scale = self.framework.network_scale
        host = self.framework.host.per_collective_s
        return Flows([(wait * scale + host, size, self.patterns.weights(traffic, scale / near, scale / far))])

    def _with_servers(self, ranks: Ints, *, push: bool) -> Traffic:
        total = self.program.share_parts
        hosts = [share for share in self.program.servers if share.host == "server"]
        homes = [share for share in self.program.servers if share.host == "worker"]
        return server_traffic(
            self.wiring,
            ranks,
            np.array([share.node for share in hosts], np.int64),
            np.array([share.parts / total for share in hosts]),
            np.array([share.node for share in homes], np.int64),
            np.array([share.parts / total for share in homes]),
            push=push,
        )

    def read_flows(self, of: int, read: Read) -> Flows:
        """Every rank of class `of` reads its part of a step's batch."""
        return read_flows(
            read, self.folding.members[of], self.machines[of], self.wiring, self.folding, self.patterns,
            self.framework.network_scale,
        )  # fmt: skip

    def update_s(self, server: int, update: Update, parts: int) -> float:
        """Seconds in which a server adds its share of `pushes` gradients and steps.

        Memory traffic over its host's rates, which servers of one host share, since they are busy at the same time;
        the measured kernels where the host is a measured CPU.
        """
        machine = self.servers[server].machine
        share = self.servers[server].shares[0].parts / self.program.share_parts / parts
        if machine.device is not None and machine.device.kind == "cpu":
            costs = device_costs(machine.device.name)
            size, state = round(update.bytes * share), round(update.state_bytes * share / 2)
            kernels: list[tuple[Kernel, int]] = [(Memory(op="copy", read_bytes=size, written_bytes=size), 1)]
            kernels.append((Memory(op="reduce", read_bytes=2 * size, written_bytes=size), update.pushes - 1))
            if state:
                kernels.append((Memory(op="optimizer", read_bytes=state, written_bytes=state), 1))
            return costs.seconds(tuple(kernels)) * self._sharing_slowdown(0) * self.framework.compute_scale
        host = machine.node.host
        added = update.pushes * update.bytes * share / host.reduce_rate_bytes_per_s
        stepped = update.state_bytes * share / host.memory_bandwidth_bytes_per_s
        return (added + stepped) * self._servers_beside(server)

    def _servers_beside(self, server: int) -> int:
        """How many servers share the host of a server of this class, itself included."""
        if self.servers[server].shares[0].host == "server":
            return 1
        homes = np.array([share.node for share in self.program.servers if share.host == "worker"], np.int64)
        return int(np.bincount(self.wiring.node_of(homes)).max())


def _device_name(machine: Machine) -> str:
    assert machine.device is not None
    return machine.device.name


def _uneven(program: Program, wiring: Wiring) -> Iterator[Traffic]:
    """The traffic of data-parallel collectives, whose ranks may have unequal parts, where sends between stages or
    collectives of another kind meet it on the way; one phase after the other, since each holds all of its flows."""
    ops = [op for position in program.positions for op in position.ops if isinstance(op, Collective)]
    found = sorted({(op.group, op.kind, op.algorithm) for op in ops if op.group in ("dp", "expert-dp")})
    if program.mesh.pp == 1 and len(found) < 2:
        return
    grid = rank_grid(program.mesh, program.order)
    for group, kind, algorithm in found:
        for stage in grid:
            groups = stage.T
            if group == "expert-dp":
                sharing = replica_groups(program.mesh, "expert-dp")
                groups = groups[:, sharing].reshape(-1, sharing.shape[1])
            for phase in phases(wiring, groups, kind, algorithm):
                yield phase.traffic


def _server_classes(servers: tuple[ServerShare, ...], cluster: Cluster, wiring: Wiring) -> tuple[ServerClass, ...]:
    found: dict[tuple[str, int, str], list[ServerShare]] = {}
    machines: dict[tuple[str, int, str], Machine] = {}
    for share in servers:
        if share.host == "server":
            machine = cluster.machine_of(cluster.worker_nodes + share.node)
        else:
            machine = cluster.machine_of(int(wiring.node_of(np.array([share.node]))[0]))
        key = (share.host, share.parts, machine.node.name)
        found.setdefault(key, []).append(share)
        machines[key] = machine
    return tuple(ServerClass(shares=tuple(shares), machine=machines[key]) for key, shares in found.items())
