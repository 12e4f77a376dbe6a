"""The kernel tables of a probed device, and the rows of an earlier profile of the same machine. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from clustersim import files
from clustersim.errors import ClustersimError
from clustersim.execute.probe_samples import DeviceProbe
from clustersim.hardware.attention_table import AttentionRows
from clustersim.hardware.device import Device
from clustersim.hardware.gemm_table import GemmRows
from clustersim.hardware.memory_table import MemoryRows

Rows = TypeVar("Rows", GemmRows, AttentionRows, MemoryRows)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedTables:
    """What a device profile's CSVs hold; `kept`: how many rows each keeps of `earlier`, the device profile before."""

    gemm: GemmRows
    attention: AttentionRows
    memory: MemoryRows
    kept: dict[str, int]
    earlier: Device | None

    @property
    def texts(self) -> dict[str, str]:
        """The files by name."""
        return {"gemm.csv": self.gemm.text(), "attention.csv": self.attention.text(), "memory.csv": self.memory.text()}


def probed_tables(found: DeviceProbe, source: str, folder: Path | None, tell: Callable[[str], None]) -> ProbedTables:
    """The rows of `found`, and those rows of the profile in `folder` that were not measured again, where that profile
    was measured on the same machine (it states the same `source`); `tell` hears why it is not used."""
    earlier = None if folder is None else _earlier(folder, source, tell)
    rows = (_gemm_rows(found), _attention_rows(found), _memory_rows(found))
    kept = dict.fromkeys(("gemm.csv", "attention.csv", "memory.csv"), 0)
    if earlier is None or folder is None:
        return ProbedTables(gemm=rows[0], attention=rows[1], memory=rows[2], kept=kept, earlier=None)
    gemm, kept["gemm.csv"] = merged(GemmRows.read(folder / "gemm.csv"), rows[0])
    attention, kept["attention.csv"] = merged(AttentionRows.read(folder / "attention.csv"), rows[1])
    memory, kept["memory.csv"] = merged(MemoryRows.read(folder / "memory.csv"), rows[2])
    return ProbedTables(gemm=gemm, attention=attention, memory=memory, kept=kept, earlier=earlier)


def merged(old: Rows, new: Rows) -> tuple[Rows, int]:
    """All rows of `new`, and those of `old` whose point `new` does not have; how many these are."""
    names = [field.name for field in fields(new)]
    points = [name for name in names if name != "seconds"]
    known = set(zip(*(getattr(new, name).tolist() for name in points), strict=True))
    theirs = zip(*(getattr(old, name).tolist() for name in points), strict=True)
    mask = np.array([point not in known for point in theirs], bool)
    columns: dict[str, Any] = {name: np.concatenate([getattr(new, name), getattr(old, name)[mask]]) for name in names}
    return type(new)(**columns), int(mask.sum())


def _earlier(folder: Path, source: str, tell: Callable[[str], None]) -> Device | None:
    """The device profile in `folder`, where it is of this machine and whole, in the format of now."""
    if not (folder / "device.yaml").exists():
        return None
    try:
        device: Device = files.load(Device, folder / "device.yaml")
        GemmRows.read(folder / "gemm.csv")
        AttentionRows.read(folder / "attention.csv")
        MemoryRows.read(folder / "memory.csv")
    except ClustersimError as error:
        tell(f"the earlier profile is replaced, it cannot be read: {error}")
        return None
    if device.provenance.source != source:
        tell(f"the earlier profile {folder.name} is replaced, it is of another source: {device.provenance.source}")
        return None
    return device


def _gemm_rows(found: DeviceProbe) -> GemmRows:
    """Single products as a linear layer's forward pass calls them: the cost model folds batches into these, and prices
    the backward pass's products by their shapes."""
    kept = [s for s in found.gemm if s.threads == found.threads and s.batch == 1 and s.form == "forward"]
    return GemmRows(
        dtype=np.array([s.dtype for s in kept], np.str_),
        m=np.array([s.m for s in kept], np.float64),
        n=np.array([s.n for s in kept], np.float64),
        k=np.array([s.k for s in kept], np.float64),
        seconds=np.array([s.time.seconds for s in kept]),
    )


def _attention_rows(found: DeviceProbe) -> AttentionRows:
    kept = [s for s in found.attention if s.backend == "default"]
    return AttentionRows(
        dtype=np.array([s.dtype for s in kept], np.str_),
        instances=np.array([s.instances for s in kept], np.float64),
        sequence=np.array([s.sequence for s in kept], np.float64),
        group=np.array([s.group for s in kept], np.float64),
        head_dim=np.array([s.head_dim for s in kept], np.float64),
        seconds=np.array([s.forward.seconds for s in kept]),
    )


def _memory_rows(found: DeviceProbe) -> MemoryRows:
    kept = found.memory
    return MemoryRows(
        op=np.array([s.op for s in kept], np.str_),
        traffic_bytes=np.array([s.bytes for s in kept], np.float64),
        seconds=np.array([s.time.seconds for s in kept]),
    )
