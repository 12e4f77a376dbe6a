"""docs/laws.md, P9: queues. Closed forms against golden figures, against recursions, and against the engine."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from clustersim.hardware.queues import (
    closed_loop,
    erlang_b,
    erlang_c,
    in_system,
    md1_wait_s,
    mg1_wait_s,
    mmc_wait_s,
    throughput_bound,
)
from clustersim.program.program import Compute
from clustersim.simulate.engine import Engine
from clustersim.simulate.flows import LinkClasses
from clustersim.simulate.tasks import Compiled, Task
from clustersim.timeline import OpId

Floats = NDArray[np.float64]

# ------------------------------------------------------------------------------------------------------ closed forms


def test_p9_golden() -> None:
    assert erlang_c(4, 2.8) == pytest.approx(0.428654, abs=5e-7)
    assert mmc_wait_s(2.8, 1.0, 4) == pytest.approx(0.357212, abs=5e-7)
    golden = {1: 0.95238, 8: 7.46041, 16: 14.15933, 21: 17.37128, 32: 19.93239, 40: 19.99944}
    for customers, throughput in golden.items():
        assert closed_loop(customers, 1.0, 0.05).throughput_per_s == pytest.approx(throughput, abs=5e-6)


@given(st.floats(0.01, 0.99), st.floats(1e-6, 1e3))
def test_p9_one_server(load: float, service: float) -> None:
    """M/M/1 is Pollaczek-Khinchine with E[S^2] = 2 s^2 and M/M/c with one server; M/D/1 waits half as long; the mean
    response of M/M/1 is 1 / (mu - lambda)."""
    rate = load / service
    wait = mg1_wait_s(rate, service, 2.0 * service**2)
    assert wait + service == pytest.approx(1.0 / (1.0 / service - rate), rel=1e-9)
    assert mmc_wait_s(rate, service, 1) == pytest.approx(wait, rel=1e-9)
    assert md1_wait_s(rate, service) == pytest.approx(0.5 * wait, rel=1e-12)
    assert md1_wait_s(rate, service) == pytest.approx(load * service / (2.0 * (1.0 - load)), rel=1e-12)
    assert erlang_c(1, load) == pytest.approx(load, rel=1e-9)


@given(st.integers(1, 40), st.floats(0.01, 0.99))
def test_p9_many_servers(servers: int, load: float) -> None:
    """Erlang's two formulas by their definitions, as sums of the steady state."""
    offered = load * servers
    terms = [offered**k / math.factorial(k) for k in range(servers + 1)]
    assert erlang_b(servers, offered) == pytest.approx(terms[-1] / sum(terms), rel=1e-9)
    waiting = terms[-1] / (1.0 - load)
    assert erlang_c(servers, offered) == pytest.approx(waiting / (sum(terms[:-1]) + waiting), rel=1e-9)


def test_p9_what_cannot_be_served_waits_for_ever() -> None:
    assert mg1_wait_s(1.0, 1.0, 2.0) == md1_wait_s(2.0, 1.0) == mmc_wait_s(4.0, 1.0, 4) == math.inf
    assert erlang_c(4, 5.0) == 1.0
    assert in_system(3.0, 2.0) == 6.0


@given(st.integers(1, 60), st.floats(0.0, 10.0), st.floats(1e-3, 10.0), st.integers(1, 8), st.floats(0.0, 1.0))
def test_p9_closed_loops(customers: int, think: float, service: float, stations: int, variation: float) -> None:
    """Never above the asymptotic bound, never falling with more customers or steadier service; Little's law."""
    found = closed_loop(customers, think, service, stations=stations, variation=variation)
    rate = found.throughput_per_s
    assert rate <= throughput_bound(customers, think + service, service / stations) * (1.0 + 1e-12)
    assert in_system(rate, think + found.response_s) == pytest.approx(customers, rel=1e-9)
    assert found.utilisation == pytest.approx(rate * service / stations, rel=1e-12)
    assert closed_loop(customers + 1, think, service, stations=stations, variation=variation).throughput_per_s >= (
        rate * (1.0 - 1e-12)
    )
    assert closed_loop(customers, think, service, stations=stations).throughput_per_s <= rate * (1.0 + 1e-12)
    if customers == 1:
        assert rate == pytest.approx(1.0 / (think + service), rel=1e-12)


