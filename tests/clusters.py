"""Builders for tests of laws: clusters whose links have one segment and no losses, programs written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from clustersim.cluster.cluster import Cluster, Fault, Machine
from clustersim.cluster.fabric import Fabric
from clustersim.cluster.node import Host, Interconnect, Nics, Node
from clustersim.hardware.cost import load_device
from clustersim.hardware.framework import Framework, HostCost, Overlap
from clustersim.hardware.link import Link, LinkKind, Segment
from clustersim.hardware.provenance import Provenance
from clustersim.layout.layout import (
    Algorithm,
    AllReduce,
    Bsp,
    Layout,
    Mesh,
    ParameterServer,
    Pipeline,
    Precision,
    RankOrder,
    Schedule,
    Scheme,
    Sharded,
    SyncRule,
    describe,
    even_boundaries,
)
from clustersim.layout.schedule import Turn, stage_of, turns
from clustersim.program.lower import lower
from clustersim.program.program import (
    Bucket,
    Collective,
    CollectiveKind,
    Compute,
    Exchange,
    Group,
    Op,
    Position,
    Program,
    Ref,
    ServerShare,
    Transfer,
    Update,
    Work,
)
from clustersim.scenario.question import Question
from clustersim.search.search import Survey
from clustersim.simulate.simulate import simulate
from clustersim.timeline import OpId, OpKind
from clustersim.validate.scoreboard import spearman
from clustersim.workload.model import Model
from clustersim.workload.training import Training, Workload

BY_HAND = Provenance(method="estimate", source="written by hand for a test")
# Faster than anything that a test looks at.
ENDLESS = 1e30
DEVICE = "a100-sxm-80g"


def wire(rate: float, alpha: float = 0.0, *, launch: float = 0.0, kind: LinkKind = "ethernet") -> Link:
    """A link of one segment: t = launch + alpha + bytes / rate."""
    segments = (Segment(from_bytes=0.0, alpha_s=alpha, efficiency=1.0),)
    return Link(
        name="by-hand", kind=kind, rate_bytes_per_s=rate, launch_s=launch, segments=segments, provenance=BY_HAND
    )


def host_of(*, reduce_rate: float = ENDLESS, bandwidth: float = ENDLESS) -> Host:
    """A host that adds gradients at `reduce_rate` and steps at `bandwidth`."""
    return Host(
        cores=1, memory_bytes=ENDLESS, memory_bandwidth_bytes_per_s=bandwidth, reduce_rate_bytes_per_s=reduce_rate
    )


def workers(
    count: int,
    *,
    devices: int = 1,
    nics: int = 1,
    far: Link | None = None,
    near: Link | None = None,
    pcie: Link | None = None,
    per_switch: int = 1,
    inside: Literal["switch", "pcie"] = "switch",
    host: Host | None = None,
) -> Machine:
    """`count` nodes of `devices` devices behind `nics` NICs `far` (1 byte/s, no alpha), joined by a switch `near`."""
    node = Node(
        name="by-hand",
        device=DEVICE,
        devices=devices,
        interconnect=Interconnect(kind=inside, link="by-hand") if devices > 1 else None,
        pcie="by-hand" if pcie is not None else None,
        devices_per_pcie_switch=per_switch,
        nic=Nics(count=nics, link="by-hand"),
        host=host or host_of(),
        provenance=BY_HAND,
    )
    return Machine(
        node=node,
        count=count,
        device=load_device(DEVICE),
        interconnect=(near or wire(ENDLESS)) if devices > 1 else None,
        nic=far or wire(1.0),
        pcie=pcie,
        collectives=None,
    )


def servers(count: int, *, far: Link | None = None, host: Host | None = None) -> Machine:
    """`count` hosts without devices, with one NIC each."""
    node = Node(name="server", nic=Nics(count=1, link="by-hand"), host=host or host_of(), provenance=BY_HAND)
    return Machine(
        node=node, count=count, device=None, interconnect=None, nic=far or wire(1.0), pcie=None, collectives=None
    )


def cluster_of(
    *machines: Machine,
    hosts: Machine | None = None,
    fabric: Fabric | None = None,
    faults: tuple[Fault, ...] = (),
) -> Cluster:
    """A cluster; its fabric is one switch without latency unless given."""
    return Cluster(
        workers=machines,
        servers=(hosts,) if hosts is not None else (),
        fabric=fabric or Fabric(kind="one-switch", hop_latency_s=0.0),
        faults=faults,
    )


def framework_of(*, pass_s: float = 0.0, backward_s: float | None = None, **changes: Any) -> Framework:
    """A framework without any cost but `pass_s` for each forward and `backward_s` for each backward layer."""
    back = pass_s if backward_s is None else backward_s
    plain = Framework(
        name="by-hand",
        attention="flash",
        fused_elementwise=True,
        gradient_dtype="fp32",
        gradient_accumulation="fused",
        host=HostCost(per_layer_forward_s=pass_s, per_layer_backward_s=back, per_micro_batch_s=0.0, per_step_s=0.0),
        overlap=Overlap(gradient_reduce=True, parameter_gather=True, pipeline_send=True),
        scatter_gather=False,
        memory_overhead_bytes=0.0,
        fragmentation=0.0,
        provenance=BY_HAND,
    )
    return replace(plain, **changes)


def layers(forward: int, backward: int = 0) -> Work:
    """A work of so many layers: its time is what the framework's host takes to drive them, and nothing else."""
    return Work(kernels=(), inner=(), forward_layers=forward, backward_layers=backward)


