"""A scenario: the question, as a user writes it; resolve() turns it into a cluster, a workload and a framework."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from clustersim import files
from clustersim.cluster.background import Background
from clustersim.cluster.capacity import background_share
from clustersim.cluster.cluster import Cluster, Fault, Machine, SlowNic, SlowRank
from clustersim.cluster.fabric import Fabric
from clustersim.cluster.graph import leaves
from clustersim.cluster.load import load_fabric, load_node, node_collectives
from clustersim.cluster.node import Node
from clustersim.cluster.noise import Noise
from clustersim.cluster.reliability import Reliability, load_failures
from clustersim.errors import ClustersimError, ScenarioError
from clustersim.hardware.calibration import find_calibration
from clustersim.hardware.cost import load_device
from clustersim.hardware.framework import Framework
from clustersim.hardware.load import load_framework, load_link
from clustersim.layout.choices import LayoutSpec, contradiction
from clustersim.layout.layout import Family
from clustersim.units import FILE, Fraction, Seconds
from clustersim.workload.data import Data
from clustersim.workload.model import Dimensions
from clustersim.workload.presets import model_of
from clustersim.workload.training import Training, Workload

T = TypeVar("T")

# `8` nodes, or {count: 8, and overrides of the profile's keys}; server hosts also take a range `0..16`.
NodeSpec = int | str | dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """The `cluster:` block: node profiles by name with their counts, the fabric, hosts for servers and data, faults."""

    __pydantic_config__: ClassVar[Any] = FILE
    nodes: dict[str, NodeSpec]
    fabric: str | Fabric = "one-switch"
    servers: dict[str, NodeSpec] = field(default_factory=dict)
    storage: dict[str, NodeSpec] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()
    background: tuple[Background, ...] = ()
    noise: Noise | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpec:
    """The `search:` block: the families to compare, and how many layouts to simulate."""

    __pydantic_config__: ClassVar[Any] = FILE
    sync: tuple[Family, ...] = ("allreduce", "sharded", "parameter-server")
    simulate: int = 12

    def __post_init__(self) -> None:
        if not self.sync:
            raise ValueError("sync must name at least one of allreduce, sharded, parameter-server")
        if self.simulate < 1:
            raise ValueError("simulate must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What a layout must keep: a fraction of device memory free, a step time, a price per step, whole training time."""

    __pydantic_config__: ClassVar[Any] = FILE
    memory_headroom: Fraction = 0.0
    deadline_s: Seconds | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.memory_headroom < 1.0:
            raise ValueError("memory_headroom must be at least 0 and less than 1, e.g. 8%")


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """The scenario with some keys set: planned again, shown as a difference."""

    __pydantic_config__: ClassVar[Any] = FILE
    name: str
    set: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A scenario file."""

    __pydantic_config__: ClassVar[Any] = FILE
    schema_version: Literal[1]
    name: str
    model: str | Dimensions
    training: Training
    data: Data | None = None
    framework: str = "clustersim"
    cluster: ClusterSpec
    search: SearchSpec = field(default_factory=SearchSpec)
    layout: LayoutSpec = field(default_factory=LayoutSpec)
    objective: Literal["step_time", "usd"] = "step_time"
    constraints: Constraints = field(default_factory=Constraints)
    reliability: Reliability | None = None
    what_if: tuple[WhatIf, ...] = ()


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block of keys of a file, for errors: the file's name, its places, and the path of the block."""

    name: str
    places: files.Located
    path: tuple[str | int, ...]