@pytest.mark.parametrize("variation", [0.0, 0.4, 1.0])
def test_p9_many_thinkers_make_an_open_queue(variation: float) -> None:
    """With ever more customers that think for ever longer, arrivals are Poisson: the response is M/G/1's."""
    found = closed_loop(200_000, 1e5 / 0.35, 1.0, variation=variation)
    rate = found.throughput_per_s
    assert found.response_s == pytest.approx(1.0 + mg1_wait_s(rate, 1.0, 1.0 + variation), rel=1e-3)


# ------------------------------------------------------------------------------------------ the engine, as a queue


def _task(owner: int, stream: int, number: int, work: float, waits: int = 0) -> Task:
    op = Compute(id=OpId(0, number, 0, "forward", "all", "compute"), after=(), work=0)
    return Task(owner=owner, stream=stream, op=op, span=number, work=work, waits=waits)


def _no_links() -> LinkClasses:
    return LinkClasses(capacity=[], members=[], patterns=[], binding=[])


def _served(gaps: Sequence[float], services: Sequence[float]) -> tuple[Floats, Floats, Floats]:
    """When requests reach a server's host stream, begin and end there: each `gap` after the one before."""
    tasks = []
    for number, (gap, service) in enumerate(zip(gaps, services, strict=True)):
        source = _task(0, 0, 2 * number, gap)
        source.then.append(2 * number + 1)
        tasks += [source, _task(1, 1, 2 * number + 1, service, waits=1)]
    streams = [(0, "compute"), (1, "host")]
    engine = Engine(Compiled(tasks=tasks, streams=streams, joints=[], links=_no_links(), owners=2, cores=0), 1, 1.0)
    engine.run()
    ends = [np.array(times[1::2]) for times in (engine.ready_s, engine.start_s, engine.end_s)]
    return ends[0], ends[1], ends[2]


def _lindley(gaps: Floats, services: Floats) -> Floats:
    """Waits of a first-come-first-served queue (Lindley 1952): W(n+1) = max(0, W(n) + S(n) - A(n+1))."""
    steps = np.concatenate(([0.0], np.cumsum(services[:-1] - gaps[1:])))
    waits: Floats = steps - np.minimum.accumulate(steps)
    return waits


