"""What `clustersim simulate --days` says: goodput, where the time goes, what failed, the checkpoint interval."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clustersim.horizon.checkpoints import (
    best_interval_s,
    daly_interval_s,
    efficiency,
    expected_ettr,
    young_interval_s,
)
from clustersim.horizon.horizon import Horizon, Spread
from clustersim.horizon.job import Job
from clustersim.layout.layout import Layout, describe
from clustersim.report.figures import counted, decimals, fixed, percent
from clustersim.units import human_bytes, human_seconds
from clustersim.workload.training import Training

_WORDS = {
    "useful": "work that was kept", "degraded": "running on fewer nodes", "checkpoint": "pauses to write checkpoints",
    "lost": "work that was rolled back", "restart": "detection and restarts", "wait": "waiting for a node",
    "planned": "planned stops",
}  # fmt: skip
_DAY_S = 86400.0
# The closed forms need a failure rate; causes beyond these few go into the JSON only.
_MOST_CAUSES = 6


def horizon_screen(name: str, layout: Layout, training: Training, job: Job, found: Horizon) -> Group:
    """One screen: goodput with its interval over the runs, hours by kind, failures, checkpoints, progress."""
    days = found.seconds / _DAY_S
    runs = f"{found.seeds} runs" if found.seeds > 1 else "1 run"
    head = Text.assemble(
        (name, "bold"), f": {describe(layout)}\n", f"{days:g} days on {job.nodes:,} nodes, {runs}\n",
        ("goodput ", "bold"), (_share(found.goodput), "bold"), _between(found.goodput), _ettr(found), _closed(job),
    )  # fmt: skip
    parts: list[RenderableType] = [head, Text(), _hours(found), Text(), *_facts(training, job, found)]
    return Group(*parts)


def _share(spread: Spread) -> str:
    return f"{fixed(100.0 * spread.mean, max(1, decimals(100.0 * 2.0 * spread.error)))} %"


def _between(spread: Spread) -> str:
    low, high = (fixed(100.0 * value, 1) for value in (spread.low, spread.high))
    return f" ({low} to {high} % in 90 % of runs)" if low != high else ""


def _ettr(found: Horizon) -> str:
    """Apart from goodput only where some of the work was done on fewer nodes."""
    return f", effective training time {_share(found.ettr)}" if found.seconds_by_kind["degraded"] else ""


def _closed(job: Job) -> str:
    exact = exact_goodput(job)
    return f"; by the closed form {fixed(100.0 * exact, 2)} %" if exact is not None else ""


def _levers(job: Job) -> str:
    """What half of each cost would bring, each at its own best interval."""
    if exact_goodput(job) is None:
        return ""
    pause, restart, mtbf = job.pause_s, job.restart_s + job.persist_s, job.mtbf_s
    halves = (
        ("restart time", pause, 0.5 * restart, mtbf),
        ("failures", pause, restart, 2.0 * mtbf),
        ("pauses", 0.5 * pause, restart, mtbf),
    )
    told = []
    for what, w, r, mu in halves:
        interval = max(daly_interval_s(w, mu), job.persist_s - w, job.step_s)
        told.append(f"the {what} {fixed(100.0 * efficiency(interval, w, r, mu), 1)} %")
    return f"goodput with half {', half '.join(told)}"


def exact_goodput(job: Job) -> float | None:
    """The goodput in the long run by the closed form, where it holds."""
    if not job.constant_rate or math.isinf(job.mtbf_s):
        return None
    return efficiency(job.interval_s, job.pause_s, job.restart_s + job.persist_s, job.mtbf_s)


def _hours(found: Horizon) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("where the time goes")
    table.add_column("hours", justify="right")
    table.add_column("share", justify="right")
    for kind, seconds in found.seconds_by_kind.items():
        if seconds > 0.0:
            table.add_row(_WORDS[kind], fixed(seconds / 3600.0, 1), percent(seconds / found.seconds))
    return table


def _facts(training: Training, job: Job, found: Horizon) -> list[RenderableType]:
    lines: list[RenderableType] = []
    causes = [f"{cause} {_rounded(count)}" for cause, count in found.failures_by_cause.items() if count > 0.0]
    named = f": {', '.join(causes[:_MOST_CAUSES])}" if len(causes) > 1 else ""
    more = ", ..." if len(causes) > _MOST_CAUSES else ""
    every = f", one every {human_seconds(found.seconds / found.failures.mean)}" if found.failures.mean else ""
    lines.append(_line("failures", f"{_rounded(found.failures.mean)}{every}{named}{more}"))
    persist = f", safe {human_seconds(job.persist_s)} later" if job.persist_s else ""
    if math.isfinite(job.interval_s):
        size = f"{human_bytes(job.checkpoint_bytes)} every {human_seconds(job.interval_s)} of training"
        lines.append(_line("checkpoint", f"{size}, {human_seconds(job.pause_s)} of pause each{persist}"))
    else:
        lines.append(_line("checkpoint", "none: nothing here rolls the job back"))
    if math.isfinite(job.mtbf_s) and job.pause_s > 0.0:
        optima = (
            f"Young {human_seconds(young_interval_s(job.pause_s, job.mtbf_s))}, "
            f"Daly {human_seconds(daly_interval_s(job.pause_s, job.mtbf_s))}, "
            f"exact {human_seconds(best_interval_s(job.pause_s, job.mtbf_s))}"
        )
        lines.append(_line("best interval", optima))
    lines.append(
        _line(
            "restart",
            f"{human_seconds(job.restart_s)}, of which detection {human_seconds(job.detection_s)}, "
            f"rescheduling {human_seconds(job.reschedule_s)}, loading {human_seconds(job.load_s)}",
        )
    )
    steps = found.seconds * found.goodput.mean / job.step_s
    tokens = steps * training.tokens_per_step
    text = f"{counted(steps)} steps of {human_seconds(job.step_s)}, {counted(tokens)} tokens"
    if training.tokens is not None and found.goodput.mean > 0.0:
        ideal = training.tokens / training.tokens_per_step * job.step_s
        text += (
            f"; all {counted(training.tokens)} tokens in {ideal / found.goodput.mean / _DAY_S:.1f} days "
            f"({ideal / _DAY_S:.1f} without interruptions)"
        )
    lines.append(_line("progress", text))
    if levers := _levers(job):
        lines.append(_line("levers", levers))
    return lines


def _rounded(count: float) -> str:
    return fixed(count, 0 if count >= 10.0 else 1)


def _line(name: str, text: str) -> Text:
    return Text.assemble((f"{name}: ", "bold"), text)


def horizon_document(name: str, layout: Any, training: Training, job: Job, found: Horizon) -> dict[str, Any]:
    """Everything of the screen, and more, as plain JSON data: seconds, fractions, counts."""
    finite = math.isfinite(job.mtbf_s)
    closed = {
        "young_interval_s": young_interval_s(job.pause_s, job.mtbf_s) if finite else None,
        "daly_interval_s": daly_interval_s(job.pause_s, job.mtbf_s) if finite else None,
        "best_interval_s": best_interval_s(job.pause_s, job.mtbf_s) if finite else None,
        "goodput": exact_goodput(job),
        "expected_ettr": expected_ettr(job.interval_s, job.pause_s, job.restart_s, job.mtbf_s) if finite else None,
    }
    return {
        "schema_version": 1,
        "scenario": name,
        "layout": layout,
        "days": found.seconds / _DAY_S,
        "seeds": found.seeds,
        "nodes": job.nodes,
        "step_s": job.step_s,
        "goodput": _spread(found.goodput),
        "ettr": _spread(found.ettr),
        "hours": {kind: seconds / 3600.0 for kind, seconds in found.seconds_by_kind.items()},
        "failures": _spread(found.failures),
        "rollbacks": _spread(found.rollbacks),
        "failures_by_cause": found.failures_by_cause,
        "mtbf_s": job.mtbf_s if finite else None,
        "checkpoint": {
            "bytes": job.checkpoint_bytes,
            "interval_s": job.interval_s if math.isfinite(job.interval_s) else None, "pause_s": job.pause_s,
            "persist_s": job.persist_s, "load_s": job.load_s,
        },
        "restart_s": job.restart_s,
        "closed_forms": closed,
        "steps_done": found.seconds * found.goodput.mean / job.step_s,
        "tokens_done": found.seconds * found.goodput.mean / job.step_s * training.tokens_per_step,
    }  # fmt: skip


def _spread(spread: Spread) -> dict[str, float]:
    return {
        "mean": spread.mean, "p5": spread.low, "p50": spread.median, "p95": spread.high,
        "standard_error": spread.error,
    }  # fmt: skip
