"""A program: the ops of one training step for every position, as work and never as seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.hardware.kernel import Kernels
from clustersim.layout.layout import Algorithm, Mesh, RankOrder
from clustersim.timeline import OpId
from clustersim.workload.parameters import Part

# "compute" is the device's compute stream; "collective" its communication stream; "gather" that of a node's peers
# who share what they pulled; "next" and "previous" carry pipeline sends; "push" and "pull" the traffic with servers;
# "host" a server's reduction and optimizer; "input" reads from storage.
Stream = Literal["compute", "collective", "gather", "next", "previous", "push", "pull", "host", "input"]
CollectiveKind = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "reduce", "send_recv"]
CollectiveAlgorithm = Algorithm | Literal["pairwise", "per-rail", "chain", "binomial", "scatter-allgather", "direct"]
# "dp" are all replicas of a stage's weights (dp * cp of them); "cp" those that share a sequence, "ep" those that share
# a set of experts, "expert-dp" those that hold the same experts.
Group = Literal["tp", "dp", "node-dp", "cp", "ep", "expert-dp", "embedding"]

# (position, index of the op in it)
Ref = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """A collective inside a compute op, on its critical path: `count` times over `bytes` of a group.

    Each time the kernels `beside` it (which are among those of the op) hide what they can of it.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    group: Literal["tp", "cp", "ep"] = "tp"
    kind: CollectiveKind
    bytes: int
    count: int
    beside: Kernels = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a compute op does: kernels, the collectives of its tensor-, context- and expert-parallel groups, and the
    layers and passes that the host drives.

    `split_layers` are driven backward in two works, this one and another: each takes half the host's time. `tail`: the
    last of `kernels`, behind all layers: the device gets to them only once the host has driven those.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    kernels: Kernels
    inner: tuple[Inner, ...]
    forward_layers: int
    backward_layers: int
    split_layers: int = 0
    tail: Kernels = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Run `Program.works[work]` on the device."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    type: Literal["compute"] = "compute"
    id: OpId
    stream: Stream = "compute"
    after: tuple[Ref, ...]
    work: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Each rank of this position sends `bytes` to its peer at position `to` (same dp and tp coordinates)."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    type: Literal["transfer"] = "transfer"
    id: OpId
    stream: Stream
    after: tuple[Ref, ...]
    to: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """A collective over `group`; `bytes` is the whole buffer (an all-gather's result, a reduce-scatter's input)."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    type: Literal["collective"] = "collective"
    id: OpId
    stream: Stream
    after: tuple[Ref, ...]
    kind: CollectiveKind
    group: Group
    algorithm: CollectiveAlgorithm
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Push or pull of one bucket: each rank of this position and each server exchange that server's share of `bytes`.

    Shares follow `Program.servers`. All flows of an exchange progress in proportion to their size (a coflow). The
    bucket travels in `partitions` messages; a server updates and returns one while the next is under way.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    type: Literal["exchange"] = "exchange"
    id: OpId
    stream: Stream
    after: tuple[Ref, ...]
    direction: Literal["push", "pull"]
    bytes: int
    partitions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """On a server: add `pushes` gradients of `bytes` each (over all ranks, its share of them), and step the optimizer
    where `state_bytes` (read and written, per byte of the whole bucket) is not zero."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    type: Literal["update"] = "update"
    id: OpId
    stream: Stream = "host"
    after: tuple[Ref, ...]
    pushes: int
    bytes: int
    state_bytes: int
    partitions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Wait until every worker has finished clock `clock - 1 - staleness`; staleness 0 is bulk-synchronous."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    type: Literal["gate"] = "gate"
    id: OpId
    stream: Stream = "compute"
    after: tuple[Ref, ...]
    staleness: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Each rank of this position reads its part of a step's batch: `bytes` of samples, of which `stored_bytes` come
    from storage and the rest from memory, in requests of `sample_bytes`.

    `readers` threads a rank (those that have something to do) each fetch a sample and then decode it for `decode_ns` of
    a core's time. The read of a step
    begins once the step 1 + `prefetch` before it is over.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    type: Literal["read"] = "read"
    id: OpId
    stream: Stream = "input"
    after: tuple[Ref, ...] = ()
    bytes: int
    stored_bytes: int
    sample_bytes: int
    readers: int
    decode_ns: int
    prefetch: int


Op = Compute | Transfer | Collective | Exchange | Update | Gate | Read


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """The op list that every rank of one role runs: worker stage `stage`, or the servers (`stage` -1)."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    role: Literal["worker", "server"]
    stage: int
    ops: tuple[Op, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Gradients that are sent together: of `layers` (first, last; the embedding counts as layer -1, the head as L) of
    one chunk, `elements` numbers on one tensor-parallel rank. Numbered in the order in which they become ready.

    `params`: all parameters of these layers, which all replicas hold; or, where ranks share the experts, those experts
    that a rank holds (`experts`), or everything else (`dense`).
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    index: int
    stage: int
    first_layer: int
    last_layer: int
    elements: int
    params: Part = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerShare:
    """How much of every bucket one server holds, as a whole number of parts of `Program.share_parts`."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    server: int
    host: Literal["worker", "server"]
    node: int
    parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The step body, repeated by the interpreters; `simulate` prices it, `execute` runs it.

    `positions` are the worker stages in order, then (if there are servers) one server position. `works` are the
    distinct pieces of work that compute ops name. Digests cover every field, all of them integers and strings.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    schema_version: Literal[1] = 1
    mesh: Mesh
    order: RankOrder
    positions: tuple[Position, ...]
    works: tuple[Work, ...]
    buckets: tuple[Bucket, ...]
    servers: tuple[ServerShare, ...]
    share_parts: int
