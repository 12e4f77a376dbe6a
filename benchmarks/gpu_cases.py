"""The models of gpu_accuracy.py: what is asked, what is run, and predicted against measured time and memory."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clustersim import files
from clustersim.compare import Run, compare, quantile
from clustersim.execute.task import Task
from clustersim.hardware.kernel import Dtype
from clustersim.layout.layout import AllReduce, Layout, Mesh, Pipeline, Precision, SyncRule
from clustersim.layout.memory import footprint
from clustersim.layout.space import layouts
from clustersim.program.lower import lower
from clustersim.scenario.load import question
from clustersim.scenario.question import Question
from clustersim.search.search import choices_of
from clustersim.simulate.simulate import simulate
from clustersim.validate.case import MemoryLevel
from clustersim.validate.memory import DeviceUse

WARMUP_STEPS, MEASURED_STEPS = 4, 12


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
    dropout: bool = True
    vocab: int = 50304
    precision: Dtype = "bf16"

    @property
    def model(self) -> dict[str, Any]:
        if self.llama:
            return {
                "layers": self.layers, "hidden": self.hidden, "heads": self.hidden // 128, "head_dim": 128,
                "kv_heads": max(1, self.hidden // 512), "ffn_hidden": 3 * self.hidden, "vocab": self.vocab,
                "gated": True, "norm": "rmsnorm", "bias": False, "rotary": True, "dropout": False, "tied": False,
            }  # fmt: skip
        return {
            "layers": self.layers, "hidden": self.hidden, "heads": self.hidden // 64, "vocab": self.vocab,
            "positions": self.sequence, "dropout": self.dropout,
        }  # fmt: skip


CASES = (
    Case(name="gpt-125m", layers=12, hidden=768, sequence=1024, batch=32, micro_batch=16),
    Case(name="gpt-1.3b", layers=24, hidden=2048, sequence=2048, batch=8, micro_batch=4),
    Case(name="llama-1b", layers=16, hidden=2048, sequence=4096, batch=4, micro_batch=2, llama=True, vocab=32000),
    Case(name="gpt-350m", layers=24, hidden=1024, sequence=2048, batch=16, micro_batch=8),
    Case(name="gpt-350m long", layers=24, hidden=1024, sequence=8192, batch=2, micro_batch=1),
    Case(name="gpt-125m small batch", layers=12, hidden=768, sequence=512, batch=4, micro_batch=1),
    Case(name="gpt-760m", layers=24, hidden=1536, sequence=1024, batch=16, micro_batch=16),
    Case(
        name="llama-1b short", layers=16, hidden=2048, sequence=512, batch=32, micro_batch=16, llama=True, vocab=32000
    ),
)
# Two ranks must get the losses of one: no dropout, which every rank draws for itself.
TOGETHER = replace(CASES[5], name="gpt-125m, two ranks", batch=8, micro_batch=4, dropout=False)
_TINY = Case(
    name="gpt tiny", layers=2, hidden=128, sequence=64, batch=4, micro_batch=2, vocab=512, precision="fp32"
)  # fmt: skip
TINY = (_TINY, replace(_TINY, name="llama tiny", micro_batch=4, llama=True))
TINY_TOGETHER = replace(_TINY, name="gpt tiny, two ranks", dropout=False)


def ask(case: Case, node: str, framework: str) -> Question:
    return question(
        {
            "schema_version": 1,
            "name": "gpu-accuracy",
            "model": case.model,
            "training": {"global_batch": case.batch, "sequence": case.sequence, "precision": case.precision},
            "framework": framework,
            "cluster": {"nodes": {node: {"count": 1, "devices": 1}}},
        },
        "benchmark",
    )


def laid_out(asked: Question, case: Case, dp: int = 1, overlap: bool = False) -> Layout:
    """All-reduce, behind the backward pass or beside it; with one rank nothing is sent."""
    compute = asked.workload.training.precision
    gradient = asked.framework.gradient_dtype if compute != "fp32" else compute
    scheme = AllReduce(algorithm="ring", bucket_bytes=256 * 2**20, overlap=overlap)
    return Layout(
        mesh=Mesh(dp=dp, tp=1, pp=1),
        micro_batch=max(1, case.micro_batch // dp),
        sequence_parallel=False,
        pipeline=Pipeline(schedule="1f1b", virtual_stages=1, boundaries=(0,)),
        recompute="none",
        precision=Precision(compute=compute, gradient=gradient, optimizer="fp32"),
        order="tp-dp-pp",
        sync=(SyncRule(reduce_in_node=False, scheme=scheme),),
    )


def task_of(asked: Question, layout: Layout, cpu: bool, *, warmup: int, steps: int) -> Task:
    program = lower(asked.workload, layout, asked.framework, 1)
    return Task(
        workload=asked.workload, layout=layout, program=program, program_digest=files.digest(program),
        device_kind="cpu" if cpu else "gpu", steps=steps, warmup=warmup, seed=0, timeout_s=60.0,
        devices_per_node=1, share_devices=layout.mesh.dp > 1, weights=None,
    )  # fmt: skip


def measured_row(case: Case, run: Run) -> dict[str, Any]:
    """What a run measured of a case."""
    step = statistics.median(run.step_s)
    off = [abs(x / step - 1.0) for x in run.step_s]
    return {
        "model": case.name, "layers": case.layers, "hidden": case.hidden, "sequence": case.sequence,
        "batch": case.batch, "micro_batch": case.micro_batch, "precision": case.precision, "measured_s": step,
        "repeat_p90": quantile(off, 0.9), "losses": list(run.losses), "environment": run.environment,
        "device": run.device, "backend": run.backend,
    }  # fmt: skip


def step_against(row: dict[str, Any], name: str, asked: Question, layout: Layout, run: Run) -> None:
    """Add the step that `asked` predicts, as `name`, with its phases beside the measured ones."""
    found = simulate(lower(asked.workload, layout, asked.framework, 1), asked.cluster, asked.framework)
    comparison = compare(found.timeline(), run.timeline, step_s=run.step_s)
    row[f"{name}_s"], row[f"{name}_error"] = found.step_s, found.step_s / row["measured_s"] - 1.0
    row[f"{name}_phases"] = {p.phase: [p.seconds.predicted_s, p.seconds.measured_s] for p in comparison.phases}


def memory_against(row: dict[str, Any], asked: Question, case: Case, run: Run) -> None:
    """Add predicted and measured bytes at each level that PyTorch and the driver state; on a CPU nothing states any."""
    levels: dict[MemoryLevel, str] = {
        "allocated": "allocated_bytes",
        "reserved": "reserved_bytes",
        "used": "device_used_bytes",
    }
    if not all(key in run.environment for key in levels.values()):
        return
    use = predicted_memory(asked, case)
    row["memory_bytes"] = {level: [use.at(level), int(run.environment[key])] for level, key in levels.items()}


def predicted_memory(asked: Question, case: Case) -> DeviceUse:
    """Of the layout that runs: one rank, the case's micro-batch, nothing recomputed, no servers."""
    space = layouts(asked.workload, asked.cluster, asked.framework, choices_of(asked))
    held = footprint(asked.workload, space, asked.framework)
    rows = (
        row
        for row, layout in ((row, space.layout(row)) for row in range(len(space)))
        if layout.micro_batch == case.micro_batch
        and layout.recompute == "none"
        and isinstance(layout.scheme, AllReduce)
    )
    capacity = min(m.device.memory_bytes for m in asked.cluster.workers if m.device is not None)
    return DeviceUse.of(held, next(rows), capacity)


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
    files.write_text(Path(out), json.dumps({"nccl": torch.cuda.nccl.version(), "rows": rows}))  # type: ignore[no-untyped-call]
    dist.destroy_process_group()
