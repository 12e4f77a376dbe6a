"""PyTorch profiler traces (Kineto's Chrome trace JSON) as the work of each step.

Events as Kineto writes them: `ph: X` with microseconds `ts` and `dur`; categories kernel, gpu_memcpy, gpu_memset,
cuda_runtime, cpu_op, user_annotation; `correlation` joins a kernel with the call that launched it, `External id` with
the operation that asked for it.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from clustersim.errors import InputError
from clustersim.hardware.kernel import Dtype
from clustersim.importing.kernel_names import Category, kernel_category, op_category

# Traces of a few steps have some hundred megabytes; a small file that unpacks to more is none.
_LARGEST_BYTES = 2_000_000_000
_KERNEL, _COPY = {"kernel"}, {"gpu_memcpy", "gpu_memset", "memcpy", "memset"}
_LAUNCH, _OP = {"cuda_runtime", "cuda_driver", "runtime"}, {"cpu_op", "operator"}
_DTYPES: Mapping[str, Dtype] = {
    "c10::bfloat16": "bf16", "c10::half": "fp16", "float": "fp32", "double": "fp64",
    "c10::float8_e4m3fn": "fp8", "c10::float8_e5m2": "fp8",
}  # fmt: skip
# Where the two matrices of a product stand among the inputs of its operation.
_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::_scaled_mm": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One kernel, copy or (without a GPU) operation: seconds since the trace's first event. `launched_s`: when the host
    had asked for it, None where not stated."""

    start_s: float
    end_s: float
    name: str
    category: Category
    stream: str
    launched_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMark:
    """A `ProfilerStep#` on the host's clock."""

    number: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One matrix product (m, k) by (k, n), with the time of all kernels that its operation launched."""

    dtype: Dtype
    m: int
    n: int
    k: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What a trace holds; `work` is in order of its start. `gpu`: its work ran on a GPU. `device` is its name."""

    file: str
    gpu: bool
    device: str | None
    rank: int | None
    world: int | None
    shapes: bool
    work: tuple[Work, ...]
    steps: tuple[StepMark, ...]
    products: tuple[Product, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Event:
    category: str
    name: str
    pid: Any
    tid: Any
    start: float
    end: float
    keys: Mapping[str, Any]

    def key(self, name: str) -> str:
        """An identifier as text; older versions wrote some as strings, and some names in small letters."""
        value = self.keys.get(name, self.keys.get(name.lower()))
        return str(value) if isinstance(value, (int, str)) else ""


def read_trace(data: bytes, name: str) -> Trace:
    """The work in a trace file, plain or gzipped. O(events log events). InputError, one line, for anything else, and
    for a trace with neither kernels nor operations."""
    tree = _tree(data, name)
    events = list(_events(tree, name))
    kernels = [event for event in events if event.category in _KERNEL | _COPY]
    notes: list[str] = []
    devices = sorted({str(event.keys.get("device", event.pid)) for event in kernels})
    if len(devices) > 1:
        most = max(devices, key=lambda device: sum(str(e.keys.get("device", e.pid)) == device for e in kernels))
        notes.append(f"holds work of devices {', '.join(devices)}: only that of device {most} is read")
        kernels = [event for event in kernels if str(event.keys.get("device", event.pid)) == most]
    ops = [event for event in events if event.category in _OP]
    if not kernels and not ops:
        raise InputError(f"{name}: has no kernel and no operation; export it with torch.profiler's export_chrome_trace")
    origin = min(event.start for event in events)
    optimizers = _Spans(event for event in events if event.name.startswith("Optimizer.step#"))
    if kernels:
        work, products = _gpu_work(kernels, events, ops, optimizers, origin)
    else:
        notes.append("holds no GPU kernel: operations of the CPU are counted")
        work, products = _cpu_work(ops, optimizers, origin)
    marks = [e for e in events if e.name.startswith("ProfilerStep#") and e.category in ("user_annotation", *_OP)]
    steps = tuple(
        StepMark(number=int(e.name.split("#")[1]), start_s=(e.start - origin) * 1e-6, end_s=(e.end - origin) * 1e-6)
        for e in sorted(marks, key=lambda e: e.start)
        if re.fullmatch(r"ProfilerStep#\d+", e.name)
    )
    if not steps:
        notes.append("marks no step (ProfilerStep#): all of it is taken as one; profile with a schedule")
    described, spread = tree.get("deviceProperties"), tree.get("distributedInfo")
    described = described if isinstance(described, list) and described and isinstance(described[0], dict) else [{}]
    spread = spread if isinstance(spread, dict) else {}
    return Trace(
        file=name,
        gpu=bool(kernels),
        device=str(described[0]["name"]) if kernels and "name" in described[0] else None,
        rank=spread.get("rank") if isinstance(spread.get("rank"), int) else None,
        world=spread.get("world_size") if isinstance(spread.get("world_size"), int) else None,
        shapes=any("Input Dims" in op.keys or "Input dims" in op.keys for op in ops),
        work=tuple(sorted(work, key=lambda item: (item.start_s, item.end_s))),
        steps=steps,
        products=tuple(products),
        notes=tuple(notes),
    )


def _tree(data: bytes, name: str) -> Mapping[str, Any]:
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.open(io.BytesIO(data)) as stream:
                data = stream.read(_LARGEST_BYTES + 1)
        except (OSError, EOFError, zlib.error):
            raise InputError(f"{name}: is cut off or not gzip; copy it again") from None
    if len(data) > _LARGEST_BYTES:
        raise InputError(f"{name}: is larger than {_LARGEST_BYTES} bytes; profile fewer steps")
    try:
        # Kernel names may hold any bytes.
        tree = json.loads(data.decode("utf-8", errors="replace"), strict=False)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}:{error.lineno}:{error.colno}: is not JSON: {error.msg}; export it again") from None
    except RecursionError:
        raise InputError(f"{name}: nested too deeply for a trace") from None
    if isinstance(tree, list):
        # The other form of the format is the bare list.
        tree = {"traceEvents": tree}
    if not isinstance(tree, dict) or not isinstance(tree.get("traceEvents"), list):
        raise InputError(f"{name}: has no traceEvents; export it with torch.profiler's export_chrome_trace")
    return tree


