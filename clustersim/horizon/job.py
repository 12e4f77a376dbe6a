"""A training job as failures see it: its parts, how often they fail, and what each way back costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.cluster.reliability import Hazard, Reliability
from clustersim.errors import InputError
from clustersim.horizon.checkpoints import daly_interval_s
from clustersim.layout.layout import Layout, ParameterServer
from clustersim.layout.memory import StateBytes
from clustersim.units import human_seconds
from clustersim.workload.parameters import parameter_count
from clustersim.workload.training import Workload

# What a failure does: all go back to the last checkpoint, or all wait while what was lost is replaced.
Recovery = Literal["rollback", "hold"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Threat:
    """One hazard to a job: `count` components under it, how the job recovers, and how long that takes after detection
    where it holds. `takes_copy`: whether a copy of what a parameter server keeps is lost."""

    hazard: Hazard
    count: int
    recovery: Recovery
    hold_s: float = 0.0
    takes_copy: bool = False

    @property
    def rate_per_s(self) -> float:
        """Failures of all components together, per second."""
        return self.count * self.hazard.rate_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job on `nodes` worker nodes. `pause_s`: what a checkpoint keeps training waiting; it is safe `persist_s` after
    that. `interval_s` of training lie between two checkpoints. `speed(n)`: relative speed on n of its nodes, 0 where it
    cannot run. `step_s` is the time of one step on all nodes."""

    nodes: int
    devices_per_node: int
    servers: int
    threats: tuple[Threat, ...]
    checkpoint_bytes: float
    pause_s: float
    persist_s: float
    load_s: float
    interval_s: float
    detection_s: float
    reschedule_s: float
    repair_s: float | None
    spares: int
    elastic: bool
    planned_every_s: float | None
    planned_lasts_s: float
    server_replicas: int
    step_s: float
    speed: Callable[[int], float]

    @property
    def restart_s(self) -> float:
        """From a failure that rolls back to the first new step, where a node is at hand."""
        return self.detection_s + self.reschedule_s + self.load_s

    @property
    def mtbf_s(self) -> float:
        """Mean time between rollbacks: failures that roll back, and losses of the last of k + 1 copies of what a server
        keeps, that is k more failures while the first is recovered from: rate (rate T)^k to first order."""
        rate = sum(threat.rate_per_s for threat in self.threats if threat.recovery == "rollback")
        holding = [threat for threat in self.threats if threat.takes_copy]
        if holding:
            each = sum(threat.rate_per_s for threat in holding)
            window = self.detection_s + max(threat.hold_s for threat in holding)
            rate += each * (each * window) ** self.server_replicas
        return math.inf if rate == 0.0 else 1.0 / rate

    @property
    def constant_rate(self) -> bool:
        """Whether every failure rolls back, at a rate that never changes, to a restart that always takes as long."""
        return (
            self.repair_s is None
            and self.planned_every_s is None
            and all(t.recovery == "rollback" and t.hazard.shape == 1.0 for t in self.threats if t.count)
        )


