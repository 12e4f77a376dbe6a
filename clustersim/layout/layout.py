"""A layout: every choice of how one training step is divided over ranks, with nothing left to decide."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, assert_never

from clustersim.hardware.framework import Schedule as Schedule
from clustersim.hardware.kernel import Dtype, GradientDtype
from clustersim.layout.schedule import splits_backward, stage_of
from clustersim.layout.split import even_boundaries as even_boundaries
from clustersim.units import FILE, Bytes

Recompute = Literal["none", "selective", "full"]
# Of an allreduce. "tree" is NCCL's double binary tree; switches in nodes add up for "nvls", those between for "sharp".
Algorithm = Literal["ring", "tree", "binary-tree", "hierarchical", "halving-doubling", "nvls", "sharp"]
Family = Literal["allreduce", "sharded", "parameter-server"]
RankOrder = Literal["tp-dp-pp", "tp-pp-dp"]
ServerPlacement = Literal["dedicated", "colocated", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Degrees of parallelism; dp * cp * tp * pp worker ranks. Dedicated servers are processes besides.

    `cp` ranks share every sequence (context parallelism); each has all weights of its stage, so that gradients are
    summed over dp * cp `replicas`. `ep` ranks of those share the experts; ep divides dp * cp and multiplies nothing.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    dp: int
    tp: int
    pp: int
    cp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "cp", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.replicas % self.ep != 0:
            raise ValueError(f"ep = {self.ep} must divide dp * cp = {self.replicas}")

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights (the same dense ones, where ep > 1): dp * cp."""
        return self.dp * self.cp

    @property
    def workers(self) -> int:
        """Worker ranks: dp * cp * tp * pp."""
        return self.replicas * self.tp * self.pp

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts: dp * cp / ep."""
        return self.replicas // self.ep


def node_peers(mesh: Mesh, order: RankOrder, devices_per_node: int) -> int:
    """Data-parallel peers that share a node, as many in every node (1: none).

    The peers of a group whose numbers follow each other stand side by side; the number that divides both the group and
    a node's share of it never straddles two nodes, wherever a group starts.
    """
    inner = mesh.tp if order == "tp-dp-pp" else mesh.tp * mesh.pp
    if devices_per_node % inner != 0:
        return 1
    return math.gcd(mesh.replicas, devices_per_node // inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """`boundaries[c]` is the first layer of chunk c, of pp * virtual_stages chunks; `stage_of` says where each runs."""

    __pydantic_config__: ClassVar[Any] = FILE
    schedule: Schedule
    virtual_stages: int
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.boundaries or self.boundaries[0] != 0 or list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError("boundaries must start at layer 0 and grow")
        if (self.schedule == "zb-v") and self.virtual_stages != 2:
            raise ValueError("schedule: zb-v has virtual_stages: 2")
        if (self.virtual_stages > 1) != (self.schedule in ("interleaved", "zb-v")):
            raise ValueError("virtual_stages > 1 go together with schedule: interleaved or zb-v")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Types of the computation, of the gradients that are sent, and of the optimizer's state."""

    __pydantic_config__: ClassVar[Any] = FILE
    compute: Dtype
    gradient: GradientDtype
    optimizer: Dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduce:
    """Every rank keeps everything; gradients are summed by an allreduce per bucket."""

    __pydantic_config__: ClassVar[Any] = FILE
    kind: Literal["allreduce"] = "allreduce"
    algorithm: Algorithm
    bucket_bytes: Bytes
    overlap: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    """ZeRO / FSDP over the data-parallel group: stage 1 shards optimizer state, 2 gradients too, 3 weights too."""

    __pydantic_config__: ClassVar[Any] = FILE
    kind: Literal["sharded"] = "sharded"
    stage: Literal[1, 2, 3]
    bucket_bytes: Bytes
    overlap: bool

    @property
    def shards_gradients(self) -> bool:
        """No rank keeps all sums, so that gradients are reduced after every micro-batch, not only after the last."""
        return self.stage >= 2

    @property
    def shards_weights(self) -> bool:
        """No rank keeps all weights, so that they are gathered before every pass."""
        return self.stage == 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Bsp:
    """Bulk-synchronous: the next step waits for every worker's update."""

    __pydantic_config__: ClassVar[Any] = FILE
    kind: Literal["bsp"] = "bsp"


