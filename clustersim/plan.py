"""A plan: the chosen layout with every choice written out, what it was chosen from, and what is predicted of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from clustersim.hardware.device import Price
from clustersim.hardware.framework import Framework
from clustersim.hardware.intervals import Outside
from clustersim.layout.layout import Family, Layout
from clustersim.scenario.scenario import Scenario
from clustersim.workload.training import Workload

PLAIN: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What one step of a layout takes and costs. `low_s` and `high_s` bound the step time (90 %, from the residuals of
    runs of this `kind`); `outside`: in what it leaves the profiles and those runs. `memory_bytes` is the
    fullest worker's, `server_memory_bytes` the fullest server's (0 without servers). `mfu` counts model FLOPs only, the
    scores that a causal mask discards among them (as PaLM and Megatron-LM do); `mfu_masked` leaves these out.
    `input_stall_s`: seconds in which a step waits for its batch and for nothing else."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    source: Literal["estimated", "simulated"]
    step_s: float
    low_s: float
    high_s: float
    compute_s: float
    bubble_s: float
    exposed_communication_s: float
    tokens_per_s: float
    mfu: float
    memory_bytes: float
    server_memory_bytes: float
    usd_per_step: float | None
    usd_per_billion_tokens: float | None
    energy_j: float
    coverage: float
    mfu_masked: float = 0.0
    input_stall_s: float = 0.0
    kind: str = ""
    outside: tuple[Outside, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One layout of the ranking. `bottleneck` names the resource that limits it, with its utilisation; `network_link`
    the busiest network link, and `network_bytes` what one such link carries in a step."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    layout: Layout
    family: Family
    estimated_s: float
    prediction: Prediction
    bottleneck: str
    network_link: str
    network_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many layouts were legal, fitted, and were simulated. `distinct` counts feasible ones that differ in
    (dp, tp, pp, micro-batch, recompute, virtual stages, family); `infeasible` gives the reason of the others."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    legal: int
    feasible: int
    distinct: int
    simulated: int
    infeasible: dict[str, int]
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """Why the winner beats the best of another family: `slower_s` a step, and in words with figures. `tie`: whether the
    model can tell the two apart."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    family: Family
    slower_s: float
    reason: str
    crossover: str
    tie: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """What a better resource would buy: the step time when `resource` gets 10 % faster. `told`: whether that is more
    than runs of one configuration differ by."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    resource: str
    gain: float
    told: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIfResult:
    """One what-if entry, planned again. `layout` and `step_s` are None where nothing fits any more. `told`: whether the
    step time changes by more than the model can tell."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    name: str
    set: dict[str, Any]
    layout: Layout | None
    step_s: float | None
    usd_per_billion_tokens: float | None
    change: str
    told: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRun:
    """All steps that training.tokens take, by the best layout: steps alone, without failures, checkpoints and
    evaluation. `low_days` and `high_days` bound them as the step's interval does; `usd` is counted with `prices`, by
    the profile that has them (of one device, or of one host)."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    tokens: float
    steps: int
    days: float
    low_days: float
    high_days: float
    deadline_days: float | None
    usd: float | None
    prices: dict[str, Price]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """What the plan needs to run: worker nodes and the devices of each, by profile name, and server hosts."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    nodes: dict[str, int]
    devices_per_node: int
    device: str
    device_kind: Literal["gpu", "cpu"]
    servers: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`plan.json`. `layout` is `ranking[0].layout`; `program_digest` is that of its program, which `run` lowers again.
    `digests` are of every profile that the predictions used. The first `tied` of the ranking are within `ratio` (of a
    logarithm) of the winner: the model does not tell them apart (90 %)."""

    __pydantic_config__: ClassVar[Any] = PLAIN
    schema_version: Literal[1] = 1
    clustersim: str
    scenario: Scenario
    workload: Workload
    framework: Framework
    machines: Machines
    layout: Layout
    program_digest: str
    prediction: Prediction
    ranking: tuple[Candidate, ...]
    best_of_family: tuple[Candidate, ...]
    pareto: tuple[Candidate, ...]
    against: tuple[Against, ...]
    levers: tuple[Lever, ...]
    counts: Counts
    what_if: tuple[WhatIfResult, ...] = ()
    whole_run: WholeRun | None = None
    ratio: float = 0.0
    tied: int = 1
    digests: dict[str, str] = field(default_factory=dict)
