"""Laws P1 to P4 for every collective and algorithm, priced alone: closed forms, references step by step, and that what
is left out of a large cluster is never missed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pytest
import simpy
from clusters import ENDLESS, cluster_of, collective_program, framework_of, wire, workers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clustersim.cluster.cluster import Cluster, Fault, Machine, SlowNic
from clustersim.cluster.fabric import Fabric
from clustersim.cluster.wiring import Port, Wiring
from clustersim.errors import InputError
from clustersim.estimate import collectives as forms
from clustersim.layout.layout import Mesh
from clustersim.program.program import CollectiveAlgorithm, CollectiveKind
from clustersim.simulate.collectives import moves
from clustersim.simulate.collectives.phases import ALGORITHMS_OF, phases
from clustersim.simulate.collectives.standalone import StandaloneCollective, obstacle, price_collective
from clustersim.simulate.network import Network
from clustersim.simulate.simulate import simulate

FabricKind = Literal["one-switch", "leaf-spine", "rail-optimized"]
EVERY: list[tuple[CollectiveKind, CollectiveAlgorithm]] = [
    (kind, algorithm) for kind, algorithms in ALGORITHMS_OF.items() for algorithm in algorithms
]
KINDS: list[FabricKind] = ["one-switch", "leaf-spine", "rail-optimized"]


def adding(machine: Machine) -> Machine:
    """The same nodes, with a switch inside that adds up."""
    inside = machine.node.interconnect
    if inside is None:
        return machine
    return replace(machine, node=replace(machine.node, interconnect=replace(inside, reduces=True)))


def able(
    nodes: int,
    devices: int,
    nics: int,
    kind: FabricKind = "one-switch",
    *,
    leaf: int = 4,
    hop: float = 0.0,
    oversubscription: float = 1.0,
    near: tuple[float, float] = (40.0, 0.5),
    far: tuple[float, float] = (3.0, 2.0),
    faults: tuple[Fault, ...] = (),
) -> Cluster:
    """A cluster whose switches add up; links as (rate, alpha)."""
    machine = adding(
        workers(nodes, devices=devices, nics=nics, near=wire(*near, launch=1.0), far=wire(*far, launch=7.0))
    )
    fabric = Fabric(
        kind=kind, nodes_per_leaf=leaf, hop_latency_s=hop, oversubscription=oversubscription, in_network_reduction=True
    )
    return cluster_of(machine, fabric=fabric, faults=faults)


def bytes_on(cluster: Cluster, kind: CollectiveKind, algorithm: CollectiveAlgorithm, port: Port) -> np.ndarray:  # type: ignore[type-arg]
    """What every link of a kind carries in all phases, per byte of the buffer."""
    wiring = Wiring(cluster)
    total = np.zeros(wiring.links)
    for phase in phases(wiring, np.arange(cluster.devices)[None, :], kind, algorithm):
        total += np.bincount(phase.traffic.links, weights=phase.traffic.loads, minlength=wiring.links)
    return total[wiring.kinds == port]


# --------------------------------------------------------------------------------------------------------- P1


@given(
    which=st.sampled_from(EVERY),
    nodes=st.integers(1, 9),
    local=st.sampled_from([1, 2, 3, 4, 8]),
    kind=st.sampled_from(KINDS),
    leaf=st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_p1_every_collective_sends_what_it_receives(
    which: tuple[CollectiveKind, CollectiveAlgorithm], nodes: int, local: int, kind: FabricKind, leaf: int
) -> None:
    cluster = able(nodes, local, local, kind, leaf=leaf)
    n = nodes * local
    assume(n > 1 and obstacle(cluster, *which, np.arange(n)) is None)
    out, into = (bytes_on(cluster, *which, port) for port in (Port.NIC_OUT, Port.NIC_IN))
    assert out.sum() == pytest.approx(into.sum(), rel=1e-12)
    up, down = (bytes_on(cluster, *which, port).sum() for port in (Port.LEAF_UP, Port.LEAF_DOWN))
    assert up == pytest.approx(down, rel=1e-12)
    near = [bytes_on(cluster, *which, port).sum() for port in (Port.DEVICE_OUT, Port.DEVICE_IN)]
    if which[1] == "nvls" and which[0] != "all_reduce":
        # What the switch copies is received more often than sent; what it adds up, the other way round.
        more, less = near if which[0] == "reduce_scatter" else near[::-1]
        assert more == pytest.approx(local * less, rel=1e-12)
    else:
        assert near[0] == pytest.approx(near[1], rel=1e-12)
    if which[1] in ("nvls", "sharp"):
        return
    sent = out.sum() + near[0]
    power = 1 << (n.bit_length() - 1)
    everything: dict[CollectiveKind, float] = {
        "all_reduce": 2.0 * (n - 1), "all_gather": n - 1.0, "reduce_scatter": n - 1.0, "all_to_all": n - 1.0,
        "broadcast": n - 1.0, "reduce": n - 1.0, "send_recv": float(n),
    }  # fmt: skip
    expected = everything[which[0]]
    match which[1]:
        case "halving-doubling" if which[0] == "all_reduce":
            expected = 2.0 * (power - 1) + 2.0 * (n - power)
        case "tree" | "binary-tree" if nodes > 1:
            expected = 2.0 * (nodes - 1) + 2.0 * nodes * (local - 1)
        case "scatter-allgather":
            # Every share travels down the tree, a hop for every one in the binary number of its owner.
            expected = n - 1.0 + sum(bin(rank).count("1") for rank in range(n)) / n
        case "per-rail" if nodes > 1:
            # What goes to another rail goes through a member of the sender's node.
            expected = nodes * (local - 1.0) + local * (nodes - 1.0)
        case _:
            pass
    assert sent == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_p1_switches_that_add_carry_a_buffer_once(kind: FabricKind) -> None:
    """NVLS: M out of every device and into it. SHARP: M/g through every NIC; a leaf sends up one sum of all below."""
    nvls, nodes, g = able(1, 8, 8, kind), 8, 4
    for port in (Port.DEVICE_OUT, Port.DEVICE_IN):
        assert bytes_on(nvls, "all_reduce", "nvls", port) == pytest.approx([1.0] * 8)
    sharp = able(nodes, g, g, kind, leaf=4)
    for port in (Port.NIC_OUT, Port.NIC_IN):
        assert bytes_on(sharp, "all_reduce", "sharp", port) == pytest.approx([1.0 / g] * nodes * g)
    up = bytes_on(sharp, "all_reduce", "sharp", Port.LEAF_UP)
    if kind == "leaf-spine":
        assert up == pytest.approx([1.0] * 2)
    elif kind == "rail-optimized":
        assert up == pytest.approx([1.0 / g] * 2 * g)
    alone = able(4, g, g, kind, leaf=4)
    assert bytes_on(alone, "all_reduce", "sharp", Port.LEAF_UP).sum() == 0.0


@given(channels=st.integers(1, 20), local=st.sampled_from([2, 3, 4, 8]), nodes=st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_p1_channels_divide_the_bytes(channels: int, local: int, nodes: int) -> None:
    cluster = able(nodes, local, local)
    wiring, n = Wiring(cluster), nodes * local
    (phase,) = phases(wiring, np.arange(n)[None, :], "all_reduce", "ring", channels)
    total = np.bincount(phase.traffic.links, weights=phase.traffic.loads, minlength=wiring.links)
    sent = 2.0 * (n - 1) / n
    ports = total[wiring.kinds == Port.NIC_OUT].reshape(nodes, local)
    assert ports.sum(axis=1) == pytest.approx([sent] * nodes)
    assert ports.max() == pytest.approx(sent * math.ceil(channels / local) / channels)
    assert (ports > 0.0).sum() == nodes * min(channels, local)
    assert total[wiring.kinds == Port.DEVICE_OUT].sum() == pytest.approx(nodes * (local - 1) * sent)


# ------------------------------------------------------------------------------------------- P2, P3, P4: closed forms


@given(
    which=st.sampled_from(EVERY),
    nodes=st.sampled_from([1, 2, 3, 4, 5, 6, 8, 9, 16]),
    wires=st.sampled_from([(1, 1), (2, 2), (3, 3), (4, 2), (4, 4), (8, 4), (8, 8), (2, 4)]),
    half=st.booleans(),
    kind=st.sampled_from(KINDS),
    channels=st.sampled_from([None, None, 1, 3, 10]),
    size=st.integers(1, 10**9),
)
@settings(max_examples=400, deadline=None)
def test_p2_to_p4_every_collective_takes_its_closed_form(
    which: tuple[CollectiveKind, CollectiveAlgorithm],
    nodes: int,
    wires: tuple[int, int],
    half: bool,
    kind: FabricKind,
    channels: int | None,
    size: int,
) -> None:
    devices, nics = wires
    local = max(1, devices // 2) if half else devices
    assume(nodes * local > 1)
    cluster = able(nodes, devices, nics, kind, hop=0.125)
    ranks = (np.arange(nodes)[:, None] * devices + np.arange(local)).ravel()
    if which[1] not in ("ring", "tree", "binary-tree", "chain"):
        channels = None
    assume(obstacle(cluster, *which, ranks) is None)
    levels = forms.two_levels(cluster, nodes, local, channels)
    assert levels is not None
    expected = forms.closed_form_s(*which, levels, size)
    found = price_collective(cluster, *which, size, ranks=ranks, channels=channels)
    if expected is None:
        assert local == 3
        return
    assert found.seconds == pytest.approx(expected, rel=1e-12)
    if nodes == 1:
        assert not {link.kind for link in found.links} & {"nic out", "nic in", "pcie out", "pcie in"}


Flat = Callable[[int, float, float, float], float]


@pytest.mark.parametrize(
    ("kind", "algorithm", "form"),
    [
        ("all_reduce", "ring", forms.ring_all_reduce_s),
        ("all_gather", "ring", forms.ring_all_gather_s),
        ("reduce_scatter", "ring", forms.ring_all_gather_s),
        ("all_reduce", "halving-doubling", forms.halving_doubling_s),
        ("all_reduce", "tree", forms.tree_all_reduce_s),
        ("all_to_all", "pairwise", forms.pairwise_all_to_all_s),
        ("broadcast", "chain", forms.chain_broadcast_s),
        ("broadcast", "binomial", forms.binomial_broadcast_s),
        ("reduce", "binomial", forms.binomial_broadcast_s),
    ],
)
@given(n=st.integers(2, 40), size=st.integers(1, 10**9))
@settings(max_examples=15, deadline=None)
def test_p2_p3_on_one_level_they_are_those_of_the_papers(
    kind: CollectiveKind, algorithm: CollectiveAlgorithm, form: Flat, n: int, size: int
) -> None:
    rate, alpha = 3.0, 2.0
    found = price_collective(cluster_of(workers(n, far=wire(rate, alpha))), kind, algorithm, size)
    assert found.seconds == pytest.approx(form(n, size, alpha, rate), rel=1e-12)


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32, 64])
def test_p3_powers_of_two_scatter_and_gather_without_waste(n: int) -> None:
    cluster = cluster_of(workers(n, far=wire(3.0, 2.0)))
    found = price_collective(cluster, "broadcast", "scatter-allgather", 999.0)
    assert found.seconds == pytest.approx(forms.scatter_all_gather_broadcast_s(n, 999.0, 2.0, 3.0), rel=1e-12)
    half = price_collective(cluster, "all_gather", "halving-doubling", 999.0)
    assert half.seconds == pytest.approx((n.bit_length() - 1) * 2.0 + (n - 1) / n * 999.0 / 3.0, rel=1e-12)


def test_golden_seconds_written_out() -> None:
    """64 MiB over 4 nodes of 8, 300 GB/s and 500 ns inside, 25 GB/s and 5 us a GPU between, by hand."""
    size = 64 * 2**20
    machine = adding(workers(4, devices=8, nics=8, near=wire(300e9, 5e-7), far=wire(25e9, 5e-6)))
    cluster = cluster_of(machine, fabric=Fabric(hop_latency_s=0.0, in_network_reduction=True))
    each = size / 25e9
    expected = {
        # 2 * 28 near and 2 * 3 far hops; 2 * 31/32 of an eighth of the buffer through every NIC.
        "ring": 56 * 5e-7 + 6 * 5e-6 + 2 * 31 / 32 / 8 * each,
        "hierarchical": 14 * 5e-7 + 2 * 7 / 8 * size / 300e9 + 6 * 5e-6 + 2 * 3 / 4 / 8 * each,
        "halving-doubling": 6 * 5e-7 + 2 * 7 / 8 * size / 300e9 + 4 * 5e-6 + 2 * (1 / 8 - 1 / 32) * each,
        "tree": 14 * 5e-7 + 4 * 5e-6 + 2 / 8 * each,
        "binary-tree": 14 * 5e-7 + 4 * 5e-6 + 3 / 8 * each,
        "nvls": 2 * 5e-7 + 4 * 5e-6 + 2 / 8 * each,
        "sharp": 2 * 5e-7 + 2 * 5e-6 + 1 / 8 * each,
    }
    for algorithm, seconds in expected.items():
        found = price_collective(cluster, "all_reduce", algorithm, size)  # type: ignore[arg-type]
        assert found.seconds == pytest.approx(seconds, rel=1e-12), algorithm


@pytest.mark.parametrize(("kind", "algorithm"), EVERY)
def test_p4_a_single_rank_takes_no_time(kind: CollectiveKind, algorithm: CollectiveAlgorithm) -> None:
    cluster = able(1, 1, 1)
    if obstacle(cluster, kind, algorithm, np.arange(1)) is None:
        found = price_collective(cluster, kind, algorithm, 1000.0)
        assert (found.seconds, found.links, found.events) == (0.0, (), 0)


def test_bus_factors_are_those_of_nccl_tests() -> None:
    assert forms.bus_factor("all_reduce", 8) == 1.75
    assert [forms.bus_factor(kind, 8) for kind in ("all_gather", "reduce_scatter", "all_to_all")] == [0.875] * 3
    assert [forms.bus_factor(kind, 8) for kind in ("broadcast", "reduce", "send_recv")] == [1.0] * 3


# ---------------------------------------------------------------------------------------- what is left out of clusters


@given(
    which=st.sampled_from(EVERY),
    nodes=st.integers(2, 17),
    wires=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 3), (4, 4), (4, 2)]),
    kind=st.sampled_from(KINDS),
    leaf=st.integers(1, 5),
    oversubscription=st.sampled_from([1.0, 4.0, 16.0]),
    slow=st.lists(st.tuples(st.integers(0, 16), st.integers(0, 3), st.sampled_from([0.1, 0.5])), max_size=3),
    left=st.integers(0, 3),
    channels=st.sampled_from([None, None, 1, 3]),
    spines=st.sampled_from([1, 1, 2, 3]),
)
@settings(max_examples=300, deadline=None)
def test_pods_of_every_kind_decide_for_all(
    which: tuple[CollectiveKind, CollectiveAlgorithm],
    nodes: int,
    wires: tuple[int, int],
    kind: FabricKind,
    leaf: int,
    oversubscription: float,
    slow: list[tuple[int, int, float]],
    left: int,
    channels: int | None,
    spines: int,
) -> None:
    """Routing the flows of one pod of every kind takes the same time to the last bit but rounding as routing all, on
    clusters with slow NICs, ECMP, partly filled leaves, and groups that do not fill their nodes."""
    devices, nics = wires
    faults = tuple({
        (node % nodes, nic % nics): SlowNic(node=node % nodes, nic=nic % nics, speed=speed) for node, nic, speed in slow
    }.values())  # fmt: skip
    cluster = able(
        nodes, devices, nics, kind, leaf=leaf, hop=0.125, oversubscription=oversubscription, faults=faults,
        near=(6.0, 0.5),
    )  # fmt: skip
    if spines > 1 and kind != "one-switch":
        cluster = replace(cluster, fabric=replace(cluster.fabric, routing="ecmp", spines=spines))
    ranks = np.arange(left, nodes * devices)
    assume(len(ranks) > 1 and obstacle(cluster, *which, ranks) is None)
    everything = StandaloneCollective(cluster, *which, ranks=ranks, channels=channels).price(1000.0)
    before = moves._FEW_FLOWS
    moves._FEW_FLOWS = 0
    try:
        found = StandaloneCollective(cluster, *which, ranks=ranks, channels=channels).price(1000.0)
    finally:
        moves._FEW_FLOWS = before
    assert found.seconds == pytest.approx(everything.seconds, rel=1e-12)
    assert found.waiting_s == pytest.approx(everything.waiting_s, rel=1e-12)
    for one, other in zip(found.links, everything.links, strict=True):
        assert (one.kind, one.busy_s) == (other.kind, pytest.approx(other.busy_s, rel=1e-12))


@given(
    algorithm=st.sampled_from(ALGORITHMS_OF["all_reduce"]),
    nodes=st.integers(2, 9),
    local=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(KINDS),
    speed=st.sampled_from([1.0, 0.25]),
)
@settings(max_examples=60, deadline=None)
def test_alone_it_takes_what_it_takes_in_a_program(
    algorithm: Literal["ring", "tree"], nodes: int, local: int, kind: FabricKind, speed: float
) -> None:
    faults = (SlowNic(node=1, nic=0, speed=speed),) if speed < 1.0 else ()
    cluster = able(nodes, local, local, kind, hop=0.125, faults=faults)
    assume(obstacle(cluster, "all_reduce", algorithm, np.arange(nodes * local)) is None)
    program = collective_program(Mesh(dp=nodes * local, tp=1, pp=1), "all_reduce", algorithm, 1000)
    alone = price_collective(cluster, "all_reduce", algorithm, 1000)
    assert alone.seconds == pytest.approx(simulate(program, cluster, framework_of()).makespan_s, rel=1e-12)


@pytest.mark.parametrize("algorithm", ["ring", "tree", "hierarchical", "halving-doubling"])
def test_events_do_not_grow_with_the_cluster(algorithm: CollectiveAlgorithm) -> None:
    """A wait and a flow for each phase; halving and doubling has a phase for every doubling of the ranks."""
    for nodes in (2, 16, 128):
        found = price_collective(able(nodes, 8, 8, "rail-optimized"), "all_reduce", algorithm, 1e6)
        phases_of = {"ring": 1, "tree": 1, "hierarchical": 3, "halving-doubling": (nodes * 8).bit_length() - 1}
        assert found.events == 2 * found.phases == 2 * phases_of[algorithm]


def test_a_slow_nic_slows_every_ring_through_it() -> None:
    whole = price_collective(able(4, 2, 2, near=(ENDLESS, 0.0), far=(3.0, 0.0)), "all_reduce", "ring", 1000.0)
    faults = (SlowNic(node=2, nic=1, speed=0.25),)
    hurt = price_collective(
        able(4, 2, 2, near=(ENDLESS, 0.0), far=(3.0, 0.0), faults=faults), "all_reduce", "ring", 1000.0
    )
    assert hurt.seconds - 7.0 == pytest.approx(4 * (whole.seconds - 7.0))
    assert hurt.links[0].capacity_bytes_per_s == 0.75


def test_what_cannot_run_is_refused_with_what_can() -> None:
    plain = cluster_of(workers(2, devices=2, nics=2))
    for kind, algorithm, words in (
        ("all_reduce", "nvls", "interconnect.reduces: true"),
        ("all_reduce", "sharp", "in_network_reduction: true"),
        ("all_reduce", "chain", "write one of ring, tree"),
        ("broadcast", "ring", "write one of chain"),
    ):
        with pytest.raises(InputError, match=words):
            price_collective(plain, kind, algorithm, 1.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="several nodes"):
        price_collective(able(1, 4, 4), "all_reduce", "sharp", 1.0)
    with pytest.raises(InputError, match="power of two of ranks, not 3"):
        price_collective(cluster_of(workers(3)), "all_gather", "halving-doubling", 1.0)
    with pytest.raises(InputError, match="more than 0B"):
        price_collective(plain, "all_reduce", "ring", 0.0)


# --------------------------------------------------------------------------------------------------- step by step


@dataclass
class Message:
    """`size` bytes over `path` once all of `after` (other messages, by number) have arrived; alpha delays them."""

    path: Sequence[int]
    size: float
    alpha: float
    after: list[int] = field(default_factory=list)


def played(wiring: Wiring, messages: list[Message]) -> float:
    """The end of the last message, each a flow of its own on the links of its route."""
    env = simpy.Environment()
    network = Network(env, wiring.capacity.tolist())
    missing = [len(message.after) for message in messages]
    followers: list[list[int]] = [[] for _ in messages]
    for number, message in enumerate(messages):
        for other in message.after:
            followers[other].append(number)

    def begin(number: int) -> None:
        message = messages[number]
        weights = [(link, 1.0) for link in message.path]
        env.timeout(message.alpha).callbacks.append(
            lambda _: network.start(message.size, weights, lambda: done(number))
        )

    def done(number: int) -> None:
        for other in followers[number]:
            missing[other] -= 1
            if missing[other] == 0:
                begin(other)

    for number, left in enumerate(missing):
        if left == 0:
            begin(number)
    env.run()
    return float(env.now)


def routes(wiring: Wiring, source: int, target: int) -> tuple[list[int], bool]:
    """The links between two ranks that have a limit, and whether they are in a node."""
    traffic = wiring.between(np.array([source]), np.array([target]))
    finite = traffic.links[np.isfinite(wiring.capacity[traffic.links])]
    return finite.tolist(), bool(traffic.near.all())


def ring_messages(wiring: Wiring, ranks: int, size: float, alphas: tuple[float, float]) -> list[Message]:
    """2(n-1) steps of a ring over all ranks of one-rank nodes, or of one node."""
    messages: list[Message] = []
    for step in range(2 * (ranks - 1)):
        for rank in range(ranks):
            path, near = routes(wiring, rank, (rank + 1) % ranks)
            # What the rank before sent has come in, and one's own last message has left.
            after = [(step - 1) * ranks + (rank - 1) % ranks, (step - 1) * ranks + rank] if step else []
            messages.append(Message(path, size / ranks, alphas[0] if near else alphas[1], after))
    return messages


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("speed", [1.0, 0.25])
def test_reference_ring_step_by_step(ranks: int, inside: bool, speed: float) -> None:
    near, far = wire(8.0, 0.5), wire(3.0, 2.0)
    machine = workers(1, devices=ranks, near=near) if inside else workers(ranks, far=far)
    faults = () if inside or speed == 1.0 else (SlowNic(node=1, nic=0, speed=speed),)
    cluster = cluster_of(machine, faults=faults)
    expected = played(Wiring(cluster), ring_messages(Wiring(cluster), ranks, 1000.0, (0.5, 2.0)))
    found = price_collective(cluster, "all_reduce", "ring", 1000.0)
    if faults and ranks > 2:
        # The slow card is busy all the time but for alphas, which other messages hide in part.
        assert found.seconds - found.waiting_s <= expected * (1.0 + 1e-12)
        assert expected <= found.seconds * (1.0 + 1e-12)
    else:
        assert found.seconds == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("nodes", "local"), [(2, 2), (2, 4), (3, 2), (4, 2)])
def test_reference_rings_over_nodes_step_by_step(nodes: int, local: int) -> None:
    """One ring per NIC, which visits the members of a node from its own one on."""
    n, size = nodes * local, 1000.0
    alphas = (0.01, 0.05)
    cluster = cluster_of(workers(nodes, devices=local, nics=local, near=wire(40.0, 0.01), far=wire(3.0, 0.05)))
    wiring = Wiring(cluster)
    messages: list[Message] = []
    for channel in range(local):
        # Into the node at its own member, round to the member before it; the next node's entry follows, on the same
        # rail: the last member's bytes leave through the entry's card.
        order = [node * local + (channel + step) % local for node in range(nodes) for step in range(local)]
        first = len(messages)
        for step in range(2 * (n - 1)):
            for place in range(n):
                leaves = place % local == local - 1
                source = order[place - local + 1] if leaves else order[place]
                path, near = routes(wiring, source, order[(place + 1) % n])
                before = first + (step - 1) * n
                after = [before + (place - 1) % n, before + place] if step else []
                messages.append(Message(path, size / n / local, alphas[0] if near else alphas[1], after))
    found = price_collective(cluster, "all_reduce", "ring", size)
    expected = played(wiring, messages)
    # A card idles while the first piece crosses its node, and two far hops more may be on the longest way.
    piece = size / n / local / 40.0
    slack = 2 * (local - 1) * piece + 2 * (alphas[1] - alphas[0])
    assert found.seconds - found.waiting_s <= expected * (1.0 + 1e-12)
    assert expected <= (found.seconds + slack) * (1.0 + 1e-12)


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_reference_halving_doubling_step_by_step(n: int) -> None:
    cluster = cluster_of(workers(n, far=wire(3.0, 2.0)))
    wiring = Wiring(cluster)
    messages: list[Message] = []
    distances = [1 << bit for bit in range(n.bit_length() - 1)]
    for step, distance in enumerate([*distances, *reversed(distances)]):
        for rank in range(n):
            partner = rank ^ distance
            # Both halves of the last exchange must have come in.
            after = [(step - 1) * n + (rank ^ before) for before in _before(distances, step)]
            path, _ = routes(wiring, rank, partner)
            messages.append(Message(path, 1000.0 * 0.5 / distance, 2.0, after))
    found = price_collective(cluster, "all_reduce", "halving-doubling", 1000.0)
    assert found.seconds == pytest.approx(played(wiring, messages), rel=1e-12)


def _before(distances: list[int], step: int) -> list[int]:
    order = [*distances, *reversed(distances)]
    return [order[step - 1]] if step else []


@pytest.mark.parametrize("n", [3, 5, 8])
@pytest.mark.parametrize("pieces", [1, 4, 32])
def test_reference_chain_piece_by_piece(n: int, pieces: int) -> None:
    """(n-1) alpha + (n-2+c) M/(cB), which the fluid chain is the limit of."""
    alpha, rate, size = 2.0, 3.0, 1000.0
    cluster = cluster_of(workers(n, far=wire(rate, alpha)))
    wiring = Wiring(cluster)
    messages: list[Message] = []
    for piece in range(pieces):
        for rank in range(n - 1):
            path, _ = routes(wiring, rank, rank + 1)
            after = [len(messages) - 1] if rank else []
            # The link to the next rank is free when the piece before has left.
            if piece:
                after.append((piece - 1) * (n - 1) + rank)
            # A piece behind another one has started on its way while that one was sent.
            messages.append(Message(path, size / pieces, alpha if piece == 0 else 0.0, after))
    expected = played(wiring, messages)
    assert expected == pytest.approx(forms.chain_broadcast_s(n, size, alpha, rate, pieces), rel=1e-12)
    fluid = price_collective(cluster, "broadcast", "chain", size).seconds
    assert fluid <= expected <= fluid + (n - 2) * size / (pieces * rate) * (1.0 + 1e-9)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_reference_all_to_all_step_by_step(n: int) -> None:
    cluster = cluster_of(workers(n, far=wire(3.0, 2.0)))
    wiring = Wiring(cluster)
    messages = [
        Message(
            routes(wiring, rank, (rank + step) % n)[0], 1000.0 / n, 2.0,
            [(step - 2) * n + rank, (step - 2) * n + (rank - 1) % n] if step > 1 else [],
        )
        for step in range(1, n)
        for rank in range(n)
    ]  # fmt: skip
    found = price_collective(cluster, "all_to_all", "pairwise", 1000.0)
    assert found.seconds == pytest.approx(played(wiring, messages), rel=1e-12)


@pytest.mark.parametrize("n", [4, 8])
@pytest.mark.parametrize(("algorithm", "trees"), [("tree", 2), ("binary-tree", 1)])
def test_reference_trees_piece_by_piece(n: int, algorithm: CollectiveAlgorithm, trees: int) -> None:
    """Pieces go up and down the trees; in the limit of small ones the busiest card decides."""
    from clustersim.simulate.collectives.trees import tree_edges

    pieces, rate, size = 24, 3.0, 1000.0
    cluster = cluster_of(workers(n, far=wire(rate)))
    wiring = Wiring(cluster)
    messages: list[Message] = []
    for low, high in tree_edges(n, trees):
        parent = dict(zip(low.tolist(), high.tolist(), strict=True))
        children: dict[int, list[int]] = {}
        for child, above in parent.items():
            children.setdefault(above, []).append(child)
        (root,) = set(parent.values()) - set(parent)
        up: dict[tuple[int, int], int] = {}
        down: dict[tuple[int, int], int] = {}
        order = sorted(parent, key=lambda rank: -_depth_in(parent, rank))
        for piece in range(pieces):
            for child in order:
                after = [up[other, piece] for other in children.get(child, [])]
                after += [up[child, piece - 1]] if piece else []
                up[child, piece] = len(messages)
                path = routes(wiring, child, parent[child])[0]
                messages.append(Message(path, size / trees / pieces, 0.0, after))
        for piece in range(pieces):
            for child in reversed(order):
                above = parent[child]
                after = [up[c, piece] for c in children[root]] if above == root else [down[above, piece]]
                after += [down[child, piece - 1]] if piece else []
                down[child, piece] = len(messages)
                path = routes(wiring, above, child)[0]
                messages.append(Message(path, size / trees / pieces, 0.0, after))
    expected = played(wiring, messages)
    found = price_collective(cluster, "all_reduce", algorithm, size).seconds
    # Filling and draining the pipe takes a few pieces.
    assert found * (1.0 - 1e-9) <= expected <= found * (1.0 + 0.35)


def _depth_in(parent: dict[int, int], rank: int) -> int:
    depth = 0
    while rank in parent:
        rank, depth = parent[rank], depth + 1
    return depth


@pytest.mark.parametrize("name", ["pcie-l40s-8", "dgx-1-v100", "p4d", "jeanzay-a100", "hgx-b200"])
@pytest.mark.parametrize("nodes", [1, 5])
def test_pods_of_real_nodes_decide_for_all(name: str, nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PCIe switches that devices and cards share, several cards a device, several devices a card."""
    from clustersim.cluster.load import load_machine

    fabric = Fabric(kind="leaf-spine", nodes_per_leaf=2, oversubscription=2.0, in_network_reduction=True)
    cluster = cluster_of(load_machine(name, nodes), fabric=fabric)
    ranks = np.arange(cluster.devices)
    for kind, algorithm in EVERY:
        if obstacle(cluster, kind, algorithm, ranks) is not None:
            continue
        monkeypatch.setattr(moves, "_FEW_FLOWS", 10**9)
        everything = price_collective(cluster, kind, algorithm, 1e8)
        monkeypatch.setattr(moves, "_FEW_FLOWS", 0)
        found = price_collective(cluster, kind, algorithm, 1e8)
        assert found.seconds == pytest.approx(everything.seconds, rel=1e-12)
        assert [link.kind for link in found.links] == [link.kind for link in everything.links]
        levels = forms.two_levels(cluster, nodes, cluster.devices_per_node, None)
        assert levels is not None
        form = forms.closed_form_s(kind, algorithm, levels, 1e8)
        if form is not None:
            # Uplinks of leaves, two to one, hold back what crosses them; nothing else is in the way.
            assert form * (1.0 - 1e-9) <= found.seconds <= form * (1.0 + 1e-9 if nodes == 1 else 2.0)
