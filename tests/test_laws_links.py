"""Links (docs/laws.md): which of them a flow crosses, and how much each carries, against routes written out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import networkx
import numpy as np
import pytest
from clusters import cluster_of, collective_program, framework_of, servers, wire, workers
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.cluster.background import Background
from clustersim.cluster.capacity import less_background
from clustersim.cluster.cluster import Cluster, SlowNic
from clustersim.cluster.fabric import Fabric
from clustersim.cluster.graph import graph
from clustersim.cluster.scramble import scramble
from clustersim.cluster.wiring import Port, Wiring
from clustersim.layout.layout import Mesh
from clustersim.simulate.simulate import simulate

FabricKind = Literal["one-switch", "leaf-spine", "rail-optimized"]


@st.composite
def wirings(draw: st.DrawFn) -> Wiring:
    """Clusters of every shape, of up to 24 devices."""
    devices = draw(st.sampled_from([1, 2, 4, 6]))
    nics = draw(st.sampled_from([n for n in (1, 2, 4, 6, 8) if max(n, devices) % min(n, devices) == 0]))
    inside: Any = draw(st.sampled_from(["switch", "pcie"]))
    machine = workers(
        draw(st.integers(1, 24 // devices)), devices=devices, nics=nics, far=wire(2.0), near=wire(5.0),
        pcie=draw(st.sampled_from([None, wire(3.0)])), per_switch=draw(st.sampled_from([1, 2, 3])), inside=inside,
    )  # fmt: skip
    kind: FabricKind = draw(st.sampled_from(["one-switch", "leaf-spine", "rail-optimized"]))
    fabric = Fabric(kind=kind, nodes_per_leaf=draw(st.integers(1, 3)), hop_latency_s=0.0)
    if kind != "one-switch" and draw(st.booleans()):
        fabric = replace(fabric, routing="ecmp", spines=draw(st.integers(2, 5)), ecmp_seed=draw(st.integers(0, 9)))
    return Wiring(cluster_of(machine, fabric=fabric))


@given(wirings(), st.data())
@settings(max_examples=200, deadline=None)
def test_one_route_is_a_row_of_many(wiring: Wiring, data: st.DataObject) -> None:
    """route() and between() name the same links, each of a flow's links once."""
    rank = st.integers(0, wiring.devices - 1)
    pairs = data.draw(st.lists(st.tuples(rank, rank).filter(lambda pair: pair[0] != pair[1]), max_size=20))
    total = np.zeros(wiring.links)
    for source, target in pairs:
        links = wiring.route(source, target)
        assert len(set(links)) == len(links)
        np.add.at(total, list(links), 1.0)
    sources = np.array([source for source, _ in pairs], np.int64)
    targets = np.array([target for _, target in pairs], np.int64)
    found = wiring.between(sources, targets)
    assert np.bincount(found.links, weights=found.loads, minlength=wiring.links) == pytest.approx(total)


