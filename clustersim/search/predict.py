"""Predictions: what a simulated step takes, holds and costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.hardware.intervals import Interval, Outside
from clustersim.layout.layout import Layout, ParameterServer, Scheme
from clustersim.plan import Prediction
from clustersim.scenario.question import Question
from clustersim.simulate.simulate import Simulated
from clustersim.workload.layer_kernels import flops_per_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Dollars and watts of a cluster with some server hosts in use. `usd_per_s` is None where a price is missing."""

    usd_per_s: float | None
    device_w: float
    idle_w: float
    other_w: float


def rates(cluster: Cluster, servers: int) -> Rates:
    """What the worker nodes, `servers` server hosts and all storage hosts cost and draw."""
    usd: float | None = 0.0
    device_w = idle_w = other_w = 0.0
    for machine in cluster.workers:
        each = _node_usd_per_hour(machine)
        usd = None if usd is None or each is None else usd + each * machine.count
        assert machine.device is not None
        device_w += machine.count * machine.node.devices * machine.device.power_w
        idle_w += machine.count * machine.node.devices * machine.device.idle_power_w
        other_w += machine.count * machine.node.power_overhead_w
    if servers:
        host = cluster.servers[0]
        price = host.node.price
        usd = None if usd is None or price is None else usd + servers * price.hourly_usd_per_hour
        other_w += servers * host.node.power_overhead_w
    for host in cluster.storage:
        price = host.node.price
        usd = None if usd is None or price is None else usd + host.count * price.hourly_usd_per_hour
        other_w += host.count * host.node.power_overhead_w
    return Rates(usd_per_s=None if usd is None else usd / 3600.0, device_w=device_w, idle_w=idle_w, other_w=other_w)


def _node_usd_per_hour(machine: Machine) -> float | None:
    """Price of a node: its host's and its devices'; None where neither has one."""
    host = machine.node.price.hourly_usd_per_hour if machine.node.price is not None else None
    assert machine.device is not None
    device = machine.device.price.hourly_usd_per_hour if machine.device.price is not None else None
    if device is None:
        return host
    return (host or 0.0) + device * machine.node.devices


def servers_used(scheme: Scheme) -> int:
    """Dedicated server hosts that a scheme occupies."""
    return scheme.dedicated if isinstance(scheme, ParameterServer) else 0


def peak_flops(question: Question) -> float:
    """Datasheet peak of all worker devices in the training's precision."""
    total = 0.0
    for machine in question.cluster.workers:
        assert machine.device is not None
        total += machine.count * machine.node.devices * machine.device.peak[question.workload.training.precision]
    return total


def predict(
    question: Question,
    layout: Layout,
    simulated: Simulated,
    *,
    memory_bytes: float,
    server_bytes: float,
    coverage: float,
    interval: Interval,
    outside: tuple[Outside, ...],
) -> Prediction:
    """The prediction for one layout from its simulation, with the 90 % interval of its kind."""
    step = simulated.step_s
    # The class that computes most is the one that a faster device would help.
    slowest = max(simulated.classes_s, key=lambda time: time.compute_s)
    # Later stages wait for the first, and that for its input: a bubble is what is left.
    stall = simulated.input_stall_s
    waiting = max(0.0, slowest.waiting_s - (stall - slowest.input_s))
    model, training = question.workload.model, question.workload.training
    cost = rates(question.cluster, servers_used(layout.scheme))
    usd = None if cost.usd_per_s is None else cost.usd_per_s * step
    busy = float(np.mean([time.compute_s for time in simulated.classes_s])) / simulated.makespan_s
    watts = cost.other_w + cost.idle_w + (cost.device_w - cost.idle_w) * busy
    return Prediction(
        source="simulated",
        step_s=step,
        low_s=step * interval.low,
        high_s=step * interval.high,
        kind=interval.kind,
        outside=outside,
        compute_s=slowest.compute_s / simulated.steps,
        bubble_s=waiting / simulated.steps,
        exposed_communication_s=slowest.exposed_s / simulated.steps,
        input_stall_s=stall / simulated.steps,
        tokens_per_s=training.tokens_per_step / step,
        mfu=flops_per_step(model, training) / (step * peak_flops(question)),
        mfu_masked=flops_per_step(model, training, masked=True) / (step * peak_flops(question)),
        memory_bytes=memory_bytes,
        server_memory_bytes=server_bytes,
        usd_per_step=usd,
        usd_per_billion_tokens=None if usd is None else usd * 1e9 / training.tokens_per_step,
        energy_j=watts * step,
        coverage=coverage,
    )


def objective_of(question: Question, prediction: Prediction) -> float:
    """What the scenario minimises."""
    if question.scenario.objective == "usd":
        assert prediction.usd_per_step is not None
        return prediction.usd_per_step
    return prediction.step_s
