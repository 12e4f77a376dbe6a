"""compare(): the join by op identity, on timelines written by hand and on a simulated one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim import files
from clustersim.compare import Comparison, compare, quantile, table
from clustersim.timeline import OpId, RankClass, Span, Timeline

FORWARD = OpId(0, 0, 0, "forward", "all", "compute")
BACKWARD = OpId(0, 0, 0, "backward", "B0", "compute")
REDUCE = OpId(0, -1, 0, "synchronise", "B0", "all-reduce")
UPDATE = OpId(0, -1, 0, "update", "all", "compute")
SERVE = OpId(0, -1, -1, "update", "B0", "update")


def span(op: OpId, rank: int, start: float, end: float, resource: str = "compute") -> Span:
    return Span(op=op, rank=rank, start_s=start, end_s=end, ready_s=start, resource=resource)


def timeline(source: str, classes: list[tuple[int, tuple[int, ...]]], spans: list[Span], steps: int = 1) -> Timeline:
    return Timeline(
        source=source,  # type: ignore[arg-type]
        steps=steps,
        classes=tuple(RankClass(rank=r, label=f"ranks {m}", members=m) for r, m in classes),
        spans=tuple(spans),
    )


def predicted() -> Timeline:
    """Two ranks in one class: forward 1 s, backward 2 s, half of a 1 s all-reduce behind it, update 0.5 s."""
    return timeline(
        "simulated",
        [(0, (0, 1))],
        [
            span(FORWARD, 0, 0.0, 1.0),
            span(BACKWARD, 0, 1.0, 3.0),
            span(REDUCE, 0, 3.0, 4.0, "collective"),
            span(UPDATE, 0, 4.0, 4.5),
        ],
    )


def measured(scale: float = 1.0, steps: int = 3, late_s: float = 0.0) -> Timeline:
    """The same on two ranks, `scale` times as slow; rank 1 ends its backward pass `late_s` later, and rank 0 waits for
    it in the all-reduce."""
    spans = []
    for step in range(steps):
        base = step * (4.5 * scale + late_s)
        for rank in range(2):
            own = late_s * rank
            for op, start, end, resource in (
                (FORWARD, 0.0, scale, "compute"),
                (BACKWARD, scale, 3.0 * scale + own, "compute"),
                (REDUCE, 3.0 * scale + own, 4.0 * scale + late_s, "collective"),
                (UPDATE, 4.0 * scale + late_s, 4.5 * scale + late_s, "compute"),
            ):
                spans.append(span(op._replace(step=step), rank, base + start, base + end, resource))
    return timeline("measured", [(0, (0,)), (1, (1,))], spans, steps)


def test_a_perfect_prediction_has_no_error() -> None:
    found = compare(predicted(), measured())
    assert found.joined_ops == 1.0
    assert found.joined_time == 1.0
    assert found.predicted_only == found.measured_only == ()
    assert found.step.predicted_s == found.step.measured_s == 4.5
    assert [row.seconds.error for row in found.ops] == pytest.approx([0.0] * 4)
    assert {row.phase: row.seconds.predicted_s for row in found.phases} == {
        "forward": 1.0, "backward": 2.0, "synchronise": 1.0, "update": 0.5,
    }  # fmt: skip
    assert found.exposed.predicted_s == pytest.approx(1.0)
    assert found.exposed.error == pytest.approx(0.0)


@settings(deadline=None)
@given(st.floats(0.1, 10.0))
def test_a_slower_machine_shows_in_every_row(scale: float) -> None:
    found = compare(predicted(), measured(scale))
    for figure in (found.step, found.exposed, *(row.seconds for row in (*found.ops, *found.phases))):
        assert figure.error == pytest.approx(1.0 / scale - 1.0)


def test_waiting_for_a_slow_rank_is_not_communication() -> None:
    found = compare(predicted(), measured(late_s=2.0))
    rows = {row.op: row.seconds for row in found.ops}
    assert rows[REDUCE].measured_s == pytest.approx(1.0)
    assert rows[BACKWARD].measured_s == pytest.approx(3.0)  # the median of a rank at 2 s and one at 4 s
    assert found.exposed.measured_s == pytest.approx(1.0)
    assert found.step.measured_s == pytest.approx(6.5)
    assert {row.phase: row.seconds.measured_s for row in found.phases}["backward"] == pytest.approx(4.0)


def test_what_does_not_join_is_listed() -> None:
    without = replace(predicted(), spans=predicted().spans[:3])
    found = compare(without, measured())
    assert found.measured_only == (UPDATE,)
    assert found.joined_ops == 1.0
    assert found.joined_time == pytest.approx(4.0 / 4.5)
    less = measured()
    less = replace(less, spans=tuple(s for s in less.spans if s.op.kind != "all-reduce"))
    found = compare(predicted(), less)
    assert found.predicted_only == (REDUCE,)
    assert found.joined_ops == 0.75


def test_a_server_beside_a_worker_joins_though_it_shares_its_rank() -> None:
    simulated = timeline(
        "simulated",
        [(0, (0, 1)), (1, (2,))],
        [span(FORWARD, 0, 0.0, 1.0), span(SERVE, 1, 1.0, 1.5, "host")],
    )
    real = timeline(
        "measured",
        [(0, (0,)), (1, (1,))],
        [span(FORWARD, 0, 0.0, 1.0), span(FORWARD, 1, 0.0, 1.0), span(SERVE, 1, 1.0, 2.0, "host")],
    )
    found = compare(simulated, real)
    assert found.joined_ops == found.joined_time == 1.0
    assert {row.op: row.seconds.error for row in found.ops} == {FORWARD: 0.0, SERVE: -0.5}
    # The server is no part of the worker's computing.
    assert {row.phase: row.seconds.measured_s for row in found.phases} == {"forward": 1.0, "update": 1.0}


def test_dedicated_servers_join_by_rank() -> None:
    simulated = timeline(
        "simulated", [(0, (0,)), (1, (1,)), (2, (2,))],
        [span(FORWARD, 0, 0.0, 1.0), span(SERVE, 1, 1.0, 1.5, "host"), span(SERVE, 2, 1.0, 3.0, "host")],
    )  # fmt: skip
    real = timeline(
        "measured", [(0, (0,)), (1, (1,)), (2, (2,))],
        [span(FORWARD, 0, 0.0, 1.0), span(SERVE, 1, 1.0, 1.5, "host"), span(SERVE, 2, 1.0, 3.0, "host")],
    )  # fmt: skip
    assert [row.seconds.error for row in compare(simulated, real).ops] == [0.0, 0.0, 0.0]


def test_the_spread_is_over_steps() -> None:
    base = measured(steps=5)
    spans = [
        replace(s, end_s=s.start_s + 0.1 * (s.op.step + 1)) if s.op.kind == "all-reduce" else s for s in base.spans
    ]
    row = next(r for r in compare(predicted(), replace(base, spans=tuple(spans))).ops if r.op == REDUCE)
    assert row.seconds.measured_s == pytest.approx(0.3)
    assert (row.seconds.low_s, row.seconds.high_s) == pytest.approx((0.14, 0.46))
    assert row.seconds.samples == 5


def test_wall_times_of_steps_come_first() -> None:
    assert compare(predicted(), measured(), step_s=(5.0, 7.0, 6.0)).step.measured_s == 6.0


def test_nothing_measured_has_no_error() -> None:
    found = compare(predicted(), timeline("measured", [(0, (0,))], []))
    assert found.step.error is None
    assert found.joined_ops == 0.0
    assert len(found.predicted_only) == 4


def test_a_comparison_is_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = compare(predicted(), measured(1.5))
    path = tmp_path / "comparison.json"
    files.save(found, path)
    assert files.load(Comparison, path) == found


def test_the_table_has_a_row_per_op() -> None:
    frame = table(compare(predicted(), measured(2.0)))
    assert list(frame["kind"]) == ["compute", "compute", "all-reduce", "compute"]
    assert frame["error"].tolist() == pytest.approx([-0.5] * 4)


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.floats(0.0, 1.0))
def test_quantile_is_numpys(values: list[float], q: float) -> None:
    import numpy as np

    assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)), abs=1e-6)
