"""`import`: what other programs print about machines and runs, as facts and as profiles."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clustersim.app import screen
from clustersim.app.quantities import quantity
from clustersim.errors import InputError, ProfileError, UsageError

if TYPE_CHECKING:
    from clustersim.cluster.node import Node
    from clustersim.hardware.provenance import Provenance
    from clustersim.importing.node_profile import Said
    from clustersim.importing.topology import Topology

imports = typer.Typer(
    no_args_is_help=True,
    help="Read what other programs say of machines and runs: topologies, fabrics, nccl-tests, profiler traces, models.",
)

_LARGEST_BYTES = 100_000_000
_LARGEST_TRACE_BYTES = 2_000_000_000


def add_to(app: typer.Typer) -> None:
    """Add this file's commands to `app`."""
    app.add_typer(imports, name="import")


class InterconnectName(StrEnum):
    """How the GPUs of a node reach each other."""

    switch = "switch"
    mesh = "mesh"
    pcie = "pcie"


File = Annotated[Path, typer.Argument(metavar="FILE", help="The file to read.")]
Name = Annotated[str | None, typer.Option("--name", help="Write a node profile of this name.")]
Out = Annotated[Path | None, typer.Option("--out", help="Its folder; default: ./hwprofiles/nodes/NAME.")]
DeviceName = Annotated[str | None, typer.Option("--device", help="The device profile of its GPUs.")]
Kind = Annotated[InterconnectName | None, typer.Option("--interconnect", help="How its GPUs reach each other.")]
LinkName = Annotated[str | None, typer.Option("--link", help="The link profile between its GPUs.")]
Rate = Annotated[str | None, typer.Option("--rate", help="Of one GPU's links together, one direction: 56.25GB/s.")]
NicLink = Annotated[str | None, typer.Option("--nic-link", help="The link profile of its network cards.")]
NicCount = Annotated[int | None, typer.Option("--nics", min=1, help="How many network cards its GPUs use.")]
Pcie = Annotated[str | None, typer.Option("--pcie", help="The link profile of its PCIe slots.")]
PerSwitch = Annotated[int | None, typer.Option("--gpus-per-switch", min=1, help="GPUs below one PCIe switch.")]
HostName = Annotated[str | None, typer.Option("--host", help="A node profile that has its CPUs and memory.")]
Like = Annotated[str | None, typer.Option("--like", help="A node profile to take from what the file does not state.")]
GpuBuses = Annotated[list[str] | None, typer.Option("--gpu", help="Bus ids (patterns) of GPUs of no stated class.")]
NicBuses = Annotated[list[str] | None, typer.Option("--nic", help="Bus ids (patterns) of such network cards.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@imports.command("nvidia-smi")
def nvidia_smi_command(
    file: File, name: Name = None, out: Out = None, device: DeviceName = None, interconnect: Kind = None,
    link: LinkName = None, rate: Rate = None, nic_link: NicLink = None, nics: NicCount = None, pcie: Pcie = None,
    gpus_per_switch: PerSwitch = None, host: HostName = None, like: Like = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """The matrix of `nvidia-smi topo -m`: GPUs, NVLinks, network cards and what is near what."""
    from clustersim.importing.nvidia_smi import read_matrix

    said = _said(device, interconnect, link, rate, nic_link, nics, pcie, gpus_per_switch, host, like)
    _topology(read_matrix(_text(file), file.name), file, "nvidia-smi topo -m", said, name, out, as_json)


@imports.command("nccl-xml")
def nccl_xml_command(
    file: File, name: Name = None, out: Out = None, device: DeviceName = None, interconnect: Kind = None,
    link: LinkName = None, rate: Rate = None, nic_link: NicLink = None, nics: NicCount = None, pcie: Pcie = None,
    gpus_per_switch: PerSwitch = None, host: HostName = None, like: Like = None,
    gpu: GpuBuses = None, nic: NicBuses = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """NCCL's topology XML: what NCCL_TOPO_DUMP_FILE writes, or the list of PCI devices that a cloud ships."""
    from clustersim.importing.nccl_xml import read_xml

    said = _said(device, interconnect, link, rate, nic_link, nics, pcie, gpus_per_switch, host, like)
    found = read_xml(_text(file), file.name, tuple(gpu or ()), tuple(nic or ()))
    _topology(found, file, "NCCL topology XML", said, name, out, as_json)


@imports.command("ibnetdiscover")
def ibnetdiscover_command(
    file: File,
    name: Annotated[str | None, typer.Option("--name", help="Write a fabric profile of this name.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Its file; default: ./hwprofiles/fabrics/NAME.yaml.")
    ] = None,
    nodes_per_leaf: Annotated[int | None, typer.Option("--nodes-per-leaf", min=1, help="Where leaves differ.")] = None,
    oversubscription: Annotated[
        float | None, typer.Option("--oversubscription", min=1.0, help="Downlinks over uplinks, where not stated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What `ibnetdiscover` prints: switches, hosts, link rates, leaves and spines, oversubscription."""
    from clustersim import files
    from clustersim.importing.fabric_profile import fabric_profile
    from clustersim.importing.ibnetdiscover import read_ibnetdiscover
    from clustersim.report.import_screen import fabric_document, fabric_screen

    found = read_ibnetdiscover(_text(file), file.name)
    written = None
    if name is not None or out is not None:
        written = out or Path("hwprofiles") / "fabrics" / f"{_checked(name or '')}.yaml"
        provenance = _provenance(file, "ibnetdiscover", len(found.cables), "Hop latency: not stated, the default.")
        files.save(fabric_profile(found, nodes_per_leaf, oversubscription, provenance), written)
    if as_json:
        screen.show_json({**fabric_document(found), "written": [str(written)] if written else []})
        return
    screen.show(fabric_screen(found))
    if written is not None:
        screen.show(f"\nFabric profile written to {written}")


@imports.command("nccl-tests")
def nccl_tests_command(
    logs: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Logs of all_reduce_perf and its siblings.")],
    node: Annotated[str | None, typer.Option("--node", help="Merge them into this node profile.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A .csv file, or the profile's folder (./hwprofiles/nodes/NODE).")
    ] = None,
    collective: Annotated[
        str | None, typer.Option("--collective", help="Which one, where a log does not state it.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=2, help="How many, where a log does not state it.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="On how many, where a log does not state it.")
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="The times in place; default: out of place.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measured collectives, as the table that predictions for a node use first, and as alpha and beta."""
    from clustersim.app import import_tables
    from clustersim.importing.nccl_tests import read_log, said_sweep
    from clustersim.report.import_screen import sweep_document, sweeps_screen

    found = [
        (log.name, said_sweep(sweep, log.name, collective, ranks, nodes))
        for log in logs
        for sweep in read_log(_text(log), log.name)
    ]
    written: list[Path] = []
    if node is not None or out is not None:
        rows = import_tables.collective_rows(found, in_place)
        source = _provenance(logs[0], "nccl-tests", len(rows), " ".join(log.name for log in logs))
        written = import_tables.write_collectives(rows, source, node, out)
    if as_json:
        runs = [sweep_document(log, sweep, in_place) for log, sweep in found]
        screen.show_json(
            {"schema_version": 1, "kind": "collectives", "runs": runs, "written": [str(p) for p in written]}
        )
        return
    screen.show(sweeps_screen(found, in_place))
    if written:
        screen.show(f"\nWritten: {', '.join(map(str, written))}")


@imports.command("kineto")
def kineto_command(
    file: Annotated[Path, typer.Argument(metavar="TRACE", help="A .json or .json.gz of torch.profiler.")],
    device: Annotated[str | None, typer.Option("--device", help="Merge its products into this device profile.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A .csv file, or the profile's folder (./hwprofiles/devices/DEVICE).")
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """A PyTorch profiler trace: what a step spends where, what is exposed, what is idle, and its products' times."""
    from clustersim.app import import_tables
    from clustersim.importing.kineto import read_trace
    from clustersim.importing.step_times import gemm_rows, step_times
    from clustersim.report.import_screen import trace_document, trace_screen

    trace = read_trace(_bytes(file, _LARGEST_TRACE_BYTES), file.name)
    steps, rows = step_times(trace), gemm_rows(trace.products)
    written: list[Path] = []
    if device is not None or out is not None:
        if not rows:
            raise InputError(f"{file}: states no shapes of products; profile with record_shapes=True")
        note = f"Medians of the products of {len(steps)} traced steps{f' on {trace.device}' if trace.device else ''}."
        source = _provenance(file, "torch.profiler (Kineto)", len(rows), note)
        written = import_tables.write_products(rows, source, device, out)
    if as_json:
        screen.show_json({**trace_document(trace, steps, rows), "written": [str(path) for path in written]})
        return
    screen.show(trace_screen(trace, steps, rows))
    if written:
        screen.show(f"\nWritten: {', '.join(map(str, written))}")


@imports.command("hf")
def hf_command(
    file: Annotated[Path, typer.Argument(metavar="CONFIG", help="A config.json, or the folder that holds it.")],
    as_json: AsJson = False,
) -> None:
    """The config.json of a Hugging Face checkpoint: the model as scenarios count it, who name the file itself."""
    from clustersim import files
    from clustersim.report.import_screen import model_screen
    from clustersim.workload.huggingface import model_from_config
    from clustersim.workload.parameters import parameter_count

    model = model_from_config(file)
    if as_json:
        document = {"schema_version": 1, "kind": "model", "file": str(file), "parameters": parameter_count(model)}
        screen.show_json({**document, "model": files.plain(model)})
        return
    screen.show(model_screen(model, str(file)))


# ------------------------------------------------------------------------------------------------------- topologies


def _said(
    device: str | None, interconnect: InterconnectName | None, link: str | None, rate: str | None, nic_link: str | None,
    nics: int | None, pcie: str | None, gpus_per_switch: int | None, host: str | None, like: str | None,
) -> Said:  # fmt: skip
    """The options as profiles; names that nobody knows are refused here, before anything is read."""
    from clustersim.cluster.load import load_node
    from clustersim.files import profile_path
    from clustersim.hardware.load import load_link
    from clustersim.importing.node_profile import Said

    if device is not None:
        profile_path("devices", device)
    wires = (("--link", link, _BETWEEN_GPUS), ("--nic-link", nic_link, _OF_CARDS), ("--pcie", pcie, ("pcie",)))
    for option, name, kinds in wires:
        if name is not None:
            _check_link(option, name, kinds)
    return Said(
        device=device,
        interconnect=interconnect.value if interconnect is not None else None,
        link=load_link(link) if link is not None else None,
        rate_bytes_per_s=None if rate is None else quantity("--rate", rate, "BytesPerS"),
        nic_link=nic_link,
        nics=nics,
        pcie=pcie,
        gpus_per_switch=gpus_per_switch,
        host=load_node(host) if host is not None else None,
        like=load_node(like) if like is not None else None,
    )


# Kinds of links that a wire of a node may be.
_BETWEEN_GPUS = ("nvlink", "pcie")
_OF_CARDS = ("infiniband", "ethernet", "roce")


def _check_link(option: str, name: str, kinds: tuple[str, ...]) -> None:
    """Refuse a link that does not exist, or is none of these kinds; the message lists those that are."""
    from clustersim.files import profile_names
    from clustersim.hardware.load import load_link

    if name in profile_names("links") and load_link(name).kind in kinds:
        return
    able = sorted(other for other in profile_names("links") if load_link(other).kind in kinds)
    words = " or ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
    raise ProfileError(f"{option} {name}: is no link profile of kind {words}; known: {', '.join(able)}")


def _hint(found: Topology, said: Said) -> tuple[str, str]:
    """What to type for a node profile, or why there can be none."""
    from clustersim.importing.node_profile import missing_options

    try:
        options = missing_options(found, said)
    except ProfileError as error:
        return "No node profile of it:", str(error).removeprefix(f"{found.file}: ")
    more = f" with {', '.join(options)}, or --like NODE" if options else ""
    return "A node profile of it:", f"--name NAME{more}"


def _topology(
    found: Topology, file: Path, method: str, said: Said, name: str | None, out: Path | None, as_json: bool
) -> None:
    from clustersim import files
    from clustersim.importing.node_profile import node_profile
    from clustersim.report.import_screen import topology_document, topology_screen

    written: Path | None = None
    node: Node | None = None
    if name is None and out is not None:
        name = out.name
    if name is not None:
        provenance = _provenance(file, method, 0, "")
        node = node_profile(found, said, _checked(name), provenance)
        written = (out or Path("hwprofiles") / "nodes" / name) / "node.yaml"
        files.save(node, written)
    if as_json:
        document = topology_document(found)
        screen.show_json(
            {**document, "node": files.plain(node) if node else None, "written": [str(written)] if written else []}
        )
        return
    screen.show(topology_screen(found))
    if written is not None:
        screen.show(f"\nNode profile written to {written}")
    else:
        from clustersim.report.hanging import hanging

        screen.show("", hanging([_hint(found, said)]))


# -------------------------------------------------------------------------------------------------------------- files


def _bytes(file: Path, largest: int) -> bytes:
    try:
        if file.is_dir():
            raise InputError(f"{file}: is a folder; name the file in it")
        if file.stat().st_size > largest:
            raise InputError(f"{file}: is larger than {largest} bytes; that is no such file")
        return file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None


def _text(file: Path) -> str:
    """Text as terminals save it: UTF-8, whatever else stands between, or what PowerShell's `>` writes."""
    data = _bytes(file, _LARGEST_BYTES)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    return data.decode("utf-8-sig", errors="replace")


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"--name {name}: write letters, digits, dots, dashes and underscores")
    return name


def _provenance(file: Path, what: str, rows: int, notes: str) -> Provenance:
    import datetime

    from clustersim.hardware.provenance import Provenance

    saved = datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.UTC)
    return Provenance(
        method="imported", source=f"{what}: {file.name}", date=saved.date().isoformat(), rows=rows, notes=notes
    )
