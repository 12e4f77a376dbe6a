"""Topology files of one machine: every peculiarity that such files have, in short texts of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.app.door import run
from clustersim.cluster.load import load_node
from clustersim.errors import InputError, ProfileError
from clustersim.hardware.load import load_link
from clustersim.hardware.provenance import Provenance
from clustersim.importing.nccl_xml import read_xml
from clustersim.importing.node_profile import Said, node_profile, spread_evenly, used_nics
from clustersim.importing.nvidia_smi import read_matrix
from clustersim.importing.topology import PATHS, Topology, graph

FROM = Provenance(method="imported", source="a test")

# Two GPUs a switch, two cards a switch, one card that serves the host.
SWITCHED = """\
\tGPU0\tGPU1\tGPU2\tGPU3\tmlx5_0\tmlx5_1\tmlx5_2\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV12\tNV12\tNV12\tPXB\tSYS\tNODE\t0-15,32-47\t0
GPU1\tNV12\t X \tNV12\tNV12\tPXB\tSYS\tNODE\t0-15,32-47\t0
GPU2\tNV12\tNV12\t X \tNV12\tSYS\tPXB\tSYS\t16-31,48-63\t1
GPU3\tNV12\tNV12\tNV12\t X \tSYS\tPXB\tSYS\t16-31,48-63\t1
mlx5_0\tPXB\tPXB\tSYS\tSYS\t X \tSYS\tNODE
mlx5_1\tSYS\tSYS\tPXB\tPXB\tSYS\t X \tSYS
mlx5_2\tNODE\tNODE\tSYS\tSYS\tNODE\tSYS\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
"""


def spaced(text: str) -> str:
    """The same matrix as people paste it: tabs made spaces."""
    return text.replace("\t", "   ")


def facts(found: Topology) -> tuple[object, ...]:
    gpus = [gpu.name for gpu in found.gpus]
    return (
        gpus,
        [nic.name for nic in found.nics],
        [found.peers(gpu) for gpu in gpus],
        [found.nearest_nics(gpu) for gpu in gpus],
        [(gpu.numa, gpu.cpus) for gpu in found.gpus],
    )


@pytest.mark.parametrize("text", [SWITCHED, spaced(SWITCHED)], ids=["tabs", "spaces"])
def test_matrix_with_switches_and_cards(text: str) -> None:
    found = read_matrix(text, "m.txt")
    assert [gpu.name for gpu in found.gpus] == ["GPU0", "GPU1", "GPU2", "GPU3"]
    assert found.interconnect == "switch", "three peers with 12 links each are more links than a GPU has"
    assert found.peers("GPU1") == {"GPU0": 12, "GPU2": 12, "GPU3": 12}
    assert found.nvlinks_of("GPU1") == 12
    assert found.nearest_nics("GPU0") == ("PXB", ("mlx5_0",))
    assert found.nearest_nics("GPU3") == ("PXB", ("mlx5_1",))
    assert used_nics(found) == ("mlx5_0", "mlx5_1"), "the third card is nearest to no GPU"
    assert spread_evenly(found)
    assert found.gpus_per_switch() == 2
    assert (found.gpus[2].numa, found.gpus[2].cpus) == ("1", "16-31,48-63")
    assert found.notes == ()


def test_colours_prompt_and_a_header_that_lost_its_escapes() -> None:
    lines = SWITCHED.splitlines()
    coloured = "\x1b[4m" + lines[0] + "\x1b[0m\n" + "\n".join(lines[1:])
    lost = "[4m" + lines[0] + "[0m\n" + "\n".join(lines[1:])
    prompt = "$ nvidia-smi topo -m\n# a note\n" + SWITCHED
    wanted = facts(read_matrix(SWITCHED, "m.txt"))
    for text in (coloured, lost, prompt, SWITCHED.replace("\n", "\r\n")):
        assert facts(read_matrix(text, "m.txt")) == wanted


def test_wrapped_header_and_rows() -> None:
    wide = 6
    lines = []
    for line in spaced(SWITCHED).splitlines():
        words = line.split()
        if words and words[0] in ("Legend:", "X", "SYS"):
            break
        words = line.replace("CPU Affinity", "CPU_").replace("NUMA Affinity", "NUMA_").split()
        for start in range(0, len(words), wide):
            lines.append(" ".join(words[start : start + wide]))
    text = "\n".join(lines).replace("CPU_", "CPU Affinity").replace("NUMA_", "NUMA Affinity")
    assert facts(read_matrix(text, "m.txt")) == facts(read_matrix(SWITCHED, "m.txt"))


def test_partial_matrix_says_what_is_not_stated() -> None:
    cut = "\n".join(SWITCHED.splitlines()[:4]) + "\nGPU3\tNV12\tNV12\tNV12\t X \tSYS\n# cut here\n"
    found = read_matrix(cut, "m.txt")
    assert len(found.gpus) == 4
    assert len(found.nics) == 3
    assert found.nearest_nics("GPU0") == ("PXB", ("mlx5_0",))
    assert found.nearest_nics("GPU3") is None
    assert used_nics(found) == ()
    assert found.notes == ("line 5: GPU3 has 5 of 7 cells", "no row for mlx5_0, mlx5_1, mlx5_2")
    with pytest.raises(ProfileError, match="--nics COUNT"):
        node_profile(found, Said(), "x", FROM)


def test_rows_that_the_source_left_out_follow_from_the_columns() -> None:
    text = "\n".join(SWITCHED.splitlines()[:5])
    found = read_matrix(text, "m.txt")
    assert found.nearest_nics("GPU3") == ("PXB", ("mlx5_1",))
    assert found.tie("mlx5_0", "mlx5_1").path is None


def test_hybrid_cube_mesh_fits_a_mesh_profile() -> None:
    rows = """\
        GPU0 GPU1 GPU2 GPU3 GPU4 GPU5 GPU6 GPU7 CPU Affinity
