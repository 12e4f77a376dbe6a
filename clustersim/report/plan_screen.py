"""What `clustersim plan` says: one screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clustersim.layout.layout import Family, describe
from clustersim.plan import Candidate, Counts, Plan, Prediction, WholeRun
from clustersim.report.figures import counted, decimals, fixed, percent, signed_percent, supported, with_interval
from clustersim.units import human_bytes, human_days, human_seconds

_FAMILY: dict[Family, str] = {
    "allreduce": "allreduce", "sharded": "sharded", "parameter-server": "parameter server",
}  # fmt: skip


def plan_screen(plan: Plan, *, top: int = 3, saved: Path | None = None) -> Group:
    """What was asked, what was looked at, the best few and the best of each family, why, and what to do next."""
    parts: list[RenderableType] = [asked(plan), Text(looked_at(plan.counts)), Text(), ranking(plan, top), Text()]
    parts += [_paragraph(line) for line in whole_run(plan)]
    parts += [_paragraph(line) for line in why(plan)]
    if plan.levers:
        parts.append(_paragraph(levers(plan)))
    if plan.what_if:
        parts += [Text(), Text("What if", style="bold"), what_ifs(plan)]
    parts += [Text(), _paragraph(next_steps(plan, saved))]
    return Group(*parts)


def _paragraph(line: str) -> Padding:
    return Padding(Text(line), (0, 0))


def asked(plan: Plan) -> Text:
    """The question, in two lines."""
    training, machines = plan.workload.training, plan.machines
    nodes = " + ".join(f"{count} x {name}" for name, count in machines.nodes.items())
    servers = ", ".join(f"{_hosts(spec)} x {name} as servers" for name, spec in plan.scenario.cluster.servers.items())
    devices = sum(machines.nodes.values()) * machines.devices_per_node
    noun = {"gpu": "GPUs", "cpu": "CPU ranks"}[machines.device_kind]
    first = (
        f"{plan.workload.model.name}, batch {training.global_batch} x {training.sequence} tokens, "
        f"{training.precision}, {training.optimizer}, {plan.framework.name}"
    )
    storage = ", ".join(f"{_hosts(spec)} x {name}" for name, spec in plan.scenario.cluster.storage.items())
    second = f"{nodes} ({devices} {noun})" + "".join(f", {hosts}" for hosts in (servers, storage) if hosts)
    goal = {"step_time": "fastest step", "usd": "cheapest token"}[plan.scenario.objective]
    limits = []
    if plan.scenario.constraints.memory_headroom:
        limits.append(f"{plan.scenario.constraints.memory_headroom:.0%} of memory free")
    if plan.scenario.constraints.deadline_s is not None:
        limits.append(f"within {human_days(plan.scenario.constraints.deadline_s)}")
    return Text.assemble(
        (plan.scenario.name, "bold"), f": {first}\n{second}; wanted: {goal}", "; " if limits else "", ", ".join(limits)
    )


def looked_at(counts: Counts) -> str:
    """How many layouts were legal, fitted, were simulated, and in what time; and why the others did not fit."""
    line = (
        f"{counts.legal:,} layouts are legal, {counts.feasible:,} fit ({counts.distinct:,} without bucket sizes), "
        f"{counts.simulated} simulated, in {human_seconds(counts.wall_s)}"
    )
    worst = sorted(counts.infeasible.items(), key=lambda item: -item[1])[:2]
    told = ", ".join(f"{number:,} by {reason}" for reason, number in worst if number)
    return f"{line}\nleft out: {told}" if told else line


def ranking(plan: Plan, top: int) -> Table:
    """The best `top` layouts and the best of each family, as a table."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", show_edge=False, pad_edge=False)
    table.add_column("")
    table.add_column("layout", overflow="fold", ratio=1)
    for name in ("step", "to best", "tokens/s", "MFU", "memory", "exposed", "$/1e9 tok"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = list(plan.ranking[:top])
    least = _score(plan, plan.ranking[0])
    for number, candidate in enumerate(shown, start=1):
        row = _row(plan, candidate, _score(plan, candidate) / least, tie=number <= plan.tied)
        table.add_row(str(number), *row, style="bold" if number == 1 else "")
    others = [best for best in plan.best_of_family if best.layout not in [candidate.layout for candidate in shown]]
    if others:
        table.add_section()
    for best in sorted(others, key=lambda candidate: _score(plan, candidate)):
        place = next((n for n, other in enumerate(plan.ranking, start=1) if other.layout == best.layout), None)
        tie = place is not None and place <= plan.tied
        row = _row(plan, best, _score(plan, best) / least, tie=tie)
        table.add_row(str(place) if place is not None else "-", *row)
    return table


def _score(plan: Plan, candidate: Candidate) -> float:
    """What the scenario minimises, of one candidate."""
    found = candidate.prediction
    return found.usd_per_step or found.step_s if plan.scenario.objective == "usd" else found.step_s


def _row(plan: Plan, candidate: Candidate, ratio: float, *, tie: bool) -> tuple[str, ...]:
    # The interval is of the time itself. What two layouts have in common cancels between them, so that their ratio is
    # known better, and stands beside it.
    found = candidate.prediction
    relative = relative_uncertainty(found)
    price = found.usd_per_billion_tokens
    sign = "" if found.source == "simulated" else " (estimated)"
    return (
        describe(candidate.layout, plan.workload.model.layers) + sign,
        with_interval(found.step_s, found.low_s, found.high_s),
        "" if ratio == 1.0 else f"{'tie ' if tie else ''}{signed_percent(ratio - 1.0)}",
        counted(float(supported(found.tokens_per_s, relative).replace(",", ""))),
        percent(found.mfu),
        human_bytes(found.memory_bytes),
        human_seconds(found.exposed_communication_s),
        "-" if price is None else f"${supported(price, relative)}",
    )


def relative_uncertainty(found: Prediction) -> float:
    """Half the interval of a prediction, over it."""
    return (found.high_s - found.low_s) / 2.0 / found.step_s if found.step_s > 0.0 else 0.0


def whole_run(plan: Plan) -> list[str]:
    """What all steps of the training take and cost by the first layout, against the deadline, and at which prices."""
    found = plan.whole_run
    if found is None:
        return []
    line = (
        f"Whole run of the first: {counted(found.tokens)} tokens in {found.steps:,} steps, {_long(found)} without "
        "failures, checkpoints and evaluation"
    )
    if found.deadline_days is not None:
        deadline = human_days(found.deadline_days * 86400.0)
        if found.days > found.deadline_days:
            line += f": more than the {deadline} of the deadline, which its estimate kept"
        elif found.high_days > found.deadline_days:
            line += f", within the deadline of {deadline}, beyond which the interval reaches"
        else:
            line += f", within the deadline of {deadline}"
    if found.usd is None:
        return [f"{line}; dollars: not known, for a profile has no price."]
    noun = {"gpu": "GPU", "cpu": "CPU rank"}[plan.machines.device_kind]
    prices = " and ".join(
        f"${price.hourly_usd_per_hour:.4g} an hour for each {noun if name == plan.machines.device else name} "
        f"(profile {name}: {price.source}, {price.date})"
        for name, price in sorted(found.prices.items(), key=lambda item: item[0] != plan.machines.device)
    )
    return [f"{line}; ${supported(found.usd, relative_uncertainty(plan.prediction))} at {prices}."]


def _long(found: WholeRun) -> str:
    """The days of a whole run with their interval, in the largest unit of which it takes two."""
    units = (("days", 1.0), ("h", 24.0), ("min", 1440.0), ("s", 86400.0))
    unit, scale = next((unit for unit in units if found.days * unit[1] >= 2.0), units[-1])
    places = decimals((found.high_days - found.low_days) / 2.0 * scale)
    middle, least, most = (fixed(days * scale, places) for days in (found.days, found.low_days, found.high_days))
    return f"{middle} ({least}-{most}) {unit}"


def why(plan: Plan) -> list[str]:
    """Why the first of the ranking is first: what limits it, and how it stands against the other families."""
    best = plan.ranking[0]
    found = best.prediction
    shares = ", ".join(
        f"{name} {percent(seconds / found.step_s)}"
        for name, seconds in (
            ("compute", found.compute_s),
            ("pipeline bubble", found.bubble_s),
            ("exposed communication", found.exposed_communication_s),
            ("waiting for input", found.input_stall_s),
        )
        if name != "waiting for input" or seconds > 0.0
    )
    memory = f"{human_bytes(found.memory_bytes)} on the fullest worker"
    if found.server_memory_bytes:
        memory += f", {human_bytes(found.server_memory_bytes)} on the fullest server"
    lines = [
        f"Best: {describe(best.layout, plan.workload.model.layers)}. Its step is {shares}; limited by "
        f"{best.bottleneck}; {memory}; {percent(found.coverage)} of the kernel time is from measured tables."
    ]
    lines += [sureness(found), *ties(plan), *_masked(found)]
    lines += _input_binds(plan, best)
    for other in plan.against:
        crossover = f" {_sentence(other.crossover)}" if other.crossover else ""
        lines.append(f"{_sentence(other.reason)}{crossover}")
    return lines


def sureness(found: Prediction) -> str:
    """The interval of a step time, whose residuals it is from, and in what the prediction leaves what is covered."""
    line = f"90 % interval {with_interval(found.step_s, found.low_s, found.high_s)}"
    if found.kind:
        line += f", from the errors of validated runs ({found.kind})"
    if found.outside:
        line += f". Outside of what is covered: {'; '.join(found.outside)}"
    return f"{line}."


def ties(plan: Plan) -> list[str]:
    """Which layouts the model cannot tell from the winner: by what pairs of layouts were off, not by their intervals,
    for most of an error is shared by all layouts of a cluster."""
    if plan.ratio <= 0.0:
        return []
    apart = f"±{percent(math.expm1(plan.ratio))}"
    if plan.tied == 1:
        return [f"No tie: all others are further off than {apart}."] if len(plan.ranking) > 1 else []
    others = "layouts 1 and 2 are" if plan.tied == 2 else f"layouts 1 to {plan.tied} are"
    return [f"Tie: {others} closer than the model can tell apart ({apart}); the first is predicted best."]


def _masked(found: Prediction) -> list[str]:
    """How MFU counts attention, where that makes a difference: with long sequences."""
    if found.mfu_masked > 0.9 * found.mfu or found.mfu_masked == 0.0:
        return []
    return [
        "MFU counts the scores that the causal mask discards, as PaLM and Megatron-LM do; without them the first has "
        f"{percent(found.mfu_masked)}."
    ]


def _input_binds(plan: Plan, best: Candidate) -> list[str]:
    """A warning where the step waits for its input, with what would do."""
    found, data = best.prediction, plan.workload.data
    if data is None or found.input_stall_s < 0.005 * found.step_s:
        return []
    size = plan.workload.training.global_batch * data.sample_bytes * (1.0 - data.cache)
    wanted = size / (found.step_s - found.input_stall_s)
    limit = best.bottleneck.rsplit(" ", 1)[0]
    mend = {
        "readers": "more readers, a shorter decode, or faster storage", "drives": "more or faster storage hosts",
        "storage out": "faster cards in the storage hosts, or more of them",
    }.get(limit, "more storage, or a larger cache")  # fmt: skip
    return [
        f"Input binds: a step waits {human_seconds(found.input_stall_s)} for its {human_bytes(size)}, which come at "
        f"{human_bytes(size / found.step_s)}/s; {human_bytes(wanted)}/s would keep up. What helps: {mend}."
    ]


def _sentence(text: str) -> str:
    text = f"PS{text[2:]}" if text.startswith("ps ") else text[:1].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


def levers(plan: Plan) -> str:
    """What ten per cent more of each resource buys, best first."""
    best = sorted(plan.levers, key=lambda lever: -lever.gain)
    told = ", ".join(f"{lever.resource} {percent(lever.gain)}" for lever in best[:4] if lever.told)
    other = ", ".join(f"{lever.resource} {percent(lever.gain)}" for lever in best[:4] if not lever.told)
    parts = [f"10 % more of it shortens the step by: {told}"] if told else []
    parts += [f"10 % more buys less than runs of one layout differ by: {other}"] if other else []
    return f"Levers: {'; '.join(parts)}."


def what_ifs(plan: Plan) -> Table:
    """One line for each what-if entry."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("name")
    table.add_column("change", overflow="fold", ratio=1)
    for entry in plan.what_if:
        table.add_row(entry.name, entry.change)
    return table


def next_steps(plan: Plan, saved: Path | None) -> str:
    """Where the plan went and what to type next."""
    if saved is None:
        return f"Keep it: clustersim plan {plan.scenario.name} -o plan.json"
    if plan.machines.device_kind == "cpu":
        return f"Plan written to {saved}. Next: clustersim run {saved}"
    return f"Plan written to {saved}. Next: clustersim simulate {saved} --trace trace.json (open it in ui.perfetto.dev)"


def family_table(candidates: Sequence[Candidate]) -> list[tuple[str, Candidate]]:
    """Candidates with the words for their family, for pictures."""
    return [(_FAMILY[candidate.family], candidate) for candidate in candidates]


def _hosts(spec: object) -> str:
    """The count or range of a `servers:` entry, as its author wrote it."""
    return str(spec.get("count") if isinstance(spec, dict) else spec)
