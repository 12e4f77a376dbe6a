"""A program on a folded cluster as tasks: how long each computes, what each sends over which link classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import assert_never

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
    Compute,
    Exchange,
    Gate,
    Group,
    Op,
    Program,
    ServerShare,
    Transfer,
    Update,
)
from clustersim.simulate.collectives import Phase, latency_s, phases, wire_efficiency
from clustersim.simulate.fold import Folding, fold, rank_grid
from clustersim.simulate.sharing import binding_links

Ints = NDArray[np.int64]
# The partitions of a bucket are simulated one by one up to this many; more would only sharpen the pipeline's fill.
MOST_PARTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkClasses:
    """Links that every traffic pattern of a program loads alike: `members` of each class, its `capacity`, and for each
    pattern the (class, bytes per byte of a flow) pairs it loads. `binding`: the classes that can hold a flow back."""

    capacity: list[float]
    members: list[Ints]
    patterns: list[tuple[tuple[int, float], ...]]
    binding: list[bool]


@dataclass(slots=True)
class Flows:
    """A communication task: phases one after the other, each a latency and then flows of `size` bytes per flow, with
    (pattern, factor) pairs: a lossy wire is busy for longer than its bytes would keep it.

    Once the link classes are known, `phases` are (latency, size, weights on the binding link classes), and `carried`
    says what each link class carries in all phases: (link class, bytes, bytes with the factors).
    """

    planned: list[tuple[float, float, tuple[tuple[int, float], ...]]]
    phases: list[tuple[float, float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    carried: list[tuple[int, float, float]] = field(default_factory=list)

    def resolve(self, links: LinkClasses) -> None:
        """Find the link classes that the patterns load."""
        carried: dict[int, list[float]] = {}
        for wait, size, named in self.planned:
            total: dict[int, float] = {}
            for pattern, factor in named:
                for link, load in links.patterns[pattern]:
                    counts = carried.setdefault(link, [0.0, 0.0])
                    counts[0] += size * load
                    counts[1] += size * load * factor
                    if links.binding[link]:
                        total[link] = total.get(link, 0.0) + load * factor
            self.phases.append((wait, size, tuple(total.items())))
        self.carried = [(link, size, busy) for link, (size, busy) in carried.items()]


@dataclass(slots=True)
class Task:
    """One op of one class (or one of a bucket's parts). `work` is its duration in seconds, or flows. `threads`: how
    many threads of a shared host it keeps busy on all ranks of the class.

    `joint` numbers the tasks that happen together: a collective that several classes take part in.
    """

    owner: int
    stream: int
    op: Op
    span: int
    work: float | Flows
    threads: int = 0
    waits: int = 0
    joint: int = -1
    then: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerClass:
    """Servers that behave alike: on the same kind of host, with the same share."""

    shares: tuple[ServerShare, ...]
    machine: Machine


class Prices:
    """Prices of works, collectives and exchanges of one program on one cluster; link classes are formed on demand.

    Two links are of one class when every traffic pattern of the program loads them alike.
    """

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
        self._patterns: list[Traffic] = []
        self._pattern_of: dict[int, list[tuple[int, bool]]] = {}
        # Keeps every traffic alive, so that no other gets its id.
        self._kept: list[Traffic] = []
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
            return rest // mesh.dp, rest % mesh.dp, tp
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
            found = sum(item.count * self.collective_s("tp", of, item.kind, "ring", item.bytes) for item in inner)
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
                result.append((wait * scale + host, float(size), self._weights(phase.traffic, factor, factor)))
            else:
                near, beyond = wire_efficiency(machine, size * phase.message)
                weights = self._weights(phase.traffic, scale / near, scale / beyond)
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
        return Flows([(wait * scale + host, float(size), self._weights(traffic, scale / near, scale / far))])

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
        return Flows([(wait * scale + host, size, self._weights(traffic, scale / near, scale / far))])

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

    # ------------------------------------------------------------------------------------------------ link classes

    def _weights(self, traffic: Traffic, near: float, far: float) -> tuple[tuple[int, float], ...]:
        """Remember the patterns of a traffic (its flows inside nodes, and between them), with a factor on each."""
        found = self._pattern_of.get(id(traffic))
        if found is None:
            found = []
            for inside in (True, False):
                part = traffic.near == inside
                if part.any():
                    found.append((len(self._patterns), inside))
                    self._patterns.append(
                        Traffic(links=traffic.links[part], loads=traffic.loads[part], near=traffic.near[part])
                    )
            self._pattern_of[id(traffic)] = found
            self._kept.append(traffic)
        return tuple((pattern, near if inside else far) for pattern, inside in found)

    def link_classes(self) -> LinkClasses:
        """The classes of the links that remembered patterns load.

        The signature of a link is a hash of its kind, its capacity and of (pattern, load) over the patterns on it.
        """
        links: list[Ints] = []
        pattern: list[Ints] = []
        loads: list[NDArray[np.float64]] = []
        for index, traffic in enumerate(self._patterns):
            total = np.bincount(traffic.links, weights=traffic.loads)
            used = np.flatnonzero(total)
            used = used[np.isfinite(self.wiring.capacity[used])]
            links.append(used.astype(np.int64))
            pattern.append(np.full(len(used), index))
            loads.append(total[used].astype(np.float64))
        if not links or not sum(map(len, links)):
            return LinkClasses(capacity=[], members=[], patterns=[() for _ in self._patterns], binding=[])
        every, which, much = np.concatenate(links), np.concatenate(pattern), np.concatenate(loads)
        # Equal loads may differ in the last bits by the order of summation: compare twelve digits.
        exponent = np.floor(np.log10(much))
        digits = np.round(much / 10.0**exponent, 11).view(np.uint64) + exponent.astype(np.int64).view(np.uint64)
        mixed = _hash(_hash(which.astype(np.uint64)) + digits)
        signature = np.zeros(self.wiring.links, np.uint64)
        np.add.at(signature, every, mixed)
        signature = _hash(_hash(signature + self.wiring.capacity.view(np.uint64)) + self.wiring.kinds)
        touched = np.unique(every)
        _, first, inverse = np.unique(signature[touched], return_index=True, return_inverse=True)
        class_of = np.full(self.wiring.links, -1, np.int64)
        class_of[touched] = inverse
        capacity = self.wiring.capacity[touched[first]]
        matrix = np.zeros((len(first), len(links)))
        patterns: list[tuple[tuple[int, float], ...]] = []
        for index, (used, load) in enumerate(zip(links, loads, strict=True)):
            classes, where = np.unique(class_of[used], return_index=True)
            matrix[classes, index] = load[where]
            patterns.append(tuple((int(c), float(load[i])) for c, i in zip(classes, where, strict=True)))
        return LinkClasses(
            capacity=capacity.tolist(),
            members=[touched[inverse == c] for c in range(len(first))],
            patterns=patterns,
            binding=binding_links(matrix, capacity).tolist(),
        )


def _hash(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


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


# --------------------------------------------------------------------------------------------------------- compiling


@dataclass(slots=True)
class Compiled:
    """Tasks in emission order, the streams' names, the joints' members, and the links they run on. `cores`: of the one
    host on which everything runs, or 0."""

    tasks: list[Task]
    streams: list[tuple[int, str]]
    joints: list[list[int]]
    links: LinkClasses
    owners: int
    cores: int


class Compiler:
    """Turns every op of every class into tasks; owners are the worker classes, then the server classes."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self.program = prices.program
        self.tasks: list[Task] = []
        self.streams: dict[tuple[int, str], int] = {}
        self.joints: list[list[int]] = []
        self._joint_of: dict[tuple[object, ...], int] = {}
        self._tasks_of: dict[tuple[int, int], list[int]] = {}
        self._known_peers: dict[tuple[int, int], list[int]] = {}
        self._spans = 0
        self._flow_cache: dict[tuple[object, ...], Flows] = {}
        # (owner, micro-batch or -1) whose host time has been charged
        self._driven: set[tuple[int, int]] = set()

    def compiled(self) -> Compiled:
        """All tasks, with who waits for whom."""
        owners = self._owners()
        for owner, position in owners:
            for index, op in enumerate(self.program.positions[position].ops):
                self._emit(owner, position, index, op)
        for owner, position in owners:
            for index, op in enumerate(self.program.positions[position].ops):
                self._wait(owner, position, index, op)
        links = self.prices.link_classes()
        for flows in self._flow_cache.values():
            flows.resolve(links)
        return Compiled(
            tasks=self.tasks, streams=list(self.streams), joints=self.joints, links=links, owners=len(owners),
            cores=self.prices.shared_cores,
        )  # fmt: skip

    def _owners(self) -> list[tuple[int, int]]:
        workers = [(c, stage) for c, stage in enumerate(self.prices.folding.stage)]
        first = len(workers)
        return workers + [(first + s, len(self.program.positions) - 1) for s in range(len(self.prices.servers))]

    def _emit(self, owner: int, position: int, index: int, op: Op) -> None:
        stream = self.streams.setdefault((owner, op.stream), len(self.streams))
        works = self._works(owner, op)
        threads = self._threads(owner, op) if self.prices.shared_cores else 0
        span, self._spans = self._spans, self._spans + 1
        numbers = []
        for work in works:
            numbers.append(len(self.tasks))
            self.tasks.append(Task(owner=owner, stream=stream, op=op, span=span, work=work, threads=threads))
        if isinstance(op, Collective):
            classes, _ = self.prices.group(op.group, owner)
            key = (op.id, op.group, classes)
            joint = self._joint_of.setdefault(key, len(self.joints))
            if joint == len(self.joints):
                self.joints.append([])
            self.joints[joint].append(numbers[0])
            self.tasks[numbers[0]].joint = joint
        self._tasks_of[owner, index] = numbers

    def _threads(self, owner: int, op: Op) -> int:
        """Threads of the shared host that an op of a class keeps busy: each process computes with its share of the
        cores; a thread at either end moves bytes."""
        prices = self.prices
        each = max(1, prices.shared_cores // prices.processes)
        first = prices.folding.classes
        ranks = len(prices.folding.members[owner]) if owner < first else len(prices.servers[owner - first].shares)
        match op:
            case Compute() | Update():
                return ranks * each
            case Transfer() | Exchange():
                return 2 * ranks
            case Collective():
                return ranks
            case Gate():
                return 0
            case _:
                assert_never(op)

    def _works(self, owner: int, op: Op) -> list[float | Flows]:
        prices = self.prices
        match op:
            case Compute():
                return [prices.work_s(op.work, owner) + self._host_s(owner, op)]
            case Transfer():
                return [
                    self._cached(("send", owner, op.to, op.bytes), lambda: prices.send_flows(owner, op.to, op.bytes))
                ]
            case Collective():
                classes, _ = prices.group(op.group, owner)
                key = (op.group, classes, op.kind, op.algorithm, op.bytes)
                return [
                    self._cached(key, lambda: prices.collective_flows(op.group, owner, op.kind, op.algorithm, op.bytes))
                ]
            case Exchange():
                parts = min(op.partitions, MOST_PARTS)
                exchange = (op.direction, owner, op.bytes, op.partitions)
                flows = self._cached(
                    exchange,
                    lambda: prices.exchange_flows(owner, op.direction, op.bytes / parts, op.bytes / op.partitions),
                )
                return [flows] * parts
            case Update():
                parts = min(op.partitions, MOST_PARTS)
                server = owner - prices.folding.classes
                return [prices.update_s(server, op, parts)] * parts
            case Gate():
                return [self._host_s(owner, op)]
            case _:
                assert_never(op)

    def _host_s(self, owner: int, op: Compute | Gate) -> float:
        """What the host spends besides driving layers: once a micro-batch before its first forward pass here, and once
        a step, with the optimizer or (where that runs on servers) at the gate."""
        host = self.prices.framework.host
        if op.id.phase == "forward":
            once = (owner, op.id.micro_batch)
        elif op.id.phase == "update" or isinstance(op, Gate):
            once = (owner, -1)
        else:
            return 0.0
        if once in self._driven:
            return 0.0
        self._driven.add(once)
        return host.per_step_s if once[1] < 0 else host.per_micro_batch_s

    def _cached(self, key: tuple[object, ...], make: object) -> Flows:
        found = self._flow_cache.get(key)
        if found is None:
            found = self._flow_cache[key] = make()  # type: ignore[operator]
        return found

    def _wait(self, owner: int, position: int, index: int, op: Op) -> None:
        mine = self._tasks_of[owner, index]
        for where, which in op.after:
            for other in self._who(owner, position, where):
                theirs = self._tasks_of[other, which]
                for part, number in enumerate(mine):
                    # Part k of a bucket needs part k of what it follows; a whole needs the last part.
                    needed = theirs[part] if len(theirs) == len(mine) else theirs[-1]
                    self.tasks[needed].then.append(number)
                    self.tasks[number].waits += 1

    def _who(self, owner: int, position: int, where: int) -> list[int]:
        """Which owners at position `where` an owner at `position` depends on."""
        found = self._known_peers.get((owner, where))
        if found is None:
            found = self._known_peers[owner, where] = self._peers(owner, position, where)
        return found

    def _peers(self, owner: int, position: int, where: int) -> list[int]:
        folding = self.prices.folding
        if where == position:
            return [owner]
        workers = folding.classes
        if self.program.positions[where].role == "server":
            return [workers + s for s in range(len(self.prices.servers))]
        if owner >= workers:
            return [c for c, stage in enumerate(folding.stage) if stage == where]
        rank = folding.members[owner][:1]
        _, dp, tp = self.prices._coordinates(rank)
        return [int(folding.class_of[folding.grid[where, int(dp[0]), int(tp[0])]])]
