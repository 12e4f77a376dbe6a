"""Noise: how the time of one and the same work varies from draw to draw."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from clustersim.units import FILE, Fraction, Positive

Floats = NDArray[np.float64]

_NORMAL = NormalDist()

_LARGEST_SIGMA = 2.0


def normal_quantile(u: Floats) -> Floats:
    """The standard normal quantile of probabilities in (0, 1)."""
    return np.fromiter(map(_NORMAL.inv_cdf, u.ravel().tolist()), np.float64, u.size).reshape(u.shape)


def normal_probability(z: Floats) -> Floats:
    """The standard normal distribution function."""
    return np.fromiter(map(_NORMAL.cdf, z.ravel().tolist()), np.float64, z.size).reshape(z.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lognormal:
    """exp(sigma z - sigma^2 / 2), z standard normal: mean 1."""

    __pydantic_config__: ClassVar[Any] = FILE
    kind: Literal["lognormal"] = "lognormal"
    sigma: Annotated[Positive, Field(description="standard deviation over mean, e.g. 0.05")]

    def __post_init__(self) -> None:
        if self.sigma > _LARGEST_SIGMA:
            raise ValueError(
                f"sigma must be at most {_LARGEST_SIGMA:g}: most draws would be next to nothing; e.g. 0.05"
            )

    def quantile(self, u: Floats) -> Floats:
        """The inverse distribution function, for probabilities in (0, 1)."""
        return np.exp(self.sigma * normal_quantile(u) - 0.5 * self.sigma**2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Normal:
    """1 + sigma z, z standard normal, cut off at 0 and scaled back to mean 1."""

    __pydantic_config__: ClassVar[Any] = FILE
    kind: Literal["normal"] = "normal"
    sigma: Annotated[Positive, Field(description="standard deviation over mean, e.g. 0.05")]

    def __post_init__(self) -> None:
        if self.sigma > _LARGEST_SIGMA:
            raise ValueError(f"sigma must be at most {_LARGEST_SIGMA:g}; write e.g. 0.05")

    def quantile(self, u: Floats) -> Floats:
        """The inverse distribution function, for probabilities in (0, 1)."""
        below = _NORMAL.cdf(-1.0 / self.sigma)
        mean = 1.0 + self.sigma * _NORMAL.pdf(1.0 / self.sigma) / (1.0 - below)
        # The largest float below 1 keeps the rounding of the sum inside of the open interval.
        inside = np.clip(below + u * (1.0 - below), 1e-300, np.nextafter(1.0, 0.0))
        return np.maximum(0.0, 1.0 + self.sigma * normal_quantile(inside)) / mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponential:
    """1 - tail + tail * x, x exponential with mean 1: a floor that nothing beats, and a tail of stalls behind it."""

    __pydantic_config__: ClassVar[Any] = FILE
    kind: Literal["exponential"] = "exponential"
    tail: Fraction = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.tail <= 1.0:
            raise ValueError("tail must be more than 0 and at most 1, e.g. 10%")

    def quantile(self, u: Floats) -> Floats:
        """The inverse distribution function, for probabilities in (0, 1)."""
        return 1.0 - self.tail - self.tail * np.log1p(-u)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pareto:
    """(shape - 1) / shape * v^(-1 / shape), v uniform: mean 1, and a power law for the rare long stall."""

    __pydantic_config__: ClassVar[Any] = FILE
    kind: Literal["pareto"] = "pareto"
    shape: Annotated[Positive, Field(description="the exponent of the tail, more than 1, e.g. 4")]

    def __post_init__(self) -> None:
        if self.shape <= 1.0:
            raise ValueError("shape must be more than 1, for the mean to exist; write e.g. 4")

    def quantile(self, u: Floats) -> Floats:
        """The inverse distribution function, for probabilities in (0, 1)."""
        return (self.shape - 1.0) / self.shape * (1.0 - u) ** (-1.0 / self.shape)


# `kind` decides: two members may have the same keys.
Distribution = Annotated[Lognormal | Normal | Exponential | Pareto, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """The `noise:` block of a cluster: what worker ranks compute, and what servers add and step, takes its price times
    a draw of mean 1.

    `every`: an `op` draws anew each time; all ops of a rank in a `step` share one draw; in a `run` a rank has one draw
    for all steps (parts differ). Draws of different ranks are independent.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    seed: int = 0
    every: Literal["op", "step", "run"] = "op"
    worker: Distribution | None = None
    server: Distribution | None = None

    def __post_init__(self) -> None:
        if self.worker is None and self.server is None:
            raise ValueError("names neither worker nor server; write e.g. worker: {kind: lognormal, sigma: 0.05}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, but is {self.seed}")
