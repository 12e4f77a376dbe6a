"""How far the shipped link curves and collective tables are from measured points, fitted and not fitted.

Run in the checkout: `python benchmarks/link_fits.py`. Reads links/heldout.csv and the nodes' tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clustersim.cluster.load import load_node, node_collectives
from clustersim.files import profile_names, profile_path, read_csv
from clustersim.hardware.curve import message_seconds, step_seconds
from clustersim.hardware.link import Link
from clustersim.hardware.load import load_link

HELDOUT = Path(__file__).resolve().parent.parent / "hwprofiles" / "links" / "heldout.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured row: `kind` is step, message, or a collective run as a ring of `ranks`."""

    link: str
    split: str
    kind: str
    ranks: int
    size_bytes: float
    seconds: float
    rate_bytes_per_s: float | None
    source: str


def points(path: Path = HELDOUT) -> list[Point]:
    """The rows of the sample."""
    columns = read_csv(path)
    names = ("link", "split", "kind", "ranks", "bytes", "time_us", "rate_gbps", "source")
    return [
        Point(
            link=link,
            split=split,
            kind=kind,
            ranks=int(ranks),
            size_bytes=float(size),
            seconds=float(time) * 1e-6,
            rate_bytes_per_s=float(rate) * 1e9 / 8 if rate else None,
            source=source,
        )
        for link, split, kind, ranks, size, time, rate, source in zip(*(columns[n] for n in names), strict=True)
    ]


def predicted(link: Link, point: Point) -> float:
    """Seconds that the link's curve gives for the point."""
    rate = point.rate_bytes_per_s
    match point.kind:
        case "step":
            return step_seconds(link, point.size_bytes, rate)
        case "message":
            return message_seconds(link, point.size_bytes, rate)
        case "all_gather" | "reduce_scatter" | "all_reduce":
            steps = (point.ranks - 1) * (2 if point.kind == "all_reduce" else 1)
            return link.launch_s + steps * step_seconds(link, point.size_bytes / point.ranks, rate)
        case _:
            raise AssertionError(point.kind)


def errors(chosen: list[Point]) -> np.ndarray:
    """Signed relative errors of the shipped curves."""
    return np.array([predicted(load_link(p.link), p) / p.seconds - 1.0 for p in chosen])


def skipped_size_errors(name: str) -> np.ndarray:
    """Relative errors of a node's table at every second size, interpolated from the other sizes (log-log)."""
    table = node_collectives(load_node(name))
    assert table is not None
    found: list[float] = []
    for sizes, times in table.curves.values():
        kept, asked = slice(0, None, 2), slice(1, -1, 2)
        guess = np.exp(np.interp(np.log(sizes[asked]), np.log(sizes[kept]), np.log(times[kept])))
        found.extend(guess / times[asked] - 1.0)
    return np.array(found)


def _row(label: str, values: np.ndarray) -> str:
    size = np.abs(values)
    return (
        f"{label:<64}{values.size:>5}{100 * np.median(size):>9.1f}{100 * np.quantile(size, 0.9):>9.1f}"
        f"{100 * np.median(values):>+9.1f}"
    )


def main() -> None:
    """Print the errors per link and kind of point, then per table of collectives."""
    print(f"{'link, split, kind, source':<64}{'n':>5}{'median%':>9}{'p90%':>9}{'bias%':>9}")
    groups: dict[tuple[str, str, str, str], list[Point]] = {}
    for point in points():
        groups.setdefault((point.link, point.split, point.kind, point.source), []).append(point)
    for key, chosen in groups.items():
        print(_row(", ".join(key), errors(chosen)))
    measured = {p.link for p in points()}
    print("no points here: " + ", ".join(sorted(profile_names("links") - measured)))
    print("\ntables of collectives, every second size left out")
    for name in sorted(profile_names("nodes")):
        if (profile_path("nodes", name).parent / "collectives.csv").is_file():
            print(_row(name, skipped_size_errors(name)))


if __name__ == "__main__":
    main()
