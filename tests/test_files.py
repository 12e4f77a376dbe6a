"""Reading and writing files: round trips, digests, atomic writes, names."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustersim import files
from clustersim.cluster.fabric import Fabric
from clustersim.cluster.node import Node
from clustersim.compare import Run
from clustersim.errors import InputError, ScenarioError
from clustersim.hardware.calibration import Calibration
from clustersim.hardware.device import Device
from clustersim.hardware.framework import Framework
from clustersim.hardware.link import Link
from clustersim.layout.layout import AllReduce, Layout, ParameterServer, Sharded
from clustersim.plan import Plan
from clustersim.program.program import Program
from clustersim.scenario.scenario import Scenario
from clustersim.timeline import OpId, RankClass, Span, Timeline

_KINDS: dict[str, Any] = {
    "devices": Device,
    "nodes": Node,
    "links": Link,
    "fabrics": Fabric,
    "frameworks": Framework,
}
_BUILT_IN = [(kind, name) for kind in _KINDS for name in sorted(files.profile_names(kind))]


@pytest.mark.parametrize(("kind", "name"), _BUILT_IN)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_profile_round_trip(kind: str, name: str, suffix: str, tmp_path: Path) -> None:
    found = files.load(_KINDS[kind], files.profile_path(kind, name))
    files.save(found, tmp_path / f"copy{suffix}")
    assert files.load(_KINDS[kind], tmp_path / f"copy{suffix}") == found


@pytest.mark.parametrize("name", sorted(files.scenario_names()))
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_scenario_round_trip(name: str, suffix: str, tmp_path: Path) -> None:
    found: Scenario = files.load(Scenario, files.scenario_path(name))
    files.save(found, tmp_path / f"copy{suffix}")
    assert files.load(Scenario, tmp_path / f"copy{suffix}") == found


_TYPES = (Scenario, Plan, Run, Device, Node, Link, Fabric, Framework, Calibration, Layout, Program)


def _nested(type_: Any) -> set[type]:
    """Every dataclass that values of a type hold."""
    from typing import get_args, get_type_hints

    found: set[type] = set()
    todo = [type_]
    while todo:
        one = todo.pop()
        todo += get_args(one)
        if isinstance(one, type) and dataclasses.is_dataclass(one) and one not in found:
            found.add(one)
            todo += get_type_hints(one, include_extras=True).values()
    return found


def test_every_type_of_every_file_is_frozen_slotted_and_refuses_unknown_keys() -> None:
    every = set().union(*(_nested(type_) for type_ in _TYPES))
    assert len(every) > 40
    for type_ in every:
        parameters = type_.__dataclass_params__  # type: ignore[attr-defined]
        assert parameters.frozen, type_
        assert "__slots__" in vars(type_), type_
        schema = files.adapter(type_).json_schema(by_alias=True)
        own = schema["$defs"][type_.__name__] if "$ref" in schema else schema
        assert own.get("additionalProperties") is False, type_


_SCHEMES = st.one_of(
    st.builds(
        AllReduce,
        algorithm=st.sampled_from(["ring", "tree", "hierarchical", "halving-doubling"]),
        bucket_bytes=st.floats(1.0, 1e12),
        overlap=st.booleans(),
    ),
    st.builds(Sharded, stage=st.sampled_from([1, 2, 3]), bucket_bytes=st.floats(1.0, 1e12), overlap=st.booleans()),
)


@given(scheme=_SCHEMES)
def test_plain_and_validated_are_inverse(scheme: AllReduce | Sharded) -> None:
    type_ = type(scheme)
    assert files.validated(type_, files.plain(scheme), "scheme") == scheme
    assert files.validated(type_, json.loads(files.json_text(scheme)), "scheme") == scheme


def test_a_union_member_is_told_by_its_kind() -> None:
    tree = files.plain(Sharded(stage=2, bucket_bytes=25e6, overlap=True))
    assert files.validated(AllReduce | Sharded | ParameterServer, tree, "scheme") == Sharded(
        stage=2, bucket_bytes=25e6, overlap=True
    )
    with pytest.raises(ScenarioError, match="kind"):
        files.validated(AllReduce | Sharded | ParameterServer, {**tree, "kind": "gossip"}, "scheme")


_TIMES = st.floats(0.0, 1e4, allow_nan=False)


@given(times=st.lists(st.tuples(_TIMES, _TIMES, _TIMES), max_size=5))
def test_timeline_round_trip_is_exact(times: list[tuple[float, float, float]]) -> None:
    spans = tuple(
        Span(
            op=OpId(0, index, 0, "forward", "all", "compute"),
            rank=0,
            ready_s=ready,
            start_s=start,
            end_s=end,
            resource="compute",
            after=tuple(range(index)),
        )
        for index, (ready, start, end) in enumerate(times)
    )
    found = Timeline(source="measured", steps=1, classes=(RankClass(rank=0, label="all", members=(0, 1)),), spans=spans)
    assert files.validated(Timeline, json.loads(files.json_text(found)), "timeline") == found


@given(seed=st.integers(0, 2**32))
def test_digest_does_not_depend_on_the_order_of_keys(seed: int) -> None:
    path = files.profile_path("devices", "a100-sxm-80g")
    tree, _ = files.read_tree(path)

    def shuffled(node: Any, order: random.Random) -> Any:
        if isinstance(node, dict):
            keys = list(node)
            order.shuffle(keys)
            return {key: shuffled(node[key], order) for key in keys}
        return [shuffled(item, order) for item in node] if isinstance(node, list) else node

    found = files.validated(Device, tree, "device")
    other = files.validated(Device, shuffled(tree, random.Random(seed)), "device")
    assert files.digest(found) == files.digest(other)


def test_digest_depends_on_every_value() -> None:
    link: Link = files.load(Link, files.profile_path("links", "nvlink3"))
    digests = {files.digest(link), files.digest(dataclasses.replace(link, rate_bytes_per_s=1.0))}
    digests.add(files.digest(dataclasses.replace(link, name="other")))
    assert len(digests) == 3


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    files.write_text(path, "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [other.name for other in tmp_path.iterdir()] == ["plan.json"]


def test_writing_where_a_file_stands_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        files.write_text(tmp_path / "file" / "plan.json", "x")


def test_yaml_is_version_1_2(tmp_path: Path) -> None:
    tree, places = files.parse_yaml("a: 1e9\nb: no\nc: 08\nd:\n  - x: 1\n    y: [2, 3]\n", "f")
    assert tree == {"a": 1e9, "b": "no", "c": 8, "d": [{"x": 1, "y": [2, 3]}]}
    assert places[("a",)] == (1, 4)
    assert places[("d", 0, "y", 1)] == (6, 12)


def test_json_with_a_constant_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": Infinity}')
    with pytest.raises(ScenarioError, match="Infinity is not JSON"):
        files.read_tree(tmp_path / "x.json")


def test_own_profiles_go_before_the_user_s_and_those_before_the_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLUSTERSIM_HOME", str(tmp_path / "home"))
    built_in = files.profile_path("links", "nvlink3")
    text = built_in.read_text(encoding="utf-8")
    files.write_text(tmp_path / "home" / "hwprofiles" / "links" / "nvlink3.yaml", text)
    assert files.profile_path("links", "nvlink3") == tmp_path / "home" / "hwprofiles" / "links" / "nvlink3.yaml"
    files.write_text(tmp_path / "hwprofiles" / "links" / "nvlink3.yaml", text)
    assert files.profile_path("links", "nvlink3").resolve() == tmp_path / "hwprofiles" / "links" / "nvlink3.yaml"


def test_merge_keys_are_read_and_errors_in_them_still_told(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text("base: &base {one: 1, two: 2}\nother:\n  <<: *base\n  two: 3\n")
    tree, places = files.read_tree(path)
    assert tree["other"] == {"one": 1, "two": 3}
    assert places["other", "two"] == (4, 8)
