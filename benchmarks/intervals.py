"""Records what predictions are off by: `python benchmarks/intervals.py`.

Predicts the published runs of validation/ as shipped, and some of them again without kernel tables; writes the
residuals by kind of case into hwprofiles/intervals.yaml, from which every later prediction takes its interval, and the
tables of docs/accuracy.md between its two marks. About two minutes on two cores. `--tables` writes the tables only.
"""

from __future__ import annotations

import sys
from pathlib import Path

from clustersim import files
from clustersim.hardware.intervals import Intervals
from clustersim.report.intervals_table import intervals_markdown

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "hwprofiles" / "intervals.yaml"
PAGE = ROOT / "docs" / "accuracy.md"
BEGIN, END = "<!-- intervals: benchmarks/intervals.py -->\n", "<!-- end of intervals -->\n"


def recorded() -> Intervals:
    """The residuals of the shipped families, predicted now."""
    from clustersim.validate.board import validate
    from clustersim.validate.family import rows_of, shipped_families
    from clustersim.validate.residuals import record

    def tell(message: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{message:<79.79}", end="", file=sys.stderr, flush=True)

    return record(validate([(rows_of(family), family) for family in shipped_families()], tell), tell)


def main() -> None:
    """Record, and write the tables."""
    if "--tables" not in sys.argv[1:]:
        files.save(recorded(), FILE)
    tables = intervals_markdown(files.load(Intervals, FILE))
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    files.write_text(PAGE, f"{before}{BEGIN}\n{tables}\n{END}{after}")
    print(tables, end="")


if __name__ == "__main__":
    main()
