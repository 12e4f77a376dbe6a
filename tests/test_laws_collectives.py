"""Laws P1 to P4 of docs/laws.md: bytes and times of collectives on links without losses."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
from clusters import ENDLESS, cluster_of, collective_program, framework_of, wire, workers
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.cluster.cluster import Cluster
from clustersim.cluster.fabric import Fabric
from clustersim.cluster.wiring import Port, Wiring
from clustersim.layout.layout import Algorithm, Mesh
from clustersim.program.program import CollectiveKind
from clustersim.simulate.collectives.phases import phases
from clustersim.simulate.collectives.trees import tree_parents
from clustersim.simulate.simulate import Simulated, simulate

ALGORITHMS: tuple[Algorithm, ...] = ("ring", "tree", "binary-tree", "hierarchical", "halving-doubling")


def _run(cluster: Cluster, ranks: int, kind: CollectiveKind, algorithm: Algorithm, size: int) -> Simulated:
    mesh = Mesh(dp=ranks, tp=1, pp=1)
    return simulate(collective_program(mesh, kind, algorithm, size), cluster, framework_of())


def _flat(ranks: int, rate: float = 1.0, alpha: float = 0.0) -> Cluster:
    """One rank a node, one switch."""
    return cluster_of(workers(ranks, far=wire(rate, alpha)))


def _bytes_on(found: Simulated, kind: str) -> list[float]:
    """Bytes of every link of a kind that carried any."""
    return [use.bytes_per_link for use in found.links if use.kind == kind for _ in range(use.count)]


def _lg(n: int) -> int:
    return (n - 1).bit_length()


# --------------------------------------------------------------------------------------------------------- P1


def _sent(algorithm: Algorithm, n: int) -> float:
    """Bytes that all ranks send in an allreduce of one byte, together."""
    if algorithm == "halving-doubling":
        power = 1 << (n.bit_length() - 1)
        return 2.0 * (power - 1) + 2.0 * (n - power)
    return 2.0 * (n - 1)


@given(n=st.integers(2, 33), algorithm=st.sampled_from(ALGORITHMS), size=st.integers(1, 10**9))
@settings(max_examples=120, deadline=None)
def test_p1_an_allreduce_sends_what_its_algorithm_says(n: int, algorithm: Algorithm, size: int) -> None:
    found = _run(_flat(n), n, "all_reduce", algorithm, size)
    for kind in ("nic out", "nic in"):
        assert sum(_bytes_on(found, kind)) == pytest.approx(_sent(algorithm, n) * size, rel=1e-12)


@given(n=st.integers(2, 33), kind=st.sampled_from(["reduce_scatter", "all_gather"]), size=st.integers(1, 10**9))
@settings(max_examples=60, deadline=None)
def test_p1_half_an_allreduce_sends_half(n: int, kind: Literal["reduce_scatter", "all_gather"], size: int) -> None:
    found = _run(_flat(n), n, kind, "ring", size)
    for port in ("nic out", "nic in"):
        assert _bytes_on(found, port) == pytest.approx([(n - 1) / n * size] * n, rel=1e-12)


@given(
    nodes=st.integers(1, 9),
    local=st.sampled_from([1, 2, 3, 4, 8]),
    algorithm=st.sampled_from(ALGORITHMS),
    leaf=st.integers(1, 4),
    kind=st.sampled_from(["one-switch", "leaf-spine", "rail-optimized"]),
)
@settings(max_examples=150, deadline=None)
def test_p1_what_is_sent_is_received_and_every_link_carries_its_bytes(
    nodes: int, local: int, algorithm: Algorithm, leaf: int, kind: Literal["one-switch", "leaf-spine", "rail-optimized"]
) -> None:
    """The rates of all flows on a link, integrated over time, are its bytes: what flows on it began as."""
    if nodes * local == 1:
        return
    fabric = Fabric(kind=kind, nodes_per_leaf=leaf, hop_latency_s=0.0)
    machine = workers(nodes, devices=local, nics=local, near=wire(4.0), far=wire(1.0))
    found = _run(cluster_of(machine, fabric=fabric), nodes * local, "all_reduce", algorithm, 1000)
    for out, into in (("nic out", "nic in"), ("device out", "device in"), ("leaf up", "leaf down")):
        assert sum(_bytes_on(found, out)) == pytest.approx(sum(_bytes_on(found, into)), rel=1e-12)
    sent = sum(_bytes_on(found, "nic out")) + sum(_bytes_on(found, "device out"))
    if algorithm not in ("tree", "binary-tree") or local == 1 or nodes == 1:
        assert sent == pytest.approx(1000 * _sent(algorithm, nodes * local), rel=1e-12)
    else:
        # Trees between nodes, chains inside them: every rank passes the whole buffer on, both ways.
        assert sent == pytest.approx(1000 * (2.0 * (nodes - 1) + 2.0 * nodes * (local - 1)), rel=1e-12)
    network = found.engine.network
    for link, members in enumerate(found.engine.compiled.links.members):
        if network.carried[link] > 0.0:
            use = [u for u in found.links if u.count == len(members)]
            assert any(u.bytes_per_link == pytest.approx(network.carried[link], rel=1e-12) for u in use)


# --------------------------------------------------------------------------------------------------------- P2


@given(
    n=st.integers(2, 64),
    size=st.integers(1, 10**10),
    alpha=st.sampled_from([0.0, 1e-6, 5e-5, 0.25]),
    rate=st.sampled_from([1.0, 3.0, 25e9]),
)
@settings(max_examples=120, deadline=None)
def test_p2_ring(n: int, size: int, alpha: float, rate: float) -> None:
    cluster = _flat(n, rate, alpha)
    expected = 2 * (n - 1) * (alpha + size / (n * rate))
    assert _run(cluster, n, "all_reduce", "ring", size).makespan_s == pytest.approx(expected, rel=1e-12)
    for kind in ("reduce_scatter", "all_gather"):
        assert _run(cluster, n, kind, "ring", size).makespan_s == pytest.approx(expected / 2, rel=1e-12)  # type: ignore[arg-type]


def test_p2_an_operation_pays_its_launch_once_and_every_switch_on_the_way() -> None:
    far = wire(2.0, 0.5, launch=7.0)
    fabric = Fabric(kind="leaf-spine", nodes_per_leaf=2, hop_latency_s=0.125)
    found = _run(cluster_of(workers(4, far=far), fabric=fabric), 4, "all_reduce", "ring", 800)
    # The slowest of its edges goes up to the spine and down again: three switches.
    assert found.makespan_s == pytest.approx(7.0 + 6 * (0.5 + 3 * 0.125) + 1.5 * 800 / 2.0, rel=1e-12)
    same = Fabric(kind="leaf-spine", nodes_per_leaf=4, hop_latency_s=0.125)
    found = _run(cluster_of(workers(4, far=far), fabric=same), 4, "all_reduce", "ring", 800)
    assert found.makespan_s == pytest.approx(7.0 + 6 * (0.5 + 0.125) + 1.5 * 800 / 2.0, rel=1e-12)


@given(nodes=st.integers(2, 9), local=st.sampled_from([2, 3, 4, 8]), size=st.integers(1, 10**9))
@settings(max_examples=60, deadline=None)
def test_p2_a_ring_over_nodes_has_a_channel_through_every_port(nodes: int, local: int, size: int) -> None:
    n = nodes * local
    machine = workers(nodes, devices=local, nics=local, near=wire(ENDLESS, 0.25), far=wire(3.0, 2.0))
    expected = 2 * (n - nodes) * 0.25 + 2 * (nodes - 1) * 2.0 + 2 * (n - 1) / n * size / local / 3.0
    assert _run(cluster_of(machine), n, "all_reduce", "ring", size).makespan_s == pytest.approx(expected, rel=1e-12)


# --------------------------------------------------------------------------------------------------------- P3


@given(n=st.integers(2, 64), size=st.integers(1, 10**10), alpha=st.sampled_from([0.0, 1e-5, 0.5]))
@settings(max_examples=120, deadline=None)
def test_p3_halving_doubling(n: int, size: int, alpha: float) -> None:
    rate = 2.0
    power = 1 << (n.bit_length() - 1)
    expected = 2 * (power.bit_length() - 1) * alpha + 2 * (power - 1) / power * size / rate
    if n != power:
        expected += 2 * (alpha + size / rate)
    found = _run(_flat(n, rate, alpha), n, "all_reduce", "halving-doubling", size)
    assert found.makespan_s == pytest.approx(expected, rel=1e-12)


@given(n=st.integers(3, 64), size=st.integers(1, 10**10), alpha=st.sampled_from([0.0, 1e-5, 0.5]))
@settings(max_examples=120, deadline=None)
def test_p3_double_tree(n: int, size: int, alpha: float) -> None:
    """Bandwidth 2M/B for any number of ranks, not the ring's 2(n-1)/n."""
    rate = 2.0
    found = _run(_flat(n, rate, alpha), n, "all_reduce", "tree", size)
    busiest = max(_bytes_on(found, "nic out") + _bytes_on(found, "nic in"))
    assert busiest <= 2.0 * size * (1.0 + 1e-12)
    assert found.makespan_s == pytest.approx(2 * _lg(n) * alpha + busiest / rate, rel=1e-12)
    if n % 2 == 0 and n > 2:
        assert busiest == pytest.approx(2.0 * size, rel=1e-12)


