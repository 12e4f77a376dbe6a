"""`profile` and `demo`: what this machine can do, and the whole loop on it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clustersim.app import planning, running, screen
from clustersim.app.quantities import quantity
from clustersim.errors import ClustersimError, UsageError

if TYPE_CHECKING:
    from clustersim.compare import Comparison
    from clustersim.execute.disturbance import Others
    from clustersim.execute.launch import Launcher

# What scenarios call the profile of this machine, unless it is given another name.
LOCAL = "local"
_DEMO_RANKS = 4
# Seconds that the demo spends on profiling a machine that it does not know.
_DEMO_S = 30.0


def add_to(app: typer.Typer) -> None:
    """Add this file's commands to `app`."""
    app.command("profile")(profile_command)
    app.command("demo")(demo_command)


def profile_command(
    quick: Annotated[
        bool, typer.Option("--quick", help="Coarser tables in 2 minutes at most; without it, 15 minutes at most.")
    ] = False,
    within: Annotated[
        str | None, typer.Option("--within", help="Measure for so long at most (30s, 5min); --quick is 110s.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The hwprofiles folder to write into; default: your own.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="What scenarios shall call this machine.")] = LOCAL,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Most ranks to run at once; default: 4, or one a core.")
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Keep nothing of an interrupted or an earlier profile of this machine."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything measured as JSON.")] = False,
) -> None:
    """Measure this machine (kernels, memory, messages, shared cores), so that plans can be made for it. Needs torch.

    An interrupted profile goes on where it stopped; tables of an earlier one are extended, point by point."""
    import shutil

    from clustersim import files
    from clustersim.app.probe_screen import probe_screen
    from clustersim.execute.disturbance import Others
    from clustersim.execute.probe import FULL_S, QUICK_S, probe
    from clustersim.execute.profile_files import write_profiles

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"--name {name}: write letters, digits, dots, dashes and underscores")
    budget_s = QUICK_S if quick else FULL_S
    if within is not None:
        budget_s = quantity("--within", within, "Seconds")
        if quick or budget_s <= 0.0:
            raise UsageError(f"--within {within}: write a time of more than 0s, and no --quick beside it")
    tell = screen.progress()
    others = Others()
    root = out if out is not None else files.user_folder() / "hwprofiles"
    partial = root / f".partial-{name}"
    if fresh:
        shutil.rmtree(partial, ignore_errors=True)
    found = probe(budget_s, _rank_counts(ranks), tell, partial)
    _warn_of(others, tell)
    written = write_profiles(found, name, root, fresh=fresh, tell=tell)
    shutil.rmtree(partial)
    if as_json:
        screen.show_json(files.plain(found))
        return
    screen.show(probe_screen(found, written, budget_s))
    screen.show(f"\nNext: clustersim init, or nodes: {{{written.node}: 1}} and framework: {written.framework}")


def _warn_of(others: Others, tell: Callable[[str], None]) -> None:
    """Say so when other programs took part of the machine that was being measured."""
    from clustersim.execute.disturbance import QUIET

    share = others.share()
    if share > QUIET:
        tell(
            f"warning: other programs took {share:.0%} of the CPU while this machine was profiled: predictions will be "
            "off; run `clustersim profile` again when it is quiet"
        )


def _rank_counts(most: int | None = None) -> list[int]:
    """Powers of two up to `most` (by default one rank a core, but at least four), and `most` itself."""
    from clustersim.execute.launch import cores

    top = most if most is not None else max(_DEMO_RANKS, cores())
    return sorted({2**power for power in range(top.bit_length())} | {top})


