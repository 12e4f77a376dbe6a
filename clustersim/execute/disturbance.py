"""Disturbance: what other processes do to a measurement of this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

# Above this share of the CPU, a measurement says more about the others than about this machine.
QUIET = 0.08


class Others:
    """How much of this host's CPU time went to other processes since this was made (none is seen but on Linux)."""

    def __init__(self) -> None:
        self._known = Path("/proc/stat").exists() and Path(f"/proc/self/task/{os.getpid()}/children").exists()
        self._ticks = os.sysconf("SC_CLK_TCK")
        self._own = self._own_ticks()
        self._busy = self._busy_ticks()
        self._begin = time.monotonic()

    def share(self) -> float:
        """Of all cores' time, from 0 to 1."""
        taken = (self._busy_ticks() - self._busy) - (self._own_ticks() - self._own)
        return max(0.0, taken / self._ticks / (time.monotonic() - self._begin) / (os.cpu_count() or 1))

    def _busy_ticks(self) -> int:
        if not self._known:
            return 0
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
        user, nice, system, _, _, interrupt, soft, steal = map(int, first[1:9])
        return user + nice + system + interrupt + soft + steal

    def _own_ticks(self) -> int:
        """Of this process and its children, with theirs that have ended."""
        if not self._known:
            return 0
        total = 0
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
        for process in ("self", *children):
            text = Path(f"/proc/{process}/stat").read_text(encoding="ascii")
            total += sum(map(int, text.rpartition(")")[2].split()[11:15]))
        return total
