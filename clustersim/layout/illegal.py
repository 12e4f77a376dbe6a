"""Why no layout is legal: the key of `layout:` to blame, the equation that it breaks, and the nearest values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np

from clustersim.cluster.cluster import Cluster
from clustersim.hardware.framework import Framework
from clustersim.layout.choices import Choices, LayoutSpec
from clustersim.layout.divisions import MOST_MICRO_BATCHES, RECOMPUTES, SCHEDULES
from clustersim.layout.space import Space, layouts
from clustersim.workload.training import Workload

_AXES = ("dp", "cp", "tp", "pp")
_NUMBERS = (*_AXES, "ep", "micro_batch", "virtual_stages", "sequence_parallel")


def why_illegal(workload: Workload, cluster: Cluster, framework: Framework, choices: Choices) -> tuple[str, str] | None:
    """The key of `layout:` without which there are legal layouts, and in words why, with the nearest values that have
    some; None where no single key is to blame. A key that is wrong by itself goes before one that others contradict.

    For choices that leave no layout at all. Enumerates the space once or twice for every key that is set.
    """
    # Families are the search's as well as the layout's; they stay as they are.
    named = [f.name for f in fields(LayoutSpec) if f.name != "sync" and getattr(choices, f.name) is not None]

    def with_only(keys: Iterable[str]) -> Space:
        dropped: dict[str, Any] = dict.fromkeys(set(named) - set(keys))
        return layouts(workload, cluster, framework, replace(choices, **dropped))

    def without(key: str) -> Space:
        return with_only(other for other in named if other != key)

    free = with_only(())
    if not len(free):
        return None
    for key in named:
        if not len(with_only([key])):
            rest = without(key)
            return key, _told(key, rest if len(rest) else free, workload, cluster, choices, ())
    for key in named:
        rest = without(key)
        if len(rest):
            others = tuple(other for other in named if other != key)
            return key, _told(key, rest, workload, cluster, choices, others)
    return None


def _told(
    key: str, legal: Space, workload: Workload, cluster: Cluster, choices: Choices, others: tuple[str, ...]
) -> str:
    value = getattr(choices, key)
    beside = "".join(f", {other}: {_text(getattr(choices, other))}" for other in others)
    why = _equation(key, value, workload, cluster, choices, others) or (
        f"no legal layout has it beside{beside[1:]}" if beside else "no legal layout has it"
    )
    if key in ("servers", "placement"):
        hosts = choices.most_servers
        return (
            f"{value}: cluster.servers has {hosts} hosts; write {'colocated' if key == 'placement' else hosts}, or "
            "more hosts there, e.g. {cpu-server-200g: 4}"
        )
    mend = " or ".join(_nearest(key, value, legal)) or "another value"
    return f"{_text(value)}: {why}; write {mend}, or leave it out"


def _nearest(key: str, value: Any, legal: Space) -> list[str]:
    """The legal values of a key that are next to `value`; all of a key that has few; none where they are no column."""
    if key in ("recompute", "schedule"):
        names = RECOMPUTES if key == "recompute" else SCHEDULES
        return [names[index] for index in np.unique(getattr(legal.divisions, key)[legal.division])]
    if key not in _NUMBERS:
        return []
    column = np.unique(getattr(legal.divisions, key)[legal.division])
    below, above = column[column < value], column[column > value]
    return [_text(one) for one in (*below[-1:].tolist(), *above[:1].tolist())]


def _equation(
    key: str, value: Any, workload: Workload, cluster: Cluster, choices: Choices, others: tuple[str, ...]
) -> str:
    """The equation that `value` breaks, by itself or beside the `others`; nothing where it is none of those known."""
    model, batch = workload.model, workload.training.global_batch
    if key == "tp":
        ffn = model.experts.hidden if model.experts else model.ffn_hidden
        for number, what in ((model.heads, "heads"), (ffn, "feed-forward columns")):
            if number % value != 0:
                return f"{number} {what} of {model.name} % tp {value} = {number % value}, not 0"
        if not model.splits_over(value):
            return f"the {model.kv_heads} K/V heads of {model.name} and tp = {value}: neither divides the other"
    if key == "pp" and value > model.layers:
        return f"{model.name} has {model.layers} layers, fewer than stages"
    if key in _AXES:
        axes = [(axis, getattr(choices, axis)) for axis in _AXES if axis == key or axis in others]
        product = math.prod(size for _, size in axes if size is not None)
        spelled = " * ".join(f"{axis} {size}" for axis, size in axes if size is not None)
        if cluster.devices % product != 0:
            return f"{cluster.devices} devices % ({spelled}) = {cluster.devices % product}, not 0"
        if len(axes) == len(_AXES) and product != cluster.devices and None not in dict(axes).values():
            return f"{spelled} = {product} ranks, and the cluster has {cluster.devices} devices"
    if key == "dp" and choices.micro_batch is None and batch % value != 0:
        return f"global_batch {batch} % dp {value} = {batch % value}, not 0"
    if key in ("dp", "micro_batch"):
        dp = value if key == "dp" else (choices.dp or 1)
        size = choices.micro_batch or 1
        if -(-batch // dp) > size * MOST_MICRO_BATCHES:
            return f"global_batch {batch} makes more than {MOST_MICRO_BATCHES} micro-batches a step on each replica"
        if -(-batch // dp) < size or batch < dp:
            return f"global_batch {batch} has fewer samples than dp {dp} * micro_batch {size}"
    chunks = (choices.pp or 1) * (choices.virtual_stages or 1)
    if key in ("pp", "virtual_stages") and choices.pp is not None and model.layers % chunks != 0:
        return (
            f"{model.layers} layers of {model.name} % (pp {choices.pp} * virtual_stages {choices.virtual_stages or 1}) "
            f"= {model.layers % chunks}, not 0"
        )
    return ""


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
