"""The command line: what each command prints and writes, and what it loads."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clustersim import files
from clustersim.app.door import run
from clustersim.app.looking import FileKind
from clustersim.compare import Run
from clustersim.plan import Plan
from clustersim.scenario.load import load_scenario
from clustersim.timeline import Timeline

SMALL = """\
schema_version: 1
name: small
model: gpt3-125m
training: {global_batch: 32, sequence: 1024, precision: bf16}
framework: megatron-lm
cluster: {nodes: {dgx-a100-80g: 1}, servers: {cpu-server-200g: 0..2}}
layout: {micro_batch: 4, recompute: none}
search: {simulate: 4}
what_if:
  - {name: half the batch, set: {training.global_batch: 16}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a small scenario, and no profiles of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLUSTERSIM_HOME", str(tmp_path / "home"))
    Path("small.yaml").write_text(SMALL, encoding="utf-8")
    return tmp_path


@pytest.fixture
def plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> Plan:
    """The plan of the small scenario, which lies in plan.json."""
    assert run(["-q", "plan", "small.yaml", "-o", "plan.json", "--workers", "1"]) == 0
    capsys.readouterr()
    found: Plan = files.load(Plan, "plan.json")
    return found


def _process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clustersim.app", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the door


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["--version"], ["demo", "--help"]])
def test_help_loads_nothing_heavy_and_is_quick(arguments: list[str]) -> None:
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "clustersim.app", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in found.stderr.splitlines() if "|" in line}
    assert "typer" in loaded
    assert not loaded & {"torch", "numpy", "pandas", "networkx", "simpy", "ruamel", "matplotlib"}
    # Machines are noisy, so the time is held against that of an application of two empty commands in the same minute.
    smallest = ["a", "--help"] if len(arguments) > 1 else ["--help"]
    bare = [sys.executable, "-c", _SMALLEST_APPLICATION, *smallest]
    ours = [sys.executable, "-m", "clustersim.app", *arguments]
    pairs = [(_processor_s(bare), _processor_s(ours)) for _ in range(6)]
    assert min(taken for _, taken in pairs) <= 2.0 * min(reference for reference, _ in pairs), pairs


_SMALLEST_APPLICATION = """
import typer
app = typer.Typer()
@app.command()
def a(x: int = 1) -> None: ...
@app.command()
def b() -> None: ...
app()
"""


