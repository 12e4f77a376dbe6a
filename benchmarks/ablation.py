"""What each physical term is worth: predictions with one term switched off at a time, by family of measured steps.

    python benchmarks/ablation.py [--rows N] [family ...]

Prints the mean absolute error of each family as shipped, and by how many points it changes without each term; a
positive figure is what the term gains. Terms are switched off from outside: by other profiles, another program, or
another price of a kernel. `--rows` (16) of each family are predicted, those that stand for all by their
configurations; rows that take long to simulate are left out, and said.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np

from clustersim.calibrate.steps import Step
from clustersim.cluster.cluster import Cluster
from clustersim.hardware import roofline
from clustersim.hardware.cost import Cost, DeviceCosts, device_costs
from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import Attention, Gemm, Kernel, Memory
from clustersim.layout.layout import Layout
from clustersim.program import work
from clustersim.program.lower import lower
from clustersim.program.program import Program
from clustersim.simulate.simulate import Simulated, simulate
from clustersim.validate.calibrated import step_of
from clustersim.validate.case import Case
from clustersim.validate.configurations import spread_out
from clustersim.validate.family import rows_of, shipped_families

# Rows whose step takes longer to simulate are left out: a row is simulated once for every term.
_LONGEST_S = 2.0
NOTHING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A physical term, by what replaces its inputs where it is switched off."""

    name: str
    framework: Callable[[Framework], Framework] = lambda given: given
    cluster: Callable[[Cluster], Cluster] = lambda given: given
    layout: Callable[[Layout], Layout] = lambda given: given
    program: Callable[[Program], Program] = lambda given: given
    prices: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    step_s: Callable[[Simulated], float] = lambda simulated: simulated.step_s


@contextmanager
def _priced(change: Callable[[DeviceCosts, Kernel, Cost], float]) -> Iterator[None]:
    """Kernels take the seconds that `change` says."""
    plain = DeviceCosts.cost

    def cost(self: DeviceCosts, kernel: Kernel) -> Cost:
        found = plain(self, kernel)
        return replace(found, seconds=change(self, kernel, found))

    with mock.patch.object(DeviceCosts, "cost", cost):
        yield


def _flat(costs: DeviceCosts, kernel: Kernel, found: Cost) -> float:
    if not isinstance(kernel, Gemm):
        return found.seconds
    return kernel.flops / roofline.peak_flops(costs.device, kernel.dtype) / costs.device.roofline.gemm_efficiency


def _smooth(costs: DeviceCosts, kernel: Kernel, found: Cost) -> float:
    return roofline.gemm_seconds(costs.device, kernel) if isinstance(kernel, Gemm) else found.seconds


def _aligned(costs: DeviceCosts, kernel: Kernel, found: Cost) -> float:
    if isinstance(kernel, Gemm) and roofline.misaligned(kernel.dtype, kernel.n, kernel.k):
        return found.seconds / roofline.MISALIGNED_SLOWDOWN
    return found.seconds


def _attention_roofline(costs: DeviceCosts, kernel: Kernel, found: Cost) -> float:
    return roofline.attention_seconds(costs.device, kernel) if isinstance(kernel, Attention) else found.seconds


def _burst(costs: DeviceCosts, kernel: Kernel, found: Cost) -> float:
    tabled = isinstance(kernel, (Gemm, Attention)) and found.source == "measured"
    return found.seconds * costs.device.sustained_clock if tabled else found.seconds


def _without_memory(costs: DeviceCosts, kernel: Kernel, found: Cost) -> float:
    return 0.0 if isinstance(kernel, Memory) and kernel.op != "optimizer" else found.seconds


def _without_optimizer(costs: DeviceCosts, kernel: Kernel, found: Cost) -> float:
    return 0.0 if isinstance(kernel, Memory) and kernel.op == "optimizer" else found.seconds


@contextmanager
def _without_ends() -> Iterator[None]:
    """Embedding, head and loss have no kernels."""
    names = [name for name in vars(work) if name.startswith(("embedding_", "head_"))]
    with ExitStack() as stack:
        for name in names:
            nothing = ((), ()) if name.endswith("collectives") else ()
            stack.enter_context(mock.patch.object(work, name, lambda *_, result=nothing, **__: result))
        yield


@contextmanager
def _without_launches() -> Iterator[None]:
    """Launching a kernel takes the host no time."""
    devices = [device_costs(name) for name in _devices]
    before = [costs.device for costs in devices]
    for costs in devices:
        costs.device = replace(costs.device, launch_overhead_s=0.0)
    try:
        yield
    finally:
        for costs, device in zip(devices, before, strict=True):
            costs.device = device


_devices: set[str] = set()


def _own_cards(cluster: Cluster) -> Cluster:
    """Every device has the network of its node for itself."""
    machines = []
    for machine in cluster.workers:
        nic, node = machine.node.nic, machine.node
        whole = machine.nic_rate_bytes_per_s * nic.count
        own = replace(nic, count=node.devices, rate_bytes_per_s=whole)
        machines.append(
            replace(machine, node=replace(node, nic=own), nic=replace(machine.nic, rate_bytes_per_s=whole), pcie=None)
        )
    return replace(cluster, workers=tuple(machines))


