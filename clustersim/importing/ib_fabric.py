"""An InfiniBand fabric as somebody listed it: switches, adapters, links, and what their shape says."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import networkx as nx

# Data rate of one lane, one direction, bits a second: signalling less its coding (InfiniBand roadmap of the IBTA;
# 8b/10b up to QDR, 64b/66b for FDR10, FDR and EDR; the nominal rate from HDR on).
LANE_BITS_PER_S = {
    "SDR": 2e9, "DDR": 4e9, "QDR": 8e9, "FDR10": 10e9, "FDR": 14.0625e9 * 64 / 66, "EDR": 25e9, "HDR": 50e9,
    "NDR": 100e9, "XDR": 200e9,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """A switch and how many ports it has (None where the file shows it from the other side only)."""

    key: str
    name: str
    ports: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A channel adapter (HCA). `host` and `card` are what its description says: `node7 mlx5_2`."""

    key: str
    host: str
    card: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cable:
    """One cable between two ports; `speed` as the file writes it (4xNDR), `rate` per direction, None: not stated."""

    a: str
    a_port: int
    b: str
    b_port: int
    speed: str | None
    rate_bytes_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class IbFabric:
    """Everything one listing states; `notes` is what its reader left out or found odd."""

    file: str
    switches: tuple[Switch, ...]
    adapters: tuple[Adapter, ...]
    cables: tuple[Cable, ...]
    notes: tuple[str, ...] = ()

    def levels(self) -> dict[str, int | None]:
        """The level of each switch: 1 for a leaf (an adapter hangs below it), else one more than the lowest switch it
        is joined to; None for a switch that no adapter can reach."""
        keys = {switch.key for switch in self.switches}
        near: dict[str, set[str]] = {key: set() for key in keys}
        front = []
        for cable in self.cables:
            for here, there in ((cable.a, cable.b), (cable.b, cable.a)):
                if here in keys and there in keys:
                    near[here].add(there)
                elif here in keys:
                    front.append(here)
        level: dict[str, int | None] = dict.fromkeys((switch.key for switch in self.switches), None)
        depth = 1
        while front:
            front = [key for key in dict.fromkeys(front) if level[key] is None]
            for key in front:
                level[key] = depth
            front = [other for key in front for other in near[key]]
            depth += 1
        return level

    def rates(self, key: str) -> dict[str, float | None]:
        """Bytes a second of all cables of a switch: `down` (to adapters), `up` (to higher switches), `across` (to
        switches of its level); None where a rate is not stated."""
        level = self.levels()
        sums: dict[str, float | None] = {"down": 0.0, "up": 0.0, "across": 0.0}
        for cable in self.cables:
            if key not in (cable.a, cable.b):
                continue
            other = cable.b if cable.a == key else cable.a
            mine, theirs = level[key], level.get(other)
            if other not in level:
                way = "down"
            elif mine is None or theirs is None or mine == theirs:
                way = "across"
            else:
                way = "up" if theirs > mine else "down"
            before = sums[way]
            rate = cable.rate_bytes_per_s
            sums[way] = before + rate if before is not None and rate is not None else None
        return sums

    def oversubscription(self) -> dict[str, float] | None:
        """Downlinks over uplinks of each leaf; None where there are no spines, leaves are joined to each other, or a
        rate is not stated."""
        result = {}
        for key, level in self.levels().items():
            if level != 1:
                continue
            rates = self.rates(key)
            down, up, across = rates["down"], rates["up"], rates["across"]
            if not down or not up or across is None or across > 0.0:
                return None
            result[key] = down / up
        return result or None

    def hosts_of_leaves(self) -> dict[str, tuple[str, ...]]:
        """The hosts below each leaf, in the order of the file."""
        hosts = {adapter.key: adapter.host for adapter in self.adapters}
        found: dict[str, list[str]] = {key: [] for key, level in self.levels().items() if level == 1}
        for cable in self.cables:
            for leaf, other in ((cable.a, cable.b), (cable.b, cable.a)):
                if leaf in found and other in hosts:
                    found[leaf].append(hosts[other])
        return {leaf: tuple(dict.fromkeys(below)) for leaf, below in found.items()}

    @property
    def kind(self) -> Literal["one-switch", "leaf-spine", "rail-optimized", "not stated"]:
        """The kind of fabric that the cables make up.

        `rail-optimized`: hosts have several adapters and every host has each at another leaf; not stated where switches
        are joined without a spine, or no adapter is listed.
        """
        level = self.levels()
        leaves = self.hosts_of_leaves()
        if not leaves or None in level.values():
            return "not stated"
        if len(level) == 1:
            return "one-switch"
        if max(number or 0 for number in level.values()) < 2:
            return "not stated"
        ports = Counter(host for below in leaves.values() for host in below)
        cards = Counter(adapter.host for adapter in self.adapters)
        spread = all(ports[host] == count for host, count in cards.items())
        return "rail-optimized" if spread and max(cards.values()) > 1 else "leaf-spine"


def fabric_graph(fabric: IbFabric) -> nx.MultiDiGraph:
    """The fabric as a directed graph: kinds of nodes leaf, spine, switch (not placed) and nic (an adapter, with its
    `host`); an edge each way for every cable, with `rate_bytes_per_s` and `speed`. O(cables)."""
    import networkx

    result: nx.MultiDiGraph = networkx.MultiDiGraph()
    level = fabric.levels()
    for switch in fabric.switches:
        at = level[switch.key]
        kind = "switch" if at is None else "leaf" if at == 1 else "spine"
        result.add_node(switch.key, kind=kind, label=switch.name, level=at, host=None)
    for adapter in fabric.adapters:
        result.add_node(adapter.key, kind="nic", label=adapter.card, level=0, host=adapter.host)
    for cable in fabric.cables:
        for a, b in ((cable.a, cable.b), (cable.b, cable.a)):
            result.add_edge(a, b, rate_bytes_per_s=cable.rate_bytes_per_s, speed=cable.speed)
    return result