GPU0 X NV1 NV1 NV2 NV2 SYS SYS SYS 0-9
GPU1 NV1 X NV2 NV1 SYS NV2 SYS SYS 0-9
GPU2 NV1 NV2 X NV2 SYS SYS NV1 SYS 0-9
GPU3 NV2 NV1 NV2 X SYS SYS SYS NV1 0-9
GPU4 NV2 SYS SYS SYS X NV1 NV1 NV2 10-19
GPU5 SYS NV2 SYS SYS NV1 X NV2 NV1 10-19
GPU6 SYS SYS NV1 SYS NV1 NV2 X NV2 10-19
GPU7 SYS SYS SYS NV1 NV2 NV1 NV2 X 10-19
"""
    found = read_matrix(rows, "m.txt")
    assert found.interconnect == "direct"
    assert found.peers("GPU0") == {"GPU1": 1, "GPU2": 1, "GPU3": 2, "GPU4": 2}
    assert found.nvlinks_of("GPU5") == 6
    node = node_profile(found, Said(like=load_node("dgx-1-v100")), "x", FROM)
    assert node.interconnect is not None
    assert (node.interconnect.kind, node.interconnect.link, node.devices) == ("mesh", "nvlink2", 8)
    assert [sorted(group) for group in found.numa_groups()] == [
        ["GPU0", "GPU1", "GPU2", "GPU3"], ["GPU4", "GPU5", "GPU6", "GPU7"],
    ]  # fmt: skip
    # Two GPUs change places: not the mesh that the simulator knows.
    turned = rows.replace("GPU0 X NV1 NV1 NV2 NV2 SYS", "GPU0 X NV2 NV1 NV1 NV2 SYS")
    turned = turned.replace("GPU1 NV1 X NV2 NV1", "GPU1 NV2 X NV2 NV1").replace(
        "GPU3 NV2 NV1 NV2 X", "GPU3 NV1 NV1 NV2 X"
    )
    with pytest.raises(ProfileError, match="hybrid cube mesh"):
        node_profile(
            read_matrix(turned, "m.txt"), Said(like=load_node("dgx-1-v100"), rate_bytes_per_s=1.5e11), "x", FROM
        )


def test_nvlink_pairs_are_no_interconnect_of_all() -> None:
    text = """\
     GPU0 GPU1 GPU2 GPU3