def _switches(wiring: Wiring) -> int:
    machine = wiring.cluster.workers[0]
    each = machine.node.devices_per_pcie_switch
    return -(-machine.node.devices // each) if machine.pcie is not None and each > 1 else 0


@given(wirings(), st.data())
@settings(max_examples=200, deadline=None)
def test_pcie_switches_carry_what_leaves_them_for_the_host(wiring: Wiring, data: st.DataObject) -> None:
    """Byte by byte: a flow crosses the uplink of its device's switch and that of its card's, where these are two;
    inside a node only where devices have nothing but PCIe between them."""
    if wiring.devices < 2:
        return
    source, target = data.draw(st.permutations(range(wiring.devices)))[:2]
    machine = wiring.cluster.workers[0]
    g, ports, count = wiring.devices_per_node, wiring.ports_per_node, _switches(wiring)
    each = machine.node.devices_per_pcie_switch
    expected: dict[tuple[Port, int], int] = {}

    def cross(out_of: int, into: int) -> None:
        if count and out_of != into:
            for key in ((Port.SWITCH_UP, out_of), (Port.SWITCH_DOWN, into)):
                expected[key] = expected.get(key, 0) + 1

    (here, a), (there, b) = divmod(source, g), divmod(target, g)
    pcie_inside = machine.node.interconnect is not None and machine.node.interconnect.kind == "pcie"
    if here != there:
        card_out, card_in = a * ports // g * g // ports, b * ports // g * g // ports
        cross(here * count + a // each, here * count + card_out // each)
        cross(there * count + card_in // each, there * count + b // each)
    elif pcie_inside:
        cross(here * count + a // each, here * count + b // each)
    found: dict[tuple[Port, int], int] = {}
    for link in wiring.route(source, target):
        kind = wiring.kind_of(link)
        if kind in (Port.SWITCH_UP, Port.SWITCH_DOWN):
            key = (kind, link - wiring.offset[kind])
            found[key] = found.get(key, 0) + 1
            assert wiring.capacity[link] == 3.0
    assert found == expected


def test_devices_far_from_their_card_share_the_uplinks_to_it() -> None:
    """Four devices, two a switch, one card below the first: both devices of the second switch go through its uplink,
    and through that of the card's, at half of its rate each."""
    machine = workers(2, devices=4, nics=1, far=wire(100.0), near=wire(1e9), pcie=wire(1.0), per_switch=2)
    program = collective_program(Mesh(dp=2, tp=4, pp=1), "all_reduce", "ring", 8)
    found = simulate(program, cluster_of(machine), framework_of())
    use = {link.kind: link for link in found.links}
    # Rings of two ranks: each sends and receives 8 bytes; two lanes cross the switches.
    assert use["switch up"].bytes_per_link == use["switch down"].bytes_per_link == 16.0
    assert found.makespan_s == pytest.approx(16.0)
    with_own_cards = replace(machine, node=replace(machine.node, nic=replace(machine.node.nic, count=2)))
    assert simulate(program, cluster_of(with_own_cards), framework_of()).makespan_s == pytest.approx(8.0)


# ---------------------------------------------------------------------------------------------------- rates of links


@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from([0.25, 0.5])), max_size=4), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=60, deadline=None)
def test_a_port_is_the_sum_of_its_cards(faults: list[tuple[int, float]], devices: int) -> None:
    """Eight cards of rate 2: a port of k of them keeps what these keep."""
    speeds = dict.fromkeys(range(8), 1.0)
    for nic, speed in faults:
        speeds[nic] *= speed
    broken = tuple(SlowNic(node=1, nic=nic, speed=speed) for nic, speed in faults)
    wiring = Wiring(cluster_of(workers(2, devices=devices, nics=8, far=wire(2.0)), faults=broken))
    each = 8 // devices
    for kind in (Port.NIC_OUT, Port.NIC_IN):
        rates = wiring.capacity[wiring.offset[kind] :][: 2 * devices]
        assert rates[:devices] == pytest.approx(2.0 * each)
        for port in range(devices):
            assert rates[devices + port] == pytest.approx(2.0 * sum(speeds[port * each + k] for k in range(each)))


def test_a_card_that_several_devices_share_slows_them_all() -> None:
    """In a cluster of nodes with four cards and nodes with two, one of the two serves two ports."""
    wiring = Wiring(
        cluster_of(
            workers(1, devices=4, nics=4, far=wire(2.0)),
            workers(1, devices=4, nics=2, far=wire(4.0)),
            faults=(SlowNic(node=1, nic=1, speed=0.5),),
        )
    )
    assert wiring.capacity[wiring.offset[Port.NIC_OUT] :][:8].tolist() == [2.0] * 4 + [2.0, 2.0, 1.0, 1.0]


def _ring_s(cluster: Cluster) -> float:
    program = collective_program(Mesh(dp=cluster.devices, tp=1, pp=1), "all_reduce", "ring", 1200)
    folded = simulate(program, cluster, framework_of()).makespan_s
    assert folded == pytest.approx(simulate(program, cluster, framework_of(), fold=False).makespan_s, rel=1e-9)
    return folded


def test_other_jobs_leave_the_rest() -> None:
    fabric = Fabric(kind="leaf-spine", nodes_per_leaf=2, hop_latency_s=0.0)
    plain = cluster_of(workers(4), fabric=fabric)
    alone = _ring_s(plain)
    assert alone == pytest.approx(2 * 3 / 4 * 1200)

    def slower(*others: Background) -> float:
        return _ring_s(replace(plain, background=others)) / alone

    assert slower(Background(link="nic", share=0.5)) == pytest.approx(2.0)
    assert slower(Background(link="nic", share=0.25), Background(link="nic", share=0.25, at=(3,))) == pytest.approx(2.0)
    # A ring sends one flow up from each leaf, whose uplinks carry two.
    assert slower(Background(link="leaf-uplink", share=0.5)) == pytest.approx(1.0)
    assert slower(Background(link="leaf-uplink", share=0.75, at=(1,))) == pytest.approx(2.0)


def test_closed_forms_see_what_is_left_of_all_cards() -> None:
    cluster = replace(
        cluster_of(workers(2, far=wire(8.0)), hosts=servers(1, far=wire(4.0))),
        background=(Background(link="nic", share=0.25), Background(link="nic", share=0.5, at=(1,))),
    )
    left = less_background(cluster)
    assert [machine.nic_rate_bytes_per_s for machine in (*left.workers, *left.servers)] == [6.0, 3.0]


# -------------------------------------------------------------------------------------------------------------- ECMP


@given(st.integers(2, 8), st.integers(0, 99), st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_ecmp_slows_what_it_puts_on_one_uplink(spines: int, seed: int, pairs: int) -> None:
    """Flows from one leaf to another, each on the uplink that the hash gives it: an uplink of k flows, as fast as one
    card, takes k times as long."""
    fabric = Fabric(
        kind="leaf-spine", nodes_per_leaf=pairs, oversubscription=pairs / spines if spines < pairs else 1.0,
        hop_latency_s=0.0, routing="ecmp", spines=spines, ecmp_seed=seed,
    )  # fmt: skip
    cluster = cluster_of(workers(2 * pairs), fabric=fabric)
    wiring = Wiring(cluster)
    uplink = wiring.capacity[wiring.offset[Port.LEAF_UP]]
    ways = [scramble(a * 2 * pairs + pairs + a + (seed << 32)) % spines for a in range(pairs)]
    most = max(ways.count(way) for way in ways)
    # Data-parallel groups of two ranks, one below each leaf: 4 bytes each way in every pair.
    program = collective_program(Mesh(dp=2, tp=pairs, pp=1), "all_reduce", "ring", 4)
    back = [scramble((pairs + a) * 2 * pairs + a + (seed << 32)) % spines for a in range(pairs)]
    most = max(most, *(back.count(way) for way in back))
    expected = max(4.0, 4.0 * most / uplink)
    assert simulate(program, cluster, framework_of()).makespan_s == pytest.approx(expected)


def test_a_number_and_an_array_are_scrambled_alike() -> None:
    values = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert scramble(values).tolist() == [scramble(int(value)) for value in values]
    # The first output of SplitMix64 seeded with 0.
    assert scramble(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("kind", ["leaf-spine", "rail-optimized"])
def test_the_graph_has_every_spine_and_what_other_jobs_leave(kind: FabricKind) -> None:
    fabric = Fabric(kind=kind, nodes_per_leaf=2, hop_latency_s=0.0, routing="ecmp", spines=3)
    cluster = replace(
        cluster_of(workers(4, devices=2, nics=2, far=wire(6.0)), fabric=fabric),
        background=(Background(link="leaf-uplink", share=0.5, at=(0,)), Background(link="nic", share=0.25, at=(1,))),
    )
    wires, wiring = graph(cluster), Wiring(cluster)
    for leaf in range(wiring.leaves):
        for spine in range(3):
            rate = wires.edges[f"leaf{leaf}", f"spine{spine}"]["rate_bytes_per_s"]
            assert rate == pytest.approx(wiring.capacity[wiring.offset[Port.LEAF_UP] + leaf * 3 + spine])
    for node in range(4):
        for nic in range(2):
            (out,) = [rate for _, to, rate in wires.out_edges(f"n{node}.nic{nic}", data="rate_bytes_per_s")
                      if to.startswith("leaf")]  # fmt: skip
            assert out == pytest.approx(wiring.capacity[wiring.offset[Port.NIC_OUT] + node * 2 + nic])
    hops = networkx.shortest_path_length(wires, "leaf0", f"leaf{wiring.leaves - 1}")
    assert hops == 2


def test_layouts_on_ecmp_are_simulated_rank_by_rank() -> None:
    """No two flows can be said to be alike whose ways a hash decides."""
    fabric = Fabric(kind="leaf-spine", nodes_per_leaf=2, hop_latency_s=0.0, routing="ecmp", spines=2)
    cluster = cluster_of(workers(4), fabric=fabric)
    program = collective_program(Mesh(dp=4, tp=1, pp=1), "all_reduce", "ring", 4)
    assert simulate(program, cluster, framework_of()).classes == 4
