"""Predictions of one source's rows with the constants of a framework fitted to the rows of all other sources."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from clustersim.calibrate.constants import STEP_PRIORS
from clustersim.calibrate.steps import Step, fit_steps, simulated_s
from clustersim.hardware.calibration import ConstantName
from clustersim.hardware.framework import Framework
from clustersim.hardware.load import load_framework
from clustersim.validate.calibrated import Constant, constants_of, scored_both, step_of
from clustersim.validate.case import Case
from clustersim.validate.configurations import spread_out
from clustersim.validate.family import Family, Rows
from clustersim.validate.scoreboard import Summary, summary

# Rows of each other source that are fitted to: a source with many has no more say than one with few.
_ROWS_EACH = 8
# Host times of a framework whose profile learned them from rows start from those of an eager process of torch, which
# nobody measured: of the right order, no more.
_UNLEARNED = "clustersim"
_UNLEARNED_WIDTH = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """The rows of one source under frameworks of one kind: as shipped, and with constants fitted to `fitted` rows of
    the `others`, which nothing of this source went into."""

    source: str
    families: tuple[str, ...]
    frameworks: tuple[str, ...]
    others: tuple[str, ...]
    fitted: int
    shipped: Summary
    left_out: Summary
    constants: tuple[Constant, ...]


def leave_sources_out(sets: Sequence[tuple[Rows, Family | None]], tell: Callable[[str], None]) -> tuple[LeftOut, ...]:
    """Every source left out in turn, among the sources that ran frameworks with the same learned constants."""
    kinds: dict[str, dict[str, list[tuple[str, Case]]]] = defaultdict(lambda: defaultdict(list))
    for rows, family in sets:
        source = rows.name if family is None else family.source.split(",")[0]
        for case in rows.cases:
            kinds[_kind(load_framework(case.scenario["framework"]))][source].append((rows.name, case))
    found = []
    for sources in kinds.values():
        if len(sources) < 2:
            continue
        steps = {source: _few([case for _, case in cases]) for source, cases in sources.items()}
        for source, cases in sources.items():
            tell(f"{source}: left out of the fit")
            one = _left_out(source, cases, {name: some for name, some in steps.items() if name != source})
            if one is not None:
                found.append(one)
    return tuple(found)


def _kind(framework: Framework) -> str:
    """Frameworks whose host times were learned from the same rows are of one kind."""
    host = framework.calibrated.get("host")
    return host.source if host is not None and host.method == "fitted" else framework.name


def _few(cases: Sequence[Case]) -> list[tuple[Step, float]]:
    """The rows of a source that others are fitted to, each with its simulated seconds before anything is."""
    steps = [step for case in cases if isinstance(step := step_of(case), Step)]
    few = [_unlearned(steps[index]) for index in spread_out(steps, _ROWS_EACH)] if steps else []
    return [(step, simulated_s(step, step.framework)) for step in few]


def _unlearned(step: Step) -> Step:
    """Its framework as before it learned anything."""
    return replace(step, framework=before_learning(step.framework))


def before_learning(framework: Framework) -> Framework:
    """A framework without the host times that its profile took from rows."""
    host = framework.calibrated.get("host")
    if host is None or host.method != "fitted":
        return framework
    plain = load_framework(_UNLEARNED).host
    layer = {"per_layer_forward_s": plain.per_layer_forward_s, "per_layer_backward_s": plain.per_layer_backward_s}
    return replace(framework, host=replace(framework.host, **layer))


def _left_out(
    source: str, cases: Sequence[tuple[str, Case]], others: Mapping[str, Sequence[tuple[Step, float]]]
) -> LeftOut | None:
    pairs = [pair for some in others.values() for pair in some]
    if not pairs:
        return None
    priors: dict[ConstantName, float] = {
        name: _UNLEARNED_WIDTH if name.startswith("host.per_layer") else width for name, width in STEP_PRIORS.items()
    }
    fit = fit_steps([step for step, _ in pairs], priors, shipped_s=[seconds for _, seconds in pairs], rounds=1)
    shipped, left_out = scored_both((case, lambda one: fit.change(before_learning(one))) for _, case in cases)
    if not shipped:
        return None
    return LeftOut(
        source=source,
        families=tuple(dict.fromkeys(name for name, _ in cases)),
        frameworks=tuple(sorted({case.scenario["framework"] for _, case in cases})),
        others=tuple(name for name, some in others.items() if some),
        fitted=len(pairs),
        shipped=summary(shipped),
        left_out=summary(left_out),
        constants=constants_of(fit),
    )