GPU0  X   NV4  NODE NODE
GPU1 NV4   X   NODE NODE
GPU2 NODE NODE  X   NV4
GPU3 NODE NODE NV4   X
"""
    found = read_matrix(text, "m.txt")
    assert found.interconnect == "some"
    assert found.peers("GPU2") == {"GPU3": 4}
    said = Said(like=load_node("pcie-l40s-8"))
    with pytest.raises(ProfileError, match="only some of the GPUs"):
        node_profile(found, said, "x", FROM)
    said = Said(like=load_node("pcie-l40s-8"), interconnect="pcie", link=load_link("pcie4-x16"))
    node = node_profile(found, said, "x", FROM)
    assert node.interconnect is not None
    assert node.interconnect.kind == "pcie"
    assert "NVLinks of the file are left out" in node.provenance.notes


def test_a_pair_needs_the_rate_of_its_links() -> None:
    text = "     GPU0 GPU1 CPU Affinity NUMA Affinity\nGPU0  X   NV2  0-23  N/A\nGPU1 NV2   X   0-23  N/A\n"
    found = read_matrix(text, "m.txt")
    assert found.interconnect == "one pair"
    assert (found.gpus[0].numa, found.gpus[0].cpus) == (None, "0-23")
    like = load_node("dgx-1-v100")
    with pytest.raises(ProfileError, match=r"2 NVLinks, and the rate of nvlink2 is of 6; give --rate"):
        node_profile(found, Said(like=like), "x", FROM)
    node = node_profile(found, Said(like=like, rate_bytes_per_s=5e10, nics=2), "x", FROM)
    assert node.interconnect is not None
    assert node.interconnect.rate_bytes_per_s == 5e10


def test_no_nvlink_shown_is_not_guessed_to_be_none() -> None:
    text = "     GPU0 GPU1 CPU Affinity NUMA Affinity\nGPU0  X   PHB  0-11  0\nGPU1 PHB   X   0-11  0\n"
    found = read_matrix(text, "m.txt")
    assert found.interconnect == "none"
    assert found.gpus_per_switch() == 1
    with pytest.raises(ProfileError, match="--interconnect KIND and --link NAME"):
        node_profile(found, Said(device="l40s"), "x", FROM)
    # What the user says about hidden links stands, and the profile says who said it.
    like = load_node("dgx-1-v100")
    node = node_profile(found, Said(interconnect="mesh", link=load_link("nvlink2"), like=like), "x", FROM)
    assert node.interconnect is not None
    assert (node.interconnect.kind, node.interconnect.rate_bytes_per_s) == ("mesh", None)
    assert "Not from the file: interconnect mesh, link nvlink2" in node.provenance.notes


def test_names_and_columns_of_many_drivers() -> None:
    text = """\
\tGPU0\tGPU1\tNIC0\trocep24s0\tbnxt_re0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tSOC\tPIX\tNODE\tSYS\t\t1\t\tN/A
GPU1\tSOC\t X \tPHB\tSYS\tSYS\t0-3,8\t0\t\tN/A
NIC0\tPIX\tPHB\t X \tNODE\tSYS\t\t\t\t
rocep24s0\tNODE\tSYS\tNODE\t X \tSYS\t\t\t\t
bnxt_re0\tSYS\tSYS\tSYS\tSYS\t X \t\t\t\t

Legend:

  X    = Self

NIC Legend:

  NIC0: mlx5_0
