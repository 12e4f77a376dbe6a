"""A Probe as profiles: device, link, node and framework files that predictions for this host read. No torch here."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clustersim import files
from clustersim.cluster.node import Host, Interconnect, Nics, Node
from clustersim.errors import ExecutionError, InputError
from clustersim.execute.probe_samples import DeviceProbe, LayerSample, Probe
from clustersim.execute.profile_device import NARROW, fitted, measured, most_ranks, probed_device
from clustersim.hardware.cost import DeviceCosts
from clustersim.hardware.curve import fit_segments
from clustersim.hardware.device import Device, TableRef
from clustersim.hardware.framework import Framework, HostCost
from clustersim.hardware.kernel import Kernels
from clustersim.hardware.link import Link
from clustersim.hardware.load import load_framework
from clustersim.workload.block import Block
from clustersim.workload.head import Head
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
# A GPU that takes so many times what the host does to drive it never waits for it.
_BUSY = 1.3


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


def write_profiles(
    probe: Probe,
    name: str,
    folder: Path | None = None,
    *,
    fresh: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Written:
    """Write `probe` as the profiles `name` below `folder` (the user's own profiles).

    `devices/<name>` is one rank's share of the CPU; `nodes/<name>` this host with as many such devices as ranks were
    probed at once, sharing its cores; `links/<name>-loopback` its messages; `frameworks/clustersim-<name>` clustersim's
    executor with the host costs measured here; `devices/<name>-gpu` the first GPU, `nodes/<name>-gpu` the host with it.

    Kernel tables of the same machine that are there already are extended, point by point; `fresh` replaces them, and
    so does a machine or a format that is another: `tell` hears of that.
    Everything is put together in a folder of its own first: a profile is never half of one probe and half of another.
    ExecutionError where the probe lacks what a profile needs.
    """
    root = folder if folder is not None else files.user_folder() / "hwprofiles"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{root}: cannot be written: {error.strerror}") from None
    with tempfile.TemporaryDirectory(prefix=".profile-", dir=root) as stage:
        found = _staged(probe, name, Path(stage), None if fresh else root, tell)
        final = tuple(root / path.relative_to(stage) for path in found.files)
        for source, target in zip(found.files, final, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
    return replace(found, files=final)


def _staged(probe: Probe, name: str, root: Path, before: Path | None, tell: Callable[[str], None]) -> Written:
    """All files below `root`; `before` is where earlier ones are."""
    written: list[Path] = []
    cpu = probe.devices[0]
    device = _write_device(probe, cpu, name, root, before, written, tell)
    gpus = [d for d in probe.devices if d.kind == "gpu"]
    gpu = f"{name}-gpu" if gpus else None
    costs = DeviceCosts(device, root / "devices" / name)
    base, sample = "clustersim", cpu
    if gpus and gpu is not None:
        sample = gpus[0]
        costs = DeviceCosts(_write_device(probe, sample, gpu, root, before, written, tell), root / "devices" / gpu)
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


def _write_device(
    probe: Probe,
    found: DeviceProbe,
    name: str,
    root: Path,
    before: Path | None,
    written: list[Path],
    tell: Callable[[str], None],
) -> Device:
    device, tables = probed_device(probe, found, name, None if before is None else before / "devices" / name, tell)
    for file, text in tables.texts.items():
        _save_text(text, root / "devices" / name / file, written)
    _save(device, root / "devices" / name / "device.yaml", written)
    return device


def _save(value: object, path: Path, written: list[Path]) -> None:
    files.save(value, path)
    written.append(path)


def _save_text(text: str, path: Path, written: list[Path]) -> None:
    files.write_text(path, text)
    written.append(path)


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
        provenance=measured(
            probe,
            "Two processes send each other a message at once, gloo on loopback. Bytes count both ways; rate: the best "
            "seen.",
            len(points),
        ),
    )


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
        devices=most_ranks(probe),
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
                provenance=measured(probe, "gloo on loopback, the slowest rank's median.", len(rows)),
            ),
        ),
        provenance=measured(
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
    # The same holds for one rank alone, against several with no more threads each.
    alone = min(s.layer.seconds for s in (probe.alone, *probe.shared) if s.threads <= probe.alone.threads)
    times = {s.ranks: s.layer.seconds / alone for s in probe.shared}
    least = [min(times[other] for other in known if other >= ranks) for ranks in known]
    return tuple(float(np.interp(count, known, least)) for count in range(1, known[-1] + 1))


# ------------------------------------------------------------------------------------------------------ framework


def _framework(probe: Probe, base: Framework, found: DeviceProbe, costs: DeviceCosts, name: str) -> Framework:
    """clustersim's executor with this host's costs, and the factor between a layer and the sum of its kernels.

    The narrow models cost the host only: the difference of two depths is a layer, what is left is the micro-batch.
    """
    # Attention runs as PyTorch picks it, here as when the tables were measured: no ratio between generations applies.
    base = replace(base, attention="flash")
    narrow = sorted((s for s in found.layers if s.hidden <= NARROW), key=lambda s: s.layers)
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
    wide = [s for s in found.layers if s.hidden > NARROW]
    if beside is None:
        # Where the device waits for the host, a model says nothing of kernels.
        busy = [s for s in wide if _passes_s(s) > _BUSY * _driven_s(s, host)]
        wide = busy or [max(wide, key=lambda s: _passes_s(s) / _driven_s(s, host))]
    ratios = [_kernel_ratio(s, base, costs, beside) for s in wide]
    return replace(
        base,
        name=name,
        host=host,
        compute_scale=statistics.median(ratios),
        memory_overhead_bytes=0.0 if found.kind == "cpu" else base.memory_overhead_bytes,
        device_memory=(
            replace(base.device_memory, communicator_bytes=0.0) if found.kind == "cpu" else base.device_memory
        ),
        calibrated={
            "host": measured(probe, "Forward and backward passes of narrow models of two depths."),
            "compute_scale": fitted(
                probe,
                f"Measured passes of {len(ratios)} small models over the sum of their kernels' prices: "
                + ", ".join(f"{ratio:.3g}" for ratio in sorted(ratios)),
            ),
        },
        provenance=measured(probe, f"The profile {base.name} with figures of this host."),
    )


def _kernel_ratio(sample: LayerSample, framework: Framework, costs: DeviceCosts, host: HostCost | None) -> float:
    """Measured forward and backward time, less what the host takes besides, over the price of all kernels."""
    model = Model(
        name="probe", layers=sample.layers, hidden=sample.hidden, heads=sample.heads, kv_heads=sample.heads,
        head_dim=sample.hidden // sample.heads, ffn_hidden=4 * sample.hidden, vocab=256, positions=sample.sequence,
        dropout=False,
    )  # fmt: skip
    block = Block(
        model=model, sequence=sample.sequence, micro_batch=sample.tokens // sample.sequence, tp=1,
        sequence_parallel=False, cp=1, ep=1, load=1.0, dtype=sample.dtype, attention_kind=framework.attention,
        fused=framework.fused_elementwise,
    )  # fmt: skip
    head = Head.plain(block, in_place=False, in_steps=False)
    layer: Kernels = forward(block) + backward(block)
    ends: Kernels = (
        *embedding_forward(block), *embedding_backward(block), *head_forward(head), *head_backward(head)
    )  # fmt: skip
    price = model.layers * costs.seconds(layer) + costs.seconds(ends)
    seconds = _passes_s(sample)
    if host is not None:
        seconds = max(seconds - _driven_s(sample, host), 0.1 * seconds)
    return seconds / price


def _passes_s(sample: LayerSample) -> float:
    return sample.forward.seconds + sample.backward.seconds


def _driven_s(sample: LayerSample, host: HostCost) -> float:
    """What the host takes to drive both passes."""
    return host.per_micro_batch_s + sample.layers * (host.per_layer_forward_s + host.per_layer_backward_s)