def demo_command(
    out: Annotated[Path, typer.Option("--out", help="Where plans, runs and the trace go.")] = Path("clustersim-demo"),
    steps: Annotated[int, typer.Option("--steps", min=1, help="Measured steps of each run.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparisons as JSON.")] = False,
) -> None:
    """Profile this machine, plan a tiny GPT for it, run two plans for real, and compare: two minutes. Needs torch."""
    from clustersim import files
    from clustersim.execute.launch import Launcher
    from clustersim.report.compare_screen import demo_table

    tell = screen.progress()
    _profiled(tell)
    results: list[tuple[str, Comparison]] = []
    with Launcher() as launcher:
        for title, tree in demo_scenarios():
            results.append((title, _plan_run_compare(title, tree, out, steps, launcher, tell)))
    if as_json:
        screen.show_json({title: files.plain(found) for title, found in results})
        return
    screen.show(demo_table(results))
    screen.show(
        f"\nPlans, runs and traces are in {out}. Look closer: clustersim compare {out}/allreduce.plan.json "
        f"{out}/allreduce.run.json\nPlan a large cluster: clustersim plan gpt3-175b-dgx-a100"
    )


def _profiled(tell: Callable[[str], None]) -> None:
    """Make sure that this machine has a profile: one that is there is used where it is of this machine as it is now,
    and of this version."""
    from clustersim import files
    from clustersim.cluster.load import load_node
    from clustersim.execute.disturbance import Others
    from clustersim.execute.probe import probe
    from clustersim.execute.profile_files import write_profiles

    if LOCAL in files.profile_names("nodes"):
        reason = unfit()
        if reason is None:
            tell(f"profile {LOCAL!r} of {load_node(LOCAL).provenance.date} is used; `clustersim profile` measures anew")
            return
        tell(f"profile {LOCAL!r} is not used: {reason}")
    tell("profiling this machine: half a minute")
    others = Others()
    found = probe(_DEMO_S, _rank_counts(), tell)
    _warn_of(others, tell)
    write_profiles(found, LOCAL, tell=tell)


def unfit() -> str | None:
    """Why the profile of this machine cannot be used for the demo; None where it can."""
    from clustersim.cluster.load import load_node
    from clustersim.execute.launch import cores
    from clustersim.execute.probe_host import host_memory_bytes
    from clustersim.scenario.load import question

    try:
        node = load_node(LOCAL)
        for title, tree in demo_scenarios():
            question(tree, title)
    except ClustersimError as error:
        return str(error)
    if (node.host.cores, node.host.memory_bytes) != (cores(), float(host_memory_bytes())):
        return "it is of another machine"
    return None if node.devices >= _DEMO_RANKS else f"it is of {node.devices} ranks, and the demo runs {_DEMO_RANKS}"


def demo_scenarios() -> list[tuple[str, dict[str, Any]]]:
    """Four ranks that allreduce, and two workers with two servers, as scenario files would say it."""
    return [
        (
            "allreduce, 4 ranks",
            _scenario(
                "allreduce",
                {"nodes": {LOCAL: {"count": 1, "devices": 4}}},
                {"dp": 4, "sync": "allreduce", "algorithm": "ring"},
            ),
        ),
        (
            "parameter server, 2 workers + 2 servers",
            _scenario(
                "parameter-server",
                {"nodes": {LOCAL: {"count": 1, "devices": 2}}, "servers": {LOCAL: 2}},
                {"dp": 2, "sync": "parameter-server", "placement": "dedicated", "servers": 2},
            ),
        ),
    ]


def _scenario(name: str, cluster: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "name": name,
        "model": "tiny-4m",
        "training": {"global_batch": 16, "sequence": 128, "precision": "fp32", "optimizer": "adam"},
        "framework": f"clustersim-{LOCAL}",
        "cluster": cluster,
        "layout": {"tp": 1, "pp": 1, "recompute": "none", **layout},
    }


def _plan_run_compare(
    title: str, tree: dict[str, Any], out: Path, steps: int, launcher: Launcher, tell: Callable[[str], None]
) -> Comparison:
    from clustersim import files
    from clustersim.execute.execute import execute
    from clustersim.scenario.load import question
    from clustersim.search.search import make_plan

    name = tree["name"]
    tell(f"planning: {title}")
    plan = make_plan(question(tree, name), progress=tell)
    files.save(plan, out / f"{name}.plan.json")
    tell(f"running: {title}")
    run = execute(plan, steps=steps, progress=tell, launcher=launcher)
    files.save(run, out / f"{name}.run.json")
    comparison, predicted = running.compared(plan, run)
    planning.write_trace(out / f"{name}.trace.json", predicted, run.timeline)
    return comparison