"""
    found = read_matrix(text, "m.txt")
    assert found.tie("GPU0", "GPU1").path == "SYS", "drivers before 384 called it SOC"
    assert [nic.name for nic in found.nics] == ["NIC0", "rocep24s0", "bnxt_re0"]
    assert found.nics[0].device == "mlx5_0"
    assert [(gpu.numa, gpu.cpus) for gpu in found.gpus] == [("1", None), ("0", "0-3,8")]
    assert found.nearest_nics("GPU1") == ("PHB", ("NIC0",))
    # Spaces lose the place of an empty affinity: then it is not stated.
    loose = read_matrix(text.replace("\t", "  "), "m.txt")
    assert (loose.gpus[0].numa, loose.gpus[0].cpus) == (None, None)
    assert loose.notes == ("line 2: which affinity of GPU0 '1 N/A' is, is not clear",)


def test_mig_instances_are_left_out_with_a_note() -> None:
    text = "     GPU0 GPU1 MIG0 \nGPU0  X   NV4  PIX\nGPU1 NV4   X   PIX\nMIG0 PIX  PIX  X\n"
    found = read_matrix(text, "m.txt")
    assert len(found.gpus) == 2
    assert found.nics == ()
    assert "1 MIG instances" in found.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"m.txt: has no matrix"),
        ("GPU0 GPU1\n", r"m.txt: has a header but no row"),
        (" GPU0 GPU1\nGPU0 X FOO\n", r"m.txt:2: 'FOO' is no link; write one of X, NV#, PIX"),
        (" GPU0 GPU1\nGPU0 FOO X\n", r"m.txt:2: 'FOO' is no link"),
        (" GPU0 GPU1\nGPU0 X PIX\nGPU1 PHB X\n", r"m.txt:3: GPU1 to GPU0 is 'PHB', but the row of GPU0 says otherwise"),
        (" GPU0 GPU1\nGPU0 PIX X\n", r"m.txt:2: GPU0 and GPU0 is itself and must be X"),
        (" GPU0 GPU1\nGPU0 X X\n", r"m.txt:2: GPU0 and GPU1 are two devices and cannot be X"),
        (" GPU0 GPU1\nGPU0 X PIX\nGPU0 X PIX\n", r"m.txt:3: a second row for GPU0"),
        (" GPU0 GPU1 GPU2 CPU Affinity\nGPU0 X PIX 0-7\n", r"m.txt:2: 2 cells, but the header has 3 columns"),
    ],
)
def test_mistakes_in_a_matrix(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_matrix(text, "m.txt")


@st.composite
def machines(draw: st.DrawFn) -> tuple[list[str], dict[tuple[str, str], str]]:
    gpus, nics = draw(st.integers(1, 6)), draw(st.integers(0, 5))
    names = [f"GPU{n}" for n in range(gpus)] + [f"NIC{n}" for n in range(nics)]
    cells = {}
    for number, a in enumerate(names):
        for b in names[number + 1 :]:
            links = ["NV1", "NV6"] if a.startswith("GPU") and b.startswith("GPU") else []
            cells[a, b] = draw(st.sampled_from([*PATHS, *links]))
    return names, cells


@settings(deadline=None)
@given(machines(), st.sampled_from(["\t", "   ", " \t"]))
def test_every_cell_of_any_matrix_is_read(machine: tuple[list[str], dict[tuple[str, str], str]], gap: str) -> None:
    names, cells = machine
    lines = [gap + gap.join(names)]
    for a in names:
        lines.append(gap.join([a, *(cells.get((a, b)) or cells.get((b, a)) or "X" for b in names)]))
    found = read_matrix("\n".join(lines), "m.txt")
    assert [device.name for device in found.devices] == names
    for (a, b), cell in cells.items():
        tie = found.tie(a, b)
        assert (f"NV{tie.nvlinks}" if tie.nvlinks else tie.path) == cell
    wires = graph(found)
    assert sum(kind == "gpu" for _, kind in wires.nodes(data="kind")) == len(found.gpus)
    assert all(wires.has_edge(b, a) for a, b in wires.edges)


def test_graph_of_a_matrix() -> None:
    wires = graph(read_matrix(SWITCHED, "m.txt"))
    kinds = [kind for _, kind in wires.nodes(data="kind")]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "gpu": 4, "nic": 3, "pcie-switch": 2, "numa": 2, "nvswitch": 1,
    }  # fmt: skip
    assert wires.edges["GPU0", "nvswitch"]["nvlinks"] == 12
    assert wires.has_edge("GPU0", "pcie0")
    assert wires.has_edge("mlx5_0", "pcie0")
    assert wires.has_edge("mlx5_1", "pcie1")
    assert wires.has_edge("mlx5_2", "numa0")
    assert not wires.has_edge("mlx5_2", "numa1")


# ---------------------------------------------------------------------------------------------------------- NCCL XML

CLOUD = """\
<!-- a note -->
<system version="1">
  <cpu numaid="0" affinity="0000000f,0000ffff" arch="x86_64">
    <pci busid="ffff:ff:01.0" class="0x060400" link_speed="8 GT/s" link_width="16">
      <pci busid="0000:10:1c.0" class="0x030200" vendor="0x10de" device="0x20b2" link_speed="8 GT/s" link_width="16"/>
      <pci busid="0000:10:1d.0" class="0x030200" vendor="0x10de" device="0x20b2" link_speed="8 GT/s" link_width="16"/>
      <pci busid="0000:10:1b.0" class="0x020000" link_speed="8 GT/s" link_width="16"/>
    </pci>
  </cpu>
  <cpu numaid="1">
    <pci busid="ffff:ff:02.0" class="0x060400">
      <pci busid="0000:20:1c.0" class="0x030200" vendor="0x10de" device="0x20b2"/>
      <pci busid="0000:20:1d.0" class="0x030200" vendor="0x10de" device="0x20b2"/>
      <pci busid="0000:20:1b.0" class="0x020700"/>
    </pci>
    <pci busid="0000:01:00.0" class="0x010802"/>
  </cpu>