Draw = Callable[[np.random.Generator, int], Floats]
KINDS: dict[str, tuple[float, Draw, float]] = {
    "M/M/1": (0.6, lambda r, n: r.exponential(1.0, n), 2.0),
    "M/D/1": (0.7, lambda r, n: np.ones(n), 1.0),
    # Uniform on (0, 2): E[S^2] = 4/3.
    "M/G/1": (0.6, lambda r, n: r.uniform(0.0, 2.0, n), 4.0 / 3.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_p9_a_servers_host_is_such_a_queue(kind: str) -> None:
    """The engine's host stream waits as Lindley's recursion does, request by request; and that on average as the
    closed form says, over so many draws that 1 % is more than three standard errors."""
    rate, draw, second = KINDS[kind]
    random = np.random.default_rng(9)
    gaps, services = random.exponential(1.0 / rate, 20_000), draw(random, 20_000)
    ready, start, end = _served(gaps.tolist(), services.tolist())
    assert ready == pytest.approx(np.cumsum(gaps), rel=1e-9)
    assert start - ready == pytest.approx(_lindley(gaps, services), abs=1e-6)
    assert end - start == pytest.approx(services, abs=1e-6)
    many = 4_000_000
    waits = _lindley(random.exponential(1.0 / rate, many), draw(random, many))
    assert float(waits.mean()) == pytest.approx(mg1_wait_s(rate, 1.0, second), rel=0.01)


def test_p9_little_holds_exactly_on_a_finished_trace() -> None:
    """The area under the number in the system is the sum of all responses, whatever the order; so L = lambda W."""
    random = np.random.default_rng(1)
    ready, start, end = _served(random.exponential(1.0, 5_000).tolist(), random.exponential(0.8, 5_000).tolist())
    for began, left in ((ready, end), (ready, start), (start, end)):
        changes = sorted([(t, 1) for t in began] + [(t, -1) for t in left])
        area, inside = 0.0, 0
        for (t, change), (after, _) in itertools.pairwise(changes):
            inside += change
            area += inside * (after - t)
        horizon = float(end.max())
        rate, response = len(began) / horizon, float((left - began).mean())
        assert area / horizon == pytest.approx(in_system(rate, response), rel=1e-9)


def test_p9_many_servers_simulated() -> None:
    """M/M/c by the recursion of Kiefer and Wolfowitz: the next request goes to the server that is free first."""
    random = np.random.default_rng(4)
    count, servers, rate = 1_200_000, 4, 2.8
    gaps, services = random.exponential(1.0 / rate, count).tolist(), random.exponential(1.0, count).tolist()
    free = [0.0] * servers
    now = total = 0.0
    waited = 0
    for gap, service in zip(gaps, services, strict=True):
        now += gap
        start = max(now, free[0])
        total += start - now
        waited += start > now
        heapq.heapreplace(free, start + service)
    assert total / count == pytest.approx(mmc_wait_s(rate, 1.0, servers), rel=0.01)
    assert waited / count == pytest.approx(erlang_c(servers, rate / 1.0), rel=0.01)


def _loop(customers: int, cycles: int, think: Floats, service: Floats) -> float:
    """Cycles a second that the engine gets through: every customer computes, then is served by one host."""
    tasks: list[Task] = []
    streams = [(0, "host"), *((1 + c, "compute") for c in range(customers))]
    for c in range(customers):
        before: Task | None = None
        for n in range(cycles):
            at = len(tasks)
            thinking = _task(1 + c, 1 + c, at, float(think[c, n]), waits=int(before is not None))
            if before is not None:
                before.then.append(at)
            thinking.then.append(at + 1)
            before = _task(0, 0, at + 1, float(service[c, n]), waits=1)
            tasks += [thinking, before]
    compiled = Compiled(tasks=tasks, streams=streams, joints=[], links=_no_links(), owners=customers + 1, cores=0)
    engine = Engine(compiled, 1, 1.0)
    engine.run()
    # The middle of the run: without the start, and before the first customer has nothing left to do.
    ends = np.array(engine.end_s[1::2])
    last = min(float(ends[(c + 1) * cycles - 1]) for c in range(customers))
    first = 0.05 * last
    return float(((ends > first) & (ends <= last)).sum() / (last - first))


@pytest.mark.parametrize(("customers", "cycles", "golden"), [(8, 4000, 7.46041), (21, 1500, 17.37128)])
def test_p9_mean_value_analysis_simulated(customers: int, cycles: int, golden: float) -> None:
    random = np.random.default_rng(3)
    shape = (customers, cycles)
    found = _loop(customers, cycles, random.exponential(1.0, shape), random.exponential(0.05, shape))
    assert found == pytest.approx(golden, rel=0.01)


@pytest.mark.parametrize(("customers", "cycles"), [(8, 4000), (16, 2000), (40, 800)])
def test_p9_closed_loop_of_constant_service_simulated(customers: int, cycles: int) -> None:
    """The residual-time form is no theorem: 2.5 % covers the worst of these, which is at the knee."""
    random = np.random.default_rng(5)
    shape = (customers, cycles)
    found = _loop(customers, cycles, random.exponential(1.0, shape), np.full(shape, 0.05))
    assert closed_loop(customers, 1.0, 0.05, variation=0.0).throughput_per_s == pytest.approx(found, rel=0.025)


@settings(max_examples=30)
@given(st.lists(st.floats(0.0, 3.0), min_size=1, max_size=60))
def test_p9_a_host_stream_is_fair_whatever_comes(gaps: list[float]) -> None:
    """First come, first served, and never idle while somebody waits."""
    services = [0.1 + (index * 7919 % 13) / 5.0 for index in range(len(gaps))]
    _, start, end = _served(gaps, services)
    free = 0.0
    for arrival, begun, ended in zip(itertools.accumulate(gaps), start, end, strict=True):
        assert begun == pytest.approx(max(arrival, free), rel=1e-12, abs=1e-12)
        free = ended
