"""What the importers say: what a file states, and what it does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clustersim.importing.ib_fabric import IbFabric
from clustersim.importing.kernel_names import CATEGORIES
from clustersim.importing.kineto import Trace
from clustersim.importing.nccl_tests import Sweep, fit
from clustersim.importing.node_profile import used_nics
from clustersim.importing.step_times import StepTimes, collective_times
from clustersim.importing.topology import Topology
from clustersim.report.figures import percent, significant
from clustersim.report.hanging import Name, hanging
from clustersim.units import human_bytes, human_seconds
from clustersim.workload.model import Model
from clustersim.workload.parameters import parameter_count

NOT_STATED = "not stated"
_WORDS = {
    "gemm": "matrix products", "attention": "attention", "memory": "norm, elementwise and other memory-bound",
    "optimizer": "optimizer", "collective": "collectives", "copy": "copies", "other": "other",
}  # fmt: skip
_MOST_ROWS = 12


def _table(*columns: str, numbers: Sequence[int] = ()) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in numbers else "left", overflow="fold")
    return table


def _facts(rows: Iterable[tuple[str, str | None]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column("figure", overflow="fold", ratio=1)
    for name, value in rows:
        table.add_row(name, value if value is not None else Text(NOT_STATED, "yellow"))
    return table


def _notes(notes: Iterable[str]) -> list[RenderableType]:
    return [hanging([("note:", note)], "yellow") for note in notes]


# -------------------------------------------------------------------------------------------------- topologies


def nvlink_words(topology: Topology) -> str | None:
    """How NVLinks join the GPUs, in words; None: not stated."""
    lanes = {topology.nvlinks_of(gpu.name) for gpu in topology.gpus}
    each = lanes.pop() if len(lanes) == 1 else None
    count = f"{each} a GPU" if each is not None else "not as many for each GPU"
    match topology.interconnect:
        case "switch":
            return f"through switches, {count}"
        case "direct":
            return f"direct links, {count}"
        case "one pair":
            return f"one pair, {count}; direct or through switches: {NOT_STATED}"
        case "some":
            return f"only between some GPUs, {count}"
        case "none":
            return "none shown (topo -mp hides them)" if len(topology.gpus) > 1 else "one GPU only"
        case "not stated":
            return None


def nic_words(topology: Topology, gpu: str) -> str | None:
    """The NICs nearest to a GPU, in words; None: not stated."""
    found = topology.nearest_nics(gpu)
    return f"{found[0]}: {', '.join(found[1])}" if found is not None else None


def topology_screen(topology: Topology) -> Group:
    """What a topology file states: counts, then a line for each GPU."""
    profiles = {gpu.profile for gpu in topology.gpus}
    product = profiles.pop() if len(profiles) == 1 else None
    rates = sorted({gpu.pcie_bytes_per_s for gpu in topology.gpus if gpu.pcie_bytes_per_s is not None})
    speeds = sorted({nic.rate_bytes_per_s for nic in topology.nics if nic.rate_bytes_per_s is not None})
    used = used_nics(topology)
    near = f"{len(used)} of them nearest to a GPU" if used else f"nearest to which GPUs: {NOT_STATED} for all"
    per_switch = topology.gpus_per_switch()
    rows: list[tuple[str, str | None]] = [
        ("GPUs", str(len(topology.gpus)) if topology.gpus else None),
        ("device", product),
        ("NVLinks", nvlink_words(topology) if topology.gpus else None),
        ("GPUs a PCIe switch", str(per_switch) if per_switch is not None else None),
        ("PCIe link", ", ".join(f"{human_bytes(rate)}/s" for rate in rates) or None),
        ("NICs", f"{len(topology.nics)}, {near}" if topology.nics else None),
        ("NIC rate", ", ".join(f"{human_bytes(speed)}/s" for speed in speeds) or None),
    ]
    parts: list[RenderableType] = [Text(topology.file, "bold"), _facts(rows)]
    if topology.gpus:
        table = _table("GPU", "bus", "NVLinks to", "nearest NICs", "NUMA", "CPUs")
        for gpu in topology.gpus:
            peers = topology.peers(gpu.name)
            table.add_row(
                gpu.name,
                gpu.bus or "-",
                _peer_words(peers),
                nic_words(topology, gpu.name) or NOT_STATED,
                gpu.numa or NOT_STATED,
                gpu.cpus or NOT_STATED,
            )
        parts += ["", table]
    if topology.unknown:
        parts.append(hanging([("PCI devices of no stated class:", ", ".join(topology.unknown))], "yellow"))
    return Group(*parts, *_notes(topology.notes))


def _peer_words(peers: dict[str, int] | None) -> str:
    if peers is None:
        return NOT_STATED
    if not peers:
        return "none shown"
    if len(peers) > 4 and len(set(peers.values())) == 1:
        return f"{len(peers)} others x {next(iter(peers.values()))}"
    return ", ".join(f"{name} x {lanes}" for name, lanes in peers.items())


def topology_document(topology: Topology) -> dict[str, Any]:
    """The same for programs; what is not stated is null."""
    from clustersim.importing.topology import graph

    wires = graph(topology)
    return {
        "schema_version": 1,
        "kind": "topology",
        "file": topology.file,
        "interconnect": topology.interconnect,
        "gpus_per_pcie_switch": topology.gpus_per_switch(),
        "gpus": [
            {
                "name": gpu.name, "bus": gpu.bus, "device": gpu.profile, "numa": gpu.numa, "cpus": gpu.cpus,
                "nvlinks_to": topology.peers(gpu.name),
                "nearest_nics": _nearest(topology, gpu.name),
            }
            for gpu in topology.gpus
        ],
        "nics": [
            {"name": nic.name, "device": nic.device, "bus": nic.bus, "kind": nic.kind, "numa": nic.numa,
             "rate_bytes_per_s": nic.rate_bytes_per_s, "used": nic.name in used_nics(topology)}
            for nic in topology.nics
        ],
        "unknown": dict(topology.unknown),
        "graph": {
            "nodes": [{"name": name, **keys} for name, keys in wires.nodes(data=True)],
            "links": [{"from": a, "to": b, **keys} for a, b, keys in wires.edges(data=True)],
        },
        "notes": list(topology.notes),
    }  # fmt: skip


def _nearest(topology: Topology, gpu: str) -> dict[str, Any] | None:
    found = topology.nearest_nics(gpu)
    return {"path": found[0], "nics": list(found[1])} if found is not None else None


# ----------------------------------------------------------------------------------------------------- fabrics


def fabric_screen(fabric: IbFabric) -> Group:
    """What a fabric listing states: counts, then a line for each switch."""
    shares = fabric.oversubscription()
    share = None
    if shares:
        low, high = min(shares.values()), max(shares.values())
        share = significant(low, 3) if low == high else f"{significant(low, 3)} to {significant(high, 3)}"
        share += " (downlinks over uplinks of a leaf)"
    speeds: dict[str, int] = {}
    for cable in fabric.cables:
        speeds[cable.speed or NOT_STATED] = speeds.get(cable.speed or NOT_STATED, 0) + 1
    kind = fabric.kind
    hosts = {adapter.host for adapter in fabric.adapters}
    rows = [
        ("fabric", None if kind == NOT_STATED else kind),
        ("switches", str(len(fabric.switches))),
        ("hosts", f"{len(hosts)} with {len(fabric.adapters)} adapters"),
        ("cables", ", ".join(f"{count} x {speed}" for speed, count in sorted(speeds.items()))),
        ("oversubscription", share),
    ]
    table = _table("switch", "level", "ports", "hosts", "down", "up", "to its level", numbers=(2, 3, 4, 5, 6))
    below = fabric.hosts_of_leaves()
    levels = fabric.levels()
    for switch in fabric.switches[:_MOST_ROWS]:
        level = levels[switch.key]
        rates = fabric.rates(switch.key)
        table.add_row(
            Name(switch.name),
            NOT_STATED if level is None else "leaf" if level == 1 else f"spine {level - 1}",
            str(switch.ports or "-"),
            str(len(below.get(switch.key, ()))),
            *(_rate(rates[way]) for way in ("down", "up", "across")),
        )
    more = len(fabric.switches) - _MOST_ROWS
    parts: list[RenderableType] = [Text(fabric.file, "bold"), _facts(rows), "", table]
    if more > 0:
        parts.append(Text(f"and {more} switches more; --json has all"))
    return Group(*parts, *_notes(fabric.notes))


def _rate(value: float | None) -> str:
    return NOT_STATED if value is None else "-" if value == 0.0 else f"{human_bytes(value)}/s"


def fabric_document(fabric: IbFabric) -> dict[str, Any]:
    """The same for programs, with the graph; what is not stated is null."""
    from clustersim.importing.ib_fabric import fabric_graph

    wires = fabric_graph(fabric)
    return {
        "schema_version": 1,
        "kind": "fabric",
        "file": fabric.file,
        "fabric": None if fabric.kind == NOT_STATED else fabric.kind,
        "oversubscription": fabric.oversubscription(),
        "hosts_of_leaves": {leaf: list(hosts) for leaf, hosts in fabric.hosts_of_leaves().items()},
        "graph": {
            "nodes": [{"name": name, **keys} for name, keys in wires.nodes(data=True)],
            "links": [{"from": a, "to": b, **keys} for a, b, keys in wires.edges(data=True)],
        },
        "notes": list(fabric.notes),
    }


# ------------------------------------------------------------------------------------------ measured collectives


def sweeps_screen(sweeps: Sequence[tuple[str, Sweep]], in_place: bool) -> Group:
    """A line for each run of nccl-tests: what ran, its best bandwidth, and the line t = alpha + bytes/beta."""
    parts: list[RenderableType] = []
    table = _table(
        "log", "collective", "ranks", "nodes", "sizes", "smallest", "busbw", "alpha", "beta", "error",
        numbers=(2, 3, 4, 5, 6, 7, 8, 9),
    )  # fmt: skip
    notes = []
    for file, sweep in sweeps:
        seconds = sweep.seconds(in_place)
        found = fit(seconds)
        bus = sweep.bus_bytes_per_s
        table.add_row(
            Name(f"{file}:{sweep.line}"),
            sweep.kind or NOT_STATED,
            str(sweep.ranks or NOT_STATED),
            str(sweep.nodes or NOT_STATED),
            str(len(seconds)),
            human_seconds(next(iter(seconds.values()))) if seconds else "-",
            f"{human_bytes(bus)}/s" if bus else "-",
            human_seconds(found.alpha_s) if found else "-",
            f"{human_bytes(found.beta_bytes_per_s)}/s" if found else "-",
            percent(found.median_error) if found else "-",
        )
        wrong = sum(row.wrong for row in sweep.rows)
        notes += [f"{file}: {wrong} rows with wrong results are left out"] if wrong else []
        if sweep.devices:
            words = f"{', '.join(sweep.devices)}; {sweep.software or 'NCCL version not stated'}"
            parts.append(hanging([(f"{file}:", words)]))
    words = "alpha + bytes/beta, least squares on the relative error; error: median of what it leaves"
    return Group(*parts, table, hanging([("t =", words)]), *_notes(notes))


def sweep_document(file: str, sweep: Sweep, in_place: bool) -> dict[str, Any]:
    """The same for programs."""
    found = fit(sweep.seconds(in_place))
    return {
        "file": file, "line": sweep.line, "collective": sweep.kind, "how": sweep.how, "ranks": sweep.ranks,
        "nodes": sweep.nodes, "devices": list(sweep.devices), "software": sweep.software,
        "busbw_bytes_per_s": sweep.bus_bytes_per_s,
        "fit": {
            "alpha_s": found.alpha_s, "beta_bytes_per_s": found.beta_bytes_per_s, "median_error": found.median_error,
            "worst_error": found.worst_error,
        } if found else None,
        "seconds": {str(size): time for size, time in sweep.seconds(in_place).items()},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- traces


def trace_screen(trace: Trace, steps: Sequence[StepTimes], rows: dict[Any, tuple[int, float]]) -> Group:
    """What a step spends where, as the mean over the traced steps; its products where shapes were recorded."""
    count = len(steps)
    window = sum(step.window_s for step in steps) / count
    where = f"rank {trace.rank} of {trace.world}" if trace.rank is not None and trace.world is not None else None
    table = _table("per step", "time", "share", numbers=(1, 2))

    def line(name: str, seconds: float) -> None:
        table.add_row(name, human_seconds(seconds), percent(seconds / window if window > 0.0 else 0.0))

    for category in CATEGORIES:
        busy = sum(step.busy_s[category] for step in steps) / count
        if busy > 0.0:
            line(_WORDS[category], busy)
    line("collectives while nothing computes", sum(step.exposed_collective_s for step in steps) / count)
    line("copies while nothing else runs", sum(step.exposed_copy_s for step in steps) / count)
    line("idle" if trace.gpu else "between operations", sum(step.idle_s for step in steps) / count)
    waits = [step.waits_for_host_s for step in steps if step.waits_for_host_s is not None]
    if waits:
        line("  of it waiting for the host (launch-bound)", sum(waits) / count)
    facts = [
        ("device", trace.device if trace.gpu else "CPU"),
        ("rank", where),
        ("steps", ", ".join(f"{step.number}: {human_seconds(step.host_s)}" for step in steps)),
        ("kernels a step" if trace.gpu else "operations a step", f"{sum(step.kernels for step in steps) / count:.0f}"),
    ]
    parts: list[RenderableType] = [Text(trace.file, "bold"), _facts(facts), "", table]
    found = collective_times(trace)
    if found:
        words = ", ".join(f"{kind} {number} x {human_seconds(time / number)}" for kind, (number, time) in found.items())
        parts.append(hanging([("Collectives:", words)]))
    if rows:
        largest = sorted(rows.items(), key=lambda row: -row[1][0] * row[1][1])[:_MOST_ROWS]
        products = _table("product", "m", "n", "k", "times", "median", "FLOP/s", numbers=(1, 2, 3, 4, 5, 6))
        for (dtype, m, n, k), (times, seconds) in largest:
            rate = f"{significant(2.0 * m * n * k / seconds / 1e12, 3)} T"
            products.add_row(dtype, str(m), str(n), str(k), str(times), human_seconds(seconds), rate)
        parts += ["", products, Text(f"{len(rows)} shapes in all, those with the most time first")]
    elif not trace.shapes:
        parts.append(Text("Shapes of products: not stated (profile with record_shapes=True)"))
    return Group(*parts, *_notes(trace.notes))


def trace_document(trace: Trace, steps: Sequence[StepTimes], rows: dict[Any, tuple[int, float]]) -> dict[str, Any]:
    """The same for programs, step by step."""
    return {
        "schema_version": 1, "kind": "trace", "file": trace.file, "device": trace.device, "gpu": trace.gpu,
        "rank": trace.rank, "world": trace.world,
        "steps": [
            {
                "number": step.number, "host_s": step.host_s, "window_s": step.window_s, "busy_s": dict(step.busy_s),
                "exposed_collective_s": step.exposed_collective_s, "exposed_copy_s": step.exposed_copy_s,
                "idle_s": step.idle_s, "waits_for_host_s": step.waits_for_host_s, "kernels": step.kernels,
            }
            for step in steps
        ],
        "collectives": {
            kind: {"count": count, "seconds": seconds} for kind, (count, seconds) in collective_times(trace).items()
        },
        "products": [
            {"dtype": dtype, "m": m, "n": n, "k": k, "count": count, "median_s": seconds}
            for (dtype, m, n, k), (count, seconds) in rows.items()
        ],
        "notes": list(trace.notes),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- models


def model_screen(model: Model, path: str) -> Group:
    """The dimensions of a model, and how to name it in a scenario."""
    experts = model.experts
    rows: list[tuple[str, str | None]] = [
        ("model", f"{model.name} ({model.kind})"),
        ("parameters", f"{parameter_count(model):,}"),
        ("layers", str(model.layers)),
        ("hidden, feed-forward", f"{model.hidden}, {model.ffn_hidden}{' gated' if model.gated else ''}"),
        ("heads, key-value heads, head size", f"{model.heads}, {model.kv_heads}, {model.head_dim}"),
        ("vocabulary", f"{model.vocab}{', tied' if model.tied else ''}"),
        ("experts", f"{experts.count}, {experts.per_token} a token" if experts is not None else "none"),
    ]
    return Group(Text(path, "bold"), _facts(rows), Text(f"In a scenario: model: {path}"))
