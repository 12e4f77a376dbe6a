"""Predicted against measured step times on one GPU: profile it, train small models on it, print both. One command:

    python benchmarks/gpu_accuracy.py [--json FILE] [--profile NAME] [--keep FOLDER] [--minutes 9.5] [--rehearse]

Without `--profile` (a host profile made by `clustersim profile`) the machine is profiled first, as `--quick` does; with
`--keep` that profile and all runs stay in FOLDER. Then GPTs and a Llama of several sizes, sequences and batches train
a few steps each in bf16 on GPU 0, in an NCCL group of one rank, as `clustersim run` runs them. None of these rows is
used for any constant: `profiled` is predicted with the host's own profile, `as shipped` with the profiles that come
with clustersim, where these know the GPU. Two more checks are measured and not predicted: what an all-reduce in a group
of one NCCL rank costs, and two ranks that share the GPU over gloo, whose losses must equal one rank's. `--rehearse`
runs tiny models on the CPU instead, to see that everything works. A model that there is no time for is left out and
told. Needs torch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustersim import files
from clustersim.compare import Run, compare, quantile
from clustersim.errors import ClustersimError, ExecutionError
from clustersim.execute.execute import run_task
from clustersim.execute.launch import Launcher
from clustersim.execute.probe import QUICK_S, probe
from clustersim.execute.profile_files import write_profiles
from clustersim.execute.task import Task
from clustersim.hardware.device import Device
from clustersim.layout.layout import AllReduce, Layout, Mesh, Pipeline, Precision, SyncRule
from clustersim.program.lower import lower
from clustersim.scenario.load import question
from clustersim.scenario.question import Question
from clustersim.simulate.simulate import simulate

NAME = "gpu-benchmark"
GOAL = 0.05
WARMUP_STEPS, MEASURED_STEPS = 4, 12
# Nodes with profiles of their own, by what the driver calls their GPUs.
SHIPPED = {"H200": "hgx-h200", "H100 80GB HBM3": "hgx-h100", "A100-SXM4-80GB": "dgx-a100-80g", "B200": "hgx-b200"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, the batch of a step, and the micro-batch."""

    name: str
    layers: int
    hidden: int
    sequence: int
    batch: int
    micro_batch: int
    llama: bool = False

    @property
    def model(self) -> dict[str, Any]:
        heads = self.hidden // 64
        if self.llama:
            return {
                "layers": self.layers, "hidden": self.hidden, "heads": self.hidden // 128, "head_dim": 128,
                "kv_heads": max(1, self.hidden // 512), "ffn_hidden": 3 * self.hidden, "vocab": 32000, "gated": True,
                "norm": "rmsnorm", "bias": False, "rotary": True, "dropout": False, "tied": False,
            }  # fmt: skip
        return {
            "layers": self.layers, "hidden": self.hidden, "heads": heads, "vocab": 50304, "positions": self.sequence,
        }  # fmt: skip


CASES = (
    Case(name="gpt-125m", layers=12, hidden=768, sequence=1024, batch=32, micro_batch=16),
    Case(name="gpt-350m", layers=24, hidden=1024, sequence=2048, batch=16, micro_batch=8),
    Case(name="gpt-1.3b", layers=24, hidden=2048, sequence=2048, batch=8, micro_batch=4),
    Case(name="llama-1b", layers=16, hidden=2048, sequence=4096, batch=4, micro_batch=2, llama=True),
    Case(name="gpt-125m small batch", layers=12, hidden=768, sequence=512, batch=4, micro_batch=1),
    Case(name="gpt-760m", layers=24, hidden=1536, sequence=1024, batch=16, micro_batch=16),
    Case(name="gpt-350m long", layers=24, hidden=1024, sequence=8192, batch=2, micro_batch=1),
    Case(name="llama-1b short", layers=16, hidden=2048, sequence=512, batch=32, micro_batch=16, llama=True),
)
TINY = (
    Case(name="gpt tiny", layers=2, hidden=128, sequence=64, batch=4, micro_batch=2),
    Case(name="llama tiny", layers=2, hidden=128, sequence=64, batch=4, micro_batch=4, llama=True),
)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def ask(case: Case, node: str, framework: str, precision: str) -> Question:
    return question(
        {
            "schema_version": 1,
            "name": "gpu-accuracy",
            "model": case.model,
            "training": {"global_batch": case.batch, "sequence": case.sequence, "precision": precision},
            "framework": framework,
            "cluster": {"nodes": {node: {"count": 1, "devices": 1}}},
        },
        "benchmark",
    )


def laid_out(asked: Question, case: Case, dp: int) -> Layout:
    """All-reduce after the backward pass: with one rank nothing is sent."""
    training = asked.workload.training
    compute = training.precision
    gradient = asked.framework.gradient_dtype if compute != "fp32" else compute
    return Layout(
        mesh=Mesh(dp=dp, tp=1, pp=1),
        micro_batch=max(1, case.micro_batch // dp),
        sequence_parallel=False,
        pipeline=Pipeline(schedule="1f1b", virtual_stages=1, boundaries=(0,)),
        recompute="none",
        precision=Precision(compute=compute, gradient=gradient, optimizer="fp32"),
        order="tp-dp-pp",
        sync=(
            SyncRule(reduce_in_node=False, scheme=AllReduce(algorithm="ring", bucket_bytes=256 * 2**20, overlap=False)),
        ),
    )


def task_of(asked: Question, layout: Layout, cpu: bool) -> Task:
    program = lower(asked.workload, layout, asked.framework, 1)
    return Task(
        workload=asked.workload, layout=layout, program=program, program_digest=files.digest(program),
        device_kind="cpu" if cpu else "gpu", steps=MEASURED_STEPS, warmup=WARMUP_STEPS, seed=0, timeout_s=120.0,
        devices_per_node=1, share_devices=layout.mesh.dp > 1, weights=None,
    )  # fmt: skip


def row_of(case: Case, asked: Question, layout: Layout, run: Run, shipped: Question | None) -> dict[str, Any]:
    """Measured against predicted, step and phases of the step."""
    program = lower(asked.workload, layout, asked.framework, 1)
    found = simulate(program, asked.cluster, asked.framework)
    step = statistics.median(run.step_s)
    off = [abs(x / step - 1.0) for x in run.step_s]
    comparison = compare(found.timeline(), run.timeline, step_s=run.step_s)
    row: dict[str, Any] = {
        "model": case.name, "layers": case.layers, "hidden": case.hidden, "sequence": case.sequence,
        "batch": case.batch, "micro_batch": case.micro_batch, "measured_s": step, "repeat_p90": quantile(off, 0.9),
        "profiled_s": found.step_s, "profiled_error": found.step_s / step - 1.0,
        "phases": {p.phase: [p.seconds.predicted_s, p.seconds.measured_s] for p in comparison.phases},
        "losses": list(run.losses), "environment": run.environment, "device": run.device, "backend": run.backend,
    }  # fmt: skip
    if shipped is not None:
        told = simulate(lower(shipped.workload, layout, shipped.framework, 1), shipped.cluster, shipped.framework)
        row["shipped_s"], row["shipped_error"] = told.step_s, told.step_s / step - 1.0
    return row


def nccl_alone(*, rank: int, ranks: int, folder: Path, tell: Callable[[str], None], out: str) -> None:
    """A rank of a group of one: the host's and the device's seconds of one all-reduce, by bytes."""
    import torch
    import torch.distributed as dist

    from clustersim.execute.clock import timing_event

    torch.cuda.set_device(0)
    store = dist.FileStore(str(folder / "nccl-store"), 1)  # type: ignore[attr-defined]
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    rows = []
    for size in (2**10, 2**20, 2**28):
        data = torch.ones(size // 4, device="cuda")
        for _ in range(5):
            dist.all_reduce(data)
        torch.cuda.synchronize()
        start, stop = timing_event(), timing_event()
        start.record()
        begin = time.perf_counter()
        for _ in range(20):
            dist.all_reduce(data)
        host_s = (time.perf_counter() - begin) / 20
        stop.record()
        torch.cuda.synchronize()
        rows.append({"bytes": size, "host_s": host_s, "device_s": start.elapsed_time(stop) * 1e-3 / 20})
    files.write_text(Path(out), json.dumps({"rows": rows}))
    dist.destroy_process_group()


def alone_in_nccl(launcher: Launcher, folder: Path) -> dict[str, Any]:
    out = folder / "nccl.json"
    launcher.run(
        "gpu_accuracy:nccl_alone", ranks=1, folder=folder, arguments={"out": str(out)}, progress=say, spawn=True
    )
    return dict(json.loads(out.read_text(encoding="utf-8")))


def shared_by_two(
    launcher: Launcher, case: Case, node: str, framework: str, precision: str, cpu: bool
) -> dict[str, Any]:
    """Steps of one rank, and of two ranks on the same device over gloo: the losses must agree."""
    asked = ask(case, node, framework, precision)
    runs = [
        run_task(task_of(asked, laid_out(asked, case, dp), cpu), progress=lambda _: None, launcher=launcher)
        for dp in (1, 2)
    ]
    apart = max(abs(a / b - 1.0) for a, b in zip(runs[0].losses, runs[1].losses, strict=True))
    return {
        "model": case.name,
        "one_rank_s": statistics.median(runs[0].step_s),
        "two_ranks_s": statistics.median(runs[1].step_s),
        "losses_apart": apart,
    }


def benchmark(given: argparse.Namespace, folder: Path, until_s: float) -> dict[str, Any]:
    cpu = bool(given.rehearse)
    host = given.profile or NAME
    if not given.profile:
        found = probe(20.0 if cpu else QUICK_S, (1, 2), say, folder / "partial")
        if not cpu and not any(device.kind == "gpu" for device in found.devices):
            raise ExecutionError("PyTorch finds no GPU here; --rehearse tries everything on the CPU")
        written = write_profiles(found, host, folder / "hwprofiles")
        files.save(found, folder / "probe.json")
        say(f"profiled in {found.took_s:.0f} s: {', '.join(map(str, written.files))}")
    node, framework = (host, f"clustersim-{host}") if cpu else (f"{host}-gpu", f"clustersim-{host}")
    precision = "fp32" if cpu else "bf16"
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    result: dict[str, Any] = {"rows": rows, "left_out": failed}
    with Launcher() as launcher:
        longest_s = 0.0
        for case in TINY if cpu else CASES:
            begin = time.monotonic()
            if begin + longest_s > until_s:
                failed.append(f"{case.name}: no time")
                continue
            try:
                asked = ask(case, node, framework, precision)
                layout = laid_out(asked, case, 1)
                run = run_task(task_of(asked, layout, cpu), progress=lambda _: None, launcher=launcher)
                near = next((name for known, name in SHIPPED.items() if known in run.device), None)
                shipped = None if near is None else ask(case, near, "clustersim", precision)
                rows.append(row_of(case, asked, layout, run, shipped))
                say(f"{case.name}: {rows[-1]['measured_s'] * 1e3:.1f} ms, error {rows[-1]['profiled_error']:+.1%}")
                if given.keep:
                    files.save(run, folder / "runs" / f"{case.name.replace(' ', '-')}.json")
            except ClustersimError as error:
                failed.append(f"{case.name}: {error}")
                say(failed[-1])
            longest_s = max(longest_s, time.monotonic() - begin)
        for name, check in (
            ("nccl_alone", None if cpu else lambda: alone_in_nccl(launcher, folder)),
            (
                "shared_by_two",
                lambda: shared_by_two(launcher, (TINY if cpu else CASES)[0], node, framework, precision, cpu),
            ),
        ):
            if check is not None and time.monotonic() + longest_s < until_s:
                try:
                    result[name] = check()
                except ClustersimError as error:
                    failed.append(f"{name}: {error}")
                    say(failed[-1])
    device: Device = files.load(Device, files.profile_path("devices", node))
    result["clock"] = device.provenance.clock
    result["software"] = device.provenance.software
    result["profile_notes"] = device.provenance.notes
    errors = [abs(row["profiled_error"]) for row in rows]
    result["profiled_mean"] = statistics.mean(errors) if errors else None
    shipped_errors = [abs(row["shipped_error"]) for row in rows if "shipped_error" in row]
    result["shipped_mean"] = statistics.mean(shipped_errors) if shipped_errors else None
    return result


def show(result: dict[str, Any]) -> None:
    """The result as text."""
    print(
        f"{'model':22} {'layers x hidden':>15} {'seq':>5} {'batch':>5} {'measured':>10} {'p90':>5} "
        f"{'profiled':>18} {'as shipped':>18}"
    )
    for row in result["rows"]:
        shipped = (
            f"{row['shipped_s'] * 1e3:7.1f} ms {row['shipped_error']:+7.1%}" if "shipped_s" in row else "not stated"
        )
        print(
            f"{row['model']:22} {row['layers']:>6} x {row['hidden']:<6} {row['sequence']:>5} "
            f"{row['batch']:>2}/{row['micro_batch']:<2} {row['measured_s'] * 1e3:7.1f} ms {row['repeat_p90']:5.1%} "
            f"{row['profiled_s'] * 1e3:7.1f} ms {row['profiled_error']:+7.1%} {shipped:>18}"
        )
    print("predicted/measured in ms:")
    for row in result["rows"]:
        parts = [f"{name} {pair[0] * 1e3:.2f}/{pair[1] * 1e3:.2f}" for name, pair in row["phases"].items()]
        print(f"  {row['model']:22} {'  '.join(parts)}")
    for one in result.get("nccl_alone", {}).get("rows", ()):
        print(f"all-reduce of {one['bytes']} bytes in a group of one NCCL rank: host {one['host_s'] * 1e6:.1f} us, "
              f"device {one['device_s'] * 1e6:.1f} us")  # fmt: skip
    if "shared_by_two" in result:
        two = result["shared_by_two"]
        print(f"{two['model']}: one rank {two['one_rank_s'] * 1e3:.1f} ms, two ranks on one device over gloo "
              f"{two['two_ranks_s'] * 1e3:.1f} ms (not predicted), losses apart {two['losses_apart']:.2e}")  # fmt: skip
    for line in result["left_out"]:
        print(f"left out: {line}")
    print(f"{result['software']}; {result['clock']}")
    if result["shipped_mean"] is not None:
        print(f"mean |error| as shipped: {result['shipped_mean']:.1%}")
    if result["profiled_mean"] is not None:
        met = "met" if result["profiled_mean"] <= GOAL else "missed"
        print(
            f"mean |error| of {len(result['rows'])} models with the profile of this machine, no step time used: "
            f"{result['profiled_mean']:.1%}; goal {GOAL:.0%}: {met}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything here, too")
    parser.add_argument("--profile", help="a host profile made by `clustersim profile`, instead of a fresh one")
    parser.add_argument("--keep", type=Path, help="keep the profile and all runs in this folder")
    parser.add_argument("--minutes", type=float, default=9.5, help="begin nothing that would end after so many minutes")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU")
    given = parser.parse_args()
    begin = time.monotonic()
    target = given.json.resolve() if given.json else None
    with tempfile.TemporaryDirectory(prefix="clustersim-benchmark-") as name:
        folder = (given.keep or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        # Profiles of this run go before the user's own, and nothing is written among them.
        os.chdir(folder)
        result = benchmark(given, folder, begin + 60.0 * given.minutes)
    result["took_s"] = time.monotonic() - begin
    if target is not None:
        files.write_text(target, json.dumps(result, indent=1) + "\n")
    show(result)
    say(f"took {result['took_s']:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except ClustersimError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
