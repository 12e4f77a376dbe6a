"""One training step of GPT-3 175B on 16,384 ranks: 2,048 hgx-h100 nodes, rails, tp 8 x pp 16 x dp 128.

    python benchmarks/sixteen_k.py

1F1B and interleaved (six chunks a stage), gradients in buckets of 25 MiB reduced beside the backward pass; sound, with
one straggler and one degraded NIC, and with other jobs on the NICs of one leaf group. Wall time of simulate() in
process, best of three; peak memory so far.
"""

from __future__ import annotations

import dataclasses
import resource
import time

from clustersim.cluster.background import Background
from clustersim.cluster.cluster import Cluster, SlowNic, SlowRank
from clustersim.layout.layout import AllReduce, Layout, Mesh, Pipeline, Precision, SyncRule, even_boundaries
from clustersim.program.lower import lower
from clustersim.scenario.load import question
from clustersim.scenario.question import Question
from clustersim.simulate.simulate import simulate


def asked() -> Question:
    """The model, the cluster, the framework."""
    tree = {
        "schema_version": 1, "name": "16k", "model": "gpt3-175b", "framework": "megatron-lm",
        "training": {"global_batch": 2048, "sequence": 2048, "precision": "bf16", "optimizer": "adam"},
        "cluster": {"nodes": {"hgx-h100": 2048}, "fabric": {"kind": "rail-optimized", "nodes_per_leaf": 32}},
    }  # fmt: skip
    return question(tree, "16k")


def layout(virtual: int) -> Layout:
    """tp 8 x pp 16 x dp 128."""
    return Layout(
        mesh=Mesh(dp=128, tp=8, pp=16), micro_batch=1, sequence_parallel=True,
        pipeline=Pipeline(
            schedule="interleaved" if virtual > 1 else "1f1b", virtual_stages=virtual,
            boundaries=even_boundaries(96, 16 * virtual),
        ),
        recompute="selective", precision=Precision(compute="bf16", gradient="fp32", optimizer="fp32"),
        order="tp-dp-pp",
        sync=(
            SyncRule(reduce_in_node=False, scheme=AllReduce(algorithm="ring", bucket_bytes=25 * 2**20, overlap=True)),
        ),
    )  # fmt: skip


def clusters(sound: Cluster) -> list[tuple[str, Cluster]]:
    """The cluster, and what may be wrong with it."""
    straggler, nic = SlowRank(rank=17, slowdown=1.3), SlowNic(node=500, nic=3, speed=0.5)
    others = Background(link="nic", share=0.3, at=tuple(range(32)))
    return [
        ("sound", sound),
        ("one straggler", dataclasses.replace(sound, faults=(straggler,))),
        ("one slow NIC", dataclasses.replace(sound, faults=(nic,))),
        ("both", dataclasses.replace(sound, faults=(straggler, nic))),
        ("other jobs", dataclasses.replace(sound, background=(others,))),
    ]


def main() -> None:
    """Print the table."""
    found = asked()
    print(f"{'schedule':12} {'cluster':14} {'step':>9} {'wall':>9} {'x sound':>8} {'classes':>8} {'events':>8} "
          f"{'events/s':>9} {'peak':>7}")  # fmt: skip
    for name, virtual in (("1f1b", 1), ("interleaved", 6)):
        program = lower(found.workload, layout(virtual), found.framework, 8)
        sound_s = 0.0
        for what, cluster in clusters(found.cluster):
            walls = []
            for _ in range(3):
                start = time.perf_counter()
                result = simulate(program, cluster, found.framework)
                walls.append(time.perf_counter() - start)
            wall = min(walls)
            sound_s = sound_s or wall
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{name:12} {what:14} {result.step_s:>7.4f} s {wall:>7.3f} s {wall / sound_s:>8.1f} "
                f"{result.classes:>8} {result.events:>8,} {result.events / wall:>9,.0f} {peak:>4.0f} MB"
            )


if __name__ == "__main__":
    main()
