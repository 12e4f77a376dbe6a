"""The scoreboard as tables, plot and markdown; what training rows say beside their layout."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_validate import CELLS, case_of, scored

from clustersim.app.door import run
from clustersim.errors import InputError
from clustersim.files import shipped_folder
from clustersim.report.validate_markdown import BEGIN, END, markdown, replaced
from clustersim.report.validate_plot import picture
from clustersim.report.validate_screen import scoreboard_screen
from clustersim.validate.board import Scores
from clustersim.validate.case import Case, Unmapped
from clustersim.validate.family import Family, rows_of, shipped_families
from clustersim.validate.scoreboard import memory_summary, summary

ROOT = Path(__file__).resolve().parent.parent


def family_of(name: str, **changed: Any) -> Family:
    return Family(name=name, title=f"runs of {name}", file="f.csv", source="s", licence="l", **changed)


def scores_of(name: str, *pairs: tuple[float, float], **changed: Any) -> Scores:
    rows = tuple(scored(predicted, measured, "dp4") for predicted, measured in pairs)
    rows = tuple(replace(row, case=replace(row.case, id=f"{name}-{at}")) for at, row in enumerate(rows))
    return Scores(
        name=name, family=family_of(name, **changed), scored=rows, unmapped=(), summary=summary(rows),
        memory=memory_summary(rows),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ training rows


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"framework": "Megatron-Bridge (Megatron-Core), LoRA"}, "has no profile"),
        ({"framework": "HF Trainer + DeepSpeed ZeRO"}, "has no profile"),
        ({"attn_impl": "flash attention"}, "the profile of megatron-lm runs unfused attention"),
        ({"intra_node": "PCIe 4"}, "are joined by NVLink"),
        ({"shard": "ZeRO-3 degree 2"}, "groups smaller than the 4 replicas"),
        ({"notes": "CPU offload of the optimizer"}, "offloaded to the host"),
        ({"sec_per_iter": "", "tflops_per_gpu": "137", "tflops_kind": "printed"}, "states no formula"),
    ],
)
def test_a_training_row_that_contradicts_its_profile_says_so(changed: dict[str, str], words: str) -> None:
    found = case_of(**changed)
    assert isinstance(found, Unmapped)
    assert words in found.reason


@pytest.mark.parametrize(
    ("kind", "rate", "seconds"),
    [
        # SC'21, Table 1: 1.7 B parameters on 32 GPUs, 137 TFLOP/s, 3.528 s.
        ("hardware: F=96*B*s*l*h^2*(1+s/(6h)+V/(16*l*h))", "137", 3.528),
        ("model: 72*B*s*l*h^2*(1+s/(6h)+V/(12*l*h))", "104.4", 3.528),
        ("model (6N + attention 12*l*d*s per token)", "100", 512 * 2048 * (6 * 1.7e9 + 12 * 24 * 2304 * 2048) / 32e14),
        ("8*seq*gbs*params/(t*gpus)", "100", 8 * 512 * 2048 * 1.7e9 / 32e14),
    ],
)
def test_times_come_from_flops_whose_formula_is_stated(kind: str, rate: str, seconds: float) -> None:
    case = case_of(
        gpus="32", layers="24", hidden="2304", heads="24", seq_len="2048", gbs="512", mbs="16", tp="1", pp="1",
        sec_per_iter="", tflops_per_gpu=rate, tflops_kind=kind, params_b="1.7",
    )  # fmt: skip
    assert isinstance(case, Case)
    assert case.measured_s == pytest.approx(seconds, rel=5e-3)


@pytest.mark.parametrize(
    ("words", "count", "link"),
    [
        ("Omni-Path 100Gb/s (4 HFIs per node)", 4, "omnipath-100"),
        ("1x400Gb/s IB NIC per GPU", 8, "infiniband-ndr400"),
        ("1600Gb/s/node RoCE", 8, "roce-200"),
    ],
)
def test_cards_are_read_from_words(words: str, count: int, link: str) -> None:
    case = case_of(inter_node=words)
    assert isinstance(case, Case)
    (spec,) = case.scenario["cluster"]["nodes"].values()
    assert spec["nic"] == {"count": count, "link": link}


def test_a_plain_loop_is_named_by_what_wraps_the_model() -> None:
    for shard, expected in (("none (native DDP)", "torch-ddp"), ("FSDP FULL_SHARD", "torch-fsdp")):
        case = case_of(
            framework="PyTorch 21.11-py3", shard=shard, family="bert", model="bert-large-pretraining", tp="1", pp="1",
            seq_len="128",
        )  # fmt: skip
        assert isinstance(case, Case)
        assert case.scenario["framework"] == expected
        assert case.scenario["model"] == "bert-large"
        assert case.scenario["training"]["predicted"] == 0.15


def test_recompute_in_other_words() -> None:
    for words, expected in (("yes", "full"), ("off", "none"), ("attention core only", "selective")):
        case = case_of(recompute=words)
        assert isinstance(case, Case)
        assert case.scenario["layout"]["recompute"] == expected


# ------------------------------------------------------------------------------------------------ screen and plot


def test_causes_stand_beside_the_worst_rows(capsys: pytest.CaptureFixture[str]) -> None:
    from clustersim.app.screen import show

    one = scores_of("a", (2.0, 1.0), (1.0, 1.0), causes={"a-0": "the clock was wrong"})
    show(scoreboard_screen([one, scores_of("b", (1.5, 1.0))], worst=2))
    out = capsys.readouterr().out
    assert "cause: the clock was wrong" in out
    assert "cause: not known" in out
    assert max(map(len, out.splitlines())) <= 100


def test_what_profiles_learned_from_a_family_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    from clustersim.app.screen import show
    from clustersim.report.validate_screen import scoreboard_document

    found = [scores_of("a", (1.1, 1.0), learned="its clock"), scores_of("b", (1.1, 1.0))]
    show(scoreboard_screen(found))
    out = capsys.readouterr().out
    assert "a *" in out
    assert "* a: profiles learned from it its clock" in out
    block = markdown(scoreboard_document(found))
    assert "| runs of a \\* |" in block
    assert "| runs of b |" in block
    assert "Profiles learned from runs of a: its clock." in block


def test_causes_name_rows_that_exist() -> None:
    for family in shipped_families():
        rows = rows_of(family)
        ids = [case.id for case in rows.cases] + [row.id for row in rows.unmapped]
        for pattern, why in family.causes.items():
            assert any(family.cause(name) == why for name in ids), (family.name, pattern)


def test_the_plot_puts_exact_predictions_on_the_diagonal() -> None:
    from clustersim.report.drawing import Line, Mark

    drawing = picture([scores_of("a", (1.0, 1.0), (30.0, 30.0), (11.0, 10.0)), scores_of("b", (2.0, 4.0))])
    lines = [shape for shape in drawing.shapes if isinstance(shape, Line) and shape.width == 1.4]
    diagonal = lines[0]
    assert diagonal.x2 - diagonal.x1 == pytest.approx(diagonal.y1 - diagonal.y2)

    def above(mark: Mark) -> float:
        """Pixels above the diagonal."""
        return (diagonal.y1 - (mark.x - diagonal.x1)) - mark.y

    marks = {shape.hint.split(":")[0]: shape for shape in drawing.shapes if isinstance(shape, Mark) and shape.hint}
    assert above(marks["a-0"]) == pytest.approx(0.0, abs=1e-9)
    assert above(marks["a-1"]) == pytest.approx(0.0, abs=1e-9)
    assert above(marks["a-2"]) > 0.0 > above(marks["b-0"])
    # Ten percent above lies on the outer line.
    edge = [shape for shape in drawing.shapes if isinstance(shape, Line) and shape.colour == "#a0aec0"]
    slopes = sorted(line.y1 - diagonal.y1 + (line.x1 - diagonal.x1) for line in edge[:2])
    assert -slopes[0] == pytest.approx(above(marks["a-2"]))
    scale = (marks["a-1"].x - marks["a-0"].x) / math.log10(30.0)
    assert above(marks["a-2"]) == pytest.approx(scale * math.log10(1.1))


def test_families_differ_in_colour_or_mark_and_stay_inside() -> None:
    from clustersim.report.drawing import Mark

    names = [f"f{at}" for at in range(13)]
    drawing = picture([scores_of(name, (1.0 + at, 1.0)) for at, name in enumerate(names)])
    marks = [shape for shape in drawing.shapes if isinstance(shape, Mark)]
    assert len({(mark.kind, mark.colour) for mark in marks}) == 13
    assert all(0.0 <= mark.x <= drawing.width and 0.0 <= mark.y <= drawing.height for mark in marks)
    svg = drawing.svg()
    for name in names:
        assert f">{name}: 1, " in svg
    assert svg.count("<title>") == 14


# ------------------------------------------------------------------------------------------------ record, markdown


def test_scores_are_recorded_printed_and_put_between_markers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = scores_of("a", (1.1, 1.0), (0.9, 1.0))
    monkeypatch.setattr("clustersim.app.validating._shipped", lambda names, calibrated: ([one], []))
    assert run(["validate", "--record", "scores.json", "--plot", "plot.svg", "-q"]) == 0
    assert Path("plot.svg").read_text().startswith("<svg")
    capsys.readouterr()
    assert run(["validate", "--markdown", "scores.json"]) == 0
    block = capsys.readouterr().out
    assert block == markdown(json.loads(Path("scores.json").read_text()))
    assert "| runs of a | 2 | 10 % | 10 % | 10 % |" in block
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    page.write_text(replaced(page, block))
    assert page.read_text() == f"before\n{block}after\n"
    page.write_text("nothing\n")
    with pytest.raises(InputError, match="has no lines"):
        replaced(page, block)
    Path("bad.json").write_text("{}")
    assert run(["validate", "--markdown", "bad.json"]) == 3
    assert "is no record of scores" in capsys.readouterr().err
    for arguments in (["--markdown", "scores.json", "--json"], ["a", "--record", "x.json"]):
        assert run(["validate", *arguments]) == 2


def test_calibrated_figures_stand_in_a_table_of_their_own() -> None:
    figures = {"n": 33, "mean": 0.031, "median": 0.02, "p90": 0.07}
    row = {"family": "a", "cluster": "c--f", "method": "k rows", "k": 8, "shipped": figures | {"mean": 0.08}}
    scores = {"families": [], "calibrated": [row | {"calibrated": figures}, row | {"calibrated": None}]}
    block = markdown(scores)
    assert "| a (c--f) | 8 | 33 | 8.0 % | 3.1 % | 2.0 % | 7.0 % |" in block
    assert block.count("c--f") == 1
    scores["calibrated"][0]["method"] = "leave-one-out"
    assert "| a (c--f) | leave-one-out | 33 |" in markdown(scores)


def test_the_tables_of_the_pages_are_generated() -> None:
    scores = json.loads((shipped_folder("validation") / "scores.json").read_text(encoding="utf-8"))
    block = markdown(scores)
    for page in (ROOT / "README.md", ROOT / "docs" / "accuracy.md"):
        text = page.read_text(encoding="utf-8")
        assert text.count(BEGIN) == 1, page
        assert block in text, f"{page}: run python benchmarks/scoreboard.py --tables"
    names = {family["name"] for family in scores["families"]}
    assert names == {family.name for family in shipped_families()}


def test_the_plot_of_the_readme_shows_every_family() -> None:
    svg = (ROOT / "docs" / "accuracy.svg").read_text(encoding="utf-8")
    for family in shipped_families():
        assert re.search(rf">{re.escape(family.name)}: \d+, ", svg) or not rows_of(family).cases, family.name


def test_cells_of_the_tests_are_columns() -> None:
    from clustersim.validate.training_rows import COLUMNS

    assert set(CELLS) <= COLUMNS
