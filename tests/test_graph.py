"""The graph of a cluster, and its agreement with the routes that the simulator finds by arithmetic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from clustersim.cluster.cluster import Cluster
from clustersim.cluster.graph import graph, leaves, route
from clustersim.cluster.wiring import Port, Wiring
from clustersim.scenario.load import question

_FABRICS: tuple[dict[str, Any], ...] = (
    {"kind": "one-switch"},
    {"kind": "leaf-spine", "nodes_per_leaf": 2},
    {"kind": "leaf-spine", "nodes_per_leaf": 2, "oversubscription": 4},
    {"kind": "rail-optimized", "nodes_per_leaf": 2},
    {"kind": "rail-optimized", "nodes_per_leaf": 8, "oversubscription": 2},
)


def _cluster(nodes: str, count: int, fabric: dict[str, Any], servers: int = 0, faults: object = ()) -> Cluster:
    tree = {
        "schema_version": 1,
        "name": "graph",
        "model": "gpt3-125m",
        "training": {"global_batch": 8, "sequence": 128, "precision": "fp16"},
        "cluster": {
            "nodes": {nodes: count},
            "servers": {"cpu-server-200g": servers},
            "fabric": fabric,
            "faults": list(faults),  # type: ignore[call-overload]
        },
    }
    return question(tree, "graph").cluster


@pytest.mark.parametrize("fabric", _FABRICS, ids=lambda fabric: "-".join(map(str, fabric.values())))
@pytest.mark.parametrize("node", ["dgx-a100-80g", "dgx-1-v100", "pcie-l40s-8", "p3-2xlarge"])
def test_routes_by_arithmetic_are_the_paths_of_the_graph(node: str, fabric: dict[str, Any]) -> None:
    cluster = _cluster(node, 4, fabric)
    wires, wiring = graph(cluster), Wiring(cluster)
    name_of = {place["rank"]: name for name, place in wires.nodes(data=True) if place["kind"] == "gpu"}
    assert sorted(name_of) == list(range(cluster.devices))
    mesh = cluster.workers[0].node.interconnect is not None and cluster.workers[0].node.interconnect.kind == "mesh"
    some = range(0, cluster.devices, 3) if cluster.devices > 8 else range(cluster.devices)
    for a, b in itertools.permutations(some, 2):
        path = route(wires, name_of[a], name_of[b])
        kinds = [wires.nodes[name]["kind"] for name in path]
        inside, switches = wiring.hops(a, b)
        assert kinds.count("leaf") + kinds.count("spine") == switches, (a, b, path)
        assert (inside > 0) == (len({wires.nodes[name]["node"] for name in path}) == 1)
        if inside and mesh:
            # A pair without a direct link takes one device on the way.
            assert len(path) <= 3
            continue
        slowest = min(wires.edges[edge]["rate_bytes_per_s"] for edge in itertools.pairwise(path))
        if inside and cluster.workers[0].node.interconnect.kind == "pcie":  # type: ignore[union-attr]
            # Copies through host memory are slower than the wires on their way.
            slowest = min(slowest, cluster.workers[0].interconnect_rate_bytes_per_s)
        traffic = wiring.between(np.array([a]), np.array([b]))
        assert slowest == pytest.approx(wiring.capacity[traffic.links].min())
        cards = [name for name in path if wires.nodes[name]["kind"] == "nic"]
        if not inside:
            assert cards == [wires.nodes[name_of[a]]["nic"], wires.nodes[name_of[b]]["nic"]]


@pytest.mark.parametrize("fabric", _FABRICS, ids=lambda fabric: "-".join(map(str, fabric.values())))
def test_leaves_have_the_uplinks_that_the_wiring_has(fabric: dict[str, Any]) -> None:
    cluster = _cluster("dgx-a100-80g", 5, fabric, servers=3)
    wires, wiring, found = graph(cluster), Wiring(cluster), leaves(cluster)
    if fabric["kind"] == "one-switch":
        assert found.count == 1
        assert "spine" not in wires
        return
    assert found.count == wiring.leaves
    up = wiring.capacity[wiring.offset[Port.LEAF_UP] :][: wiring.leaves]
    assert up == pytest.approx(np.full(wiring.leaves, found.uplink_bytes_per_s))
    for leaf in range(wiring.leaves):
        assert wires.edges[f"leaf{leaf}", "spine"]["rate_bytes_per_s"] == pytest.approx(up[leaf])
    for host in range(3):
        leaf = int(wiring.leaf_of(np.array([5 + host]), np.array([host % wiring.ports_per_node]))[0])
        assert f"leaf{leaf}" in wires[f"n{5 + host}.nic0"]
    for rank in range(cluster.devices):
        node, device = divmod(rank, 8)
        port = wiring.port_of(np.array([rank]))
        leaf = int(wiring.leaf_of(np.array([node]), port)[0])
        assert f"leaf{leaf}" in wires[wires.nodes[f"n{node}.gpu{device}"]["nic"]]


def test_a_device_of_a_mesh_spends_its_whole_rate_on_its_direct_links() -> None:
    cluster = _cluster("dgx-1-v100", 1, {"kind": "one-switch"})
    wires, wiring = graph(cluster), Wiring(cluster)
    for device in range(8):
        name = f"n0.gpu{device}"
        direct = [rate for _, to, rate in wires.out_edges(name, data="rate_bytes_per_s") if ".gpu" in to]
        assert len(direct) == 4
        assert sum(direct) == pytest.approx(wiring.capacity[wiring.offset[Port.DEVICE_OUT] + device])


def test_faults_show_in_the_graph() -> None:
    faults = [
        {"kind": "slow-nic", "node": 1, "nic": 3, "speed": 0.25},
        {"kind": "slow-rank", "rank": 9, "slowdown": 1.5},
    ]
    sound = graph(_cluster("dgx-a100-80g", 2, {"kind": "one-switch"}))
    faulty = graph(_cluster("dgx-a100-80g", 2, {"kind": "one-switch"}, faults=faults))
    slower = {
        (a, b): faulty.edges[a, b]["rate_bytes_per_s"] / rate
        for a, b, rate in sound.edges(data="rate_bytes_per_s")
        if math.isfinite(rate) and faulty.edges[a, b]["rate_bytes_per_s"] != rate
    }
    assert slower == {("n1.nic3", "leaf0"): 0.25, ("leaf0", "n1.nic3"): 0.25}
    assert {n for n, place in faulty.nodes(data=True) if place.get("slowdown", 1.0) != 1.0} == {"n1.gpu1"}


def test_every_rate_is_given_in_both_directions() -> None:
    wires = graph(_cluster("pcie-l40s-8", 3, {"kind": "leaf-spine", "nodes_per_leaf": 2}, servers=2))
    for a, b, rate in wires.edges(data="rate_bytes_per_s"):
        assert wires.edges[b, a]["rate_bytes_per_s"] == rate
