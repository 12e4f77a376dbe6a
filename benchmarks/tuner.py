"""NCCL's tuner, raw and corrected, and the simulator, against published measurements that nothing was fitted on.

tuner: the model's own time of what it chooses; corrected: as `nccl_seconds` predicts it; ring, auto: the simulator's
time, on the links' curves, of a ring and of the algorithm that the tuner chooses.

Run in the checkout: `python benchmarks/tuner.py`. Reads tuners/heldout.csv. `--fit` fits the corrections of
tuners/nccl.yaml again, on the rows marked `fit`, and prints them; `--systems` prints one line per measured system.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clustersim.cluster.cluster import Cluster, Machine
from clustersim.cluster.fabric import Fabric
from clustersim.cluster.load import load_node
from clustersim.cluster.tuning import layout_algorithm, shape_of
from clustersim.files import read_csv
from clustersim.hardware.cost import load_device
from clustersim.hardware.load import load_link
from clustersim.hardware.provenance import Provenance
from clustersim.hardware.tuner import Pair, Shape, chosen_seconds, times
from clustersim.hardware.tuner_constants import Correction, TunerConstants, load_tuner
from clustersim.simulate.collectives.standalone import StandaloneCollective

HELDOUT = Path(__file__).resolve().parent.parent / "hwprofiles" / "tuners" / "heldout.csv"
BANDS = {"<= 64 KiB": 2**16, "<= 1 MiB": 2**20, "<= 16 MiB": 2**24, "<= 256 MiB": 2**28, "> 256 MiB": 2**62}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Series:
    """The sizes and times that one system measured of one collective on one group."""

    split: str
    system: str
    kind: str
    cluster: Cluster
    ranks: int
    nodes: int
    shape: Shape
    sizes: np.ndarray
    seconds: np.ndarray


def series(path: Path = HELDOUT) -> list[Series]:
    """The rows of the sample, by system, group and collective."""
    constants = load_tuner()
    columns = read_csv(path)
    names = ("split", "system", "node", "nic", "ranks", "nodes", "collective")
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for *key, size, time in zip(*(columns[n] for n in (*names, "bytes", "time_us")), strict=True):
        groups.setdefault(tuple(key), []).append((float(size), float(time) * 1e-6))
    found = []
    for (split, system, node, nic, ranks, nodes, kind), rows in groups.items():
        cluster = cluster_of(node, nic, int(nodes))
        shape = shape_of(cluster.workers[0], int(ranks), int(ranks) // int(nodes), cluster, constants)
        assert shape is not None
        sizes, seconds = np.array(sorted(rows)).T
        found.append(
            Series(
                split=split, system=system, kind=kind, cluster=cluster, ranks=int(ranks), nodes=int(nodes), shape=shape,
                sizes=sizes, seconds=seconds,
            )
        )  # fmt: skip
    return found


def cluster_of(name: str, nic: str, nodes: int) -> Cluster:
    """`nodes` machines of a node profile, with the cards of another link where `nic` names one."""
    node = load_node(name)
    if nic:
        node = replace(node, nic=replace(node.nic, link=nic))
    assert node.device is not None
    assert node.interconnect is not None
    machine = Machine(
        node=node, count=nodes, device=load_device(node.device), interconnect=load_link(node.interconnect.link),
        nic=load_link(node.nic.link), pcie=load_link(node.pcie) if node.pcie is not None else None, collectives=None,
    )  # fmt: skip
    return Cluster(workers=(machine,), servers=(), fabric=Fabric())


def model_seconds(item: Series, constants: TunerConstants) -> np.ndarray:
    """What the tuner alone predicts of its own choice."""
    every = np.stack(list(times(item.kind, item.sizes, item.shape, constants).values()))  # type: ignore[arg-type]
    return np.asarray(every.min(axis=0))


def ring_seconds(item: Series) -> np.ndarray:
    """What the simulator gives for a ring, without measured tables."""
    return _simulated(item, ["ring"] * len(item.sizes))


def auto_seconds(item: Series, constants: TunerConstants) -> np.ndarray:
    """What the simulator gives for the algorithm that the tuner chooses at each size, without measured tables."""
    return _simulated(item, [layout_algorithm(algorithm) for algorithm, _ in _chosen(item, constants)])


def _simulated(item: Series, algorithms: list[str]) -> np.ndarray:
    ranks = np.arange(item.ranks)
    priced = {
        name: StandaloneCollective(item.cluster, item.kind, name, ranks=ranks)  # type: ignore[arg-type]
        for name in set(algorithms)
    }
    return np.array(
        [priced[name].price(float(size)).seconds for name, size in zip(algorithms, item.sizes, strict=True)]
    )


# ---------------------------------------------------------------------------------------------- fitting


def fitted(items: list[Series], constants: TunerConstants) -> tuple[Correction, ...]:
    """Corrections from series: per generation inside a node, over all of them across nodes and as the fallback.

    Least absolute error of the logarithm with a light pull towards 1, every system of the same weight; coordinate
    descent. An algorithm is fitted on the rows for which the tuner chooses it.
    """
    found = []
    for reach in ("one", "several"):
        near = [item for item in items if (item.nodes == 1) == (reach == "one")]
        pairs = {id(item): _chosen(item, constants) for item in near}
        for algorithm in ("ring", "tree", "nvls", "nvls-tree"):
            kinds = sorted({item.shape.architecture for item in near}) if reach == "one" else []
            # The fallback is for a generation of which nobody measured anything: its switches do not reduce.
            fallback = [None] if reach == "several" or algorithm == "ring" else []
            for architecture in (*kinds, *fallback):
                mine = [i for i in near if architecture is None or i.shape.architecture == architecture]
                picked = [(i, [p[0] == algorithm and p[1] != "ll" for p in pairs[id(i)]]) for i in mine]
                count = sum(sum(rows) for _, rows in picked)
                if count >= 3:
                    found.append(_fit_one(picked, constants, reach, algorithm, architecture, count))
    return tuple(found)


def _chosen(item: Series, constants: TunerConstants) -> list[Pair]:
    found = times(item.kind, item.sizes, item.shape, constants)  # type: ignore[arg-type]
    return [list(found)[i] for i in np.stack(list(found.values())).argmin(axis=0)]


def _fit_one(picked, constants, reach, algorithm, architecture, count) -> Correction:  # type: ignore[no-untyped-def]
    per_system: dict[str, int] = {}
    for item, rows in picked:
        per_system[item.system] = per_system.get(item.system, 0) + sum(rows)

    def made(values: list[float]) -> Correction:
        bandwidth, filling, own = (round(value, 3) for value in values)
        return Correction(
            nodes=reach, algorithm=algorithm, architecture=architecture, bandwidth=bandwidth, filling=filling, own=own,
            provenance=Provenance(method="fitted", source="tuners/heldout.csv, split fit", rows=count),
        )  # fmt: skip

    def loss(values: list[float]) -> float:
        trial = replace(constants, corrections=(made(values),))
        total = weights = 0.0
        for item, rows in picked:
            if any(rows):
                guess = chosen_seconds(item.kind, item.sizes[rows], item.shape, trial)
                weight = per_system[item.system] ** -0.5
                total += weight * float(np.abs(np.log(guess / item.seconds[rows])).sum())
                weights += weight * sum(rows)
        pull = np.log(values[0]) ** 2 + 0.1 * (values[1] ** 2 + values[2] ** 2)
        return total + 0.05 * weights * float(pull)

    values, step = [1.0, 0.5, 0.2 if algorithm == "ring" and reach == "one" else 0.0], 0.5
    best = loss(values)
    while step > 4e-3:
        moved = False
        for index in range(3 if values[2] else 2):
            for sign in (1.0, -1.0):
                trial = list(values)
                trial[index] = max(trial[index] + sign * step, 0.05 if index == 0 else 0.01)
                tried = loss(trial)
                if tried < best - 1e-9:
                    values, best, moved = trial, tried, True
        if not moved:
            step /= 2.0
    return made(values)


# ---------------------------------------------------------------------------------------------- printing


def report(items: list[Series], constants: TunerConstants, label: str) -> None:
    """Median and 90th percentile of the absolute error by generation, reach and size."""
    print(f"\n{label}: |error| median / 90th percentile, %")
    print(f"{'GPUs':<10}{'nodes':<9}{'size':<12}{'rows':>5}{'tuner':>12}{'corrected':>12}{'ring':>12}{'auto':>12}")
    groups: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for item in items:
        key = (item.shape.architecture, "one" if item.nodes == 1 else "several")
        corrected = chosen_seconds(item.kind, item.sizes, item.shape, constants)  # type: ignore[arg-type]
        guesses = (model_seconds(item, constants), corrected, ring_seconds(item), auto_seconds(item, constants))
        groups.setdefault(key, []).extend(zip(item.sizes, item.seconds, *guesses, strict=True))
    for (architecture, reach), rows in sorted(groups.items()):
        table = np.array(rows)
        low = 0.0
        for name, high in BANDS.items():
            here = table[(table[:, 0] > low) & (table[:, 0] <= high)]
            low = high
            if len(here):
                errors = 100.0 * np.abs(here[:, 2:] / here[:, 1:2] - 1.0)
                cells = "".join(
                    f"{np.median(errors[:, c]):>7.0f} /{np.quantile(errors[:, c], 0.9):>3.0f}" for c in range(4)
                )
                print(f"{architecture:<10}{reach:<9}{name:<12}{len(here):>5}{cells}")


def by_system(items: list[Series], constants: TunerConstants) -> None:
    """One line per series: the signed median error from 1 MiB on."""
    heads = f"{'rows':>5}{'tuner%':>9}{'corrected%':>12}{'ring%':>8}{'auto%':>8}"
    print(f"\n{'system':<22}{'ranks':>6}{'nodes':>6}  {'collective':<16}{heads}")
    for item in items:
        large = item.sizes >= 2**20
        if large.any():
            guesses = (
                model_seconds(item, constants),
                chosen_seconds(item.kind, item.sizes, item.shape, constants),  # type: ignore[arg-type]
                ring_seconds(item),
                auto_seconds(item, constants),
            )
            bias = [100.0 * float(np.median((guess / item.seconds - 1.0)[large])) for guess in guesses]
            print(
                f"{item.system:<22}{item.ranks:>6}{item.nodes:>6}  {item.kind:<16}{int(large.sum()):>5}"
                f"{bias[0]:>+9.0f}{bias[1]:>+12.0f}{bias[2]:>+8.0f}{bias[3]:>+8.0f}"
            )


def main() -> None:
    """Print the table; with --fit the corrections, with --systems the biases."""
    constants, items = load_tuner(), series()
    if "--fit" in sys.argv:
        for c in fitted([item for item in items if item.split == "fit"], constants):
            own = f", own: {c.own:g}" if c.own else ""
            only = f", architecture: {c.architecture}" if c.architecture else ""
            print(
                f"  - {{nodes: {c.nodes}, algorithm: {c.algorithm}{only}, bandwidth: {c.bandwidth:g}, "
                f"filling: {c.filling:g}{own}}}  # {c.provenance.rows} rows"
            )
        return
    for split, label in (("held", "rows of machines not used to fit"), ("fit", "rows used to fit")):
        report([item for item in items if item.split == split], constants, label)
    if "--systems" in sys.argv:
        by_system(items, constants)


if __name__ == "__main__":
    main()