def _processor_s(command: list[str]) -> float:
    """Processor time of a command, so that other processes do not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for command in (
        "plan", "simulate", "run", "compare", "profile", "calibrate", "topo", "schema", "init", "demo",
        "import",
    ):  # fmt: skip
        assert f" {command} " in text


def test_no_arguments_show_the_help() -> None:
    found = _process()
    assert found.returncode == 2
    assert "Usage: clustersim" in found.stdout + found.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import clustersim

    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"clustersim {clustersim.__version__}\n"


def test_shell_completion() -> None:
    completed = _process(
        _CLUSTERSIM_COMPLETE="complete_bash",
        COMP_WORDS="clustersim pl",
        COMP_CWORD="1",
        _TYPER_COMPLETE_ARGS="clustersim pl",
    )
    assert completed.stdout.split() == ["plan"]
    assert "complete" in _process("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout


def test_a_closed_pipe_is_no_error() -> None:
    found = subprocess.run(
        f"{sys.executable} -m clustersim.app schema plan | head -c 10; code=${{PIPESTATUS[0]}}; echo; echo $code",
        shell=True, executable="/bin/bash", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stderr == ""
    assert found.stdout.splitlines()[-1] in ("0", "141")


# ------------------------------------------------------------------------------------------------- plan and simulate


def test_plan_prints_one_screen_and_writes_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "small.yaml", "--workers", "1"]) == 0
    output = capsys.readouterr()
    assert "small: gpt3-125m, batch 32 x 1024 tokens, bf16, adam, megatron-lm" in output.out
    assert "layouts are legal" in output.out
    assert "Plan written to small.plan.json" in output.out
    assert "half the batch" in output.out
    assert "estimating" in output.err
    assert "\x1b" not in output.out + output.err
    assert "\r" not in output.out + output.err
    assert max(map(len, output.out.splitlines())) <= 100
    assert len(output.out.splitlines()) <= 45
    found: Plan = files.load(Plan, "small.plan.json")
    for candidate in found.best_of_family:
        assert {"allreduce": "allreduce", "sharded": "sharded-", "parameter-server": "ps "}[
            candidate.family
        ] in output.out


def test_plan_as_json_is_one_document_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "small.yaml", "--json", "--workers", "1", "--quiet"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    found = files.validated(Plan, json.loads(output.out), "plan")
    assert found.scenario.name == "small"
    assert sorted(path.name for path in folder.iterdir()) == ["small.yaml"]


def test_plan_draws_and_traces_the_best(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "small.yaml", "-o", "p.json", "--trace", "t.json", "--picture", "p.svg", "--workers", "1"]
    assert run(arguments) == 0
    assert {event["ph"] for event in json.loads(Path("t.json").read_text())["traceEvents"]} >= {"M", "X", "C"}
    text = xml.etree.ElementTree.fromstring(Path("p.svg").read_text())
    words = " ".join(element.text or "" for element in text.iter() if element.tag.endswith("text"))
    found: Plan = files.load(Plan, "p.json")
    assert len(found.best_of_family) == sum(
        words.count(f"{name}: dp") for name in ("allreduce", "sharded", "parameter server")
    )


def test_simulate_a_plan(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "plan.json", "--trace", "t.json"]) == 0
    text = capsys.readouterr().out
    assert "Critical path" in text
    assert "forward" in text
    assert "backward" in text
    assert max(map(len, text.splitlines())) <= 100
    assert json.loads(Path("t.json").read_text())["traceEvents"]


def test_simulate_agrees_with_the_plan_folded_or_not(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    steps = []
    for more in ([], ["--no-fold"], ["--steps", "2"]):
        assert run(["simulate", "plan.json", "--json", *more]) == 0
        steps.append(json.loads(capsys.readouterr().out))
    assert steps[0]["step_s"] == pytest.approx(plan.prediction.step_s, rel=1e-9)
    assert steps[1]["step_s"] == pytest.approx(steps[0]["step_s"], rel=1e-9)
    assert steps[1]["classes"] >= steps[0]["classes"]
    assert steps[2]["steps"] == 2
    assert steps[0]["layout"] == files.plain(plan.layout)


def test_the_critical_path_reaches_from_the_start_to_the_end(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "plan.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    path = found["critical_path"]
    assert path[0]["start_s"] == pytest.approx(0.0, abs=1e-9)
    assert sum(row["busy_s"] + row["waited_s"] for row in path) == pytest.approx(found["step_s"], rel=1e-6)


def test_simulate_a_scenario(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-q", "simulate", "small.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scenario"] == "small"


# ------------------------------------------------------------------------------------------------------- compare


def _measured(plan: Plan, factor: float) -> Run:
    """A run in which everything took `factor` times as long as predicted, in three steps."""
    from clustersim.app.planning import question_of, simulated

    _, timeline = simulated(plan, question_of(plan), steps=3)
    spans = tuple(
        replace(s, start_s=s.start_s * factor, end_s=s.end_s * factor, ready_s=s.ready_s * factor)
        for s in timeline.spans
    )
    found = Timeline(source="measured", steps=3, classes=timeline.classes, spans=spans)
    return Run(
        clustersim="0", program_digest=plan.program_digest, backend="gloo", device="none", ranks=8, environment={},
        warmup_steps=0, step_s=(plan.prediction.step_s * factor,) * 3, losses=(3.0, 2.5, 2.0), timeline=found,
    )  # fmt: skip


@pytest.fixture
def allreduce_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> Plan:
    """Like `plan`, without servers."""
    Path("small.yaml").write_text(SMALL.replace("layout: {", "layout: {sync: allreduce, "), encoding="utf-8")
    assert run(["-q", "plan", "small.yaml", "-o", "plan.json", "--workers", "1"]) == 0
    capsys.readouterr()
    found: Plan = files.load(Plan, "plan.json")
    return found


def test_compare_prints_the_error_and_the_joined_fraction(
    allreduce_plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    files.save(_measured(allreduce_plan, 1.25), "run.json")
    assert run(["compare", "plan.json", "run.json", "--trace", "both.json", "--tolerance", "25%"]) == 0
    text = capsys.readouterr().out
    assert "error -20 %" in text
    assert "100 % of the predicted ops were measured" in text
    assert max(map(len, text.splitlines())) <= 100
    names = [
        e["args"]["name"]
        for e in json.loads(Path("both.json").read_text())["traceEvents"]
        if e["name"] == "process_name"
    ]
    assert {name.split(":")[0] for name in names} == {"simulated", "measured"}


def test_compare_beyond_the_tolerance_exits_with_6(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    files.save(_measured(plan, 1.25), "run.json")
    assert run(["compare", "plan.json", "run.json", "--tolerance", "0.1", "--json"]) == 6
    output = capsys.readouterr()
    assert json.loads(output.out)["step"]["error"] == pytest.approx(-0.2, rel=1e-6)
    assert output.err == "error: the step is off by -20 %, and 0.1 is allowed; calibrate with this run, or allow more\n"


def test_a_run_of_another_program_is_refused(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    files.save(replace(_measured(plan, 1.0), program_digest="0" * 64), "run.json")
    assert run(["compare", "plan.json", "run.json"]) == 3
    assert "the run is of another program" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- topo, schema, init


@pytest.mark.parametrize("name", sorted(files.profile_names("nodes")))
def test_topo_of_every_node(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.svg"
    assert run(["topo", name, "--image", str(picture)]) == 0
    text = capsys.readouterr().out
    assert f"1 x {name}" in text
    assert max(map(len, text.splitlines())) <= 100
    assert xml.etree.ElementTree.fromstring(picture.read_text()).tag.endswith("svg")


def test_topo_folds_equal_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["topo", "gpt3-175b-dgx-a100"]) == 0
    text = capsys.readouterr().out
    assert "128 x dgx-a100-80g  nodes 0-127, ranks 0-1023" in text
    assert "16 x cpu-server-200g  nodes 128-143" in text
    assert len(text.splitlines()) < 20


def test_topo_as_json_is_the_graph(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["topo", "small.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kinds = [node["kind"] for node in found["nodes"]]
    assert kinds.count("gpu") == 8
    assert kinds.count("nvswitch") == 1
    assert {link["rate_bytes_per_s"] for link in found["links"] if link["to"].endswith("nvswitch")} == {300e9}


def test_names_in_a_picture_are_escaped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("odd.yaml").write_text(SMALL.replace("name: small", 'name: "<b> & $x$"'), encoding="utf-8")
    assert run(["topo", "odd.yaml", "--image", "odd.svg"]) == 0
    root = xml.etree.ElementTree.fromstring(Path("odd.svg").read_text())
    assert "<b> & $x$" in [element.text for element in root.iter()]


def test_png_needs_matplotlib_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["topo", "dgx-a100-80g", "--image", "x.png"]) == 2
    assert (
        capsys.readouterr().err == "error: PNG needs matplotlib; pip install 'clustersim[plot]', or name a file .svg\n"
    )
    assert not Path("x.png").exists()


def test_png(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run(["topo", "small.yaml", "--image", "x.png"]) == 0
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", list(FileKind))
def test_schema(kind: FileKind, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema", kind.value]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert found["title"] == f"clustersim {kind.value} file"
    assert _ill_typed_defaults(found) == []


def _ill_typed_defaults(node: Any) -> list[Any]:
    """Defaults that the schema itself would refuse."""
    if isinstance(node, list):
        return [bad for item in node for bad in _ill_typed_defaults(item)]
    if not isinstance(node, dict):
        return []
    bad = [bad for item in node.values() for bad in _ill_typed_defaults(item)]
    if node.get("type") == "string" and "default" in node and not isinstance(node["default"], str):
        bad.append(node)
    return bad


def test_schema_documents_unit_strings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema", "link"]) == 0
    rate = json.loads(capsys.readouterr().out)["properties"]["rate"]
    assert rate["type"] == "string"
    assert "400Gb/s" in rate["description"]


def test_init_writes_a_scenario_that_reads_and_its_schema(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init"]) == 0
    assert "Next: clustersim profile" in capsys.readouterr().out
    text = Path("scenario.yaml").read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=scenario.schema.json"
    assert "First let clustersim measure it" in text
    assert json.loads(Path("scenario.schema.json").read_text())["title"] == "clustersim scenario file"
    tree, _ = files.read_tree(Path("scenario.yaml"))
    from clustersim.scenario.scenario import Scenario

    assert files.validated(Scenario, tree, "scenario").cluster.nodes
    assert run(["init"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_init_to_the_screen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", "-o", "-"]) == 0
    assert capsys.readouterr().out.startswith("# yaml-language-server")
    assert not Path("scenario.yaml").exists()


# ------------------------------------------------------------------------------------------------------- scenarios


@pytest.mark.parametrize("name", sorted(files.scenario_names()))
def test_built_in_scenario_reads_and_resolves_with_its_what_ifs(name: str) -> None:
    path = files.scenario_path(name)
    question = load_scenario(name)
    assert question.scenario.name == name
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[0] == "# yaml-language-server: $schema=scenario.schema.json"
    # The question stands in plain words before the first key.
    assert "?" in text.partition("schema_version")[0]
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_plan_is_no_run_and_families_stand_in_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["plan", "gpt3-13b-dgx-a100", "--picture", "x.gif"]) == 2
    assert capsys.readouterr().err == "error: x.gif: a picture is an .svg or a .png file; name one\n"
    assert not list(tmp_path.iterdir())
    assert run(["plan", "gpt3-13b-dgx-a100", "--top", "1", "-o", "plan.json", "--workers", "1", "-q"]) == 0
    places = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " dp" in line[:5]]
    assert len(places) == 3
    assert places == sorted(places, key=int)
    assert run(["compare", "plan.json", "plan.json"]) == 3
    assert "plan.json: is a plan; give the run of it" in capsys.readouterr().err
