"""The routes of what workers exchange with parameter servers, on hosts of their own or beside workers."""

from __future__ import annotations

import numpy as np

from clustersim.cluster.wiring import Floats, Ints, Port, Traffic, Wiring


def server_traffic(
    wiring: Wiring, ranks: Ints, hosts: Ints, host_shares: Floats, homes: Ints, home_shares: Floats, *, push: bool
) -> Traffic:
    """The traffic of one byte between each of `ranks` and all servers, by their shares. O(ranks + servers * ports).

    `hosts` are server-host numbers with `host_shares`; `homes` are worker ranks beside which a server
    runs, with `home_shares`. A rank's traffic with a co-located server arrives at the port of the same index as its
    own, and does not leave its node when that server is at home there. A server beside workers is on the host: what it
    receives or sends crosses the uplink of a PCIe switch, where there are such.
    """
    if wiring.shared_host:
        # A rank needs no wire to the server inside itself.
        own = np.bincount(homes, weights=home_shares, minlength=wiring.devices)[ranks]
        total = float(len(ranks) * (host_shares.sum() + home_shares.sum()) - own.sum())
        return Traffic(links=np.array([wiring.offset[Port.BUS]]), loads=np.array([total]), near=np.ones(1, np.bool_))
    nodes, ports = wiring.node_of(ranks), wiring.port_of(ranks)
    own_share = np.bincount(wiring.node_of(homes), weights=home_shares, minlength=wiring.nodes).astype(np.float64)
    flat = nodes * wiring.ports_per_node + ports
    count = np.bincount(flat, minlength=wiring.nodes * wiring.ports_per_node).astype(np.float64)
    by_port = count.reshape(wiring.nodes, wiring.ports_per_node)
    leaving = by_port * (1.0 - own_share)[:, None]
    arriving = own_share[:, None] * (by_port.sum(axis=0)[None, :] - by_port)
    near_out, near_in = (Port.NIC_OUT, Port.NIC_IN) if push else (Port.NIC_IN, Port.NIC_OUT)
    pcie = Port.PCIE_OUT if push else Port.PCIE_IN
    far_in = Port.SERVER_IN if push else Port.SERVER_OUT
    parts = [
        (wiring.offset[near_out] + np.arange(leaving.size), leaving.ravel()),
        (wiring.offset[near_in] + np.arange(arriving.size), arriving.ravel()),
        (wiring.offset[pcie] + ranks, np.ones(len(ranks))),
        (wiring.offset[far_in] + hosts, host_shares * len(ranks)),
    ]
    if wiring.switches_per_node:
        parts += _over_switches(wiring, ranks, own_share, arriving, push=push)
    if wiring.has_leaves:
        parts += _through_leaves(wiring, by_port, hosts, host_shares, own_share, push=push)
    links = np.concatenate([links for links, _ in parts])
    loads = np.concatenate([loads for _, loads in parts])
    used = loads > 0.0
    return Traffic(links=links[used], loads=loads[used], near=np.zeros(int(used.sum()), np.bool_))


def _through_leaves(
    wiring: Wiring, by_port: Floats, hosts: Ints, host_shares: Floats, own_share: Floats, *, push: bool
) -> list[tuple[Ints, Floats]]:
    """Traffic of ranks with servers below other leaves, spread over the leaves' uplinks."""
    node, port = np.divmod(np.arange(wiring.nodes * wiring.ports_per_node), wiring.ports_per_node)
    leaf = wiring.leaf_of(node, port)
    senders = np.bincount(leaf, weights=by_port.ravel(), minlength=wiring.leaves)
    host_leaf = np.array([wiring.leaf_of_host(int(host)) for host in hosts], np.int64)
    served = np.bincount(host_leaf, weights=host_shares, minlength=wiring.leaves)
    # A co-located server takes each rank's traffic at the port of the rank's own index: on rails, traffic with it
    # keeps to the leaves of that index.
    groups = np.arange(wiring.nodes) // wiring.nodes_per_leaf
    if wiring.rails:
        group = np.bincount(groups, weights=own_share, minlength=wiring.leaves // wiring.ports_per_node)
        homes = np.repeat(group, wiring.ports_per_node)
        reaching = np.tile(by_port.sum(axis=0), wiring.leaves // wiring.ports_per_node)
    else:
        homes = np.bincount(groups, weights=own_share, minlength=wiring.leaves)
        reaching = np.full(wiring.leaves, by_port.sum())
    up = senders * np.maximum(0.0, 1.0 - served - homes)
    down = served * (by_port.sum() - senders) + homes * (reaching - senders)
    # What rounding leaves of nothing is no traffic.
    up[up < 1e-12 * by_port.sum()] = 0.0
    first, second = (Port.LEAF_UP, Port.LEAF_DOWN) if push else (Port.LEAF_DOWN, Port.LEAF_UP)
    every = np.arange(wiring.leaves)
    return [wiring.through_leaf(first, every, up), wiring.through_leaf(second, every, down)]


def _over_switches(
    wiring: Wiring, ranks: Ints, own_share: Floats, arriving: Floats, *, push: bool
) -> list[tuple[Ints, Floats]]:
    """What crosses the uplinks of PCIe switches: the part of each rank for the server beside it; all that arrives from
    other nodes for the server here; and what ranks send through a NIC below another switch."""
    up, down = (Port.SWITCH_UP, Port.SWITCH_DOWN) if push else (Port.SWITCH_DOWN, Port.SWITCH_UP)
    share = own_share[wiring.node_of(ranks)]
    node, port = np.divmod(np.arange(arriving.size), wiring.ports_per_node)
    switched = wiring.has_switch(ranks)
    parts = [(wiring.offset[up] + wiring.switch_of(ranks), share * switched)]
    below = wiring.has_switch(node * wiring.devices_per_node)
    parts.append((wiring.offset[up] + wiring.switch_of_port(node, port), arriving.ravel() * below))
    if len(wiring.far_nic):
        away = ranks[wiring.far_nic[ranks]]
        at_nic = wiring.switch_of_port(wiring.node_of(away), wiring.port_of(away))
        beyond = 1.0 - own_share[wiring.node_of(away)]
        parts += [(wiring.offset[up] + wiring.switch_of(away), beyond), (wiring.offset[down] + at_nic, beyond)]
    return parts
