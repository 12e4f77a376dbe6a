"""`plan` and `simulate`: the commands that decide and predict. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clustersim.app import screen
from clustersim.errors import InputError, NoFeasibleLayout, UsageError

if TYPE_CHECKING:
    from clustersim.plan import Plan
    from clustersim.scenario.question import Question
    from clustersim.simulate.simulate import Simulated
    from clustersim.timeline import Timeline


def add_to(app: typer.Typer) -> None:
    """Add this file's commands to `app`."""
    app.command("plan")(plan_command)
    app.command("simulate")(simulate_command)


def plan_command(
    scenario: Annotated[str, typer.Argument(help="A scenario file, or the name of a built-in scenario.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the plan goes; default: <scenario>.plan.json here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, and write no file unasked.")] = False,
    top: Annotated[int, typer.Option("--top", min=1, help="How many of the best layouts to show.")] = 5,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write the best layout's Chrome trace here (ui.perfetto.dev).")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw the best of each family here (.svg, .png).")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes that simulate; default: one a core.")
    ] = None,
) -> None:
    """Find the layout that trains a model fastest (or cheapest) on a cluster, and say why."""
    from clustersim import files
    from clustersim.scenario.load import load_scenario

    if picture is not None:
        from clustersim.report import drawing

        drawing.check(picture)
    if output is not None:
        output = _plan_file(output)
    files.check_writable(output, trace, picture)
    question = load_scenario(scenario)
    found = _planned(question, scenario, workers)
    saved = _save_plan(found, scenario, output, unasked=not as_json)
    if trace is not None:
        result, timeline = simulated(found, question)
        write_trace(trace, timeline, simulated=result)
    if picture is not None:
        from clustersim.report import plan_picture

        drawing.write(plan_picture.picture(found), picture)
    if as_json:
        screen.show_json(files.plain(found))
        return
    from clustersim.report.plan_screen import plan_screen

    screen.show(plan_screen(found, top=top, saved=saved))


def _planned(question: Question, scenario: str, workers: int | None = None) -> Plan:
    """The plan of a scenario; where no layout is legal, the error names the line of the key to blame."""
    from clustersim import files
    from clustersim.search.search import make_plan
    from clustersim.search.whole_run import beyond_deadline, whole_run

    try:
        found = make_plan(question, progress=screen.progress(), workers=workers)
        return replace(found, whole_run=whole_run(question, found.layout, found.prediction))
    except NoFeasibleLayout as error:
        if not error.path:
            fastest = beyond_deadline(question)
            if fastest is None:
                raise
            raise NoFeasibleLayout(f"{error}; {fastest}") from None
        where = files.scenario_path(scenario)
        _, places = files.read_tree(where)
        about = str(error).removeprefix(f"{'.'.join(error.path)}: ")
        raise NoFeasibleLayout(files.located(str(where), places, error.path, about)) from None


def _plan_file(output: Path) -> Path:
    """Where -o puts a plan: a .json file, by which every command knows a plan; or a device or a pipe as given."""
    if output.exists() and not output.is_file() and not output.is_dir():
        return output
    if output.suffix in ("", ".json") and output.name not in ("", "-"):
        return output.with_suffix(".json")
    raise UsageError(f"-o {output}: a plan is a .json file; write e.g. -o plan.json, or --json to print it")


def _save_plan(found: Plan, scenario: str, output: Path | None, *, unasked: bool) -> Path | None:
    """Where the plan was written, if it can be read there. Nobody asked for the default file: a folder without write
    access is no error."""
    from clustersim import files

    if output is not None:
        files.write_text(output, files.json_text(found))
        return output if output.is_file() else None
    if not unasked:
        return None
    default = Path(f"{Path(scenario).stem}.plan.json")
    try:
        files.save(found, default)
    except InputError:
        return None
    return default