Consistency = Bsp


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterServer:
    """Workers push gradients to servers and pull weights (or summed gradients) back, each bucket in partitions.

    `dedicated` server hosts and `colocated` servers (spread evenly over the worker ranks' nodes) hold `dedicated_parts`
    and `colocated_parts` parts each of every bucket; both kinds together is the mixed mode of BytePS (Jiang et al.,
    OSDI'20), whose shares equalise the NICs. The optimizer steps on the server, which returns weights, or on the
    worker, to which the server returns summed gradients.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    kind: Literal["parameter-server"] = "parameter-server"
    dedicated: int
    colocated: int
    dedicated_parts: int
    colocated_parts: int
    consistency: Consistency
    bucket_bytes: Bytes
    partition_bytes: Bytes
    optimizer_at: Literal["server", "worker"]

    def __post_init__(self) -> None:
        if self.dedicated + self.colocated < 1:
            raise ValueError("a parameter server needs dedicated + colocated >= 1 servers")
        if (self.dedicated == 0) != (self.dedicated_parts == 0):
            raise ValueError("dedicated servers hold dedicated_parts >= 1 each, and none hold 0")
        if (self.colocated == 0) != (self.colocated_parts == 0):
            raise ValueError("colocated servers hold colocated_parts >= 1 each, and none hold 0")

    @property
    def placement(self) -> ServerPlacement:
        """Where the servers run."""
        if self.colocated == 0:
            return "dedicated"
        return "mixed" if self.dedicated else "colocated"

    @property
    def parts(self) -> int:
        """Parts of all servers together: server j holds its parts / `parts` of every bucket."""
        return self.dedicated * self.dedicated_parts + self.colocated * self.colocated_parts


Scheme = AllReduce | Sharded | ParameterServer


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncRule:
    """Which parameters are synchronised how. `reduce_in_node`: ranks of a node sum their gradients first.

    All replicas sum the gradients of dense parameters, those that hold the same experts theirs: the mesh decides with
    whom a parameter is summed, the rule how.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    params: Literal["all"] = "all"
    reduce_in_node: bool
    scheme: Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All choices of one step. `order` names the mesh axes from the fastest-varying rank digit to the slowest."""

    __pydantic_config__: ClassVar[Any] = FILE
    mesh: Mesh
    micro_batch: int
    sequence_parallel: bool
    pipeline: Pipeline
    recompute: Recompute
    precision: Precision
    order: RankOrder
    sync: tuple[SyncRule, ...]

    def __post_init__(self) -> None:
        chunks = self.mesh.pp * self.pipeline.virtual_stages
        if len(self.pipeline.boundaries) != chunks:
            raise ValueError(
                f"boundaries names {len(self.pipeline.boundaries)} chunks, but pp * virtual_stages = {chunks}"
            )
        if len(self.sync) != 1:
            raise ValueError("sync must hold exactly one rule that covers all parameters")

    @property
    def scheme(self) -> Scheme:
        """The scheme of the one rule."""
        return self.sync[0].scheme

    @property
    def chunks(self) -> int:
        """Model chunks: pp * virtual stages."""
        return self.mesh.pp * self.pipeline.virtual_stages

    def stage_of(self, chunk: int) -> int:
        """The stage that runs a chunk."""
        return stage_of(self.pipeline.schedule, self.mesh.pp, chunk)

    @property
    def ends(self) -> tuple[int, int]:
        """The stages of the embedding and of the head."""
        return self.stage_of(0), self.stage_of(self.chunks - 1)

    def micro_batches(self, global_batch: int) -> int:
        """Micro-batches of one step on one data-parallel rank, the last one possibly smaller."""
        return -(-global_batch // (self.mesh.dp * self.micro_batch))

    def chunk_layers(self, chunk: int, layers: int) -> range:
        """The layers of chunk `chunk` of a model of `layers` layers."""
        ends = (*self.pipeline.boundaries[1:], layers)
        return range(self.pipeline.boundaries[chunk], ends[chunk])

    def rank(self, stage: int, replica: int, tp: int) -> int:
        """The worker rank at these mesh coordinates; replica = d * cp + c."""
        mesh = self.mesh
        if self.order == "tp-dp-pp":
            return tp + mesh.tp * (replica + mesh.replicas * stage)
        return tp + mesh.tp * (stage + mesh.pp * replica)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(stage, replica, tp) of a worker rank."""
        mesh = self.mesh
        tp, rest = rank % mesh.tp, rank // mesh.tp
        if self.order == "tp-dp-pp":
            return rest // mesh.replicas, rest % mesh.replicas, tp
        return rest % mesh.pp, rest // mesh.pp, tp


def family(scheme: Scheme) -> Family:
    """The family that a scheme belongs to; the search simulates the best of each."""
    match scheme:
        case AllReduce():
            return "allreduce"
        case Sharded():
            return "sharded"
        case ParameterServer():
            return "parameter-server"
        case _:
            assert_never(scheme)


def degrees(mesh: Mesh) -> str:
    """The degrees of a mesh; cp and ep where there are any."""
    named = [("dp", mesh.dp), ("tp", mesh.tp), ("pp", mesh.pp)]
    named += [(name, size) for name, size in (("cp", mesh.cp), ("ep", mesh.ep)) if size > 1]
    return " ".join(f"{name}{size}" for name, size in named)


def describe(layout: Layout, layers: int | None = None) -> str:
    """A layout in one short line, as the tables show it; with how many layers each chunk has, where these are not as
    even as the `layers` of the model allow."""
    pipeline = layout.pipeline
    parts = [degrees(layout.mesh), f"mb{layout.micro_batch}"]
    if splits_backward(pipeline.schedule):
        parts.append(pipeline.schedule)
    elif pipeline.virtual_stages > 1:
        parts.append(f"v{pipeline.virtual_stages}")
    if layout.sequence_parallel:
        parts.append("sp")
    if layout.recompute != "none":
        parts.append(f"{layout.recompute} rc")
    if layers is not None and pipeline.boundaries != even_boundaries(layers, layout.chunks):
        sizes = [len(layout.chunk_layers(chunk, layers)) for chunk in range(layout.chunks)]
        runs = [(size, len(list(run))) for size, run in itertools.groupby(sizes)]
        parts.append("layers " + "+".join(f"{count}x{size}" if count > 1 else str(size) for size, count in runs))
    return f"{' '.join(parts)}, {describe_scheme(layout.scheme)}"


def describe_scheme(scheme: Scheme) -> str:
    """A scheme in a few words."""
    match scheme:
        case AllReduce():
            return f"allreduce {scheme.algorithm}"
        case Sharded():
            return f"sharded-{scheme.stage}"
        case ParameterServer():
            where = f"{scheme.dedicated} {scheme.placement}" if scheme.dedicated else scheme.placement
            return f"ps {where}" + (", optimizer at worker" if scheme.optimizer_at == "worker" else "")
        case _:
            assert_never(scheme)
