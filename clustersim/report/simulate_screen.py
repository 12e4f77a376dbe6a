"""What `clustersim simulate` says: the step, where its time goes, the links, the critical path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clustersim.layout.layout import Layout, describe
from clustersim.report.figures import counted, percent
from clustersim.report.timeline_text import critical_path_table, overlapped_note, phase_table
from clustersim.timeline import Timeline
from clustersim.units import human_bytes, human_seconds
from clustersim.workload.training import Training

if TYPE_CHECKING:
    from clustersim.simulate.simulate import LinkUse, Simulated

_LINK_WORDS = {
    "device out": "devices, in the node", "device in": "devices, in the node", "pcie out": "PCIe, to the NICs",
    "pcie in": "PCIe, from the NICs", "nic out": "NICs, out", "nic in": "NICs, in", "leaf up": "leaves, up",
    "leaf down": "leaves, down", "server out": "server hosts, out", "server in": "server hosts, in",
    "bus": "host memory",
}  # fmt: skip


def simulate_screen(name: str, layout: Layout, training: Training, found: Simulated, timeline: Timeline) -> Group:
    """The step time, busy time by phase, the use of every class of links, and the critical path."""
    steps = f", mean of {found.steps} steps" if found.steps > 1 else ""
    head = Text.assemble(
        (name, "bold"), f": {describe(layout)}\n", ("step ", "bold"), (human_seconds(found.step_s), "bold"),
        f"{steps}, {counted(training.tokens_per_step / found.step_s)} tokens/s; "
        f"{found.classes} classes of ranks, {found.events:,} events",
    )  # fmt: skip
    parts: list[RenderableType] = [head, Text(), phase_table(timeline)]
    note = overlapped_note(timeline)
    if note:
        parts.append(Text(note, style="dim"))
    used = [use for use in found.links if use.bytes_per_link > 0.0]
    if used:
        parts += [Text(), links_table(used)]
    parts += [Text(), Text("Critical path", style="bold"), critical_path_table(timeline)]
    return Group(*parts)


def links_table(links: Sequence[LinkUse]) -> Table:
    """A line for each kind of links that carried something: how many, and the use of the busiest of them."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("links")
    for name in ("number", "rate each", "bytes, busiest", "in use, busiest"):
        table.add_column(name, justify="right", no_wrap=True)
    kinds: dict[str, list[LinkUse]] = {}
    for use in links:
        kinds.setdefault(_LINK_WORDS.get(use.kind, use.kind), []).append(use)
    for words, uses in kinds.items():
        busiest = max(uses, key=lambda use: use.utilisation)
        table.add_row(
            words, f"{sum(use.count for use in uses):,}", f"{human_bytes(busiest.capacity_bytes_per_s)}/s",
            human_bytes(busiest.bytes_per_link), percent(busiest.utilisation),
        )  # fmt: skip
    return table
