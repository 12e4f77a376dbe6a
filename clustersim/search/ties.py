"""What the model cannot tell apart: layouts of one question, and a question from what it becomes in a what-if."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clustersim.plan import Candidate, WhatIfResult
from clustersim.scenario.question import Question
from clustersim.search.kind import interval_of, kind_of
from clustersim.search.predict import objective_of
from clustersim.units import human_seconds


def what_if_result(
    name: str,
    settings: dict[str, object],
    other: Question | None,
    candidates: list[Candidate],
    winner: Candidate,
    today: Question,
) -> WhatIfResult:
    """The best of the layouts that were simulated for a what-if, and whether its time, and its lead over today's
    winner, are more than the model can tell. `other` is None where nothing fits."""
    if other is None:
        return WhatIfResult(
            name=name, set=settings, layout=None, step_s=None, usd_per_billion_tokens=None, change="nothing fits"
        )
    best = min(candidates, key=lambda candidate: objective_of(other, candidate.prediction))
    before, after = winner.prediction.step_s, best.prediction.step_s
    relative = after / before - 1.0
    rounded = f"{relative:+.0%}" if abs(relative) >= 0.1 else f"{relative:+.1%}"
    change = f"step {human_seconds(before)} -> {human_seconds(after)} ({rounded})"
    dollars, now = winner.prediction.usd_per_billion_tokens, best.prediction.usd_per_billion_tokens
    if dollars is not None and now is not None:
        change += f", ${dollars:,.0f} -> ${now:,.0f} per billion tokens"
    same = next((candidate for candidate in candidates if candidate.layout == winner.layout), None)
    if best is not same:
        change += ", another layout wins" + _by_how_much(other, best, same)
    # What becomes of today's layout is known better than how another compares with it.
    compared = best if same is None else same
    limit = _limit(today, other, same_layout=compared is same)
    no_more = abs(math.log(compared.prediction.step_s / before)) <= limit
    if no_more:
        change += f"; less than the model can tell (±{math.expm1(limit):.0%})"
    return WhatIfResult(
        name=name, set=settings, layout=best.layout, step_s=after, usd_per_billion_tokens=now, change=change,
        told=not no_more,
    )  # fmt: skip


def _limit(today: Question, other: Question, *, same_layout: bool) -> float:
    """How far (in logarithms) two times must be apart to be told apart: of one layout on much the same machines, by
    what runs repeat to; of two, by what pairs of layouts were off; of other kinds of devices or frameworks, by both
    intervals, which have nothing in common."""
    mine, theirs = interval_of(today), interval_of(other)
    devices = [{m.device.name for m in each.cluster.workers if m.device is not None} for each in (today, other)]
    if kind_of(today) != kind_of(other) or devices[0] != devices[1] or today.framework.name != other.framework.name:
        widths = [math.log(each.high / each.low) / 2.0 for each in (mine, theirs)]
        return math.hypot(*widths)
    return max(mine.repeats, theirs.repeats) if same_layout else max(mine.ratio, theirs.ratio)


def _by_how_much(question: Question, best: Candidate, same: Candidate | None) -> str:
    """The new winner against the old one under the new circumstances."""
    if same is None:
        return ""
    gain = math.log(objective_of(question, same.prediction) / objective_of(question, best.prediction))
    tie = " (a tie)" if gain <= interval_of(question).ratio else ""
    return f" by {math.expm1(gain):.1%}{tie}"


def tied(question: Question, ranking: Sequence[Candidate], ratio: float) -> int:
    """How many of the first of a ranking the model cannot tell from the winner."""
    least = objective_of(question, ranking[0].prediction)
    return sum(math.log(objective_of(question, each.prediction) / least) <= ratio for each in ranking)
