"""No dead knobs: every key that a scenario or a profile accepts changes some prediction when it is moved."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest

from clustersim import files
from clustersim.errors import ClustersimError
from clustersim.scenario.load import question
from clustersim.search.search import make_plan

# Small, and with something for every term to act on: a pipeline, tensor parallelism, servers, two nodes.
SCENARIO: dict[str, Any] = {
    "schema_version": 1,
    "name": "knobs",
    "model": {"layers": 8, "hidden": 1024, "heads": 16, "vocab": 32001},
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
    ("model.dropout", True), ("model.pad_vocab", False),
    ("model.tied", False), ("model.experts", {"count": 4, "per_token": 2, "hidden": 1024}),
    ("training.global_batch", 128), ("training.sequence", 512), ("training.precision", "fp32"),
    ("training.optimizer", "sgd"), ("training.predicted", 0.15), ("framework", "megatron-core"),
    ("cluster.nodes", {"hgx-h100": 4}),
    ("cluster.fabric.kind", "rail-optimized"), ("cluster.fabric.nodes_per_leaf", 1),
    ("cluster.fabric.oversubscription", 16), ("cluster.fabric.hop_latency", "1ms"),
    ("cluster.fabric.in_network_reduction", True),
    ("cluster.servers", {"cpu-server-200g": "0..1"}), ("cluster.faults", [{"rank": 3, "slowdown": 2.0}]),
    ("cluster.faults", [{"node": 0, "nic": 0, "speed": 0.1}]), ("search.sync", ["parameter-server"]),
    ("search.simulate", 20), ("layout.dp", 4), ("layout.micro_batch", 4), ("layout.sequence_parallel", True),
    ("layout.schedule", "gpipe"), ("layout.boundaries", [0, 6]),
    ("layout.boundaries", "balanced"), ("layout.boundaries", "slots"), ("layout.recompute", "full"),
    ("layout.order", "tp-pp-dp"), ("layout.sync", "parameter-server"), ("layout.algorithm", "tree"),
    ("layout.algorithm", "auto"),
    ("layout.sharded_stage", 2), ("layout.servers", 1), ("layout.placement", "mixed"),
    ("layout.optimizer_at", "worker"), ("layout.bucket", "200MiB"), ("layout.gradient", "bf16"),
    ("layout.partition", "100kB"),
    ("cluster.background", [{"link": "nic", "share": "50%"}]),
    ("cluster.background", [{"link": "leaf-uplink", "share": "90%", "at": [1]}]),
    ("constraints.memory_headroom", "97%"), ("constraints.deadline", "100s"),
]  # fmt: skip


def _set(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(tree)
    here: dict[str, Any] = changed
    *way, last = path.split(".")
    for key in way:
        here = here.setdefault(key, {})
    here[last] = value
    if path == "layout.dp" or value == "slots":
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


def test_ecmp_and_its_keys_move_the_answer(base: Any) -> None:
    tree = _set(_set(SCENARIO, "cluster.fabric.routing", "ecmp"), "cluster.fabric.spines", 4)
    answers = [_answer(tree), *(_answer(_set(tree, f"cluster.fabric.{key}", 3)) for key in ("spines", "ecmp_seed"))]
    assert base not in answers
    assert answers[0] not in answers[1:]


PROFILE_MOVES: list[tuple[str, str, str, Any]] = [
    *(
        ("frameworks", "megatron-lm", key, value)
        for key, value in (
            ("attention", "flash"), ("in_place_loss", True), ("loss_in_steps", False),
            ("loss_metrics", 2), ("fused_optimizer", False),
            ("clips_gradients", True), ("unsharding", "autocast"),
            ("fused_elementwise", False), ("gradient_dtype", "fp16"),
            ("host.per_layer_forward", "90ms"), ("host.per_layer_backward", "90ms"),
            ("host.per_micro_batch", "90ms"), ("host.per_step", "90ms"), ("host.per_collective", "90ms"),
            ("host.blocking_launches", True),
            ("overlap.gradient_reduce", True), ("overlap.parameter_gather", True), ("overlap.pipeline_send", True),
            ("jitter", 0.5), ("vocab_multiple", 3000),
            ("gradient_accumulation", "fused"), ("gradient_accumulation", "copied"),
            ("scatter_gather", False), ("memory_overhead", "9GiB"),
            ("fragmentation", 0.3), ("compute_scale", 2.0), ("network_scale", 2.0),
            ("scales.memory", 2.0), ("scales.tensor_parallel", 2.0), ("scales.synchronisation", 2.0),
            ("scales.send", 2.0),
        )
    ),
    *(
        ("nodes", "dgx-a100-80g", key, value)
        for key, value in (
            ("devices", 4), ("interconnect.rate", "1GB/s"), ("interconnect.reduces", True), ("pcie", "pcie3-x16"),
            ("nic.count", 4),
            ("nic.rate", "10Gb/s"), ("nic.link", "tcp-25"), ("host.memory", "1GB"),
            ("host.memory_bandwidth", "1GB/s"), ("host.reduce_rate", "1GB/s"), ("power_overhead", "9kW"),
            ("price", {"hourly": "$9/h", "date": "2026-01", "source": "test"}), ("host.rank_slowdown", [1, 2, 2, 9]),
        )
    ),
    *(
        ("devices", "a100-sxm-80g", key, value)
        for key, value in (
            ("memory", "4.3GiB"), ("memory_bandwidth", "1GB/s"), ("peak.bf16", "1TFLOP/s"), ("power", "4kW"),
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
    source = files.profile_path(kind, name).resolve()
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


def test_switches_that_add_make_their_algorithms_legal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nvls` needs nodes that say so and `sharp` a fabric; on them they are another plan than two trees."""
    trees = _answer(_set(SCENARIO, "layout.algorithm", "tree"))
    for algorithm, key in (("nvls", None), ("sharp", "cluster.fabric.in_network_reduction")):
        asked = _set(_set(SCENARIO, "layout.algorithm", algorithm), "layout.sync", "allreduce")
        assert isinstance(_answer(asked), str)
        if key is None:
            _moved(tmp_path, "nodes", "dgx-a100-80g", {"interconnect.reduces": True})
            monkeypatch.chdir(tmp_path)
        else:
            asked = _set(asked, key, True)
        found = _answer(asked)
        assert found["layout"]["sync"][0]["scheme"]["algorithm"] == algorithm
        assert found != trees


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


