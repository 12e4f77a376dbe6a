"""How far the mean step of a folded simulation is from that of every rank, under noise.

A class of ranks stands for its slowest member. That is exact for one barrier; in nested groups (tensor parallelism
inside data parallelism, pipelines) the slowest replica of one stage need not be the slowest of the next. Prints, for
some layouts and distributions, the mean step of every rank over that without noise, and the bias of folding; beside it
that of the simpler rule that takes the largest draw of the whole class in every op.

    python benchmarks/noise_bias.py [--steps 200]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np

from clustersim.cluster.noise import Distribution, Exponential, Lognormal, Noise, Pareto
from clustersim.program.lower import lower
from clustersim.scenario.load import question
from clustersim.search.search import make_plan
from clustersim.simulate import noise as noise_of_tasks
from clustersim.simulate.simulate import simulate

SCENARIO = {
    "schema_version": 1,
    "name": "noise bias",
    "model": {"layers": 8, "hidden": 1024, "heads": 16, "vocab": 32000},
    "training": {"global_batch": 128, "sequence": 1024},
    "framework": "megatron-lm",
    "cluster": {"nodes": {"dgx-a100-80g": 4}, "fabric": "rail-optimized", "servers": {"cpu-server-200g": "0..2"}},
    "search": {"simulate": 1},
}
LAYOUTS = {
    "dp 32": {"dp": 32, "tp": 1, "pp": 1, "micro_batch": 4, "sync": "allreduce"},
    "dp 32, 4 micro-batches": {"dp": 32, "tp": 1, "pp": 1, "micro_batch": 1, "sync": "allreduce"},
    "tp 4 in dp 8, 16 micro-batches": {"dp": 8, "tp": 4, "pp": 1, "micro_batch": 1, "sync": "allreduce"},
    "pp 4 in dp 8, 16 micro-batches": {"dp": 8, "tp": 1, "pp": 4, "micro_batch": 1, "sync": "allreduce"},
    "tp 2, pp 4 in dp 4": {"dp": 4, "tp": 2, "pp": 4, "micro_batch": 1, "sync": "allreduce"},
    "dp 32, weights sharded": {"dp": 32, "tp": 1, "pp": 1, "micro_batch": 4, "sync": "sharded", "sharded_stage": 3},
    "dp 32, 2 servers": {"dp": 32, "tp": 1, "pp": 1, "micro_batch": 4, "sync": "parameter-server", "servers": 2},
}
_CLASS = noise_of_tasks._class
SHAPES: dict[str, Distribution] = {
    "lognormal 0.05": Lognormal(sigma=0.05),
    "lognormal 0.2": Lognormal(sigma=0.2),
    "exponential 0.2": Exponential(tail=0.2),
    "pareto 4": Pareto(shape=4.0),
}


def main() -> None:
    """Print one line a layout and distribution."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    print(
        f"{'layout':31} {'noise':15} {'every':5} {'every rank':>10} {'±':>7} {'folded':>8} {'by op':>9}   "
        "CPU s, every rank and folded"
    )
    for name, layout in LAYOUTS.items():
        asked = question({**SCENARIO, "layout": layout}, "noise bias")
        plan = make_plan(asked, workers=1)
        program = lower(plan.workload, plan.layout, plan.framework, plan.machines.devices_per_node)
        quiet = simulate(program, asked.cluster, plan.framework).step_s
        for shape_name, shape in SHAPES.items():
            for every in ("op", "step"):
                cluster = replace(asked.cluster, noise=Noise(every=every, worker=shape))  # type: ignore[arg-type]
                begin = time.process_time()
                found = simulate(program, cluster, plan.framework, steps=steps, fold=False, seed=1)
                times = np.array(found.step_times_s)
                unfolded_wall = time.process_time() - begin
                begin = time.process_time()
                folded = simulate(program, cluster, plan.framework, steps=4 * steps, seed=2).step_s
                folded_wall = time.process_time() - begin
                others = [folded]
                if every == "op":
                    with patch.object(noise_of_tasks, "_class", _joined_after_every_op):
                        others.append(simulate(program, cluster, plan.framework, steps=4 * steps, seed=2).step_s)
                mean, error = times.mean(), times.std() / np.sqrt(steps) / times.mean()
                biases = [f"{100 * (other / mean - 1):+6.2f} %" for other in others]
                print(
                    f"{name:31} {shape_name:15} {every:5} {mean / quiet:10.4f} {100 * error:5.2f} % "
                    f"{'  '.join(biases):19}   {unfolded_wall:5.1f} {folded_wall:5.1f}",
                    flush=True,
                )


def _joined_after_every_op(*arguments: Any) -> noise_of_tasks._Class:
    """Stretches of one op: the largest draw of the whole class each time."""
    one = _CLASS(*arguments)
    return replace(one, begins=tuple(range(len(one.ops))), wraps=False)


if __name__ == "__main__":
    main()
