"""Which algorithm and protocol NCCL would run a collective with, and how long that takes.

NCCL prices every pair of an algorithm and a protocol by t = latency + bytes / bandwidth and runs the cheapest
(NVIDIA/nccl, tuning model of v2.30, restated as facts). The constants are a profile (`tuner_constants`). The model
ranks well and is too fast: corrections fitted on measured tables change the time that is predicted, never the choice,
which is NCCL's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clustersim.errors import ProfileError
from clustersim.hardware.tuner_constants import (
    Architecture,
    ArchitectureConstants,
    Correction,
    CpuVendor,
    PerProtocol,
    Protocol,
    TunerAlgorithm,
    TunerConstants,
)

Floats = NDArray[np.float64]
TunerKind = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce"]
Pair = tuple[TunerAlgorithm, Protocol]

_PROTOCOLS: tuple[Protocol, ...] = ("ll", "ll128", "simple")
_ALGORITHMS: dict[TunerKind, tuple[TunerAlgorithm, ...]] = {
    "all_reduce": ("tree", "ring", "collnet-direct", "collnet-chain", "nvls", "nvls-tree"),
    "all_gather": ("ring", "nvls", "pat"),
    "reduce_scatter": ("ring", "nvls", "pat"),
    "broadcast": ("ring",),
    "reduce": ("ring",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A group of ranks and the wires between them, as the model sees them.

    `intra` and `inter` are the rates of one channel inside a node and between nodes, per direction. `fabric_latency`
    is what the switches of the network add to a hop. `nvls` and `collnet` say whether the switches inside the nodes,
    and those between them, can reduce.
    """

    ranks: int
    nodes: int
    channels: int
    intra_bytes_per_s: float
    inter_bytes_per_s: float
    architecture: Architecture
    cpu: CpuVendor
    nvlink: bool = True
    nvls: bool = False
    collnet: bool = False
    fabric_latency_s: float = 0.0

    @property
    def per_node(self) -> float:
        """Ranks on a node, on average."""
        return self.ranks / self.nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What NCCL would run, on how many channels, and the seconds that it takes (corrected where measured)."""

    algorithm: TunerAlgorithm
    protocol: Protocol
    channels: int
    seconds: float


def choose(kind: TunerKind, size_bytes: float, shape: Shape, constants: TunerConstants) -> Choice:
    """The cheapest pair by the model, and its corrected time. `size_bytes` counts as in nccl-tests: the whole buffer,
    for all_gather and reduce_scatter that of all ranks. O(pairs)."""
    best = min(times(kind, [size_bytes], shape, constants).items(), key=lambda item: float(item[1][0]))
    (algorithm, protocol), _ = best
    seconds = times(kind, [size_bytes], shape, constants, corrected=True)[algorithm, protocol]
    return Choice(algorithm=algorithm, protocol=protocol, channels=shape.channels, seconds=float(seconds[0]))


def chosen_seconds(kind: TunerKind, sizes_bytes: ArrayLike, shape: Shape, constants: TunerConstants) -> Floats:
    """Seconds of what `choose` picks at each of `sizes_bytes`."""
    raw = np.stack(list(times(kind, sizes_bytes, shape, constants).values()))
    found = np.stack(list(times(kind, sizes_bytes, shape, constants, corrected=True).values()))
    return np.asarray(np.take_along_axis(found, raw.argmin(axis=0)[None], axis=0)[0])


def times(
    kind: TunerKind, sizes_bytes: ArrayLike, shape: Shape, constants: TunerConstants, *, corrected: bool = False
) -> dict[Pair, Floats]:
    """Seconds of every pair that can run, at each of `sizes_bytes`. O(pairs * sizes)."""
    sizes = np.asarray(sizes_bytes, dtype=np.float64)
    found: dict[Pair, Floats] = {}
    for algorithm in _ALGORITHMS[kind]:
        if not _runs(algorithm, shape, constants):
            continue
        for protocol in _PROTOCOLS:
            if constants.latencies[algorithm].launch.of(protocol) is None:
                continue
            # LL128 needs the 128-byte stores of NVLink.
            if protocol == "ll128" and not shape.nvlink:
                continue
            latency = _latency(kind, algorithm, protocol, sizes, shape, constants)
            steady = sizes / _bandwidth(kind, algorithm, protocol, shape, constants)
            by_size = algorithm == "tree" or (
                algorithm == "nvls-tree" and constants.architectures[shape.architecture].nvls_tree_sizes
            )
            if by_size:
                steady = steady / _tree_share(sizes, protocol, constants)
            item = _correction(algorithm, shape, constants) if corrected and protocol != "ll" else None
            if item is None:
                found[algorithm, protocol] = latency + steady
                continue
            steps = _steps(kind, shape.ranks)
            if algorithm in ("nvls", "nvls-tree"):
                steady = steady * (shape.ranks / steps)
            own = item.own / steps if algorithm == "ring" else 0.0
            filling = item.filling * np.sqrt(latency * steady)
            found[algorithm, protocol] = latency + item.bandwidth * (1.0 + own) * steady + filling
    return found


def _correction(algorithm: TunerAlgorithm, shape: Shape, constants: TunerConstants) -> Correction | None:
    """What was measured of the algorithm on this generation, else on others; None where it was on none."""
    reach = "one" if shape.nodes == 1 else "several"
    same = [item for item in constants.corrections if (item.nodes, item.algorithm) == (reach, algorithm)]
    for item in same:
        if item.architecture == shape.architecture:
            return item
    return next((item for item in same if item.architecture is None), None)


def _runs(algorithm: TunerAlgorithm, shape: Shape, constants: TunerConstants) -> bool:
    """Whether the wires, and NCCL's rules, allow the algorithm."""
    able = constants.architectures[shape.architecture]
    match algorithm:
        case "ring" | "tree":
            return True
        case "collnet-direct" | "collnet-chain":
            return shape.collnet and shape.nodes > 1
        case "nvls":
            return shape.nvls and able.nvls_share is not None and (shape.nodes == 1 or shape.collnet)
        case "nvls-tree":
            return shape.nvls and able.nvls_tree_cap is not None and shape.nodes > 1
        case "pat":
            return shape.ranks == shape.nodes
        case _:
            assert_never(algorithm)


