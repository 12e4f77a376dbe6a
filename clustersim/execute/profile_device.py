"""A probed device as a profile: its tables, and a roofline fitted to them. No torch here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from clustersim.errors import ExecutionError
from clustersim.execute.probe_clocks import clock_line
from clustersim.execute.probe_samples import AttentionSample, DeviceProbe, Probe
from clustersim.execute.profile_tables import ProbedTables, probed_tables
from clustersim.hardware.device import Device, DeviceTables, Roofline, TableRef
from clustersim.hardware.kernel import Attention, AttentionKernel, Dtype
from clustersim.hardware.provenance import Provenance

NARROW = 64
"""A model this narrow costs the host only."""


def _refuse_incomplete(found: DeviceProbe) -> None:
    """A budget that ended before the first points of a kind, or a device that refused them, leaves no profile."""
    wide = sum(s.hidden > NARROW for s in found.layers)
    have = {
        "products": len(found.gemm), "attention": len(found.attention), "memory-bound operations": len(found.memory),
        "small models": min(len({s.layers for s in found.layers if s.hidden <= NARROW}) - 1, wide),
    }  # fmt: skip
    lacking = [what for what, count in have.items() if count < 1]
    if lacking:
        why = "; ".join(f"{variant}: {reason}" for variant, reason in found.refused.items()) or "the time was too short"
        raise ExecutionError(f"{found.name}: no {', '.join(lacking)} were measured ({why}); profile without --quick")


def _source(probe: Probe, found: DeviceProbe) -> str:
    """The machine, and how it was divided: rows of one source belong into one table."""
    host = f"{probe.cpu}, {probe.cores} cores"
    if found.kind == "gpu":
        return f"clustersim profile on {found.name}, {host}"
    return f"clustersim profile on {host}, {found.threads} thread{'s' if found.threads > 1 else ''} a rank"


def probed_device(
    probe: Probe,
    found: DeviceProbe,
    name: str,
    before: Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Device, ProbedTables]:
    """The profile of a probed device: its tables, and a roofline fitted to them for what they lack. `before`: the
    folder of an earlier profile, whose rows stay where it is of the same machine; where not, `tell` hears why."""
    _refuse_incomplete(found)
    tables = probed_tables(found, _source(probe, found), before, tell)
    return _device(probe, found, name, tables), tables


def _device(probe: Probe, found: DeviceProbe, name: str, tables: ProbedTables) -> Device:
    gemm, memory = tables.gemm, tables.memory
    work = 2.0 * gemm.m * gemm.n * gemm.k
    rate = work / gemm.seconds
    peak = {dtype: float(rate[gemm.dtype == dtype].max()) for dtype in _dtypes(gemm.dtype.tolist())}
    best = np.array([peak[dtype] for dtype in gemm.dtype.tolist()])
    large = np.argsort(work)[-max(3, len(work) // 4) :]
    moved = memory.traffic_bytes / memory.seconds
    bandwidth, largest = float(moved.max()), float(memory.traffic_bytes.max())
    forward, backward = _attention_efficiencies(found, peak)
    provenance = _of_device(probe, found, tables)
    return Device(
        name=name,
        kind=found.kind,
        memory_bytes=float(
            found.memory_bytes // max(1, most_ranks(probe)) if found.kind == "cpu" else found.memory_bytes
        ),
        memory_bandwidth_bytes_per_s=bandwidth,
        peak=peak,
        power_w=found.power_w,
        idle_power_w=0.0,
        launch_overhead_s=found.launch_s,
        sustained_clock=min((s.derate for s in found.sustained), default=1.0),
        roofline=Roofline(
            gemm_efficiency=float(np.median((rate / best)[large])),
            attention_efficiency=forward,
            attention_backward_efficiency=backward,
            memory_efficiency=float(np.median(moved[memory.traffic_bytes >= min(2**20, largest)])) / bandwidth,
            kernel_floor_s=found.floor_s,
            provenance=replace(provenance, method="fitted", notes="Medians over the larger rows of the tables here."),
        ),
        tables=DeviceTables(
            gemm=(_table(provenance, tables, "gemm.csv", len(gemm.seconds)),),
            attention=(_table(provenance, tables, "attention.csv", len(tables.attention.seconds)),),
            attention_kernel=_attention_kernel(found),
            memory=(_table(provenance, tables, "memory.csv", len(memory.seconds)),),
        ),
        provenance=provenance,
    )


def _dtypes(found: list[Dtype]) -> list[Dtype]:
    return list(dict.fromkeys(found))


def _attention_efficiencies(found: DeviceProbe, peak: dict[Dtype, float]) -> tuple[float, float]:
    """Median fraction of the peak forward, and that times the median ratio of the backward's rate to the forward's;
    over the samples that are longer than a launch, where there are any."""
    samples = [s for s in found.attention if s.backend == "default"]
    samples = [s for s in samples if s.forward.seconds > 4.0 * found.floor_s] or samples
    rates = [_attention_flops(s, False) / s.forward.seconds for s in samples]
    backward = [_attention_flops(s, True) / s.backward.seconds for s in samples]
    forward = min(1.0, statistics.median(rate / peak[s.dtype] for rate, s in zip(rates, samples, strict=True)))
    ratio = statistics.median(back / rate for back, rate in zip(backward, rates, strict=True))
    return forward, min(1.0, forward * ratio)


def _attention_kernel(found: DeviceProbe) -> AttentionKernel:
    """Which kernel PyTorch picked by itself: the one whose named runs took the nearest time. Its flash kernel is
    FlashAttention-2."""
    picked = {(s.instances, s.sequence, s.group, s.head_dim): s for s in found.attention if s.backend == "default"}
    distance: dict[AttentionKernel, list[float]] = {"flash-2": [], "cudnn": []}
    for s in found.attention:
        own = picked.get((s.instances, s.sequence, s.group, s.head_dim))
        if own is not None and s.backend in ("flash", "cudnn"):
            kernel: AttentionKernel = "cudnn" if s.backend == "cudnn" else "flash-2"
            distance[kernel].append(abs(math.log(own.forward.seconds / s.forward.seconds)))
    known = {kernel: statistics.median(values) for kernel, values in distance.items() if values}
    return min(known, key=lambda kernel: known[kernel]) if known else "flash-2"


def _attention_flops(a: AttentionSample, backward: bool) -> int:
    work = Attention(
        batch=1, queries=a.sequence, keys=a.sequence, heads=a.instances, kv_heads=a.instances // a.group,
        head_dim=a.head_dim, causal=True, backward=backward, dtype=a.dtype,
    )  # fmt: skip
    return work.flops


def _of_device(probe: Probe, found: DeviceProbe, tables: ProbedTables) -> Provenance:
    """What is said of a device and of its tables."""
    parts = [f"{found.name}."]
    if found.kind == "cpu":
        parts.append(
            "peak: the fastest product measured; memory_bandwidth: the fastest pass, caches included. memory: an equal "
            "share of the host's for each rank. Power was not measured."
        )
    else:
        parts.append(
            "peak: the fastest product measured, not the datasheet's; power: the driver's limit, idle power not "
            "measured."
        )
    parts += [
        f"sustained_clock: {s.dtype} products of {s.side} fell from {s.burst_flops / 1e12:.4g} to "
        f"{s.sustained_flops / 1e12:.4g} TFLOP/s in {s.seconds:.3g} s."
        for s in found.sustained
    ]
    parts += _forms(found)
    if found.missed:
        parts.append(
            "Not measured for want of time: " + ", ".join(f"{n} {kind}" for kind, n in found.missed.items()) + "."
        )
    parts += [f"Refused: {variant} ({reason})." for variant, reason in found.refused.items()]
    if tables.earlier is not None and any(tables.kept.values()):
        before = tables.earlier.provenance
        parts.append(f"{sum(tables.kept.values())} rows are kept of {before.date} ({before.software}).")
    software = ", ".join(f"{key} {value}" for key, value in found.software.items() if value)
    return replace(
        measured(probe, " ".join(parts), software=software),
        source=_source(probe, found),
        clock=clock_line(found.before, found.after),
    )


def _forms(found: DeviceProbe) -> list[str]:
    """How the backward pass's products and batched ones compare with what the tables say of their shapes."""
    plain = {(s.dtype, s.m, s.n, s.k): s.time.seconds for s in found.gemm if s.batch == 1 and s.form == "forward"}
    said = []
    for form in ("dgrad", "wgrad"):
        ratios = [
            s.time.seconds / plain[s.dtype, s.m, s.n, s.k]
            for s in found.gemm
            if s.form == form and (s.dtype, s.m, s.n, s.k) in plain
        ]
        if ratios:
            said.append(f"{form}: {statistics.median(ratios):.3g} of the forward product's time (n = {len(ratios)}).")
    return said


def _table(provenance: Provenance, tables: ProbedTables, file: str, rows: int) -> TableRef:
    how = "Medians of repeats after a warm-up, outliers rejected"
    kept = f"; {tables.kept[file]} rows are of an earlier profile." if tables.kept[file] else "."
    return TableRef(file=file, provenance=replace(provenance, rows=rows, notes=how + kept))


def fitted(probe: Probe, what: str) -> Provenance:
    """The provenance of a figure that was fitted to what was measured."""
    return replace(measured(probe, what), method="fitted")


def measured(probe: Probe, what: str, rows: int = 0, software: str = "") -> Provenance:
    """The provenance of a figure that was measured on this host."""
    torch = probe.devices[0].software["torch"]
    return Provenance(
        method="measured",
        source=f"clustersim profile on {probe.cpu}, {probe.cores} cores",
        software=software or f"torch {torch}",
        licence="own measurement",
        date=probe.date,
        rows=rows,
        notes=what + (" Quick: coarse tables." if probe.quick else ""),
    )


def most_ranks(probe: Probe) -> int:
    return max(s.ranks for s in probe.shared)
