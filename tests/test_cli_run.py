"""The whole loop on this machine: a plan for two CPU ranks, a real run of it, the comparison. Needs torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clustersim import files
from clustersim.app import machine
from clustersim.app.door import run
from clustersim.app.machine import demo_scenarios
from clustersim.compare import Run
from clustersim.layout.layout import AllReduce, ParameterServer
from clustersim.plan import Plan
from clustersim.scenario.load import question
from clustersim.search.search import make_plan

_NOTED = "provenance: {method: estimate, source: a test}\n"
_PROFILES = {
    "devices/local.yaml": """\
name: local
kind: cpu
memory: 1GB
memory_bandwidth: 10GB/s
peak: {fp32: 20GFLOP/s}
power: 0W
idle_power: 0W
launch_overhead: 5us
roofline:
  gemm_efficiency: 0.8
  attention_efficiency: 0.5
  attention_backward_efficiency: 0.4
  memory_efficiency: 0.8
  kernel_floor: 2us
  provenance: {method: estimate, source: a test}
""",
    "links/local-loopback.yaml": """\
name: local-loopback
kind: loopback
rate: 2GB/s
segments: [{from: 0B, alpha: 60us, efficiency: 0.6}]
""",
    "nodes/local.yaml": """\
name: local
device: local
devices: 4
interconnect: {kind: host, link: local-loopback}
nic: {count: 1, link: local-loopback}
host:
  {cores: 2, memory: 4GB, memory_bandwidth: 10GB/s, reduce_rate: 3GB/s, rank_slowdown: [1, 1.2, 1.7, 2.2]}
""",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with rough profiles of a small machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLUSTERSIM_HOME", str(tmp_path / "home"))
    for name, text in _PROFILES.items():
        files.write_text(tmp_path / "hwprofiles" / name, text + _NOTED)
    base = files.profile_path("frameworks", "clustersim").read_text(encoding="utf-8")
    framework = (
        base.replace("name: clustersim\n", "name: clustersim-local\n").replace("1573MiB", "0B").replace("688MB", "0B")
    )
    files.write_text(tmp_path / "hwprofiles" / "frameworks" / "clustersim-local.yaml", framework)
    return tmp_path


def test_the_demo_plans_what_it_promises_and_the_executor_takes_it(folder: Path) -> None:
    from clustersim.execute.execute import prepare

    plans = [make_plan(question(tree, title), workers=1) for title, tree in demo_scenarios()]
    assert [plan.layout.mesh.dp for plan in plans] == [4, 2]
    first, second = (plan.layout.scheme for plan in plans)
    assert isinstance(first, AllReduce)
    assert isinstance(second, ParameterServer)
    assert (second.dedicated, second.colocated) == (2, 0)
    for plan in plans:
        task = prepare(plan, steps=1, warmup=0, seed=0, timeout_s=60.0, share_devices=False)
        assert task.processes == 4


def test_the_demo_measures_anew_what_an_earlier_version_wrote(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clustersim.cluster.load import load_node
    from clustersim.execute import launch, probe_host

    host = load_node("local").host
    monkeypatch.setattr(launch, "cores", lambda: host.cores)
    monkeypatch.setattr(probe_host, "host_memory_bytes", lambda: host.memory_bytes)
    written = folder / "hwprofiles" / "frameworks" / "clustersim-local.yaml"
    text = written.read_text("utf-8")
    files.write_text(written, "\n".join(line for line in text.splitlines() if "gradient_accumulation" not in line))
    assert "gradient_accumulation" in str(machine.unfit())
    files.write_text(written, text)
    assert machine.unfit() is None


@pytest.mark.timeout(120)
def test_plan_run_compare(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    Path("two.yaml").write_text(
        """\
schema_version: 1
name: two
model: tiny-1m
training: {global_batch: 4, sequence: 64, precision: fp32}
framework: clustersim-local
cluster: {nodes: {local: {count: 1, devices: 2}}}
layout: {tp: 1, pp: 1, sync: allreduce, algorithm: ring, recompute: none}
""",
        encoding="utf-8",
    )
    assert run(["-q", "plan", "two.yaml", "--workers", "1"]) == 0
    assert "Next: clustersim run two.plan.json" in capsys.readouterr().out
    assert run(["run", "two.plan.json", "--steps", "3", "--warmup", "1", "--trace", "trace.json"]) == 0
    output = capsys.readouterr()
    assert "loss" in output.out
    assert "Next: clustersim compare two.plan.json two.run.json" in output.out
    assert max(map(len, output.out.splitlines())) <= 100
    found: Run = files.load(Run, "two.run.json")
    plan: Plan = files.load(Plan, "two.plan.json")
    assert found.program_digest == plan.program_digest
    assert len(found.step_s) == 3
    assert json.loads(Path("trace.json").read_text())["traceEvents"]
    assert run(["compare", "two.plan.json", "two.run.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["joined_ops"] == 1.0
    assert run(["-q", "calibrate", "two.plan.json", "two.run.json"]) == 0
    assert (folder / "home" / "hwprofiles" / "calibrations" / "local--clustersim-local.yaml").is_file()
    assert "calibrations" in capsys.readouterr().out.replace("\n", "")
