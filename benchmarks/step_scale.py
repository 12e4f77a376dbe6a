"""A data-parallel step on 8 to 16,384 ranks: 32 layers, 0.5 ms forward and 1 ms backward each, a 64 MiB allreduce after
each backward pass, beside the passes that follow.

    python benchmarks/step_scale.py

Nodes of 8 GPUs, 300 GB/s a GPU inside, one 25 GB/s NIC a GPU, rails below leaves. Wall time of simulate() in process,
best of three; events must not depend on the number of ranks.
"""

from __future__ import annotations

import dataclasses
import resource
import time

from clustersim.cluster.cluster import Cluster
from clustersim.hardware.framework import Framework, HostCost, Overlap
from clustersim.hardware.link import Link
from clustersim.hardware.provenance import Provenance
from clustersim.layout.layout import Mesh
from clustersim.program.program import Collective, Compute, Op, Position, Program, Work
from clustersim.scenario.load import question
from clustersim.simulate.simulate import simulate
from clustersim.timeline import OpId

LAYERS, FORWARD_S, BACKWARD_S, BYTES = 32, 0.5e-3, 1e-3, 64 * 2**20
BY_HAND = Provenance(method="estimate", source="given by the benchmark")


def framework() -> Framework:
    """Every layer takes exactly what driving it takes: kernels are none."""
    return Framework(
        name="exact", attention="flash", fused_elementwise=True, gradient_dtype="fp32",
        gradient_accumulation="fused",
        host=HostCost(
            per_layer_forward_s=FORWARD_S, per_layer_backward_s=BACKWARD_S, per_micro_batch_s=0.0, per_step_s=0.0
        ),
        overlap=Overlap(gradient_reduce=True, parameter_gather=True, pipeline_send=True), scatter_gather=False,
        memory_overhead_bytes=0.0, fragmentation=0.0, provenance=BY_HAND,
    )  # fmt: skip


def wire(like: Link, rate: float, alpha_s: float) -> Link:
    """A link of one rate and one alpha."""
    segment = dataclasses.replace(like.segments[0], from_bytes=0.0, alpha_s=alpha_s, efficiency=1.0)
    return dataclasses.replace(like, rate_bytes_per_s=rate, launch_s=0.0, segments=(segment,))


def cluster(ranks: int) -> Cluster:
    """The fabric, for so many ranks."""
    tree = {
        "schema_version": 1, "name": "scale", "model": "gpt3-125m",
        "training": {"global_batch": ranks, "sequence": 128},
        "cluster": {"nodes": {"hgx-h100": ranks // 8}, "fabric": {"kind": "rail-optimized", "nodes_per_leaf": 32}},
    }  # fmt: skip
    found = question(tree, "scale").cluster
    machine = found.workers[0]
    assert machine.interconnect is not None
    node = dataclasses.replace(machine.node, nic=dataclasses.replace(machine.node.nic, rate_bytes_per_s=None))
    exact = dataclasses.replace(
        machine, node=node, interconnect=wire(machine.interconnect, 300e9, 0.5e-6), nic=wire(machine.nic, 25e9, 5e-6),
        collectives=None,
    )  # fmt: skip
    return dataclasses.replace(found, workers=(exact,))


def program(ranks: int) -> Program:
    """All layers forward, then backward, each with its allreduce."""
    ops: list[Op] = []
    for layer in range(LAYERS):
        ops.append(Compute(id=OpId(0, 0, 0, "forward", f"L{layer}", "compute"), after=(), work=0))
    for layer in reversed(range(LAYERS)):
        ops.append(Compute(id=OpId(0, 0, 0, "backward", f"L{layer}", "compute"), after=(), work=1))
        ops.append(
            Collective(
                id=OpId(0, -1, 0, "synchronise", f"L{layer}", "all-reduce"), stream="collective",
                after=((0, len(ops) - 1),), kind="all_reduce", group="dp", algorithm="ring", bytes=BYTES,
            )
        )  # fmt: skip
    works = (
        Work(kernels=(), inner=(), forward_layers=1, backward_layers=0),
        Work(kernels=(), inner=(), forward_layers=0, backward_layers=1),
    )
    return Program(
        mesh=Mesh(dp=ranks, tp=1, pp=1), order="tp-dp-pp",
        positions=(Position(role="worker", stage=0, ops=tuple(ops)),),
        works=works, buckets=(), servers=(), share_parts=0,
    )  # fmt: skip


def main() -> None:
    """Print the table."""
    print(f"{'ranks':>7} {'step':>11} {'wall':>10} {'x of 8':>7} {'events':>7} {'events/s':>10} {'peak':>8}")
    first = 0.0
    for ranks in (8, 64, 256, 1024, 4096, 16384):
        described, hardware, costs = program(ranks), cluster(ranks), framework()
        walls = []
        for _ in range(3):
            start = time.perf_counter()
            found = simulate(described, hardware, costs)
            walls.append(time.perf_counter() - start)
        wall = min(walls)
        first = first or wall
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{ranks:>7,} {found.step_s * 1e3:>8.3f} ms {wall * 1e3:>7.1f} ms {wall / first:>7.1f} {found.events:>7} "
            f"{found.events / wall:>10,.0f} {peak:>5.0f} MB"
        )


if __name__ == "__main__":
    main()
