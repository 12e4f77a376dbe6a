"""Disturbance by other processes is noticed, and one's own work is none."""

from __future__ import annotations

import subprocess
import sys
import time

from clustersim.execute.disturbance import Others


def test_own_work_is_no_disturbance() -> None:
    others = Others()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    own = others._own_ticks() - others._own
    assert own > 0.2 * others._ticks
    assert 0.0 <= others.share() <= 1.0


def test_a_child_counts_as_own() -> None:
    others = Others()
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    assert others._own_ticks() - others._own > 0
