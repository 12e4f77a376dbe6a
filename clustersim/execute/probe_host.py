"""This host: its processor, cores, memory and GPUs; which machine a measurement was of. No torch here."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from clustersim.execute.launch import cores
from clustersim.execute.probe_samples import PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What must be the same for two measurements to be of one machine: its parts, PyTorch, and how many ranks share
    it."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    cpu: str
    cores: int
    memory_bytes: int
    gpus: tuple[str, ...]
    torch: str
    ranks: tuple[int, ...]


def identity(ranks: tuple[int, ...]) -> Identity:
    """Of this machine now, probed with so many ranks at once."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = ""
    return Identity(
        cpu=cpu_name(), cores=cores(), memory_bytes=host_memory_bytes(), gpus=_gpus(), torch=torch, ranks=ranks
    )


def _gpus() -> tuple[str, ...]:
    """Name, UUID and driver of every GPU; none without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,uuid,driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def cpu_name() -> str:
    """The processor's model."""
    return next(iter(_cpu_info("model name")), platform.processor() or platform.machine())


def sockets() -> int:
    """Processors of this host."""
    return max(1, len(set(_cpu_info("physical id"))))


def host_memory_bytes() -> int:
    """Memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_info(key: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]
