"""Imported rows as CSV files: on their own, or merged into a copy of a profile with all tables that it names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from clustersim import files
from clustersim.cluster.load import load_node
from clustersim.errors import InputError, UsageError
from clustersim.hardware.cost import device_costs, load_device
from clustersim.hardware.device import Device, TableRef
from clustersim.hardware.gemm_table import GemmRows
from clustersim.hardware.kernel import Dtype
from clustersim.hardware.provenance import Provenance
from clustersim.importing.nccl_tests import Sweep
from clustersim.importing.tables import between, products_csv, sustained_products, without_rows

_COLLECTIVE_KEYS = ("collective", "ranks", "nodes")
_PRODUCT_KEYS = ("dtype", "m", "n", "k")
Rows = dict[tuple[str, int, int, int], float]
Products = dict[tuple[Dtype, int, int, int], float]
_BETWEEN = (
    "Not measured: prices from this device's own tables at the other points of the grid that the imported shapes add, "
    "so that these change no other price."
)


def collective_rows(sweeps: Sequence[tuple[str, Sweep]], in_place: bool) -> Rows:
    """Seconds by (collective, ranks, nodes, bytes). InputError for a run that does not state what it measured, or that
    measured what another one did."""
    rows: Rows = {}
    for file, sweep in sweeps:
        if sweep.kind is None or sweep.ranks is None or sweep.nodes is None:
            flags = {"--collective": sweep.kind, "--ranks": sweep.ranks, "--nodes": sweep.nodes}
            missing = ", ".join(flag for flag, value in flags.items() if value is None)
            raise InputError(f"{file}:{sweep.line}: the log does not state all that a table holds; give {missing}")
        if sweep.ranks < 2 or sweep.ranks % sweep.nodes != 0:
            raise InputError(
                f"{file}:{sweep.line}: {sweep.ranks} ranks on {sweep.nodes} nodes: a table needs two ranks and as "
                "many on every node"
            )
        for size, seconds in sweep.seconds(in_place).items():
            key = (sweep.kind, sweep.ranks, sweep.nodes, size)
            if key in rows:
                raise InputError(f"{file}:{sweep.line}: {sweep.kind} of {size} bytes is in another log too; import one")
            rows[key] = seconds
    return rows


def write_collectives(rows: Rows, source: Provenance, node: str | None, out: Path | None) -> list[Path]:
    """Write the rows as a CSV, or into the profile of `node`, where they replace its rows of the same curves."""
    lines = [f"# {source.source}", "collective,ranks,nodes,bytes,time_us"]
    lines += [f"{','.join(map(str, key))},{float(f'{rows[key] * 1e6:.4g}'):.12g}" for key in sorted(rows)]
    text = "\n".join(lines) + "\n"
    if node is None:
        return [_csv(out, text)]
    profile = load_node(node)
    folder = out or Path("hwprofiles") / "nodes" / node
    curves = {(kind, str(ranks), str(nodes)) for kind, ranks, nodes, _ in rows}
    kept, written = _copied(files.profile_path("nodes", node), folder, profile.collectives, _COLLECTIVE_KEYS, curves)
    name = _free("collectives-imported.csv", kept)
    files.write_text(folder / name, text)
    merged = replace(profile, collectives=(*kept, TableRef(file=name, provenance=source)))
    files.save(merged, folder / "node.yaml")
    return [folder / "node.yaml", *written, folder / name]


def write_products(
    rows: dict[tuple[Dtype, int, int, int], tuple[int, float]], source: Provenance, device: str | None, out: Path | None
) -> list[Path]:
    """Write the products as a CSV, or into the profile of `device`, where they replace its rows of the same shapes."""
    if device is None:
        return [_csv(out, products_csv({key: time for key, (_, time) in rows.items()}, source.source))]
    profile, costs = load_device(device), device_costs(device)
    folder = out or Path("hwprofiles") / "devices" / device
    path = files.profile_path("devices", device)
    base = [GemmRows.read(path.parent / ref.file) for ref in profile.tables.gemm]
    products = _as_held(sustained_products(rows, profile), base, profile, source.source)
    added: dict[tuple[Dtype, int, int, int], float] = {}
    for dtype in sorted({key[0] for key in products}):
        added |= between([key[1:] for key in products if key[0] == dtype], dtype, base, costs)
    keys = {tuple(map(str, key)) for key in products}
    tables = profile.tables
    kept, written = _copied(path, folder, tables.gemm, _PRODUCT_KEYS, keys)
    written += _copied(path, folder, [*tables.attention, *tables.memory], (), ())[1]
    note = f"{source.notes} Times multiplied by sustained_clock {profile.sustained_clock:g}, by which prices divide."
    refs = [*kept]
    for name, found, origin in (
        ("gemm-imported.csv", products, replace(source, rows=len(products), notes=note)),
        (
            "gemm-between.csv",
            added,
            Provenance(method="estimate", source=f"the tables of {device}", rows=len(added), notes=_BETWEEN),
        ),
    ):
        if found:
            name = _free(name, refs)
            files.write_text(folder / name, products_csv(found, origin.source))
            written.append(folder / name)
            refs.append(TableRef(file=name, provenance=origin))
    files.save(replace(profile, tables=replace(tables, gemm=tuple(refs))), folder / "device.yaml")
    return [folder / "device.yaml", *written]


def _as_held(products: Products, base: Sequence[GemmRows], device: Device, source: str) -> Products:
    """The products in the dtypes that a device's tables hold: 16-bit types stand for each other. InputError where there
    is nothing to merge, or no table to merge into."""
    if not products:
        raise InputError(f"{source}: no product is aligned to the tensor cores; there is nothing to merge")
    held = {str(dtype) for rows in base for dtype in rows.dtype}
    twins: dict[Dtype, Dtype] = {"fp16": "bf16", "bf16": "fp16"}
    result: Products = {}
    for (dtype, m, n, k), seconds in products.items():
        if dtype not in device.peak:
            raise InputError(f"{source}: holds {dtype} products, which {device.name} cannot run; name its device")
        to = dtype if dtype in held else twins.get(dtype, dtype)
        if to not in held:
            raise InputError(
                f"{source}: holds {dtype} products, and {device.name} has no {dtype} table to merge them into; "
                "write them with --out FILE.csv"
            )
        result[to, m, n, k] = seconds
    return result


def _csv(out: Path | None, text: str) -> Path:
    if out is None or out.suffix != ".csv":
        raise UsageError("--out: name a .csv file, or the profile to merge into")
    files.write_text(out, text)
    return out


def _copied(
    path: Path, folder: Path, refs: Sequence[TableRef], columns: tuple[str, ...], keys: Collection[tuple[str, ...]]
) -> tuple[tuple[TableRef, ...], list[Path]]:
    """The tables of a profile in another folder, without the rows that an import replaces; a table of which nothing is
    left is left out. All are read before any is written: the folder may be the profile's own."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: is a file; name a folder")
    texts = []
    for ref in refs:
        try:
            text = (path.parent / ref.file).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path.parent / ref.file}: {error.strerror}") from None
        texts.append(without_rows(text, columns, keys))
    kept: list[TableRef] = []
    for ref, (text, dropped, left) in zip(refs, texts, strict=True):
        if left == 0:
            continue
        # Tables of another profile (../other/table.csv) come to lie beside the rest.
        name = _free(Path(ref.file).name, kept)
        gone = f" {dropped} rows replaced by imported ones." if dropped else ""
        notes = f"{ref.provenance.notes}{gone}".strip()
        kept.append(TableRef(file=name, provenance=replace(ref.provenance, notes=notes)))
        files.write_text(folder / name, text)
    return tuple(kept), [folder / ref.file for ref in kept]


def _free(name: str, refs: Sequence[TableRef]) -> str:
    """A file name that none of `refs` has."""
    taken = {ref.file for ref in refs}
    number = 2
    free = name
    while free in taken:
        free = f"{Path(name).stem}-{number}{Path(name).suffix}"
        number += 1
    return free
