"""What `clustersim collective` says: a table like that of nccl-tests, and the closed form beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from clustersim.report.figures import percent
from clustersim.units import human_seconds

if TYPE_CHECKING:
    from clustersim.simulate.collectives.standalone import PricedCollective

_LINK_WORDS = {
    "device out": "devices out", "device in": "devices in", "pcie out": "PCIe out", "pcie in": "PCIe in",
    "nic out": "NICs out", "nic in": "NICs in", "leaf up": "leaves up", "leaf down": "leaves down",
    "bus": "host memory", "switch up": "PCIe switches up", "switch down": "PCIe switches down",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveRow:
    """One size: the simulated collective, `bus_factor` = busbw / algbw, its closed form where it has one, and what was
    measured on such nodes where their profile says so. `seconds` is what the row predicts, and `source` whose figure
    that is; `algorithm` is what runs, in the words of who chose it."""

    priced: PricedCollective
    seconds: float
    source: str
    algorithm: str
    bus_factor: float
    closed_form_s: float | None
    measured_s: float | None

    @property
    def algbw_bytes_per_s(self) -> float:
        """Bytes of the buffer a second."""
        return self.priced.size_bytes / self.seconds if self.seconds else 0.0

    @property
    def busbw_bytes_per_s(self) -> float:
        """Bytes a second that a link must carry at least."""
        return self.algbw_bytes_per_s * self.bus_factor

    @property
    def bottleneck(self) -> tuple[str, float]:
        """What takes most of the simulated time, and how much of it: waiting for hops, or the busiest links."""
        priced = self.priced
        if priced.seconds == 0.0:
            return "none", 0.0
        waiting = priced.waiting_s / priced.seconds
        if not priced.links or waiting >= priced.links[0].busy_s / priced.seconds:
            return "latency", waiting
        return _LINK_WORDS.get(priced.links[0].kind, priced.links[0].kind), priced.links[0].busy_s / priced.seconds

    @property
    def ratio(self) -> float | None:
        """Simulated time over closed form."""
        return self.priced.seconds / self.closed_form_s if self.closed_form_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTableHead:
    """What all rows have in common; `channels` where the algorithm that was asked for has any."""

    collective: str
    cluster: str
    ranks: int
    nodes: int
    channels: int | None


def collective_screen(head: CollectiveTableHead, rows: Sequence[CollectiveRow]) -> Group:
    """The table, at most 100 columns wide, and what its columns mean."""
    ranks = f"{head.ranks:,} {'rank' if head.ranks == 1 else 'ranks'}"
    where = f"{ranks} on {head.nodes:,} {'node' if head.nodes == 1 else 'nodes'} ({head.cluster})"
    channels = "" if head.channels is None else f", {head.channels} {'channel' if head.channels == 1 else 'channels'}"
    title = Text.assemble((head.collective, "bold"), f", {where}{channels}")
    nccl = any(row.source != "simulated" for row in rows)
    measured = not nccl and any(row.measured_s is not None for row in rows)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    names = ["size", "time", "algbw GB/s", "busbw GB/s", "algorithm", "bottleneck"]
    if nccl:
        names[2:4] = ["algbw", "busbw"]
    names += ["simulated"] * nccl + ["closed form", "ratio"] + ["measured"] * measured
    for name in names:
        left = name in ("algorithm", "bottleneck")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        name, share = row.bottleneck
        cells = [
            size_text(row.priced.size_bytes), human_seconds(row.seconds) + "*" * (row.source == "measured"),
            _rate(row.algbw_bytes_per_s), _rate(row.busbw_bytes_per_s), row.algorithm,
            f"{name} {percent(share)}" if share else name,
        ]  # fmt: skip
        if nccl:
            cells.append(human_seconds(row.priced.seconds))
        cells += [_time(row.closed_form_s), "-" if row.ratio is None else f"{row.ratio:.3f}"]
        if measured:
            cells.append(_time(row.measured_s))
        table.add_row(*cells)
    notes = ["bottleneck: its share of the simulated time; ratio: simulated / closed form"]
    if nccl:
        notes.insert(0, "time: as NCCL's tuner predicts, * as measured on such nodes; bandwidths in GB/s")
    return Group(title, Text(), table, Text(), Text("\n".join(notes), style="dim"))


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else human_seconds(seconds)


def _rate(value: float) -> str:
    return f"{value / 1e9:.1f}" if value >= 1e11 else f"{value / 1e9:.3f}"


def size_text(size: float) -> str:
    """A size as people type it: 64 MiB, 1.5 GiB, 1000 B."""
    for unit, scale in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if size >= scale and (size / scale * 16).is_integer():
            return f"{size / scale:g} {unit}"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale and (size / scale * 1000).is_integer():
            return f"{size / scale:g} {unit}"
    return f"{size:.0f} B"


def collective_document(head: CollectiveTableHead, rows: Sequence[CollectiveRow]) -> dict[str, Any]:
    """The same, and every link's load, as plain data."""
    return {
        "schema_version": 1,
        "collective": head.collective,
        "cluster": head.cluster,
        "ranks": head.ranks,
        "nodes": head.nodes,
        "channels": head.channels,
        "rows": [
            {
                "bytes": row.priced.size_bytes,
                "seconds": row.seconds,
                "source": row.source,
                "algbw_bytes_per_s": row.algbw_bytes_per_s,
                "busbw_bytes_per_s": row.busbw_bytes_per_s,
                "algorithm": row.algorithm,
                "simulated_algorithm": row.priced.algorithm,
                "simulated_s": row.priced.seconds,
                "latency_s": row.priced.waiting_s,
                "bottleneck": {"what": row.bottleneck[0], "share": row.bottleneck[1]},
                "links": [
                    {
                        "kind": link.kind, "bytes": link.bytes, "rate_bytes_per_s": link.capacity_bytes_per_s,
                        "busy_s": link.busy_s,
                    }
                    for link in row.priced.links
                ],
                "closed_form_s": row.closed_form_s,
                "ratio": row.ratio,
                "measured_s": row.measured_s,
                "phases": row.priced.phases,
                "events": row.priced.events,
            }
            for row in rows
        ],
    }  # fmt: skip