</system>
"""

DUMP = """\
<?xml version="1.0" encoding="ISO-8859-1"?>
<system version="1">
  <cpu host_hash="0xabc" numaid="0" affinity="ffff" arch="x86_64" vendor="AuthenticAMD" familyid="143" modelid="49">
    <pci busid="0000:01:00.0" class="0x060400" link_speed="16.0 GT/s PCIe" link_width="16">
      <pci busid="0000:02:00.0" class="0x060400" link_speed="16.0 GT/s PCIe" link_width="16">
        <pci busid="0000:07:00.0" class="0x030200" vendor="0x10de" device="0x2330" link_speed="32.0 GT/s PCIe">
          <gpu dev="0" sm="90" rank="0" gdr="1">
            <nvlink target="0000:c4:00.0" count="4" tclass="0x068000"/>
            <nvlink target="fffffff:ffff:ff" count="14" tclass="0x068000"/>
          </gpu>
        </pci>
      </pci>
      <pci busid="0000:0c:00.0" class="0x020700" link_speed="16.0 GT/s PCIe" link_width="16">
        <nic>
          <net name="mlx5_0" dev="0" speed="400000" port="1" latency="0.000000" guid="0xa2" maxconn="131072" gdr="1"/>
          <net name="mlx5_1" dev="1" speed="-1" port="2"/>
        </nic>
      </pci>
    </pci>
    <nic>
      <net name="eth0" dev="2" speed="10000" port="0"/>
    </nic>
  </cpu>
  <cpu host_hash="0xabc" numaid="1">
    <pci busid="0000:87:00.0" class="0x030200" vendor="0x10de" device="0x2330">
      <gpu dev="1" sm="90" rank="1">
        <nvlink target="0000:c4:00.0" count="18" tclass="0x068000"/>
      </gpu>
    </pci>
  </cpu>
