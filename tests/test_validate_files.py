"""Files of measurements that are not as they should be, and what the screens say of them in 80 and 100 columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustersim.app import screen
from clustersim.app.door import run
from clustersim.validate.case import Case, Unmapped, line_words, reasons
from clustersim.validate.family import Rows
from clustersim.validate.formats import read_cases
from clustersim.validate.point import Points, named_in
from clustersim.validate.rows import Row
from clustersim.validate.training_rows import training_case
from clustersim.validate.words import DEVICES, FRAMEWORKS, PRECISIONS, RECOMPUTE, SHARDING, WRITTEN, known

RUN = {
    "id": "one", "gpu": "A100-SXM4-80GB", "gpus": "8", "layers": "4", "hidden": "1024", "heads": "16",
    "vocab": "51200", "seq_len": "1024", "tp": "2", "sp": "0", "pp": "1", "mbs": "2", "gbs": "64", "shard": "none",
    "recompute": "full", "precision": "fp16", "framework": "Megatron-LM", "sec_per_iter": "0.5",
}  # fmt: skip
FSDP = RUN | {"framework": "FSDP", "precision": "bf16", "shard": "FSDP", "tp": "1", "mbs": "1"}
COLLECTIVE = {
    "gpu": "H100-SXM5-80GB", "ranks": "8", "nodes": "1", "collective": "all_reduce", "size_bytes": "67108864",
    "time_us": "400",
}  # fmt: skip
SYNC = {
    "nodes": "8", "pattern": "send_recv", "implementation": "Gloo", "size_mb": "64", "bandwidth_gbps": "10",
    "time_s": "0.11", "node": "p3-2xlarge",
}  # fmt: skip


def text_of(*rows: dict[str, str]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return "\n".join([",".join(names), *(",".join(row.get(name, "") for name in names) for row in rows)]) + "\n"


def without(column: str) -> dict[str, str]:
    return {name: cell for name, cell in RUN.items() if name != column}


def case_of(**changed: str) -> Case | Unmapped:
    return training_case(Row(line=2, cells={name: cell for name, cell in (RUN | changed).items() if cell}))


def points_of(folder: Path, *rows: dict[str, str]) -> Points:
    (folder / "rows.csv").write_text(text_of(*rows))
    found = read_cases(folder / "rows.csv", {})
    assert isinstance(found, Points)
    return found


# ------------------------------------------------------------------------------------------------ broken files

GOOD = text_of(RUN)
HEAD, ROW = GOOD.splitlines()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (text_of(without("gbs")), ":1: the columns are of no known format; for training steps it lacks gbs"),
        (text_of(without("mbs")), ":2: no row could be predicted: line 2: mbs is not stated; fill it with --defaults"),
        (text_of(RUN | {"sec_per_iter": "500ms"}), "line 2: sec_per_iter = '500ms' is no number; write digits"),
        (text_of(RUN | {"mem_gb": "10", "mem_unit": "MB"}), "line 2: mem_unit = 'MB' is neither GB nor GiB"),
        ("", ":1: is empty; write a header line"),
        ("\n# nothing\n", ":1: is empty; write a header line"),
        (HEAD + "\n", ":1: has no rows; write one for each run below the header"),
        (GOOD.replace(",", ";"), ":1: cells are separated by semicolons; write commas"),
        (GOOD.replace(",", "\t"), ":1: cells are separated by tabs; write commas"),
        (f"# note\n{HEAD},gbs\n{ROW},64\n", ":2: column 'gbs' stands there twice; name every column once"),
        (text_of(RUN | {"sec_per_iter": "-0.5"}), "line 2: sec_per_iter = -0.5; it must be more than 0"),
        (text_of(RUN | {"mem_gb": "-1"}), "line 2: mem_gb = -1; it must be more than 0"),
        (text_of(RUN | {"gpus": "many"}), "line 2: gpus = 'many' is no number; write digits, a decimal point"),
        (text_of(RUN | {"gpus": "1e30"}), "line 2: gpus = 1e+30 is too large; write at most 10,000,000"),
        (text_of(RUN | {"layers": "1000000"}), "line 2: layers = 1000000: no model has so many"),
        (text_of(RUN | {"sp": "maybe"}), "line 2: sp = 'maybe': write 1 (yes) or 0 (no)"),
        (text_of(RUN | {"gpu": "MI300X"}), "line 2: gpu = 'MI300X' has no profile; known are A100-SXM4-80GB, "),
        (text_of(RUN | {"gpu": "H100-PCIe-80GB"}), "line 2: gpu = 'H100-PCIe-80GB' has no profile"),
        (text_of(RUN | {"gpu": "", "node": "dgx-a1000"}), "'dgx-a1000' is not a known node; did you mean 'dgx-a100"),
        (text_of(RUN | {"framework": "JAX"}), "line 2: framework = 'JAX' has no profile; known are Megatron-LM, "),
        (text_of(RUN | {"recompute": "sel"}), "recompute = 'sel' is not understood; write none, selective or full"),
        (text_of(RUN | {"shard": "3"}), "shard = '3' is not understood; write none, ZeRO-1, ZeRO-2, ZeRO-3 or FSDP"),
        (text_of(RUN | {"gpus": "16"}), "fill it with --defaults, e.g. inter_node: 8x200Gb/s InfiniBand"),
        (text_of(RUN | {"dp": "2"}), "gpus = 8 is not tp 2 * pp 1 * cp 1 * dp 2 = 4; cp that is not stated is 1"),
        (text_of(RUN | {"tp": "3"}), "gpus = 8 is no multiple of tp 3 * pp 1 * cp 1 = 3; cp that is not stated"),
        (text_of(RUN | {"cp": "0"}), "line 2: cp = 0; it must be at least 1"),
        (
            text_of(FSDP | {"gbs": "7"}),
            "not legal here: gbs = 7 has fewer samples than dp 8 * mbs 1; dp = gpus 8 / (tp 1 * pp 1 * cp 1)",
        ),
        (
            text_of(RUN | {"shard": "ZeRO-3", "framework": "Megatron-DeepSpeed", "tp": "1", "pp": "4"}),
            "line 2: the layout is not legal here: shard = ZeRO-3: only ZeRO-1 has a pipeline, and pp = 4",
        ),
        (text_of(RUN | {"heads": "8", "tp": "1", "pp": "8"}), "not legal here: pp = 8: 4x1024 has 4 layers, fewer"),
        (text_of(without("sec_per_iter")), "line 2: no time: needs one of iteration_ms, sec_per_iter, tokens_per_s, "),
        (
            "gpus,tokens_per_s_per_gpu\n8,5000\n",
            "for training steps it lacks gbs, hidden, layers (or preset in place of hidden and layers)",
        ),
        ("gpus,gbs,tflops_per_gpu\n8,8,400\n", "for training steps it lacks hidden, layers (or preset in place"),
        ("gpus,nodes\n8,1\n", "samples_per_s, sec_per_iter, tflops_per_gpu, "),
        (text_of(RUN | {"id": "x" * 200_000}), ":2: field larger than field limit (131072); write short cells"),
        (f"{HEAD}\n\"{ROW}\n{ROW}\n", ":2: 1 cells under 18 columns; quote cells with commas, and close every quote"),
        (text_of(COLLECTIVE | {"time_us": "-1"}), "line 2: time_us = -1; it must be more than 0"),
        (text_of(COLLECTIVE | {"gpu": "", "node": "hgx-h1000"}), "line 2: 'hgx-h1000' is not a known node"),
        (text_of(SYNC | {"delay_ms": "-5"}), "line 2: delay_ms = -5; it must be at least 0"),
        (text_of(SYNC | {"nodes": "1"}), "line 2: nodes = 1; a synchronisation needs two"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_line_that_says_where_and_what_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs.csv").write_text(text)
    assert run(["validate", "--cases", "runs.csv", "--plot", "steps.svg", "-q"]) == 3
    told = capsys.readouterr()
    assert told.err.startswith("error: runs.csv:")
    assert words in told.err
    assert told.err.count("\n") == 1
    assert not told.out
    assert [path.name for path in Path().iterdir()] == ["runs.csv"]


@pytest.mark.parametrize("data", [
    b"\xef\xbb\xbf" + GOOD.encode(),
    GOOD.replace("\n", "\r\n").encode(),
    GOOD.replace("\n", "\r").encode(),
    f"{HEAD},,\n{ROW},,\n".encode(),
])  # fmt: skip
def test_marks_line_ends_and_empty_columns_of_other_programs_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    (tmp_path / "runs.csv").write_bytes(data)
    assert run(["validate", "--cases", str(tmp_path / "runs.csv"), "--json", "-q"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["families"]
    assert [row["line"] for row in found["rows"]] == [2]


def test_text_in_another_encoding_is_told_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.csv").write_bytes(GOOD.encode() + b"\xff\n")
    assert run(["validate", "--cases", str(tmp_path / "runs.csv"), "-q"]) == 3
    assert "runs.csv:3: is not UTF-8 text; save it as CSV in UTF-8" in capsys.readouterr().err


def test_a_default_without_a_value_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.csv").write_text(text_of(RUN | {"recompute": ""}))
    (tmp_path / "more.yaml").write_text("recompute:\n")
    arguments = ["--cases", str(tmp_path / "runs.csv"), "--defaults", str(tmp_path / "more.yaml")]
    assert run(["validate", *arguments, "-q"]) == 3
    assert "'recompute' has no value; write one" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ reasons and lines


@given(st.sets(st.integers(2, 200), min_size=1))
def test_lines_in_words_are_the_lines(lines: set[int]) -> None:
    words = line_words(sorted(lines), most=1000).removeprefix("lines ").removeprefix("line ")
    told: set[int] = set()
    for one in words.split(", "):
        first, _, last = one.partition("-")
        told |= set(range(int(first), int(last or first) + 1))
    assert told == lines
    assert "lines" in line_words(sorted(lines)) or len(lines) == 1


def test_many_stretches_of_lines_are_counted() -> None:
    assert line_words([2, 3, 4, 9, 11]) == "lines 2-4, 9, 11"
    assert line_words([5]) == "line 5"
    assert line_words(range(2, 40, 2), most=2) == "lines 2, 4 and 17 more"


@given(st.lists(st.sampled_from("abc"), min_size=1))
def test_every_refused_line_has_one_reason(whys: list[str]) -> None:
    found = reasons(Unmapped(id="x", line=at, reason=why) for at, why in enumerate(whys))
    assert sorted(line for _, lines in found for line in lines) == list(range(len(whys)))
    assert [len(lines) for _, lines in found] == sorted((len(lines) for _, lines in found), reverse=True)


def test_one_reason_is_told_once_with_its_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = RUN | {"framework": "JAX"}
    Path("runs.csv").write_text(text_of(RUN, bad, bad, RUN, bad))
    assert run(["validate", "--cases", "runs.csv", "-q"]) == 0
    out = capsys.readouterr().out
    assert "Rows of runs that are not predicted" in out
    assert "3 lines 3-4, 6: framework = 'JAX' has no profile" in out
    assert out.count("JAX") == 1
    assert run(["validate", "--cases", "runs.csv", "--json", "-q"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["families"]
    assert [row["line"] for row in found["unmapped"]] == [3, 4, 6]
    assert len(found["rows"]) + len(found["unmapped"]) == 5


# ------------------------------------------------------------------------------------------------ what is assumed


def test_what_an_encoder_leaves_open_is_said_of_each_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bert = RUN | {"preset": "bert-large", "tp": "1", "seq_len": "512", "framework": "PyTorch DDP"}
    full = bert | {"lengths": "full", "predicted": "0.15"}
    Path("bert.csv").write_text(text_of(bert | {"lengths": "", "predicted": ""}, full))
    assert run(["validate", "--cases", "bert.csv", "--json", "-q"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["families"]
    first, second = found["rows"]
    assert [words.split(" ")[0] for words in first["assumed"]] == ["every", "15"]
    assert second["assumed"] == []
    assert first["predicted_s"] == second["predicted_s"]
    assert run(["validate", "--cases", "bert.csv", "-q"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "? assumed, line 2: every sequence is as long as seq_len" in out
    varied = case_of(**(bert | {"lengths": "bins of 64"}))
    assert isinstance(varied, Unmapped)
    assert "different lengths" in varied.reason


@pytest.mark.parametrize(("framework", "on"), [("Megatron-LM", False), ("Megatron-Core", True), ("NeMo", True)])
def test_sequence_parallelism_is_what_the_column_says_or_said_to_be_assumed(framework: str, on: bool) -> None:
    for text, wanted in (("1", True), ("0", False), ("yes", True)):
        stated = case_of(framework=framework, sp=text)
        assert isinstance(stated, Case)
        assert stated.scenario["layout"]["sequence_parallel"] is wanted
        assert stated.assumed == ()
    left_open = case_of(framework=framework, sp="")
    assert isinstance(left_open, Case)
    assert left_open.scenario["layout"]["sequence_parallel"] is on
    assert len(left_open.assumed) == 1
    alone = case_of(framework=framework, sp="", tp="1")
    assert isinstance(alone, Case)
    assert alone.assumed == ()


@given(tp=st.sampled_from([1, 2, 4, 8]), pp=st.sampled_from([1, 2, 4]), cp=st.sampled_from(["", "1", "2"]))
def test_degrees_that_are_not_stated_are_1_and_what_the_gpus_leave(tp: int, pp: int, cp: str) -> None:
    found = case_of(tp=str(tp), pp=str(pp), cp=cp)
    rest, left = divmod(8, tp * pp * int(cp or 1))
    if left:
        assert isinstance(found, Unmapped)
        assert f"gpus = 8 is no multiple of tp {tp} * pp {pp} * cp {cp or 1} = " in found.reason
        assert ("cp that is not stated" in found.reason) == (not cp)
        return
    assert isinstance(found, Case), found
    layout = found.scenario["layout"]
    assert (layout["dp"], layout["cp"], layout["ep"]) == (rest, int(cp or 1), 1)
    assert case_of(tp=str(tp), pp=str(pp), cp=cp, dp=str(rest)) == found


def test_what_the_messages_say_may_be_written_is_understood() -> None:
    tables = {
        "gpu": DEVICES, "framework": FRAMEWORKS, "precision": PRECISIONS, "recompute": RECOMPUTE, "shard": SHARDING,
    }  # fmt: skip
    assert tables.keys() == WRITTEN.keys()
    for column, words in WRITTEN.items():
        read = {known(Row(line=2, cells={column: word}), column, tables[column]) for word in words}
        # Further words of these frameworks say how they were run.
        apart = {"torchtitan-compile", "megatron-deepspeed-blocking"}
        assert read == set(tables[column].values()) - {""} - apart


def test_a_preset_stands_for_the_dimensions(tmp_path: Path) -> None:
    dimensions = ("layers", "hidden", "heads", "vocab")
    row = {name: cell for name, cell in RUN.items() if name not in dimensions} | {"preset": "gpt2-xl"}
    path = tmp_path / "runs.csv"
    path.write_text(text_of(row))
    found = read_cases(path, {})
    assert isinstance(found, Rows)
    assert [case.scenario["model"] for case in found.cases] == ["gpt2-xl"]


def test_megatron_of_later_years_is_megatron_core() -> None:
    for changed in ({"gpu": "H100-SXM5-80GB"}, {"gpu": "H100-SXM5-80GB", "precision": "fp8"}):
        found = case_of(**changed)
        assert isinstance(found, Case)
        assert found.scenario["framework"] == "megatron-core"
        assert "Megatron Core" in found.assumed[0]
    early = case_of()
    assert isinstance(early, Case)
    assert (early.scenario["framework"], early.assumed) == ("megatron-lm", ())


def test_gradients_are_read_from_composer_s_words_only() -> None:
    for text, gradient in (("amp_bf16 DEFAULT", "fp32"), ("amp_bf16 PURE", "bf16"), ("bf16 (default)", None)):
        found = case_of(precision=text)
        assert isinstance(found, Case)
        assert found.scenario["layout"].get("gradient") == gradient


# ------------------------------------------------------------------------------------------------ whose figures


def test_rows_of_the_table_are_known_by_their_times_whoever_they_are_from(tmp_path: Path) -> None:
    from clustersim.cluster.load import load_machine

    table = load_machine("hgx-h100").collectives
    assert table is not None
    sizes, seconds = table.curves["all_reduce", 8, 1]
    own = [
        COLLECTIVE | {"system": "ours", "size_bytes": str(int(size)), "time_us": repr(float(time) * 1e6)}
        for size, time in zip(sizes, seconds, strict=True)
    ]
    assert [point.seen for point in points_of(tmp_path, *own).points] == [True] * len(own)
    off = [row | {"time_us": repr(float(row["time_us"]) * 1.02)} for row in own]
    assert not any(point.seen for point in points_of(tmp_path, *off).points)
    # Two rows may be alike by chance.
    assert not any(point.seen for point in points_of(tmp_path, *own[:2]).points)


def test_columns_of_one_source_name_no_source(tmp_path: Path) -> None:
    row = COLLECTIVE | {"max_rank_mean_us": "50", "source_path": "x/nccl_perf.parquet"}
    (point,) = points_of(tmp_path, row).points
    assert (point.source, point.seen) == (None, False)


def test_a_source_is_named_as_a_whole() -> None:
    assert named_in("ai-dynamo/aiconfigurator", "ai-dynamo/aiconfigurator (H100 SXM); others")
    assert not named_in("a", "ai-dynamo/aiconfigurator (H100 SXM)")
    assert not named_in("ai-dynamo/aiconf", "ai-dynamo/aiconfigurator")
    assert not named_in(None, "anything")


def test_one_flow_is_as_fast_as_the_column_or_the_link_says(tmp_path: Path) -> None:
    rows = [SYNC | changed for changed in ({}, {"flow_gbps": "5"}, {"flow_gbps": "2.5"}, {"flow_gbps": "10"})]
    named = SYNC | {"node": "", "system": "a rack of p3.2xlarge"}
    found = [point.predicted for point in points_of(tmp_path, *rows, named).points]
    assert found[0] == found[1] == found[4]
    assert found[2] == pytest.approx(2.0 * found[1], rel=0.01)
    assert found[3] == pytest.approx(0.5 * found[1], rel=0.01)
    nccl = points_of(tmp_path, *(row | {"implementation": "NCCL"} for row in rows)).points
    assert len({point.predicted for point in nccl}) == 1


def test_points_that_a_link_was_fitted_on_are_in_the_profile(tmp_path: Path) -> None:
    fitted = SYNC | {"implementation": "NCCL", "nodes": "2", "bandwidth_gbps": "5", "time_s": "0.109"}
    rows = [fitted, fitted | {"time_s": "0.11"}, fitted | {"delay_ms": "1"}, fitted | {"implementation": "Gloo"}]
    assert [point.seen for point in points_of(tmp_path, *rows).points] == [True, False, False, False]


# ------------------------------------------------------------------------------------------------ screens


def test_rows_that_do_not_fit_by_prediction_are_told_with_their_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(screen, "WIDTH", 120)
    large = RUN | {"gpu": "A100-SXM4-40GB", "layers": "40", "hidden": "8192", "heads": "64", "tp": "8"}
    kept = large | {"kept_elsewhere": "optimizer states in host memory"}
    Path("runs.csv").write_text(text_of(RUN | {"mem_gb": "10"}, large | {"mem_gb": "39"}, large, kept, RUN))
    assert run(["validate", "--cases", "runs.csv", "-q"]) == 0
    told = capsys.readouterr().out
    assert "memory: 2 rows do not fit by prediction, though they ran (" in told
    assert "of the device's memory): lines 3-4\n" in told
    assert "2 memory beyond the device's, by prediction" in told
    assert "within 5 %" not in told
    # All but the one that kept states elsewhere are judged; two state memory.
    assert [line.split()[1] for line in told.splitlines() if line.startswith("runs ")] == ["5", "2"]
    assert "2 of 4" in told
    assert run(["validate", "--cases", "runs.csv", "--json", "-q"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["families"]
    assert [row["fits"] for row in found["rows"]] == [True, False, False, False, True]
    assert ["memory beyond the device's, by prediction" in row["outside"] for row in found["rows"]] == [
        False, True, True, False, False,
    ]  # fmt: skip
    Path("runs.csv").write_text(text_of(RUN, large))
    assert run(["validate", "--cases", "runs.csv", "-q"]) == 0
    told = capsys.readouterr().out
    assert "1 row does not fit by prediction, though it ran (" in told
    assert "Memory of the fullest device" not in told


@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_longer_than_the_screen_and_none_goes_on_at_the_edge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(screen, "WIDTH", width)
    bench = {"system": "a machine with a long name", "gpu": "H100-SXM5-80GB", "unit": "TFLOP/s", "value": "700"}
    bert = RUN | {"preset": "bert-large", "tp": "1", "lengths": "", "seq_len": "512"}
    files = {
        "steps": [RUN | {"id": "a-row-with-quite-a-long-name-for-a-row"}, RUN | {"framework": "JAX"}, bert],
        "collectives": [COLLECTIVE, COLLECTIVE | {"gpu": "A40"}],
        "syncs": [
            SYNC | {"implementation": "NCCL all_reduce", "pattern": "allreduce", "delay_ms": "10"},
            SYNC | {"implementation": "NCCL reduce + broadcast", "pattern": "centralized_ps", "delay_ms": "10"},
        ],
        "bench": [bench | {"test": "cuBLASLt GEMM fp8", "params": "m=32768 n=32768 k=32768"}, bench | {"test": "LU"}],
    }
    for name, rows in files.items():
        Path(f"{name}.csv").write_text(text_of(*rows))
        assert run(["validate", "--cases", f"{name}.csv", "-q"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width, name
        # Rows begin with their line numbers, flush right; what goes on below them is indented.
        heads = (
            "line", "by:", "!", "?", "tables:", "note:", "Rows", "Which", "Furthest", "family", "steps", "all",
            "a machine", "hgx-h100", "p3-2xlarge", "syncs",
        )  # fmt: skip
        for line in lines:
            at = line.lstrip()
            assert not line or line != at or line.startswith(heads) or at[0] in "+-0123456789", (name, line, lines)
