"""What every rank of a run is told, and where each of them stands in it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from clustersim.hardware.kernel import BYTES_OF
from clustersim.layout.layout import Layout, ParameterServer
from clustersim.program.lower import peers_in_node
from clustersim.program.program import Program
from clustersim.workload.training import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A run: what to train, how it is divided, how many steps, and on which kind of device.

    `steps` are measured, after `warmup` that are not. With `share_devices` several ranks may use one GPU. `weights`:
    where rank 0 writes the trained weights (npz), or nowhere. `timeout_s`: how long a rank waits for a message.
    `devices_per_node`: of the plan's nodes, whose ranks may sum gradients among themselves first.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    workload: Workload
    layout: Layout
    program: Program
    program_digest: str
    devices_per_node: int
    device_kind: Literal["gpu", "cpu"]
    steps: int
    warmup: int
    seed: int
    timeout_s: float
    share_devices: bool
    weights: str | None

    @property
    def workers(self) -> int:
        """Ranks that compute; they come first."""
        return self.layout.mesh.workers

    @property
    def processes(self) -> int:
        """Worker ranks and dedicated servers."""
        return self.workers + sum(share.host == "server" for share in self.program.servers)

    @property
    def peers(self) -> int:
        """Ranks of a node that first sum their gradients among themselves; each then pushes its part of the sum."""
        if not isinstance(self.layout.scheme, ParameterServer) or not self.layout.sync[0].reduce_in_node:
            return 1
        return peers_in_node(self.layout, self.devices_per_node)

    def pushers(self, part: int) -> range:
        """The worker ranks that push part `part` of every bucket, one per node."""
        return range(part, self.workers, self.peers)


def part_elements(task: Task, elements: int) -> int:
    """Size of the part of a bucket that one of a node's ranks pushes; the last part may be smaller."""
    return -(-elements // task.peers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A contiguous piece of part `part` of a bucket that one server updates in one go: `start` to `stop` are elements
    of the bucket, `first` is where the part starts."""

    bucket: int
    part: int
    first: int
    number: int
    start: int
    stop: int


def server_rank(task: Task, server: int) -> int:
    """The process that runs a server: a dedicated one stands behind the workers, a co-located one with its worker."""
    share = task.program.servers[server]
    return task.workers + share.node if share.host == "server" else share.node


def server_slices(task: Task, server: int) -> tuple[tuple[Slice, ...], ...]:
    """Per bucket, the slices that a server holds: its share of each part of the bucket, cut into partitions.

    All boundaries are quotients of integers, so that every process finds the same. Empty slices are left out.
    """
    scheme = task.layout.scheme
    assert isinstance(scheme, ParameterServer)
    parts = [share.parts for share in task.program.servers]
    before, mine, total = sum(parts[:server]), parts[server], task.program.share_parts
    result = []
    for bucket in task.program.buckets:
        size = bucket.elements * BYTES_OF[task.layout.precision.gradient] // task.peers
        count = max(1, -(-size // int(scheme.partition_bytes)))
        whole = part_elements(task, bucket.elements)
        slices = []
        for part in range(task.peers):
            first = min(bucket.elements, part * whole)
            held = min(bucket.elements, first + whole) - first
            low, high = first + held * before // total, first + held * (before + mine) // total
            cuts = [low + (high - low) * cut // count for cut in range(count + 1)]
            slices += [
                Slice(bucket=bucket.index, part=part, first=first, number=part * count + number, start=start, stop=stop)
                for number, (start, stop) in enumerate(pairwise(cuts))
                if stop > start
            ]
        result.append(tuple(slices))
    return tuple(result)
