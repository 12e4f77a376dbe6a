"""Conformal bands of residuals that come from a few sources of very different size.

Residuals are ln(measured / predicted). A new case is wrong by what was wrong before, with room for it being one case
more: the finite-sample quantile of split conformal prediction (Vovk, Gammerman & Shafer 2005; Lei et al. 2018,
arXiv:1604.04173). Residuals of one source (a publisher's runs on one kind of node) hang together, so that:

- a source counts as its units (rows, or groups of rows), up to `CAP` of them: a table of 200 rows from one machine is
  not 200 machines (weighted conformal prediction, Tibshirani et al. 2019; for whole sources Lee, Barber & Willett 2023,
  arXiv:2306.06342, whose correction by sources needs nine of them for a bound at 90 %);
- a band is judged on sources that it was not built from: `margin` is what a band must be widened by, on either side,
  to hold the rows of a source that was left out (conformalised quantiles, Romano et al. 2019, with folds of sources).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Units of a source beyond these weigh no more than these do; and a kind with fewer has no band of its own.
CAP = 20
# A kind is more than one source's habit.
LEAST_SOURCES = 2


def weights(units: Sequence[Floats]) -> Floats:
    """The weights of the residuals of one source's units, one after the other: a unit's count 1 together, all units of
    the source `CAP` at most."""
    share = min(1.0, CAP / len(units)) if units else 0.0
    return np.concatenate([np.full(len(unit), share / len(unit)) for unit in units]) if units else np.empty(0)


def quantile(sources: Mapping[str, Sequence[Floats]], level: float) -> float:
    """The smallest score such that, with one unit more at infinity, a share `level` of the weight lies at or below it.

    inf where there are too few units for the level: 9 are needed at 90 %. O(n log n).
    """
    assert 0.0 < level < 1.0
    scores = np.concatenate([np.concatenate(units) for units in sources.values()])
    weight = np.concatenate([weights(units) for units in sources.values()])
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(weight[order])
    at = int(np.searchsorted(reached, level * (reached[-1] + 1.0) - 1e-9))
    return float(scores[order][at]) if at < len(scores) else math.inf


def band(sources: Mapping[str, Sequence[Floats]], level: float) -> tuple[float, float]:
    """The central band that holds `level` of the weighted residuals, widened to hold 0: how far predictions of this
    kind are off is known from few sources, and correcting for it is left to calibration."""
    values = np.concatenate([np.concatenate(units) for units in sources.values()])
    weight = np.concatenate([weights(units) for units in sources.values()])
    order = np.argsort(values, kind="stable")
    share = np.cumsum(weight[order]) / weight.sum()
    tail = (1.0 - level) / 2.0
    low = values[order][int(np.searchsorted(share, tail + 1e-9))]
    high = values[order][min(len(values) - 1, int(np.searchsorted(share, 1.0 - tail - 1e-9)))]
    return min(0.0, float(low)), max(0.0, float(high))


def beyond(values: Floats, found: tuple[float, float]) -> Floats:
    """How far residuals lie outside of a band; negative inside."""
    return np.maximum(found[0] - values, values - found[1])