@given(n=st.integers(2, 64), size=st.integers(1, 10**10), alpha=st.sampled_from([0.0, 1e-5, 0.5]))
@settings(max_examples=80, deadline=None)
def test_p3_one_tree(n: int, size: int, alpha: float) -> None:
    """3M/B: an inner node receives from two children, and from its parent what the root has summed already."""
    rate = 2.0
    found = _run(_flat(n, rate, alpha), n, "all_reduce", "binary-tree", size)
    assert found.makespan_s == pytest.approx(2 * _lg(n) * alpha + min(3, n - 1) * size / rate, rel=1e-12)


@pytest.mark.parametrize("n", range(2, 65))
def test_p3_a_rank_sends_and_receives_at_most_the_buffer_in_each_pass_of_both_trees(n: int) -> None:
    parents = tree_parents(n)
    children = [rank for rank in range(n) if parents[rank] >= 0]
    assert len(children) == n - 1
    first = [(child, int(parents[child])) for child in children]
    move = (lambda r: n - 1 - r) if n % 2 == 0 else (lambda r: (r + 1) % n)
    second = [(move(child), move(parent)) for child, parent in first]
    up, down = np.zeros(n), np.zeros(n)
    for child, parent in (*first, *second):
        # The reduction goes up; the broadcast is its mirror image.
        up[child] += 0.5
        down[parent] += 0.5
    assert up.max() <= 1.0
    assert down.max() <= 1.0
    depth = [0] * n
    for rank in range(n):
        at = rank
        while parents[at] >= 0:
            at, depth[rank] = int(parents[at]), depth[rank] + 1
    assert max(depth) == _lg(n)
    if n % 2 == 0:
        inner = [{parent for _, parent in tree} - {tree_root(tree)} for tree in (first, second)]
        assert not inner[0] & inner[1]
    groups = np.arange(n)[None, :]
    (phase,) = phases(Wiring(_flat(n)), groups, "all_reduce", "tree")
    wiring = Wiring(_flat(n))
    carried = np.bincount(phase.traffic.links, weights=phase.traffic.loads, minlength=wiring.links)
    out = carried[wiring.offset[Port.NIC_OUT] :][:n]
    into = carried[wiring.offset[Port.NIC_IN] :][:n]
    # Of both passes: what goes up in one goes down in the other.
    assert out == pytest.approx(up + down)
    assert into == pytest.approx(up + down)