</system>
"""


def test_a_cloud_file_lists_pci_devices_only() -> None:
    found = read_xml(CLOUD, "t.xml")
    assert [gpu.bus for gpu in found.gpus] == ["0000:10:1c.0", "0000:10:1d.0", "0000:20:1c.0", "0000:20:1d.0"]
    assert {gpu.profile for gpu in found.gpus} == {"a100-sxm-80g"}
    assert found.interconnect == "not stated"
    assert found.peers("GPU0") is None
    assert found.nearest_nics("GPU1") == ("PIX", ("NIC0",))
    assert found.nearest_nics("GPU2") == ("PIX", ("NIC1",))
    assert [nic.kind for nic in found.nics] == ["ethernet", "infiniband"]
    assert found.tie("GPU0", "GPU2").path == "SYS"
    assert found.gpus_per_switch() == 2
    assert (found.gpus[0].numa, found.gpus[0].cpus) == ("0", "0-15,32-35")
    # 8 GT/s x 16 lanes with 128b/130b.
    assert found.gpus[0].pcie_bytes_per_s == pytest.approx(15.754e9, rel=1e-3)
    assert found.gpus[2].pcie_bytes_per_s is None
    assert not found.unknown
    with pytest.raises(ProfileError, match="--interconnect KIND and --link NAME, --nic-link NAME, --host NODE"):
        node_profile(found, Said(), "x", FROM)
    with pytest.raises(ProfileError, match="are a100-sxm-80g by their PCI ids, not l40s"):
        node_profile(found, Said(device="l40s"), "x", FROM)
    node = node_profile(found, Said(like=load_node("p4de")), "x", FROM)
    assert (node.device, node.devices, node.nic.count, node.devices_per_pcie_switch) == ("a100-sxm-80g", 4, 2, 2)


def test_a_full_dump_has_nvlinks_and_nets() -> None:
    found = read_xml(DUMP, "t.xml")
    assert found.interconnect == "switch"
    assert found.to_switch == {"GPU0": 18, "GPU1": 18}
    assert found.peers("GPU0") == {"GPU1": 18}
    assert [nic.name for nic in found.nics] == ["mlx5_0", "mlx5_1", "eth0"]
    assert [nic.rate_bytes_per_s for nic in found.nics] == [50e9, None, 1.25e9]
    assert found.nearest_nics("GPU0") == ("PXB", ("mlx5_0", "mlx5_1"))
    assert found.nearest_nics("GPU1") == ("SYS", ("mlx5_0", "mlx5_1", "eth0"))
    assert used_nics(found) == ("mlx5_0", "mlx5_1")
    wires = graph(found)
    assert wires.edges["GPU0", "nvswitch"]["nvlinks"] == 18
    assert wires.edges["mlx5_0", "pcie0"]["rate_bytes_per_s"] == pytest.approx(31.5e9, rel=1e-3)


def test_a_dump_with_direct_nvlinks() -> None:
    pci = '<pci busid="0000:0{n}:00.0" class="0x030200"><gpu dev="{n}" sm="70">{links}</gpu></pci>'
    link = '<nvlink target="0000:0{n}:00.0" count="{c}" tclass="0x030200"/>'
    inside = "".join(
        pci.format(n=n, links="".join(link.format(n=m, c=2) for m in range(3) if m != n)) for n in range(3)
    )
    found = read_xml(f'<system version="1"><cpu numaid="0">{inside}</cpu></system>', "t.xml")
    assert found.interconnect == "direct"
    assert found.peers("GPU1") == {"GPU0": 2, "GPU2": 2}
    alone = read_xml('<system><cpu><pci busid="0:1:0.0"><gpu dev="0"/></pci></cpu></system>', "t.xml")
    assert (len(alone.gpus), alone.interconnect, alone.gpus[0].numa) == (1, "none", None)


def test_devices_without_a_class_are_not_guessed() -> None:
    text = """<system version="1"><cpu numaid="0">
    <pci busid="0000:00:16.0"/>
    <pci busid="0000:00:17.0"/></cpu><cpu numaid="1"><pci busid="0000:00:15.0"/></cpu></system>"""
    found = read_xml(text, "t.xml")
    assert (found.gpus, found.nics) == ((), ())
    assert found.unknown == {"0000:00:16.0": "0", "0000:00:17.0": "0", "0000:00:15.0": "1"}
    kinds = [kind for _, kind in graph(found).nodes(data="kind")]
    assert (kinds.count("unknown"), kinds.count("numa")) == (3, 2)
    with pytest.raises(ProfileError, match="states no GPU; --gpu and --nic"):
        node_profile(found, Said(), "x", FROM)
    told = read_xml(text, "t.xml", ("0000:00:1[67].0",), ("0000:00:15.0",))
    assert (len(told.gpus), told.nearest_nics("GPU0"), told.unknown) == (2, ("SYS", ("NIC0",)), {})
    with pytest.raises(InputError, match="no PCI device has a bus id like '0000:99'; mend --gpu"):
        read_xml(text, "t.xml", ("0000:99",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("GPU0 GPU1", r"t.xml:1: is not XML"),
        ("<system>\n<cpu>\n</system>", r"t.xml:3: is not XML: mismatched tag"),
        ("<graphs/>", r"t.xml:1: <graphs> is not NCCL's <system>"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><system/>', r"t.xml:1: has a DOCTYPE"),
        ("<system>" * 100, r"nested deeper than 64"),
        (
            '<system><cpu>\n<pci class="0x0302" link_speed="fast" link_width="16"/></cpu></system>',
            r"t.xml:2: link_speed",
        ),
        ('<system>\n<cpu affinity="xyz"><pci class="0x0302"/></cpu></system>', r"t.xml:2: affinity='xyz' is not a CPU"),
        (
            '<system><cpu><pci class="0x03"><gpu>\n<nvlink target="1" tclass="0x03"/></gpu></pci></cpu></system>',
            r"t.xml:2: NVLink to '1', which is no GPU of the file",
        ),
    ],
)
def test_mistakes_in_xml(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_xml(text, "t.xml")


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.txt").write_text(SWITCHED, encoding="utf-8")
    (tmp_path / "t.xml").write_text(CLOUD, encoding="utf-8")
    return tmp_path


def test_import_shows_and_writes_a_profile_that_loads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["import", "nvidia-smi", "m.txt"]) == 0
    text = capsys.readouterr().out
    assert "through switches, 12 a GPU" in text
    assert "NIC rate           not stated" in text
    assert not (here / "hwprofiles").exists()
    said = [
        "--device",
        "a100-sxm-80g",
        "--link",
        "nvlink3",
        "--nic-link",
        "infiniband-hdr200",
        "--host",
        "dgx-a100-80g",
    ]
    assert run(["import", "nvidia-smi", "m.txt", "--name", "mine", *said]) == 0
    node = load_node("mine")
    assert (node.devices, node.nic.count, node.devices_per_pcie_switch) == (4, 2, 2)
    assert (node.provenance.method, node.provenance.source) == ("imported", "nvidia-smi topo -m: m.txt")
    assert "mlx5_2" in node.provenance.notes
    assert run(["topo", "mine"]) == 0


def test_import_refuses_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["import", "nvidia-smi", "m.txt", "--name", "mine"]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "give --device NAME, --link NAME, --nic-link NAME, --host NODE" in error
    assert run(["import", "nvidia-smi", "none.txt"]) == 3
    assert run(["import", "nvidia-smi", "m.txt", "--name", "../up"]) == 2
    assert run(["import", "nvidia-smi", "m.txt", "--rate", "50"]) == 2
    assert run(["import", "nvidia-smi", "m.txt", "--link", "nvlink33"]) == 3
    capsys.readouterr()
    # No likeness of a name tells which link was meant: all that can be are listed, and no others.
    for option, name, words in (
        ("--link", "nolink", "nvlink or pcie; known: nvlink2, nvlink3, nvlink4, nvlink5, pcie3-x16"),
        ("--link", "tcp-10", "nvlink or pcie; known: nvlink2"),
        ("--nic-link", "nvlink3", "infiniband, ethernet or roce; known: efa-100"),
        ("--pcie", "nvlink3", "kind pcie; known: pcie3-x16"),
    ):
        assert run(["import", "nvidia-smi", "m.txt", "--name", "mine", option, name]) == 3
        told = capsys.readouterr().err
        assert told.startswith(f"error: {option} {name}: is no link profile of kind ")
        assert words in told
    assert not (here / "hwprofiles").exists()


def test_the_hint_names_what_a_profile_needs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def hint(*arguments: str) -> str:
        assert run(["import", *arguments]) == 0
        return " ".join(capsys.readouterr().out.split()).partition("profile of it: ")[2]

    assert hint("nvidia-smi", "m.txt").startswith("--name NAME with --device NAME, --link NAME, --nic-link NAME, --h")
    assert hint("nvidia-smi", "m.txt", "--like", "dgx-a100-80g") == "--name NAME"
    (here / "none.txt").write_text("GPU0 GPU1\nGPU0 X PHB\nGPU1 PHB X\n")
    words = hint("nvidia-smi", "none.txt")
    assert "--interconnect KIND and --link NAME, --nics COUNT, --nic-link NAME" in words
    # What the hint names is what a profile then needs, and no more.
    said = ["--device", "l40s", "--interconnect", "pcie", "--link", "pcie4-x16", "--nics", "1", "--nic-link", "tcp-25"]
    assert run(["import", "nvidia-smi", "none.txt", "--name", "pair", *said, "--host", "pcie-l40s-8"]) == 0
    capsys.readouterr()
    (here / "bare.xml").write_text('<system version="1"><cpu numaid="0"/></system>')
    assert hint("nccl-xml", "bare.xml") == "states no GPU"
    (here / "some.xml").write_text('<system version="1"><cpu numaid="0"><pci busid="0:0"/></cpu></system>')
    assert hint("nccl-xml", "some.xml") == "states no GPU; --gpu and --nic say which PCI devices are what"


def test_import_json_is_one_document(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["import", "nccl-xml", "t.xml", "--json", "--out", "there", "--like", "p4de"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["gpus"][0]["nvlinks_to"] is None
    assert document["gpus"][0]["nearest_nics"] == {"path": "PIX", "nics": ["NIC0"]}
    assert document["written"] == ["there/node.yaml"]
    assert document["node"]["devices"] == 4
    assert sum(node["kind"] == "gpu" for node in document["graph"]["nodes"]) == 4
    assert (here / "there" / "node.yaml").is_file()


def test_text_of_windows_terminals(here: Path) -> None:
    (here / "w.txt").write_bytes(SWITCHED.encode("utf-16"))
    assert run(["import", "nvidia-smi", "w.txt"]) == 0
