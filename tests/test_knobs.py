"""No dead knobs: every key that a scenario or a profile accepts changes some prediction when it is moved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from clustersim import files
from clustersim.errors import ClustersimError
from clustersim.scenario import question
from clustersim.search.search import make_plan

# Small, and with something for every term to act on: a pipeline, tensor parallelism, servers, two nodes.
SCENARIO: dict[str, Any] = {
    "schema_version": 1,
    "name": "knobs",
    "model": {"layers": 8, "hidden": 1024, "heads": 16, "vocab": 32000},
    "training": {"global_batch": 64, "sequence": 1024, "precision": "bf16", "optimizer": "adam", "tokens": 1e9},
    "framework": "megatron-lm",
    "cluster": {
        "nodes": {"dgx-a100-80g": 4},
        "fabric": {"kind": "leaf-spine", "nodes_per_leaf": 2, "oversubscription": 2, "hop_latency": "1us"},
        "servers": {"cpu-server-200g": "0..2"},
    },
    "layout": {"dp": 8, "tp": 2, "pp": 2, "micro_batch": 2, "schedule": "1f1b"},
    "search": {"simulate": 2},
}

SCENARIO_MOVES: list[tuple[str, Any]] = [
    ("model", "gpt3-125m"), ("model.layers", 10), ("model.hidden", 2048), ("model.heads", 8), ("model.vocab", 64000),
    ("model.kv_heads", 4), ("model.head_dim", 128), ("model.ffn_hidden", 2048), ("model.positions", 4096),
    ("model.gated", True), ("model.norm", "rmsnorm"), ("model.bias", False), ("model.rotary", True),
    ("model.dropout", True), ("model.tied", False), ("model.experts", {"count": 4, "per_token": 2, "hidden": 1024}),
    ("training.global_batch", 128), ("training.sequence", 512), ("training.precision", "fp32"),
    ("training.optimizer", "sgd"), ("framework", "megatron-core"), ("cluster.nodes", {"hgx-h100": 4}),
    ("cluster.fabric.kind", "rail-optimized"), ("cluster.fabric.nodes_per_leaf", 1),
    ("cluster.fabric.oversubscription", 16), ("cluster.fabric.hop_latency", "1ms"),
    ("cluster.servers", {"cpu-server-200g": "0..1"}), ("cluster.faults", [{"rank": 3, "slowdown": 2.0}]),
    ("cluster.faults", [{"node": 0, "nic": 0, "speed": 0.1}]), ("search.sync", ["parameter-server"]),
    ("search.simulate", 20), ("layout.dp", 4), ("layout.micro_batch", 4), ("layout.sequence_parallel", True),
    ("layout.schedule", "gpipe"), ("layout.boundaries", [0, 6]), ("layout.recompute", "full"),
    ("layout.order", "tp-pp-dp"), ("layout.sync", "parameter-server"), ("layout.algorithm", "tree"),
    ("layout.sharded_stage", 2), ("layout.servers", 1), ("layout.placement", "mixed"),
    ("layout.optimizer_at", "worker"), ("layout.bucket", "200MiB"), ("layout.partition", "100kB"),
    ("constraints.memory_headroom", "97%"), ("constraints.deadline", "100s"),
]  # fmt: skip


def _set(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(tree)
    here: dict[str, Any] = changed
    *way, last = path.split(".")
    for key in way:
        here = here.setdefault(key, {})
    here[last] = value
    if path == "layout.dp":
        changed["layout"]["pp"] = 4
    if path == "training.precision":
        changed["layout"]["recompute"] = "full"
    return changed


def _answer(tree: dict[str, Any]) -> Any:
    """Everything that a plan predicts, without what merely repeats the question."""
    try:
        found = make_plan(question(tree, "knobs"), workers=1)
    except ClustersimError as error:
        return str(error)
    shown = files.plain(found)
    for key in ("scenario", "digests", "framework", "workload", "program_digest", "machines", "clustersim"):
        del shown[key]
    del shown["counts"]["wall_s"]
    return shown


@pytest.fixture(scope="module")
def base() -> Any:
    return _answer(SCENARIO)


@pytest.mark.parametrize(("path", "value"), SCENARIO_MOVES, ids=lambda given: str(given)[:40])
def test_scenario_key_moves_the_answer(path: str, value: Any, base: Any) -> None:
    assert _answer(_set(SCENARIO, path, value)) != base


PROFILE_MOVES: list[tuple[str, str, str, Any]] = [
    *(
        ("frameworks", "megatron-lm", key, value)
        for key, value in (
            ("attention", "flash"), ("fused_elementwise", False), ("gradient_dtype", "fp16"),
            ("host.per_layer_forward", "90ms"), ("host.per_layer_backward", "90ms"),
            ("host.per_micro_batch", "90ms"), ("host.per_step", "90ms"), ("host.per_collective", "90ms"),
            ("overlap.gradient_reduce", True), ("overlap.parameter_gather", True), ("overlap.pipeline_send", True),
            ("scatter_gather", False), ("memory_overhead", "9GiB"),
            ("fragmentation", 0.3), ("compute_scale", 2.0), ("network_scale", 2.0),
        )
    ),
    *(
        ("nodes", "dgx-a100-80g", key, value)
        for key, value in (
            ("devices", 4), ("interconnect.rate", "1GB/s"), ("pcie", "pcie3-x16"), ("nic.count", 4),
            ("nic.rate", "10Gb/s"), ("nic.link", "tcp-25"), ("host.memory", "1GB"),
            ("host.memory_bandwidth", "1GB/s"), ("host.reduce_rate", "1GB/s"), ("power_overhead", "9kW"),
            ("price", {"hourly": "$9/h", "date": "2026-01", "source": "test"}), ("host.rank_slowdown", [1, 2, 2, 9]),
        )
    ),
    *(
        ("devices", "a100-sxm-80g", key, value)
        for key, value in (
            ("memory", "8GiB"), ("memory_bandwidth", "1GB/s"), ("peak.bf16", "1TFLOP/s"), ("power", "4kW"),
            ("idle_power", "300W"), ("launch_overhead", "9ms"), ("sustained_clock", 0.5),
            ("price", {"hourly": "$9/h", "date": "2026-01", "source": "test"}),
        )
    ),
    *(
        ("links", "infiniband-hdr200", key, value)
        for key, value in (
            ("rate", "10Gb/s"), ("launch", "90ms"),
            ("segments", [{"from": "0B", "alpha": "90ms", "efficiency": 0.5}]),
        )
    ),
]  # fmt: skip


def _moved(folder_of_test: Path, kind: str, name: str, moves: dict[str, Any]) -> None:
    """A profile of the same name in ./hwprofiles, with some keys moved."""
    source = files.profile_path(kind, name)
    tree, _ = files.read_tree(source)
    folder = folder_of_test / "hwprofiles" / kind
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("nodes", "devices"):
        folder = folder / name
        folder.mkdir()
        for table in source.parent.glob("*.csv"):
            (folder / table.name).symlink_to(table)
    for key, value in moves.items():
        tree = _set(tree, key, value)
    (folder / source.name).write_text(_yaml(tree), encoding="utf-8")


@pytest.mark.parametrize(("kind", "name", "key", "value"), PROFILE_MOVES, ids=lambda given: str(given)[:40])
def test_profile_key_moves_the_answer(
    kind: str, name: str, key: str, value: Any, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _moved(tmp_path, kind, name, {key: value})
    monkeypatch.chdir(tmp_path)
    assert _answer(SCENARIO) != base


def test_compute_slowdown_moves_the_answer_where_something_overlaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for slowdown in (1.0, 3.0):
        folder = tmp_path / str(slowdown)
        folder.mkdir()
        moves = {"overlap.gradient_reduce": True, "overlap.compute_slowdown": slowdown}
        _moved(folder, "frameworks", "megatron-lm", moves)
        monkeypatch.chdir(folder)
        answers.append(_answer(SCENARIO))
    assert answers[0] != answers[1]


def _yaml(tree: dict[str, Any]) -> str:
    """JSON is YAML."""
    import json

    return json.dumps(tree)


def test_objective_moves_the_answer_where_server_hosts_cost() -> None:
    """With servers to pay for, the fastest is not the cheapest: the two objectives rank differently."""
    tree = _set(SCENARIO, "layout.sync", "parameter-server")
    tree = _set(tree, "layout.placement", "dedicated")
    price = {"hourly": "$99/h", "date": "2026-01", "source": "test"}
    tree = _set(tree, "cluster.servers", {"cpu-server-200g": {"count": "1..2", "price": price}})
    orders = []
    for objective in ("step_time", "usd"):
        found = make_plan(question(_set(tree, "objective", objective), "knobs"), workers=1)
        orders.append([candidate.layout for candidate in found.ranking])
    assert orders[0] != orders[1]
