"""What `clustersim profile` says: this machine in a few figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clustersim.report.figures import significant
from clustersim.units import human_bytes, human_seconds

if TYPE_CHECKING:
    # Plain records; nothing of the executor is imported when a program runs.
    from clustersim.execute.probe_samples import DeviceProbe, Probe
    from clustersim.execute.profile_files import Written


# Below this part of one rank's time, several at once are faster than repeats of one differ by.
_FASTER = 0.95


def probe_screen(found: Probe, written: Written, budget_s: float) -> Group:
    """The best figure of each kind, how ranks slow each other, and the files; `budget_s`: the seconds it was given."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("what")
    table.add_column("figure", overflow="fold", ratio=1)
    for device in found.devices:
        for name, figure in _of_device(device):
            table.add_row(name, figure)
    alone = min((s for s in found.shared), key=lambda sample: sample.ranks, default=None)
    if alone is not None:
        slower = ", ".join(
            f"{sample.ranks}: {significant(sample.layer.seconds / alone.layer.seconds, 3)} x"
            for sample in sorted(found.shared, key=lambda sample: sample.ranks)
        )
        table.add_row("a layer, with ranks at once", slower)
    if found.messages:
        small = min(found.messages, key=lambda sample: sample.bytes)
        fastest = max(sample.bytes / sample.time.seconds for sample in found.messages)
        table.add_row(
            "messages (gloo)", f"{human_seconds(small.time.seconds)} the smallest, {human_bytes(fastest)}/s at best"
        )
    reduced = [s for s in found.collectives if s.collective == "all_reduce"]
    if reduced:
        most = max(sample.ranks for sample in reduced)
        bus = max(
            2.0 * (most - 1) / most * sample.bytes / sample.time.seconds for sample in reduced if sample.ranks == most
        )
        table.add_row(f"all-reduce of {most} ranks (gloo)", f"busbw {human_bytes(bus)}/s at best")
    table.add_row("adding gradients, all cores", f"{human_bytes(found.reduce_bytes_per_s)}/s of input")
    parts: list[RenderableType] = [
        Text.assemble((found.cpu, "bold"), f", {found.cores} cores, {human_bytes(found.memory_bytes)} (at most "
                      f"{human_seconds(budget_s)} of measuring, {human_seconds(found.took_s)} in all)"),
        table,
        *(Text(line, style="yellow") for line in faster_together(found)),
        Text(f"Profiles: {', '.join(str(path) for path in written.files if path.suffix == '.yaml')}"),
    ]  # fmt: skip
    return Group(*parts)


def faster_together(found: Probe) -> list[str]:
    """A warning where a layer took less time on several ranks at once than on one: sharing cores slows, so that the
    measurement of one was disturbed."""
    alone = min(found.shared, key=lambda sample: sample.ranks, default=None)
    if alone is None:
        return []
    faster = [sample for sample in found.shared if sample.layer.seconds < _FASTER * alone.layer.seconds]
    if not faster:
        return []
    counts = " and ".join(str(sample.ranks) for sample in faster)
    return [
        f"warning: a layer took less time on {counts} ranks at once than on {alone.ranks}, which sharing cores cannot "
        "do: something else slowed that one, and predictions of what ranks that share do will be off; run "
        "`clustersim profile --fresh` when this machine is quiet"
    ]


def _of_device(device: DeviceProbe) -> list[tuple[str, str]]:
    label = "one rank" if device.kind == "cpu" else device.name
    rows = []
    for dtype in dict.fromkeys(sample.dtype for sample in device.gemm):
        samples = [s for s in device.gemm if s.dtype == dtype and s.threads == device.threads]
        if samples:
            best = max(2.0 * s.batch * s.m * s.n * s.k / s.time.seconds for s in samples)
            rows.append((f"{label}: {dtype} products", f"{significant(best / 1e9, 3)} GFLOP/s at best"))
    if device.memory:
        rate = max(sample.bytes / sample.time.seconds for sample in device.memory)
        rows.append((f"{label}: memory-bound operations", f"{human_bytes(rate)}/s at best"))
    for direction in dict.fromkeys(sample.direction for sample in device.copies):
        rate = max(s.bytes / s.time.seconds for s in device.copies if s.direction == direction)
        rows.append((f"{label}: copies {direction}", f"{human_bytes(rate)}/s at best"))
    rows.append((f"{label}: smallest kernel", human_seconds(device.floor_s)))
    rows += [
        (
            f"{label}: after {significant(s.seconds, 2)} s of products",
            f"{significant(s.sustained_flops / 1e9, 3)} GFLOP/s, {significant(s.burst_flops / 1e9, 3)} at first",
        )
        for s in device.sustained
    ]
    missed = ", ".join(f"{count} {kind}" for kind, count in device.missed.items())
    points = len(device.gemm) + len(device.attention) + len(device.memory) + len(device.copies)
    rows.append(
        (
            f"{label}: rows",
            f"{points}, {device.rejected:.1%} of timings rejected" + (f"; no time for {missed}" if missed else ""),
        )
    )
    return rows
