"""What-if entries: the same scenario with some of its keys set, as a question of its own."""

from __future__ import annotations

from typing import Any

from clustersim import files
from clustersim.errors import ScenarioError
from clustersim.scenario.question import Question, resolve
from clustersim.scenario.scenario import Scenario, WhatIf


def with_settings(scenario: Scenario, entry: WhatIf) -> Question:
    """The question of a scenario with the keys of a what-if entry set."""
    tree = files.plain(scenario)
    tree.pop("what_if", None)
    for path, value in entry.set.items():
        _set(tree, path, value)
    changed: Scenario = files.validated(Scenario, tree, f"what-if {entry.name!r}")
    return resolve(changed, name=f"what-if {entry.name!r}")


def _set(tree: Any, path: str, value: Any) -> None:
    """Set a dotted path. Every block on the way must exist; a node count becomes a block when a key of it is set."""
    keys = path.split(".")
    here = tree
    for depth, key in enumerate(keys[:-1]):
        if isinstance(here, list) and key.isdigit() and int(key) < len(here):
            here = here[int(key)]
            continue
        if not isinstance(here, dict) or (key not in here and depth < 3):
            known = ", ".join(sorted(map(str, here))) if isinstance(here, dict) else "none"
            raise ScenarioError(f"{path}: there is no {'.'.join(keys[: depth + 1])}; known here: {known}")
        if key not in here or here[key] is None:
            here[key] = {}
        if (
            isinstance(here[key], (int, str))
            and depth == 2
            and keys[:2] in (["cluster", "nodes"], ["cluster", "servers"], ["cluster", "storage"])
        ):
            here[key] = {"count": here[key]}
        here = here[key]
    if not isinstance(here, dict):
        raise ScenarioError(f"{path}: {'.'.join(keys[:-1])} is not a block of keys")
    here[keys[-1]] = value
