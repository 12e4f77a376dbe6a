"""benchmarks/gpu_accuracy.py: phases that end in time and fail alone, files after each of them, and the models."""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clustersim import files
from clustersim.compare import Run
from clustersim.errors import ExecutionError
from clustersim.hardware.device import Device
from clustersim.layout.memory import StateBytes
from clustersim.timeline import Timeline
from clustersim.workload.parameters import parameter_count

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return importlib.import_module("gpu_accuracy")


@pytest.fixture
def cases(bench: Any) -> Any:
    return importlib.import_module("gpu_cases")


@pytest.fixture
def results(bench: Any, tmp_path: Path) -> Any:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "probe.json").write_text("{}", encoding="utf-8")
    return bench.Results(
        folder=folder, target=tmp_path / "gpu.json", archive=tmp_path / "kept.zip", until_s=time.monotonic() + 60.0
    )


def written(results: Any) -> Any:
    return json.loads(results.target.read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------------- phases


def test_a_phase_that_fails_is_told_and_the_next_goes_on(results: Any) -> None:
    def fail() -> None:
        raise ValueError("fp8 is\nnot supported")

    assert not results.phase("fp8", 10.0, fail)
    # Everything stands in the files before the next one begins.
    seen: list[Any] = []
    assert results.phase("bf16", 10.0, lambda: seen.append(written(results)))
    assert seen[0]["left_out"] == ["fp8: ValueError: fp8 is not supported"]
    assert [(p["phase"], p["error"] is None) for p in written(results)["phases"]] == [("fp8", False), ("bf16", True)]
    with zipfile.ZipFile(results.archive) as packed:
        assert packed.namelist() == ["probe.json"]
    assert not [path for path in results.target.parent.iterdir() if path.name.endswith(".part")]
    # What is tried again counts as it ended.
    assert results.phase("fp8", 10.0, lambda: None)
    assert written(results)["left_out"] == []


def test_a_phase_is_ended_in_time(results: Any) -> None:
    before = signal.getsignal(signal.SIGALRM)
    begin = time.monotonic()
    assert not results.phase("hangs", 0.2, lambda: time.sleep(30.0))
    assert time.monotonic() - begin < 5.0
    assert "was ended after" in written(results)["left_out"][0]
    assert signal.getsignal(signal.SIGALRM) == before
    assert not results.phase("late", -1.0, lambda: pytest.fail("there is no time for it"))
    assert written(results)["left_out"][1] == "late: no time"


def test_a_timer_that_ran_before_runs_on(bench: Any) -> None:
    rang: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(time.monotonic()))
    old = signal.setitimer(signal.ITIMER_REAL, 0.4)
    try:
        begin = time.monotonic()
        with bench.limited(10.0):
            time.sleep(0.05)
        time.sleep(0.6)
        assert len(rang) == 1
        assert rang[0] - begin < 0.6
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *old)