def _steps(kind: TunerKind, ranks: int) -> int:
    """Steps of a ring: how often each part of the buffer moves on."""
    match kind:
        case "all_reduce":
            return 2 * (ranks - 1)
        case "all_gather" | "reduce_scatter":
            return ranks - 1
        case "broadcast" | "reduce":
            return ranks
        case _:
            assert_never(kind)


def _bandwidth(
    kind: TunerKind, algorithm: TunerAlgorithm, protocol: Protocol, shape: Shape, constants: TunerConstants
) -> float:
    """Bytes of the buffer a second, once the pipe is full."""
    able, shares = constants.architectures[shape.architecture], constants.shares
    channels = shape.channels
    inside = shape.intra_bytes_per_s if shape.nodes <= 2 else shape.inter_bytes_per_s
    wire = channels * inside
    ring_ratio = shape.ranks / _steps(kind, shape.ranks)
    match algorithm:
        case "ring":
            # A ring runs every edge at one rate, which is that of the network as soon as it leaves the node.
            if shape.nodes > 1:
                wire = channels * min(shape.intra_bytes_per_s, shape.inter_bytes_per_s)
            if protocol == "ll":
                wire = min(_ll_cap(shape, constants), shares.ring_ll * wire)
            elif protocol == "ll128":
                wire = min(shares.ring_ll128 * wire, channels * able.ring_ll128_cap_bytes_per_s)
            return wire * ring_ratio
        case "tree":
            wire = min(shares.tree * wire, channels * able.tree_cap.of(shape.nodes))
            if protocol == "ll":
                wire = min(shares.tree_ll * wire, _ll_cap(shape, constants))
            elif protocol == "ll128":
                share = shares.tree_ll128_one if shape.nodes == 1 else shares.tree_ll128_more
                wire = min(share * wire, channels * able.tree_ll128_cap.of(shape.nodes))
            return wire / 2.0
        case "pat":
            return shares.pat * wire * ring_ratio
        case "collnet-direct":
            # Devices that share a NIC wait for each other half of the time.
            sharing = shape.per_node / channels
            return channels * shape.intra_bytes_per_s / (sharing - (sharing - 1.0) / 2.0) * able.direct_share / 2.0
        case "collnet-chain":
            return channels * shape.intra_bytes_per_s / 2.0
        case "nvls" | "nvls-tree":
            return _switch_bandwidth(kind, algorithm, shape, able) * ring_ratio
        case _:
            assert_never(algorithm)


