"""Queues in closed form: how long a request waits at a server under random load, and what a closed loop gets through.

Times in seconds, rates per second. `arrivals_per_s` are Poisson where a formula says M/..., service times exponential
(.../M/), constant (.../D/) or of any distribution (.../G/). An open queue that is given more than it can serve has no
steady state: its wait is infinite. Sources: Kleinrock, Queueing Systems I (1975), unless a function names another.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass


def md1_wait_s(arrivals_per_s: float, service_s: float) -> float:
    """M/D/1: mean time in the queue, rho s / (2 (1 - rho)): half of what M/M/1 waits."""
    return mg1_wait_s(arrivals_per_s, service_s, service_s**2)


def mg1_wait_s(arrivals_per_s: float, mean_s: float, second_moment_s2: float) -> float:
    """M/G/1: mean time in the queue, lambda E[S^2] / (2 (1 - rho)) (Pollaczek 1930, Khinchine 1932)."""
    load = arrivals_per_s * mean_s
    return math.inf if load >= 1.0 else arrivals_per_s * second_moment_s2 / (2.0 * (1.0 - load))


def erlang_b(servers: int, offered: float) -> float:
    """M/M/c/c: the probability that an arrival finds all `servers` busy and is lost; `offered` is lambda / mu.

    By the recursion B(c) = a B(c-1) / (c + a B(c-1)), which neither overflows nor cancels. O(servers).
    """
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    return blocked


def erlang_c(servers: int, offered: float) -> float:
    """M/M/c: the probability that an arrival has to wait; `offered` is lambda / mu (Erlang 1917). O(servers)."""
    if offered >= servers:
        return 1.0
    blocked = erlang_b(servers, offered)
    return blocked / (1.0 - offered / servers * (1.0 - blocked))


def mmc_wait_s(arrivals_per_s: float, service_s: float, servers: int) -> float:
    """M/M/c: mean time in the one queue before `servers` servers. O(servers)."""
    offered = arrivals_per_s * service_s
    if offered >= servers:
        return math.inf
    return erlang_c(servers, offered) * service_s / (servers - offered)


def in_system(arrivals_per_s: float, response_s: float) -> float:
    """Little's law, L = lambda W: how many requests are in a system (or in its queue, given the wait) on average."""
    return arrivals_per_s * response_s


def throughput_bound(customers: int, alone_s: float, busiest_s: float) -> float:
    """Cycles a second that no closed loop exceeds, min(N / cycle alone, 1 / demand on the busiest station) (Denning &
    Buzen 1978): `alone_s` is a cycle of a single customer, `busiest_s` what a cycle needs of the busiest station."""
    return min(customers / alone_s if alone_s > 0.0 else math.inf, 1.0 / busiest_s if busiest_s > 0.0 else math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """What `customers` that never leave get from a closed loop: cycles a second, all customers together, the mean
    response at the stations (queue and service) in a cycle, and the utilisation of each station."""

    throughput_per_s: float
    response_s: float
    utilisation: float


@functools.cache
def closed_loop(
    customers: int, think_s: float, service_s: float, *, stations: int = 1, variation: float = 1.0
) -> Closed:
    """Mean value analysis of a closed loop: each of `customers` thinks for `think_s`, then goes to one of `stations`
    alike, at random, which serves it for `service_s`, first come, first served. O(customers).

    Exact for exponential service (`variation`, the squared coefficient of variation of the service time, is 1): an
    arrival sees what one customer fewer would leave there on average (Reiser & Lavenberg 1980). For other
    variations the one in service has (1 + variation) / 2 of its time left (Reiser 1979): with many customers that
    think for long, this is M/G/1 exactly; `variation` 0 is constant service. Never more than `throughput_bound`.
    """
    assert customers >= 1
    assert stations >= 1
    queue = busy = throughput = 0.0
    for count in range(1, customers + 1):
        response = service_s * (1.0 + queue - busy * (1.0 - variation) / 2.0)
        cycle = think_s + response
        bound = throughput_bound(count, think_s + service_s, service_s / stations)
        throughput = min(count / cycle if cycle > 0.0 else math.inf, bound)
        if math.isinf(throughput):
            return Closed(throughput_per_s=throughput, response_s=0.0, utilisation=0.0)
        queue = (count - throughput * think_s) / stations
        busy = throughput * service_s / stations
    return Closed(throughput_per_s=throughput, response_s=queue * stations / throughput, utilisation=busy)
