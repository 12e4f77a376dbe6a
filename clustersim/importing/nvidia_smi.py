"""The matrix that `nvidia-smi topo -m` prints, as a Topology.

Read liberally: tabs or spaces, colours, wrapped lines, any NIC names, notes, prompts, legends, rows and columns that
are missing. What stands in a cell must be known, and the two cells of a pair must agree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from clustersim.errors import InputError
from clustersim.importing.topology import PATHS, Gpu, Nic, Path, Tie, Topology

# Colours, also where the escape character got lost on the way.
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\[[0-9;]*m")
_GPU = re.compile(r"GPU\d+")
_MIG = re.compile(r".*MIG.*")
_CELL = re.compile(r"X|NV\d+|PIX|PXB|PHB|NODE|SYS|SOC")
_EXTRA = re.compile(r"CPU Affinity|NUMA Affinity|GPU NUMA ID")
_LEGEND_NIC = re.compile(r"\s*(NIC\d+)\s*:\s*(\S+)\s*$")
_NOTHING = ("", "N/A", "-")


@dataclass(slots=True)
class _Reading:
    """What has been read so far."""

    name: str
    columns: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)
    rows: dict[str, tuple[int, list[str], list[str]]] = field(default_factory=dict)
    legend: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    last: str | None = None


def read_matrix(text: str, name: str) -> Topology:
    """The machine that the output of `nvidia-smi topo -m` (or `-mp`) shows. O(cells). InputError, one line with
    file and line, for text without a matrix, a cell that is no link class, or cells that contradict each other."""
    reading = _Reading(name=name)
    over = False
    for number, raw in enumerate(text.splitlines(), start=1):
        line = _COLOUR.sub("", raw).rstrip()
        over = over or line.strip().rstrip(":").lower() in ("legend", "nic legend")
        found = _LEGEND_NIC.match(line)
        if found:
            reading.legend[found.group(1)] = found.group(2)
        if over or not line.strip() or line.lstrip().startswith(("#", "$")):
            continue
        if _is_header(line):
            if reading.rows:
                reading.notes.append(f"line {number}: a second matrix begins here and is not read")
                over = True
            else:
                _header(reading, line)
        elif reading.columns:
            _row(reading, line, number)
    if not any(_GPU.fullmatch(column) for column in reading.columns):
        raise InputError(f"{name}: has no matrix (no header line with GPU0); save what `nvidia-smi topo -m` prints")
    if not reading.rows:
        raise InputError(f"{name}: has a header but no row; save all that `nvidia-smi topo -m` prints")
    return _topology(reading)


def _is_header(line: str) -> bool:
    words = _EXTRA.sub(" ", line).split()
    return any(_GPU.fullmatch(word) for word in words) and not any(_CELL.fullmatch(word) for word in words)


def _header(reading: _Reading, line: str) -> None:
    reading.extras += _EXTRA.findall(line)
    reading.columns += _EXTRA.sub(" ", line).split()


def _row(reading: _Reading, line: str, number: int) -> None:
    """A row, the rest of a wrapped row or header, or a line that has nothing to do with the matrix."""
    words = line.split()
    wide = len(reading.columns)
    if words[0] in reading.columns and len(words) > 1 and _CELL.fullmatch(words[1]):
        if words[0] in reading.rows:
            raise InputError(f"{reading.name}:{number}: a second row for {words[0]}; keep one matrix in the file")
        cells, rest = _split(reading, line, number)
        reading.rows[words[0]] = number, cells, rest
        reading.last = words[0]
        if len(cells) < wide:
            reading.notes.append(f"line {number}: {words[0]} has {len(cells)} of {wide} cells")
    elif not reading.rows and (_EXTRA.search(line) or all(re.fullmatch(r"[A-Za-z]+[\w.-]*\d", word) for word in words)):
        _header(reading, line)
    elif reading.last is not None and (_CELL.fullmatch(words[0]) or words[0][0].isdigit()):
        # A wrapped row goes on.
        first, cells, rest = reading.rows[reading.last]
        more = [word for word in words if _CELL.fullmatch(word)]
        cells = [*cells, *more]
        if len(cells) > wide:
            raise InputError(f"{reading.name}:{number}: {reading.last} has {len(cells)} cells, but {wide} columns")
        rest = [*rest, *(word for word in words if not _CELL.fullmatch(word))]
        reading.rows[reading.last] = first, cells, rest
        reading.notes[:] = [note for note in reading.notes if not note.startswith(f"line {first}: {reading.last} has")]
        if len(cells) < wide:
            reading.notes.append(f"line {first}: {reading.last} has {len(cells)} of {wide} cells")
    elif words[0] in reading.columns and len(words) > 1:
        raise InputError(f"{reading.name}:{number}: {words[1]!r} is no link; write one of X, NV#, {', '.join(PATHS)}")


def _split(reading: _Reading, line: str, number: int) -> tuple[list[str], list[str]]:
    """The cells of a row, and what follows them: affinities in the order of the header, empty where not stated."""
    wide = len(reading.columns)
    tabbed = line.count("\t") >= 2
    fields = [part.strip() for part in line.split("\t")][1:] if tabbed else line.split()[1:]
    cells: list[str] = []
    for part in fields[:wide]:
        if part not in _NOTHING and not _CELL.fullmatch(part):
            if len(cells) == wide or (not tabbed and len(cells) > 0 and part[0].isdigit()):
                break
            raise InputError(f"{reading.name}:{number}: {part!r} is no link; write one of X, NV#, {', '.join(PATHS)}")
        cells.append(part)
    rest = fields[len(cells) :]
    if len(cells) < wide and rest:
        raise InputError(
            f"{reading.name}:{number}: {len(cells)} cells, but the header has {wide} columns; mend the row, or cut it "
            "after its last cell"
        )
    return cells, rest


def _affinity(reading: _Reading, row: str) -> dict[str, str]:
    """The stated affinities of a row by column. Where spaces leave open which column a value stands in, none."""
    number, _, rest = reading.rows[row]
    extras, given = reading.extras, [value for value in rest if value != ""]
    if len(rest) > len(given) and len(rest) >= len(extras):
        # Tabs keep the place of an empty value; there are two before the last column.
        values = dict(zip(extras[:2], rest[:2], strict=False))
    elif len(given) == len(extras):
        values = dict(zip(extras, given, strict=True))
    elif len(given) == len(extras) - 1 and "GPU NUMA ID" in extras and "N/A" not in given:
        values = dict(zip(extras, given, strict=False))
    else:
        if any(value not in _NOTHING for value in given):
            reading.notes.append(f"line {number}: which affinity of {row} {' '.join(given)!r} is, is not clear")
        values = {}
    return {key: value for key, value in values.items() if value not in _NOTHING}


def _topology(reading: _Reading) -> Topology:
    names = list(dict.fromkeys([*reading.columns, *reading.rows]))
    parts = [name for name in names if _MIG.fullmatch(name)]
    if parts:
        reading.notes.append(f"{len(parts)} MIG instances are shares of GPUs and are left out: {', '.join(parts)}")
    gpus = []
    for name in names:
        if _GPU.fullmatch(name):
            known = _affinity(reading, name) if name in reading.rows else {}
            gpus.append(Gpu(name=name, numa=known.get("NUMA Affinity"), cpus=known.get("CPU Affinity")))
    nics = [
        Nic(name=name, device=reading.legend.get(name))
        for name in names
        if not _GPU.fullmatch(name) and name not in parts
    ]
    missing = [name for name in names if name not in reading.rows]
    if missing:
        reading.notes.append(f"no row for {', '.join(missing)}")
    kept = {gpu.name for gpu in gpus} | {nic.name for nic in nics}
    return Topology(
        file=reading.name, gpus=tuple(gpus), nics=tuple(nics), ties=_ties(reading, kept), notes=tuple(reading.notes)
    )


def _ties(reading: _Reading, kept: set[str]) -> dict[tuple[str, str], Tie]:
    ties: dict[tuple[str, str], Tie] = {}
    for row, (number, cells, _) in reading.rows.items():
        for column, cell in zip(reading.columns, cells, strict=False):
            if cell in _NOTHING or row not in kept or column not in kept:
                continue
            if (row == column) != (cell == "X"):
                what = "is itself and must be X" if row == column else "are two devices and cannot be X"
                raise InputError(f"{reading.name}:{number}: {row} and {column} {what}, not {cell!r}; mend the row")
            if row == column:
                continue
            tie = _tie(cell)
            before = ties.get((column, row))
            if before is not None and before != tie:
                raise InputError(
                    f"{reading.name}:{number}: {row} to {column} is {cell!r}, but the row of {column} says otherwise; "
                    "save the matrix again"
                )
            if before is None:
                ties[row, column] = tie
    return ties


def _tie(cell: str) -> Tie:
    if cell.startswith("NV"):
        return Tie(nvlinks=int(cell[2:]))
    # Drivers before 384 wrote SOC for what is SYS now.
    path: Path = next((path for path in PATHS if path == cell), "SYS")
    return Tie(path=path, nvlinks=0)
