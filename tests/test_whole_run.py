"""What a newcomer meets first: whole trainings in days and dollars, plans changed by hand, outputs, first errors."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clustersim import files
from clustersim.app import machine
from clustersim.app.door import run
from clustersim.plan import Plan
from clustersim.report.plan_screen import asked, whole_run
from clustersim.units import human_days

SMALL = """\
schema_version: 1
name: small
model: gpt3-125m
training: {global_batch: 32, sequence: 1024, precision: bf16, tokens: 3e9}
framework: megatron-lm
cluster: {nodes: {dgx-a100-80g: 1}, servers: {cpu-server-200g: 1}}
layout: {micro_batch: 4, recompute: none, sync: SYNC}
search: {simulate: 1}
constraints: {deadline: 1440h}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a small scenario, and no profiles of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLUSTERSIM_HOME", str(tmp_path / "home"))
    Path("small.yaml").write_text(SMALL.replace("SYNC", "allreduce"), encoding="utf-8")
    return tmp_path


@pytest.fixture
def plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> Plan:
    """The plan of the small scenario, which lies in plan.json."""
    assert run(["-q", "plan", "small.yaml", "-o", "plan.json", "--workers", "1"]) == 0
    capsys.readouterr()
    found: Plan = files.load(Plan, "plan.json")
    return found


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 3) -> str:
    assert run(["-q", *arguments]) == code
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line


def test_a_whole_run_is_all_steps_in_days_and_dollars(plan: Plan) -> None:
    found, step = plan.whole_run, plan.prediction
    assert found is not None
    assert found.steps == 91_553
    assert found.days == pytest.approx(91_553 * step.step_s / 86400.0)
    assert found.low_days < found.days < found.high_days
    assert found.deadline_days == 60.0
    # Eight GPUs, each at the price of its profile, and nothing else: no server is in use.
    (price,) = found.prices.values()
    assert found.usd == pytest.approx(found.days * 24.0 * 8.0 * price.hourly_usd_per_hour)
    (line,) = whole_run(plan)
    assert "3.00G tokens in 91,553 steps" in line
    assert f"${price.hourly_usd_per_hour:.4g} an hour for each GPU (profile a100-sxm-80g: {price.source}" in line
    assert line.count("within the deadline of 60 days") == 1
    assert "within 60 days" in asked(plan).plain


def test_a_whole_run_counts_the_servers_that_it_uses(folder: Path) -> None:
    text = SMALL.replace("SYNC", "parameter-server, placement: dedicated, servers: 1")
    Path("small.yaml").write_text(text, encoding="utf-8")
    assert run(["-q", "plan", "small.yaml", "-o", "plan.json", "--workers", "1"]) == 0
    found: Plan = files.load(Plan, "plan.json")
    assert found.whole_run is not None
    assert set(found.whole_run.prices) == {"a100-sxm-80g", "cpu-server-200g"}
    hourly = {name: price.hourly_usd_per_hour for name, price in found.whole_run.prices.items()}
    a_day = 24.0 * (8.0 * hourly["a100-sxm-80g"] + hourly["cpu-server-200g"])
    assert found.whole_run.usd == pytest.approx(found.whole_run.days * a_day)


@pytest.mark.parametrize(
    ("deadline", "words"),
    [(0.5, "more than the"), (1.01, "beyond which the interval reaches"), (100.0, "within the deadline")],
)
def test_the_deadline_is_held_against_the_interval(plan: Plan, deadline: float, words: str) -> None:
    assert plan.whole_run is not None
    days = plan.whole_run.days * deadline
    (line,) = whole_run(replace(plan, whole_run=replace(plan.whole_run, deadline_days=days)))
    assert words in line
    (line,) = whole_run(replace(plan, whole_run=replace(plan.whole_run, deadline_days=None, usd=None, prices={})))
    assert "deadline" not in line
    assert "dollars: not known" in line


def test_without_tokens_there_is_no_whole_run(folder: Path) -> None:
    text = Path("small.yaml").read_text("utf-8").replace(", tokens: 3e9", "").replace("deadline: 1440h", "")
    Path("small.yaml").write_text(text, encoding="utf-8")
    assert run(["-q", "plan", "small.yaml", "-o", "plan.json", "--workers", "1"]) == 0
    found: Plan = files.load(Plan, "plan.json")
    assert found.whole_run is None
    assert whole_run(found) == []


def test_a_deadline_that_nothing_meets_names_the_fastest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.yaml").write_text(Path("small.yaml").read_text("utf-8").replace("1440h", "3min"), encoding="utf-8")
    line = _refused(["plan", "small.yaml", "--workers", "1"], capsys, 4)
    assert "the fastest that fits, dp8 tp1 pp1 mb4" in line
    assert "and the deadline is 3.0 min" in line


