"""Ring, tree, hierarchical and halving-doubling allreduce on 8 to 16,384 ranks: simulated time, closed form, and cost.

Run in the checkout: `python benchmarks/collective_scale.py`. Eight GPUs a node behind a switch of 300 GB/s and 500 ns,
a NIC of 25 GB/s and 5 us each, one switch between nodes. Wall time is the best of five, from the description of the
cluster to the price, in a process that has imported everything. Memory is the peak of what Python and NumPy allocate.
For scale: ASTRA-sim (518bd51, analytical congestion-unaware backend, ring on [Ring 8, Switch N/8], 2-core x86) takes
0.16 s at 256 ranks, 4 s at 1,024 and 117 s at 4,096.
"""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace

from clustersim.cluster.cluster import Cluster, Machine, SlowNic
from clustersim.cluster.fabric import Fabric
from clustersim.cluster.node import Host, Interconnect, Nics, Node
from clustersim.estimate.collectives import closed_form_s, two_levels
from clustersim.hardware.link import Link, LinkKind, Segment
from clustersim.hardware.provenance import Provenance
from clustersim.layout.layout import Algorithm
from clustersim.simulate.collectives.standalone import price_collective

ALGORITHMS: tuple[Algorithm, ...] = ("ring", "tree", "hierarchical", "halving-doubling")
RANKS = (8, 64, 256, 1024, 4096, 16384)
SIZES = {"1 MiB": 2.0**20, "64 MiB": 2.0**26, "1 GiB": 2.0**30}
# What the slowest of them may take at 16,384 ranks.
MOST_S = 0.010
_BY_HAND = Provenance(method="estimate", source="written by hand")


def link(kind: LinkKind, rate: float, alpha: float) -> Link:
    """A link of one alpha and one rate."""
    segments = (Segment(from_bytes=0.0, alpha_s=alpha, efficiency=1.0),)
    return Link(name="by hand", kind=kind, rate_bytes_per_s=rate, segments=segments, provenance=_BY_HAND)


def cluster_of(ranks: int, fabric: Fabric | None = None) -> Cluster:
    """Nodes of eight GPUs."""
    node = Node(
        name="eight",
        device="by hand",
        devices=8,
        interconnect=Interconnect(kind="switch", link="by hand"),
        nic=Nics(count=8, link="by hand"),
        host=Host(cores=1, memory_bytes=1.0, memory_bandwidth_bytes_per_s=1.0, reduce_rate_bytes_per_s=1.0),
        provenance=_BY_HAND,
    )
    machine = Machine(
        node=node,
        count=ranks // 8,
        device=None,
        interconnect=link("nvlink", 300e9, 5e-7),
        nic=link("infiniband", 25e9, 5e-6),
        pcie=None,
        collectives=None,
    )
    return Cluster(workers=(machine,), servers=(), fabric=fabric or Fabric(kind="one-switch", hop_latency_s=0.0))


def measured(cluster: Cluster, algorithm: Algorithm, size: float) -> tuple[float, float]:
    """(best wall time of five, peak bytes allocated) of one price."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        price_collective(cluster, "all_reduce", algorithm, size)
        best = min(best, time.perf_counter() - start)
    tracemalloc.start()
    price_collective(cluster, "all_reduce", algorithm, size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return best, peak


def main() -> None:
    """Print a line for each algorithm, size and number of ranks."""
    print("algorithm           size  ranks    simulated  closed form    ratio      wall events     peak")
    slowest = 0.0
    for algorithm in ALGORITHMS:
        for name, size in SIZES.items():
            for ranks in RANKS:
                cluster = cluster_of(ranks)
                found = price_collective(cluster, "all_reduce", algorithm, size)
                levels = two_levels(cluster, ranks // 8, 8, None)
                assert levels is not None
                form = closed_form_s("all_reduce", algorithm, levels, size)
                assert form is not None
                wall, peak = measured(cluster, algorithm, size)
                if ranks == RANKS[-1]:
                    slowest = max(slowest, wall)
                prices = f"{found.seconds * 1e3:9.4f} ms {form * 1e3:9.4f} ms {found.seconds / form:8.6f}"
                cost = f"{wall * 1e3:6.2f} ms {found.events:6} {peak / 1e6:5.1f} MB"
                print(f"{algorithm:17} {name:>7} {ranks:6} {prices} {cost}")
    print(
        "\nthe same on 16,384 ranks that are not alike, 1 GiB: rails of 32 nodes, leaves 4:1, three slow NICs; and ECMP"
    )
    slow = tuple(SlowNic(node=node, nic=nic, speed=0.5) for node, nic in ((3, 1), (1000, 7), (2047, 0)))
    uneven = {
        "rails": Fabric(kind="rail-optimized", nodes_per_leaf=32, oversubscription=4.0, hop_latency_s=0.0),
        "ecmp": Fabric(
            kind="leaf-spine", nodes_per_leaf=16, oversubscription=4.0, hop_latency_s=0.0, routing="ecmp", spines=16
        ),
    }
    for name, fabric in uneven.items():
        for algorithm in ALGORITHMS:
            cluster = replace(cluster_of(RANKS[-1], fabric), faults=slow)
            found = price_collective(cluster, "all_reduce", algorithm, SIZES["1 GiB"])
            wall, peak = measured(cluster, algorithm, SIZES["1 GiB"])
            cost = f"{wall * 1e3:6.2f} ms {found.events:6} {peak / 1e6:5.1f} MB"
            print(f"{algorithm:17} {name:>7} {RANKS[-1]:6} {found.seconds * 1e3:9.4f} ms {cost}")
    verdict = "within" if slowest <= MOST_S else "beyond"
    print(f"\nslowest at {RANKS[-1]:,} ranks that are alike: {slowest * 1e3:.2f} ms ({verdict} {MOST_S * 1e3:.0f} ms)")


if __name__ == "__main__":
    main()
