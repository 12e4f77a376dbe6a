"""A Probe as profiles: device, link, node and framework files that predictions for this host read. No torch here."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clustersim import files
from clustersim.cluster.node import Host, Interconnect, Nics, Node
from clustersim.errors import ExecutionError
from clustersim.execute.probe import AttentionSample, DeviceProbe, LayerSample, Probe
from clustersim.hardware.attention_table import AttentionRows
from clustersim.hardware.cost import DeviceCosts
from clustersim.hardware.curve import fit_segments
from clustersim.hardware.device import Device, DeviceTables, Roofline, TableRef
from clustersim.hardware.framework import Framework, HostCost
from clustersim.hardware.gemm_table import GemmRows
from clustersim.hardware.kernel import Attention, Dtype, Kernels
from clustersim.hardware.link import Link
from clustersim.hardware.load import load_framework
from clustersim.hardware.memory_table import MemoryRows
from clustersim.hardware.provenance import Provenance
from clustersim.workload.layer_kernels import (
    backward,
    embedding_backward,
    embedding_forward,
    forward,
    head_backward,
    head_forward,
)
from clustersim.workload.model import Model

# Pieces of the loopback's curve: small messages, messages in the caches, messages in memory.
_PIECES = 3
# A model this narrow costs the host only.
_NARROW = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The names of the profiles that were written, and their files. `device` and `node` are of the CPU; `gpu` names a
    device and a node, where there is one, and the framework's figures are then of the GPU."""

    device: str
    node: str
    link: str
    framework: str
    gpu: str | None
    files: tuple[Path, ...]


def write_profiles(probe: Probe, name: str, folder: Path | None = None) -> Written:
    """Write `probe` as the profiles `name` below `folder` (the user's own profiles).

    `devices/<name>` is one rank's share of the CPU; `nodes/<name>` this host with as many such devices as ranks were
    probed at once, sharing its cores; `links/<name>-loopback` its messages; `frameworks/clustersim-<name>` clustersim's
    executor with the host costs measured here; `devices/<name>-gpu` the first GPU, `nodes/<name>-gpu` the host with it.
    """
    root = folder if folder is not None else files.user_folder() / "hwprofiles"
    written: list[Path] = []
    cpu = probe.devices[0]
    device = _write_device(probe, cpu, name, root, written)
    gpus = [d for d in probe.devices if d.kind == "gpu"]
    gpu = f"{name}-gpu" if gpus else None
    costs = DeviceCosts(device, root / "devices" / name)
    base, sample = "clustersim", cpu
    if gpus and gpu is not None:
        sample = gpus[0]
        costs = DeviceCosts(_write_device(probe, sample, gpu, root, written), root / "devices" / gpu)
    link = _link(probe, f"{name}-loopback")
    _save(link, root / "links" / f"{link.name}.yaml", written)
    node = _node(probe, device, link, name, root, written)
    _save(node, root / "nodes" / name / "node.yaml", written)
    if gpu is not None:
        host = replace(node.host, rank_slowdown=())
        alone = replace(node, name=gpu, device=gpu, devices=1, interconnect=None, host=host, collectives=())
        _save(alone, root / "nodes" / f"{gpu}.yaml", written)
    framework = _framework(probe, load_framework(base), sample, costs, f"{base}-{name}")
    _save(framework, root / "frameworks" / f"{framework.name}.yaml", written)
    return Written(device=name, node=name, link=link.name, framework=framework.name, gpu=gpu, files=tuple(written))


def _save(value: object, path: Path, written: list[Path]) -> None:
    files.save(value, path)
    written.append(path)


def _save_text(text: str, path: Path, written: list[Path]) -> None:
    files.write_text(path, text)
    written.append(path)


def _measured(probe: Probe, what: str, rows: int = 0, software: str = "") -> Provenance:
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


# ------------------------------------------------------------------------------------------------------- devices


