"""The routes of what is read: from drives, over the fabric where these are elsewhere, to the devices."""

from __future__ import annotations

import numpy as np

from clustersim.cluster.wiring import Ints, Port, Traffic, Wiring


def read_traffic(wiring: Wiring, ranks: Ints, stored: float) -> Traffic:
    """The traffic of ranks that each read one byte of samples, `stored` of it from storage. O(ranks + hosts).

    Storage hosts hold equal parts of every sample set, so that each rank reads from all of them alike; without any, a
    rank reads from the drives of its own node. What arrives at the rank's NIC goes to the host's memory, where samples
    are decoded, and on to its device; reads are small, so that they spread over all uplinks of a leaf, whatever its
    routing. Readers handle every byte, also what memory holds. Drives and readers lose nothing on the wire: `near`.
    """
    nodes = wiring.node_of(ranks)
    ones = np.ones(len(ranks))
    near = [(wiring.offset[Port.READERS] + ranks, ones)]
    far = []
    switched = ranks[wiring.has_switch(ranks)] if wiring.switches_per_node else ranks[:0]
    if wiring.storage:
        hosts = np.arange(wiring.storage)
        each = np.full(wiring.storage, stored * len(ranks) / wiring.storage)
        near.append((wiring.offset[Port.DRIVES] + hosts, each))
        ports = wiring.port_of(ranks)
        far += [
            (wiring.offset[Port.STORAGE_OUT] + hosts, each),
            (wiring.offset[Port.NIC_IN] + nodes * wiring.ports_per_node + ports, ones * stored),
        ]
        port_switches = wiring.switch_of_port(wiring.node_of(switched), wiring.port_of(switched))
        far.append((wiring.offset[Port.SWITCH_UP] + port_switches, np.full(len(switched), stored)))
        if wiring.has_leaves:
            there = np.array([wiring.leaf_of_host(wiring.servers + int(host)) for host in hosts], np.int64)
            here = wiring.leaf_of(nodes, ports)
            served = np.bincount(there, minlength=wiring.leaves) / wiring.storage
            reading = np.bincount(here, minlength=wiring.leaves).astype(np.float64)
            every = np.arange(wiring.leaves)
            far += [
                wiring.through_leaf(Port.LEAF_UP, every, stored * served * (len(ranks) - reading)),
                wiring.through_leaf(Port.LEAF_DOWN, every, stored * reading * (1.0 - served)),
            ]
    else:
        near.append((wiring.offset[Port.DRIVES] + nodes, ones * stored))
    far += [
        (wiring.offset[Port.SWITCH_DOWN] + wiring.switch_of(switched), np.full(len(switched), stored)),
        (wiring.offset[Port.PCIE_IN] + ranks, ones * stored),
    ]
    links = np.concatenate([links for links, _ in (*near, *far)])
    loads = np.concatenate([loads for _, loads in (*near, *far)])
    inside = np.arange(len(links)) < sum(len(links) for links, _ in near)
    used = loads > 1e-12 * len(ranks)
    return Traffic(links=links[used], loads=loads[used], near=inside[used])
