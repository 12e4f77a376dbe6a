"""Malformed scenarios: one line on stderr that says where, what is wrong and what to write; the right exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clustersim.app.door import run

GOOD = """\
schema_version: 1
name: good
model: gpt3-125m
training:
  global_batch: 32
  sequence: 1024
  precision: bf16
framework: megatron-lm
cluster:
  nodes:
    dgx-a100-80g: 1
  fabric: one-switch
"""

_BOMB = "".join(
    f"      {name}: &{name} [{', '.join(['*' + before if before else '1'] * 10)}]\n"
    for before, name in zip(["", *"abcde"], "abcdef", strict=True)
)


def _with(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


# name: (text, line:column of the blame or "" where the whole file is to blame, what the message must contain)
MALFORMED: dict[str, tuple[str, str, str]] = {
    "wrong unit": (
        GOOD + "layout: {bucket: 25Gb/s}\n",
        "13:18",
        "layout.bucket: '25Gb/s' is not a size; write e.g. 80GiB",
    ),
    "unknown key": (
        _with("global_batch", "globl_batch"),
        "5:3",
        "training.globl_batch: unknown key; did you mean 'global_batch'?",
    ),
    "unknown key at the top": (GOOD + "objectve: usd\n", "13:1", "did you mean 'objective'?"),
    "unknown key in a union": (
        _with("fabric: one-switch", "fabric: {kind: leaf-spine, oversubscripton: 2}"),
        "12:30",
        "cluster.fabric.oversubscripton: unknown key; did you mean 'oversubscription'?",
    ),
    "unknown key like none": (
        GOOD + "x: 1\n",
        "13:1",
        "x: unknown key; known here: cluster, constraints, data, framework",
    ),
    "unknown key of an overridden profile": (
        _with("dgx-a100-80g: 1", "dgx-a100-80g: {count: 1, nics: {rate: 400Gb/s}}"),
        "11:30",
        "cluster.nodes.dgx-a100-80g.nics: unknown key; did you mean 'nic'?",
    ),
    "unknown key of dimensions": (
        _with("model: gpt3-125m", "model: {layers: 12, hiden: 768, heads: 12, vocab: 100}"),
        "3:21",
        "did you mean 'hidden'?",
    ),
    "bare number": (GOOD + "layout: {bucket: 1000000}\n", "13:18", "bare number 1000000 has no unit; write e.g. 80GiB"),
    "bare number in an overridden profile": (
        _with("dgx-a100-80g: 1", "dgx-a100-80g: {count: 1, nic: {rate: 400}}"),
        "11:42",
        "cluster.nodes.dgx-a100-80g.nic.rate: bare number 400 has no unit; write e.g. 400Gb/s",
    ),
    "negative count": (
        _with("global_batch: 32", "global_batch: -32"),
        "5:17",
        "training.global_batch: must be at least 1",
    ),
    "negative time": (GOOD + "constraints: {deadline: -5s}\n", "13:25", "'-5s' must be at least 0; write e.g. 5us"),
    "degree of nothing": (GOOD + "layout: {tp: 0}\n", "13:14", "layout.tp: must be at least 1, not 0"),
    "open bracket": (_with("name: good", "name: [good"), "3:6", "YAML: expected ',' or ']'"),
    "colon in a value": (_with("name: good", "name: good: bad"), "2:11", "quote a value that contains ': '"),
    "duplicate key": (_with("name: good", "name: good\nname: better"), "3:1", 'duplicate key "name"'),
    "tab": (_with("  global_batch", "\tglobal_batch"), "5:1", "indent with spaces, not with tabs"),
    "two documents": ("a: 1\n---\nb: 2\n", "2:1", "write one document"),
    "no nodes": (_with("dgx-a100-80g: 1", "dgx-a100-80g: 0"), "11:19", "0 nodes; write at least 1"),
    "unknown node": (_with("dgx-a100-80g", "dgx-a100-80gb"), "11:20", "did you mean 'dgx-a100-80g'?"),
    "unknown model": (_with("gpt3-125m", "gpt3-125"), "3:8", "did you mean gpt3-125m"),
    "unknown framework": (_with("megatron-lm", "megatron"), "8:12", "did you mean 'megatron-lm'?"),
    "unknown fabric": (_with("one-switch", "two-switch"), "12:11", "did you mean 'one-switch'?"),
    "node without devices": (_with("dgx-a100-80g", "cpu-server-200g"), "11:22", "write it under servers:"),
    "range that ends before it begins": (
        _with("  fabric:", "  servers: {cpu-server-200g: 16..0}\n  fabric:"),
        "12:30",
        "write the smaller number first",
    ),
    "range that is none": (
        _with("  fabric:", "  servers: {cpu-server-200g: some}\n  fabric:"),
        "12:30",
        "write e.g. 4 or 0..16",
    ),
    "block without a count": (
        _with("dgx-a100-80g: 1", "dgx-a100-80g: {nic: {rate: 400Gb/s}}"),
        "11:5",
        "count is required and missing",
    ),
    "alias bomb": (GOOD + "what_if:\n  - name: x\n    set:\n" + _BOMB, "", "values after expanding aliases"),
    "alias of itself": (GOOD + "what_if: &w\n  - *w\n", "14:5", "the alias *w contains itself; write the value out"),
    "nested too deeply": (_with("name: good", f"name: {'[' * 1500}"), "", "nested too deeply"),
    "NaN": (GOOD + "constraints: {memory_headroom: .nan}\n", "13:32", "nan is not a finite number; write e.g. 8%"),
    "NaN for a whole number": (_with("global_batch: 32", "global_batch: .nan"), "5:17", "not a finite number"),
    "infinity": (_with("  sequence", "  tokens: .inf\n  sequence"), "6:11", "inf is not a finite number"),
    "too large": (_with("global_batch: 32", f"global_batch: {10**30}"), "5:17", "is too large; write at most"),
    "what-if path that does not exist": (
        GOOD + "what_if:\n  - {name: x, set: {cluster.nodse.dgx-a100-80g: 2}}\n",
        "14:21",
        "there is no cluster.nodse; known here: background, fabric, faults, nodes, noise, servers, storage",
    ),
    "what-if key that does not exist": (
        GOOD + "what_if:\n  - {name: x, set: {cluster.nodes.dgx-a100-80g.nic.rat: 400Gb/s}}\n",
        "14:21",
        "did you mean 'rate'?",
    ),
    "what-if value without a unit": (
        GOOD + "what_if:\n  - name: x\n    set:\n      training.sequence: 512\n"
        "      cluster.nodes.dgx-a100-80g.nic.rate: 400\n",
        "17:7",
        "bare number 400 has no unit",
    ),
    "sequence beyond the positions": (_with("1024", "4096"), "6:13", "2048 learned positions; write at most 2048"),
    "bf16 on a V100": (_with("dgx-a100-80g", "dgx-1-v100"), "7:14", "the device has no bf16; use one of fp16, fp32"),
    "empty": ("", "", "is empty; `clustersim init` writes a scenario"),
    "list": ("- a\n- b\n", "1:1", "is not a block of keys; write e.g. key: value"),
    "word": ("hello\n", "", "'hello' is not a block of keys"),
    "no schema version": (
        _with("schema_version: 1\n", ""),
        "1:1",
        "schema_version: this key is required and missing; write schema_version: 1",
    ),
    "no model": (
        _with("model: gpt3-125m\n", ""),
        "1:1",
        "model: this key is required and missing; write e.g. model: NAME or {layers: 8, hidden: 8, heads: 8, vocab: 8}",
    ),
    "no size": (GOOD + "data: {}\n", "13:1", "data.sample: this key is required and missing; write e.g. sample: 80GiB"),
    "no choice": (
        GOOD + "  background: [{share: 0.1}]\n",
        "13:16",
        "background.0.link: this key is required and missing; write link: nic or leaf-uplink",
    ),
    "no block": (
        GOOD[: GOOD.index("cluster:")],
        "1:1",
        "cluster: this key is required and missing; write e.g. cluster: {nodes: {NAME: 8}}",
    ),
    "schema version of tomorrow": (
        _with("schema_version: 1", "schema_version: 2"),
        "1:17",
        "2 is not accepted; write 1",
    ),
    "required key missing": (
        _with("  sequence: 1024\n", ""),
        "4:1",
        "training.sequence: this key is required and missing; write e.g. sequence: 8",
    ),
    "rank that does not exist": (
        GOOD + "  faults:\n    - {kind: slow-rank, rank: 17, slowdown: 1.3}\n",
        "14:7",
        "rank 17 does not exist; the cluster has ranks 0 to 7",
    ),
    "unknown fault": (
        GOOD + "  faults:\n    - {kind: slow-gpu, rank: 1, slowdown: 1.3}\n",
        "14:14",
        "cluster.faults.0.kind: 'slow-gpu' is not one of 'slow-rank', 'slow-nic'",
    ),
    "word for a number": (
        _with("global_batch: 32", "global_batch: many"),
        "5:17",
        "'many' is not a whole number; write e.g. 8",
    ),
    "fraction for a number": (_with("global_batch: 32", "global_batch: 32.5"), "5:17", "32.5 is not a whole number"),
    "unknown choice": (GOOD + "objective: fastest\n", "13:12", "'fastest' is not one of 'step_time', 'usd'"),
    "word for a list": (GOOD + "search: {sync: allreduce}\n", "13:16", "is not a list; write e.g. ['allreduce']"),
    "key without a value": (_with("model: gpt3-125m", "model:"), "3:1", "model: has no value"),
    "boundaries that do not start at 0": (
        GOOD + "layout: {pp: 2, boundaries: [1, 6]}\n",
        "13:17",
        "layout.boundaries: must start at layer 0 and grow, e.g. [0, 6, 12, 18]",
    ),
    "boundaries that do not grow": (GOOD + "layout: {pp: 2, boundaries: [0, 0]}\n", "13:17", "must start at layer 0"),
    "boundaries behind the last layer": (
        GOOD + "layout: {pp: 2, boundaries: [0, 12]}\n",
        "13:17",
        "layout.boundaries: gpt3-125m has layers 0 to 11; 12 is none of them",
    ),
    "boundaries of too few chunks": (
        GOOD + "layout: {pp: 4, boundaries: [0, 3, 6]}\n",
        "13:17",
        "layout.boundaries: name 3 chunks; write the first layer of each of 4",
    ),
    "chunks that a schedule has not": (
        GOOD + "layout: {pp: 2, schedule: 1f1b, virtual_stages: 2}\n",
        "13:49",
        "layout.virtual_stages: 2: 1f1b has 1 a stage; write virtual_stages: 1, or schedule: interleaved",
    ),
    "sharp without switches that add up": (
        GOOD + "layout: {algorithm: sharp}\n",
        "13:21",
        "layout.algorithm: sharp: needs a fabric whose switches add up",
    ),
    "nvls without switches that add up": (
        GOOD + "layout: {algorithm: nvls}\n",
        "13:21",
        "layout.algorithm: nvls: needs switches that add up (interconnect.reduces: true), which dgx-a100-80g has not",
    ),
    "noise that is no block": (
        _with("fabric: one-switch", "noise: {worker: 0.1}"),
        "12:19",
        "cluster.noise.worker: 0.1 is not a block of keys; write e.g. {kind: lognormal, sigma: 0.05}",
    ),
    "noise of no kind": (
        GOOD + "  noise: {worker: {sigma: 0.1}}\n",
        "13:11",
        "cluster.noise.worker: kind is required and missing; it is one of lognormal, normal, exponential, pareto; "
        "write e.g. {kind: lognormal, sigma: 0.1}",
    ),
    "noise of no kind with the key of another": (
        GOOD + "  noise: {worker: {shape: 3}}\n",
        "13:11",
        "write e.g. {kind: pareto, shape: 3}",
    ),
    "block for a model with a mistake": (
        _with("model: gpt3-125m", "model: {layers: 12, hidden: 768, heads: 7, vocab: 100}"),
        "3:1",
        "model: hidden = 768 is no multiple of heads = 7; add head_dim",
    ),
    "true for a number": (
        _with("global_batch: 32", "global_batch: true"),
        "5:17",
        "training.global_batch: true is not a number; write e.g. global_batch: 8",
    ),
    "rate beyond everything": (
        _with("dgx-a100-80g: 1", "dgx-a100-80g: {count: 2, nic: {rate: 1e-300b/s}}"),
        "11:42",
        "is beyond everything that there is; write e.g. 400Gb/s or 50GB/s",
    ),
    "fewer devices than none": (_with("80g: 1", "80g: {count: 2, devices: -1}"), "11:39", "must not be negative"),
    "more nodes than there are": (_with("80g: 1", "80g: 100000"), "10:3", "more than 262144 devices together"),
    "more hosts than there are": (_with("80g: 1", "80g: 10000000"), "11:19", "10000000 hosts; write at most 262144"),
    "a long search": (
        _with("  fabric:", "  servers: {cpu-server-200g: 0..100000}\n  fabric:"),
        "12:30",
        "write a range of at most 1024",
    ),
    "framework with a long name": (_with("megatron-lm", "x" * 5000), "8:12", "is not a known framework; known: "),
    "model with a long name": (_with("gpt3-125m", "x" * 5000), "3:8", "is not a known model"),
    "framework that is a path": (_with("megatron-lm", "../frameworks/megatron-lm"), "8:12", "is not a known framework"),
    "half of a character": (_with("name: good", 'name: "\\ud800"'), "2:7", "holds a half of a character"),
    "character that is no text": (_with("name: good", "name: \x07"), "2:1", "holds the character U+0007; remove it"),
    "open quote": (GOOD + 'objective: "usd\n', "14:1", "close the quote"),
    "gradients that nobody adds up in": (
        GOOD + "layout: {gradient: fp8}\n",
        "13:20",
        "layout.gradient: 'fp8' is not one of 'fp64', 'fp32', 'bf16', 'fp16'",
    ),
    "gradients in what is only multiplied in": (
        GOOD + "layout: {gradient: tf32}\n",
        "13:20",
        "layout.gradient: 'tf32' is not one of 'fp64', 'fp32', 'bf16', 'fp16'",
    ),
    "bucket of nothing": (GOOD + "layout: {bucket: 0B}\n", "13:18", "layout.bucket: must be more than 0"),
    "config.json that is not there": (_with("gpt3-125m", "./nowhere/config.json"), "3:8", "no such file"),
}


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line that a command prints on stderr before it exits with `code`."""
    assert run(arguments) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert "Traceback" not in output.err
    assert output.err.startswith("error: "), output.err
    return output.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_scenario(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, place, words = MALFORMED[name]
    monkeypatch.chdir(tmp_path)
    Path("scenario.yaml").write_text(text, encoding="utf-8")
    line = _refused(["-q", "plan", "scenario.yaml", "--json"], capsys, 3)
    found = re.match(r"scenario\.yaml(?::(\d+:\d+))?: ", line)
    assert found is not None, line
    assert (found.group(1) or "") == place, line
    assert words in line, line


def test_the_scenario_that_the_malformed_ones_are_made_of_is_sound(tmp_path: Path) -> None:
    from clustersim.scenario.load import load_scenario

    (tmp_path / "good.yaml").write_text(GOOD, encoding="utf-8")
    assert load_scenario(tmp_path / "good.yaml").cluster.devices == 8


def test_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert _refused(["plan", "nowhere.yaml"], capsys, 3) == "nowhere.yaml: no such file"


def test_unknown_built_in_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    line = _refused(["plan", "gpt3-175b-dgx-a10"], capsys, 3)
    assert "no such file, and no built-in scenario of that name; did you mean 'gpt3-175b-dgx-a100'?" in line


def test_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    assert "is not UTF-8 text (byte 9); save it as UTF-8" in _refused(["plan", str(path)], capsys, 3)


def test_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a folder; name the file in it" in _refused(["simulate", f"{tmp_path}/"], capsys, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "plan.json: is empty"),
        ("{", "plan.json:1:2: JSON: the file is cut off here; write it again, a plan with `clustersim plan`"),
        ('{"a": [1,\n "b', "plan.json:2:2: JSON: the file is cut off here"),
        ('{"a": [1,\n tru', "plan.json:2:2: JSON: the file is cut off here"),
        ('{"a": [1,\n tru]', "plan.json:2:2: JSON: expecting value; write a value"),
        ('{"a": 1,}', "double quotes"),
        ('{"a": 1, "a": 2}', "'a' stands twice in one block; remove one of the two"),
        (f'{{"a": {10**30}}}', "is too large; write at most"),
        ("[" * 100_000, "nested too deeply"),
        ('{"program_digest": NaN}', "NaN is not JSON; write a finite number"),
        ('{"program_digest": "x"}', "this key is required and missing"),
    ],
)
def test_plan_that_is_none(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text(text, encoding="utf-8")
    assert words in _refused(["simulate", "plan.json"], capsys, 3)


def test_model_that_fits_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "big.yaml"
    path.write_text(_with("gpt3-125m", "gpt3-175b"), encoding="utf-8")
    line = _refused(["-q", "plan", str(path), "-o", str(tmp_path / "plan.json")], capsys, 4)
    assert "legal layouts fits" in line
    assert "use more nodes" in line
    assert not (tmp_path / "plan.json").exists()


def test_layout_that_divides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "three.yaml"
    path.write_text(GOOD + "layout: {tp: 3}\n", encoding="utf-8")
    told = f"{path}:13:14: layout.tp: 3: 8 devices % (tp 3) = 2, not 0; write 2 or 4, or leave it out"
    assert _refused(["-q", "plan", str(path)], capsys, 4) == told
    assert _refused(["-q", "simulate", str(path)], capsys, 4) == told


def test_more_micro_batches_than_are_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "many.yaml"
    path.write_text(_with("global_batch: 32", "global_batch: 1000000000"), encoding="utf-8")
    line = _refused(["-q", "plan", str(path)], capsys, 4)
    assert line.startswith(f"{path}:5:17: training.global_batch: 1000000000 samples are more than 65536 micro-batches")
    path.write_text(_with("global_batch: 32", "global_batch: 1000000") + "layout: {dp: 1, micro_batch: 1}\n")
    assert "makes more than 65536 micro-batches" in _refused(["-q", "plan", str(path)], capsys, 4)


def test_more_failures_than_are_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "failing.yaml"
    path.write_text(
        GOOD
        + "layout: {sync: allreduce, dp: 8}\nsearch: {simulate: 1}\nreliability: {detection: 10min, reschedule: 5min, "
        "failures: [{component: node, failures: 1e20, exposure: 1s}], checkpoint: {storage_rate: 1GB/s}}\n"
    )
    assert "are simulated: write fewer --days" in _refused(["-q", "simulate", str(path), "--days", "9"], capsys, 3)


def test_one_kind_of_file_in_the_place_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario, plan, run_ = tmp_path / "s.yaml", tmp_path / "p.json", tmp_path / "r.json"
    scenario.write_text(GOOD)
    plan.write_text('{"program_digest": "x", "ranking": []}')
    run_.write_text('{"program_digest": "x", "timeline": {}}')
    assert "is a scenario, not a plan; make one" in _refused(["compare", str(scenario), str(run_)], capsys, 3)
    assert "is a run, not a plan" in _refused(["compare", str(run_), str(run_)], capsys, 3)
    assert "is a plan or a run, not a scenario" in _refused(["plan", str(plan)], capsys, 3)
    assert "is a plan or a run, not a scenario" in _refused(["topo", str(plan)], capsys, 3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_has_no_room_or_no_reader() -> None:
    command = [sys.executable, "-m", "clustersim.app", "schema"]
    with open("/dev/full", "w") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (found.returncode, found.stderr) == (3, "error: the output cannot be written: No space left on device\n")
    closed = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m clustersim.app schema >&-"], stderr=subprocess.PIPE, check=False
    )
    assert (closed.returncode, closed.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["collective", "all-reduce", "--node", "hgx-h100", "--nodes", "1000000000"], "less than or equal to 32768"),
        (["simulate", "x.yaml", "--seed", "9" * 30], "--seed"),
        (["frobnicate"], "no such command 'frobnicate'"),
        (["plan"], "missing argument"),
        (["plan", "x.yaml", "--wrokers", "2"], "no such option: --wrokers"),
        (["plan", "x.yaml", "--top", "0"], "--top"),
        (["schema", "galaxy"], "invalid value for 'kind': 'galaxy' is not one of 'scenario'"),
        (["simulate", "x.yaml", "--days", "1e9"], "more than 0 and at most 36500"),
        (["simulate", "x.yaml", "--days", "3", "--trace", "t.json"], "leave out --days or --trace"),
        (["simulate", "x.yaml", "--seeds", "3"], "--seeds counts the runs of --days"),
        (["calibrate", "plan.json"], "PLAN RUN"),
        (["topo", "dgx-a100-80g", "--image", "picture.gif"], "an .svg or a .png file"),
        (["compare", "plan.json", "run.json", "--tolerance", "a lot"], "write e.g. 8% or 0.08"),
        (["profile", "--name", "../up"], "write letters, digits"),
        (["plan", "gpt3-13b-dgx-a100", "-o", "plan.yaml"], "a plan is a .json file; write e.g. -o plan.json"),
        (["plan", "gpt3-13b-dgx-a100", "-o", "-"], "or --json to print it"),
    ],
)
def test_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words.lower() in _refused(arguments, capsys, 2).lower()


