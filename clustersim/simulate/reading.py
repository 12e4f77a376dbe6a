"""Reads on the clock: how fast readers and drives are, and what a read carries over which links."""

from __future__ import annotations

import numpy as np

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.cluster.reads import read_traffic
from clustersim.cluster.storage import samples_per_s, supply_bytes_per_s
from clustersim.cluster.wiring import Port, Wiring
from clustersim.hardware.curve import alpha_s, effective_rate
from clustersim.program.program import Program, Read
from clustersim.simulate.collectives.phases import wire_efficiency
from clustersim.simulate.flows import Flows, Patterns, side_by_side
from clustersim.simulate.fold import Folding, Ints


def read_of(program: Program) -> Read | None:
    """The read of a program's first stage, where it has one."""
    return next((op for op in program.positions[0].ops if isinstance(op, Read)), None)


def open_storage(read: Read, cluster: Cluster, wiring: Wiring, readers: Ints) -> None:
    """Set the rates of drives and readers in `wiring`, given the ranks that read.

    A drive serves reads of this size as its tier does. A rank's readers get what a closed loop of all readers leaves
    them (`cluster/storage.py`): latency, the network's and the queue's included. O(readers of all ranks).
    """
    stored = read.stored_bytes / read.bytes
    sample, decode_s = float(read.sample_bytes), read.decode_ns * 1e-9
    drives, first = wiring.offset[Port.DRIVES], wiring.offset[Port.READERS]
    beside = np.bincount(wiring.node_of(readers), minlength=wiring.nodes)
    node = 0
    for index, machine in enumerate((*cluster.storage, *cluster.workers)):
        storage = machine.node.storage
        at = drives + node
        node += machine.count
        if storage is not None:
            wiring.capacity[at : at + machine.count] = supply_bytes_per_s(storage, sample)
        if index < len(cluster.storage):
            continue
        serving = cluster.storage[0].node.storage if cluster.storage else storage
        assert serving is not None
        mine = np.arange(at - drives - wiring.storage, at - drives - wiring.storage + machine.count)
        for together in np.unique(beside[mine]).tolist():
            if not together:
                continue
            rate = samples_per_s(
                serving,
                hosts=wiring.storage or 1,
                ranks=len(readers) if wiring.storage else together,
                readers=read.readers,
                sample_bytes=sample,
                stored=stored,
                decode_s=decode_s,
                away_s=_away_s(machine, wiring, sample, cluster.fabric.hop_latency_s) if wiring.storage else 0.0,
            )
            if decode_s > 0.0:
                rate = min(rate, machine.node.host.cores / decode_s / together)
            nodes = mine[beside[mine] == together]
            ranks = (nodes[:, None] * wiring.devices_per_node + np.arange(wiring.devices_per_node)).ravel()
            wiring.capacity[first + ranks] = rate * sample


def _away_s(machine: Machine, wiring: Wiring, sample: float, hop_latency_s: float) -> float:
    """Seconds of one sample on its way from a storage host."""
    switches = 3 if wiring.has_leaves else 1
    port = machine.nic_rate_bytes_per_s * machine.node.nic.count / wiring.ports_per_node
    rate = port * effective_rate(machine.nic, sample) / machine.nic.rate_bytes_per_s
    return alpha_s(machine.nic) + switches * hop_latency_s + sample / rate


def read_flows(
    read: Read, ranks: Ints, machine: Machine, wiring: Wiring, folding: Folding, patterns: Patterns, scale: float
) -> Flows:
    """The read of a step by `ranks` of one class: a strand for each of its lanes. `scale`: how much longer the
    framework takes on the network."""
    _, far = wire_efficiency(machine, float(read.sample_bytes))
    strands = []
    for lane in folding.lanes(ranks):
        traffic = read_traffic(wiring, ranks[lane], read.stored_bytes / read.bytes)
        strands.append(Flows([(0.0, float(read.bytes), patterns.weights(traffic, 1.0, scale / far))]))
    return side_by_side(strands)
