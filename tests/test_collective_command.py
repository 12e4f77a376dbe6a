"""`clustersim collective`: what it prints, what it refuses, and that its numbers are the simulator's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from clustersim.app.door import run
from clustersim.cluster.cluster import Cluster
from clustersim.cluster.load import load_fabric, load_machine
from clustersim.simulate.collectives.standalone import price_collective

BY_HAND = ["--intra", "300GB/s,500ns", "--inter", "25GB/s,5us"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No profiles of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLUSTERSIM_HOME", str(tmp_path / "home"))


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON of one call."""
    assert run(["collective", *arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_links_by_hand_are_alpha_beta(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(
        capsys, "all-reduce", "--size", "1GiB", "--size", "1MiB", "--nodes", "128", *BY_HAND, "--algorithm", "ring"
    )
    assert (found["ranks"], found["nodes"], found["channels"]) == (1024, 128, 8)
    for row, size in zip(found["rows"], (2**30, 2**20), strict=True):
        hops = 2 * (1024 - 128) * 5e-7 + 2 * 127 * 5e-6
        expected = hops + 2 * 1023 / 1024 * size / 8 / 25e9
        assert row["seconds"] == pytest.approx(expected, rel=1e-12)
        assert row["closed_form_s"] == pytest.approx(expected, rel=1e-12)
        assert row["ratio"] == pytest.approx(1.0, rel=1e-12)
        assert row["latency_s"] == pytest.approx(hops, rel=1e-12)
        assert row["algbw_bytes_per_s"] == pytest.approx(size / expected)
        assert row["busbw_bytes_per_s"] == pytest.approx(size / expected * 2 * 1023 / 1024)
        assert row["events"] == 2
    assert [row["bottleneck"]["what"] for row in found["rows"]] == ["NICs out", "latency"]


@pytest.mark.parametrize(
    ("kind", "algorithm", "load"),
    [
        ("all-gather", "ring", 31 / 32), ("reduce-scatter", "ring", 31 / 32), ("broadcast", "chain", 1.0),
        ("reduce", "chain", 1.0), ("all-to-all", "pairwise", 8 * 24 / 32), ("send-recv", "direct", 8.0),
        ("all-reduce", "sharp", 1.0), ("all-reduce", "nvls", 2.0),
    ],
)  # fmt: skip
def test_other_collectives_without_latency(
    capsys: pytest.CaptureFixture[str], kind: str, algorithm: str, load: float
) -> None:
    """`load`: what the eight cards of a node carry together, or eight times what the busiest does."""
    found = told(capsys, kind, "--nodes", "4", "--intra", "1PB/s,0s", "--inter", "25GB/s,0s", "--algorithm", algorithm)
    assert found["rows"][0]["seconds"] == pytest.approx(load * 2**30 / 8 / 25e9, rel=1e-4)


def test_a_profile_gives_what_the_python_function_gives(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(
        capsys, "all-reduce", "--size", "64MiB", "--node", "dgx-a100-80g", "--nodes", "16", "--fabric",
        "rail-optimized", "--algorithm", "hierarchical",
    )  # fmt: skip
    cluster = Cluster(
        workers=(load_machine("dgx-a100-80g", 16),), servers=(), fabric=load_fabric("rail-optimized")
    )  # fmt: skip
    expected = price_collective(cluster, "all_reduce", "hierarchical", 64 * 2**20)
    (row,) = found["rows"]
    assert row["seconds"] == expected.seconds
    assert row["ratio"] == pytest.approx(1.0, rel=1e-9)
    assert row["source"] == "simulated"


def test_channels_and_ranks_count(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["all-reduce", *BY_HAND, "--algorithm", "ring"]
    whole = told(capsys, *base, "--nodes", "4")["rows"][0]["seconds"]
    single = told(capsys, *base, "--nodes", "4", "--channels", "1")["rows"][0]
    assert single["seconds"] > 6 * whole
    assert single["ratio"] == pytest.approx(1.0)
    part = told(capsys, *base, "--ranks", "16")
    assert (part["ranks"], part["nodes"]) == (16, 2)
    four = told(capsys, *base, "--nodes", "4", "--gpus-per-node", "4")
    assert four["ranks"] == 16
    uneven = told(capsys, *base, "--ranks", "12")
    assert uneven["rows"][0]["closed_form_s"] is None
    assert uneven["rows"][0]["seconds"] > 0.0
    alone = told(capsys, *base, "--ranks", "1")["rows"][0]
    assert (alone["seconds"], alone["algbw_bytes_per_s"], alone["bottleneck"]["what"]) == (0.0, 0.0, "none")


def test_links_by_hand_replace_those_of_the_profile(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["all-reduce", "--node", "hgx-h100", "--nodes", "4", "--algorithm", "ring"]
    slow = told(capsys, *base, "--inter", "1GB/s,5us")["rows"][0]
    assert slow["links"][0]["rate_bytes_per_s"] == 1e9
    assert slow["seconds"] == pytest.approx(2 * 31 / 32 * 2**30 / 8 / 1e9, rel=0.01)
    inside = told(capsys, *base, "--intra", "1GB/s,5us")["rows"][0]
    assert inside["links"][0]["rate_bytes_per_s"] == 1e9
    assert inside["links"][0]["kind"] == "device out"


def test_a_range_of_sizes_doubles(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "all-reduce", "--size", "1MiB..9MiB", "--size", "1GB", *BY_HAND, "--nodes", "2")
    assert [row["bytes"] for row in found["rows"]] == [2**20, 2**21, 2**22, 2**23, 1e9]


def test_auto_without_nccl_takes_what_simulates_fastest(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["all-reduce", "--size", "8B", "--size", "1GiB", *BY_HAND, "--nodes", "4"]
    best = told(capsys, *base)["rows"]
    tried = {
        name: told(capsys, *base, "--algorithm", name)["rows"]
        for name in ("ring", "tree", "binary-tree", "halving-doubling", "hierarchical")
    }
    for at, row in enumerate(best):
        assert row["seconds"] == min(rows[at]["seconds"] for rows in tried.values())
        assert row["source"] == "simulated"
    assert best[0]["algorithm"] != best[1]["algorithm"]


def test_auto_is_nccls_choice_where_nccl_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from clustersim.cluster.tuning import nccl_choice

    found = told(capsys, "all-reduce", "--size", "1MiB", "--size", "1GiB", "--node", "dgx-a100-80g", "--nodes", "6")
    cluster = Cluster(workers=(load_machine("dgx-a100-80g", 6),), servers=(), fabric=load_fabric("one-switch"))
    for row in found["rows"]:
        choice = nccl_choice("all_reduce", row["bytes"], 48, 8, cluster.workers[0], cluster)
        assert choice is not None
        assert row["algorithm"] == f"{choice.algorithm}/{choice.protocol}"
        if row["source"] == "tuner":
            assert row["seconds"] == choice.seconds
        else:
            assert row["seconds"] == row["measured_s"]
    measured = told(capsys, "all-reduce", "--size", "1MiB", "--node", "dgx-a100-80g")["rows"][0]
    assert measured["source"] == "measured"
    assert measured["seconds"] == measured["measured_s"]


def test_a_slower_way_shows_in_the_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["all-to-all", "--node", "hgx-h100", "--nodes", "64", "--algorithm", "pairwise"]
    assert told(capsys, *base, "--fabric", "leaf-spine")["rows"][0]["ratio"] == pytest.approx(1.0, rel=1e-3)
    crowded = told(capsys, *base, "--fabric", "leaf-spine-2to1")["rows"][0]
    assert crowded["ratio"] > 1.3
    assert crowded["bottleneck"]["what"] == "leaves up"


@pytest.mark.parametrize(
    "arguments",
    [
        ["all-reduce", "--size", "8B..16GiB", "--node", "hgx-h100", "--nodes", "2048", "--fabric", "rail-optimized"],
        ["all-reduce", "--size", "8B..16GiB", "--node", "hgx-h100", "--algorithm", "halving-doubling"],
        ["broadcast", *BY_HAND, "--nodes", "2048", "--algorithm", "scatter-allgather", "--size", "12345B"],
        ["all-to-all", "--node", "p4d", "--nodes", "3"],
    ],
)
def test_the_table_fits_a_hundred_columns(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["collective", *arguments]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "closed form" in text
    sizes = 31 + 1 if "8B..16GiB" in arguments else 1
    assert len([line for line in text.splitlines() if " %" in line]) == sizes


def test_help_tells_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["collective", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("--size", "--node", "--nodes", "--gpus-per-node", "--ranks", "--fabric", "--algorithm", "--channels",
                 "--intra", "--inter", "--json", "1MiB..1GiB"):  # fmt: skip
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["all-reduce"], 2, "--node hgx-h100"),
        (["all-reduce", "--intra", "300GB/s,500ns"], 2, "both --intra and --inter"),
        (["all-reduce", "--intra", "300GB/s", "--inter", "25GB/s,5us"], 2, "300GB/s,500ns"),
        (["all-reduce", "--intra", "300,500ns", "--inter", "25GB/s,5us"], 2, "has no unit"),
        (["all-reduce", "--intra", "300GB/s,500", "--inter", "25GB/s,5us"], 2, "has no unit"),
        (["all-reduce", "--size", "12", *BY_HAND], 2, "--size: '12' has no unit"),
        (["all-reduce", "--size", "0B", *BY_HAND], 2, "more than 0B"),
        (["all-reduce", "--size", "1GiB..1MiB", *BY_HAND], 2, "a range that grows"),
        (["all-reduce", "--size", "1MiB..", *BY_HAND], 2, "--size"),
        (["all-reduce", "--node", "hgx-h10"], 3, "did you mean 'hgx-h100'"),
        (["all-reduce", "--node", "hgx-h100", "--fabric", "rails"], 3, "fabric"),
        (["all-reduce", "--node", "cpu-server-100g"], 3, "no devices"),
        (["all-reduce", "--node", "hgx-h100", "--gpus-per-node", "9"], 2, "has 8 devices"),
        (["all-reduce", "--node", "hgx-h100", "--nodes", "2", "--ranks", "17"], 2, "--nodes 3"),
        (["all-reduce", "--node", "dgx-a100-80g", "--algorithm", "nvls"], 3, "interconnect.reduces"),
        (["all-reduce", "--node", "hgx-h100", "--nodes", "2", "--algorithm", "sharp"], 3, "in_network_reduction"),
        (["broadcast", "--node", "hgx-h100", "--algorithm", "ring"], 3, "write one of chain"),
        (["all-reduce", "--node", "hgx-h100", "--algorithm", "rings"], 2, "rings"),
        (["gossip", "--node", "hgx-h100"], 2, "gossip"),
        (["all-reduce", "--node", "hgx-h100", "--channels", "0"], 2, "channels"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["collective", *arguments]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.strip().splitlines()) == 1
    assert words in output.err


def test_sizes_are_exact_powers(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "all-reduce", "--size", "1B..1GiB", *BY_HAND, "--nodes", "2", "--algorithm", "ring")
    assert [math.log2(row["bytes"]) for row in found["rows"]] == list(range(31))


def test_one_rank_is_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["collective", "all-reduce", "--ranks", "1", *BY_HAND]) == 0
    assert capsys.readouterr().out.startswith("all-reduce, 1 rank on 1 node (")


def test_channels_are_for_what_has_some(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["collective", "all-reduce", "--size", "1GiB", "--node", "hgx-h100", "--nodes", "4"]
    for algorithm in ("auto", "halving-doubling", "hierarchical"):
        assert run([*asked, "--algorithm", algorithm, "--channels", "2"]) == 2
        assert "has no channels to divide bytes over; write --algorithm ring" in capsys.readouterr().err
        assert run([*asked, "--algorithm", algorithm]) == 0
        assert "channel" not in capsys.readouterr().out
    assert run([*asked, "--algorithm", "ring", "--channels", "2"]) == 0
    assert "2 channels" in capsys.readouterr().out