def simulate_command(
    what: Annotated[
        str, typer.Argument(metavar="SCENARIO|PLAN", help="A plan.json, a scenario file, or a built-in scenario.")
    ],
    steps: Annotated[int, typer.Option("--steps", min=1, max=100_000, help="Training steps to simulate.")] = 1,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write a Chrome trace here (open it in ui.perfetto.dev).")
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="One class for ranks that behave alike, or every rank by itself.")
    ] = True,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, max=2**53, help="Of the noise and of the failures; default: the scenario's, 0."),
    ] = None,
    days: Annotated[
        float | None, typer.Option("--days", help="Train for so many days with the failures of reliability:.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, max=1_000_000, help="With --days: how many runs; default: 200.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Simulate one layout: that of a plan, or the best of a scenario; where its time goes, link by link.

    With --days, what checkpoints, failures and restarts leave of many days of it.
    """
    from clustersim import files
    from clustersim.report.simulate_screen import simulate_screen

    if days is not None and not 0.0 < days <= 36500.0:
        raise UsageError(f"--days {days:g}: write a number of days of more than 0 and at most 36500, e.g. 54")
    if days is None and seeds is not None:
        raise UsageError("--seeds counts the runs of --days; give both, e.g. --days 54")
    if days is not None and trace is not None:
        raise UsageError("--trace shows steps, not days; leave out --days or --trace")
    if days is not None and not fold:
        raise UsageError(
            "--no-fold simulates every rank of a step, and --days takes steps as given; leave out one of them"
        )
    files.check_writable(trace)
    found, question = plan_or_question(what)
    # What the options ask of the scenario is checked before the search.
    if days is not None and question.scenario.reliability is None:
        raise InputError(
            f"{what}: --days needs to know what fails: write a reliability: block, e.g. {{failures: rsc-1, detection: "
            "10min, reschedule: 5min, checkpoint: {storage_rate: 100GB/s}}"
        )
    if days is None and seed is not None and question.cluster.noise is None:
        raise InputError(
            f"{what}: --seed: nothing is random here; write cluster.noise, e.g. "
            "{worker: {kind: lognormal, sigma: 0.05}}"
        )
    if found is None:
        found = _planned(question, what)
    if days is not None:
        _survive(found, question, days=days, seeds=seeds or 200, seed=seed, steps=steps, as_json=as_json)
        return
    result, timeline = simulated(found, question, steps=steps, fold=fold, seed=seed)
    if trace is not None:
        write_trace(trace, timeline, simulated=result)
    if as_json:
        screen.show_json(_document(found, result, timeline))
        return
    name = found.scenario.name
    screen.show(simulate_screen(name, found.layout, found.workload.training, result, timeline, found.prediction))
    if trace is not None:
        screen.show(f"\nTrace written to {trace}; open it in ui.perfetto.dev")


def _survive(
    found: Plan, question: Question, *, days: float, seeds: int, seed: int | None, steps: int, as_json: bool
) -> None:
    """Days of training with failures, on the screen or as JSON."""
    from clustersim import files
    from clustersim.horizon.horizon import horizon
    from clustersim.horizon.job import job_of
    from clustersim.layout.layout import Layout
    from clustersim.program.lower import lower
    from clustersim.report.horizon_screen import horizon_document, horizon_screen
    from clustersim.simulate.simulate import simulate

    reliability = found.scenario.reliability
    assert reliability is not None

    def step_s(layout: Layout) -> float:
        program = lower(found.workload, layout, found.framework, found.machines.devices_per_node)
        return simulate(program, question.cluster, found.framework, steps=steps, seed=seed).step_s

    job = job_of(reliability, question.cluster, found.workload, found.layout, step_s)
    result = horizon(job, days=days, seeds=seeds, seed=seed or 0)
    name, training = found.scenario.name, found.workload.training
    if as_json:
        screen.show_json(horizon_document(name, files.plain(found.layout), training, job, result))
    else:
        screen.show(horizon_screen(name, found.layout, training, job, result))


def _document(found: Plan, result: Simulated, timeline: Timeline) -> dict[str, Any]:
    from clustersim import files
    from clustersim.report.simulate_screen import scaled_to
    from clustersim.report.timeline_text import stretches

    predicted = scaled_to(found.prediction, result.step_s)
    return {
        "schema_version": 1,
        "scenario": found.scenario.name,
        "layout": files.plain(found.layout),
        "steps": result.steps,
        "step_s": result.step_s,
        "low_s": predicted.low_s,
        "high_s": predicted.high_s,
        "kind": predicted.kind,
        "outside": [reason.value for reason in predicted.outside],
        "step_times_s": list(result.step_times_s),
        "tokens_per_s": found.workload.training.tokens_per_step / result.step_s,
        "classes": result.classes,
        "events": result.events,
        "links": [
            {
                "kind": use.kind, "count": use.count, "bytes_per_link": use.bytes_per_link,
                "inside_bytes_per_link": use.inside_bytes_per_link,
                "capacity_bytes_per_s": use.capacity_bytes_per_s, "utilisation": use.utilisation,
            }
            for use in result.links
            if use.bytes_per_link > 0.0 or use.inside_bytes_per_link > 0.0
        ],
        "input_stall_s": result.input_stall_s,
        "queues": [
            {
                "kind": use.kind, "count": use.count, "requests_per_s": use.requests_per_s,
                "service_s": use.service_s, "utilisation": use.utilisation, "waited_s": use.waited_s,
                "random_wait_s": None if use.random_wait_s == float("inf") else use.random_wait_s,
                "present": use.present,
            }
            for use in result.queues
        ],
        "critical_path": [
            {
                "what": row.what, "where": row.where, "start_s": row.start_s, "end_s": row.end_s,
                "busy_s": row.busy_s, "waited_s": row.waited_s, "spans": row.spans, "times": row.times,
            }
            for row in stretches(timeline)
        ],
    }  # fmt: skip


# --------------------------------------------------------------------------------------- shared by several commands


def load_plan(path: Path | str) -> Plan:
    """The plan at `path`; InputError, one line, where it is none."""
    from clustersim import files
    from clustersim.plan import Plan

    tree, places = files.read_tree(Path(path))
    if isinstance(tree, dict) and "cluster" in tree:
        raise InputError(f"{path}: is a scenario, not a plan; make one: clustersim plan {path} -o plan.json")
    if isinstance(tree, dict) and "timeline" in tree:
        raise InputError(f"{path}: is a run, not a plan; give the plan that was run")
    if isinstance(tree, dict) and "program_digest" not in tree:
        raise InputError(f"{path}: is no plan; clustersim plan writes one")
    plan: Plan = files.validated(Plan, tree, str(path), places)
    _check_unchanged(plan, str(path))
    return plan


def _check_unchanged(plan: Plan, name: str) -> None:
    """InputError where the layout of a plan from a file is not the one that was planned: its figures are of another."""
    from clustersim import __version__, files
    from clustersim.program.lower import lower

    mend = "plan again, or set layout: in the scenario"

    if plan.ranking and plan.layout != plan.ranking[0].layout:
        raise InputError(f"{name}: layout was changed by hand; {mend}")
    program = lower(plan.workload, plan.layout, plan.framework, plan.machines.devices_per_node)
    if files.digest(program) != plan.program_digest:
        if plan.clustersim != __version__:
            raise InputError(
                f"{name}: was made by clustersim {plan.clustersim}, and its layout is another program here; plan again"
            )
        raise InputError(f"{name}: its layout, workload or framework was changed by hand; {mend}")


def plan_or_question(what: str) -> tuple[Plan | None, Question]:
    """A plan from its file with its question, or a scenario's question, of which no plan was made yet."""
    from clustersim import files
    from clustersim.plan import Plan
    from clustersim.scenario.load import load_scenario, question

    if what.endswith(".json"):
        tree, places = files.read_tree(Path(what))
        if isinstance(tree, dict) and "program_digest" in tree:
            found: Plan = files.validated(Plan, tree, what, places)
            _check_unchanged(found, what)
            return found, question_of(found)
        return None, question(tree, what, places)
    return None, load_scenario(what)


def question_of(plan: Plan) -> Question:
    """The plan's scenario with today's profiles; tells on stderr which of them changed since."""
    from clustersim.scenario.question import resolve

    found = resolve(plan.scenario, name="the plan's scenario")
    changed = sorted(name for name, digest in plan.digests.items() if found.digests.get(name, digest) != digest)
    if changed:
        screen.progress()(f"changed since the plan was made, so that predictions differ: {', '.join(changed)}")
    return found


def simulated(
    plan: Plan, question: Question, *, steps: int = 1, fold: bool = True, seed: int | None = None
) -> tuple[Simulated, Timeline]:
    """The plan's layout on its cluster, simulated."""
    from clustersim.program.lower import lower
    from clustersim.simulate.simulate import simulate

    program = lower(plan.workload, plan.layout, plan.framework, plan.machines.devices_per_node)
    result = simulate(program, question.cluster, plan.framework, steps=steps, fold=fold, seed=seed)
    return result, result.timeline()


def write_trace(path: Path, *timelines: Timeline, simulated: Simulated | None = None) -> None:
    """Write timelines as one Chrome trace, with the use of links where they were simulated; whole or not at all."""
    import json

    from clustersim import files
    from clustersim.timeline import chrome_trace

    counters = simulated.link_series() if simulated is not None else None
    files.write_text(path, json.dumps(chrome_trace(*timelines, counters=counters), separators=(",", ":")))
