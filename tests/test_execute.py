"""Runs on real processes: the weights that every scheme ends with, what is measured, and how failures are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import execute_ranks
import numpy as np
import pytest
from execute_ranks import LLAMA, MODEL, all_reduce, make_task, parameter_server

from clustersim import files
from clustersim.compare import Run
from clustersim.errors import ExecutionError
from clustersim.execute.batches import micro_batches, rank_sequences
from clustersim.execute.execute import refuse_unsupported, run_task
from clustersim.execute.launch import Launcher
from clustersim.execute.task import Task, server_slices
from clustersim.layout.layout import Mesh, Pipeline, Scheme, Sharded, SyncRule
from clustersim.timeline import OpId, check_invariants
from clustersim.workload.model import Experts, Model
from clustersim.workload.parameters import parameter_count

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher() as one:
        yield one


def silent(_: str) -> None:
    pass


def trained_alone(task: Task) -> tuple[list[np.ndarray], list[float]]:
    """The same training in one process that sees the whole batch at once, by PyTorch's plain optimizers."""
    from clustersim.execute.gpt import TORCH_DTYPE, Gpt
    from clustersim.execute.gradients import bucket_parameters
    from clustersim.execute.optimizer import LEARNING_RATE, MOMENTUM
    from clustersim.execute.text import Text

    training, cpu = task.workload.training, torch.device("cpu")
    gpt = Gpt(task.workload.model, seed=task.seed, dtype=TORCH_DTYPE[training.precision], device=cpu)
    rate = LEARNING_RATE[training.optimizer]
    if training.optimizer == "adam":
        optimizer = torch.optim.Adam(gpt.parameters(), lr=rate, foreach=False, fused=False)
    else:
        momentum = MOMENTUM if training.optimizer == "momentum" else 0.0
        optimizer = torch.optim.SGD(gpt.parameters(), lr=rate, momentum=momentum, foreach=False, fused=False)
    text = Text(task.seed, training.global_batch, training.sequence)
    losses = []
    for step in range(task.warmup + task.steps):
        optimizer.zero_grad()
        loss = gpt(*text.batch(step, range(training.global_batch), cpu)) / training.tokens_per_step
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    parameters = [p for bucket in task.program.buckets for p in bucket_parameters(gpt, bucket)]
    return [p.detach().numpy() for p in parameters], losses


