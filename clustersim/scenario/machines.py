"""The machines of a cluster block: a node profile by its name, with overrides of its keys, and a count."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clustersim import files
from clustersim.cluster.cluster import Machine
from clustersim.cluster.load import load_node, node_collectives
from clustersim.cluster.node import Node
from clustersim.errors import ScenarioError
from clustersim.hardware.cost import load_device
from clustersim.hardware.load import load_link
from clustersim.scenario.scenario import NodeSpec

# Twice the largest clusters that there are; a simulation of as many takes minutes and gigabytes.
MOST_DEVICES = 2**18
# Of server hosts; every count is several schemes of synchronisation for every division.
_MOST_COUNTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block of keys of a file, for errors: the file's name, its places, and the path of the block."""

    name: str
    places: files.Located
    path: tuple[str | int, ...]


def named_machine(kind: str, given: NodeSpec, digests: dict[str, str], block: Block) -> tuple[Machine, int, int]:
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
    match = re.fullmatch(r"\s*(\d{1,12})\s*(?:\.\.\s*(\d{1,12})\s*)?", str(count))
    if match is None:
        raise ScenarioError(f"{count!r} is not a number of hosts; write e.g. 4 or 0..16")
    low = int(match.group(1))
    high = int(match.group(2)) if match.group(2) else low
    if high < low:
        raise ScenarioError(f"{count!r} ends before it begins; write the smaller number first")
    if high > MOST_DEVICES:
        raise ScenarioError(f"{high} hosts; write at most {MOST_DEVICES}")
    if high - low > _MOST_COUNTS:
        raise ScenarioError(
            f"{count!r} is a search of {high - low + 1} counts; write a range of at most {_MOST_COUNTS}"
        )
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