def _switch_bandwidth(
    kind: TunerKind, algorithm: Literal["nvls", "nvls-tree"], shape: Shape, able: ArchitectureConstants
) -> float:
    """Bus bandwidth where NVLink switches reduce: one channel of them is kept for control."""
    assert able.nvls_share is not None
    channels = shape.channels
    inside = shape.intra_bytes_per_s * able.nvls_share * (channels - 1) / channels
    inside *= 2.0 if kind == "all_reduce" else (shape.per_node - 1.0) / shape.per_node
    if shape.nodes == 1:
        return channels * inside
    outside = shape.inter_bytes_per_s
    if algorithm == "nvls":
        return channels * min(inside, outside)
    assert able.nvls_tree_cap is not None
    two = shape.nodes == 2
    cap = able.nvls_tree_cap.two_bytes_per_s if two else able.nvls_tree_cap.more_bytes_per_s
    return channels * min(inside, outside * (2.0 if two else 1.0), cap)


def _ll_cap(shape: Shape, constants: TunerConstants) -> float:
    """The most that the LL protocol moves: by the generation inside a node, by the processor across nodes."""
    if shape.nodes == 1:
        return constants.architectures[shape.architecture].ll_cap_bytes_per_s
    cap = constants.cpus[shape.cpu].ll_cap
    return cap.two_bytes_per_s if shape.nodes == 2 else cap.more_bytes_per_s


def _latency(
    kind: TunerKind,
    algorithm: TunerAlgorithm,
    protocol: Protocol,
    sizes: Floats,
    shape: Shape,
    constants: TunerConstants,
) -> Floats:
    """Seconds of the launch and of all hops."""
    hops, alone = constants.latencies[algorithm], shape.ranks == shape.nodes
    launch = _of(hops.launch, protocol)
    near = 0.0 if alone else _of(hops.nvlink if shape.nvlink or hops.pcie is None else hops.pcie, protocol)
    far = 0.0
    if shape.nodes > 1:
        # A rank that is alone on its node sends and receives through one card, as in a tree.
        far = _of(constants.latencies["tree"].net if alone else hops.net, protocol)
    # The Simple protocol flushes what it received: the network is waited for twice.
    far += shape.fabric_latency_s * (2.0 if protocol == "simple" else 1.0)
    levels = math.floor(math.log2(shape.nodes))
    peers = shape.per_node - 1.0
    latency = launch
    match algorithm:
        case "ring":
            across = (2 if kind == "all_reduce" else 1) * (shape.nodes - 1)
            post = 0.0
            if shape.nodes > 1:
                post = constants.cpus[shape.cpu].overhead_s * (constants.simple_posts if protocol == "simple" else 1.0)
            latency += (_steps(kind, shape.ranks) - across) * max(near, post) + across * far
            if protocol == "simple" and kind == "all_reduce" and shape.nodes > 1:
                full = sizes / (shape.channels * shape.ranks) >= constants.plateau_bytes
                return latency * np.where(full, constants.architectures[shape.architecture].ring_plateau, 1.0)
        case "tree":
            latency += 2.0 * (peers * near + levels * far)
        case "collnet-direct":
            latency += 2.0 * (min(1.0, peers) * near + peers * constants.arity_s) + far
        case "collnet-chain":
            latency += 2.0 * peers * near + far
        case "nvls":
            latency += near + (far if shape.nodes > 1 else 0.0)
        case "nvls-tree":
            latency += near + 2.0 * levels * far
        case "pat":
            latency += levels * far / constants.pat_overlap + constants.pat_rank_s * shape.ranks
        case _:
            assert_never(algorithm)
    return np.full(sizes.shape, latency)


def _of(latencies: PerProtocol | None, protocol: Protocol) -> float:
    """A latency that the file must have for an algorithm that runs."""
    found = latencies.of(protocol) if latencies is not None else None
    if found is None:
        raise ProfileError(
            f"the tuner profile has no latency for a hop by {protocol}; copy it from the shipped nccl.yaml"
        )
    return found


def _tree_share(sizes: Floats, protocol: Protocol, constants: TunerConstants) -> Floats:
    """The part of its bandwidth that a tree of medium size reaches, by the power of two of the size from 64 B on."""
    factors = np.array(constants.tree_sizes.of(protocol))
    index = np.floor(np.log2(np.maximum(sizes, 1.0) / 64.0)).astype(np.int64)
    known = (index >= 0) & (index < len(factors))
    return np.where(known, factors[np.clip(index, 0, len(factors) - 1)], 1.0)