SCHEMES = {
    "ddp": all_reduce(),
    "all-reduce afterwards": all_reduce(overlap=False),
    "dedicated": parameter_server(2, 0),
    "colocated": parameter_server(0, 2),
    "mixed": parameter_server(1, 2),
    "dedicated, optimizer at worker": parameter_server(2, 0, "worker"),
    "colocated, optimizer at worker": parameter_server(0, 2, "worker"),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_scheme_ends_at_the_weights_of_one_process(
    scheme: Scheme, optimizer: str, launcher: Launcher, tmp_path: Path
) -> None:
    """P32, with a batch that neither ranks nor micro-batches divide."""
    task = make_task(scheme, optimizer=optimizer, weights=tmp_path / "weights.npz")  # type: ignore[arg-type]
    assert len(task.program.buckets) >= 3
    run = run_task(task, progress=silent, launcher=launcher)
    expected, losses = trained_alone(task)
    found = np.load(tmp_path / "weights.npz")
    assert len(found.files) == len(expected)
    worst = max(float(np.abs(found[name] - weight).max()) for name, weight in zip(found.files, expected, strict=True))
    assert worst <= 1e-10
    np.testing.assert_allclose(run.losses, losses, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("model", "dp", "global_batch", "micro_batch"), [(LLAMA, 2, 8, 2), (MODEL, 3, 4, 1), (MODEL, 1, 5, 2)]
)
def test_other_shapes_end_there_too(
    model: Model, dp: int, global_batch: int, micro_batch: int, launcher: Launcher, tmp_path: Path
) -> None:
    """An untied model with rotary positions; a rank whose first micro-batch is empty; one rank."""
    task = make_task(
        all_reduce(), model=model, dp=dp, global_batch=global_batch, micro_batch=micro_batch, optimizer="momentum",
        weights=tmp_path / "weights.npz",
    )  # fmt: skip
    run_task(task, progress=silent, launcher=launcher)
    expected, _ = trained_alone(task)
    found = np.load(tmp_path / "weights.npz")
    for name, weight in zip(found.files, expected, strict=True):
        np.testing.assert_allclose(found[name], weight, rtol=0, atol=1e-10)


NODES = {
    "two nodes, dedicated": (4, 2, parameter_server(1, 0)),
    "one node, dedicated, optimizer at worker": (2, 2, parameter_server(2, 0, "worker")),
    "two nodes, colocated": (4, 2, parameter_server(0, 2)),
}


@pytest.mark.parametrize(("dp", "devices_per_node", "scheme"), NODES.values(), ids=NODES)
def test_ranks_of_a_node_sum_first_and_end_there_too(
    dp: int, devices_per_node: int, scheme: Scheme, launcher: Launcher, tmp_path: Path
) -> None:
    task = make_task(scheme, dp=dp, devices_per_node=devices_per_node, weights=tmp_path / "weights.npz")
    assert task.peers == 2
    run = run_task(task, progress=silent, launcher=launcher)
    expected, _ = trained_alone(task)
    found = np.load(tmp_path / "weights.npz")
    for name, weight in zip(found.files, expected, strict=True):
        np.testing.assert_allclose(found[name], weight, rtol=0, atol=1e-10)
    assert_every_op_is_measured(task, run)


@pytest.mark.parametrize("scheme", [all_reduce(), parameter_server(2, 0)], ids=["ddp", "dedicated"])
def test_low_precision_learns(scheme: Scheme, launcher: Launcher) -> None:
    task = make_task(scheme, dtype="bf16", global_batch=8, steps=8)
    run = run_task(task, progress=silent, launcher=launcher)
    assert run.losses[-1] < run.losses[0] - 0.2


# ------------------------------------------------------------------------------------------------ what is measured


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_op_of_the_program_is_measured_on_every_rank_in_every_step(scheme: Scheme, launcher: Launcher) -> None:
    task = make_task(scheme, steps=2)
    run = run_task(task, progress=silent, launcher=launcher)
    assert_every_op_is_measured(task, run)
    assert len(run.step_s) == task.steps
    assert len(run.losses) == task.steps + task.warmup


def assert_every_op_is_measured(task: Task, run: Run) -> None:
    server_ranks = {c.rank for c in run.timeline.classes if "server" in c.label}
    expected = {
        (rank, op.id._replace(step=step))
        for step in range(task.steps)
        for position in task.program.positions
        for rank in (range(task.workers) if position.role == "worker" else server_ranks)
        for op in position.ops
    }
    found = [(span.rank, span.op) for span in run.timeline.spans]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert all(span.end_s >= span.start_s for span in run.timeline.spans)
    check_invariants(run.timeline)
    assert min(span.ready_s for span in run.timeline.spans) == 0.0


def test_pushes_overlap_the_backward_pass(launcher: Launcher) -> None:
    model = replace(MODEL, layers=6, hidden=128, ffn_hidden=512, head_dim=32)
    task = make_task(parameter_server(2, 0), model=model, dtype="fp32", global_batch=8, micro_batch=4, steps=4)
    run = run_task(task, progress=silent, launcher=launcher)
    last = len(task.program.buckets) - 1
    spans = {(s.rank, s.op): s for s in run.timeline.spans}
    for step in range(task.steps):
        push = spans[0, OpId(step, -1, 0, "synchronise", "B0", "push")]
        backward = spans[0, OpId(step, 0, 0, "backward", f"B{last}", "compute")]
        assert push.start_s < backward.end_s
        pull = spans[0, OpId(step, -1, 0, "synchronise", "B0", "pull")]
        update = OpId(step, -1, -1, "update", "B0", "update")
        assert pull.start_s >= min(spans[rank, update].end_s for rank in (2, 3))


def test_a_run_survives_a_file(launcher: Launcher, tmp_path: Path) -> None:
    run = run_task(make_task(all_reduce(), steps=1), progress=silent, launcher=launcher)
    files.save(run, tmp_path / "run.json")
    assert files.load(Run, tmp_path / "run.json") == run


# ------------------------------------------------------------------------------------------------------- launching


def test_ranks_start_in_a_fraction_of_a_second(launcher: Launcher, tmp_path: Path) -> None:
    told: list[str] = []

    def start() -> float:
        begin = time.monotonic()
        launcher.run(
            "execute_ranks:say_hello", ranks=4, folder=tmp_path, arguments={"text": "hello"}, progress=told.append
        )
        return time.monotonic() - begin

    start()
    assert min(start() for _ in range(3)) < 1.0
    assert sorted(told[:4]) == [f"hello from {rank} of 4" for rank in range(4)]
    assert (tmp_path / "hello3").read_text() == "hello"


def test_a_failing_rank_ends_the_run_with_its_message(launcher: Launcher, tmp_path: Path) -> None:
    launcher.run("execute_ranks:say_hello", ranks=1, folder=tmp_path, arguments={"text": "x"}, progress=silent)
    begin = time.monotonic()
    with pytest.raises(ExecutionError, match=r"^rank 1: ValueError: the disk is on fire \(execute_ranks.py:\d+\)$"):
        launcher.run("execute_ranks:fail_on_one", ranks=3, folder=tmp_path, arguments={}, progress=silent)
    assert time.monotonic() - begin < 5.0


def test_a_killed_rank_is_named(launcher: Launcher, tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match="rank 0: was killed by SIGKILL; memory may have run out"):
        launcher.run("execute_ranks:die_on_one", ranks=2, folder=tmp_path, arguments={}, progress=silent)


@pytest.mark.parametrize("scheme", [all_reduce(), parameter_server(2, 0)], ids=["ddp", "dedicated"])
def test_the_cause_is_told_not_its_consequences(scheme: Scheme, launcher: Launcher, tmp_path: Path) -> None:
    files.save(make_task(scheme), tmp_path / "task.json")
    begin = time.monotonic()
    with pytest.raises(ExecutionError, match=r"^rank 1.*RuntimeError: no more text"):
        launcher.run(
            "execute_ranks:fail_in_training", ranks=make_task(scheme).processes, folder=tmp_path,
            arguments={"task": str(tmp_path / "task.json"), "out": str(tmp_path / "run.json")}, progress=silent,
        )  # fmt: skip
    assert time.monotonic() - begin < 10.0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_ranks_end_with_the_process_that_started_them(how: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from clustersim.execute.launch import Launcher\n"
        "try:\n"
        "    with Launcher() as l: l.run('execute_ranks:sleep', ranks=2, folder=pathlib.Path(sys.argv[1]),"
        " arguments={}, progress=lambda t: print(t, flush=True))\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(2)]
        process.send_signal(how)
        assert process.wait(timeout=10) == (130 if how == signal.SIGINT else -how)
    end = time.monotonic() + 5.0
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_progress_is_told(launcher: Launcher) -> None:
    lines: list[str] = []
    run_task(make_task(all_reduce(), steps=2), progress=lines.append, launcher=launcher)
    assert [line.split(":")[0] for line in lines] == ["warm-up 1/3", "step 2/3", "step 3/3"]
    assert all("loss 5." in line for line in lines)


# -------------------------------------------------------------------------------------------------------- refusals


def refused(task: Task) -> str:
    with pytest.raises(ExecutionError) as caught:
        refuse_unsupported(task)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_refusals_say_what_and_what_instead() -> None:
    task = make_task(all_reduce())
    layout, workload = task.layout, task.workload

    def with_model(**changes: object) -> Task:
        return replace(task, workload=replace(workload, model=replace(workload.model, **changes)))  # type: ignore[arg-type]

    def with_scheme(scheme: Scheme) -> Task:
        return replace(task, layout=replace(layout, sync=(SyncRule(reduce_in_node=False, scheme=scheme),)))

    refuse_unsupported(task)
    assert "tp = 2" in refused(replace(task, layout=replace(layout, mesh=Mesh(dp=1, tp=2, pp=1))))
    staged = Pipeline(schedule="1f1b", virtual_stages=1, boundaries=(0, 1))
    assert "pp = 2" in refused(replace(task, layout=replace(layout, mesh=Mesh(dp=1, tp=1, pp=2), pipeline=staged)))
    assert "sharded-2" in refused(with_scheme(Sharded(stage=2, bucket_bytes=1e6, overlap=True)))
    assert "tree" in refused(with_scheme(replace(all_reduce(), algorithm="tree")))
    assert "vocab: 256" in refused(with_model(vocab=100))
    assert "decoders only" in refused(with_model(kind="encoder"))
    assert "mixture of experts" in refused(with_model(experts=Experts(count=4, per_token=2, hidden=32)))
    assert "ALiBi" in refused(with_model(positions=0))
    assert "sequence: 8" in refused(with_model(positions=8))
    fp16 = replace(layout.precision, compute="fp16")
    assert "loss scaling" in refused(replace(task, layout=replace(layout, precision=fp16)))
    tf32 = replace(layout.precision, compute="tf32")
    assert "GPUs only" in refused(replace(task, layout=replace(layout, precision=tf32)))
    small = replace(workload, training=replace(workload.training, global_batch=1))
    assert "without a sequence" in refused(replace(task, workload=small))


def test_too_many_ranks_and_too_little_memory_are_refused(launcher: Launcher) -> None:
    many = make_task(all_reduce(), dp=4096, global_batch=4096)
    with pytest.raises(ExecutionError, match=r"needs 4096 processes, and this host has \d+ cores"):
        run_task(many, progress=silent, launcher=launcher)
    huge = make_task(all_reduce(), model=replace(MODEL, layers=100, hidden=65536, heads=4096, head_dim=16))
    with pytest.raises(ExecutionError, match=r"needs at least .* of host memory"):
        run_task(huge, progress=silent, launcher=launcher)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU")
def test_a_gpu_plan_is_refused_where_there_is_none(launcher: Launcher) -> None:
    with pytest.raises(ExecutionError, match="needs 2 GPUs, and PyTorch finds none"):
        run_task(replace(make_task(all_reduce()), device_kind="gpu"), progress=silent, launcher=launcher)


# ------------------------------------------------------------------------------------------- the division of work


@pytest.mark.parametrize("dp", [1, 2, 3, 5])
@pytest.mark.parametrize("global_batch", [5, 7, 8, 16])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_cover_the_batch_once(dp: int, global_batch: int, micro_batch: int) -> None:
    layout = replace(make_task(all_reduce()).layout, mesh=Mesh(dp=dp, tp=1, pp=1), micro_batch=micro_batch)
    seen = []
    for rank in range(dp):
        mine = micro_batches(layout, global_batch, rank)
        assert len(mine) == layout.micro_batches(global_batch)
        assert len(mine[-1]) >= 1
        assert all(len(sequences) <= micro_batch for sequences in mine)
        assert [i for sequences in mine for i in sequences] == list(rank_sequences(global_batch, dp, rank))
        seen += [i for sequences in mine for i in sequences]
    assert seen == list(range(global_batch))


@pytest.mark.parametrize("devices_per_node", [1, 2])
@pytest.mark.parametrize("scheme", [parameter_server(3, 0), parameter_server(1, 2, partition_bytes=1e3)])
def test_servers_hold_every_element_once(scheme: Scheme, devices_per_node: int) -> None:
    task = make_task(scheme, dp=2, devices_per_node=devices_per_node)
    for bucket in task.program.buckets:
        pieces = [piece for share in task.program.servers for piece in server_slices(task, share.server)[bucket.index]]
        assert sorted(i for piece in pieces for i in range(piece.start, piece.stop)) == list(range(bucket.elements))


@pytest.mark.parametrize("model", [MODEL, LLAMA, replace(LLAMA, bias=True, norm="layernorm", embedding_norm=True)])
def test_the_model_has_the_parameters_that_the_workload_counts(model: Model) -> None:
    from clustersim.execute.gpt import Gpt

    gpt = Gpt(model, seed=0, dtype=torch.float32, device=torch.device("cpu"))
    assert sum(p.numel() for p in gpt.parameters()) == parameter_count(model)


def test_recomputation_changes_no_gradient() -> None:
    from clustersim.execute.gpt import Gpt

    tokens = torch.arange(32).reshape(2, 16) * 7 % 256
    gradients = []
    for recompute in ("none", "selective", "full"):
        gpt = Gpt(MODEL, seed=0, dtype=torch.float64, device=torch.device("cpu"), recompute=recompute)  # type: ignore[arg-type]
        gpt(tokens, tokens).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in gpt.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=0, atol=1e-12)


def test_batches_do_not_depend_on_who_asks() -> None:
    from clustersim.execute.text import Text

    text, cpu = Text(3, 8, 16), torch.device("cpu")
    whole, targets = text.batch(2, range(8), cpu)
    part, _ = text.batch(2, range(3, 5), cpu)
    torch.testing.assert_close(part, whole[3:5])
    torch.testing.assert_close(whole[:, 1:], targets[:, :-1])
    assert not torch.equal(whole, text.batch(3, range(8), cpu)[0])
    assert execute_ranks.MODEL.vocab >= int(whole.max())
