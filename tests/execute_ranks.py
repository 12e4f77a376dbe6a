"""Functions that test ranks run, and tasks to run: helpers of test_execute*.py, importable by name in a rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from clustersim import files
from clustersim.execute.task import Task
from clustersim.hardware.framework import Framework, HostCost, Overlap
from clustersim.hardware.kernel import GradientDtype
from clustersim.hardware.provenance import Provenance
from clustersim.layout.layout import (
    AllReduce,
    Bsp,
    Layout,
    Mesh,
    ParameterServer,
    Pipeline,
    Precision,
    Scheme,
    SyncRule,
)
from clustersim.program.lower import lower
from clustersim.workload.model import Model
from clustersim.workload.training import Optimizer, Training, Workload

MODEL = Model(
    name="test", layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn_hidden=48, vocab=256, positions=16,
    dropout=False,
)  # fmt: skip
LLAMA = replace(
    MODEL, name="test-llama", positions=0, rotary=True, gated=True, norm="rmsnorm", bias=False, tied=False, qk_norm=True
)
FRAMEWORK = Framework(
    name="test",
    attention="flash",
    fused_elementwise=False,
    gradient_dtype="fp32",
    gradient_accumulation="added",
    host=HostCost(per_layer_forward_s=0.0, per_layer_backward_s=0.0, per_micro_batch_s=0.0, per_step_s=0.0),
    overlap=Overlap(gradient_reduce=True, parameter_gather=False, pipeline_send=False),
    scatter_gather=False,
    memory_overhead_bytes=0.0,
    fragmentation=0.0,
    provenance=Provenance(method="estimate", source="a test"),
)


def all_reduce(overlap: bool = True, bucket_bytes: float = 40e3) -> AllReduce:
    return AllReduce(algorithm="ring", bucket_bytes=bucket_bytes, overlap=overlap)


def parameter_server(
    dedicated: int, colocated: int, optimizer_at: str = "server", partition_bytes: float = 30e3
) -> ParameterServer:
    return ParameterServer(
        dedicated=dedicated,
        colocated=colocated,
        dedicated_parts=2 if dedicated else 0,
        colocated_parts=1 if colocated else 0,
        consistency=Bsp(),
        bucket_bytes=40e3,
        partition_bytes=partition_bytes,
        optimizer_at=optimizer_at,  # type: ignore[arg-type]
    )


def make_task(
    scheme: Scheme,
    *,
    dp: int = 2,
    model: Model = MODEL,
    dtype: GradientDtype = "fp64",
    optimizer: Optimizer = "adam",
    global_batch: int = 7,
    micro_batch: int = 2,
    steps: int = 3,
    warmup: int = 1,
    weights: Path | None = None,
    timeout_s: float = 20.0,
    devices_per_node: int = 1,
) -> Task:
    layout = Layout(
        mesh=Mesh(dp=dp, tp=1, pp=1),
        micro_batch=micro_batch,
        sequence_parallel=False,
        pipeline=Pipeline(schedule="1f1b", virtual_stages=1, boundaries=(0,)),
        recompute="none",
        precision=Precision(compute=dtype, gradient=dtype, optimizer="fp64" if dtype == "fp64" else "fp32"),
        order="tp-dp-pp",
        sync=(SyncRule(reduce_in_node=True, scheme=scheme),),
    )
    training = Training(global_batch=global_batch, sequence=16, precision=dtype, optimizer=optimizer)
    workload = Workload(model=model, training=training)
    program = lower(workload, layout, FRAMEWORK, devices_per_node)
    return Task(
        workload=workload,
        layout=layout,
        program=program,
        program_digest=files.digest(program),
        devices_per_node=devices_per_node,
        device_kind="cpu",
        steps=steps,
        warmup=warmup,
        seed=5,
        timeout_s=timeout_s,
        share_devices=False,
        weights=None if weights is None else str(weights),
    )


# ------------------------------------------------------------------------------------------- functions for ranks


def say_hello(*, rank: int, ranks: int, folder: Path, tell: Callable[[str], None], text: str) -> None:
    tell(f"{text} from {rank} of {ranks}")
    (folder / f"hello{rank}").write_text(text, encoding="utf-8")


def fail_on_one(*, rank: int, ranks: int, folder: Path, tell: Callable[[str], None]) -> None:
    if rank == 1:
        raise ValueError("the disk\nis on fire")
    time.sleep(60)


def die_on_one(*, rank: int, ranks: int, folder: Path, tell: Callable[[str], None]) -> None:
    import os
    import signal

    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def sleep(*, rank: int, ranks: int, folder: Path, tell: Callable[[str], None]) -> None:
    import os

    tell(str(os.getpid()))
    time.sleep(60)


def fail_in_training(*, rank: int, ranks: int, folder: Path, tell: Callable[[str], None], task: str, out: str) -> None:
    """Rank 1 fails in its second step, while the others communicate."""
    from clustersim.execute import worker
    from clustersim.execute.text import Text

    given = Text.batch

    def batch(self, step, sequences, device):  # type: ignore[no-untyped-def]
        if rank == 1 and step == 1:
            raise RuntimeError("no more text")
        return given(self, step, sequences, device)

    Text.batch = batch  # type: ignore[method-assign]
    worker.run_local(rank=rank, ranks=ranks, folder=folder, tell=tell, task=task, out=out)


class HostEvent:
    """An event of a device whose clock is another than the host's, as CUDA's is."""

    ahead_s = 1e4

    def __init__(self) -> None:
        self.at_s = -1.0

    def record(self) -> None:
        self.at_s = time.monotonic() + self.ahead_s

    def synchronize(self) -> None:
        assert self.at_s >= 0.0, "nobody recorded this event"

    def elapsed_time(self, end_event: HostEvent) -> float:
        return 1e3 * (end_event.at_s - self.at_s)


def train_with_events(
    *, rank: int, ranks: int, folder: Path, tell: Callable[[str], None], task: str, out: str, torch_version: str
) -> None:
    """A rank of a GPU's run whose tensors are on the CPU: its marks are events, its PyTorch says another version."""
    import torch

    from clustersim.execute import worker
    from clustersim.execute.clock import Clock

    torch.__version__ = torch_version  # type: ignore[assignment]
    Clock.of = lambda device: Clock(HostEvent)  # type: ignore[method-assign]
    worker._device_of = lambda *_: (torch.device("cpu"), "gloo")
    worker.run_local(rank=rank, ranks=ranks, folder=folder, tell=tell, task=task, out=out)
