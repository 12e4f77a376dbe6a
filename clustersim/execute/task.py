"""What every rank of a run is told, and where each of them stands in it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.hardware.kernel import BYTES_OF
from clustersim.layout.layout import Layout, ParameterServer
from clustersim.program.program import Program
from clustersim.workload.training import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A run: what to train, how it is divided, how many steps, and on which kind of device.

    `steps` are measured, after `warmup` that are not. With `share_devices` several ranks may use one GPU. `weights`: where rank 0 writes the trained weights (npz), or
    nowhere. `timeout_s`: how long a rank waits for a message.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    workload: Workload
    layout: Layout
    program: Program
    program_digest: str
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A contiguous piece of a bucket that one server updates in one go: elements `start` to `stop`."""

    bucket: int
    number: int
    start: int
    stop: int


def server_rank(task: Task, server: int) -> int:
    """The process that runs a server: a dedicated one stands behind the workers, a co-located one with its worker."""
    share = task.program.servers[server]
    return task.workers + share.node if share.host == "server" else share.node


def server_slices(task: Task, server: int) -> tuple[tuple[Slice, ...], ...]:
    """Per bucket, the slices that a server holds: its share of the bucket, cut into the bucket's partitions.

    All boundaries are quotients of integers, so that every process finds the same. Empty slices are left out.
    """
    scheme = task.layout.scheme
    assert isinstance(scheme, ParameterServer)
    parts = [share.parts for share in task.program.servers]
    before, mine, total = sum(parts[:server]), parts[server], task.program.share_parts
    result = []
    for bucket in task.program.buckets:
        low = bucket.elements * before // total
        high = bucket.elements * (before + mine) // total
        size = bucket.elements * BYTES_OF[task.layout.precision.gradient]
        count = max(1, -(-size // int(scheme.partition_bytes)))
        cuts = [low + (high - low) * part // count for part in range(count + 1)]
        result.append(
            tuple(
                Slice(bucket=bucket.index, number=number, start=start, stop=stop)
                for number, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False))
                if stop > start
            )
        )
    return tuple(result)
