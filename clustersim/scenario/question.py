"""A question: a scenario whose names are looked up; resolve() finds its cluster, its workload and its framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from clustersim import files
from clustersim.cluster.capacity import background_share
from clustersim.cluster.cluster import Cluster, SlowNic, SlowRank
from clustersim.cluster.graph import leaves
from clustersim.cluster.load import load_fabric
from clustersim.cluster.reliability import load_failures
from clustersim.errors import ClustersimError, ScenarioError
from clustersim.hardware.calibration import find_calibration
from clustersim.hardware.framework import Framework
from clustersim.hardware.load import load_framework
from clustersim.layout.choices import contradiction
from clustersim.scenario.machines import MOST_DEVICES, Block, named_machine
from clustersim.scenario.scenario import Scenario
from clustersim.workload.presets import model_of
from clustersim.workload.training import Workload

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRange:
    """How many server hosts the search may use: `least` to `most`, of one machine kind."""

    least: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A scenario with every name looked up: what the search and the interpreters work on."""

    scenario: Scenario
    cluster: Cluster
    workload: Workload
    framework: Framework
    servers: ServerRange
    digests: dict[str, str]


def resolve(
    scenario: Scenario, *, name: str = "scenario", places: files.Located | None = None, calibrated: bool = True
) -> Question:
    """Look up every profile and the model that `scenario` names. Reads profile files; ScenarioError on a bad name.

    Where runs of the framework on these kinds of nodes were calibrated, the framework carries what they found, unless
    it is to be as shipped (`calibrated` False).
    """

    def wrong(path: tuple[str | int, ...], message: str) -> ScenarioError:
        return ScenarioError(files.located(name, places or {}, path, message))

    def looked_up(path: tuple[str | int, ...], find: Callable[[], T]) -> T:
        try:
            return find()
        except ClustersimError as error:
            # An error in a part of this file says where it is already.
            if str(error).startswith(f"{name}:"):
                raise
            raise wrong(path, str(error).removeprefix(f"{path[-1]}: ")) from None

    def block(*keys: str) -> Block:
        return Block(name=name, places=places or {}, path=("cluster", *keys))

    digests: dict[str, str] = {}
    spec = scenario.cluster
    if not spec.nodes:
        raise wrong(("cluster", "nodes"), "names no node; write e.g. {dgx-a100-80g: 4}")
    workers, servers = [], []
    for kind in spec.nodes:
        path = ("cluster", "nodes", kind)
        here = block("nodes", kind)
        machine, low, high = looked_up(path, lambda k=kind, b=here: named_machine(k, spec.nodes[k], digests, b))  # type: ignore[misc]
        if low != high:
            raise wrong(path, "a range of worker nodes is not searched; write one count")
        if high < 1:
            raise wrong(path, f"{high} nodes; write at least 1")
        if machine.node.devices == 0:
            raise wrong(path, f"{kind} has no devices and cannot work; write it under servers:")
        workers.append(machine)
    if sum(machine.count * machine.node.devices for machine in workers) > MOST_DEVICES:
        raise wrong(("cluster", "nodes"), f"have more than {MOST_DEVICES} devices together; write fewer nodes")
    if len({machine.node.devices for machine in workers}) > 1:
        raise wrong(("cluster", "nodes"), "all worker nodes must have the same number of devices")
    least = 0
    for kind in spec.servers:
        path = ("cluster", "servers", kind)
        here = block("servers", kind)
        machine, least, most = looked_up(path, lambda k=kind, b=here: named_machine(k, spec.servers[k], digests, b))  # type: ignore[misc]
        if most > 0:
            servers.append(machine)
    if len(spec.servers) > 1:
        raise wrong(("cluster", "servers"), "names several kinds of server hosts; write one")
    fabric = spec.fabric
    if isinstance(fabric, str):
        named = fabric
        fabric = looked_up(("cluster", "fabric"), lambda: load_fabric(named))
    storage = []
    for kind in spec.storage:
        path = ("cluster", "storage", kind)
        here = block("storage", kind)
        machine, low, high = looked_up(path, lambda k=kind, b=here: named_machine(k, spec.storage[k], digests, b))  # type: ignore[misc]
        if low != high or high < 1:
            raise wrong(path, "is not one count of at least 1; a range of storage hosts is not searched")
        if machine.node.storage is None:
            raise wrong(path, f"{kind} serves no data; use a profile with storage:, e.g. storage-nvme")
        storage.append(machine)
    if len(spec.storage) > 1:
        raise wrong(("cluster", "storage"), "names several kinds of storage hosts; write one")
    if storage and scenario.data is None:
        raise wrong(("cluster", "storage"), "nothing reads from it; say what a sample holds, e.g. data: {sample: 8KiB}")
    if storage and workers[0].nic.kind == "loopback":
        raise wrong(("cluster", "storage"), "workers that share one host reach no storage host; give the node storage:")
    if scenario.data is not None and not storage:
        for machine in workers:
            if machine.node.storage is None:
                raise wrong(
                    ("data",),
                    f"nothing serves it: write cluster.storage, e.g. {{storage-nvme: 1}}, or give {machine.node.name} "
                    "storage of its own, e.g. {tier: nvme, read_rate: 25GB/s, read_latency: 100us}",
                )
    cluster = Cluster(
        workers=tuple(workers),
        servers=tuple(servers),
        fabric=fabric,
        faults=spec.faults,
        storage=tuple(storage),
        noise=spec.noise,
        background=spec.background,
    )
    _check_background(cluster, wrong)
    for index, fault in enumerate(spec.faults):
        where = ("cluster", "faults", index)
        if isinstance(fault, SlowRank) and not 0 <= fault.rank < cluster.devices:
            raise wrong(where, f"rank {fault.rank} does not exist; the cluster has ranks 0 to {cluster.devices - 1}")
        if isinstance(fault, SlowNic):
            if not 0 <= fault.node < cluster.worker_nodes:
                raise wrong(
                    where, f"node {fault.node} does not exist; worker nodes are 0 to {cluster.worker_nodes - 1}"
                )
            nics = cluster.machine_of(fault.node).node.nic.count
            if not 0 <= fault.nic < nics:
                raise wrong(where, f"nic {fault.nic} does not exist; the node has NICs 0 to {nics - 1}")
            if fault.speed <= 0.0:
                raise wrong(where, "speed must be more than 0; a card without any cannot train")
    model = looked_up(("model",), lambda: model_of(scenario.model, sequence=scenario.training.sequence))
    framework = looked_up(("framework",), lambda: load_framework(scenario.framework))
    if 0 < model.positions < scenario.training.sequence:
        raise wrong(
            ("training", "sequence"),
            f"{scenario.training.sequence} tokens, but {model.name} has {model.positions} learned positions; "
            f"write at most {model.positions}",
        )
    if scenario.constraints.deadline_s is not None and scenario.training.tokens is None:
        raise wrong(("constraints", "deadline"), "needs training.tokens, to know how long the whole training is")
    dtype = scenario.training.precision
    for machine in workers:
        assert machine.device is not None
        if dtype not in machine.device.peak:
            raise wrong(
                ("training", "precision"),
                f"{dtype} on {machine.device.name}: the device has no {dtype}; "
                f"use one of {', '.join(sorted(machine.device.peak))}",
            )
        digests[f"devices/{machine.device.name}"] = files.digest(machine.device)
    workload = Workload(model=model, training=scenario.training, data=scenario.data)
    found = contradiction(scenario.layout, workload, cluster, framework)
    if found is not None:
        raise wrong(("layout", found[0]), found[1])
    digests[f"frameworks/{framework.name}"] = files.digest(framework)
    calibration = (
        looked_up(("framework",), lambda: find_calibration(spec.nodes, framework.name)) if calibrated else None
    )
    if calibration is not None:
        digests[f"calibrations/{calibration.name}"] = files.digest(calibration)
        framework = calibration.applied(framework)
    if scenario.reliability is not None:
        for named in scenario.reliability.names:
            failures = looked_up(("reliability", "failures"), lambda n=named: load_failures(n))  # type: ignore[misc]
            digests[f"reliability/{named}"] = files.digest(failures)
    return Question(
        scenario=scenario,
        cluster=cluster,
        workload=workload,
        framework=framework,
        servers=ServerRange(least=least, most=sum(machine.count for machine in servers)),
        digests=dict(sorted(digests.items())),
    )


def _check_background(cluster: Cluster, wrong: Callable[[tuple[str | int, ...], str], ScenarioError]) -> None:
    """Entries name links that exist, and leave something of each."""
    if cluster.background and cluster.workers[0].nic.kind == "loopback":
        raise wrong(("cluster", "background"), "workers that share one host have no network that others could use")
    count = {"nic": cluster.worker_nodes + cluster.server_nodes, "leaf-uplink": leaves(cluster).count}
    for index, entry in enumerate(cluster.background):
        where = ("cluster", "background", index)
        if entry.link == "leaf-uplink" and cluster.fabric.kind == "one-switch":
            raise wrong(where, "one switch has no leaf uplinks; write link: nic, or another fabric")
        known = range(count[entry.link])
        thing = "node" if entry.link == "nic" else "leaf"
        for place in entry.at if entry.at is not None else known:
            if place not in known:
                raise wrong(where, f"{thing} {place} does not exist; there are 0 to {known[-1]}")
            if background_share(cluster, entry.link, place) >= 1.0:
                raise wrong(where, f"other jobs leave nothing of {thing} {place}; shares must add up to less than 1")
