"""Predicted against measured step times on this machine: ranks on its cores over gloo.

    python benchmarks/local_accuracy.py [--json FILE] [--profile NAME] [--repeats 3] [--quick]

Two model sizes are for calibration only, two others are for the test, each in layouts of 1 to 4 worker ranks:
all-reduce (overlapped or not, small and large buckets, gradients in two types, micro-batches of several sizes,
recomputation) and parameter servers (dedicated, beside workers, cut finely or not, optimizer on either side). Every
round runs every layout of every size once, so that calibration and test see the same drift. A run during which other
processes took more than 8 % of the CPU time is repeated, up to `--patience` times, and the least disturbed one counts.
The whole takes at most `--minutes`: retries and rounds that there is no time for are left out. Needs torch
(`clustersim[run]`) and Linux. Without `--profile` the machine is profiled first. The last line says whether the goal
was met: a mean error of the calibrated predictions within 10 %, or within the 90th percentile of what repeats of a run
miss their median by.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from local_scoring import MOST_RANKS, Measured, evaluate, said, show

from clustersim import files
from clustersim.compare import Run, quantile
from clustersim.execute.disturbance import QUIET, Others
from clustersim.execute.execute import run_task
from clustersim.execute.launch import Launcher, cores
from clustersim.execute.probe import probe
from clustersim.execute.probe_samples import Probe
from clustersim.execute.profile_files import write_profiles
from clustersim.execute.task import Task
from clustersim.hardware.kernel import Dtype
from clustersim.layout.layout import (
    AllReduce,
    Bsp,
    Layout,
    Mesh,
    ParameterServer,
    Pipeline,
    Precision,
    Recompute,
    Scheme,
    SyncRule,
)
from clustersim.program.lower import lower
from clustersim.scenario.load import question
from clustersim.scenario.question import Question

NAME = "benchmark-host"
# (layers, hidden)
CALIBRATION_SIZES = ((3, 128), (4, 256))
TEST_SIZES = ((4, 192), (6, 256))
HEAD_DIM = 64
SEQUENCE = 64
GLOBAL_BATCH = 12
WARMUP_STEPS = 2
MEASURED_STEPS = 8
# Seconds of profiling.
PROFILE_S, QUICK_S = 75.0, 25.0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- layouts


def all_reduce(overlap: bool, bucket_mib: float = 4.0) -> AllReduce:
    return AllReduce(algorithm="ring", bucket_bytes=bucket_mib * 2**20, overlap=overlap)


def served(
    dedicated: int, colocated: int, partition_mib: float = 2.0, optimizer_at: Literal["server", "worker"] = "server"
) -> ParameterServer:
    return ParameterServer(
        dedicated=dedicated,
        colocated=colocated,
        dedicated_parts=1 if dedicated else 0,
        colocated_parts=1 if colocated else 0,
        consistency=Bsp(),
        bucket_bytes=4 * 2**20,
        partition_bytes=partition_mib * 2**20,
        optimizer_at=optimizer_at,
    )


def layout(
    dp: int, scheme: Scheme, micro_batch: int = 3, gradient: Dtype = "fp32", recompute: Recompute = "none"
) -> Layout:
    return Layout(
        mesh=Mesh(dp=dp, tp=1, pp=1),
        micro_batch=micro_batch,
        sequence_parallel=False,
        pipeline=Pipeline(schedule="1f1b", virtual_stages=1, boundaries=(0,)),
        recompute=recompute,
        precision=Precision(compute="fp32", gradient=gradient, optimizer="fp32"),
        order="tp-dp-pp",
        sync=(SyncRule(reduce_in_node=False, scheme=scheme),),
    )


LAYOUTS = (
    layout(1, all_reduce(False)),
    layout(1, all_reduce(False), micro_batch=12),
    layout(1, all_reduce(False), recompute="full"),
    layout(2, all_reduce(True)),
    layout(2, all_reduce(True, 0.5)),
    layout(2, all_reduce(False), micro_batch=6),
    layout(2, all_reduce(False), gradient="bf16"),
    layout(3, all_reduce(True), micro_batch=2),
    layout(4, all_reduce(True)),
    layout(4, all_reduce(False, 16.0), micro_batch=1),
    layout(1, served(1, 0)),
    layout(2, served(2, 0)),
    layout(2, served(1, 0, partition_mib=0.25)),
    layout(2, served(0, 2), micro_batch=2),
    layout(2, served(0, 2, optimizer_at="worker")),
    layout(4, served(0, 4)),
)


def ask(size: tuple[int, int], name: str, framework: str) -> Question:
    """The question of one model size on this host, with server processes beside the workers."""
    layers, hidden = size
    return question(
        {
            "schema_version": 1,
            "name": f"gpt-{layers}x{hidden}",
            "model": {"layers": layers, "hidden": hidden, "heads": hidden // HEAD_DIM, "vocab": 256},
            "training": {"global_batch": GLOBAL_BATCH, "sequence": SEQUENCE, "precision": "fp32"},
            "framework": framework,
            "cluster": {"nodes": {name: 1}, "servers": {name: f"0..{MOST_RANKS}"}},
        },
        "benchmark",
    )


# ------------------------------------------------------------------------------------------------------- measuring


def wait_until_quiet(limit_s: float) -> None:
    """Wait until others leave the CPU alone for a second, at most so long."""
    begin = time.monotonic()
    while time.monotonic() - begin < limit_s:
        others = Others()
        time.sleep(1.0)
        if others.share() < QUIET:
            return


def measure(cases: Sequence[Measured], repeats: int, patience: int, until_s: float) -> list[float]:
    """Round by round, every case once; the sizes of one layout follow each other. How much others disturbed.

    No round begins that would end after `until_s` at the pace of those before; runs are repeated only while all rounds
    are ahead of their time."""
    begin = time.monotonic()
    disturbed: list[float] = []
    with Launcher() as launcher:
        for number in range(repeats):
            now = time.monotonic()
            if number and now + (now - begin) / number > until_s:
                say(f"no time for round {number + 1}")
                break
            for index, case in enumerate(cases):
                tries: list[tuple[float, Run]] = []
                due_s = begin + (until_s - begin) * (number + index / len(cases)) / repeats
                while not tries or (tries[-1][0] > QUIET and len(tries) <= patience and time.monotonic() < due_s):
                    if tries:
                        wait_until_quiet(3.0)
                    others = Others()
                    run = run_task(task_of(case, number), progress=lambda _: None, launcher=launcher)
                    tries.append((others.share(), run))
                share, run = min(tries, key=lambda one: one[0])
                disturbed.append(share)
                case.runs.append(run)
                say(
                    f"[{time.monotonic() - begin:5.0f} s] round {number + 1}/{repeats}, {index + 1}/{len(cases)}: "
                    f"{case.size[0]}x{case.size[1]} {said(case.layout)}: {case.medians[-1] * 1e3:.1f} ms, "
                    f"others {share:.0%}" + (f" ({len(tries)} tries)" if len(tries) > 1 else "")
                )
    return disturbed


def task_of(case: Measured, seed: int) -> Task:
    program = lower(case.question.workload, case.layout, case.question.framework, MOST_RANKS)
    return Task(
        workload=case.question.workload, layout=case.layout, program=program, program_digest=files.digest(program),
        device_kind="cpu", steps=MEASURED_STEPS, warmup=WARMUP_STEPS, seed=seed, timeout_s=60.0,
        devices_per_node=MOST_RANKS, share_devices=False, weights=None,
    )  # fmt: skip


def profile(folder: Path, quick: bool, patience: int) -> str:
    """Profile this host into `folder`; the name of the framework."""
    tries: list[tuple[float, Probe]] = []
    while not tries or (tries[-1][0] > QUIET and len(tries) <= min(1, patience)):
        wait_until_quiet(15.0)
        say("profiling this machine")
        others = Others()
        found = probe(QUICK_S if quick else PROFILE_S, ranks=(1, 2, 3, MOST_RANKS), progress=say)
        tries.append((others.share(), found))
        say(f"profiled in {found.took_s:.0f} s; others took {tries[-1][0]:.0%} of the CPU time")
    return write_profiles(min(tries, key=lambda one: one[0])[1], NAME, folder / "hwprofiles").framework


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything here, too")
    parser.add_argument("--profile", help="a host profile made by `clustersim profile`, instead of a fresh one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patience", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=7.5, help="stop after so many minutes")
    parser.add_argument("--quick", action="store_true", help="one small size each, one round: does everything work?")
    parser.add_argument("--keep", type=Path, help="keep the profile and all runs in this folder")
    given = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="clustersim-benchmark-") as name:
        folder = given.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        # Profiles of this run go before the user's own, and nothing is written among them.
        target = given.json.resolve() if given.json else None
        folder = folder.resolve()
        os.chdir(folder)
        if given.profile:
            host, framework = given.profile, f"clustersim-{given.profile}"
        else:
            host, framework = NAME, profile(folder, given.quick, given.patience)
        sizes = ((*CALIBRATION_SIZES[:1], *TEST_SIZES[:1])) if given.quick else (*CALIBRATION_SIZES, *TEST_SIZES)
        cases = [
            Measured(question=ask(size, host, framework), layout=one, size=size, test=size in TEST_SIZES, runs=[])
            for one in LAYOUTS
            for size in sorted(sizes)
        ]
        rounds = 1 if given.quick else given.repeats
        result = benchmark(cases, rounds, given.patience, begin + 60.0 * given.minutes, given.keep and folder)
    result["took_s"] = time.monotonic() - begin
    result["cores"] = cores()
    show(result)
    say(f"took {result['took_s']:.0f} s")
    if target is not None:
        files.write_text(target, json.dumps(result, indent=1) + "\n")


def benchmark(
    cases: Sequence[Measured], repeats: int, patience: int, until_s: float, keep: Path | None
) -> dict[str, Any]:
    disturbed = measure(cases, repeats, patience, until_s)
    if keep is not None:
        for case in cases:
            for number, run in enumerate(case.runs):
                label = f"{case.size[0]}x{case.size[1]}-{LAYOUTS.index(case.layout)}-{number}.json"
                files.save(run, keep / "runs" / label)
    return {**evaluate(cases), "others_median": statistics.median(disturbed), "others_p90": quantile(disturbed, 0.9)}


if __name__ == "__main__":
    main()
