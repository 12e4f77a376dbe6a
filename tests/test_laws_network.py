"""Laws P7 (what each sharing policy reaches), P8 (max-min fairness) and P28 (flows end) of docs/laws.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.simulate.alarm import Alarm
from clustersim.simulate.network import Bundle, Network
from clustersim.simulate.sharing import Weights, binding_links, max_min_rates

Case = tuple[dict[int, tuple[tuple[int, float], ...]], list[float]]


@st.composite
def _cases(draw: st.DrawFn, most_flows: int = 12, most_links: int = 8) -> Case:
    """Flow classes on links: each crosses some links, with a multiplicity on each."""
    links = draw(st.integers(1, most_links))
    capacity = draw(st.lists(st.sampled_from([0.5, 1.0, 1.0, 2.0, 3.0, 7.0]), min_size=links, max_size=links))
    multiplicity = st.sampled_from([0.25, 0.5, 1.0, 1.0, 1.0, 2.0, 7.0])
    crossed = st.dictionaries(st.integers(0, links - 1), multiplicity, min_size=1, max_size=links)
    flows = draw(st.lists(crossed, min_size=1, max_size=most_flows))
    return {number: tuple(flow.items()) for number, flow in enumerate(flows)}, capacity


def _filled(weights: Mapping[int, Weights], capacity: list[float]) -> dict[int, float]:
    """Progressive filling, with nothing remembered from round to round: raise all rates that no full link holds back
    until the next link is full."""
    rates = dict.fromkeys(weights, 0.0)
    rising = set(weights)
    while rising:
        steps = []
        for link, full in enumerate(capacity):
            used = sum(rates[flow] * m for flow, crossed in weights.items() for at, m in crossed if at == link)
            growth = sum(m for flow in rising for at, m in weights[flow] if at == link)
            if growth > 0.0:
                steps.append(((full - used) / growth, link))
        step, _ = min(steps)
        for flow in rising:
            rates[flow] += step
        for slack, link in steps:
            if slack <= step * (1.0 + 1e-12) + 1e-15:
                rising -= {flow for flow in rising for at, _ in weights[flow] if at == link}
    return rates


@given(_cases())
@settings(max_examples=200, deadline=None)
def test_p8_rates_are_feasible_and_every_flow_has_a_bottleneck(case: Case) -> None:
    weights, capacity = case
    rates = max_min_rates(weights, capacity)
    used = [0.0] * len(capacity)
    for flow, crossed in weights.items():
        for link, m in crossed:
            used[link] += rates[flow] * m
    for link, full in enumerate(capacity):
        assert used[link] <= full * (1.0 + 1e-12)
    for crossed in weights.values():
        flow_rate = rates[next(number for number, other in weights.items() if other is crossed)]
        full_here = [link for link, _ in crossed if used[link] >= capacity[link] * (1.0 - 1e-9)]
        assert any(
            all(rates[other] <= flow_rate * (1.0 + 1e-9) for other, at in weights.items() if link in dict(at))
            for link in full_here
        ), (weights, capacity, rates)


@given(_cases())
@settings(max_examples=200, deadline=None)
def test_p8_rates_are_those_of_progressive_filling_in_any_order(case: Case) -> None:
    weights, capacity = case
    expected = _filled(weights, capacity)
    rates = max_min_rates(weights, capacity)
    backwards = {number: tuple(reversed(weights[number])) for number in reversed(weights)}
    again = max_min_rates(backwards, capacity)
    for flow, rate in expected.items():
        assert rates[flow] == pytest.approx(rate, rel=1e-11)
        assert again[flow] == pytest.approx(rate, rel=1e-11)


@given(_cases(), st.data())
@settings(max_examples=200, deadline=None)
def test_p8_removing_a_flow_never_lowers_the_slowest_rate(case: Case, data: st.DataObject) -> None:
    weights, capacity = case
    before = max_min_rates(weights, capacity)
    gone = data.draw(st.sampled_from(sorted(weights)))
    rest = {number: crossed for number, crossed in weights.items() if number != gone}
    if rest:
        assert min(max_min_rates(rest, capacity).values()) >= min(before.values()) * (1.0 - 1e-12)


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0]), min_size=5, max_size=5), min_size=1, max_size=9),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_p8_links_that_never_bind_do_not_matter(loads: list[list[float]], data: st.DataObject) -> None:
    """A link that another always fills before, whatever flows, can be left out of the network."""
    capacity = data.draw(st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=len(loads), max_size=len(loads)))
    rows = [{pattern: load for pattern, load in enumerate(row) if load > 0.0} for row in loads]
    keep = binding_links(rows, capacity)
    assert any(keep) == any(rows)
    active = data.draw(st.sets(st.integers(0, 4), min_size=1))
    every = {flow: tuple((link, row[flow]) for link, row in enumerate(loads) if row[flow] > 0.0) for flow in active}
    kept = {flow: tuple(pair for pair in crossed if keep[pair[0]]) for flow, crossed in every.items()}
    rates = max_min_rates(every, capacity)
    for flow, rate in max_min_rates(kept, capacity).items():
        assert rate == pytest.approx(rates[flow], rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_p8_thousands_of_flows_have_the_rates_of_progressive_filling(seed: int) -> None:
    """2,000 flows over 200 links of random capacity, four links a flow, to 1e-12."""
    rng = np.random.default_rng(seed)
    crossing = np.argsort(rng.random((2000, 200)), axis=1)[:, :4]
    capacity = rng.uniform(1.0, 10.0, 200)
    expected, rising = np.zeros(2000), np.ones(2000, np.bool_)
    while rising.any():
        used = np.bincount(crossing.ravel(), weights=np.repeat(expected, 4), minlength=200)
        count = np.bincount(crossing[rising].ravel(), minlength=200)
        level = np.where(count > 0, (capacity - used) / np.maximum(count, 1), np.inf)
        frozen = rising & (crossing == int(level.argmin())).any(axis=1)
        expected[frozen] = level.min()
        rising &= ~frozen
    weights = {flow: tuple((int(link), 1.0) for link in row) for flow, row in enumerate(crossing)}
    rates = max_min_rates(weights, capacity.tolist())
    assert [rates[flow] for flow in range(2000)] == pytest.approx(expected.tolist(), rel=1e-12)


def test_p8_a_class_of_tiny_multiplicity_gets_what_is_left() -> None:
    """Where running sums cancel, they are summed anew."""
    rates = max_min_rates({0: ((0, 1.0), (1, 1.0)), 1: ((1, 1e-13),)}, [1.0, 1.0 + 1e-6])
    assert rates == {0: 1.0, 1: pytest.approx(1e7, rel=1e-9)}


@given(_cases(most_flows=6), st.lists(st.integers(0, 3), min_size=6, max_size=6), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_p8_strands_that_start_together_are_flows_of_their_own(case: Case, starts: list[int], copies: int) -> None:
    """A bundle of strands ends strand by strand as if each had been started by itself."""
    together, apart = (_strand_ends(case, starts, copies, bundled=bundled) for bundled in (True, False))
    assert len(together) == len(case[0]) * copies + 1
    assert together == pytest.approx(apart, rel=1e-9, abs=1e-9)


def _strand_ends(case: Case, starts: list[int], copies: int, *, bundled: bool) -> dict[tuple[int, int], float]:
    """When each flow ends, of flows with copies on links of their own; on the last copy's last link there is one more,
    which tells that strand apart from the others."""
    weights, capacity = case
    links = len(capacity)
    env = simpy.Environment()
    network = Network(env, capacity * copies)
    found: dict[tuple[int, int], float] = {}

    def ended(number: int, which: Sequence[int]) -> None:
        found.update(((number, k), env.now) for k in which)

    def begin(number: int) -> None:
        strands = [tuple((link + k * links, m) for link, m in weights[number]) for k in range(copies)]
        if bundled:
            network.start_bundle(number + 1.0, Bundle(strands, network.capacity), partial(ended, number))
        else:
            for k, strand in enumerate(strands):
                network.start(number + 1.0, strand, partial(ended, number, [k]))

    for number in weights:
        Alarm(env, 0.5 * starts[number], lambda _, number=number: begin(number))  # type: ignore[misc]
    last = ((links * copies - 1, 1.0),)
    Alarm(env, 0.25, lambda _: network.start(3.0, last, partial(ended, -1, [0])))
    env.run()
    return found


def test_p8_what_ends_at_once_goes_on_at_once() -> None:
    """Rounding sets the ends of equal flows apart by an ulp; what they start next must not get ahead by it."""
    env = simpy.Environment()
    network = Network(env, [1.0, 1.0, 1.0])
    starts: list[float] = []
    for k in range(3):
        # Each crosses all three links, with multiplicities in another order.
        weights = tuple((link, (0.1, 0.2, 0.7)[(link + k) % 3]) for link in range(3))
        network.start(1.0 / 3.0, weights, lambda: starts.append(env.now))
    env.run()
    assert len(starts) == 3
    assert len(set(starts)) == 1


def test_p8_a_flow_without_links_is_unlimited() -> None:
    assert max_min_rates({0: (), 1: ((0, 2.0),)}, [3.0]) == {0: math.inf, 1: 1.5}


@given(
    _cases(most_flows=10),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40)), min_size=10, max_size=10),
)
@settings(max_examples=150, deadline=None)
def test_p8_a_network_that_updates_only_what_changed_equals_one_that_recomputes(
    case: Case, times: list[tuple[int, int]]
) -> None:
    """Flows start at random times; the reference fills anew at every start and end, all flows together."""
    weights, capacity = case
    starts = {number: times[number][0] * 0.5 for number in weights}
    sizes = {number: float(times[number][1]) for number in weights}
    ends: dict[int, float] = {}
    env = simpy.Environment()
    network = Network(env, capacity)
    for number in weights:

        def begin(_: object, number: int = number) -> None:
            network.start(sizes[number], weights[number], lambda: ends.__setitem__(number, env.now))

        env.timeout(starts[number]).callbacks.append(begin)
    env.run()
    expected = _finished(weights, capacity, starts, sizes)
    assert ends == pytest.approx(expected, rel=1e-9, abs=1e-9)
    for link in range(len(capacity)):
        bytes_here = sum(sizes[number] * m for number, crossed in weights.items() for at, m in crossed if at == link)
        assert network.carried[link] == pytest.approx(bytes_here, rel=1e-12)


def _finished(
    weights: Mapping[int, Weights], capacity: list[float], starts: Mapping[int, float], sizes: Mapping[int, float]
) -> dict[int, float]:
    now, left, ends = 0.0, dict(sizes), dict[int, float]()
    while len(ends) < len(weights):
        active = {n: weights[n] for n in weights if starts[n] <= now and n not in ends}
        rates = _filled(active, capacity) if active else {}
        coming = [starts[n] for n in weights if starts[n] > now]
        ending = {n: now + left[n] / rates[n] for n in active}
        until = min([*coming, *ending.values()])
        for n in active:
            left[n] -= rates[n] * (until - now)
            if ending[n] <= until * (1.0 + 1e-13):
                ends[n] = until
        now = until
    return ends


def test_p28_small_flows_end_late_on_the_clock_too() -> None:
    """At 1,000 s the clock's resolution is worth a tenth of a byte of a fast link."""
    env = simpy.Environment()
    network = Network(env, [0.9e12])
    ended: list[float] = []
    for index in range(50):
        at = 1000.0 + index / 7.0
        env.timeout(at).callbacks.append(lambda _: network.start(100.0, ((0, 1.0),), lambda: ended.append(env.now)))
    env.run()
    assert len(ended) == 50


