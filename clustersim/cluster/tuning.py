"""NCCL on a cluster's machines: the shape of a group, what NCCL would run on it, and for how long.

The bridge between node profiles and the tuning model (`hardware.tuner`), and the one place where NCCL's algorithms are
matched with those of a layout.
"""

from __future__ import annotations

from typing import Literal, assert_never

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.hardware.curve import CollectiveKind, alpha_s
from clustersim.hardware.tuner import Choice, Shape, TunerKind, choose
from clustersim.hardware.tuner_constants import Architecture, TunerAlgorithm, TunerConstants, load_tuner

# The alpha of the InfiniBand cards that the model's network latencies stand for.
_MODELLED_ALPHA_S = 2.8e-6


def shape_of(machine: Machine, ranks: int, per_node: int, cluster: Cluster, constants: TunerConstants) -> Shape | None:
    """The shape of a group of `ranks`, `per_node` on each of its nodes; None where the devices do not speak NCCL.

    All groups of a node run at once: a group has the NICs' rate in proportion to its ranks. Cards that are slower to
    answer than the InfiniBand ones of the model (EFA, TCP), and the switches between nodes, add to its hops.
    """
    architecture = _architecture(machine, constants)
    inside = machine.node.interconnect
    if architecture is None or machine.nic.kind == "loopback" or ranks % per_node != 0:
        return None
    able = constants.architectures[architecture]
    nodes = ranks // per_node
    wire = machine.interconnect_rate_bytes_per_s if inside is not None else machine.nic_rate_bytes_per_s
    nvlink = machine.interconnect is not None and machine.interconnect.kind == "nvlink"
    channels, inter = able.channels, wire
    if nodes > 1:
        share = per_node / machine.node.devices
        nics = max(1, int(machine.node.nic.count * share))
        channels = nics * able.channels_per_nic
        inter = machine.nic_rate_bytes_per_s * machine.node.nic.count * share * constants.shares.net / channels
    switches = 1 if cluster.fabric.kind == "one-switch" or nodes <= cluster.fabric.nodes_per_leaf else 3
    return Shape(
        ranks=ranks,
        nodes=nodes,
        channels=channels,
        intra_bytes_per_s=wire * (able.nvlink_share if nvlink else constants.shares.net) / channels,
        inter_bytes_per_s=inter,
        architecture=architecture,
        cpu="intel",
        nvlink=nvlink,
        nvls=inside is not None and inside.reduces and per_node > 1,
        collnet=cluster.fabric.in_network_reduction,
        fabric_latency_s=max(0.0, alpha_s(machine.nic) - _MODELLED_ALPHA_S) + switches * cluster.fabric.hop_latency_s,
    )


def nccl_choice(
    kind: TunerKind, size_bytes: float, ranks: int, per_node: int, machine: Machine, cluster: Cluster
) -> Choice | None:
    """What NCCL would run for one group, and its seconds; None for one rank, or devices that do not speak NCCL."""
    constants = load_tuner()
    shape = shape_of(machine, ranks, per_node, cluster, constants) if ranks > 1 else None
    return choose(kind, size_bytes, shape, constants) if shape is not None else None


def nccl_seconds(
    kind: CollectiveKind, size_bytes: float, ranks: int, per_node: int, machine: Machine, cluster: Cluster
) -> float | None:
    """Seconds of one collective under NCCL: as measured on this machine, else as its tuner's choice is predicted.

    `size_bytes` counts as in nccl-tests. All groups of the nodes run at once; the fabric is taken as non-blocking.
    None where there is neither a measurement nor a model: all_to_all across nodes, devices that do not speak NCCL,
    groups spread unevenly over their nodes.
    """
    if ranks == 1:
        return 0.0
    if machine.collectives is not None and ranks % per_node == 0:
        whole = per_node == machine.node.devices or ranks == per_node
        measured = machine.collectives.seconds(kind, ranks, size_bytes, ranks // per_node) if whole else None
        if measured is not None:
            return measured
    if kind == "all_to_all":
        return None
    choice = nccl_choice(kind, size_bytes, ranks, per_node, machine, cluster)
    return choice.seconds if choice is not None else None


def layout_algorithm(algorithm: TunerAlgorithm) -> Literal["ring", "tree", "nvls", "sharp"]:
    """The layout's name (`layout.Algorithm`) of what NCCL calls `algorithm`.

    NVLSTree is a tree between nodes whose reductions inside nodes the switches do: the layout's `nvls`. PAT, which
    NCCL runs with one rank a node only, is a logarithmic all-gather; no allreduce uses it.
    """
    match algorithm:
        case "ring" | "tree":
            return algorithm
        case "nvls" | "nvls-tree":
            return "nvls"
        case "collnet-direct" | "collnet-chain":
            return "sharp"
        case "pat":
            return "ring"
        case _:
            assert_never(algorithm)


def _architecture(machine: Machine, constants: TunerConstants) -> Architecture | None:
    if machine.device is None:
        return None
    for name, able in constants.architectures.items():
        if machine.device.name in able.devices:
            return name
    return None
