"""execute(): run a plan on this host's devices and measure it. Only the processes that it starts import torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import assert_never

from clustersim import files
from clustersim.compare import Run
from clustersim.errors import ExecutionError
from clustersim.execute.launch import Launcher, cores
from clustersim.execute.task import Task
from clustersim.hardware.kernel import BYTES_OF
from clustersim.layout.layout import AllReduce, Layout, ParameterServer, Sharded
from clustersim.plan import Plan
from clustersim.program.lower import lower
from clustersim.program.program import Program
from clustersim.units import human_bytes
from clustersim.workload.parameters import parameter_count
from clustersim.workload.training import STATE_TENSORS, Workload

# Text is bytes.
_VOCABULARY = 256
# Ranks that share one core take turns; beyond this, time measures the operating system.
_MOST_RANKS_PER_CORE = 4


def execute(
    plan: Plan,
    program: Program | None = None,
    *,
    steps: int = 20,
    warmup: int = 3,
    seed: int = 0,
    progress: Callable[[str], None],
    launcher: Launcher | None = None,
    weights: Path | None = None,
    timeout_s: float = 300.0,
    share_devices: bool = False,
) -> Run:
    """Train `warmup` and then `steps` measured steps of `plan` on this host, as its layout says.

    `program` is the plan's, lowered already; without it, it is lowered here. `progress` gets a line now and then.
    `launcher` may be used for several runs. `weights`: where the trained weights are written (npz; for tests).
    `share_devices`: several ranks may use one GPU. ExecutionError, one line, where this host or this executor cannot
    run the plan, and where a rank fails.
    """
    task = prepare(
        plan, program, steps=steps, warmup=warmup, seed=seed, timeout_s=timeout_s, share_devices=share_devices,
        weights=None if weights is None else str(weights.resolve()),
    )  # fmt: skip
    return run_task(task, progress=progress, launcher=launcher)


def prepare(
    plan: Plan,
    program: Program | None = None,
    *,
    steps: int,
    warmup: int,
    seed: int,
    timeout_s: float,
    share_devices: bool,
    weights: str | None = None,
) -> Task:
    """The task of a plan, after checking that the plan's program is the one that this version lowers to."""
    if program is None:
        program = lower(plan.workload, plan.layout, plan.framework, plan.machines.devices_per_node)
    digest = files.digest(program)
    if digest != plan.program_digest:
        raise ExecutionError(
            f"the plan was made by clustersim {plan.clustersim} and its layout is another program here; plan again"
        )
    task = Task(
        workload=plan.workload, layout=plan.layout, program=program, program_digest=digest,
        devices_per_node=plan.machines.devices_per_node,
        device_kind=plan.machines.device_kind, steps=steps, warmup=warmup, seed=seed, timeout_s=timeout_s,
        share_devices=share_devices, weights=weights,
    )  # fmt: skip
    refuse_unsupported(task)
    return task


def run_task(task: Task, *, progress: Callable[[str], None], launcher: Launcher | None = None) -> Run:
    """Run a task on this host. See `execute`."""
    refuse_unsupported(task)
    if launcher is None:
        with Launcher() as own:
            return run_task(task, progress=progress, launcher=own)
    with tempfile.TemporaryDirectory(prefix="clustersim-run-") as name:
        folder = Path(name)
        _refuse_machine(task, launcher, folder)
        files.save(task, folder / "task.json")
        out = folder / "run.json"
        launcher.run(
            "clustersim.execute.worker:run_local",
            ranks=task.processes,
            folder=folder,
            arguments={"task": str(folder / "task.json"), "out": str(out)},
            progress=progress,
            spawn=task.device_kind == "gpu",
        )
        return files.load(Run, out)


# ------------------------------------------------------------------------------------------------------ refusals


def refuse_unsupported(task: Task) -> None:
    """ExecutionError where this executor lacks what the task needs, whatever the machine."""
    _refuse_steps(task)
    _refuse_workload(task.workload)
    _refuse_layout(task.layout, task.workload, task.device_kind)


def _refuse_steps(task: Task) -> None:
    if task.steps < 1 or task.warmup < 0:
        raise ExecutionError(f"steps = {task.steps} must be at least 1, and warmup = {task.warmup} at least 0")


def _refuse_workload(workload: Workload) -> None:
    model, training = workload.model, workload.training
    if workload.data is not None:
        raise ExecutionError("data: the executor reads its text from memory; plan without data: and storage")
    if model.kind == "encoder" or model.head_transform or model.pooler or model.token_types:
        raise ExecutionError(
            f"model {model.name}: the executor trains decoders only, no encoders; use a GPT or a Llama"
        )
    if model.experts is not None:
        raise ExecutionError(f"model {model.name}: the executor has no mixture of experts yet; use a dense model")
    if model.vocab < _VOCABULARY:
        raise ExecutionError(
            f"model {model.name}: vocab = {model.vocab}, but runs train on bytes; write vocab: {_VOCABULARY} or more"
        )
    if model.positions and training.sequence > model.positions:
        raise ExecutionError(
            f"model {model.name} has {model.positions} positions, but sequence = {training.sequence}; "
            f"write sequence: {model.positions} or less, or more positions"
        )
    if model.rotary and model.head_dim % 2:
        raise ExecutionError(f"model {model.name}: rotary positions need an even head_dim, not {model.head_dim}")
    if not model.rotary and not model.positions:
        raise ExecutionError(
            f"model {model.name} has neither rotary nor learned positions (ALiBi), which the executor lacks; "
            "write rotary: true, or positions"
        )


