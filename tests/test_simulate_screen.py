"""What `clustersim simulate` shows: text that fits, rows that add up, waits by name; a trace that Perfetto opens."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter
from typing import Any

import pytest
from clusters import all_reduce, cluster_of, framework_of, layout_of, model_of, wire, workers, workload_of
from rich.console import Console

from clustersim.layout.layout import Mesh
from clustersim.plan import Plan
from clustersim.program.lower import lower
from clustersim.report.simulate_screen import simulate_screen, steps_line
from clustersim.report.timeline_text import stretches
from clustersim.scenario.load import question
from clustersim.scenario.question import Question
from clustersim.search.search import make_plan
from clustersim.simulate.simulate import Simulated, simulate
from clustersim.timeline import OpId, RankClass, Span, Timeline, chrome_trace, critical_legs, step_ends

SCENARIO: dict[str, Any] = {
    "schema_version": 1,
    "name": "shown",
    "model": {"layers": 8, "hidden": 1024, "heads": 16, "vocab": 32000},
    "training": {"global_batch": 64, "sequence": 1024, "precision": "bf16"},
    "framework": "megatron-lm",
    "cluster": {
        "nodes": {"dgx-a100-80g": 4},
        "fabric": {"kind": "leaf-spine", "nodes_per_leaf": 2, "oversubscription": 2},
        "faults": [{"rank": 17, "slowdown": 1.5}],
    },
    "layout": {"dp": 4, "tp": 2, "pp": 4, "micro_batch": 2, "schedule": "1f1b", "sync": "allreduce"},
    "search": {"simulate": 1},
}
CASES: dict[str, dict[str, Any]] = {
    "pipeline": {},
    "servers": {
        "layout": {"tp": 1, "pp": 1, "sync": "parameter-server", "placement": "dedicated"},
        "cluster": {"nodes": {"dgx-a100-80g": 2}, "servers": {"cpu-server-200g": 2}},
    },
    "sharded": {"layout": {"dp": 32, "tp": 1, "pp": 1, "sync": "sharded", "sharded_stage": 3}},
    "fed": {
        "layout": {"dp": 16, "tp": 1, "pp": 1, "sync": "allreduce"},
        "cluster": {"nodes": {"dgx-a100-80g": 2}, "storage": {"storage-disk": 1}},
        "data": {"sample": "5MB", "decode": "1ms"},
    },
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, Plan, Question]:
    asked = question(SCENARIO | CASES[request.param], "shown")
    return request.param, make_plan(asked, workers=1), asked


def _run(plan: Plan, asked: Question, steps: int) -> Simulated:
    program = lower(plan.workload, plan.layout, plan.framework, plan.machines.devices_per_node)
    return simulate(program, asked.cluster, plan.framework, steps=steps)


def _text(plan: Plan, found: Simulated, width: int = 100) -> str:
    out = io.StringIO()
    screen = simulate_screen("shown", plan.layout, plan.workload.training, found, found.timeline())
    Console(file=out, width=width).print(screen)
    return out.getvalue()


_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def _seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * _UNITS[unit]


def _path_rows(text: str) -> list[tuple[float, float, str]]:
    """(seconds, per cent, words) of the lines below the title of the critical path."""
    lines = text[text.index("Critical path") :].splitlines()[2:]
    rows = []
    for line in lines:
        match = re.match(r"\s*([\d.]+ (?:s|ms|us|ns))\s+([\d.]+) %\s+(.*)", line)
        if match is not None:
            rows.append((_seconds(match[1]), float(match[2]), match[3].strip()))
    return rows


@pytest.mark.parametrize("steps", [1, 3])
def test_the_screen_fits_and_its_critical_path_adds_up(case: tuple[str, Plan, Question], steps: int) -> None:
    name, plan, asked = case
    found = _run(plan, asked, steps)
    text = _text(plan, found)
    assert all(len(line) <= 100 for line in text.splitlines())
    rows = _path_rows(text)
    assert rows[-1][2] == "in all"
    assert 2 <= len(rows) <= 16
    last = found.step_times_s[-1]
    assert rows[-1][0] == pytest.approx(last, rel=0.01)
    # Three digits a row.
    assert sum(seconds for seconds, _, _ in rows[:-1]) == pytest.approx(last, rel=0.01)
    assert sum(share for _, share, _ in rows[:-1]) == pytest.approx(100.0, abs=0.6 * len(rows))
    # Moments count from the start of the step that is shown, whichever it is.
    moments = re.findall(r"([\d.,]+) - ([\d.,]+) (us|ms|s)\b", text.partition("Critical path")[2])
    ends = [float(end.replace(",", "")) * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[unit] for _, end, unit in moments]
    assert float(moments[0][0]) == 0.0
    assert max(ends) <= last * 1.001
    words = " / ".join(what for _, _, what in rows)
    expected = {
        "pipeline": ("x forward", "collectives inside", "send activations, exposed", "stage 2, rank 16"),
        "servers": ("forward", "backward", "push gradients, exposed", "end of the step"),
        "sharded": ("forward", "all-gather weights, forward, exposed", "reduce-scatter gradients, exposed"),
        "fed": ("read input, exposed",),
    }[name]
    for phrase in expected:
        assert phrase in words, (phrase, text)
    assert ("input stall" in text) == (name == "fed")
    assert ("queues" in text) == (name in ("fed", "servers"))
    assert ("warm-up" in text or "steady from" in text) == (steps > 1)


def test_rows_are_exact_before_they_are_rounded(case: tuple[str, Plan, Question]) -> None:
    _, plan, asked = case
    for steps in (1, 3):
        found = _run(plan, asked, steps)
        timeline = found.timeline()
        every = stretches(timeline)
        assert sum(row.busy_s + row.waited_s for row in every) == pytest.approx(found.makespan_s, rel=1e-9)
        last = stretches(timeline, last_step=True)
        assert sum(row.busy_s + row.waited_s for row in last) == pytest.approx(found.step_times_s[-1], rel=1e-9)
        assert step_ends(timeline)[-1] == pytest.approx(found.makespan_s, rel=1e-12)
        # Simulated: something known always holds the step up.
        assert all(row.waited_s == 0.0 for row in every)


def test_spans_in_parts_are_busy_for_their_parts_only(case: tuple[str, Plan, Question]) -> None:
    """A server is busy for as long as its queue says: what lies between the partitions of a bucket is idle."""
    name, plan, asked = case
    found = _run(plan, asked, 1)
    workers_, spans = found.prices.placement.folding.classes, found.timeline().spans
    assert all(0.0 <= span.idle_s <= span.end_s - span.start_s for span in spans)
    busy = sum(span.end_s - span.start_s - span.idle_s for span in spans if span.rank == workers_)
    queues = [use for use in found.queues if use.kind == "server hosts"]
    assert bool(queues) == (name == "servers")
    for use in queues:
        assert busy == pytest.approx(use.utilisation * found.makespan_s, rel=1e-9)
        assert use.present == pytest.approx(use.requests_per_s * (use.waited_s + use.service_s), rel=1e-12)


def test_passes_are_counted_once_whatever_their_pieces() -> None:
    """Four micro-batches on one rank: four forward and four backward passes, the last in pieces, in this order."""
    layout = layout_of(Mesh(dp=2, tp=1, pp=1), all_reduce(bucket_bytes=1e5))
    program = lower(workload_of(8), layout, framework_of(), 1)
    found = simulate(program, cluster_of(workers(2, far=wire(1e15))), framework_of(pass_s=1.0))
    rows = {row.what: row for row in stretches(found.timeline())}
    assert rows["4 x forward"].times == rows["4 x backward"].times == 4
    assert rows["4 x backward"].spans > 4
    assert rows["4 x forward"].busy_s == pytest.approx(16.0, rel=1e-3)


def test_collectives_inside_ops_use_their_links() -> None:
    """Two layers' worth of tensor parallelism by hand: 2 allreduces forward and 2 backward of b s h bf16 numbers, of
    which every rank of 4 sends 2 (n-1)/n."""
    model = model_of(layer_count=2)
    layout = layout_of(Mesh(dp=1, tp=4, pp=1), all_reduce(), layer_count=2)
    workload = workload_of(3, model=model, sequence=64)
    cluster = cluster_of(workers(1, devices=4, near=wire(1e9)))
    found = simulate(lower(workload, layout, framework_of(), 4), cluster, framework_of())
    out = [use for use in found.links if use.kind == "device out"]
    assert sum(use.count for use in out) == 4
    once = 64 * 384 * 2 * 2 * 3 / 4
    # The embedding's and the head's come on top.
    layers_only = 3 * 2 * 4 * once
    assert layers_only <= out[0].inside_bytes_per_link <= 1.3 * layers_only
    assert 0.0 < out[0].utilisation <= 1.0


@pytest.mark.parametrize(
    ("seconds", "line"),
    [
        ((2.0, 2.0, 2.0), "steady from the first step on: 3 steps alike"),
        ((3.0, 2.0, 2.0001), "warm-up 3 s; then 2 alike"),
        ((3.0, 2.5, 2.0), "warm-up 3 s, 2.5 s; not steady yet: simulate more steps"),
        ((*range(20, 2, -1), 1, 1), "warm-up 20 s, 19 s, 18 s, ..., 4 s, 3 s; then 2 alike"),
    ],
)  # fmt: skip
def test_warm_up_and_steady_state_are_told_apart(seconds: tuple[float, ...], line: str) -> None:
    assert steps_line(seconds) == line


def test_a_measured_timeline_has_a_path_without_gaps() -> None:
    """Spans that name nothing they waited for: each comes behind what ended last, and what is between is a wait."""
    spans = tuple(
        Span(op=OpId(0, i, 0, "forward", "all", "compute"), rank=0, start_s=s, end_s=e, ready_s=s, resource="compute")
        for i, (s, e) in enumerate([(1.0, 2.0), (2.5, 4.0), (2.6, 3.0)])
    )
    classes = (RankClass(rank=0, label="rank 0", members=(0,)),)
    timeline = Timeline(source="measured", steps=1, classes=classes, spans=spans)
    legs = critical_legs(timeline)
    assert [(leg.start_s, leg.end_s, leg.span is None) for leg in legs] == [
        (1.0, 2.0, False), (2.0, 2.5, True), (2.5, 4.0, False),
    ]  # fmt: skip
    assert [row.what for row in stretches(timeline)] == ["2 x forward", "waiting"]
    empty = Timeline(source="measured", steps=1, classes=classes, spans=())
    assert critical_legs(empty) == ()
    assert stretches(empty) == []


# ----------------------------------------------------------------------------------------------------------- trace


def test_the_trace_is_one_that_perfetto_opens(case: tuple[str, Plan, Question]) -> None:
    """Every track has a name, slices of a track do not overlap, arrows have two ends in time's order, counters are
    shares of a capacity."""
    _, plan, asked = case
    found = _run(plan, asked, 2)
    timeline = found.timeline()
    events = json.loads(json.dumps(chrome_trace(timeline, counters=found.link_series())))["traceEvents"]
    kinds = Counter(event["ph"] for event in events)
    assert kinds["X"] == len(timeline.spans)
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    processes = {e["pid"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    slices: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        assert event["pid"] in processes
        if event["ph"] == "X":
            assert event["dur"] >= 0.0
            slices.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert slices.keys() == named
    for track in slices.values():
        track.sort()
        for (_, end), (start, _) in itertools.pairwise(track):
            assert start >= end - 2e-3
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    for number, start in starts.items():
        assert start["ts"] <= ends[number]["ts"] + 2e-3
        assert start["pid"] != ends[number]["pid"]
    counters: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "C":
            counters.setdefault(event["name"], []).append((event["ts"], event["args"]["value"]))
    assert counters
    for series in counters.values():
        assert [at for at, _ in series] == sorted(at for at, _ in series)
        assert series[-1][1] == pytest.approx(0.0, abs=0.01)
        assert all(value >= 0.0 for _, value in series)


def test_sends_of_a_pipeline_have_arrows() -> None:
    asked = question(SCENARIO, "shown")
    plan = make_plan(asked, workers=1)
    found = _run(plan, asked, 1)
    events = chrome_trace(found.timeline())["traceEvents"]
    arrows = Counter(event["name"] for event in events if event["ph"] == "s")
    sends = sum(span.op.kind == "send" for span in found.timeline().spans)
    assert arrows["send"] == pytest.approx(sends, rel=0.5)
    assert {"forward, micro-batch 0", "backward, micro-batch 1"} <= {e["name"] for e in events if e["ph"] == "X"}