def _no_inner(program: Program) -> Program:
    works = tuple(replace(one, inner=tuple(i for i in one.inner if i.group != "tp")) for one in program.works)
    return replace(program, works=works)


def _host(framework: Framework) -> Framework:
    zero = dict.fromkeys((field.name for field in dataclasses.fields(framework.host)), 0.0)
    return replace(framework, host=replace(framework.host, **zero))


def _busy(simulated: Simulated) -> list[float]:
    return [time_.compute_s + time_.exposed_s for time_ in simulated.classes_s]


def _scaled(**scales: float) -> Callable[[Framework], Framework]:
    return lambda framework: replace(framework, scales=replace(framework.scales, **scales))


def _overlapping(**overlap: Any) -> Callable[[Framework], Framework]:
    return lambda framework: replace(framework, overlap=replace(framework.overlap, **overlap))


TERMS = (
    Term(name="GEMM tables (flat fraction of peak)", prices=lambda: _priced(_flat)),
    Term(name="tiles and waves (roofline)", prices=lambda: _priced(_smooth)),
    Term(name="misaligned rows", prices=lambda: _priced(_aligned)),
    Term(name="host and launches", framework=_host, prices=_without_launches),
    Term(name="attention tables (roofline)", prices=lambda: _priced(_attention_roofline)),
    Term(name="memory-bound operations", prices=lambda: _priced(_without_memory)),
    Term(name="optimizer step", prices=lambda: _priced(_without_optimizer)),
    Term(name="embedding, head, loss", prices=_without_ends),
    Term(name="recompute", layout=lambda layout: replace(layout, recompute="none")),
    Term(name="tensor-parallel collectives", program=_no_inner),
    Term(name="pipeline transfers", framework=_scaled(send=NOTHING)),
    Term(name="pipeline bubble", step_s=lambda s: max(_busy(s))),
    Term(name="slowest stage (mean)", step_s=lambda s: s.step_s - max(_busy(s)) + float(np.mean(_busy(s)))),
    Term(name="gradient reduction", framework=_scaled(synchronisation=NOTHING)),
    Term(name="its overlap", framework=_overlapping(gradient_reduce=False, parameter_gather=False)),
    Term(name="slowdown while overlapping", framework=_overlapping(compute_slowdown=1.0)),
    Term(name="NIC sharing", cluster=_own_cards),
    Term(name="sustained clock", prices=lambda: _priced(_burst)),
    Term(name="jitter of replicas", framework=lambda framework: replace(framework, jitter=0.0)),
    Term(
        name="gradient accumulation",
        framework=lambda framework: replace(framework, gradient_accumulation="fused"),
    ),
    Term(
        name="switch latency",
        cluster=lambda cluster: replace(cluster, fabric=replace(cluster.fabric, hop_latency_s=0.0)),
    ),
)  # fmt: skip


def without(step: Step, term: Term) -> float:
    """Seconds of a step without a term."""
    question = step.question
    _devices.update(machine.device.name for machine in question.cluster.workers if machine.device is not None)
    framework, cluster = term.framework(step.framework), term.cluster(question.cluster)
    with term.prices():
        layout = term.layout(step.space.layout(0))
        program = lower(question.workload, layout, framework, cluster.devices_per_node)
        return term.step_s(simulate(term.program(program), cluster, framework))


def ablated(case: Case) -> list[float] | None:
    """Errors of a case: as shipped, then without each term; None where it takes too long."""
    step = step_of(case)
    assert isinstance(step, Step)
    begun = time.perf_counter()
    found = [without(step, Term(name="as shipped"))]
    if time.perf_counter() - begun > _LONGEST_S:
        return None
    found += [without(step, term) for term in TERMS]
    return [seconds / case.measured_s - 1.0 for seconds in found]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--rows", type=int, default=16)
    given = parser.parse_args()
    columns: dict[str, np.ndarray[Any, Any]] = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for family in shipped_families():
            if given.families and family.name not in given.families:
                continue
            pairs = [(case, step) for case in rows_of(family).cases if isinstance(step := step_of(case), Step)]
            if not pairs:
                continue
            chosen = [pairs[index][0] for index in spread_out([step for _, step in pairs], given.rows)]
            errors = [found for found in pool.map(ablated, chosen) if found is not None]
            if errors:
                columns[f"{family.name} ({len(errors)})"] = 100.0 * np.abs(np.array(errors)).mean(axis=0)
            if len(errors) < len(chosen):
                print(f"{family.name}: {len(chosen) - len(errors)} rows take too long to simulate", flush=True)
    print(f"{'mean absolute error, %':40}", *(f"{name:>22}" for name in columns))
    print(f"{'as shipped':40}", *(f"{means[0]:22.1f}" for means in columns.values()))
    for number, term in enumerate(TERMS, start=1):
        moved = [means[number] - means[0] for means in columns.values()]
        note = "" if any(abs(one) >= 0.05 for one in moved) else "   moves nothing"
        print(f"without {term.name:32}", *(f"{one:+22.1f}" for one in moved), note)


if __name__ == "__main__":
    main()
