"""The accuracy tables of README.md and docs/accuracy.md, from a recorded scoreboard: no figure is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clustersim.errors import InputError
from clustersim.report.figures import percent, signed_percent

BEGIN = "<!-- clustersim validate: begin -->"
END = "<!-- clustersim validate: end -->"


def markdown(scores: Mapping[str, Any]) -> str:
    """The block between the markers, both included: training steps by family, then what no profile was built from of
    collectives and synchronisations."""
    lines = [
        BEGIN,
        "| training steps | n | mean abs. error | median | 90th percentile | bias | worst | in 90 % interval | rank "
        "correlation, regret | others say |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for family in scores["families"]:
        figures = family["summary"]
        if figures is None:
            lines.append(f"| {_cell(family['title'])} | 0 | | | | | | | | {_peers(family)} |")
            continue
        cells = (
            _title(family), str(figures["n"]), percent(figures["mean"]), percent(figures["median"]),
            percent(figures["p90"]), signed_percent(figures["bias"]), signed_percent(figures["worst"]),
            percent(figures["covered"]), _ranking(figures["ranking"]), _peers(family),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    notes = [
        f"\\* Profiles learned from {family['title']}: {family['learned']}."
        for family in scores["families"]
        if family.get("learned")
    ]
    for note in notes:
        lines += ["", note]
    calibrated = scores.get("calibrated") or ()
    if calibrated:
        lines += ["", *_calibrated(calibrated)]
    if scores.get("synchronisation"):
        lines += [
            "",
            "| synchronisation and collectives | rows | n | mean abs. error | median | 90th percentile | bias | "
            "fastest scheme right, regret |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        for family in scores["synchronisation"]:
            for figures in family["together"]:
                order = "" if figures["seen"] or family["ordering"] is None else _order(family["ordering"])
                row = (
                    _cell(family["title"]), "in the profile" if figures["seen"] else "nobody used", str(figures["n"]),
                    percent(figures["mean"]), percent(figures["median"]), percent(figures["p90"]),
                    signed_percent(figures["bias"]), order,
                )  # fmt: skip
                lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, END]) + "\n"


def replaced(path: Path, block: str) -> str:
    """The text of a file with what stands between the markers replaced; InputError where it has no markers."""
    text = path.read_text(encoding="utf-8")
    pattern = f"{re.escape(BEGIN)}.*?{re.escape(END)}\n"
    found, count = re.subn(pattern, lambda _: block, text, count=1, flags=re.DOTALL)
    if not count:
        raise InputError(f"{path}: has no lines {BEGIN} and {END}; put them where the table is to stand")
    return found


def _calibrated(rows: Any) -> list[str]:
    lines = [
        "| calibrated on k rows, the others scored | k | n | as shipped | calibrated | median | 90th percentile |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        shipped, figures = row["shipped"], row["calibrated"]
        if figures is None or shipped is None:
            continue
        method = row["method"] if row["method"] == "leave-one-out" else str(row["k"])
        lines.append(
            f"| {_cell(row['family'])} ({_cell(row['cluster'])}) | {method} | {figures['n']} | "
            f"{percent(shipped['mean'])} | {percent(figures['mean'])} | {percent(figures['median'])} | "
            f"{percent(figures['p90'])} |"
        )
    return lines


def _title(family: Mapping[str, Any]) -> str:
    return _cell(family["title"]) + (" \\*" if family.get("learned") else "")


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _ranking(rank: Mapping[str, Any] | None) -> str:
    if rank is None:
        return ""
    return f"{rank['correlation']:.2f}, {percent(rank['regret'])} ({rank['groups']} groups, {rank['layouts']} layouts)"


def _order(order: Mapping[str, Any]) -> str:
    return f"{order['best_right']} of {len(order['contests'])}, {percent(order['regret'])}"


def _peers(family: Mapping[str, Any]) -> str:
    return ", ".join(f"{_cell(peer['name'])} {percent(peer['mean_error'])}" for peer in family["peers"])
