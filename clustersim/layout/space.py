"""The space of layouts: every legal way to divide the work, with every legal way to synchronise, as arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster
from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import BYTES_OF, Dtype, GradientDtype
from clustersim.layout.auto import auto_algorithms
from clustersim.layout.choices import Choices
from clustersim.layout.divisions import ORDERS, RECOMPUTES, SCHEDULES, Divisions, every_division, local_peers
from clustersim.layout.layout import (
    AllReduce,
    Family,
    Layout,
    Mesh,
    Pipeline,
    Precision,
    Scheme,
    Sharded,
    SyncRule,
    family,
)
from clustersim.layout.schemes import BUCKET_BYTES, every_scheme
from clustersim.workload.training import Workload

Ints = NDArray[np.int64]

FAMILIES: tuple[Family, ...] = ("allreduce", "sharded", "parameter-server")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Space:
    """Every legal layout: row r divides the work as `divisions` row `division[r]` and synchronises by
    `schemes[scheme[r]]`."""

    divisions: Divisions
    schemes: tuple[Scheme, ...]
    division: Ints
    scheme: Ints
    precision: Precision
    splits: tuple[tuple[int, ...], ...]
    layers: int
    reduce_in_node: bool

    def __len__(self) -> int:
        return len(self.division)

    def layout(self, row: int) -> Layout:
        """Row `row` as a Layout."""
        d, i = self.divisions, int(self.division[row])
        pp, virtual = int(d.pp[i]), int(d.virtual_stages[i])
        return Layout(
            mesh=Mesh(dp=int(d.dp[i]), tp=int(d.tp[i]), pp=pp, cp=int(d.cp[i]), ep=int(d.ep[i])),
            micro_batch=int(d.micro_batch[i]),
            sequence_parallel=bool(d.sequence_parallel[i]),
            pipeline=Pipeline(
                schedule=SCHEDULES[int(d.schedule[i])],
                virtual_stages=virtual,
                boundaries=self.splits[int(d.split[i])],
            ),
            recompute=RECOMPUTES[int(d.recompute[i])],
            precision=self.precision,
            order=ORDERS[int(d.order[i])],
            sync=(SyncRule(reduce_in_node=self.reduce_in_node, scheme=self.schemes[int(self.scheme[row])]),),
        )

    def row_of(self, layout: Layout) -> int | None:
        """The row of a layout, or None where the space does not hold it. O(rows)."""
        d, mesh = self.divisions, layout.mesh
        same = (
            (d.dp == mesh.dp)
            & (d.tp == mesh.tp)
            & (d.pp == mesh.pp)
            & (d.cp == mesh.cp)
            & (d.ep == mesh.ep)
            & (d.micro_batch == layout.micro_batch)
            & (d.virtual_stages == layout.pipeline.virtual_stages)
            & (d.sequence_parallel == layout.sequence_parallel)
            & (d.recompute == RECOMPUTES.index(layout.recompute))
            & (d.schedule == SCHEDULES.index(layout.pipeline.schedule))
        )
        schemes = [index for index, scheme in enumerate(self.schemes) if scheme == layout.scheme]
        for row in np.flatnonzero(same[self.division] & np.isin(self.scheme, schemes)):
            if self.layout(int(row)) == layout:
                return int(row)
        return None

    def subset(self, rows: Ints) -> Space:
        """The space of these rows alone."""
        return replace(self, division=self.division[rows], scheme=self.scheme[rows])

    def family_of(self) -> NDArray[np.int64]:
        """The family of each row, as an index into FAMILIES."""
        return np.array([FAMILIES.index(family(scheme)) for scheme in self.schemes], np.int64)[self.scheme]

    def distinct(self, rows: Ints) -> int:
        """How many of `rows` differ in (dp, tp, pp, cp, ep, micro-batch, recompute, schedule, boundaries, family)."""
        if not len(rows):
            return 0
        d = self.divisions
        i = self.division[rows]
        columns = (d.dp, d.tp, d.pp, d.cp, d.ep, d.micro_batch, d.recompute, d.schedule, d.split)
        keys = np.stack([*(column[i] for column in columns), self.family_of()[rows]])
        return int(np.unique(keys, axis=1).shape[1])


def layouts(workload: Workload, cluster: Cluster, framework: Framework, choices: Choices) -> Space:
    """Every legal layout of `workload` on all devices of `cluster`.

    Legal: dp * cp * tp * pp = devices; ep divides dp * cp and the experts, with sequence parallelism where tp > 1, as
    Megatron-LM asks, and without parameter servers; cp divides sequences into even pieces; tp divides heads and
    feed-forward columns and spans at most two nodes; dp times the micro-batch divides the global batch; a stage has at
    least one layer; interleaving has micro-batches in multiples of pp and layers in multiples of pp * virtual stages;
    ZeRO stages 2 and 3 run without a pipeline (they would reduce, and gather, for every micro-batch of every stage).
    GPipe takes as long as 1F1B and more memory, so that it is only considered on request. Layers are split evenly, or
    such that the slowest stage has less to do, where the embedding and the head allow it. O(divisions * schemes).
    """
    divisions, boundaries = every_division(workload, cluster, framework, choices)
    schemes = tuple(every_scheme(cluster, choices))
    count = len(divisions)
    replicas, pp = divisions.replicas, divisions.pp
    legal = np.zeros((count, len(schemes)), np.bool_)
    local = local_peers(divisions, cluster.devices_per_node)
    precision = precision_of(workload.training.precision, framework, choices.gradient)
    automatic = np.empty(0, np.str_)
    if choices.algorithm == "auto":
        groups = {"replicas": replicas, "local": local, "tp": divisions.tp, "pp": pp, "ep": divisions.ep}
        bucket, width = choices.bucket_bytes or BUCKET_BYTES, BYTES_OF[precision.gradient]
        automatic = np.array(auto_algorithms(workload.model, cluster, groups, bucket, width), np.str_)
    for column, scheme in enumerate(schemes):
        if isinstance(scheme, AllReduce):
            ok = (replicas > 1) | (scheme.algorithm == "ring")
            if choices.algorithm == "auto":
                ok = automatic == scheme.algorithm
            elif scheme.algorithm == "hierarchical" and choices.algorithm is None:
                # With one rank a node, or one node, it is the ring.
                ok = (local > 1) & (replicas > local)
            elif scheme.algorithm == "nvls":
                inside = [machine.node.interconnect for machine in cluster.workers]
                ok = (local > 1) & all(wires is not None and wires.reduces for wires in inside)
            elif scheme.algorithm == "sharp":
                ok = (replicas > local) & cluster.fabric.in_network_reduction
        elif isinstance(scheme, Sharded):
            ok = (replicas > 1) & ((pp == 1) | (scheme.stage == 1))
        else:
            spread = scheme.colocated
            ok = (replicas > 1) & ((spread == 0) | (np.full(count, cluster.devices) % max(1, spread) == 0))
            # A server counts on as many pushes of every parameter; experts have fewer holders than the rest.
            ok &= divisions.ep == 1
        legal[:, column] = ok
    division, scheme_index = np.nonzero(legal)
    return Space(
        divisions=divisions,
        schemes=schemes,
        division=division,
        scheme=scheme_index,
        precision=precision,
        splits=boundaries,
        layers=workload.model.layers,
        # Ranks of one host have no network to spare: summing first would only copy once more.
        reduce_in_node=cluster.workers[0].nic.kind != "loopback",
    )


def precision_of(compute: Dtype, framework: Framework, gradient: GradientDtype | None = None) -> Precision:
    """Types of a training in `compute`: gradients in the type that is asked for, else in the framework's, or in that of
    wider compute."""
    if compute in ("fp32", "tf32", "fp64"):
        wide: GradientDtype = "fp64" if compute == "fp64" else "fp32"
        return Precision(compute=compute, gradient=gradient or wide, optimizer=wide)
    return Precision(compute=compute, gradient=gradient or framework.gradient_dtype, optimizer="fp32")
