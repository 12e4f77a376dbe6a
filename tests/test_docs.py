"""The documentation is true: formats are generated, links resolve, the tutorial runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def test_formats_page_is_generated_from_the_schemas() -> None:
    from clustersim.report.formats import markdown

    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert page == markdown(), "regenerate it: python -m clustersim.report.formats > docs/formats.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
