"""Node and fabric profiles by name, and the measured collectives of a node."""

from __future__ import annotations

import functools
from pathlib import Path

from clustersim.cluster.cluster import Machine
from clustersim.cluster.fabric import Fabric
from clustersim.cluster.node import Node
from clustersim.files import load, profile_path
from clustersim.hardware.cost import load_device
from clustersim.hardware.curve import CollectiveTable, collective_table
from clustersim.hardware.device import TableRef
from clustersim.hardware.load import load_link


def load_node(name: str) -> Node:
    """The node profile `name`; ProfileError with the known names where there is none. Cached."""
    return _node(str(profile_path("nodes", name).resolve()))


def load_fabric(name: str) -> Fabric:
    """The fabric profile `name`; ProfileError with the known names where there is none. Cached."""
    return _fabric(str(profile_path("fabrics", name).resolve()))


def load_machine(name: str, count: int = 1) -> Machine:
    """`count` nodes of the profile `name`, with everything resolved that it names."""
    node = load_node(name)
    return Machine(
        node=node,
        count=count,
        device=load_device(node.device) if node.device is not None else None,
        interconnect=load_link(node.interconnect.link) if node.interconnect is not None else None,
        nic=load_link(node.nic.link),
        pcie=load_link(node.pcie) if node.pcie is not None else None,
        collectives=node_collectives(node),
    )


def node_collectives(node: Node) -> CollectiveTable | None:
    """The measured collectives among the devices of `node`, or None where it names no table.

    Table files are named relative to the folder of the node's profile (`node.name`). Read once.
    """
    if not node.collectives:
        return None
    folder = profile_path("nodes", node.name).resolve().parent
    return _table(node.collectives, str(folder))


@functools.cache
def _node(path: str) -> Node:
    node: Node = load(Node, path)
    return node


@functools.cache
def _fabric(path: str) -> Fabric:
    fabric: Fabric = load(Fabric, path)
    return fabric


@functools.cache
def _table(refs: tuple[TableRef, ...], folder: str) -> CollectiveTable:
    return collective_table(refs, Path(folder))
