"""Clocks, limits, temperature and driver of this host's devices, as its own tools say them. No torch here.

A figure that no tool states is `not stated`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

UNKNOWN = "not stated"

# What a profile records: our name, and nvidia-smi's (an older and a newer name of one field).
_FIELDS: dict[str, tuple[str, ...]] = {
    "driver": ("driver_version",),
    "sm_mhz": ("clocks.sm",),
    "largest_sm_mhz": ("clocks.max.sm",),
    "memory_mhz": ("clocks.mem",),
    "largest_memory_mhz": ("clocks.max.mem",),
    "power_w": ("power.draw",),
    "power_limit_w": ("power.limit",),
    "temperature_c": ("temperature.gpu",),
    "slowed_by": ("clocks_event_reasons.active", "clocks_throttle_reasons.active"),
}

# Answers nvidia-smi's fields for one GPU, or None where there is no such program or field.
Query = Callable[[str], str | None]


def gpu_clocks(query: Query) -> dict[str, str]:
    """Every figure by our name; `slowed_by` is the driver's bit mask of reasons for lower clocks (0x0: none, 0x1:
    idle, 0x4: power)."""
    return {
        name: next((value for field in fields if (value := _stated(query(field)))), UNKNOWN)
        for name, fields in _FIELDS.items()
    }


def nvidia_smi(gpu: str) -> Query:
    """Ask nvidia-smi about one GPU (an index or a UUID)."""

    def query(field: str) -> str | None:
        command = ["nvidia-smi", "-i", gpu, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return None

    return query


def cpu_clocks() -> dict[str, str]:
    """The cores' mean clock now and the largest that the system allows, in MHz (Linux)."""
    now = [float(line.partition(":")[2]) for line in _lines("/proc/cpuinfo") if line.startswith("cpu MHz")]
    largest = _lines("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    return {
        "core_mhz": f"{sum(now) / len(now):.0f}" if now else UNKNOWN,
        "largest_core_mhz": f"{int(largest[0]) / 1000:.0f}" if largest else UNKNOWN,
    }


def clock_line(before: dict[str, str], after: dict[str, str]) -> str:
    """One line for a provenance: what is stated, before and after where it changed."""
    parts = []
    for name in dict.fromkeys((*before, *after)):
        first, last = before.get(name, UNKNOWN), after.get(name, UNKNOWN)
        if name == "driver" or (first == UNKNOWN and last == UNKNOWN):
            continue
        parts.append(f"{name} {first}" if first == last else f"{name} {first} before, {last} after")
    return "; ".join(parts) or UNKNOWN


def _stated(answer: str | None) -> str:
    """nvidia-smi writes [N/A] or [Not Supported] for what a device does not tell."""
    lines = (answer or "").strip().splitlines()
    text = lines[0].strip() if lines else ""
    return "" if text.startswith("[") or text in ("N/A", "Not Supported") else text


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