def _write_device(probe: Probe, found: DeviceProbe, name: str, root: Path, written: list[Path]) -> Device:
    folder = root / "devices" / name
    device = _device(probe, found, name)
    tables = {
        "gemm.csv": _gemm_rows(found).text(),
        "attention.csv": _attention_rows(found).text(),
        "memory.csv": _memory_rows(found).text(),
    }
    for file, text in tables.items():
        _save_text(text, folder / file, written)
    _save(device, folder / "device.yaml", written)
    return device


def _device(probe: Probe, found: DeviceProbe, name: str) -> Device:
    """The device with its tables, and a roofline fitted to them for what they lack."""
    software = ", ".join(f"{key} {value}" for key, value in found.software.items() if value)
    gemm = [s for s in found.gemm if s.threads == found.threads]
    peak: dict[Dtype, float] = {}
    for s in gemm:
        peak[s.dtype] = max(peak.get(s.dtype, 0.0), 2.0 * s.m * s.n * s.k / s.time.seconds)
    large = sorted(gemm, key=lambda s: s.m * s.n * s.k)[-max(3, len(gemm) // 4) :]
    efficiency = statistics.median(2.0 * s.m * s.n * s.k / s.time.seconds / peak[s.dtype] for s in large)
    bandwidth = max(s.bytes / s.time.seconds for s in found.memory)
    kept = [s.bytes / s.time.seconds for s in found.memory if s.bytes >= 2**20]
    forward_rates = [_attention_flops(a, False) / a.forward.seconds / peak[a.dtype] for a in found.attention]
    backward_rates = [_attention_flops(a, True) / a.backward.seconds / peak[a.dtype] for a in found.attention]
    threads = f" {found.threads} thread(s)." if found.kind == "cpu" else ""
    roofline = Roofline(
        gemm_efficiency=efficiency,
        attention_efficiency=min(1.0, statistics.median(forward_rates)),
        attention_backward_efficiency=min(1.0, statistics.median(backward_rates)),
        memory_efficiency=min(1.0, statistics.median(kept) / bandwidth),
        kernel_floor_s=found.floor_s,
        provenance=_fitted(probe, "Medians over the larger rows of the tables here."),
    )
    return Device(
        name=name,
        kind=found.kind,
        memory_bytes=float(found.memory_bytes // max(1, _most(probe)) if found.kind == "cpu" else found.memory_bytes),
        memory_bandwidth_bytes_per_s=bandwidth,
        peak=peak,
        power_w=found.power_w,
        idle_power_w=0.0,
        launch_overhead_s=found.launch_s,
        roofline=roofline,
        tables=DeviceTables(
            gemm=(_table(probe, "gemm.csv", len(gemm), software),),
            attention=(_table(probe, "attention.csv", len(found.attention), software),),
            memory=(_table(probe, "memory.csv", len(found.memory), software),),
        ),
        provenance=_measured(
            probe,
            f"{found.name}.{threads} peak: the fastest product measured; memory_bandwidth: the fastest pass, caches "
            "included. memory: an equal share of the host's for each rank. Power was not measured."
            if found.kind == "cpu"
            else f"{found.name}. peak: the fastest product measured, not the datasheet's; power: the driver's limit, "
            "idle power not measured.",
            software=software,
        ),
    )


def _attention_flops(a: AttentionSample, backward: bool) -> int:
    work = Attention(
        batch=1, queries=a.sequence, keys=a.sequence, heads=a.instances, kv_heads=a.instances // a.group,
        head_dim=a.head_dim, causal=True, backward=backward, dtype=a.dtype,
    )  # fmt: skip
    return work.flops


def _table(probe: Probe, file: str, rows: int, software: str) -> TableRef:
    return TableRef(file=file, provenance=_measured(probe, "Medians of repeats after a warm-up.", rows, software))


def _fitted(probe: Probe, what: str) -> Provenance:
    return replace(_measured(probe, what), method="fitted")


def _gemm_rows(found: DeviceProbe) -> GemmRows:
    kept = [s for s in found.gemm if s.threads == found.threads]
    return GemmRows(
        dtype=np.array([s.dtype for s in kept], np.str_),
        m=np.array([s.m for s in kept], np.float64),
        n=np.array([s.n for s in kept], np.float64),
        k=np.array([s.k for s in kept], np.float64),
        seconds=np.array([s.time.seconds for s in kept]),
    )


def _attention_rows(found: DeviceProbe) -> AttentionRows:
    kept = found.attention
    return AttentionRows(
        dtype=np.array([s.dtype for s in kept], np.str_),
        instances=np.array([s.instances for s in kept], np.float64),
        sequence=np.array([s.sequence for s in kept], np.float64),
        group=np.array([s.group for s in kept], np.float64),
        head_dim=np.array([s.head_dim for s in kept], np.float64),
        seconds=np.array([s.forward.seconds for s in kept]),
    )


def _memory_rows(found: DeviceProbe) -> MemoryRows:
    kept = found.memory
    return MemoryRows(
        op=np.array([s.op for s in kept], np.str_),
        traffic_bytes=np.array([s.bytes for s in kept], np.float64),
        seconds=np.array([s.time.seconds for s in kept]),
    )


# ------------------------------------------------------------------------------------------------- link and node


def _link(probe: Probe, name: str) -> Link:
    """The loopback. Both directions share the memory and the cores that copy, so that the curve is of the bytes of
    both; its `rate` is the best that was seen."""
    points = probe.messages
    if len(points) < 2:
        raise ExecutionError("the probe ran no two ranks at once, so there is no link to fit; probe e.g. ranks 1,2,4")
    sizes = [2.0 * s.bytes for s in points]
    seconds = [s.time.seconds for s in points]
    rate = max(size / second for size, second in zip(sizes, seconds, strict=True))
    return Link(
        name=name,
        kind="loopback",
        rate_bytes_per_s=rate,
        segments=fit_segments(sizes, seconds, rate, _PIECES),
        provenance=_measured(
            probe,
            "Two processes send each other a message at once, gloo on loopback. Bytes count both ways; rate: the best "
            "seen.",
            len(points),
        ),
    )


def _most(probe: Probe) -> int:
    return max(s.ranks for s in probe.shared)


def _node(probe: Probe, device: Device, link: Link, name: str, root: Path, written: list[Path]) -> Node:
    folder = root / "nodes" / name
    rows = sorted((s.collective, s.ranks, s.bytes, s.time.seconds * 1e6) for s in probe.collectives)
    text = "collective,ranks,bytes,time_us\n" + "".join(
        f"{kind},{ranks},{size},{float(f'{time:.4g}'):.12g}\n" for kind, ranks, size, time in rows
    )
    _save_text(text, folder / "collectives.csv", written)
    return Node(
        name=name,
        device=device.name,
        devices=_most(probe),
        interconnect=Interconnect(kind="host", link=link.name),
        nic=Nics(count=1, link=link.name),
        host=Host(
            cores=probe.cores,
            sockets=probe.sockets,
            memory_bytes=float(probe.memory_bytes),
            memory_bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s,
            reduce_rate_bytes_per_s=probe.reduce_bytes_per_s,
            rank_slowdown=_slowdown(probe),
        ),
        collectives=(
            TableRef(
                file="collectives.csv",
                provenance=_measured(probe, "gloo on loopback, the slowest rank's median.", len(rows)),
            ),
        ),
        provenance=_measured(
            probe, "Every rank is a device of its own; ranks share the cores, and rank_slowdown says what that costs."
        ),
    )


def _slowdown(probe: Probe) -> tuple[float, ...]:
    """How much slower than alone, with the threads of the kernel tables, each of 1, 2, ... ranks computes (a rank that
    has more threads is faster); numbers of ranks that were not probed lie on the line between their neighbours.

    More ranks never make a rank faster: where fewer took longer, something else disturbed them, and the time of the
    more numerous ones bounds theirs.
    """
    known = sorted(s.ranks for s in probe.shared)
    times = {s.ranks: s.layer.seconds / probe.alone.layer.seconds for s in probe.shared}
    least = [min(times[other] for other in known if other >= ranks) for ranks in known]
    return tuple(float(np.interp(count, known, least)) for count in range(1, known[-1] + 1))


# ------------------------------------------------------------------------------------------------------ framework


def _framework(probe: Probe, base: Framework, found: DeviceProbe, costs: DeviceCosts, name: str) -> Framework:
    """clustersim's executor with this host's costs, and the factor between a layer and the sum of its kernels.

    The narrow models cost the host only: the difference of two depths is a layer, what is left is the micro-batch.
    """
    narrow = sorted((s for s in found.layers if s.hidden <= _NARROW), key=lambda s: s.layers)
    few, many = narrow[0], narrow[-1]
    depth = many.layers - few.layers

    def per_layer(low: float, high: float) -> float:
        return max(0.0, (high - low) / depth)

    forward_s = per_layer(few.forward.seconds, many.forward.seconds)
    backward_s = per_layer(few.backward.seconds, many.backward.seconds)
    rest = few.forward.seconds + few.backward.seconds - few.layers * (forward_s + backward_s)
    host = HostCost(
        per_layer_forward_s=forward_s,
        per_layer_backward_s=backward_s,
        per_micro_batch_s=max(0.0, rest),
        per_step_s=few.update.seconds,
        per_collective_s=statistics.median(s.call_s for s in probe.shared if s.ranks > 1),
    )
    # A CPU's kernels come on top of the host's time, a GPU's hide it.
    beside = host if found.kind == "cpu" else None
    ratios = [_kernel_ratio(s, base, costs, beside) for s in found.layers if s.hidden > _NARROW]
    return replace(
        base,
        name=name,
        host=host,
        compute_scale=statistics.median(ratios),
        memory_overhead_bytes=0.0 if found.kind == "cpu" else base.memory_overhead_bytes,
        calibrated={
            "host": _measured(probe, "Forward and backward passes of narrow models of two depths."),
            "compute_scale": _fitted(
                probe,
                f"Measured passes of {len(ratios)} small models over the sum of their kernels' prices: "
                + ", ".join(f"{ratio:.3g}" for ratio in sorted(ratios)),
            ),
        },
        provenance=_measured(probe, f"The profile {base.name} with figures of this host."),
    )


def _kernel_ratio(sample: LayerSample, framework: Framework, costs: DeviceCosts, host: HostCost | None) -> float:
    """Measured forward and backward time, less what the host takes besides, over the price of all kernels."""
    model = Model(
        name="probe", layers=sample.layers, hidden=sample.hidden, heads=sample.heads, kv_heads=sample.heads,
        head_dim=sample.hidden // sample.heads, ffn_hidden=4 * sample.hidden, vocab=256, positions=sample.sequence,
        dropout=False,
    )  # fmt: skip
    s, b, dtype = sample.sequence, sample.tokens // sample.sequence, sample.dtype
    attention, fused = framework.attention, framework.fused_elementwise
    layer: Kernels = (
        *forward(model, s, b, 1, False, attention, fused, dtype),
        *backward(model, s, b, 1, False, attention, fused, dtype),
    )
    ends: Kernels = (
        *embedding_forward(model, s, b, 1, False, dtype),
        *embedding_backward(model, s, b, 1, False, dtype),
        *head_forward(model, s, b, 1, False, fused, dtype),
        *head_backward(model, s, b, 1, False, fused, dtype),
    )
    price = model.layers * costs.seconds(layer) + costs.seconds(ends)
    seconds = sample.forward.seconds + sample.backward.seconds
    if host is not None:
        driven = host.per_micro_batch_s + sample.layers * (host.per_layer_forward_s + host.per_layer_backward_s)
        seconds = max(seconds - driven, 0.1 * seconds)
    return seconds / price
