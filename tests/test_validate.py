"""The scoreboard: rows of measured runs read as cases, and the figures of their predictions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clustersim.app.door import run
from clustersim.errors import InputError
from clustersim.validate.case import Case, Unmapped
from clustersim.validate.family import rows_in, rows_of, shipped_families
from clustersim.validate.rows import Row, read_rows
from clustersim.validate.score import Scored, score
from clustersim.validate.scoreboard import memory_summary, ranking, spearman, summary
from clustersim.validate.training_rows import training_case

CELLS = {
    "id": "one", "gpu": "A100-SXM4-80GB", "gpus": "16", "inter_node": "8x200Gb/s HDR InfiniBand", "layers": "24",
    "hidden": "1024", "heads": "16", "vocab": "51200", "seq_len": "1024", "tp": "2", "pp": "2", "mbs": "2", "gbs": "64",
    "shard": "none", "recompute": "full (every layer)", "precision": "fp16", "framework": "Megatron-LM (2021)",
    "sec_per_iter": "0.5", "mem_gb": "10",
}  # fmt: skip


def case_of(**changed: str) -> Case | Unmapped:
    cells = {name: cell for name, cell in (CELLS | changed).items() if cell}
    return training_case(Row(line=2, cells=cells))


def test_a_row_becomes_a_scenario_that_fixes_what_it_states() -> None:
    case = case_of()
    assert isinstance(case, Case)
    assert case.measured_s == 0.5
    assert case.memory_bytes == 10e9
    assert case.cluster == "dgx-a100-80g--megatron-lm"
    assert case.scenario["cluster"]["nodes"] == {
        "dgx-a100-80g": {"count": 2, "nic": {"count": 8, "link": "infiniband-hdr200"}}
    }
    layout = case.scenario["layout"]
    assert (layout["tp"], layout["pp"], layout["recompute"], layout["sync"]) == (2, 2, "full", "allreduce")


@pytest.mark.parametrize(
    ("changed", "seconds"),
    [
        ({"sec_per_iter": "", "iteration_ms": "250"}, 0.25),
        ({"sec_per_iter": "", "tokens_per_s": "65536"}, 1.0),
        ({"sec_per_iter": "", "tokens_per_s_per_gpu": "4096"}, 1.0),
        ({"sec_per_iter": "", "samples_per_s": "32"}, 2.0),
    ],
)
def test_times_come_from_what_is_printed(changed: dict[str, str], seconds: float) -> None:
    case = case_of(**changed)
    assert isinstance(case, Case)
    assert case.measured_s == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"gpu": "MI300X"}, "has no profile"),
        ({"framework": "JAX"}, "framework = 'JAX' has no profile"),
        ({"recompute": ""}, "recompute is not stated; fill it with --defaults"),
        ({"gpus": "sixteen"}, "gpus = 'sixteen' is no number"),
        ({"gpus": "12"}, "does not fill nodes"),
        ({"inter_node": "fast"}, "names no cards"),
        ({"inter_node": "8x123Gb/s InfiniBand"}, "no link profile of 123 Gb/s"),
        ({"sec_per_iter": ""}, "no time"),
        ({"layers": "24.5"}, "no whole number"),
        ({"family": "bert"}, "name a preset"),
    ],
)
def test_a_row_that_cannot_be_mapped_says_why(changed: dict[str, str], words: str) -> None:
    found = case_of(**changed)
    assert isinstance(found, Unmapped)
    assert words in found.reason


def test_what_the_product_refuses_is_no_case_either() -> None:
    case = case_of(layers="2", pp="4")
    assert isinstance(case, Case)
    refused = score(case)
    assert isinstance(refused, Unmapped)
    assert "not legal" in refused.reason


def test_files_that_are_no_table_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    for text, words in (
        ("", "is empty"),
        ("a,a\n1,2\n", "stands there twice"),
        ("# note\n\na,b\n1\n", "runs.csv:4: 1 cells under 2 columns"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            read_rows(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="no known format"):
        rows_in(path, {})


def test_shipped_families_are_cases() -> None:
    counts = {}
    for family in shipped_families():
        rows = rows_of(family)
        counts[family.name] = (len(rows.cases), len(rows.unmapped))
        assert rows.cases or rows.unmapped, family.name
        assert len({case.id for case in rows.cases}) == len(rows.cases), family.name
    assert counts["vtrain-multi"] == (41, 0)
    assert counts["sc21"] == (6, 0)
    assert counts["bigscience-a100"] == (42, 0)
    assert counts["llm-foundry"] == (127, 0)


def scored(predicted: float, measured: float, layout: str, batch: int = 64, memory: float | None = None) -> Scored:
    case = case_of(gbs=str(batch))
    assert isinstance(case, Case)
    return Scored(
        case=replace(case, measured_s=measured, memory_bytes=memory), layout=layout, predicted_s=predicted,
        low_s=predicted / 1.2, high_s=predicted * 1.2,
        coverage=1.0, predicted_bytes=9e9, fits=True,
    )  # fmt: skip


def test_errors_and_intervals() -> None:
    found = summary([scored(1.1, 1.0, "a"), scored(0.7, 1.0, "b"), scored(1.0, 1.0, "c")])
    assert (found.n, found.worst_id) == (3, "one")
    assert found.mean == pytest.approx(0.4 / 3)
    assert found.bias == pytest.approx(-0.2 / 3)
    assert found.worst == pytest.approx(-0.3)
    assert found.covered == pytest.approx(2 / 3)
    assert found.ranking is None


def test_regret_is_what_our_pick_would_have_cost() -> None:
    group = [scored(1.0, 1.3, "a"), scored(1.1, 1.0, "b"), scored(1.2, 1.2, "c"), scored(1.5, 1.6, "d")]
    found = ranking([*group, scored(9.0, 1.0, "other batch", batch=128)])
    assert found is not None
    assert (found.groups, found.layouts) == (1, 4)
    assert found.regret == pytest.approx(0.3)
    assert found.correlation == pytest.approx(0.4)


def test_memory_is_scored_where_it_is_stated() -> None:
    found = memory_summary([scored(1.0, 1.0, "a", memory=10e9), scored(1.0, 1.0, "b")])
    assert found is not None
    assert found.errors is not None
    assert (found.errors.n, found.judged, found.called_infeasible) == (1, 2, 0)
    assert found.errors.bias == pytest.approx(-0.1)


def test_ranks_with_ties() -> None:
    assert spearman(np.array([1.0, 2.0, 2.0, 4.0]), np.array([1.0, 2.0, 2.0, 4.0])) == pytest.approx(1.0)
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1.0)


def test_the_command_scores_published_and_own_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["validate", "seqsel", "-q", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (family,) = document["families"]
    assert (family["name"], family["summary"]["n"], len(family["rows"])) == ("seqsel", 4, 4)
    # Published runs of a cluster that nothing was fitted on: far below the spread that plans quote.
    assert family["summary"]["mean"] < 0.10
    columns = [name for name in CELLS if name != "framework"]
    Path("own.csv").write_text(",".join(columns) + "\n" + ",".join(CELLS[name] for name in columns) + "\n")
    assert run(["validate", "--cases", "own.csv", "-q"]) == 3
    assert "own.csv:2: no row could be predicted: line 2: framework is not stated" in capsys.readouterr().err
    bad = [{**CELLS, "gpus": "many"}, {**CELLS, "gpu": "A1000"}, {**CELLS, "gpu": "A1000"}]
    Path("bad.csv").write_text("\n".join([",".join(CELLS), *(",".join(row.values()) for row in bad)]) + "\n")
    assert run(["validate", "--cases", "bad.csv", "-q"]) == 3
    told = capsys.readouterr().err
    assert "lines 3-4: gpu = 'A1000'" in told
    assert "; line 2: gpus = 'many' is no number" in told
    # A name that no picture can have is told before anything is predicted.
    assert run(["validate", "seqsel", "--plot", "x.gif"]) == 2
    assert capsys.readouterr().err == "error: x.gif: a picture is an .svg or a .png file; name one\n"
    Path("more.yaml").write_text("framwork: Megatron-LM\n")
    assert run(["validate", "--cases", "own.csv", "--defaults", "more.yaml", "-q"]) == 3
    assert "'framwork' is no column of measured runs; did you mean 'framework'?" in capsys.readouterr().err
    Path("more.yaml").write_text("framework: Megatron-LM\n")
    assert run(["validate", "--cases", "own.csv", "--defaults", "more.yaml", "-q"]) == 0
    assert "500 ms" in capsys.readouterr().out
    for arguments in (["seqsl"], ["--defaults", "more.yaml"], ["seqsel", "--cases", "own.csv"]):
        assert run(["validate", *arguments, "-q"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
