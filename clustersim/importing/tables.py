"""Imported rows beside the rows that a profile has already."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from clustersim.errors import InputError
from clustersim.hardware.cost import DeviceCosts
from clustersim.hardware.device import Device
from clustersim.hardware.gemm_table import GemmRows
from clustersim.hardware.kernel import Dtype
from clustersim.hardware.roofline import misaligned, misaligned_many
from clustersim.hardware.table_file import table_text

# Tables of more rows take longer to read than a plan takes to make.
_MOST_ROWS = 200_000


def without_rows(text: str, columns: tuple[str, ...], keys: Collection[tuple[str, ...]]) -> tuple[str, int, int]:
    """A CSV without the rows whose `columns` are one of `keys` (an absent column is 1); how many those were, and how
    many are left."""
    lines, header, dropped, left = [], None, 0, -1
    for line in text.splitlines():
        if not line or line.startswith("#"):
            lines.append(line)
            continue
        cells = line.split(",")
        if header is None:
            header = cells
        elif tuple(cells[header.index(name)] if name in header else "1" for name in columns) in keys:
            dropped += 1
            continue
        left += 1
        lines.append(line)
    return "\n".join(lines) + "\n", dropped, left


def sustained_products(
    rows: dict[tuple[Dtype, int, int, int], tuple[int, float]], device: Device
) -> dict[tuple[Dtype, int, int, int], float]:
    """Products of a trace in the seconds that a device's tables hold.

    Tables hold short bursts, and every price from them is divided by the device's sustained clock: what was measured in
    a running step is multiplied by it first. Products that no tensor core takes at full speed (rows not aligned) have a
    factor of their own in the prices and are left out.
    """
    return {
        key: seconds * device.sustained_clock
        for key, (_, seconds) in rows.items()
        if not misaligned(key[0], key[2], key[3])
    }


def products_csv(rows: dict[tuple[Dtype, int, int, int], float], source: str) -> str:
    """Products (dtype, m, n, k) and their seconds as a table."""
    return f"# {source}\n" + table_text("dtype,m,n,k,time_us", [(key, rows[key] * 1e6) for key in sorted(rows)])


def between(
    shapes: Iterable[tuple[int, int, int]], dtype: Dtype, base: Sequence[GemmRows], costs: DeviceCosts
) -> dict[tuple[Dtype, int, int, int], float]:
    """Rows that keep the rest of a table as it was when single shapes are put into it.

    A table is a grid: a shape with sides of its own adds planes to it, which would be filled from that one shape. They
    are filled with the prices from before instead. O(rows of the grown grid). InputError where that is too large.
    """
    new = np.array(sorted(shapes), dtype=np.float64)
    old = [np.unique(np.concatenate([getattr(rows, side)[rows.dtype == dtype] for rows in base])) for side in "mnk"]
    grown = [np.union1d(sides, new[:, axis]) for axis, sides in enumerate(old)]
    if np.prod([len(sides) for sides in grown]) > _MOST_ROWS:
        raise InputError(f"{len(new)} shapes would make a table of more than {_MOST_ROWS} rows; import fewer steps")
    m, n, k = (side.ravel() for side in np.meshgrid(*grown, indexing="ij"))
    inside = np.isin(m, old[0]) & np.isin(n, old[1]) & np.isin(k, old[2])
    kept = ~inside & ~misaligned_many(dtype, n, k)
    m, n, k = m[kept], n[kept], k[kept]
    seconds = costs.gemm_seconds(m, n, k, dtype) * costs.device.sustained_clock
    measured = {tuple(shape) for shape in new}
    return {
        (dtype, int(a), int(b), int(c)): float(time)
        for a, b, c, time in zip(m, n, k, seconds, strict=True)
        if (a, b, c) not in measured
    }
