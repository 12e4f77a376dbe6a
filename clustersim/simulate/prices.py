"""Prices of a program on a folded cluster: how long works, updates and collectives take, and what flows carry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.cluster.wiring import Traffic, Wiring
from clustersim.hardware.cost import DeviceCosts, device_costs
from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import Kernel, Memory
from clustersim.layout.layout import node_peers
from clustersim.program.program import (
    Collective,
    Group,
    Program,
    ServerShare,
    Update,
)
from clustersim.simulate.collectives import Phase, latency_s, phases, wire_efficiency
from clustersim.simulate.flows import Flows, Patterns
from clustersim.simulate.fold import Folding, fold, rank_grid, replica_groups

Ints = NDArray[np.int64]


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
        self.machines = [cluster.machine_of(int(self.wiring.node_of(m[:1])[0])) for m in self.folding.members]
        self.costs: list[DeviceCosts] = [device_costs(_device_name(machine)) for machine in self.machines]
        self.servers = _server_classes(program.servers, cluster, self.wiring)
        self._groups: dict[tuple[Group, int], tuple[tuple[int, ...], Ints]] = {}
        self._phases: dict[tuple[Group, tuple[int, ...], str, str], tuple[Phase, ...]] = {}
        self.patterns = Patterns(self.wiring)
        self._exchanges: dict[tuple[int, str], Traffic] = {}
        self._sends: dict[tuple[int, int], Traffic] = {}
        self._works: dict[tuple[int, int], float] = {}
        self._inner: dict[tuple[int, int], float] = {}
        self._all_groups: dict[tuple[Group, str, str, int], list[NDArray[np.float64]]] = {}
        self._shares_of: dict[
            tuple[Group, tuple[int, ...], str, str], list[tuple[NDArray[np.float64], NDArray[np.float64]]]
        ] = {}

    # ------------------------------------------------------------------------------------------------ groups

    def group(self, kind: Group, of: int) -> tuple[tuple[int, ...], Ints]:
        """The classes that take part in class `of`'s groups of this kind, and all such groups as (groups, members)."""
        found = self._groups.get((kind, of))
        if found is None:
            mine = self._members(kind, self.folding.members[of])
            classes = tuple(int(c) for c in np.unique(self.folding.class_of[mine[0]]))
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
        """Seconds of a work on class `of`: its tensor-parallel group runs in lockstep with its slowest rank.

        Device time (kernels and inner collectives) or the host's time to drive it, whichever is larger; both where the
        device is the CPU that drives it.
        """
        found = self._works.get((index, of))
        if found is None:
            found = self._works[index, of] = self._work_s(index, of)
        return found

    def inner_s(self, index: int, of: int) -> float:
        """The part of `work_s` that is tensor-parallel communication."""
        found = self._inner.get((index, of))
        if found is None:
            inner = self.program.works[index].inner
            found = sum(item.count * self.collective_s(item.group, of, item.kind, "ring", item.bytes) for item in inner)
            self._inner[index, of] = found
        return found

    def _work_s(self, index: int, of: int) -> float:
        work = self.program.works[index]
        classes, _ = self.group("tp", of)
        slowdown = max(self.folding.slowdown[c] for c in classes)
        kernels = max(self.costs[c].seconds(work.kernels) for c in classes)
        host = self.framework.host
        launches = sum(count for _, count in work.kernels)
        driven = max(
            work.forward_layers * host.per_layer_forward_s + work.backward_layers * host.per_layer_backward_s,
            launches * self.costs[of].device.launch_overhead_s,
        )
        shared = self._sharing_slowdown(of)
        device = kernels * slowdown * shared * self.framework.compute_scale + self.inner_s(index, of)
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
        group's buffer occupies, by traffic inside nodes and between them; each distinct pair once."""
        classes, _ = self.group(group, of)
        key = (group, classes, kind, algorithm)
        if key not in self._shares_of:
            mine = self.collective_phases(group, of, kind, algorithm)
            found = []
            for phase, together in zip(mine, self._together(group, kind, algorithm, len(mine)), strict=True):
                used = np.unique(phase.traffic.links)
                pairs = np.unique(together[:, used] / self.wiring.capacity[used], axis=1)
                found.append((pairs[0], pairs[1]))
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
                    np.add.at(total, ((~phase.traffic.near).astype(np.int64), phase.traffic.links), phase.traffic.loads)
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
        """A collective as flows on link classes; a measured one keeps its wires busy for as long as was measured."""
        machine = self.machines[of]
        found = self.collective_phases(group, of, kind, algorithm)
        measured = self._measured_s(group, of, kind, size)
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
        ranks = self.folding.members[of]
        _, dp, tp = self._coordinates(ranks)
        traffic = self._sends.get((of, to_stage))
        if traffic is None:
            traffic = self.wiring.between(ranks, self.folding.grid[to_stage, dp, tp])
            self._sends[of, to_stage] = traffic
        machine = self.machines[of]
        near, far = wire_efficiency(machine, size)
        inside = bool(traffic.near.all()) and len(traffic.near) > 0
        link = machine.interconnect if inside and machine.interconnect is not None else machine.nic
        switches = self.wiring.hops(int(ranks[0]), int(self.folding.grid[to_stage, dp[0], tp[0]]))[1]
        wait = link.launch_s + link.segments[0].alpha_s + switches * self.cluster.fabric.hop_latency_s
        scale = self.framework.network_scale
        host = self.framework.host.per_collective_s
        return Flows([(wait * scale + host, float(size), self.patterns.weights(traffic, scale / near, scale / far))])

    def exchange_flows(self, of: int, direction: str, size: float, message: float) -> Flows:
        """Every rank of class `of` exchanges `size` bytes with all servers, in messages of `message` bytes."""
        traffic = self._exchanges.get((of, direction))
        if traffic is None:
            traffic = self._exchanges[of, direction] = self._with_servers(of, push=direction == "push")
        machine = self.machines[of]
        near, far = wire_efficiency(machine, message)
        wait = machine.nic.launch_s + machine.nic.segments[0].alpha_s
        wait += (3 if self.wiring.has_leaves else 1) * self.cluster.fabric.hop_latency_s
        scale = self.framework.network_scale
        host = self.framework.host.per_collective_s
        return Flows([(wait * scale + host, size, self.patterns.weights(traffic, scale / near, scale / far))])

    def _with_servers(self, of: int, *, push: bool) -> Traffic:
        total = self.program.share_parts
        hosts = [share for share in self.program.servers if share.host == "server"]
        homes = [share for share in self.program.servers if share.host == "worker"]
        return self.wiring.with_servers(
            self.folding.members[of],
            np.array([share.node for share in hosts], np.int64),
            np.array([share.parts / total for share in hosts]),
            np.array([share.node for share in homes], np.int64),
            np.array([share.parts / total for share in homes]),
            push=push,
        )

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


def _uneven(program: Program, wiring: Wiring) -> list[Traffic]:
    """The traffic of data-parallel collectives, whose ranks may have unequal parts, where sends between stages meet it
    on the way."""
    if program.mesh.pp == 1:
        return []
    ops = [op for position in program.positions for op in position.ops if isinstance(op, Collective)]
    found = sorted({(op.kind, op.algorithm) for op in ops if op.group == "dp"})
    grid = rank_grid(program.mesh, program.order)
    return [
        phase.traffic
        for kind, algorithm in found
        for stage in grid
        for phase in phases(wiring, stage.T, kind, algorithm)
    ]


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
