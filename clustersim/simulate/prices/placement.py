"""A program placed on a cluster: its ranks in classes of equals, their machines, and the wires between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.cluster.wiring import Traffic, Wiring
from clustersim.hardware.framework import Framework
from clustersim.program.program import Collective, Program
from clustersim.simulate.collectives.phases import phases
from clustersim.simulate.fold import Folding, fold, rank_grid, replica_groups
from clustersim.simulate.reading import open_storage, read_of

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """What every price is asked about: a program, the framework that runs it, and the ranks of a folded cluster.

    `machines` are those of the first rank of each class.
    """

    program: Program
    cluster: Cluster
    framework: Framework
    wiring: Wiring
    folding: Folding
    machines: tuple[Machine, ...]

    def coordinates(self, ranks: Ints) -> tuple[Ints, Ints, Ints]:
        """Stage, replica and tensor-parallel place of each rank."""
        mesh = self.program.mesh
        tp, rest = ranks % mesh.tp, ranks // mesh.tp
        if self.program.order == "tp-dp-pp":
            return rest // mesh.replicas, rest % mesh.replicas, tp
        return rest % mesh.pp, rest // mesh.pp, tp

    def machine_of_rank(self, rank: int) -> Machine:
        return self.cluster.machine_of(rank // self.wiring.devices_per_node)

    def sharing_slowdown(self, of: int) -> float:
        """How much slower a rank computes because others of its node use the same cores (CPU nodes only).

        Where all processes share one host, the engine shares out its cores among those that are busy: what is left here
        is contention (caches, memory, switching between processes), and the threads that each of them has.
        """
        host = self.machines[of].node.host
        table = host.rank_slowdown
        if not table:
            return 1.0
        together = min(self.wiring.devices_per_node, self.program.mesh.workers)
        if self.wiring.shared_host:
            together = min(len(table), max(self.program.mesh.workers, min(self.processes, host.cores)))
            return table[together - 1] / max(1.0, together / host.cores)
        return table[min(together, len(table)) - 1]

    @property
    def processes(self) -> int:
        """Worker ranks, and servers that run as processes of their own."""
        return self.program.mesh.workers + sum(share.host == "server" for share in self.program.servers)

    @property
    def shared_cores(self) -> int:
        """Cores of the one host that all processes share; 0 where they do not."""
        return self.machines[0].node.host.cores if self.wiring.shared_host else 0


def place(program: Program, cluster: Cluster, framework: Framework, *, every_rank: bool) -> Placement:
    """`program` on the ranks of `cluster`, equal ones folded into classes unless `every_rank`."""
    wiring = Wiring(cluster)
    folding = fold(
        program.mesh, program.order, cluster, wiring, program.servers, _uneven(program, wiring), every_rank=every_rank
    )
    read = read_of(program)
    if read is not None:
        open_storage(read, cluster, wiring, folding.grid[0].ravel())
    return Placement(
        program=program,
        cluster=cluster,
        framework=framework,
        wiring=wiring,
        folding=folding,
        machines=tuple(cluster.machine_of(int(wiring.node_of(ranks[:1])[0])) for ranks in folding.members),
    )


def _uneven(program: Program, wiring: Wiring) -> Iterator[Traffic]:
    """The traffic of data-parallel collectives, whose ranks may have unequal parts, where sends between stages or
    collectives of another kind meet it on the way; one phase after the other, since each holds all of its flows."""
    ops = [op for position in program.positions for op in position.ops if isinstance(op, Collective)]
    found = sorted({(op.group, op.kind, op.algorithm) for op in ops if op.group in ("dp", "expert-dp")})
    if program.mesh.pp == 1 and len(found) < 2:
        return
    grid = rank_grid(program.mesh, program.order)
    for group, kind, algorithm in found:
        for stage in grid:
            groups = stage.T
            if group == "expert-dp":
                sharing = replica_groups(program.mesh, "expert-dp")
                groups = groups[:, sharing].reshape(-1, sharing.shape[1])
            for phase in phases(wiring, groups, kind, algorithm):
                yield phase.traffic
