"""Routes on a fabric of 16,384 hosts: by arithmetic, one at a time and many at once, against Dijkstra on the graph.

python benchmarks/routes.py [hosts]
"""

from __future__ import annotations

import random
import resource
import sys
import time
from typing import Any

import networkx
import numpy as np

from clustersim.cluster.cluster import Cluster
from clustersim.cluster.graph import graph
from clustersim.cluster.wiring import Wiring
from clustersim.scenario.load import question

PAIRS, SEARCHES = 100_000, 20


def fabric(hosts: int, **keys: Any) -> Cluster:
    """`hosts` nodes of one GPU and one NIC below leaves of 32."""
    tree = {
        "schema_version": 1, "name": "routes", "model": "gpt3-125m",
        "training": {"global_batch": hosts, "sequence": 128, "precision": "fp16"},
        "cluster": {"nodes": {"p3-2xlarge": hosts}, "fabric": {"kind": "leaf-spine", "nodes_per_leaf": 32, **keys}},
    }  # fmt: skip
    return question(tree, "routes").cluster


def main() -> None:
    """Print the table."""
    hosts = int(sys.argv[1]) if len(sys.argv) > 1 else 16_384
    start = time.process_time()
    wiring = Wiring(fabric(hosts))
    built_s = time.process_time() - start
    rng = random.Random(0)
    pairs = [tuple(rng.sample(range(hosts), 2)) for _ in range(PAIRS)]
    start = time.process_time()
    for source, target in pairs:
        wiring.route(source, target)
    one_s = (time.process_time() - start) / PAIRS
    sources, targets = (np.array(ends) for ends in zip(*pairs, strict=True))
    start = time.process_time()
    wiring.between(sources, targets)
    many_s = (time.process_time() - start) / PAIRS
    small = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.process_time()
    wires = graph(fabric(hosts))
    graph_s = time.process_time() - start
    start = time.process_time()
    for source, target in pairs[:SEARCHES]:
        networkx.dijkstra_path(wires, f"n{source}.gpu0", f"n{target}.gpu0")
    search_s = (time.process_time() - start) / SEARCHES
    large = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{hosts:,} hosts; to build: wiring {built_s:.3f} s, {small:.0f} MB; graph {graph_s:.2f} s, {large:.0f} MB")
    for name, seconds in (
        ("route(), one pair", one_s), ("between(), 100,000 pairs", many_s), ("networkx dijkstra_path", search_s),
    ):  # fmt: skip
        print(f"{name:26} {seconds * 1e6:10.2f} us a route  {search_s / seconds:10,.0f} x as fast as Dijkstra")


if __name__ == "__main__":
    main()
