"""Laws P1 (bytes of push and pull), P5, P6 and P7 of docs/laws.md: parameter servers on links without losses."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from clusters import (
    cluster_of,
    collective_program,
    framework_of,
    host_of,
    server_program,
    servers,
    shares_of,
    wire,
    workers,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clustersim.cluster.cluster import Cluster
from clustersim.cluster.fabric import Fabric
from clustersim.cluster.push_pull import server_traffic
from clustersim.cluster.wiring import Port, Wiring
from clustersim.layout.layout import Mesh
from clustersim.program.program import ServerShare
from clustersim.simulate.simulate import Simulated, simulate

FabricKind = Literal["one-switch", "leaf-spine", "rail-optimized"]


def _loads_by_route(
    wiring: Wiring, fabric: Fabric, ranks: list[int], shares: tuple[ServerShare, ...], *, push: bool
) -> dict[tuple[Port, int], float]:
    """Bytes on every link when each of `ranks` exchanges one byte with all servers: one route after the other, from
    the description of the fabric and not from the code under test."""
    devices, ports = wiring.devices_per_node, wiring.ports_per_node
    each = wiring.cluster.workers[0].node.devices_per_pcie_switch
    per_node = -(-devices // each)
    total = sum(share.parts for share in shares)
    loads: dict[tuple[Port, int], float] = {}

    def leaf(node: int, port: int) -> int:
        group = node // fabric.nodes_per_leaf
        return group * ports + port if fabric.kind == "rail-optimized" else group

    def add(port: Port, index: int, load: float) -> None:
        flipped = {
            Port.PCIE_OUT: Port.PCIE_IN, Port.SWITCH_UP: Port.SWITCH_DOWN, Port.SWITCH_DOWN: Port.SWITCH_UP,
            Port.NIC_OUT: Port.NIC_IN, Port.NIC_IN: Port.NIC_OUT,
            Port.LEAF_UP: Port.LEAF_DOWN, Port.LEAF_DOWN: Port.LEAF_UP, Port.SERVER_IN: Port.SERVER_OUT,
        }  # fmt: skip
        key = (port if push else flipped[port], index)
        loads[key] = loads.get(key, 0.0) + load

    def switch(node: int, device: int) -> int:
        return node * per_node + device // each

    for rank in ranks:
        node, port = rank // devices, rank % devices * ports // devices
        mine, of_nic = switch(node, rank % devices), switch(node, port * devices // ports)
        for share in shares:
            load = share.parts / total
            add(Port.PCIE_OUT, rank, load)
            if share.host == "worker":
                home = share.node // devices
                if home == node:
                    if each > 1:
                        add(Port.SWITCH_UP, mine, load)
                    continue
                if each > 1:
                    add(Port.SWITCH_UP, switch(home, port * devices // ports), load)
                add(Port.NIC_IN, home * ports + port, load)
                there = leaf(home, port)
            else:
                add(Port.SERVER_IN, share.node, load)
                there = leaf(wiring.nodes + share.node, share.node % ports)
            add(Port.NIC_OUT, node * ports + port, load)
            if each > 1 and mine != of_nic:
                add(Port.SWITCH_UP, mine, load)
                add(Port.SWITCH_DOWN, of_nic, load)
            if fabric.kind != "one-switch" and leaf(node, port) != there:
                add(Port.LEAF_UP, leaf(node, port), load)
                add(Port.LEAF_DOWN, there, load)
    return loads


@given(
    nodes=st.integers(1, 6),
    devices=st.sampled_from([1, 2, 4]),
    nics=st.sampled_from([1, 2, 4]),
    hosts=st.integers(0, 4),
    per_leaf=st.integers(1, 4),
    kind=st.sampled_from(["one-switch", "leaf-spine", "rail-optimized"]),
    per_switch=st.sampled_from([1, 2, 3]),
    push=st.booleans(),
    data=st.data(),
)
@settings(max_examples=250, deadline=None)
def test_p1_push_and_pull_load_every_link_as_their_routes_do(
    nodes: int,
    devices: int,
    nics: int,
    hosts: int,
    per_leaf: int,
    kind: FabricKind,
    per_switch: int,
    push: bool,
    data: st.DataObject,
) -> None:
    if max(devices, nics) % min(devices, nics):
        return
    fabric = Fabric(kind=kind, nodes_per_leaf=per_leaf, hop_latency_s=0.0)
    machine = workers(nodes, devices=devices, nics=nics, pcie=wire(9.0), per_switch=per_switch)
    wiring = Wiring(cluster_of(machine, hosts=servers(hosts) if hosts else None, fabric=fabric))
    every = list(range(nodes * devices))
    ranks = sorted(data.draw(st.sets(st.sampled_from(every), min_size=1)))
    homes = data.draw(st.lists(st.sampled_from(every), max_size=4, unique=True))
    if not homes and not hosts:
        return
    shares = shares_of(
        dedicated=[data.draw(st.integers(1, 5)) for _ in range(hosts)],
        colocated=[(home, data.draw(st.integers(1, 5))) for home in homes],
    )
    total = sum(share.parts for share in shares)
    found = server_traffic(
        wiring,
        np.array(ranks),
        np.arange(hosts),
        np.array([share.parts / total for share in shares[:hosts]]),
        np.array([share.node for share in shares[hosts:]], np.int64),
        np.array([share.parts / total for share in shares[hosts:]]),
        push=push,
    )
    carried = np.bincount(found.links, weights=found.loads, minlength=wiring.links)
    expected = np.zeros(wiring.links)
    for (port, index), load in _loads_by_route(wiring, fabric, ranks, shares, push=push).items():
        expected[wiring.offset[port] + index] += load
    assert carried == pytest.approx(expected, abs=1e-12)


def _busiest(found: Simulated, kind: str) -> float:
    return max((use.bytes_per_link for use in found.links if use.kind == kind), default=0.0)


def _run(cluster: Cluster, shares: tuple[ServerShare, ...], **how: object) -> Simulated:
    mesh = Mesh(dp=cluster.worker_nodes, tp=1, pp=1)
    return simulate(server_program(mesh, shares, **how), cluster, framework_of())  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- P5


@given(
    n=st.integers(1, 12),
    count=st.integers(1, 6),
    worker_rate=st.sampled_from([1.0, 2.0, 5.0]),
    server_rate=st.sampled_from([1.0, 3.0, 10.0]),
)
@settings(max_examples=60, deadline=None)
def test_p5_dedicated_servers(n: int, count: int, worker_rate: float, server_rate: float) -> None:
    """Pipelined, pushes and pulls share no direction: max(M / B_w, W M / (S B_s)), and one partition to fill."""
    cluster = cluster_of(workers(n, far=wire(worker_rate)), hosts=servers(count, far=wire(server_rate)))
    buckets, size, parts = 24, 1000, 4
    whole = buckets * size * max(1.0 / worker_rate, n / (count * server_rate))
    found = _run(cluster, shares_of(dedicated=[1] * count), buckets=buckets, size=size, partitions=parts)
    fill = whole / (buckets * parts)
    assert whole * (1.0 - 1e-12) <= found.makespan_s <= (whole + fill) * (1.0 + 1e-9)
    assert _busiest(found, "server in") == pytest.approx(n * buckets * size / count, rel=1e-12)
    assert _busiest(found, "server out") == pytest.approx(n * buckets * size / count, rel=1e-12)
    assert _busiest(found, "nic out") == pytest.approx(buckets * size, rel=1e-12)
    apart = _run(cluster, shares_of(dedicated=[1] * count), buckets=buckets, size=size, pull="after-all")
    assert apart.makespan_s == pytest.approx(2.0 * whole, rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16, 31])
def test_p5_a_server_beside_every_worker_takes_as_long_as_the_ring(n: int) -> None:
    cluster = cluster_of(workers(n, far=wire(2.0)))
    buckets, size, parts = 24, 1000, 4
    shares = shares_of(colocated=[(rank, 1) for rank in range(n)])
    found = _run(cluster, shares, buckets=buckets, size=size, partitions=parts)
    mesh = Mesh(dp=n, tp=1, pp=1)
    ring = simulate(collective_program(mesh, "all_reduce", "ring", buckets * size), cluster, framework_of())
    assert ring.makespan_s == pytest.approx(2 * (n - 1) / n * buckets * size / 2.0, rel=1e-12)
    assert ring.makespan_s * (1.0 - 1e-12) <= found.makespan_s <= ring.makespan_s * (1.0 + 1.0 / (buckets * parts))
    for kind in ("nic out", "nic in"):
        assert _busiest(found, kind) == pytest.approx(_busiest(ring, kind), rel=1e-12)


def test_p5_a_server_adds_and_returns_one_partition_while_the_next_arrives() -> None:
    """A host that adds slower than its NIC receives decides: W M / (S R), after the first partition's arrival."""
    cluster = cluster_of(workers(4, far=wire(10.0)), hosts=servers(2, far=wire(10.0), host=host_of(reduce_rate=4.0)))
    buckets, size, parts = 24, 1000, 4
    found = _run(cluster, shares_of(dedicated=[1, 1]), buckets=buckets, size=size, partitions=parts)
    whole = buckets * size * 4 / (2 * 4.0)
    arrival = 2 * size / parts * 4 / (2 * 10.0)
    assert found.makespan_s == pytest.approx(whole + arrival, rel=1e-9)