def program_of(
    mesh: Mesh,
    positions: Sequence[Sequence[Op]],
    *,
    works: tuple[Work, ...] = (),
    order: RankOrder = "tp-dp-pp",
    served: Sequence[Op] = (),
    shares: tuple[ServerShare, ...] = (),
) -> Program:
    """A program of worker op lists, one a stage, and of the servers' op list where there are servers."""
    lists = [Position(role="worker", stage=stage, ops=tuple(ops)) for stage, ops in enumerate(positions)]
    if shares:
        lists.append(Position(role="server", stage=-1, ops=tuple(served)))
    buckets: tuple[Bucket, ...] = ()
    parts = sum(share.parts for share in shares)
    return Program(
        mesh=mesh, order=order, positions=tuple(lists), works=works, buckets=buckets, servers=shares, share_parts=parts
    )


def collective_program(
    mesh: Mesh,
    kind: CollectiveKind,
    algorithm: Algorithm,
    size: int,
    *,
    group: Group = "dp",
    order: RankOrder = "tp-dp-pp",
) -> Program:
    """One collective in every group of the mesh, and nothing else."""
    names: dict[CollectiveKind, OpKind] = {
        "all_reduce": "all-reduce", "reduce_scatter": "reduce-scatter", "all_gather": "all-gather",
        "all_to_all": "all-gather",
    }  # fmt: skip
    op = Collective(
        id=OpId(0, -1, 0, "synchronise", "all", names[kind]), stream="collective", after=(), kind=kind, group=group,
        algorithm=algorithm, bytes=size,
    )  # fmt: skip
    return program_of(mesh, [[op]] * mesh.pp, order=order)


def shares_of(*, dedicated: Sequence[int] = (), colocated: Sequence[tuple[int, int]] = ()) -> tuple[ServerShare, ...]:
    """Servers: the parts of each dedicated host, and (rank, parts) of each co-located server."""
    found = [ServerShare(server=j, host="server", node=j, parts=parts) for j, parts in enumerate(dedicated)]
    for rank, parts in colocated:
        found.append(ServerShare(server=len(found), host="worker", node=rank, parts=parts))
    return tuple(found)


def server_program(
    mesh: Mesh,
    shares: tuple[ServerShare, ...],
    *,
    buckets: int,
    size: int,
    partitions: int = 1,
    pull: Literal["each", "after-all"] = "each",
) -> Program:
    """Every rank pushes `buckets` buckets of `size` bytes and pulls each back, as soon as its own push is summed or
    once all are. A server's time comes from its host's rates: none, where these are endless."""
    pushes, pulls, updates = [], [], []
    server = mesh.pp
    for bucket in range(buckets):
        last = buckets - 1
        pushes.append(
            Exchange(
                id=OpId(0, -1, 0, "synchronise", f"B{bucket}", "push"), stream="push", after=(), direction="push",
                bytes=size, partitions=partitions,
            )
        )  # fmt: skip
        pulls.append(
            Exchange(
                id=OpId(0, -1, 0, "synchronise", f"B{bucket}", "pull"), stream="pull",
                after=((server, bucket if pull == "each" else last),), direction="pull", bytes=size,
                partitions=partitions,
            )
        )  # fmt: skip
        updates.append(
            Update(
                id=OpId(0, -1, -1, "update", f"B{bucket}", "update"), after=((0, bucket),), pushes=mesh.dp,
                bytes=size * mesh.tp, state_bytes=0, partitions=partitions,
            )
        )  # fmt: skip
    return program_of(mesh, [[*pushes, *pulls]], served=updates, shares=shares)


