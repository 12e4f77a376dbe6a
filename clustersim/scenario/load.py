"""Scenario files: read, validated, looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clustersim import files
from clustersim.errors import ClustersimError, ScenarioError
from clustersim.scenario.question import Question, resolve
from clustersim.scenario.scenario import Scenario
from clustersim.scenario.what_if import with_settings


def load_scenario(path: str | Path) -> Question:
    """The scenario file at `path` (or of that built-in name), looked up."""
    where = files.scenario_path(str(path))
    tree, places = files.read_tree(where)
    if isinstance(tree, dict) and "program_digest" in tree:
        raise ScenarioError(
            f"{where}: is a plan or a run, not a scenario; `clustersim simulate` reads a plan, "
            "`clustersim compare` both"
        )
    return question(tree, str(where), places)


def question(tree: Any, name: str, places: files.Located | None = None, *, calibrated: bool = True) -> Question:
    """The plain data of a scenario, validated and looked up; its what-if entries too, so that none fails later.
    `calibrated` False: under its framework as shipped, whatever calibration there is."""
    scenario: Scenario = files.validated(Scenario, tree, name, places)
    found = resolve(scenario, name=name, places=places, calibrated=calibrated)
    for index, entry in enumerate(scenario.what_if):
        try:
            with_settings(scenario, entry)
        except ClustersimError as error:
            message = str(error).removeprefix(f"what-if {entry.name!r}: ")
            # The setting to blame: the one that the message is about, or the only one.
            keys = [key for key in entry.set if message.startswith(key)] or list(entry.set)[: len(entry.set) == 1]
            path: tuple[str | int, ...] = ("what_if", index, "set", *keys[:1])
            about = message.removeprefix(f"{keys[0]}: ") if keys else message
            raise ScenarioError(files.located(name, places or {}, path, about, key=True)) from None
    return found
