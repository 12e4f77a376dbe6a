"""Memory on the scoreboard: which memory a source states, and whether layouts are called feasible."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clustersim.validate.case import Case, Unmapped
from clustersim.validate.family import rows_of, shipped_families
from clustersim.validate.memory import DeviceUse
from clustersim.validate.rows import Row
from clustersim.validate.score import Scored, asked
from clustersim.validate.scoreboard import memory_summary
from clustersim.validate.training_rows import training_case

# Megatron-LM on 4 x V100-16GB nodes, tensor-parallel over a node, one sequence at a time.
CELLS = {
    "gpu": "V100-SXM2-16GB", "gpus_per_node": "4", "inter_node": "4x100Gb/s Omni-Path", "framework": "Megatron-LM",
    "family": "gpt", "heads": "32", "vocab": "50257", "seq_len": "1024", "tp": "4", "dp": "1", "mbs": "1", "gbs": "4",
    "shard": "none", "recompute": "full", "precision": "fp16", "gradient": "fp16", "sec_per_iter": "1",
}  # fmt: skip


def case_of(**changed: str) -> Case:
    found = training_case(Row(line=2, cells=CELLS | changed))
    assert isinstance(found, Case), found
    return found


def predicted(**changed: str) -> DeviceUse:
    return asked(case_of(**changed))[2]


@pytest.mark.parametrize(
    ("gpus", "layers", "hidden", "pp", "fits"),
    [
        # bigscience-workshop/bigscience, experiments/gpt2-16gb-nodes.md: what ran, if barely, and what did not fit.
        ("16", "36", "4096", "4", True),
        ("64", "48", "7168", "16", True),
        ("64", "48", "8192", "16", False),
        ("128", "64", "8192", "32", True),
        ("128", "64", "10240", "32", False),
        ("256", "64", "10240", "64", True),
    ],
)
def test_what_ran_fits_and_what_ran_out_of_memory_does_not(
    gpus: str, layers: str, hidden: str, pp: str, fits: bool
) -> None:
    found = predicted(gpus=gpus, layers=layers, hidden=hidden, pp=pp)
    assert found.capacity == 16 * 2**30
    assert found.fits is fits, found
    assert (found.headroom >= 0.0) is fits


def test_no_layout_that_ran_is_called_infeasible() -> None:
    for family in shipped_families():
        if family.name not in ("bigscience-a100", "bigscience-v100", "torchtitan", "nemo-h100", "llama-fp8"):
            continue
        for case in rows_of(family).cases:
            if not case.kept_elsewhere:
                found = asked(case)[2]
                assert found.fits, (family.name, case.id, found)


def test_levels_contain_each_other() -> None:
    found = predicted(gpus="64", layers="48", hidden="7168", pp="16")
    assert found.allocated < found.reserved < found.used <= found.capacity
    assert found.allocated < found.needed <= found.used
    assert [found.at(level) for level in ("allocated", "reserved", "used")] == [
        found.allocated, found.reserved, found.used,
    ]  # fmt: skip
    full = predicted(gpus="64", layers="48", hidden="8192", pp="16")
    assert full.used == full.capacity
    assert full.reserved < full.capacity


def test_stated_memory_has_a_unit_and_a_level() -> None:
    cells = {"gpus": "16", "layers": "36", "hidden": "4096", "pp": "4", "mem_gb": "10"}
    assert case_of(**cells).memory_bytes == 10e9
    assert case_of(**cells).memory_level == "used"
    stated = case_of(**cells, mem_unit="GiB", mem_level="reserved")
    assert stated.memory_bytes == 10 * 2**30
    assert stated.memory_level == "reserved"
    for wrong in ({"mem_unit": "MB"}, {"mem_level": "total"}):
        found = training_case(Row(line=2, cells=CELLS | cells | wrong))
        assert isinstance(found, Unmapped)
        assert next(iter(wrong)) in found.reason


def scored(predicted_bytes: float, headroom: float, **changed: str) -> Scored:
    case = case_of(gpus="16", layers="36", hidden="4096", pp="4", **changed)
    return Scored(
        case=replace(case, id=str(predicted_bytes)), layout="a", predicted_s=1.0, low_s=0.9, high_s=1.1, coverage=1.0,
        predicted_bytes=predicted_bytes, fits=headroom >= 0.0, headroom=headroom,
    )  # fmt: skip


def test_figures_of_memory() -> None:
    rows = [scored(9e9, 0.3, mem_gb="10"), scored(11.5e9, 0.1, mem_gb="10"), scored(1e9, -0.2)]
    found = memory_summary([*rows, scored(99e9, -9.0, mem_gb="10", kept_elsewhere="optimizer state in host memory")])
    assert found is not None
    assert found.errors is not None
    assert (found.errors.n, found.judged, found.called_infeasible) == (2, 3, 1)
    assert found.errors.mean == pytest.approx(0.125)
    assert found.errors.bias == pytest.approx(0.025)
    assert found.errors.worst == pytest.approx(0.15)
    assert (found.least_headroom, found.least_headroom_id) == (-0.2, "1000000000.0")
    assert memory_summary([scored(1e9, 0.5, kept_elsewhere="weights in host memory")]) is None
