"""Reliability: what fails how often, and what a training job does about it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from clustersim.files import load, profile_path
from clustersim.hardware.provenance import Provenance
from clustersim.units import FILE, Bytes, BytesPerS, Positive, Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Hazard:
    """A cause of failures, as it was counted: so many `failures` in an `exposure` of one component.

    A `node` is a worker node with all in it, a `device` one of its devices, a `server` a host that only serves
    parameters. 6.5 failures in 1000 node-days are `{component: node, failures: 6.5, exposure: 1000d}`. `shape` is that
    of a Weibull distribution of the times between failures of one component: 1 is a constant rate, less than 1 fails
    early. `replace`: whether the node is out of use until it is repaired, as opposed to a crash of software.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    cause: str = "any"
    component: Literal["node", "device", "server"]
    failures: Positive
    exposure_s: Seconds
    shape: Positive = 1.0
    replace: bool = True

    def __post_init__(self) -> None:
        if self.exposure_s <= 0.0:
            raise ValueError("exposure must be more than 0; write e.g. 1000d")

    @property
    def rate_per_s(self) -> float:
        """Failures of one component per second."""
        return self.failures / self.exposure_s


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureProfile:
    """Failures as some cluster had them: `hwprofiles/reliability/<name>.yaml`."""

    __pydantic_config__: ClassVar[Any] = FILE
    schema_version: Literal[1] = 1
    name: str
    hazards: tuple[Hazard, ...]
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """How the state of the training is kept: `interval` of training between two checkpoints (default: Daly's optimum),
    and what writing one takes.

    The bytes follow from model, precision and optimizer, unless `bytes_per_parameter` says otherwise; all nodes write,
    at `node_rate` each (default: their NICs), into a storage of `storage_rate`. `write` and `load` give the times
    themselves instead. A `sync` checkpoint keeps training waiting until it is written; an `async` one for the `pause`
    that copies it to host memory (default: over PCIe), and is safe only when it is written: a failure before that falls
    back on the one before it.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    mode: Literal["sync", "async"] = "sync"
    interval_s: Seconds | None = None
    bytes_per_parameter_bytes: Bytes | None = None
    storage_rate_bytes_per_s: BytesPerS | None = None
    node_rate_bytes_per_s: BytesPerS | None = None
    write_s: Seconds | None = None
    load_s: Seconds | None = None
    pause_s: Seconds | None = None

    def __post_init__(self) -> None:
        if self.write_s is None and self.storage_rate_bytes_per_s is None:
            raise ValueError("needs storage_rate (e.g. 100GB/s), or write, how long one checkpoint takes (e.g. 30s)")
        if self.write_s is not None:
            for name in ("storage_rate", "node_rate"):
                if getattr(self, f"{name}_bytes_per_s") is not None and self.load_s is not None:
                    raise ValueError(f"{name} decides nothing where write and load are given; remove it")
        if self.mode == "sync" and self.pause_s is not None:
            raise ValueError("pause belongs to mode: async; a synchronous checkpoint pauses while it is written")
        if self.interval_s is not None and self.interval_s <= 0.0:
            raise ValueError("interval must be more than 0; write e.g. 30min, or leave it out for the optimum")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Interruptions that are announced: every so often all stops after a checkpoint, for so long."""

    __pydantic_config__: ClassVar[Any] = FILE
    every_s: Seconds
    lasts_s: Seconds

    def __post_init__(self) -> None:
        if self.every_s <= self.lasts_s:
            raise ValueError("every must be longer than lasts, or nothing is ever trained")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """The `reliability:` block of a scenario: failures in time, and how a job comes back.

    `failures`: profiles by name, hazards written out, or both in a list. From a failure to the first new step pass
    `detection` (a watchdog's timeout, where nothing else notices), `reschedule` (new processes on healthy nodes, their
    start and connections), and the loading of the last checkpoint. A node that is lost comes back after `repair`;
    `spares` nodes stand by; without any the job waits, or, if it is `elastic`, goes on with fewer data-parallel
    replicas until nodes come back. Without `repair` there is always another node. `server_replicas` further servers
    hold a copy of what each parameter server holds.
    """

    __pydantic_config__: ClassVar[Any] = FILE
    failures: str | Hazard | tuple[str | Hazard, ...]
    detection_s: Seconds
    reschedule_s: Seconds
    checkpoint: Checkpoints
    repair_s: Seconds | None = None
    spares: int = 0
    elastic: bool = False
    planned: Planned | None = None
    server_replicas: int = 0

    def __post_init__(self) -> None:
        for name in ("spares", "server_replicas"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("spares", "elastic"):
            if getattr(self, name) and self.repair_s is None:
                raise ValueError(f"{name} needs repair, how long a lost node stays away (e.g. 12h)")
        if self.failures == ():
            raise ValueError("failures names none; write e.g. failures: rsc-1")

    @property
    def names(self) -> tuple[str, ...]:
        """The profiles that `failures` names."""
        return tuple(item for item in self._items if isinstance(item, str))

    @property
    def _items(self) -> tuple[str | Hazard, ...]:
        return self.failures if isinstance(self.failures, tuple) else (self.failures,)

    def hazards(self) -> Iterator[Hazard]:
        """Every hazard, those of profiles among them. Reads profile files; ProfileError on a bad name."""
        for item in self._items:
            if isinstance(item, str):
                yield from load_failures(item).hazards
            else:
                yield item


def load_failures(name: str) -> FailureProfile:
    """The reliability profile `name`; ProfileError with the known names where there is none. Cached."""
    return _profile(str(profile_path("reliability", name).resolve()))


@functools.cache
def _profile(path: str) -> FailureProfile:
    profile: FailureProfile = load(FailureProfile, path)
    return profile