def job_of(
    given: Reliability,
    cluster: Cluster,
    workload: Workload,
    layout: Layout,
    step_s: Callable[[Layout], float],
) -> Job:
    """The job that trains `workload` with `layout` on `cluster`. `step_s` prices a layout: the given one, and those
    with fewer replicas on which an elastic job goes on. InputError where no interval fits."""
    devices = cluster.devices_per_node
    nodes = -(-layout.mesh.workers // devices)
    servers = layout.scheme.dedicated if isinstance(layout.scheme, ParameterServer) else 0
    plan = given.checkpoint
    state = StateBytes.of(layout.precision, workload.training.optimizer)
    per_parameter = plan.bytes_per_parameter_bytes
    if per_parameter is None:
        per_parameter = float(state.weights + state.optimizer)
    parameters = parameter_count(workload.model)
    size = parameters * per_parameter
    into_storage = _moving_s(size, given, cluster, nodes)
    write = plan.write_s if plan.write_s is not None else into_storage
    load = plan.load_s if plan.load_s is not None else (write if math.isinf(into_storage) else into_storage)
    pause, persist = write, 0.0
    if plan.mode == "async":
        pause = plan.pause_s if plan.pause_s is not None else size / _copying_bytes_per_s(cluster, nodes)
        persist = write
    holdings = _Holdings(state=size, weights=float(parameters * state.weights))
    threats = tuple(_threat(hazard, given, cluster, layout, holdings) for hazard in given.hazards())
    draft = Job(
        nodes=nodes, devices_per_node=devices, servers=servers, threats=threats, checkpoint_bytes=size, pause_s=pause,
        persist_s=persist, load_s=load, interval_s=0.0, detection_s=given.detection_s, reschedule_s=given.reschedule_s,
        repair_s=given.repair_s, spares=given.spares, elastic=given.elastic,
        planned_every_s=given.planned.every_s if given.planned else None,
        planned_lasts_s=given.planned.lasts_s if given.planned else 0.0,
        server_replicas=given.server_replicas, step_s=step_s(layout), speed=_Speeds(layout, devices, step_s),
    )  # fmt: skip
    return _with_interval(draft, plan.interval_s)


def _with_interval(job: Job, wanted_s: float | None) -> Job:
    # A checkpoint is under way until it is safe; the next one cannot begin before.
    least = max(0.0, job.persist_s - job.pause_s)
    if wanted_s is not None:
        if wanted_s < least:
            raise InputError(
                f"reliability.checkpoint.interval: {human_seconds(wanted_s)} is less than the {human_seconds(least)} "
                "for which the one before is still being written; write more, or a faster storage_rate"
            )
        return replace(job, interval_s=wanted_s)
    best = daly_interval_s(job.pause_s, job.mtbf_s) if math.isfinite(job.mtbf_s) else math.inf
    # Training can stop between steps only.
    return replace(job, interval_s=max(best, least, job.step_s))


def _moving_s(size: float, given: Reliability, cluster: Cluster, nodes: int) -> float:
    """Seconds in which all nodes together write or read `size` bytes; inf where no storage is described."""
    storage = given.checkpoint.storage_rate_bytes_per_s
    if storage is None:
        return math.inf
    machine = cluster.workers[0]
    each = given.checkpoint.node_rate_bytes_per_s or machine.node.nic.count * machine.nic_rate_bytes_per_s
    return size / min(nodes * each, storage)


def _copying_bytes_per_s(cluster: Cluster, nodes: int) -> float:
    """The rate at which all devices together copy their state to host memory: over PCIe where there is any, and never
    faster than that memory."""
    machine: Machine = cluster.workers[0]
    memory = machine.node.host.memory_bandwidth_bytes_per_s
    if machine.pcie is None:
        return nodes * memory
    return nodes * min(memory, machine.node.devices * machine.pcie.rate_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holdings:
    """Bytes of the whole model: of what is kept in a checkpoint, and of the weights alone."""

    state: float
    weights: float


def _threat(hazard: Hazard, given: Reliability, cluster: Cluster, layout: Layout, held: _Holdings) -> Threat:
    scheme = layout.scheme
    nodes = -(-layout.mesh.workers // cluster.devices_per_node)
    servers = scheme.dedicated if isinstance(scheme, ParameterServer) else 0
    count = {"node": nodes, "device": layout.mesh.workers, "server": servers}[hazard.component]
    if not isinstance(scheme, ParameterServer):
        return Threat(hazard=hazard, count=count, recovery="rollback")
    stateful = scheme.optimizer_at == "server"
    copies = given.server_replicas > 0
    if hazard.component == "server":
        if not stateful:
            # Such a server keeps nothing between steps.
            return Threat(hazard=hazard, count=count, recovery="hold", hold_s=given.reschedule_s)
        if not copies:
            return Threat(hazard=hazard, count=count, recovery="rollback")
        # Another server takes over, and fetches from a copy the range that was lost.
        share = held.state * scheme.dedicated_parts / scheme.parts
        nic = cluster.servers[0]
        return Threat(
            hazard=hazard, count=count, recovery="hold", takes_copy=True,
            hold_s=share / (nic.node.nic.count * nic.nic_rate_bytes_per_s),
        )  # fmt: skip
    if not stateful or (scheme.colocated and not copies):
        return Threat(hazard=hazard, count=count, recovery="rollback")
    # All that training needs is on servers: a new worker pulls the weights, and the part of a server beside it.
    machine = cluster.workers[0]
    slices = layout.mesh.tp * layout.mesh.pp
    chunk = held.weights * min(1.0, cluster.devices_per_node / slices)
    if scheme.colocated:
        chunk += held.state * scheme.colocated_parts * scheme.colocated / nodes / scheme.parts
    return Threat(
        hazard=hazard, count=count, recovery="hold", takes_copy=scheme.colocated > 0,
        hold_s=given.reschedule_s + chunk / (machine.node.nic.count * machine.nic_rate_bytes_per_s),
    )  # fmt: skip


class _Speeds:
    """Relative speed by the number of nodes that are left, from the step time of the layout with fewer replicas."""

    def __init__(self, layout: Layout, devices: int, step_s: Callable[[Layout], float]) -> None:
        self._layout = layout
        self._devices = devices
        self._step_s = step_s
        self._known: dict[int, float] = {layout.mesh.dp: 1.0}

    def __call__(self, nodes: int) -> float:
        mesh = self._layout.mesh
        dp = min(mesh.dp, nodes * self._devices // (mesh.tp * mesh.pp * mesh.cp))
        # Experts are divided over replicas, and the ranks of a group must all be there.
        while dp > 0 and dp * mesh.cp % mesh.ep != 0:
            dp -= 1
        if dp == 0:
            return 0.0
        if dp not in self._known:
            self._known[dp] = min(1.0, self._step_s(self._layout) / self._step_s(fewer_replicas(self._layout, dp)))
        return self._known[dp]


def fewer_replicas(layout: Layout, dp: int) -> Layout:
    """The layout with `dp` data-parallel replicas; servers beside workers stay as many as there are workers for."""
    mesh = replace(layout.mesh, dp=dp)
    rule = layout.sync[0]
    scheme = rule.scheme
    if isinstance(scheme, ParameterServer) and scheme.colocated > mesh.workers:
        rule = replace(rule, scheme=replace(scheme, colocated=mesh.workers))
    return replace(layout, mesh=mesh, sync=(rule,))
