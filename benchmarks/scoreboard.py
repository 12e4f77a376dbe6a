"""Score everything and write it down: validation/scores.json, docs/accuracy.svg, and the tables of README.md and
docs/accuracy.md, which stand between markers. Run in the checkout: `python benchmarks/scoreboard.py` (minutes: all
families as shipped, then calibrated on 8 rows of each source). `--shipped` leaves the calibrated figures as they are
recorded; `--tables` writes only the tables again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from clustersim.app.door import run
from clustersim.app.screen import progress
from clustersim.files import plain, write_text
from clustersim.report.validate_markdown import markdown, replaced
from clustersim.validate.calibrated import validate_calibrated
from clustersim.validate.family import rows_of, shipped_families

ROOT = Path(__file__).resolve().parent.parent
SCORES = ROOT / "validation" / "scores.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "accuracy.md")
ROWS = 8
_KEPT = ("family", "cluster", "method", "k", "shipped", "calibrated", "repeats")


def recorded() -> dict[str, Any]:
    """The scores on disk."""
    found: dict[str, Any] = json.loads(SCORES.read_text(encoding="utf-8"))
    return found


def calibrated() -> list[dict[str, Any]]:
    """The figures of every source on a cluster, calibrated on a few of its rows."""
    sets = [(rows_of(family), family) for family in shipped_families()]
    return [
        {key: value for key, value in plain(one).items() if key in _KEPT}
        for one in validate_calibrated(sets, ROWS, progress())
    ]


def main() -> int:
    """Run, record, and replace the tables."""
    if "--tables" not in sys.argv:
        before = recorded().get("calibrated", []) if SCORES.is_file() else []
        code = run(["validate", "--record", str(SCORES), "--plot", str(ROOT / "docs" / "accuracy.svg")])
        if code:
            return code
        scores = recorded() | {"calibrated": before if "--shipped" in sys.argv else calibrated()}
        write_text(SCORES, json.dumps(scores, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    block = markdown(recorded())
    for page in PAGES:
        write_text(page, replaced(page, block))
    return 0


if __name__ == "__main__":
    sys.exit(main())
