"""Rows of image models in images a second: scaling from one GPU to many, over parameter servers or copies.

The compute of a step is measured: the row of one GPU of the same system, model, batch and data. What is predicted is
the synchronisation. Assumed: a third of the compute is the forward pass; gradients leave, layer by layer, during the
backward pass, and parameters arrive, layer by layer, during the forward pass of the next step, so that each half of the
synchronisation costs only by how much it is longer than the pass beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.cluster.load import load_fabric, load_machine
from clustersim.cluster.node import Host, Interconnect
from clustersim.hardware.load import load_framework, load_link
from clustersim.layout.layout import Mesh
from clustersim.program.program import CollectiveKind, Exchange, Position, Program, ServerShare, Update
from clustersim.simulate.simulate import simulate
from clustersim.timeline import OpId
from clustersim.units import human_bytes
from clustersim.validate.collective_answer import Asked, answer, links_spread
from clustersim.validate.point import Point, Points, each_point, source_of
from clustersim.validate.rows import Missing, Row, first_match

COLUMNS = frozenset({
    "id", "system", "gpu", "gpus_total", "nodes", "worker_nodes", "ps_nodes", "ps_placement", "intra_node",
    "inter_node", "model", "model_size_mb", "batch_per_gpu", "data", "variable_update", "local_parameter_device",
    "kvstore", "method", "images_per_s", "source", "repo",
})  # fmt: skip
# Parameters in millions, without auxiliary heads: Krizhevsky 2012; Simonyan and Zisserman 2015; He et al. 2016; Szegedy
# et al. 2016 (counts as Keras and torchvision print them).
_PARAMETERS = {
    r"alexnet": "61.1", r"vgg-?16": "138.4", r"resnet-?50": "25.6", r"resnet-?101": "44.5", r"resnet-?152": "60.2",
    r"inception-?v?3|inception v3": "23.9",
}  # fmt: skip
_FORWARD = 1.0 / 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """A host with GPUs that no node profile has: how its GPUs are wired."""

    kind: Literal["mesh", "pcie"]
    rate_bytes_per_s: float | None
    memory_bandwidth_bytes_per_s: float


# Four NVLink 1 bricks of 20 GB/s and direction a P100, two GPUs a PCIe switch (NVIDIA DGX-1 whitepaper). A K80 is two
# GK210 behind one PCIe 3 x16 switch (NVIDIA K80 board specification); its hosts' share of memory bandwidth is an
# estimate (32 of 72 threads of two sockets of four DDR4-2400 channels).
_BOXES = {
    r"DGX-1.*P100|P100.*DGX-1": _Box(kind="mesh", rate_bytes_per_s=80e9, memory_bandwidth_bytes_per_s=136.5e9),
    r"K80|p2\.\d*xlarge": _Box(kind="pcie", rate_bytes_per_s=None, memory_bandwidth_bytes_per_s=68e9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Halves:
    """Seconds of a synchronisation that can run beside the backward pass, and beside the next forward pass."""

    backward_s: float
    forward_s: float


def is_images(columns: Sequence[str]) -> bool:
    """Whether a file with these columns holds throughputs of image models."""
    return {"images_per_s", "batch_per_gpu", "model", "gpus_total"} <= set(columns)


def image_points(name: str, rows: Sequence[Row]) -> Points:
    """Every row of several GPUs predicted from that of one GPU."""
    alone = {_question(row): row for row in rows if row.text("gpus_total") in ("1", "1.0")}
    return each_point(name, rows, lambda row, label: _point(row, label, alone))


def _question(row: Row) -> tuple[str | None, ...]:
    return tuple(row.text(name) for name in ("system", "model", "batch_per_gpu", "data"))


def _point(row: Row, label: str, alone: Mapping[tuple[str | None, ...], Row]) -> Point:
    gpus, batch = row.required_count("gpus_total"), row.required_count("batch_per_gpu")
    if gpus == 1:
        raise Missing("one GPU synchronises nothing: its row is the compute of rows of more GPUs")
    baseline = alone.get(_question(row))
    if baseline is None:
        raise Missing("no row of one GPU of the same system, model, batch and data: the compute is not known")
    compute_s = batch / _rate(baseline)
    size = _model_bytes(row)
    scheme = _scheme(row)
    halves = _halves(row, scheme, gpus, size)
    backward = max((1.0 - _FORWARD) * compute_s, halves.backward_s)
    predicted = backward + max(_FORWARD * compute_s, halves.forward_s)
    question = " ".join(filter(None, _question(row)))
    return Point(
        id=label, line=row.line, system=row.text("system") or "", scheme=scheme, group=f"{question} {gpus}",
        subject=f"{row.text('model')} {gpus} GPUs x {batch}, {scheme} of {human_bytes(size)}",
        measured=gpus * batch / _rate(row), predicted=predicted, spread=links_spread(False, size), basis="links",
        source=source_of(row),
    )  # fmt: skip


def _rate(row: Row) -> float:
    return row.required_positive("images_per_s")


def _model_bytes(row: Row) -> float:
    stated = row.positive("model_size_mb")
    if stated is not None:
        return stated * 1e6
    model = row.required("model")
    millions = first_match(model, _PARAMETERS)
    if millions is None:
        raise Missing(f"model = {model!r}: state model_size_mb")
    return float(millions) * 4e6


def _scheme(row: Row) -> str:
    """What moves the gradients, as sources write it."""
    text = row.text("variable_update") or row.text("kvstore") or row.required("method")
    found = first_match(text, {
        r"distributed_replicated": "servers on hosts", r"replicated \(NCCL": "allreduce", r"^replicated": "copies",
        r"parameter_server": "server", r"dist_(device_)?sync": "kvstore", r"horovod|allreduce": "allreduce",
    })  # fmt: skip
    if found == "server":
        return "server on a GPU" if (row.text("local_parameter_device") or "cpu") == "gpu" else "server on the host"
    if found == "kvstore":
        placement = row.text("ps_placement")
        if placement is None:
            raise Missing("how many servers there are, and where, is not published; fill ps_placement with --defaults")
        return "server on a GPU" if "GPU" in placement.upper() else "server on the host"
    if found is None:
        raise Missing(f"{text!r}: this way to synchronise is not modelled")
    return found


def _halves(row: Row, scheme: str, gpus: int, size: float) -> _Halves:
    nodes = row.count("worker_nodes") or row.count("nodes") or 1
    if gpus % nodes:
        raise Missing(f"gpus_total = {gpus} does not fill {nodes} nodes")
    words = f"{row.text('system') or ''} {row.text('gpu') or ''}"
    pattern = next((one for one in _BOXES if first_match(words, {one: "yes"})), None)
    if pattern is None:
        raise Missing(f"no host is known for system = {row.text('system')!r} with {row.text('gpu')!r}")
    local = gpus // nodes
    cluster = _cluster(pattern, 1, local)
    match scheme:
        case "server on the host":
            if nodes > 1:
                raise Missing("one host's memory serves one node; write ps_placement co-located for several")
            return _served(cluster, size)
        case "server on a GPU":
            # Every other GPU sends to that one and receives from it: its wire carries them all.
            wire = cluster.workers[0].interconnect
            assert wire is not None
            rate = cluster.workers[0].interconnect_rate_bytes_per_s * wire.segments[-1].efficiency
            return _Halves(backward_s=(local - 1) * size / rate, forward_s=(local - 1) * size / rate)
        case "servers on hosts":
            near = _served(cluster, size) if local > 1 else _Halves(backward_s=0.0, forward_s=0.0)
            far = _served(_cluster(pattern, nodes, 1), size) if nodes > 1 else _Halves(backward_s=0.0, forward_s=0.0)
            return _Halves(backward_s=near.backward_s + far.backward_s, forward_s=near.forward_s + far.forward_s)
        case _:
            kinds: tuple[CollectiveKind, ...] = ("all_reduce",)
            if scheme == "copies":
                kinds = ("reduce_scatter", "all_gather")
            whole = [
                float(answer(Asked(cluster=cluster, kind=kind, ranks=gpus, nodes=1), np.array([size])).seconds[0])
                for kind in kinds
            ]
            # The copies' second half can wait for the next forward pass; an allreduce is over when the step is.
            return _Halves(backward_s=whole[0], forward_s=sum(whole[1:]))


@functools.cache
def _cluster(pattern: str, nodes: int, devices: int) -> Cluster:
    """`nodes` hosts with `devices` GPUs each: the wiring of the box, the PCIe of a DGX-1, 10 Gb/s between hosts."""
    box, plain = _BOXES[pattern], load_machine("dgx-1-v100", nodes)
    host = Host(
        cores=16, sockets=2, memory_bytes=plain.node.host.memory_bytes,
        memory_bandwidth_bytes_per_s=box.memory_bandwidth_bytes_per_s,
        # Three passes over memory for an addition, at three quarters of its bandwidth: as in the node profiles.
        reduce_rate_bytes_per_s=box.memory_bandwidth_bytes_per_s / 4.0,
    )  # fmt: skip
    link = "nvlink2" if box.kind == "mesh" else "pcie3-x16"
    inside = Interconnect(kind=box.kind, link=link, rate_bytes_per_s=box.rate_bytes_per_s)
    node = replace(
        plain.node, devices=devices, host=host, interconnect=inside if devices > 1 else None,
        nic=replace(plain.node.nic, count=1, link="tcp-aws-10"),
    )  # fmt: skip
    machine = Machine(
        node=node, count=nodes, device=plain.device, interconnect=load_link(link) if devices > 1 else None,
        nic=load_link("tcp-aws-10"), pcie=plain.pcie, collectives=None,
    )  # fmt: skip
    return Cluster(workers=(machine,), servers=(), fabric=load_fabric("one-switch"))


def _served(cluster: Cluster, size: float) -> _Halves:
    """Push and update, and pull, of a buffer with a server beside the first rank of every node, simulated."""
    ranks = cluster.devices
    both, first = (_program(cluster, ranks, round(size), pull) for pull in (True, False))
    framework = load_framework("clustersim")
    pushed = simulate(first, cluster, framework).makespan_s
    return _Halves(backward_s=pushed, forward_s=simulate(both, cluster, framework).makespan_s - pushed)


def _program(cluster: Cluster, ranks: int, size: int, pull: bool) -> Program:
    nodes = cluster.worker_nodes
    shares = tuple(
        ServerShare(server=at, host="worker", node=at * cluster.devices_per_node, parts=1) for at in range(nodes)
    )
    push = Exchange(
        id=OpId(0, -1, 0, "synchronise", "B0", "push"), stream="push", after=(), direction="push", bytes=size,
        partitions=1,
    )  # fmt: skip
    back = Exchange(
        id=OpId(0, -1, 0, "synchronise", "B0", "pull"), stream="pull", after=((1, 0),), direction="pull", bytes=size,
        partitions=1,
    )  # fmt: skip
    # Plain SGD: the server reads the parameters and writes them.
    update = Update(
        id=OpId(0, -1, -1, "update", "B0", "update"), after=((0, 0),), pushes=ranks, bytes=size, state_bytes=2 * size,
        partitions=1,
    )  # fmt: skip
    return Program(
        mesh=Mesh(dp=ranks, tp=1, pp=1), order="tp-dp-pp", works=(), buckets=(), servers=shares, share_parts=nodes,
        positions=(
            Position(role="worker", stage=0, ops=(push, back) if pull else (push,)),
            Position(role="server", stage=-1, ops=(update,)),
        ),
    )  # fmt: skip