# --------------------------------------------------------------------------------------------------------- P6


@given(
    n=st.integers(1, 10),
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    server_rate=st.sampled_from([0.5, 2.0, 8.0]),
)
@example(n=4, parts=[1, 10], server_rate=0.5)
@settings(max_examples=60, deadline=None)
def test_p6_the_server_with_the_hot_keys_decides(n: int, parts: list[int], server_rate: float) -> None:
    cluster = cluster_of(workers(n, far=wire(2.0)), hosts=servers(len(parts), far=wire(server_rate)))
    buckets, size, partitions = 24, 1000, 4
    found = _run(cluster, shares_of(dedicated=parts), buckets=buckets, size=size, partitions=partitions)
    hottest = max(parts) / sum(parts)
    whole = buckets * size * max(1.0 / 2.0, n * hottest / server_rate)
    assert whole * (1.0 - 1e-12) <= found.makespan_s <= whole * (1.0 + 1.0 / (buckets * partitions) + 1e-9)


# --------------------------------------------------------------------------------------------------------- P7


def _optimum(n: int, k: int, ratio: float = 1.0) -> tuple[float, float, float]:
    """(M_C, M_G, seconds) for M = B_g = 1 and server NICs of `ratio`: Jiang et al., OSDI'20, and unequal NICs."""
    own = max(0.0, (1.0 - k * ratio / n) / (n + k * ratio * (n - 2) / n))
    if own == 0.0:
        return 1.0 / k, 0.0, max(1.0, n / (k * ratio))
    dedicated = (1.0 - n * own) / k if k else 0.0
    return dedicated, own, 1.0 + (n - 2) * own