@pytest.mark.parametrize("option", ["-o", "--trace", "--picture"])
@pytest.mark.parametrize("where", ["file/x", "."])
def test_what_cannot_be_written_is_told_before_the_search(
    option: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clustersim.search import search

    monkeypatch.delattr(search, "survey")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "folder.svg").mkdir()
    suffix = ".svg" if option == "--picture" else ".json"
    path = tmp_path / (f"folder{suffix}" if where == "." else f"{where}{suffix}")
    line = _refused(["-q", "plan", "gpt3-13b-dgx-a100", option, str(path)], capsys, 3)
    assert line.startswith(f"{path}: cannot be written: ")


@pytest.mark.parametrize(
    ("option", "words"), [(("--days", "3"), "write a reliability: block"), (("--seed", "3"), "nothing is random here")]
)
def test_what_an_option_asks_of_a_scenario_is_checked_before_the_search(
    option: tuple[str, str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clustersim.search import search

    monkeypatch.delattr(search, "survey")
    assert words in _refused(["-q", "simulate", "gpt3-13b-dgx-a100", *option], capsys, 3)


@pytest.mark.parametrize(
    ("profile", "key", "words"),
    [
        ("frameworks/megatron-lm.yaml", "gradient_accumulation", "write gradient_accumulation: fused, added or copied"),
        ("frameworks/megatron-lm.yaml", "host.per_step", "write e.g. per_step: 5us"),
        ("frameworks/megatron-lm.yaml", "overlap.pipeline_send", "write pipeline_send: true or false"),
        ("devices/a100-sxm-80g/device.yaml", "kind", "write kind: gpu or cpu"),
        ("devices/a100-sxm-80g/device.yaml", "memory", "write e.g. memory: 80GiB"),
        ("nodes/dgx-a100-80g/node.yaml", "interconnect.kind", "write kind: "),
        ("nodes/dgx-a100-80g/node.yaml", "nic", "write e.g. nic: {count: 8, link: NAME}"),
        ("links/nvlink3.yaml", "rate", "write e.g. rate: 400Gb/s or 50GB/s"),
        ("links/nvlink3.yaml", "segments", "write e.g. segments: [{from: 80GiB, alpha: 5us, efficiency: 8% or 0.08}]"),
    ],
)
def test_a_key_that_a_profile_misses_is_told_with_what_to_write(profile: str, key: str, words: str) -> None:
    from clustersim import files
    from clustersim.cluster.node import Node
    from clustersim.hardware.device import Device
    from clustersim.hardware.framework import Framework
    from clustersim.hardware.link import Link

    types = {"frameworks": Framework, "devices": Device, "nodes": Node, "links": Link}
    tree, places = files.read_tree(files.shipped_folder("hwprofiles") / profile)
    *blocks, last = key.split(".")
    block = tree
    for name in blocks:
        block = block[name]
    block.pop(last, None)
    with pytest.raises(files.ScenarioError) as told:
        files.validated(types[profile.split("/")[0]], tree, profile, places)
    assert f"{key}: this key is required and missing; {words}" in str(told.value)


def test_our_own_bug_is_one_line_and_a_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clustersim.scenario import load

    def broken(path: str) -> None:
        raise KeyError("an own mistake")

    monkeypatch.setattr(load, "load_scenario", broken)
    assert run(["plan", "x.yaml"]) == 1
    told = capsys.readouterr().err
    assert told == "internal error: KeyError: 'an own mistake'; please report with --debug output\n"
    assert run(["--debug", "plan", "x.yaml"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_interrupted_twice_while_workers_simulate(tmp_path: Path) -> None:
    """As at a terminal, every process of the group gets the signal; none may wait for another afterwards."""
    command = [
        sys.executable,
        "-m",
        "clustersim.app",
        "plan",
        "llama3-70b-hgx-h100",
        "--workers",
        "2",
        "-o",
        "plan.json",
    ]
    errors, folder = tmp_path / "errors.txt", tmp_path / "here"
    folder.mkdir()
    with errors.open("w") as to:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=to, start_new_session=True)
    try:
        until = time.monotonic() + 60.0
        while "simulated 1 of" not in errors.read_text() and time.monotonic() < until:
            time.sleep(0.02)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 130
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    told = errors.read_text()
    assert told.endswith("\ninterrupted\n")
    assert "Traceback" not in told
    assert not list(folder.iterdir())


def test_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from clustersim.search import search

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "make_plan", stopped)
    monkeypatch.chdir(tmp_path)
    assert run(["plan", "gpt3-13b-dgx-a100", "-o", "plan.json"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []
