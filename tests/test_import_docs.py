"""docs/importing.md runs as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "importing.md"
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
# What the page says that each block shows, in order.
SHOWN = (
    "12 a GPU", "2 x NIC: infiniband-hdr200", "exit code 3", "not stated", "all_reduce", "launch-bound", "one-switch",
    "parameters",
)  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("importing")


def test_every_block_has_something_to_show() -> None:
    assert len(SHOWN) == len(BLOCKS)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_page_runs(number: int, workshop: Path) -> None:
    environment = {
        **os.environ,
        "CLUSTERSIM_HOME": str(workshop / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "100",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", BLOCKS[number]],
        cwd=workshop,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{BLOCKS[number]}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert SHOWN[number] in done.stdout