@pytest.mark.parametrize(
    ("n", "k", "golden"),
    [(8, 0, 1.75), (8, 1, 1.6), (8, 2, 1.473684), (8, 4, 1.272727), (8, 8, 1.0), (4, 1, 1.333333), (4, 2, 1.2)],
)
def test_p7_mixed_servers_reach_the_optimum_under_coflow_sharing(n: int, k: int, golden: float) -> None:
    bottom = n * n + k * n - 2 * k
    assert 2.0 * n * (n - 1) / bottom == pytest.approx(golden, abs=1e-6)
    assert _optimum(n, k)[2] == pytest.approx(golden, abs=1e-6)
    # As whole parts, exactly: M_C : M_G = 2 (n - 1) : (n - k).
    shares = shares_of(dedicated=[2 * (n - 1)] * k, colocated=[(rank, n - k) for rank in range(n) if k < n])
    cluster = cluster_of(workers(n), hosts=servers(k) if k else None)
    buckets, size, parts = 48, 1000, 4
    found = _run(cluster, shares, buckets=buckets, size=size, partitions=parts)
    moved = buckets * size
    fill = 2.0 * size / parts
    assert golden * moved * (1.0 - 1e-6) <= found.makespan_s <= golden * moved * (1.0 + 1e-6) + fill
    assert _busiest(found, "nic out") == pytest.approx(golden * moved, rel=1e-6)
    assert _busiest(found, "nic in") == pytest.approx(golden * moved, rel=1e-6)
    if k:
        assert _busiest(found, "server in") == pytest.approx(golden * moved, rel=1e-6)


@given(n=st.integers(2, 12), k=st.integers(1, 12), ratio=st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]))
@settings(max_examples=60, deadline=None)
def test_p7_no_split_between_the_two_kinds_of_servers_beats_the_formula(n: int, k: int, ratio: float) -> None:
    """The time of any split is the busiest NIC's: M + (n - 2) M_G on a worker node, n M_C on a host. The formula's
    is the least of all, which a fine grid over M_G confirms."""
    _, own, seconds = _optimum(n, k, ratio)

    def time(m_g: float) -> float:
        return max((1.0 - m_g) + (n - 1) * m_g, n * (1.0 - n * m_g) / k / ratio)

    assert time(own) == pytest.approx(seconds, rel=1e-12)
    assert min(time(step / 1000.0 / n) for step in range(1001)) >= seconds * (1.0 - 1e-12)


@pytest.mark.parametrize(("n", "k", "ratio"), [(8, 2, 0.5), (8, 2, 2.0), (6, 3, 1.5)])
def test_p7_unequal_nics(n: int, k: int, ratio: float) -> None:
    dedicated, own, seconds = _optimum(n, k, ratio)
    scale = 10**6
    shares = shares_of(
        dedicated=[round(dedicated * scale)] * k, colocated=[(rank, round(own * scale)) for rank in range(n)]
    )
    cluster = cluster_of(workers(n), hosts=servers(k, far=wire(ratio)))
    buckets, size, parts = 48, 1000, 4
    found = _run(cluster, shares, buckets=buckets, size=size, partitions=parts)
    moved = buckets * size
    assert seconds * moved * (1.0 - 1e-5) <= found.makespan_s <= seconds * moved * (1.0 + 1e-5) + 2.0 * size / parts