def _refuse_layout(layout: Layout, workload: Workload, device_kind: str) -> None:
    mesh, precision = layout.mesh, layout.precision
    if mesh.tp > 1:
        raise ExecutionError(f"tp = {mesh.tp}: the executor runs no tensor parallelism yet; fix layout.tp: 1")
    if mesh.pp > 1:
        raise ExecutionError(f"pp = {mesh.pp}: the executor runs no pipeline parallelism yet; fix layout.pp: 1")
    if mesh.cp > 1:
        raise ExecutionError(f"cp = {mesh.cp}: the executor runs no context parallelism yet; fix layout.cp: 1")
    if mesh.ep > 1:
        raise ExecutionError(f"ep = {mesh.ep}: the executor runs no expert parallelism yet; fix layout.ep: 1")
    if layout.pipeline.virtual_stages > 1:
        raise ExecutionError("virtual stages: the executor runs no pipelines yet; fix layout.virtual_stages: 1")
    scheme = layout.scheme
    match scheme:
        case Sharded():
            raise ExecutionError(
                f"sharded-{scheme.stage}: the executor runs no sharded optimizer yet; fix layout.sync: allreduce or "
                "parameter-server"
            )
        case AllReduce():
            if mesh.dp > 1 and device_kind == "cpu" and scheme.algorithm in ("tree", "binary-tree", "hierarchical"):
                raise ExecutionError(
                    f"algorithm: {scheme.algorithm}: gloo on CPUs runs its own ring; fix layout.algorithm: ring"
                )
        case ParameterServer():
            pass
        case _:
            assert_never(scheme)
    for role, dtype in (
        ("compute", precision.compute), ("gradient", precision.gradient), ("optimizer", precision.optimizer),
    ):  # fmt: skip
        if dtype == "fp8":
            raise ExecutionError(f"{role} type fp8: the executor has no fp8 yet; write precision: bf16")
        if dtype == "fp16":
            raise ExecutionError(f"{role} type fp16: the executor has no loss scaling; write precision: bf16")
        if dtype == "tf32" and device_kind == "cpu":
            raise ExecutionError(f"{role} type tf32 exists on GPUs only; write precision: fp32")
    if workload.training.global_batch < mesh.dp:
        raise ExecutionError(
            f"global_batch = {workload.training.global_batch} leaves some of {mesh.dp} data-parallel ranks without a "
            "sequence; write a larger global_batch"
        )


def _refuse_machine(task: Task, launcher: Launcher, folder: Path) -> None:
    """ExecutionError where this host has too little for the task."""
    if task.device_kind == "gpu":
        found = host_gpus(launcher, folder)
        if not found:
            raise ExecutionError(f"the plan needs {task.workers} GPUs, and PyTorch finds none on this host")
        if len(found) < task.workers and not task.share_devices:
            raise ExecutionError(
                f"the plan needs {task.workers} GPUs, and this host has {len(found)} ({found[0]}); run it on the hosts "
                "that it names with torchrun, or let ranks share devices"
            )
    elif task.processes > _MOST_RANKS_PER_CORE * cores():
        raise ExecutionError(
            f"the plan needs {task.processes} processes, and this host has {cores()} cores (at most "
            f"{_MOST_RANKS_PER_CORE} processes a core are run); plan for fewer ranks"
        )
    needed, free = _host_memory(task), _free_memory()
    if free is not None and needed > free:
        raise ExecutionError(
            f"the run needs at least {human_bytes(needed)} of host memory for weights, gradients and optimizer state, "
            f"and {human_bytes(free)} are free; use a smaller model or fewer ranks"
        )


def host_gpus(launcher: Launcher, folder: Path) -> list[str]:
    """Starting a process that looks takes seconds: once for each launcher."""
    import json

    if launcher.gpus is not None:
        return launcher.gpus
    out = folder / "devices.json"
    launcher.run(
        "clustersim.execute.worker:describe_devices",
        ranks=1, folder=folder, arguments={"out": str(out)}, progress=lambda _: None, spawn=True,
    )  # fmt: skip
    launcher.gpus = json.loads(out.read_text(encoding="utf-8"))
    assert launcher.gpus is not None
    return launcher.gpus


def _host_memory(task: Task) -> int:
    """Bytes that the run surely takes on this host: weights, gradients, optimizer state and servers' receive buffers;
    activations come on top."""
    precision, scheme = task.layout.precision, task.layout.scheme
    elements = parameter_count(task.workload.model)
    compute, gradient, wide = (BYTES_OF[d] for d in (precision.compute, precision.gradient, precision.optimizer))
    tensors = STATE_TENSORS[task.workload.training.optimizer] + (precision.optimizer != precision.compute)
    state = elements * wide * tensors
    worker, servers = elements * (compute + gradient), 0
    if isinstance(scheme, ParameterServer):
        # All servers together hold every bucket once, and a receive buffer for each worker.
        servers = elements * (task.workers * gradient + wide)
        if scheme.optimizer_at == "server":
            servers += elements * compute + state
    if not isinstance(scheme, ParameterServer) or scheme.optimizer_at == "worker":
        worker += state
    return servers + (task.workers * worker if task.device_kind == "cpu" else 0)


def _free_memory() -> int | None:
    """Bytes that new processes can have, where the system says so (Linux), a container's limit included."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        allowed = limit.read_text(encoding="utf-8").strip()
        if allowed != "max":
            free = min(free, int(allowed) - int(used.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        pass
    return free