def resolve(scenario: Scenario, *, name: str = "scenario", places: files.Located | None = None) -> Question:
    """Look up every profile and the model that `scenario` names. Reads profile files; ScenarioError on a bad name.

    Where runs of the framework on these kinds of nodes were calibrated, the framework carries what they found.
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
        machine, low, high = looked_up(path, lambda k=kind, b=here: _machine(k, spec.nodes[k], digests, b))  # type: ignore[misc]
        if low != high:
            raise wrong(path, "a range of worker nodes is not searched; write one count")
        if high < 1:
            raise wrong(path, f"{high} nodes; write at least 1")
        if machine.node.devices == 0:
            raise wrong(path, f"{kind} has no devices and cannot work; write it under servers:")
        workers.append(machine)
    if len({machine.node.devices for machine in workers}) > 1:
        raise wrong(("cluster", "nodes"), "all worker nodes must have the same number of devices")
    least = 0
    for kind in spec.servers:
        path = ("cluster", "servers", kind)
        here = block("servers", kind)
        machine, least, most = looked_up(path, lambda k=kind, b=here: _machine(k, spec.servers[k], digests, b))  # type: ignore[misc]
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
        machine, low, high = looked_up(path, lambda k=kind, b=here: _machine(k, spec.storage[k], digests, b))  # type: ignore[misc]
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
    found = contradiction(scenario.layout, workload, framework)
    if found is not None:
        raise wrong(("layout", found[0]), found[1])
    digests[f"frameworks/{framework.name}"] = files.digest(framework)
    calibration = looked_up(("framework",), lambda: find_calibration(spec.nodes, framework.name))
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


def _machine(kind: str, given: NodeSpec, digests: dict[str, str], block: Block) -> tuple[Machine, int, int]:
    """The machine of a `nodes:` or `servers:` entry, and its count or range."""
    overrides: dict[str, Any] = {}
    count: object = given
    if isinstance(given, dict):
        overrides = {key: value for key, value in given.items() if key != "count"}
        count = given.get("count")
        if count is None:
            raise ScenarioError("count is required and missing; write e.g. {count: 4}")
    low, high = _range(count)
    node = overridden_node(kind, overrides, block)
    digests[f"nodes/{kind}"] = files.digest(node)
    nic = load_link(node.nic.link)
    inside = load_link(node.interconnect.link) if node.interconnect is not None else None
    pcie = load_link(node.pcie) if node.pcie is not None else None
    for link in (nic, inside, pcie):
        if link is not None:
            digests[f"links/{link.name}"] = files.digest(link)
    machine = Machine(
        node=node,
        count=high,
        device=load_device(node.device) if node.device is not None else None,
        interconnect=inside,
        nic=nic,
        pcie=pcie,
        collectives=node_collectives(node) if not {"interconnect", "device"} & set(overrides) else None,
    )
    return machine, low, high


def _range(count: object) -> tuple[int, int]:
    if isinstance(count, bool) or not isinstance(count, (int, str)):
        raise ScenarioError(f"{count!r} is not a number of hosts; write e.g. 4 or 0..16")
    match = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?", str(count))
    if match is None:
        raise ScenarioError(f"{count!r} is not a number of hosts; write e.g. 4 or 0..16")
    low = int(match.group(1))
    high = int(match.group(2)) if match.group(2) else low
    if high < low:
        raise ScenarioError(f"{count!r} ends before it begins; write the smaller number first")
    return low, high


def overridden_node(kind: str, overrides: dict[str, Any], block: Block) -> Node:
    """A node profile with some of its keys replaced, nested blocks merged key by key."""
    if not overrides:
        return load_node(kind)
    path = files.profile_path("nodes", kind)
    tree, _ = files.read_tree(path)
    found: Node = files.validated(Node, _merged(tree, overrides), block.name, block.places, block.path)
    return found


def _merged(tree: Any, overrides: Mapping[str, Any]) -> Any:
    result = dict(tree) if isinstance(tree, Mapping) else {}
    for key, value in overrides.items():
        result[key] = _merged(result.get(key), value) if isinstance(value, Mapping) else value
    return result


def load_scenario(path: str | Path) -> Question:
    """The scenario file at `path` (or of that built-in name), looked up."""
    where = files.scenario_path(str(path))
    tree, places = files.read_tree(where)
    return question(tree, str(where), places)


def question(tree: Any, name: str, places: files.Located | None = None) -> Question:
    """The plain data of a scenario, validated and looked up; its what-if entries too, so that none fails later."""
    scenario: Scenario = files.validated(Scenario, tree, name, places)
    found = resolve(scenario, name=name, places=places)
    for index, entry in enumerate(scenario.what_if):
        try:
            with_settings(scenario, entry)
        except ClustersimError as error:
            message = str(error).removeprefix(f"what-if {entry.name!r}: ")
            # The setting to blame: the one that the message is about, or the only one.
            keys = [key for key in entry.set if message.startswith(key)] or list(entry.set)[: len(entry.set) == 1]
            path: tuple[str | int, ...] = ("what_if", index, "set", *keys[:1])
            about = message.removeprefix(f"{keys[0]}: ") if keys else message
            raise ScenarioError(files.located(name, places or {}, path, about, key=True)) from None
    return found


def with_settings(scenario: Scenario, entry: WhatIf) -> Question:
    """The question of a scenario with the keys of a what-if entry set."""
    tree = files.plain(scenario)
    tree.pop("what_if", None)
    for path, value in entry.set.items():
        _set(tree, path, value)
    changed: Scenario = files.validated(Scenario, tree, f"what-if {entry.name!r}")
    return resolve(changed, name=f"what-if {entry.name!r}")


def _set(tree: Any, path: str, value: Any) -> None:
    """Set a dotted path. Every block on the way must exist; a node count becomes a block when a key of it is set."""
    keys = path.split(".")
    here = tree
    for depth, key in enumerate(keys[:-1]):
        if isinstance(here, list) and key.isdigit() and int(key) < len(here):
            here = here[int(key)]
            continue
        if not isinstance(here, dict) or (key not in here and depth < 3):
            known = ", ".join(sorted(map(str, here))) if isinstance(here, dict) else "none"
            raise ScenarioError(f"{path}: there is no {'.'.join(keys[: depth + 1])}; known here: {known}")
        if key not in here or here[key] is None:
            here[key] = {}
        if (
            isinstance(here[key], (int, str))
            and depth == 2
            and keys[:2] in (["cluster", "nodes"], ["cluster", "servers"], ["cluster", "storage"])
        ):
            here[key] = {"count": here[key]}
        here = here[key]
    if not isinstance(here, dict):
        raise ScenarioError(f"{path}: {'.'.join(keys[:-1])} is not a block of keys")
    here[keys[-1]] = value