def test_the_overlap_of_tensor_parallel_collectives_moves_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Gathers and scatters of sequence parallelism come in pieces; an all-reduce has to be waited for.
    tree = _set(SCENARIO, "layout.sequence_parallel", True)
    before = _answer(tree)
    _moved(tmp_path, "frameworks", "megatron-lm", {"overlap.tensor_parallel": 0.9})
    monkeypatch.chdir(tmp_path)
    assert _answer(tree) != before


@pytest.mark.parametrize(
    ("key", "value", "layout"),
    [
        ("communicator", "3GB", {}),
        ("eager_loss", True, {}),
        ("fp32_shards", True, {"sync": "sharded", "sharded_stage": 3, "pp": 1, "dp": 16}),
        ("fp8_inputs", True, {}),
        ("reduce_buffer", "5MB", {"sync": "sharded", "sharded_stage": 1}),
        ("stage_outputs", True, {}),
        ("step_gradients", "as they are", {"gradient": "bf16", "sync": "allreduce"}),
    ],
)
def test_what_a_framework_holds_in_device_memory_moves_the_answer(
    key: str, value: Any, layout: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = copy.deepcopy(SCENARIO)
    tree["layout"] |= layout
    tree["model"]["vocab"] = 250_000 if key == "eager_loss" else tree["model"]["vocab"]
    if key == "step_gradients":
        # Few activations, so that memory is fullest at the optimizer's step.
        tree["training"] |= {"global_batch": 16, "sequence": 64}
        tree["layout"]["micro_batch"] = 1
    if key == "fp8_inputs":
        tree["cluster"]["nodes"] = {"hgx-h100": 4}
        tree["training"]["precision"] = "fp8"
        tree["layout"]["recompute"] = "none"
    before = _answer(tree)
    assert not isinstance(before, str), before
    _moved(tmp_path, "frameworks", "megatron-lm", {f"device_memory.{key}": value})
    monkeypatch.chdir(tmp_path)
    assert _answer(tree) != before


def test_the_scale_of_misaligned_products_moves_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Heads of 50 columns are no multiple of 16 bytes.
    tree = _set(SCENARIO, "model.head_dim", 50)
    answers = []
    for scale in (1.0, 5.0):
        folder = tmp_path / str(scale)
        folder.mkdir()
        _moved(folder, "frameworks", "megatron-lm", {"scales.misaligned": scale})
        monkeypatch.chdir(folder)
        answers.append([_answer(each) for each in (tree, SCENARIO)])
    assert answers[0][0] != answers[1][0]
    assert answers[0][1] == answers[1][1]


def test_the_scale_of_fused_attention_moves_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for scale in (1.0, 50.0):
        folder = tmp_path / str(scale)
        folder.mkdir()
        _moved(folder, "frameworks", "megatron-lm", {"attention": "flash", "scales.attention": scale})
        monkeypatch.chdir(folder)
        answers.append(_answer(SCENARIO))
    assert answers[0] != answers[1]


@pytest.mark.parametrize("value", ["flash-1", "flash-2", "flash-3", "cudnn"])
def test_generations_of_attention_move_the_answer(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = _set(SCENARIO, "cluster.nodes", {"hgx-h100": 4})
    answers = []
    for attention in ("flash", value):
        folder = tmp_path / attention
        folder.mkdir()
        _moved(folder, "frameworks", "megatron-lm", {"attention": attention})
        monkeypatch.chdir(folder)
        answers.append(_answer(tree))
    # NVIDIA's own is what an H100's table holds.
    assert (answers[0] == answers[1]) == (value == "cudnn")


@pytest.mark.parametrize(("key", "value"), [("attention_kernel", "flash-1"), ("attention_prepared", False)])
def test_what_an_attention_table_holds_moves_the_answer(
    key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for number, moves in enumerate(({}, {f"tables.{key}": value})):
        folder = tmp_path / str(number)
        folder.mkdir()
        _moved(folder, "frameworks", "megatron-lm", {"attention": "flash-2"})
        _moved(folder, "devices", "a100-sxm-80g", moves)
        monkeypatch.chdir(folder)
        answers.append(_answer(SCENARIO))
    assert answers[0] != answers[1]


def test_what_selective_recomputation_runs_again_moves_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = _set(SCENARIO, "layout.recompute", "selective")
    before = _answer(tree)
    _moved(tmp_path, "frameworks", "megatron-lm", {"selective": "alternate-products"})
    monkeypatch.chdir(tmp_path)
    assert _answer(tree) != before


@pytest.mark.parametrize("value", ["flat", "split"])
def test_copies_of_sharded_weights_move_the_answer(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = copy.deepcopy(SCENARIO)
    tree["layout"] |= {"sync": "sharded", "sharded_stage": 3, "pp": 1, "dp": 16}
    before = _answer(tree)
    assert not isinstance(before, str), before
    _moved(tmp_path, "frameworks", "megatron-lm", {"unsharding": value})
    monkeypatch.chdir(tmp_path)
    assert _answer(tree) != before


def test_the_reduction_of_sharded_optimizers_moves_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = _set(_set(SCENARIO, "layout.sync", "sharded"), "layout.sharded_stage", 1)
    before = _answer(sharded)
    _moved(tmp_path, "frameworks", "megatron-lm", {"sharded_reduce": "all_reduce"})
    monkeypatch.chdir(tmp_path)
    assert _answer(sharded)["prediction"]["step_s"] > before["prediction"]["step_s"]


def test_schedules_of_a_framework_move_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each schedule that a framework runs makes other layouts legal."""
    free = copy.deepcopy(SCENARIO)
    del free["layout"]["schedule"]
    answers = []
    for number, able in enumerate((["1f1b"], ["1f1b", "interleaved"], ["1f1b", "zb-h1"], ["1f1b", "zb-v"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        _moved(folder, "frameworks", "megatron-lm", {"schedules": able})
        monkeypatch.chdir(folder)
        answers.append(_answer(free))
        assert not isinstance(answers[-1], str), answers[-1]
    for number, one in enumerate(answers):
        assert one not in answers[:number]


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


# Something to share among ranks: experts, and sequences under a fused kernel.
SHARED: dict[str, Any] = {
    **SCENARIO,
    "model": {**SCENARIO["model"], "experts": {"count": 4, "per_token": 2, "hidden": 1024}},
    "framework": "megatron-core",
    "layout": {"tp": 2, "pp": 2, "micro_batch": 2, "schedule": "1f1b", "cp": 1, "ep": 2, "sync": "sharded"},
}


@pytest.mark.parametrize(
    ("path", "value"), [("layout.cp", 2), ("layout.ep", 4), ("training.expert_imbalance", 1.5)], ids=str
)
def test_shared_experts_and_sequences_move_the_answer(path: str, value: Any) -> None:
    moved = _answer(_set(SHARED, path, value))
    assert not isinstance(moved, str), moved
    assert moved != _answer(SHARED)


# A noise for workers and servers, of which every key is moved in turn.
NOISY: dict[str, Any] = _set(
    _set(SCENARIO, "layout.sync", "parameter-server"),
    "cluster.noise",
    {"worker": {"kind": "lognormal", "sigma": 0.1}, "server": {"kind": "exponential", "tail": 0.5}},
)


@pytest.fixture(scope="module")
def noisy() -> Any:
    return _answer(NOISY)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1), ("every", "step"), ("every", "run"), ("worker", None), ("server", None), ("worker.sigma", 0.2),
        ("worker.kind", "normal"), ("worker", {"kind": "pareto", "shape": 3}), ("server.tail", 0.2),
        ("worker", {"kind": "pareto", "shape": 4}), ("server", {"kind": "exponential"}),
    ],
    ids=str,
)  # fmt: skip
def test_noise_moves_the_answer(key: str, value: Any, noisy: Any) -> None:
    moved = _answer(_set(NOISY, f"cluster.noise.{key}", value))
    assert not isinstance(moved, str), moved
    assert moved != noisy


_HAZARD = {"component": "node", "failures": 2, "exposure": "30d"}
FAILING: dict[str, Any] = {
    **_set(SCENARIO, "layout.sync", "parameter-server"),
    "reliability": {
        "failures": [_HAZARD, {"cause": "server", "component": "server", "failures": 2, "exposure": "30d"}],
        "detection": "5min", "reschedule": "5min", "repair": "20h",
        "checkpoint": {"mode": "async", "pause": "20s", "storage_rate": "1GB/s"},
        "planned": {"every": "3d", "lasts": "1h"},
    },
}  # fmt: skip


def _endured(tree: dict[str, Any]) -> Any:
    """What thirty days of the planned layout bring."""
    from clustersim.horizon.horizon import horizon
    from clustersim.horizon.job import job_of
    from clustersim.program.lower import lower
    from clustersim.report.horizon_screen import horizon_document
    from clustersim.simulate.simulate import simulate

    asked = question(tree, "knobs")
    plan = _endured_plan()
    assert asked.scenario.reliability is not None

    def step_s(layout: Any) -> float:
        program = lower(plan.workload, layout, plan.framework, plan.machines.devices_per_node)
        return simulate(program, asked.cluster, plan.framework).step_s

    job = job_of(asked.scenario.reliability, asked.cluster, asked.workload, plan.layout, step_s)
    found = horizon(job, days=30.0, seeds=4)
    return horizon_document("knobs", None, plan.workload.training, job, found)


@functools.cache
def _endured_plan() -> Any:
    tree = _set(_set(FAILING, "layout.servers", 2), "layout.placement", "dedicated")
    return make_plan(question(tree, "knobs"), workers=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("failures", "rsc-1"), ("failures", {**_HAZARD, "failures": 3}), ("failures", {**_HAZARD, "exposure": "40d"}),
        ("failures", {**_HAZARD, "component": "device"}), ("failures", {**_HAZARD, "component": "server"}),
        ("failures", {**_HAZARD, "shape": 0.5}), ("failures", {**_HAZARD, "replace": False}),
        ("failures", {**_HAZARD, "cause": "meteors"}), ("detection", "9min"), ("reschedule", "9min"),
        ("repair", "5h"), ("repair", None), ("spares", 1), ("elastic", True), ("planned", None),
        ("planned.every", "4d"), ("planned.lasts", "2h"), ("server_replicas", 1), ("checkpoint.mode", "sync"),
        ("checkpoint.interval", "3h"), ("checkpoint.bytes_per_parameter", "99B"), ("checkpoint.pause", "40s"),
        ("checkpoint.storage_rate", "500MB/s"), ("checkpoint.node_rate", "50MB/s"), ("checkpoint.write", "70s"),
        ("checkpoint.load", "70s"),
    ],
    ids=str,
)  # fmt: skip
def test_reliability_moves_what_the_days_bring(key: str, value: Any) -> None:
    tree = _set(FAILING, f"reliability.{key}", value)
    if value == "sync":
        del tree["reliability"]["checkpoint"]["pause"]
    assert _endured(tree) != _endured(_alone(key, value))


def _alone(key: str, value: Any) -> dict[str, Any]:
    """What a move is held against: the scenario, or, for a key of a hazard, the hazard alone as it was."""
    return _set(FAILING, "reliability.failures", _HAZARD) if key == "failures" and value != "rsc-1" else FAILING


# A batch that storage cannot bring as fast as it is used, so that everything on its way counts.
FED: dict[str, Any] = {
    **SCENARIO,
    "data": {"sample": "4MB", "readers": 2, "decode": "2ms", "cache": "10%"},
    "cluster": {**SCENARIO["cluster"], "storage": {"storage-nvme": {"count": 1, "storage": {"read_rate": "1GB/s"}}}},
}


@pytest.fixture(scope="module")
def fed() -> Any:
    return _answer(FED)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data", None), ("data.sample", "8MB"), ("data.readers", 1), ("data.decode", "900ms"), ("data.cache", "50%"),
        ("data.prefetch", 0), ("cluster.storage", {"storage-nvme": 2}), ("cluster.storage", {"storage-disk": 1}),
        *(
            (f"cluster.storage.storage-nvme.{key}", value)
            for key, value in (
                ("storage.tier", "disk"), ("storage.tier", "object"), ("storage.drives", 1),
                ("storage.read_rate", "2GB/s"), ("storage.read_latency", "20ms"), ("nic.rate", "1Gb/s"),
                ("price", {"hourly": "$99/h", "date": "2026-01", "source": "test"}), ("power_overhead", "9kW"),
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_keys_of_data_and_storage_move_the_answer(path: str, value: Any, fed: Any) -> None:
    tree = _set(FED, path, value)
    if path == "data":
        del tree["data"], tree["cluster"]["storage"]
    moved = _answer(tree)
    assert not isinstance(moved, str), moved
    assert moved != fed


def test_prefetch_moves_the_steps() -> None:
    """How far ahead is read decides when the first steps read, and whether a step waits at all."""
    assert _answer(_set(FED, "data.prefetch", 0))["prediction"]["step_s"] > _answer(FED)["prediction"]["step_s"]
