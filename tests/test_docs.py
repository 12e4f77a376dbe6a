"""The documentation is true: formats are generated, links resolve, the tutorial runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the tutorial runs, a user's folder of its own in it."""
    return tmp_path_factory.mktemp("tutorial")


def _blocks(page: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("number", range(len(_blocks("docs/tutorial.md"))))
def test_tutorial_runs(number: int, workshop: Path) -> None:
    """The commands of the tutorial, in order: each needs what the ones before it made."""
    environment = {
        **os.environ,
        "CLUSTERSIM_HOME": str(workshop / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "100",
    }
    command = _blocks("docs/tutorial.md")[number]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=workshop, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    if "wrong.yaml" in command:
        assert "exit code 3" in done.stdout
        assert re.search(r"wrong\.yaml:4:\d+: training", done.stderr)
