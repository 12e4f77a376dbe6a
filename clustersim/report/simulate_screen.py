"""What `clustersim simulate` says: the step, where its time goes, the links, the queues, the critical path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clustersim.layout.layout import Layout, describe
from clustersim.plan import Prediction
from clustersim.report.figures import counted, percent
from clustersim.report.plan_screen import sureness
from clustersim.report.timeline_text import critical_path_table, overlapped_note, phase_table
from clustersim.timeline import Timeline
from clustersim.units import human_bytes, human_seconds
from clustersim.workload.training import Training

if TYPE_CHECKING:
    from clustersim.simulate.link_use import LinkUse
    from clustersim.simulate.queueing import QueueUse
    from clustersim.simulate.simulate import Simulated

_LINK_WORDS = {
    "device out": "devices, in the node", "device in": "devices, in the node", "pcie out": "PCIe, to the NICs",
    "pcie in": "PCIe, from the NICs", "nic out": "NICs, out", "nic in": "NICs, in", "leaf up": "leaves, up",
    "leaf down": "leaves, down", "server out": "server hosts, out", "server in": "server hosts, in",
    "bus": "host memory", "storage out": "storage hosts, out", "drives": "drives of a host",
    "readers": "readers of a rank", "switch up": "PCIe switches, up", "switch down": "PCIe switches, down",
}  # fmt: skip
# Steps that differ by less than this are alike.
_SAME = 0.001


def simulate_screen(
    name: str,
    layout: Layout,
    training: Training,
    found: Simulated,
    timeline: Timeline,
    predicted: Prediction | None = None,
) -> Group:
    """The step time, busy time by phase, the use of every class of links and of every queue, and the critical path;
    with the interval of the step time where a plan `predicted` one."""
    parts: list[RenderableType] = [_head(name, layout, training, found)]
    if predicted is not None:
        parts.append(Text(sureness(scaled_to(predicted, found.step_s))))
    if found.engine.factors is not None:
        parts.append(Text(spread_line(found.step_times_s)))
    elif found.steps > 1:
        parts.append(Text(steps_line(found.step_times_s)))
    stall = input_line(found)
    if stall:
        parts.append(Text(stall, style="yellow"))
    parts += [Text(), phase_table(timeline)]
    note = overlapped_note(timeline)
    if note:
        parts.append(Text(note, style="dim"))
    used = [use for use in found.links if use.bytes_per_link or use.inside_bytes_per_link]
    if used:
        parts += [Text(), links_table(used, found.steps)]
    if found.queues:
        parts += [Text(), queues_table(found.queues)]
    title = f"Critical path of step {found.steps}" if found.steps > 1 else "Critical path"
    parts += [Text(), Text(title, style="bold"), critical_path_table(timeline, last_step=found.steps > 1)]
    return Group(*parts)


def scaled_to(predicted: Prediction, step_s: float) -> Prediction:
    """A prediction with its interval around another step time: under other profiles, noise, or several steps."""
    factor = step_s / predicted.step_s
    return replace(predicted, step_s=step_s, low_s=predicted.low_s * factor, high_s=predicted.high_s * factor)


def _head(name: str, layout: Layout, training: Training, found: Simulated) -> Text:
    # Under noise no step is like another.
    steady = found.step_times_s[-1] if found.engine.factors is None else found.step_s
    several = found.steps > 1 and found.engine.factors is None
    mean = f"; mean of {found.steps} steps {human_seconds(found.step_s)}" if several else ""
    ranks = sum(len(members) for members in found.prices.placement.folding.members)
    return Text.assemble(
        (name, "bold"), f": {describe(layout)}\n", ("step ", "bold"), (human_seconds(steady), "bold"),
        f", {counted(training.tokens_per_step / steady)} tokens/s{mean}; {ranks:,} "
        f"{'rank' if ranks == 1 else 'ranks'} in {found.prices.placement.folding.classes:,} "
        f"{'class' if found.prices.placement.folding.classes == 1 else 'classes'}, {found.events:,} events",
    )  # fmt: skip


def steps_line(seconds: Sequence[float]) -> str:
    """Warm-up and steady state apart: what the first steps took, and the rest of them that are alike."""
    steady = seconds[-1]
    alike = next(i for i in range(len(seconds)) if all(abs(s - steady) <= _SAME * steady for s in seconds[i:]))
    rest = len(seconds) - alike
    if alike == 0:
        return f"steady from the first step on: {len(seconds)} steps alike"
    shown = [human_seconds(s) for s in seconds[:alike]]
    many = shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]]
    last = f"then {rest} alike" if rest > 1 else "not steady yet: simulate more steps"
    return f"warm-up {', '.join(many)}; {last}"


def spread_line(seconds: Sequence[float]) -> str:
    """How step times spread under noise."""
    if len(seconds) == 1:
        return "one draw of the noise; --steps 100 shows how step times spread"
    import numpy as np

    times = np.quantile(seconds, (0.5, 0.9, 0.99))
    named = (f"p{name} {human_seconds(float(value))}" for name, value in zip((50, 90, 99), times, strict=True))
    return f"step times under noise: mean {human_seconds(float(np.mean(seconds)))}, {', '.join(named)}"


def input_line(found: Simulated) -> str:
    """How long the step waits for its input; nothing where nobody reads, or nobody waits."""
    stall = found.input_stall_s
    if stall <= 1e-6 * found.makespan_s:
        return ""
    where = f" in {found.steps} steps" if found.steps > 1 else ""
    return f"input stall {human_seconds(stall)}{where} ({percent(stall / found.makespan_s)}): ranks wait for data"


def links_table(links: Sequence[LinkUse], steps: int = 1) -> Table:
    """A line for each kind of links that carried something: how many, and the use of the busiest of them in a step."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("links")
    for name in ("number", "rate each", "a step, busiest", "busy, busiest", "busy, mean"):
        table.add_column(name, justify="right", no_wrap=True)
    kinds: dict[str, list[LinkUse]] = {}
    for use in links:
        kinds.setdefault(_LINK_WORDS.get(use.kind, use.kind), []).append(use)
    for words, uses in kinds.items():
        busiest = max(uses, key=lambda use: use.utilisation)
        count = sum(use.count for use in uses)
        mean = sum(use.utilisation * use.count for use in uses) / count
        carried = (busiest.bytes_per_link + busiest.inside_bytes_per_link) / steps
        table.add_row(
            words, f"{count:,}", f"{human_bytes(busiest.capacity_bytes_per_s)}/s",
            human_bytes(carried), percent(busiest.utilisation), percent(mean),
        )  # fmt: skip
    return table


def queues_table(queues: Sequence[QueueUse]) -> Table:
    """A line for each kind of queue: requests, service, the time in line, and what random arrivals would make of it."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("queues")
    for name in ("number", "requests each", "service", "busy", "in line", "if at random", "present"):
        table.add_column(name, justify="right", no_wrap=True)
    for use in queues:
        random = "for ever" if use.random_wait_s == float("inf") else human_seconds(use.random_wait_s)
        table.add_row(
            use.kind, f"{use.count:,}", f"{counted(use.requests_per_s)}/s", human_seconds(use.service_s),
            percent(use.utilisation), human_seconds(use.waited_s), random, f"{use.present:.3g}",
        )  # fmt: skip
    return table
