"""Rows of microbenchmarks, a value and its unit, against the figure of a device or a link that they measure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from clustersim.cluster.load import load_node
from clustersim.hardware.cost import device_costs, load_device
from clustersim.hardware.curve import effective_rate, step_seconds
from clustersim.hardware.intervals import load_intervals
from clustersim.hardware.kernel import Dtype, Gemm, Memory, MemoryOp
from clustersim.hardware.load import load_link
from clustersim.validate.point import Point, Points, Unit, each_point, named_in, source_of
from clustersim.validate.rows import Missing, Row, first_match
from clustersim.validate.words import NODES

COLUMNS = frozenset({"id", "system", "gpu", "test", "params", "value", "unit", "notes", "source", "repo"})
_DEVICES = {
    r"A100.*SXM": "a100-sxm-80g", r"H100.*SXM|Hopper \(NV18": "h100-sxm", r"H200": "h200-sxm", r"\bB200": "b200",
    r"V100-SXM2-32": "v100-sxm2-32g", r"V100-SXM2-16": "v100-sxm2-16g", r"L40S": "l40s",
}  # fmt: skip
# (factor to SI, what it counts)
_UNITS: dict[str, tuple[float, Unit]] = {
    "TFLOP/s": (1e12, "FLOP/s"), "TB/s": (1e12, "B/s"), "GB/s": (1e9, "B/s"), "Gb/s": (125e6, "B/s"), "us": (1e-6, "s"),
    "ms": (1e-3, "s"),
}  # fmt: skip
# BabelStream's passes: arrays read, arrays written.
_STREAM = {"copy": (1, 1), "mul": (1, 1), "add": (2, 1), "triad": (2, 1), "dot": (2, 0)}
_ARRAY_BYTES = 2**28
# Below this size a card's messages a second limit a test of bandwidth.
_FEW_BYTES = 2**16
# Cards of a two-machine RDMA test, by words of the row.
_CARDS = {r"HDR 200": "infiniband-hdr200", r"EDR 100": "infiniband-edr100", r"\bNDR 400": "infiniband-ndr400"}


def is_microbench(columns: Sequence[str]) -> bool:
    """Whether a file with these columns holds microbenchmarks."""
    return {"test", "value", "unit"} <= set(columns)


def microbench_points(name: str, rows: Sequence[Row]) -> Points:
    """Every row predicted that measures what a profile states."""
    return each_point(name, rows, _point)


def _point(row: Row, label: str) -> Point:
    test, params, words = row.required("test"), row.text("params") or "", row.required("unit")
    if words not in _UNITS:
        raise Missing(f"unit = {words!r} is not known; known are {', '.join(_UNITS)}")
    scale, unit = _UNITS[words]
    value = row.required_positive("value")
    predicted, sources, measured = _predicted(row, test, params, unit, value * scale)
    source = source_of(row)
    return Point(
        id=label, line=row.line, system=row.text("system") or "", subject=f"{test} {params}"[:60],
        measured=value * scale, predicted=predicted, unit=unit, basis="measured" if measured else "links",
        spread=_spread(measured), source=source, seen=named_in(source, sources),
    )  # fmt: skip


def _spread(measured: bool) -> float:
    """What predictions by such kernels are off by on the validated runs: no other microbenchmarks are known."""
    interval = load_intervals().interval(("measured kernels",) if measured else ("roofline kernels",))
    return max(interval.high - 1.0, 1.0 / interval.low - 1.0)


def _predicted(row: Row, test: str, params: str, unit: Unit, value: float) -> tuple[float, str, bool]:
    """(predicted, sources of the profile, whether by a measured table)."""
    if test.startswith("ib_"):
        return _over_cards(row, test, params, unit)
    if re.search(r"allreduce|all_reduce|p2p_bandwidth_\d|sp_time|overlap", test):
        raise Missing("a collective: state it in the columns of collectives (collective, ranks, size_bytes, time)")
    if re.search("attention", test, re.IGNORECASE):
        raise Missing("attention without its batch, heads and sequence: nothing to price")
    name = first_match(row.text("gpu") or "", _DEVICES)
    if name is None:
        raise Missing(f"no device profile for gpu = {row.text('gpu') or 'not stated'}")
    device, costs = load_device(name), device_costs(name)
    tables = "; ".join(ref.provenance.source for ref in (*device.tables.gemm, *device.tables.memory))
    sides = [int(found) for found in re.findall(r"\b[mnk]=(\d+)", params)]
    if "GEMM" in test.upper() and len(sides) == 3:
        dtype = first_match(test, {"fp8": "fp8", "bf16": "bf16", "fp16": "fp16", "tf32": "tf32", "fp32": "fp32"})
        if dtype is None:
            raise Missing(f"test = {test!r} names no type of numbers")
        gemm = Gemm(m=sides[0], n=sides[1], k=sides[2], dtype=cast("Dtype", dtype))
        cost = costs.cost(gemm)
        return gemm.flops / cost.seconds, tables, cost.source == "measured"
    if "HBM" in test and params.lower() in _STREAM:
        reads, writes = (count * _ARRAY_BYTES for count in _STREAM[params.lower()])
        kind: MemoryOp = "copy" if reads == writes else "residual" if writes else "reduce"
        memory = Memory(op=kind, read_bytes=reads, written_bytes=writes)
        price = costs.cost(memory)
        return memory.traffic_bytes / price.seconds, f"{tables}; {device.provenance.source}", price.source == "measured"
    node = load_node(NODES[name])
    if re.search(r"host to device|device to host", params, re.IGNORECASE) and node.pcie is not None:
        link = load_link(node.pcie)
    elif re.search(r"device to device|dev\d->dev\d|3 peers", params, re.IGNORECASE) and node.interconnect is not None:
        link = load_link(node.interconnect.link)
    else:
        raise Missing(f"{test}: no figure of a profile")
    if unit != "B/s":
        raise Missing(f"{test}: a rate in B/s is what a link's profile gives")
    if value > link.rate_bytes_per_s:
        raise Missing("more than the wire carries in one direction: both directions are added up")
    return float(effective_rate(link, float(_ARRAY_BYTES))), link.provenance.source, False


def _over_cards(row: Row, test: str, params: str, unit: Unit) -> tuple[float, str, bool]:
    """An RDMA test between two machines: a message's latency, or the rate of many."""
    name = first_match(f"{row.text('notes') or ''} {row.text('system') or ''}", _CARDS)
    size = re.search(r"(\d+)", params)
    if name is None or size is None:
        raise Missing("no link profile of these cards, or no message size")
    link, message = load_link(name), float(size.group(1))
    if unit == "s":
        return float(step_seconds(link, message)), link.provenance.source, False
    if message < _FEW_BYTES:
        raise Missing("many small messages: the card's message rate limits them, which no profile states")
    return float(effective_rate(link, message)), link.provenance.source, False
