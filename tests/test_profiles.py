"""Every shipped profile of links, nodes, fabrics and frameworks loads and says where its figures are from."""

from __future__ import annotations

from pathlib import Path

import pytest

from clustersim.cluster.load import load_fabric, load_node, node_collectives
from clustersim.errors import ProfileError
from clustersim.files import profile_names, profile_path, read_csv
from clustersim.hardware.curve import message_seconds
from clustersim.hardware.load import load_framework, load_link
from clustersim.hardware.provenance import Provenance

LINKS = sorted(profile_names("links"))
NODES = sorted(profile_names("nodes"))
FABRICS = sorted(profile_names("fabrics"))
FRAMEWORKS = sorted(profile_names("frameworks"))


def says_where_from(provenance: Provenance) -> None:
    assert provenance.source not in ("", "not stated")
    if provenance.method in ("measured", "fitted"):
        assert provenance.rows > 0 or provenance.notes
    if provenance.method == "estimate":
        assert provenance.notes, "an estimate says why"


def test_the_profiles_a_scenario_may_name_are_all_there() -> None:
    assert {"nvlink2", "nvlink3", "nvlink4", "nvlink5", "pcie3-x16", "pcie4-x16", "pcie5-x16"} <= set(LINKS)
    assert {"infiniband-edr100", "infiniband-hdr200", "infiniband-ndr400", "omnipath-100"} <= set(LINKS)
    assert {"roce-100", "roce-200", "roce-400", "efa-100", "efa-400", "upi", "loopback"} <= set(LINKS)
    assert {"tcp-10", "tcp-25", "tcp-100", "tcp-aws-10"} <= set(LINKS)
    assert {"dgx-a100-80g", "dgx-a100-40g", "hgx-h100", "hgx-h200", "hgx-b200"} <= set(NODES)
    assert {"p4d", "p4de", "p5", "p3-2xlarge", "jeanzay-a100", "dgx-1-v100", "pcie-l40s-8"} <= set(NODES)
    assert {"cpu-server-100g", "cpu-server-200g", "cpu-server-400g", "storage-nvme"} <= set(NODES)
    assert {"one-switch", "leaf-spine", "leaf-spine-2to1", "rail-optimized"} <= set(FABRICS)
    assert {"megatron-lm", "megatron-deepspeed", "torch-fsdp", "clustersim"} <= set(FRAMEWORKS)


@pytest.mark.parametrize("name", LINKS)
def test_links(name: str) -> None:
    link = load_link(name)
    assert link.name == name
    says_where_from(link.provenance)
    assert all(0.0 < piece.efficiency <= 1.0 for piece in link.segments)
    gigabyte = message_seconds(link, 1e9)
    assert 0.4 < 1e9 / gigabyte / link.rate_bytes_per_s <= 1.0, "large messages get most of the rate"
    assert 1e-7 < message_seconds(link, 8.0) < 2e-4


@pytest.mark.parametrize(("older", "newer"), [("nvlink2", "nvlink3"), ("nvlink3", "nvlink4"), ("nvlink4", "nvlink5")])
def test_a_newer_nvlink_moves_a_large_message_faster(older: str, newer: str) -> None:
    assert message_seconds(load_link(newer), 1e9) < message_seconds(load_link(older), 1e9)


@pytest.mark.parametrize("name", NODES)
def test_nodes(name: str) -> None:
    node = load_node(name)
    assert node.name == name
    says_where_from(node.provenance)
    load_link(node.nic.link)
    if node.interconnect is not None:
        assert load_link(node.interconnect.link).kind in ("nvlink", "pcie")
    if node.devices:
        assert node.pcie is not None
        assert load_link(node.pcie).kind == "pcie"
        assert node.devices % node.devices_per_pcie_switch == 0
    host = node.host
    assert host.reduce_rate_bytes_per_s <= host.memory_bandwidth_bytes_per_s / 3
    if node.price is not None:
        assert node.price.date
        assert node.price.source


@pytest.mark.parametrize("name", [n for n in NODES if load_node(n).collectives])
def test_measured_collectives(name: str) -> None:
    node = load_node(name)
    folder = profile_path("nodes", name).parent
    for ref in node.collectives:
        assert ref.provenance.method == "measured"
        says_where_from(ref.provenance)
        assert len(read_csv(folder / ref.file)["bytes"]) == ref.provenance.rows
    table = node_collectives(node)
    assert table is not None
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        assert table.ranks(kind) == (2, 4, 8)
    assert all(6 <= sizes.size <= 27 for sizes, _ in table.curves.values()), "thin enough to read"


def test_a_host_without_tables_has_none() -> None:
    assert node_collectives(load_node("cpu-server-200g")) is None


def test_large_and_small_tables_join_without_a_step() -> None:
    """The rows from 1 GiB on come from other machines; bandwidth changes by less than a tenth there."""
    for name in ("dgx-a100-80g", "hgx-h100", "hgx-h200"):
        table = node_collectives(load_node(name))
        assert table is not None
        half, whole = table.seconds("all_reduce", 8, 2.0**29), table.seconds("all_reduce", 8, 2.0**30)
        assert half is not None
        assert whole is not None
        assert whole / half == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("name", FABRICS)
def test_fabrics(name: str) -> None:
    fabric = load_fabric(name)
    assert fabric.provenance is not None
    says_where_from(fabric.provenance)
    assert 5e-8 <= fabric.hop_latency_s <= 5e-6


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_frameworks(name: str) -> None:
    framework = load_framework(name)
    assert framework.name == name
    says_where_from(framework.provenance)
    assert {"host", "memory_overhead"} <= set(framework.calibrated)
    for provenance in framework.calibrated.values():
        says_where_from(provenance)
    if framework.overlap.compute_slowdown != 1.0:
        assert "overlap.compute_slowdown" in framework.calibrated


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ProfileError, match="did you mean 'nvlink3'"):
        load_link("nvlnk3")
    with pytest.raises(ProfileError, match="did you mean 'dgx-a100-80g'"):
        load_node("dgx-a100-80")


def test_a_profile_of_the_working_folder_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = load_link("tcp-25")
    folder = tmp_path / "hwprofiles" / "links"
    folder.mkdir(parents=True)
    text = profile_path("links", "tcp-25").read_text(encoding="utf-8")
    (folder / "tcp-25.yaml").write_text(text.replace("rate: 25Gb/s", "rate: 50Gb/s"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_link("tcp-25").rate_bytes_per_s == 2 * shipped.rate_bytes_per_s
