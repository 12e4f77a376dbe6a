"""The constants of NCCL's tuning model, as a file holds them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.files import load, profile_path
from clustersim.hardware.provenance import Provenance
from clustersim.units import FILE, Bytes, BytesPerS, Fraction, Positive, Seconds

TunerAlgorithm = Literal["ring", "tree", "collnet-direct", "collnet-chain", "nvls", "nvls-tree", "pat"]
Protocol = Literal["ll", "ll128", "simple"]
Architecture = Literal["volta", "ampere", "hopper", "blackwell"]
CpuVendor = Literal["intel", "amd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PerProtocol:
    """A latency per protocol; what an algorithm does not offer is absent."""

    __pydantic_config__: ClassVar[Any] = FILE
    ll_s: Seconds | None = None
    ll128_s: Seconds | None = None
    simple_s: Seconds

    def of(self, protocol: Protocol) -> float | None:
        """The latency of `protocol`, or None."""
        match protocol:
            case "ll":
                return self.ll_s
            case "ll128":
                return self.ll128_s
            case "simple":
                return self.simple_s


@dataclass(frozen=True, slots=True, kw_only=True)
class HopLatencies:
    """What an operation pays once (`launch`), and each hop over NVLink, PCIe or the network.

    What an algorithm never waits for is absent: switches that reduce hang on NVLink; PAT runs with one rank a node,
    where every algorithm waits for the network as a tree does.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    launch: PerProtocol
    nvlink: PerProtocol | None = None
    pcie: PerProtocol | None = None
    net: PerProtocol | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Several:
    """A cap on two nodes, and on more."""

    __pydantic_config__: ClassVar[Any] = FILE
    two_bytes_per_s: BytesPerS
    more_bytes_per_s: BytesPerS


@dataclass(frozen=True, slots=True, kw_only=True)
class ByNodes:
    """A cap on one node, on two, and on more."""

    __pydantic_config__: ClassVar[Any] = FILE
    one_bytes_per_s: BytesPerS
    two_bytes_per_s: BytesPerS
    more_bytes_per_s: BytesPerS

    def of(self, nodes: int) -> float:
        """The cap on `nodes` nodes."""
        if nodes == 1:
            return self.one_bytes_per_s
        return self.two_bytes_per_s if nodes == 2 else self.more_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureConstants:
    """What the model knows of a generation of GPUs. Caps named ring or tree are per channel, `ll_cap` is the sum.

    `devices` are the device profiles of this generation.

    `nvlink_share` is the part of the datasheet's NVLink rate that the model reckons with; `channels` is how many a
    node runs, `channels_per_nic` how many end at one NIC. `ring_plateau` stretches the latency of rings across nodes
    once messages fill a step. Without `nvls_share` the generation cannot reduce in its switches;
    `nvls_tree_sizes` says that the factors on trees hold for NVLSTree too.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    devices: tuple[str, ...]
    ll_cap_bytes_per_s: BytesPerS
    ring_ll128_cap_bytes_per_s: BytesPerS
    tree_ll128_cap: ByNodes
    tree_cap: ByNodes
    nvls_tree_cap: Several | None = None
    nvls_share: Fraction | None = None
    nvls_tree_sizes: bool = False
    ring_plateau: Positive
    direct_share: Fraction
    nvlink_share: Fraction
    channels: int
    channels_per_nic: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuConstants:
    """What the host's processor decides across nodes: the sum of LL's bandwidth, and the time of posting one send."""

    __pydantic_config__: ClassVar[Any] = FILE
    ll_cap: Several
    overhead_s: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Parts of the wire's rate that a protocol or an algorithm reaches."""

    __pydantic_config__: ClassVar[Any] = FILE
    ring_ll: Fraction
    ring_ll128: Fraction
    tree: Fraction
    tree_ll: Fraction
    tree_ll128_one: Fraction
    tree_ll128_more: Fraction
    pat: Fraction
    net: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSizes:
    """Factors on a tree's bandwidth by floor(lg(bytes / 64))."""

    __pydantic_config__: ClassVar[Any] = FILE
    ll: tuple[Positive, ...]
    ll128: tuple[Positive, ...]
    simple: tuple[Positive, ...]

    def of(self, protocol: Protocol) -> tuple[float, ...]:
        """The factors of `protocol`."""
        match protocol:
            case "ll":
                return self.ll
            case "ll128":
                return self.ll128
            case "simple":
                return self.simple


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """How the measured times of one algorithm differ from the model's, within a node or across nodes.

    Of the protocols that move chunks (LL128, Simple), whose steps overlap: t = L + `bandwidth` (1 + `own` / steps) S
    + `filling` sqrt(L S), with the model's latency L and bandwidth term S. The last term is what the best cut into
    chunks costs: with time L per chunk and S in all, the least of c L + S (1 + 1/c) grows as sqrt(L S). `own` is the
    part of a ring's step that copying a rank's own share takes (rings in a node). Where switches reduce, a buffer
    crosses the wire once whatever the number of ranks, and S counts it once. Without an `architecture` it holds for
    every generation that has none of its own.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    nodes: Literal["one", "several"]
    algorithm: TunerAlgorithm
    architecture: Architecture | None = None
    bandwidth: Positive
    filling: Fraction
    own: Fraction = 0.0
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class TunerConstants:
    """A tuner profile, `hwprofiles/tuners/<name>.yaml`.

    `arity` is what one more peer costs in a direct in-network reduction, `pat_rank` what one more rank costs PAT, whose
    network hops overlap `pat_overlap`-fold; `simple_posts` sends are posted per hop of the Simple protocol; `plateau`
    is the message of a channel from which on rings across nodes are stretched.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    schema_version: Literal[1] = 1
    name: str
    latencies: dict[TunerAlgorithm, HopLatencies]
    architectures: dict[Architecture, ArchitectureConstants]
    cpus: dict[CpuVendor, CpuConstants]
    shares: Shares
    arity_s: Seconds
    pat_rank_s: Seconds
    pat_overlap: Positive
    simple_posts: Positive
    plateau_bytes: Bytes
    tree_sizes: TreeSizes
    corrections: tuple[Correction, ...] = ()
    provenance: Provenance


def load_tuner(name: str = "nccl") -> TunerConstants:
    """The tuner profile `name`; ProfileError with the known names where there is none. Cached."""
    return _tuner(str(profile_path("tuners", name).resolve()))


@functools.cache
def _tuner(path: str) -> TunerConstants:
    constants: TunerConstants = load(TunerConstants, path)
    return constants