# --------------------------------------------------------------------------------------------------------- P7


def _table(n: int, k: int) -> tuple[float, float, float]:
    """(bytes on a dedicated host, on a worker's server, the optimum in units of M/B): Jiang et al., OSDI'20."""
    bottom = n * n + k * n - 2 * k
    return 2.0 * (n - 1) / bottom, (n - k) / bottom, 2.0 * n * (n - 1) / bottom


def _per_flow(n: int, k: int, *, merged: bool) -> float:
    """All flows at once, one for each (sender, receiver, direction), or with push and reply between two nodes merged,
    shared max-min; out of node i is link 2i, into it 2i + 1. Seconds for M = B = 1."""
    dedicated, own, _ = _table(n, k)
    env = simpy.Environment()
    network = Network(env, [1.0] * (2 * (n + k)))
    sizes: dict[tuple[int, int, str], float] = {}
    for a in range(n):
        for b in range(n + k):
            if a == b:
                continue
            share = own if b < n else dedicated
            for sender, receiver, direction in ((a, b, "push"), (b, a, "pull")):
                key = (sender, receiver, "both" if merged else direction)
                sizes[key] = sizes.get(key, 0.0) + share
    ended: list[float] = []
    for (sender, receiver, _), size in sizes.items():
        network.start(size, ((2 * sender, 1.0), (2 * receiver + 1, 1.0)), lambda: ended.append(env.now))
    env.run()
    assert len(ended) == len(sizes)
    return ended[-1]


@pytest.mark.parametrize(
    ("n", "k", "apart", "together"),
    [(4, 1, 1.833, 1.333), (4, 2, 1.600, 1.400), (8, 2, 2.105, 1.632), (8, 4, 1.727, 1.545)],
)
def test_p7_max_min_over_single_flows_misses_the_optimum(n: int, k: int, apart: float, together: float) -> None:
    assert _per_flow(n, k, merged=False) == pytest.approx(apart, abs=5e-4)
    assert _per_flow(n, k, merged=True) == pytest.approx(together, abs=5e-4)
    assert apart > _table(n, k)[2]