def _events(tree: Mapping[str, Any], name: str) -> Iterable[_Event]:
    for number, event in enumerate(tree["traceEvents"]):
        if not isinstance(event, dict) or event.get("ph") != "X" or "ts" not in event:
            continue
        try:
            start, wide = float(event["ts"]), float(event.get("dur", 0.0))
            if not (isfinite(start) and isfinite(wide) and wide >= 0.0):
                raise ValueError
        except (TypeError, ValueError):
            raise InputError(f"{name}: event {number}: ts and dur must be numbers of microseconds") from None
        keys = event.get("args")
        yield _Event(
            str(event.get("cat", "")).lower(), str(event.get("name", "")), event.get("pid"), event.get("tid"), start,
            start + wide, keys if isinstance(keys, dict) else {},
        )  # fmt: skip


class _Spans:
    """Spans that do not overlap, and whether a moment is in one. A look is O(log spans)."""

    def __init__(self, events: Iterable[_Event]) -> None:
        spans = sorted((event.start, event.end) for event in events if event.category != "gpu_user_annotation")
        self._starts, self._ends = [start for start, _ in spans], [end for _, end in spans]

    def hold(self, moment: float) -> bool:
        at = bisect_right(self._starts, moment) - 1
        return at >= 0 and moment < self._ends[at]


def _gpu_work(
    kernels: list[_Event], events: list[_Event], ops: list[_Event], optimizers: _Spans, origin: float
) -> tuple[list[Work], list[Product]]:
    calls = {event.key("correlation"): event for event in events if event.category in _LAUNCH}
    by_id = {op.key("External id"): op for op in ops}
    work = []
    of_op: dict[str, list[_Event]] = {}
    for event in kernels:
        call = calls.get(event.key("correlation")) if event.key("correlation") else None
        category: Category = "copy" if event.category in _COPY else kernel_category(event.name)
        if call is not None and category in ("memory", "other", "copy") and optimizers.hold(call.start):
            category = "optimizer"
        asked = event.key("External id") or (call.key("External id") if call is not None else "")
        if category in ("gemm", "memory") and asked and asked in by_id and by_id[asked].name in _PRODUCTS:
            # What goes with a product (sums of split k, its bias) is part of it.
            of_op.setdefault(asked, []).append(event)
            category = "gemm"
        work.append(
            Work(
                start_s=(event.start - origin) * 1e-6,
                end_s=(event.end - origin) * 1e-6,
                name=event.name,
                category=category,
                stream=str(event.keys.get("stream", event.tid)),
                launched_s=(call.end - origin) * 1e-6 if call is not None else None,
            )
        )
    products = []
    for asked, launched in of_op.items():
        if any(kernel_category(event.name) == "gemm" for event in launched):
            names = " ".join(event.name for event in launched)
            product = _product(by_id[asked], sum(event.end - event.start for event in launched) * 1e-6, names)
            products += [product] if product is not None else []
    return work, products


def _product(op: _Event, seconds: float, kernels: str = "") -> Product | None:
    """The product of an operation whose shapes were recorded."""
    first = _PRODUCTS[op.name]
    sizes, types = op.keys.get("Input Dims", op.keys.get("Input dims")), op.keys.get("Input type")
    if not isinstance(sizes, list) or not isinstance(types, list) or len(sizes) < first + 2 or len(types) < first + 2:
        return None
    left, right = sizes[first], sizes[first + 1]
    dtype = _DTYPES.get(str(types[first]).lower())
    whole = all(
        isinstance(side, list) and len(side) == 2 and all(type(n) is int for n in side) for side in (left, right)
    )
    if dtype is None or not whole or left[1] != right[0] or min(*left, *right) < 1 or not seconds > 0.0:
        return None
    # On tensor cores, fp32 matrices are rounded to tf32; only the kernel's name tells.
    if dtype == "fp32" and re.search(r"tf32|s1688", kernels):
        dtype = "tf32"
    return Product(dtype=dtype, m=int(left[0]), n=int(right[1]), k=int(left[1]), seconds=seconds)


def _cpu_work(ops: list[_Event], optimizers: _Spans, origin: float) -> tuple[list[Work], list[Product]]:
    """The outermost operations that do one kind of thing; a thread is a stream."""
    work: list[Work] = []
    products: list[Product] = []
    by_thread: dict[tuple[str, str], list[_Event]] = {}
    for op in ops:
        by_thread.setdefault((str(op.pid), str(op.tid)), []).append(op)
    for (_, thread), mine in by_thread.items():
        mine.sort(key=lambda op: (op.start, -op.end))
        covered = float("-inf")
        for number, op in enumerate(mine):
            if op.name in _PRODUCTS:
                product = _product(op, (op.end - op.start) * 1e-6)
                products += [product] if product is not None else []
            if op.start < covered:
                continue
            category = op_category(op.name)
            leaf = number + 1 == len(mine) or mine[number + 1].start >= op.end
            if category == "other" and not leaf:
                continue
            covered = op.end
            if category in ("memory", "other") and optimizers.hold(op.start):
                category = "optimizer"
            work.append(
                Work(
                    start_s=(op.start - origin) * 1e-6,
                    end_s=(op.end - origin) * 1e-6,
                    name=op.name,
                    category=category,
                    stream=thread,
                    launched_s=None,
                )
            )
    return work, products