def test_the_important_phases_come_first_and_models_that_were_late_get_what_is_left(
    bench: Any, cases: Any, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    slow = cases.CASES[2].name
    monkeypatch.setattr("clustersim.execute.execute.host_gpus", lambda *_: ["NVIDIA H200"])
    monkeypatch.setattr(bench, "profile", lambda *_: tried.append("profile"))

    def train(results: Any, launcher: Any, case: Any, host: str, cpu: bool) -> None:
        tried.append(case.name)
        if case.name == slow and tried.count(slow) == 1:
            raise bench.OutOfTimeError("was ended after 30 s")
        results.found["rows"].append({"model": case.name})

    def nccl(*_: object) -> None:
        raise ExecutionError("NCCL is missing")

    monkeypatch.setattr(bench, "train", train)
    monkeypatch.setattr(bench, "alone_in_nccl", nccl)
    monkeypatch.setattr(bench, "together", lambda results, _, case, host, cpu, dp, over: tried.append(f"{dp} {over}"))
    results.until_s = time.monotonic() + 9.4 * 60.0
    bench.benchmark(results, bench.parsed([]))
    names = [case.name for case in cases.CASES]
    assert tried == ["profile", *names, "1 False", "2 False", "2 True", slow]
    assert results.found["finished"]
    assert results.found["left_out"] == ["nccl alone: ExecutionError: NCCL is missing"]


def test_the_whole_ends_in_time_even_where_every_phase_takes_all_that_it_may(
    bench: Any, cases: Any, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now_s=100.0)
    clock.monotonic = lambda: clock.now_s
    taken: dict[str, float] = {}

    def phase(self: Any, name: str, limit_s: float, work: Any) -> bool:
        taken.setdefault(name, limit_s)
        clock.now_s += max(0.0, limit_s)
        return False

    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(bench.Results, "phase", phase)
    monkeypatch.setattr("clustersim.execute.execute.host_gpus", lambda *_: ["NVIDIA H200"])
    results.until_s = 100.0 + 9.4 * 60.0
    bench.benchmark(results, bench.parsed([]))
    assert clock.now_s <= results.until_s
    models = [taken[case.name] for case in cases.CASES]
    assert max(models) <= 30.0
    # Six models at least have all their time, and two ranks on one device theirs.
    assert models[:6] == [30.0] * 6
    assert taken["2 ranks on one device"] > 15.0
    # Ends and starts come on top of what the profile measures.
    assert bench.PROFILE_SLACK_S < taken["profile"] < 0.5 * 9.4 * 60.0


def test_without_a_gpu_or_a_package_one_line_says_so(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("clustersim.execute.execute.host_gpus", lambda *_: [])
    assert bench.main(["--json", str(tmp_path / "gpu.json")]) == 5
    assert capsys.readouterr().err.splitlines() == [
        "error: PyTorch finds no GPU here; --rehearse tries everything on the CPU"
    ]
    assert not json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["finished"]
    assert Path.cwd() == tmp_path
    monkeypatch.setattr(bench, "NEEDED", ("numpy", "no_such_thing", "no_such.thing"))
    assert bench.main([]) == 2
    assert (
        capsys.readouterr().err.splitlines()[0].startswith("error: not installed here: no_such_thing, no_such.thing;")
    )


# -------------------------------------------------------------------------------------------------------- models


def a_run(case: Any, environment: dict[str, str]) -> Run:
    return Run(
        clustersim="0", program_digest="x", backend="nccl", device="NVIDIA H200", ranks=1, environment=environment,
        warmup_steps=1, step_s=(0.1, 0.11, 0.1), losses=(9.0, 8.0, 7.0),
        timeline=Timeline(source="measured", steps=3, classes=(), spans=()),
    )  # fmt: skip


def test_every_model_is_predicted_and_fits_an_h200(cases: Any) -> None:
    device: Device = files.load(Device, files.profile_path("devices", "h200-sxm"))
    assert len(cases.CASES) == 8
    assert len({(c.layers, c.hidden, c.sequence, c.batch, c.micro_batch, c.llama) for c in cases.CASES}) == 8
    for case in cases.CASES:
        asked = cases.ask(case, "hgx-h200", "clustersim")
        layout = cases.laid_out(asked, case)
        assert case.batch % case.micro_batch == 0
        use = cases.predicted_memory(asked, case)
        state = StateBytes.of(layout.precision, "adam")
        per = state.weights + state.gradients + state.optimizer
        assert use.allocated > per * parameter_count(asked.workload.model)
        assert use.used < 0.8 * device.memory_bytes, case.name
        task = cases.task_of(asked, layout, False, warmup=1, steps=2)
        assert (task.device_kind, task.workers, task.share_devices) == ("gpu", 1, False)


def test_predictions_stand_beside_what_was_measured(cases: Any) -> None:
    case = cases.CASES[5]
    asked = cases.ask(case, "hgx-h200", "clustersim")
    run = a_run(case, {})
    row = cases.measured_row(case, run)
    cases.step_against(row, "shipped", asked, cases.laid_out(asked, case), run)
    cases.memory_against(row, asked, case, run)
    assert row["measured_s"] == 0.1
    assert row["shipped_error"] == pytest.approx(row["shipped_s"] / 0.1 - 1.0)
    assert "memory_bytes" not in row
    told = {"allocated_bytes": "1000", "reserved_bytes": "2000", "device_used_bytes": "3000"}
    cases.memory_against(row, asked, case, replace(run, environment=told))
    assert [pair[1] for pair in row["memory_bytes"].values()] == [1000, 2000, 3000]
    predicted = [pair[0] for pair in row["memory_bytes"].values()]
    assert predicted == sorted(predicted)


def test_two_ranks_on_a_device_share_it_and_the_batch(cases: Any) -> None:
    assert not cases.TOGETHER.dropout  # Every rank draws its own: losses would differ.
    asked = cases.ask(cases.TOGETHER, "hgx-h200", "clustersim")
    task = cases.task_of(asked, cases.laid_out(asked, cases.TOGETHER, 2, True), False, warmup=1, steps=4)
    assert (task.workers, task.share_devices) == (2, True)
    assert task.layout.mesh.dp * task.layout.micro_batch == cases.TOGETHER.micro_batch
    assert task.layout.scheme.overlap