def test_days_for_people() -> None:
    assert [human_days(days * 86400.0) for days in (0.5, 2.0, 45.123, 12345.6)] == [
        "12.0 h", "2 days", "45.12 days", "12,346 days",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------- changed by hand


def _set(tree: Any, keys: tuple[str | int, ...], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree[key]
    tree[keys[-1]] = value


@pytest.mark.parametrize("command", [["simulate", "edited.json"], ["compare", "edited.json", "x.json"]])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({("layout", "mesh", "dp"): 31}, "layout was changed by hand; plan again, or set layout: in the scenario"),
        (
            {("layout", "mesh", "dp"): 31, ("ranking", 0, "layout", "mesh", "dp"): 31},
            "its layout, workload or framework was changed by hand",
        ),
        ({("workload", "training", "global_batch"): 64}, "its layout, workload or framework was changed by hand"),
        (
            {("clustersim",): "0.0.1", ("workload", "training", "global_batch"): 64},
            "was made by clustersim 0.0.1, and its layout is another program here; plan again",
        ),
    ],
)
def test_a_plan_changed_by_hand_is_refused(
    command: list[str], changes: dict[Any, Any], words: str, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = json.loads(Path("plan.json").read_text("utf-8"))
    for keys, value in changes.items():
        _set(tree, keys, value)
    Path("edited.json").write_text(json.dumps(tree), encoding="utf-8")
    line = _refused(command, capsys)
    assert line.startswith("error: edited.json: ")
    assert words in line


# ------------------------------------------------------------------------------------------------------- the outputs


def test_a_plan_goes_into_a_pipe_as_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    with subprocess.Popen(["cat", "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        assert run(["-q", "plan", "small.yaml", "-o", "pipe", "--workers", "1"]) == 0
        text, _ = reader.communicate(timeout=30)
    assert files.validated(Plan, json.loads(text), "pipe").scenario.name == "small"
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    assert sorted(path.name for path in folder.iterdir()) == ["pipe", "small.yaml"]
    assert "Keep it: clustersim plan" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["topo", "dgx-a100-80g", "--image", "none/x.svg"],
        ["plan", "small.yaml", "-o", "none/x.json"],
        ["run", "plan.json", "-o", "none/x.json"],
        ["compare", "plan.json", "run.json", "--trace", "none/x.json"],
        ["init", "-o", "none/x.yaml"],
    ],
)
def test_no_output_makes_folders(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = _refused(arguments, capsys)
    assert "cannot be written: there is no folder none; make it, or name another place" in line
    assert not Path("none").exists()


# ----------------------------------------------------------------------------------------------------- first errors


@pytest.mark.parametrize(("text", "mend"), [("15", "write 15% or 0.15"), ("1.5", "is 150%; write 1.5% or 0.015")])
def test_a_tolerance_without_its_sign(text: str, mend: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mend in _refused(["compare", "plan.json", "run.json", "--tolerance", text], capsys, 2)


def test_an_unknown_local_machine_is_to_be_profiled(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", "-o", "mine.yaml"]) == 0
    text = Path("mine.yaml").read_text("utf-8")
    assert f"nodes: {{{machine.LOCAL}: " in text
    assert "--quick: two minutes at most" in text
    capsys.readouterr()
    for words in (
        f"{machine.LOCAL!r} is not a known node yet",
        f"'clustersim-{machine.LOCAL}' is not a known framework",
    ):
        line = _refused(["plan", "mine.yaml"], capsys)
        assert words in line
        assert line.endswith("measure this machine first, once: clustersim profile\n")
        Path("mine.yaml").write_text(text.replace(f"{{{machine.LOCAL}: ", "{dgx-a100-80g: "), encoding="utf-8")


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clustersim", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout[:11], done.stderr) == (0, "clustersim ", "")


@pytest.mark.parametrize(("seconds", "counts"), [((1.0, 0.96, 2.0), None), ((1.0, 0.78, 0.9), "2 and 4 ranks")])
def test_ranks_that_share_cores_are_not_faster(seconds: tuple[float, ...], counts: str | None) -> None:
    from clustersim.app.probe_screen import faster_together

    shared = [SimpleNamespace(ranks=2**i, layer=SimpleNamespace(seconds=s)) for i, s in enumerate(seconds)]
    probe: Any = SimpleNamespace(shared=shared)
    lines = faster_together(probe)
    assert len(lines) == (counts is not None)
    assert counts is None or counts in lines[0]
