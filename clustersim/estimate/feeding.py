"""Seconds in which a step's batch is read, by division: the least that drives, readers and cards allow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.cluster.storage import samples_per_s, supply_bytes_per_s
from clustersim.hardware.curve import alpha_s, effective_rate
from clustersim.layout.divisions import Divisions
from clustersim.workload.data import Data
from clustersim.workload.training import Workload

Floats = NDArray[np.float64]


def feeding_s(workload: Workload, divisions: Divisions, cluster: Cluster, network_scale: float) -> Floats:
    """Seconds of reading the batch of one step while nothing else uses the network; zeros where no data is modelled.

    A lower bound of the simulated one: leaves' uplinks and gradients on the same cards come on top. O(divisions).
    """
    data, d = workload.data, divisions
    result = np.zeros(len(d))
    if data is None:
        return result
    g = cluster.devices_per_node
    known: dict[tuple[int, int, int], float] = {}
    columns = (d.dp.tolist(), d.tp.tolist(), d.cp.tolist(), d.pp.tolist(), d.order.tolist())
    for index, (dp, tp, cp, pp, order) in enumerate(zip(*columns, strict=True)):
        ranks = tp * cp * dp
        # Ranks of the first stage in one node: the first ones of all, or the first tp of every tp * pp.
        together = min(g, ranks) if order == 0 else max(min(tp, g), g // pp)
        samples = -(-workload.training.global_batch // dp) / (tp * cp)
        key = (ranks, together, data.busy_readers(samples))
        if key not in known:
            known[key] = min(_rank_rate(data, machine, cluster, *key, network_scale) for machine in cluster.workers)
        result[index] = samples / known[key]
    return result


def _rank_rate(
    data: Data, machine: Machine, cluster: Cluster, ranks: int, together: int, readers: int, network_scale: float
) -> float:
    """Samples a second that one rank reads with `readers` threads, `together` such ranks in a node."""
    sample, stored = data.sample_bytes, 1.0 - data.cache
    store = cluster.storage[0] if cluster.storage else machine
    storage = store.node.storage
    assert storage is not None
    hosts, sharing = (store.count, ranks) if cluster.storage else (1, together)
    limits = []
    away = 0.0
    if cluster.storage:
        lossless = effective_rate(machine.nic, sample) / machine.nic.rate_bytes_per_s / network_scale
        node = machine.nic_rate_bytes_per_s * machine.node.nic.count
        port = node / min(machine.node.devices, machine.node.nic.count)
        limits += [
            min(node / together, port) * lossless,
            store.nic_rate_bytes_per_s * store.node.nic.count * hosts / ranks * lossless,
        ]
        switches = 1 if cluster.fabric.kind == "one-switch" else 3
        away = alpha_s(machine.nic) + switches * cluster.fabric.hop_latency_s
        away += sample / (port * effective_rate(machine.nic, sample) / machine.nic.rate_bytes_per_s)
    if machine.pcie is not None:
        # Devices below one PCIe switch share its uplink to the host's memory.
        limits.append(machine.pcie.rate_bytes_per_s / min(machine.node.devices_per_pcie_switch, together))
    limits.append(supply_bytes_per_s(storage, sample) * hosts / sharing)
    rates = [limit / sample / stored for limit in limits] if stored > 0.0 else []
    rates.append(
        samples_per_s(
            storage, hosts=hosts, ranks=sharing, readers=readers, sample_bytes=sample, stored=stored,
            decode_s=data.decode_s, away_s=away,
        )
    )  # fmt: skip
    if data.decode_s > 0.0:
        rates.append(machine.node.host.cores / data.decode_s / together)
    return min(rates)
