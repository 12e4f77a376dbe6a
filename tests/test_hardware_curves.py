"""Curves of links and tables of collectives: shapes, laws, fits, and published points they must meet."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.errors import ProfileError
from clustersim.files import profile_names, profile_path
from clustersim.hardware.curve import (
    CollectiveTable,
    alpha_s,
    collective_table,
    effective_rate,
    fit_segments,
    message_seconds,
    step_seconds,
)
from clustersim.hardware.device import TableRef
from clustersim.hardware.link import Link, Segment
from clustersim.hardware.load import load_link
from clustersim.hardware.provenance import Provenance

SOURCE = Provenance(method="estimate", source="a test")
MIB = 2.0**20


def link_of(*segments: Segment, rate: float = 1e9, launch: float = 0.0) -> Link:
    return Link(name="l", kind="nvlink", rate_bytes_per_s=rate, launch_s=launch, segments=segments, provenance=SOURCE)


def one_piece(alpha: float = 2e-6, efficiency: float = 0.5, launch: float = 0.0) -> Link:
    return link_of(Segment(from_bytes=0.0, alpha_s=alpha, efficiency=efficiency), launch=launch)


@st.composite
def links(draw: st.DrawFn) -> Link:
    starts = [0.0, *sorted(draw(st.sets(st.integers(1, 2**30), max_size=4)))]
    seconds, fractions = st.floats(0.0, 1e-3), st.floats(0.01, 1.0)
    pieces = [Segment(from_bytes=float(s), alpha_s=draw(seconds), efficiency=draw(fractions)) for s in starts]
    return link_of(*pieces, rate=draw(st.floats(1e6, 1e12)), launch=draw(seconds))


def test_one_piece_is_alpha_beta_and_the_launch_is_paid_by_the_operation_only() -> None:
    link = one_piece(launch=1e-5)
    assert step_seconds(link, 1e6) == pytest.approx(2e-6 + 1e6 / 0.5e9)
    assert message_seconds(link, 1e6) == pytest.approx(1e-5 + 2e-6 + 1e6 / 0.5e9)
    assert alpha_s(link) == 2e-6
    assert effective_rate(link, 1e6) == pytest.approx(0.5e9)


def test_a_rate_override_scales_the_bandwidth_term_and_leaves_alpha() -> None:
    link = one_piece(launch=1e-5)
    assert message_seconds(link, 1e6, 4e9) == pytest.approx(1e-5 + 2e-6 + 1e6 / 2e9)
    assert message_seconds(link, 0.0, 4e9) == message_seconds(link, 0.0)
    assert effective_rate(link, 1e6, 4e9) == pytest.approx(2e9)


def test_arrays_give_what_scalars_give() -> None:
    link = load_link("nvlink3")
    sizes = np.array([[0.0, 1.0], [524288.0, 1e9]])
    for function in (step_seconds, message_seconds, effective_rate):
        assert function(link, sizes).tolist() == [[function(link, s) for s in row] for row in sizes.tolist()]


@given(links(), st.lists(st.floats(0.0, 1e11), min_size=2, max_size=20), st.floats(1e6, 1e12) | st.none())
def test_time_never_falls_with_the_size_at_any_rate(link: Link, sizes: list[float], rate: float | None) -> None:
    seconds = step_seconds(link, np.array(sorted(sizes)), rate)
    assert np.all(np.diff(seconds) >= -1e-12 * seconds[1:])


@given(links(), st.floats(0.0, 1e11), st.floats(1.0, 100.0))
def test_a_faster_link_is_never_slower(link: Link, size: float, factor: float) -> None:
    slow, fast = step_seconds(link, size), step_seconds(link, size, link.rate_bytes_per_s * factor)
    assert fast <= slow * (1 + 1e-12)


# ---------------------------------------------------------------------------------------------- fitting


@given(st.floats(1e-7, 1e-3), st.floats(0.01, 0.99), st.integers(1, 3))
def test_a_fit_recovers_one_line_with_one_piece(alpha: float, efficiency: float, pieces: int) -> None:
    sizes = 2.0 ** np.arange(3, 31)
    found = fit_segments(sizes, alpha + sizes / (efficiency * 50e9), 50e9, pieces)
    assert len(found) == 1
    assert found[0].alpha_s == pytest.approx(alpha, rel=1e-5)
    assert found[0].efficiency == pytest.approx(efficiency, rel=1e-4)


def test_a_fit_recovers_two_lines_and_where_they_meet() -> None:
    sizes = 2.0 ** np.arange(6, 31)
    meet = 3e5
    left = 2e-6 + sizes / (0.3 * 25e9)
    right = 2e-6 + meet / (0.3 * 25e9) + (sizes - meet) / (0.9 * 25e9)
    found = fit_segments(sizes, np.where(sizes < meet, left, right), 25e9, 3)
    assert [s.efficiency for s in found] == pytest.approx([0.3, 0.9], rel=1e-6)
    assert found[1].from_bytes == pytest.approx(meet, rel=1e-6)


def test_a_fit_weighs_relative_errors_so_that_small_messages_count() -> None:
    sizes = np.array([0.0, 1e3, 1e8, 1e9])
    seconds = np.array([1e-5, 1e-5, 0.011, 0.11])
    found = fit_segments(sizes, seconds, 1e10, 1)[0]
    assert found.alpha_s == pytest.approx(1e-5, rel=0.02)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 10**9), st.floats(1e-7, 10.0)), min_size=2, max_size=25),
    st.integers(1, 4),
)
def test_a_fit_of_anything_is_a_link_whose_time_grows(points: list[tuple[int, float]], pieces: int) -> None:
    sizes, seconds = np.array([float(p[0]) for p in points]), np.array([p[1] for p in points])
    if np.unique(sizes).size < 2:
        with pytest.raises(ProfileError, match="two different sizes"):
            fit_segments(sizes, seconds, 1e9, pieces)
        return
    found = fit_segments(sizes, seconds, 1e9, pieces)
    assert len(found) <= pieces
    assert all(0.0 < s.efficiency <= 1.0 and s.alpha_s >= 0.0 for s in found)
    curve = step_seconds(link_of(*found), 10.0 ** np.arange(0.0, 10.0, 0.2, dtype=np.float64))
    assert np.all(np.diff(curve) >= -1e-12 * curve[1:])


def test_more_pieces_never_fit_worse() -> None:
    rng = np.random.default_rng(7)
    sizes = 2.0 ** np.arange(4, 28, dtype=np.float64)
    seconds = (3e-6 + sizes / 1e9 + (sizes > 1e5) * 2e-5) * rng.lognormal(0.0, 0.1, sizes.size)
    left = [np.inf]
    for pieces in (1, 2, 3):
        link = link_of(*fit_segments(sizes, seconds, 2e9, pieces), rate=2e9)
        left.append(float(np.sum((step_seconds(link, sizes) / seconds - 1.0) ** 2)))
    assert left[0] > left[1] > left[2]
    assert left[3] <= left[2] * 1.05


@pytest.mark.parametrize("bad", [(-1.0, 1e-6), (1.0, 0.0), (1.0, np.nan)])
def test_a_fit_refuses_impossible_points(bad: tuple[float, float]) -> None:
    with pytest.raises(ProfileError, match="drop the other rows"):
        fit_segments([0.5, 2.0, bad[0]], [1e-6, 2e-6, bad[1]], 1e9, 1)


# ------------------------------------------------------------------------------------- published points

# BinhangYuan/tc_cluster_setting: AWS p3.2xlarge under tc, NCCL all_reduce of 256 MiB, milliseconds.
SHAPED_RINGS = {
    (1, 4): 3298, (1, 8): 3841, (1, 16): 4114, (1, 32): 4251,
    (2, 4): 1650, (2, 8): 1921, (2, 16): 2057, (2, 32): 2124,
    (5, 4): 655, (5, 8): 763, (5, 16): 817, (5, 32): 844,
}  # fmt: skip
UNSHAPED_RINGS = {4: 363, 8: 443, 16: 474, 32: 523}


def ring_ms(link: Link, ranks: int, size: float, rate: float | None = None) -> float:
    return 1e3 * (link.launch_s + 2 * (ranks - 1) * step_seconds(link, size / ranks, rate))


@pytest.mark.parametrize(("gigabits", "ranks"), SHAPED_RINGS)
def test_the_link_fitted_on_sends_predicts_published_rings(gigabits: int, ranks: int) -> None:
    """The curve saw point-to-point sends only; these twelve all_reduces it did not see."""
    found = ring_ms(load_link("tcp-aws-10"), ranks, 256 * MIB, gigabits * 1e9 / 8)
    assert found == pytest.approx(SHAPED_RINGS[gigabits, ranks], rel=0.025)


def test_the_unshaped_rings_are_slower_than_any_link_figure_says() -> None:
    """'Up to 10 Gb/s' is no rate: sends reach it, rings do not, and more nodes reach less."""
    link = load_link("tcp-aws-10")
    missed = {n: ring_ms(link, n, 256 * MIB) / ms - 1.0 for n, ms in UNSHAPED_RINGS.items()}
    assert all(-0.25 < error < -0.05 for error in missed.values()), missed


@pytest.mark.parametrize("name", ["nvlink3", "nvlink4", "nvlink5"])
def test_small_collectives_are_launch_plus_steps(name: str) -> None:
    """One launch and one alpha a step meet all_gather, reduce_scatter and all_reduce of 4 and 8 ranks."""
    node = {"nvlink3": "dgx-a100-80g", "nvlink4": "hgx-h100", "nvlink5": "hgx-b200"}[name]
    table = shipped_table(node)
    link = load_link(name)
    for kind, steps in (("all_gather", 1), ("reduce_scatter", 1), ("all_reduce", 2)):
        for ranks in (4, 8):
            guess = link.launch_s + steps * (ranks - 1) * step_seconds(link, 1024.0 / ranks)
            assert guess == pytest.approx(table.seconds(kind, ranks, 1024.0), rel=0.16), (kind, ranks)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("link", "median", "tail"),
    [
        ("nvlink3", 0.09, 0.25),
        ("nvlink4", 0.09, 0.26),
        ("nvlink5", 0.07, 0.15),
        ("infiniband-hdr200", 0.03, 0.05),
        ("infiniband-edr100", 0.04, 0.06),
        ("efa-100", 0.12, 0.25),
        ("efa-400", 0.06, 0.13),
        ("tcpxo-200", 0.01, 0.03),
    ],
)
def test_curves_meet_sizes_they_were_not_fitted_on(link: str, median: float, tail: float) -> None:
    with profile_path("links", link).with_name("heldout.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(line for line in file if not line.startswith("#")) if row["link"] == link]
    curve = load_link(link)
    errors = []
    for row in rows:
        if row["split"] == "fit" or row["kind"] not in ("step", "all_gather", "reduce_scatter"):
            continue
        if "second cluster" in row["source"]:
            continue
        ranks, size = int(row["ranks"]), float(row["bytes"])
        if row["kind"] == "step":
            guess = step_seconds(curve, size)
        else:
            guess = curve.launch_s + (ranks - 1) * step_seconds(curve, size / ranks)
        errors.append(abs(guess / (float(row["time_us"]) * 1e-6) - 1.0))
    assert len(errors) >= 5
    assert np.median(errors) < median
    assert np.quantile(errors, 0.9) < tail


# ------------------------------------------------------------------------------------------ collectives


def shipped_table(node: str) -> CollectiveTable:
    refs = (TableRef(file="collectives.csv", provenance=SOURCE),)
    return collective_table(refs, profile_path("nodes", node).parent)


def written_table(folder: Path, text: str) -> CollectiveTable:
    (folder / "t.csv").write_text("collective,ranks,bytes,time_us\n" + text, encoding="utf-8")
    return collective_table((TableRef(file="t.csv", provenance=SOURCE),), folder)


def test_a_table_returns_its_rows_interpolates_and_extrapolates(tmp_path: Path) -> None:
    table = written_table(tmp_path, "all_reduce,8,1024,10\nall_reduce,8,4096,40\nall_reduce,2,4096,10\n")
    assert table.seconds("all_reduce", 8, 1024.0) == pytest.approx(10e-6)
    assert table.seconds("all_reduce", 8, 2048.0) == pytest.approx(20e-6)
    assert table.seconds("all_reduce", 8, 1.0) == pytest.approx(10e-6), "the latency holds below"
    assert table.seconds("all_reduce", 8, 8192.0) == pytest.approx(80e-6), "the bandwidth holds above"
    assert table.seconds("all_reduce", 4, 4096.0) == pytest.approx(20e-6), "log-log between 2 and 8 ranks"
    assert table.seconds("all_reduce", 16, 4096.0) is None
    assert table.seconds("all_gather", 8, 4096.0) is None
    assert table.seconds("all_reduce", 1, 4096.0) == 0.0
    assert table.ranks("all_reduce") == (2, 8)


def test_rows_of_several_nodes_stand_apart_and_interpolate_over_the_nodes(tmp_path: Path) -> None:
    rows = ("16,2,1024,10", "64,8,1024,40", "8,1,1024,5", "8,2,1024,99")
    text = "collective,ranks,nodes,bytes,time_us\n" + "".join(f"all_reduce,{row}\n" for row in rows)
    (tmp_path / "n.csv").write_text(text, encoding="utf-8")
    (tmp_path / "o.csv").write_text("collective,ranks,bytes,time_us\nall_reduce,2,1024,4\n", encoding="utf-8")
    refs = tuple(TableRef(file=name, provenance=SOURCE) for name in ("n.csv", "o.csv"))
    table = collective_table(refs, tmp_path)
    assert table.seconds("all_reduce", 16, 1024.0, 2) == pytest.approx(10e-6)
    assert table.seconds("all_reduce", 32, 1024.0, 4) == pytest.approx(20e-6), "log-log between 2 and 8 nodes of 8"
    assert table.seconds("all_reduce", 128, 1024.0, 16) is None
    assert table.seconds("all_reduce", 16, 1024.0, 4) is None, "nobody measured 4 ranks a node there"
    assert table.seconds("all_reduce", 8, 1024.0) == pytest.approx(5e-6), "without nodes: one"
    assert table.seconds("all_reduce", 4, 1024.0) == pytest.approx((4e-6 * 5e-6) ** 0.5)
    assert table.seconds("all_reduce", 16, 1024.0) is None
    assert table.ranks("all_reduce") == (2, 8)
    assert table.ranks("all_reduce", 2) == (8, 16)


@pytest.mark.parametrize("row", ["all_reduce,9,2,1024,10", "all_reduce,8,0,1024,10"])
def test_ranks_spread_unevenly_are_refused(tmp_path: Path, row: str) -> None:
    (tmp_path / "n.csv").write_text("collective,ranks,nodes,bytes,time_us\n" + row + "\n", encoding="utf-8")
    with pytest.raises(ProfileError, match="write as many ranks for every node"):
        collective_table((TableRef(file="n.csv", provenance=SOURCE),), tmp_path)


def test_dips_are_pooled_and_repeats_averaged(tmp_path: Path) -> None:
    table = written_table(tmp_path, "all_gather,2,10,4\nall_gather,2,10,9\nall_gather,2,20,5\nall_gather,2,30,20\n")
    pooled = (6.0 * 5.0) ** 0.5 * 1e-6
    assert table.seconds("all_gather", 2, 10.0) == pytest.approx(pooled)
    assert table.seconds("all_gather", 2, 20.0) == pytest.approx(pooled)
    assert table.seconds("all_gather", 2, 30.0) == pytest.approx(20e-6)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("allreduce,8,1024,10", "'allreduce' is no collective"),
        ("all_reduce,eight,1024,10", "write numbers"),
        ("all_reduce,1,1024,10", "needs 2 ranks"),
        ("all_reduce,8,0,10", "needs 2 ranks"),
        ("all_reduce,8,1024,nan", "needs 2 ranks"),
    ],
)
def test_wrong_rows_are_refused_with_their_place(tmp_path: Path, row: str, said: str) -> None:
    with pytest.raises(ProfileError, match=said) as caught:
        written_table(tmp_path, "all_reduce,2,8,1\n" + row + "\n")
    assert "t.csv: row 2" in str(caught.value)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("collective,ranks,bytes,seconds\n", encoding="utf-8")
    with pytest.raises(ProfileError, match="no column 'time_us'"):
        collective_table((TableRef(file="t.csv", provenance=SOURCE),), tmp_path)


@pytest.mark.parametrize("node", ["dgx-a100-80g", "hgx-h100", "hgx-h200", "hgx-b200", "pcie-l40s-8"])
@given(sizes=st.lists(st.floats(1.0, 1e12), min_size=2, max_size=8), ranks=st.integers(2, 8))
@settings(max_examples=20)
def test_shipped_tables_never_fall_with_the_size(node: str, sizes: list[float], ranks: int) -> None:
    table = TABLES[node]
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        seconds = [table.seconds(kind, ranks, size) for size in sorted(sizes)]
        values = [s for s in seconds if s is not None]
        assert len(values) == len(sizes)
        assert all(b >= a * (1 - 1e-9) for a, b in pairwise(values))


TABLES = {n: shipped_table(n) for n in ("dgx-a100-80g", "hgx-h100", "hgx-h200", "hgx-b200", "pcie-l40s-8")}
NVLINK = {"dgx-a100-80g": 300e9, "hgx-h100": 450e9, "hgx-h200": 450e9, "hgx-b200": 900e9}


@pytest.mark.parametrize("node", NVLINK)
def test_sizes_follow_nccl_tests_so_that_bus_bandwidth_stays_below_the_wire(node: str) -> None:
    """Read as per-rank sizes, all_gather would exceed NVLink; NVLink SHARP alone may (all_reduce)."""
    size = 2.0**29
    factors = {"all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "all_reduce": 2}
    for kind, factor in factors.items():
        for ranks in (2, 4, 8):
            seconds = TABLES[node].seconds(kind, ranks, size)  # type: ignore[arg-type]
            assert seconds is not None
            bus = factor * (ranks - 1) / ranks * size / seconds
            limit = 1.1 if kind == "all_reduce" else 1.0
            assert 0.3 < bus / NVLINK[node] < limit, (kind, ranks, bus)


@pytest.mark.parametrize("node", TABLES)
def test_interpolation_meets_sizes_left_out(node: str) -> None:
    """Every second size left out: median error below 4 %, except where the protocol switches."""
    errors: list[float] = []
    for sizes, times in TABLES[node].curves.values():
        guess = np.exp(np.interp(np.log(sizes[1:-1:2]), np.log(sizes[::2]), np.log(times[::2])))
        errors.extend(np.abs(guess / times[1:-1:2] - 1.0))
    assert np.median(errors) < 0.04
    assert np.quantile(errors, 0.9) < 0.25


@pytest.mark.parametrize("name", sorted(profile_names("links")))
def test_alpha_and_effective_rate_make_up_the_curve(name: str) -> None:
    link = load_link(name)
    sizes = np.geomspace(1.0, 2.0**34, 200)
    seconds = alpha_s(link) + sizes / effective_rate(link, sizes)
    np.testing.assert_allclose(seconds, step_seconds(link, sizes), rtol=1e-9)
    assert (np.diff(seconds) >= -1e-12 * seconds[1:]).all()
    assert effective_rate(link, float(sizes[70])) == pytest.approx(float(effective_rate(link, sizes)[70]))
