"""Checkpoint intervals and what failures leave of the time: closed forms.

Everywhere: `write_s` is what a checkpoint keeps training waiting for, `mtbf_s` the mean time between the failures of
the whole job, `interval_s` the training between two checkpoints, `restart_s` all that passes from a failure to the
first new step.
"""

from __future__ import annotations

import math


def job_mtbf_s(parts: float, rate_per_s: float) -> float:
    """Mean time between the failures of a job of `parts` parts that fail independently at `rate_per_s` each."""
    rate = parts * rate_per_s
    return math.inf if rate == 0.0 else 1.0 / rate


def young_interval_s(write_s: float, mtbf_s: float) -> float:
    """sqrt(2 w mu): the optimum to first order in w / mu (Young, CACM 1974)."""
    return math.sqrt(2.0 * write_s * mtbf_s)


def daly_interval_s(write_s: float, mtbf_s: float) -> float:
    """The optimum to higher order: sqrt(2 w mu) (1 + x / 3 + x^2 / 9) - w with x = sqrt(w / (2 mu)) where w < 2 mu, and
    mu beyond (Daly, FGCS 2006)."""
    if write_s >= 2.0 * mtbf_s:
        return mtbf_s
    x = math.sqrt(write_s / (2.0 * mtbf_s))
    return young_interval_s(write_s, mtbf_s) * (1.0 + x / 3.0 + x * x / 9.0) - write_s


def best_interval_s(write_s: float, mtbf_s: float) -> float:
    """The optimum itself: where the derivative of `efficiency` is zero, (1 - tau / mu) e^((tau + w) / mu) = 1.

    Solved by Newton's method in y = tau / mu from Young's value; the left side falls in y > 0. Restart time does not
    move it. O(10) steps.
    """
    if write_s == 0.0:
        return 0.0
    w = write_s / mtbf_s
    y = min(0.9, math.sqrt(2.0 * w))
    for _ in range(100):
        # log(1 - y) + y + w = 0, whose derivative is -y / (1 - y).
        change = (math.log1p(-y) + y + w) * (1.0 - y) / y
        # Half the way to 1 at most: the root lies below it however long the write is.
        following = min(y + change, 0.5 * (1.0 + y))
        if abs(following - y) <= 1e-14 * y:
            break
        y = following
    return y * mtbf_s


def efficiency(interval_s: float, write_s: float, restart_s: float, mtbf_s: float) -> float:
    """The share of the time that goes into work that is kept, in the long run: tau / (mu e^(R / mu) (e^((tau + w) / mu)
    - 1)) (Daly 2006). Exact for failures of constant rate, which may also hit a checkpoint or a restart.

    A checkpoint that becomes safe `P` seconds after training goes on costs what `P` more seconds of restart would:
    add it to `restart_s`.
    """
    if math.isinf(mtbf_s):
        return interval_s / (interval_s + write_s)
    return interval_s / (mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((interval_s + write_s) / mtbf_s))


def expected_ettr(interval_s: float, write_s: float, restart_s: float, mtbf_s: float) -> float:
    """The expected share of effective training time to first order: (1 - (u0 + tau / 2) / mu) / (1 + w / tau), u0 the
    restart (Kokolis et al., HPCA 2025, without their term for queueing). Some 5 % off where failures are frequent."""
    return (1.0 - (restart_s + 0.5 * interval_s) / mtbf_s) / (1.0 + write_s / interval_s)