def pipeline_program(
    schedule: Schedule,
    stages: int,
    micro_batches: int,
    virtual_stages: int,
    *,
    size: int = 0,
    passes: tuple[int, int, int] = (1, 1, 1),
    loads: Sequence[int] = (),
) -> Program:
    """A pipeline: a chunk's forward, backward and weight-gradient pass are those of `passes` layers (one each), times
    the `loads` of its stage (equal stages), a send carries `size` bytes."""
    chunks = stages * virtual_stages
    lists: list[list[Op]] = [[] for _ in range(stages)]
    at: dict[Turn, Ref] = {}
    needs: dict[Ref, Turn] = {}
    for stage in range(stages):
        for turn in turns(schedule, stages, stage, micro_batches, virtual_stages):
            me = (stage, len(lists[stage]))
            needs[me] = turn
            work = 3 * stage + ("forward", "backward", "weight-gradient").index(turn.phase)
            op = OpId(0, turn.micro_batch, turn.chunk, turn.phase, "all", "compute")
            lists[stage].append(Compute(id=op, after=(), work=work))
            target = turn.chunk + (1 if turn.phase == "forward" else -1)
            if turn.phase == "weight-gradient" or not 0 <= target < chunks:
                continue
            to = stage_of(schedule, stages, target)
            if to == stage:
                # The chunk that goes on is on the same stage.
                at[turn._replace(chunk=target)] = me
                continue
            at[turn._replace(chunk=target)] = (stage, len(lists[stage]))
            lists[stage].append(
                Transfer(
                    id=op._replace(kind="send"), stream="next" if to > stage else "previous", after=(me,), to=to,
                    bytes=size,
                )
            )  # fmt: skip
    for (stage, index), key in needs.items():
        if key in at:
            op = lists[stage][index]
            assert isinstance(op, Compute)
            lists[stage][index] = replace(op, after=(at[key],))
    works: list[Work] = []
    for load in loads or [1] * stages:
        works += (layers(load * passes[0]), layers(0, load * passes[1]), layers(0, load * passes[2]))
    return program_of(Mesh(dp=1, tp=1, pp=stages), lists, works=tuple(works))


def model_of(*, layer_count: int = 4, **changes: Any) -> Model:
    """A small decoder whose heads and columns divide by 1, 2, 3, 4, 6, 8, 12."""
    plain = Model(
        name="small", layers=layer_count, hidden=384, heads=24, kv_heads=24, head_dim=16, ffn_hidden=1536, vocab=5000,
        positions=256, dropout=False, tied=False,
    )  # fmt: skip
    return replace(plain, **changes)


def workload_of(global_batch: int, *, model: Model | None = None, sequence: int = 128) -> Workload:
    """A training of `global_batch` sequences in bf16 with Adam."""
    return Workload(model=model or model_of(), training=Training(global_batch=global_batch, sequence=sequence))


def layout_of(
    mesh: Mesh,
    scheme: Scheme,
    *,
    layer_count: int = 4,
    micro_batch: int = 1,
    schedule: Schedule = "1f1b",
    virtual_stages: int = 1,
    **changes: Any,
) -> Layout:
    """A layout of equal stages; ranks of a node sum their gradients first under a parameter server."""
    plain = Layout(
        mesh=mesh,
        micro_batch=micro_batch,
        sequence_parallel=False,
        pipeline=Pipeline(
            schedule=schedule,
            virtual_stages=virtual_stages,
            boundaries=even_boundaries(layer_count, mesh.pp * virtual_stages),
        ),
        recompute="none",
        precision=Precision(compute="bf16", gradient="fp32", optimizer="fp32"),
        order="tp-dp-pp",
        sync=(SyncRule(reduce_in_node=True, scheme=scheme),),
    )
    return replace(plain, **changes)


def all_reduce(algorithm: Algorithm = "ring", *, bucket_bytes: float = 1e6) -> AllReduce:
    """Overlapped allreduce."""
    return AllReduce(algorithm=algorithm, bucket_bytes=bucket_bytes, overlap=True)


def sharded(stage: Literal[1, 2, 3], *, bucket_bytes: float = 1e6) -> Sharded:
    """ZeRO stage 1, 2 or 3, overlapped."""
    return Sharded(stage=stage, bucket_bytes=bucket_bytes, overlap=True)


def parameter_server(
    dedicated: int,
    colocated: int,
    *,
    parts: tuple[int, int] = (1, 1),
    optimizer_at: Literal["server", "worker"] = "server",
    bucket_bytes: float = 1e6,
    partition_bytes: float = 4e5,
) -> ParameterServer:
    """A parameter server with so many servers of either kind."""
    return ParameterServer(
        dedicated=dedicated,
        colocated=colocated,
        dedicated_parts=parts[0] if dedicated else 0,
        colocated_parts=parts[1] if colocated else 0,
        consistency=Bsp(),
        bucket_bytes=bucket_bytes,
        partition_bytes=partition_bytes,
        optimizer_at=optimizer_at,
    )


def agreement(name: str, asked: Question, found: Survey, rows: Sequence[int]) -> tuple[float, float]:
    """(Spearman's rank correlation, median |bias|) of the estimates of some layouts against their simulations, printed
    with the worst of them."""
    simulated = []
    for row in rows:
        program = lower(asked.workload, found.space.layout(row), asked.framework, asked.cluster.devices_per_node)
        simulated.append(simulate(program, asked.cluster, asked.framework).makespan_s)
    estimated = found.estimate.step_s[list(rows)]
    bias = estimated / np.array(simulated) - 1.0
    correlation, typical = spearman(estimated, np.array(simulated)), float(np.median(np.abs(bias)))
    worst = int(np.argmax(np.abs(bias)))
    print(
        f"{name}: {len(bias)} layouts, rank correlation {correlation:.4f}, median bias {np.median(bias):+.2%}, "
        f"median |bias| {typical:.2%}, worst {bias[worst]:+.1%} ({describe(found.space.layout(rows[worst]))})"
    )
    return correlation, typical