def tree_root(tree: list[tuple[int, int]]) -> int:
    """The rank that is nobody's child."""
    return ({parent for _, parent in tree} - {child for child, _ in tree}).pop()


def test_p3_exchanges_between_leaves_cross_three_switches_whichever_pair_does() -> None:
    """Of the pairs of nodes 0 to 7 below leaves of three, only the second crosses the spine in the first exchange."""
    fabric = Fabric(kind="leaf-spine", nodes_per_leaf=3, hop_latency_s=1.0)
    found = _run(cluster_of(workers(8, far=wire(ENDLESS)), fabric=fabric), 8, "all_reduce", "halving-doubling", 8)
    assert found.makespan_s == pytest.approx(3 * 2 * 3.0)


# --------------------------------------------------------------------------------------------------------- P4


@given(
    nodes=st.integers(2, 9),
    local=st.sampled_from([2, 3, 4, 8]),
    size=st.integers(1, 10**9),
    near_alpha=st.sampled_from([0.0, 0.5]),
    far_alpha=st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=80, deadline=None)
def test_p4_hierarchical_is_the_sum_of_its_parts(
    nodes: int, local: int, size: int, near_alpha: float, far_alpha: float
) -> None:
    near, far = 8.0, 3.0
    machine = workers(nodes, devices=local, nics=local, near=wire(near, near_alpha), far=wire(far, far_alpha))
    inside = (local - 1) * (near_alpha + size / (local * near))
    across = 2 * (nodes - 1) * (far_alpha + size / (local * nodes * far))
    found = _run(cluster_of(machine), nodes * local, "all_reduce", "hierarchical", size)
    assert found.makespan_s == pytest.approx(2 * inside + across, rel=1e-12)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_p4_a_single_rank_has_nothing_to_send(algorithm: Algorithm) -> None:
    found = _run(_flat(1, 1.0, 5.0), 1, "all_reduce", algorithm, 1000)
    assert found.makespan_s == 0.0
    assert not found.links


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("local", [2, 3, 8])
def test_p4_one_node_sends_nothing_over_its_nics(algorithm: Algorithm, local: int) -> None:
    machine = workers(1, devices=local, nics=local, near=wire(2.0), far=wire(1.0))
    found = _run(cluster_of(machine), local, "all_reduce", algorithm, 1000)
    assert {use.kind for use in found.links} == {"device out", "device in"}
    assert found.makespan_s > 0.0
    lower = 2 * (local - 1) / local * 1000 / 2.0
    assert found.makespan_s >= lower * (1.0 - 1e-12)


@given(n=st.integers(2, 40), algorithm=st.sampled_from(ALGORITHMS), size=st.integers(1, 10**9))
@settings(max_examples=80, deadline=None)
def test_p3_no_allreduce_beats_its_lower_bounds(n: int, algorithm: Algorithm, size: int) -> None:
    alpha = 0.5
    found = _run(_flat(n, 2.0, alpha), n, "all_reduce", algorithm, size)
    # A double tree over two ranks sends half of either tree each way: the bound itself.
    assert found.makespan_s >= (2 * (n - 1) / n * size / 2.0) * (1.0 - 1e-12)
    assert found.makespan_s >= math.ceil(math.log2(n)) * alpha
