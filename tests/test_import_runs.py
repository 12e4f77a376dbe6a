"""Logs of nccl-tests, profiler traces, listed fabrics and model files, in short texts of our own."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustersim.app.door import run
from clustersim.cluster import load
from clustersim.cluster.load import load_fabric, load_machine, load_node
from clustersim.errors import InputError, ProfileError
from clustersim.hardware.cost import device_costs, load_device
from clustersim.hardware.curve import collective_table
from clustersim.hardware.kernel import Gemm
from clustersim.hardware.provenance import Provenance
from clustersim.importing.fabric_profile import fabric_profile
from clustersim.importing.ib_fabric import fabric_graph
from clustersim.importing.ibnetdiscover import read_ibnetdiscover
from clustersim.importing.kernel_names import collective_name, kernel_category
from clustersim.importing.kineto import read_trace
from clustersim.importing.nccl_tests import fit, read_log
from clustersim.importing.step_times import collective_times, gemm_rows, step_times

FROM = Provenance(method="imported", source="a test")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------------------------------- nccl-tests


def log(
    program: str | None = "all_reduce", ranks: int = 8, hosts: int = 1, redop: str = "sum", root: int | None = -1,
    prefix: str = "", alpha: float = 20.0, rate: float = 1e11, factor: float = 1.75, wrong: str = "0",
) -> str:  # fmt: skip
    """A log as nccl-tests prints it, of times alpha + bytes / rate."""
    lines = [f"$ ./build/{program}_perf -b 8 -e 8G -f 2 -g 8"] if program else []
    lines += [
        "# nThread 1 nGpus 8 minBytes 8 maxBytes 134217728 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1"
    ]
    lines += ["#", "# Using devices"]
    for rank in range(ranks):
        host = f"node{rank * hosts // ranks}"
        lines.append(
            f"#  Rank {rank:2d} Group  0 Pid {4000 + rank:6d} on {host:>10} device {rank:2d} [0x1a] NVIDIA A100"
        )
    lines += ["NCCL version 2.18.3+cuda12.1", "#"]
    lines.append(
        "#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw"
    )
    lines.append(
        "#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)"
    )
    for power in (10, 14, 20, 26, 30):
        size = 2**power
        time = alpha + size / rate * 1e6
        algbw = size / time * 1e-3
        result = f"{time:8.2f} {algbw:7.2f} {algbw * factor:7.2f} {wrong:>6}"
        again = f"{time * 1.1:8.2f} {algbw:7.2f} {algbw * factor:7.2f} {'N/A':>6}"
        rooted = f"{root:7d}" if root is not None else ""
        lines.append(f"{size:12d} {size // 4:13d}     float {redop:>7} {rooted} {result} {again}")
    lines += ["# Out of bounds values : 0 OK", "# Avg bus bandwidth    : 71.1", "#"]
    return "\n".join(prefix + line for line in lines) + "\n"


@pytest.mark.parametrize("prefix", ["", "[1,0]<stdout>:", "0: ", "worker-0:  "])
def test_log_as_measured_collectives(prefix: str) -> None:
    (sweep,) = read_log(log(prefix=prefix), "a.log")
    assert (sweep.kind, sweep.ranks, sweep.nodes) == ("all_reduce", 8, 1)
    assert sweep.software == "NCCL 2.18.3+cuda12.1"
    assert sweep.devices == ("NVIDIA A100",)
    times = sweep.seconds()
    assert list(times) == [2**10, 2**14, 2**20, 2**26, 2**30]
    assert times[2**20] == pytest.approx(20e-6 + 2**20 / 1e11, rel=1e-3)
    assert sweep.seconds(in_place=True)[2**20] == pytest.approx(1.1 * times[2**20], rel=1e-3)


def test_log_of_older_versions_and_without_hashes() -> None:
    old = log(root=None, wrong="1e-07").replace("Group  0 ", "")
    assert read_log(old.replace("#", " "), "a.log")[0].seconds() == read_log(log(), "a.log")[0].seconds()
    # A whole number of microseconds in the place of the root.
    row = "  8388608  2097152  float  sum  165  50.8  95.3  1e-07  163  51.5  96.5  1e-07\n"
    (sweep,) = read_log("nThread 1 nGpus 8\n" + row, "a.log")
    assert sweep.seconds() == {8388608: pytest.approx(165e-6)}
    assert sweep.ranks is None


def test_collective_from_what_the_columns_say() -> None:
    assert read_log(log(program=None), "a.log")[0].kind == "all_reduce"
    assert read_log(log(program=None, factor=0.875), "a.log")[0].kind == "reduce_scatter"
    assert read_log(log(program=None, redop="none", root=0, factor=1.0), "a.log")[0].kind == "broadcast"
    assert read_log(log(program=None, redop="none", factor=0.875), "a.log")[0].kind is None
    assert read_log(log(program=None, ranks=2, factor=1.0), "a.log")[0].kind is None
    assert read_log(log(program="sendrecv", redop="none", factor=1.0), "a.log")[0].kind is None


def test_several_runs_in_one_log_and_wrong_results() -> None:
    runs = read_log(log() + log(program="all_gather", redop="none", ranks=16, hosts=2), "a.log")
    assert [(run.kind, run.ranks, run.nodes) for run in runs] == [("all_reduce", 8, 1), ("all_gather", 16, 2)]
    assert read_log(log(wrong="3"), "a.log")[0].seconds() == {}
    # A run that does not name its program is not named after the next one.
    runs = read_log(log(program=None) + log(program="broadcast", redop="none", root=0, factor=1.0), "a.log")
    assert [run.kind for run in runs] == ["all_reduce", "broadcast"]


def test_log_of_newest_versions() -> None:
    head = (
        "# nccl-tests version 2.20.0 (b4d5bee) nccl-headers=23102 nccl-library=22907\n"
        "# Collective test starting: reduce_scatter_perf\n"
    )
    text = head + log(program=None).replace("[0x1a]", "[000f:01:00]").replace("NCCL version 2.18.3+cuda12.1", "")
    (sweep,) = read_log(text, "a.log")
    assert (sweep.kind, sweep.software, sweep.ranks) == ("reduce_scatter", "NCCL 2.29.7", 8)


@given(st.floats(1e-6, 1e-3), st.floats(1e9, 1e12))
def test_fit_finds_the_line(alpha: float, beta: float) -> None:
    found = fit({size: alpha + size / beta for size in (2**10, 2**16, 2**22, 2**28, 2**32)})
    assert found is not None
    assert found.alpha_s == pytest.approx(alpha, rel=1e-6)
    assert found.beta_bytes_per_s == pytest.approx(beta, rel=1e-6)
    assert found.worst_error < 1e-6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.log: has no result of nccl-tests"),
        ("  8 2 float sum -1 x 0.0 0.0 0 1 0 0 0\n", "a.log:1: .* are no times and bandwidths"),
        ("\n  8 2 float sum -1 1.0\n", "a.log:2: 2 figures are no result"),
    ],
)
def test_mistakes_in_a_log(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_log(text, "a.log")


def test_logs_replace_the_curves_of_a_node(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.log").write_text(log(alpha=50.0), encoding="utf-8")
    (here / "b.log").write_text(log(ranks=16, hosts=2), encoding="utf-8")
    before = load_machine("dgx-a100-80g").collectives
    assert before is not None
    assert run(["import", "nccl-tests", "a.log", "b.log", "--node", "dgx-a100-80g"]) == 0
    assert "20 us" in capsys.readouterr().out
    after = load_machine("dgx-a100-80g").collectives
    assert after is not None
    assert after.seconds("all_reduce", 8, 2**20) == pytest.approx(50e-6 + 2**20 / 1e11, rel=1e-3)
    assert after.seconds("all_reduce", 16, 2**20, nodes=2) == pytest.approx(20e-6 + 2**20 / 1e11, rel=1e-3)
    for kind, ranks in (("all_reduce", 4), ("all_gather", 8)):
        assert after.seconds(kind, ranks, 2**20) == before.seconds(kind, ranks, 2**20)  # type: ignore[arg-type]
    # Once more, in place: the newer times stand, and no table is left empty.
    (here / "a.log").write_text(log(alpha=70.0), encoding="utf-8")
    assert run(["import", "nccl-tests", "a.log", "b.log", "--node", "dgx-a100-80g"]) == 0
    # A command has a process of its own; here profiles are remembered.
    load._node.cache_clear()
    load._table.cache_clear()
    again = load_machine("dgx-a100-80g").collectives
    assert again is not None
    assert again.seconds("all_reduce", 8, 2**20) == pytest.approx(70e-6 + 2**20 / 1e11, rel=1e-3)
    assert again.seconds("all_gather", 8, 2**20) == before.seconds("all_gather", 8, 2**20)
    node = load_node("dgx-a100-80g")
    assert [ref.file for ref in node.collectives] == ["collectives.csv", "collectives-imported.csv"]
    assert "rows replaced" in node.collectives[0].provenance.notes
    assert node.collectives[-1].provenance.source == "nccl-tests: a.log"


def test_logs_as_a_table_of_their_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.log").write_text(log(program=None, redop="none", factor=0.875), encoding="utf-8")
    assert run(["import", "nccl-tests", "a.log", "--out", "c.csv"]) == 3
    assert "a.log:1: the log does not state all that a table holds; give --collective" in capsys.readouterr().err
    assert run(["import", "nccl-tests", "a.log", "--out", "c.csv", "--collective", "all_gater"]) == 3
    assert "did you mean 'all_gather'" in capsys.readouterr().err
    assert run(["import", "nccl-tests", "a.log", "--out", "c.csv", "--collective", "all_gather", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["runs"][0]["fit"]["alpha_s"] == pytest.approx(20e-6, rel=0.01)
    assert (here / "c.csv").read_text(encoding="utf-8").splitlines()[1] == "collective,ranks,nodes,bytes,time_us"
    assert run(["import", "nccl-tests", "a.log", "--out", "c.csv", "--collective", "all_gather", "--ranks", "4"]) == 3
    assert "the log says 8; leave out --ranks 4" in capsys.readouterr().err
    assert run(["import", "nccl-tests", "a.log", "a.log", "--out", "d.csv", "--collective", "all_gather"]) == 3
    assert run(["import", "nccl-tests", "a.log", "--out", "folder", "--collective", "all_gather"]) == 2
    assert not (here / "d.csv").exists()


# ------------------------------------------------------------------------------------------------------------- traces


def kernel(name: str, start: float, wide: float, call: int, op: int | None = None, stream: int = 7) -> dict[str, Any]:
    keys: dict[str, Any] = {"device": 0, "stream": stream, "correlation": call}
    if op is not None:
        keys["External id"] = op
    return {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": stream, "ts": start, "dur": wide, "args": keys}


def launch(call: int, start: float, wide: float = 2.0) -> dict[str, Any]:
    return {
        "ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 9, "tid": 9, "ts": start, "dur": wide,
        "args": {"correlation": call},
    }  # fmt: skip


def op(name: str, number: int, start: float, sizes: list[list[int]], dtype: str = "c10::BFloat16") -> dict[str, Any]:
    keys = {"External id": number, "Input Dims": sizes, "Input type": [dtype] * len(sizes)}
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": 9, "tid": 9, "ts": start, "dur": 5.0, "args": keys}


def mark(name: str, start: float, wide: float, category: str = "user_annotation") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "pid": 9, "tid": 9, "ts": start, "dur": wide, "args": {}}


def trace(events: list[dict[str, Any]]) -> bytes:
    tree = {
        "schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "NVIDIA A100-SXM4-80GB"}],
        "distributedInfo": {"backend": "nccl", "rank": 3, "world_size": 8},
        "traceEvents": [{"ph": "M", "name": "process_name", "pid": 9, "args": {"name": "python"}}, *events],
    }  # fmt: skip
    return json.dumps(tree).encode()


def step(number: int, at: float) -> list[dict[str, Any]]:
    """1000 us of a step: the host asks in time, but for the last kernel; the device is 100 us behind."""
    first = 10 * number
    return [
        mark(f"ProfilerStep#{number}", at, 1000.0),
        mark("Optimizer.step#AdamW.step", at + 700.0, 200.0),
        op("aten::addmm", first + 1, at + 10.0, [[64], [4096, 1024], [1024, 64]]),
        launch(first + 1, at + 12.0),
        kernel("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", at + 100.0, 200.0, first + 1, first + 1),
        launch(first + 2, at + 20.0),
        kernel("cublasLt::splitKreduce_kernel", at + 300.0, 20.0, first + 2, first + 1),
        launch(first + 3, at + 30.0),
        kernel("flash_fwd_kernel<Flash_fwd_kernel_traits>", at + 320.0, 80.0, first + 3),
        launch(first + 4, at + 40.0),
        kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgs)", at + 350.0, 150.0, first + 4, stream=20),
        launch(first + 5, at + 750.0),
        kernel("void at::native::elementwise_kernel<128>", at + 800.0, 100.0, first + 5),
    ]


def test_step_of_a_gpu() -> None:
    events = [event for number in (2, 3) for event in step(number, 5000.0 + 1000.0 * number)]
    found = read_trace(gzip.compress(trace(events)), "t.json.gz")
    assert (found.gpu, found.device, found.rank, found.world) == (True, "NVIDIA A100-SXM4-80GB", 3, 8)
    first, last = step_times(found)
    assert (first.number, first.kernels) == (2, 5)
    assert first.host_s == pytest.approx(1e-3)
    # From the first kernel of the step to that of the next.
    assert first.window_s == pytest.approx(1e-3)
    assert first.busy_s == pytest.approx(
        {
            "gemm": 220e-6,
            "attention": 80e-6,
            "collective": 150e-6,
            "optimizer": 100e-6,
            "memory": 0,
            "copy": 0,
            "other": 0,
        }
    )
    assert first.exposed_collective_s == pytest.approx(100e-6), "50 us of the 150 run beside attention"
    assert first.idle_s == pytest.approx(500e-6)
    # Idle from 500 us on, and the host asked at 752 us.
    assert first.waits_for_host_s == pytest.approx(252e-6)
    assert last.window_s == pytest.approx(800e-6), "nothing says when the next step would have begun"
    assert collective_times(found) == {"all_reduce": (2, pytest.approx(300e-6))}
    assert gemm_rows(found.products) == {("bf16", 4096, 64, 1024): (2, pytest.approx(220e-6))}


def test_work_that_runs_into_the_next_step() -> None:
    tail = [launch(99, 5000.0 + 990.0), kernel("ncclDevKernel_AllReduce", 5000.0 + 990.0, 300.0, 99, stream=20)]
    events = [*step(2, 5000.0), *tail, *step(3, 6000.0)]
    first, second = step_times(read_trace(trace(events), "t.json"))
    assert first.busy_s["collective"] == pytest.approx(450e-6)
    assert first.exposed_collective_s == pytest.approx((100 + 110) * 1e-6), "to the end of its window"
    assert second.busy_s["collective"] == pytest.approx(150e-6)
    assert second.idle_s == pytest.approx(300e-6)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 900), st.integers(1, 200), st.sampled_from([0, 1, 2])), min_size=1, max_size=30)
)
def test_parts_of_a_step_make_up_its_window(spans: list[tuple[int, int, int]]) -> None:
    names = ("ampere_bf16_gemm", "ncclDevKernel_AllGather", "vectorized_elementwise_kernel")
    events = [mark("ProfilerStep#0", 0.0, 2000.0)]
    for number, (start, wide, which) in enumerate(spans):
        events += [launch(number, 0.0, 0.0), kernel(names[which], start, wide, number)]
    (found,) = step_times(read_trace(trace(events), "t.json"))
    moments = {moment for start, wide, _ in spans for moment in range(start, start + wide)}
    computing = {moment for start, wide, which in spans if which != 1 for moment in range(start, start + wide)}
    assert found.window_s - found.idle_s == pytest.approx(len(moments) * 1e-6)
    assert found.exposed_collective_s == pytest.approx((len(moments) - len(computing)) * 1e-6)
    assert found.waits_for_host_s == pytest.approx(0.0)


def test_trace_of_a_cpu() -> None:
    events = [
        mark("ProfilerStep#0", 0.0, 100.0),
        {**op("aten::linear", 1, 10.0, [[4, 8], [16, 8]], "float"), "dur": 30.0},
        {**op("aten::addmm", 2, 15.0, [[16], [4, 8], [8, 16]], "float"), "dur": 20.0},
        {**op("autograd::engine::evaluate_function: MmBackward0", 3, 50.0, []), "dur": 20.0},
        {**op("aten::mm", 4, 55.0, [[8, 4], [4, 16]], "float"), "dur": 10.0},
        mark("Optimizer.step#SGD.step", 75.0, 20.0),
        {**op("aten::add_", 5, 80.0, [[16]], "float"), "dur": 10.0},
    ]
    found = read_trace(trace(events), "t.json")
    (times,) = step_times(found)
    assert times.busy_s["gemm"] == pytest.approx(40e-6), "a linear once, not once more for its addmm"
    assert times.busy_s["optimizer"] == pytest.approx(10e-6)
    assert times.idle_s == pytest.approx(50e-6)
    assert list(gemm_rows(found.products)) == [("fp32", 4, 16, 8), ("fp32", 8, 16, 4)]
    assert "no GPU kernel" in found.notes[0]


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "gemm"),
        ("triton_tem_fused_mm_3", "gemm"),
        ("triton_poi_fused_add_gelu_1", "memory"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "memory"),
        ("void (anonymous namespace)::softmax_warp_forward<float>", "memory"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("ncclKernel_ReduceScatter_RING_LL_Sum_float(ncclDevComm*)", "collective"),
        ("ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)", "collective"),
        ("spin", "other"),
    ],
)
def test_kernels_by_name(name: str, category: str) -> None:
    assert kernel_category(name) == category


def test_collectives_by_name() -> None:
    assert collective_name("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL") == "reduce_scatter"
    assert collective_name("ncclDevKernel_SendRecv(ncclDevKernelArgs)") == "send_recv"
    assert collective_name("ncclDevKernel_Generic_4") == "collective"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", r"t.json:1:2: is not JSON"),
        (b"{}", r"t.json: has no traceEvents"),
        (b"[]", r"t.json: has no kernel and no operation"),
        (gzip.compress(b"{}")[:10], r"t.json: is cut off or not gzip"),
        (
            trace([{"ph": "X", "cat": "kernel", "name": "k", "ts": "soon"}]),
            r"t.json: event 1: ts and dur must be numbers",
        ),
    ],
)
def test_mistakes_in_a_trace(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_trace(data, "t.json")


def test_trace_without_steps() -> None:
    found = read_trace(trace([launch(1, 0.0), kernel("gemm", 5.0, 1.0, 1)]), "t.json")
    assert "marks no step" in found.notes[0]
    assert [times.busy_s["gemm"] for times in step_times(found)] == [pytest.approx(1e-6)]
    outside = read_trace(trace([mark("ProfilerStep#7", 90.0, 5.0), kernel("gemm", 5.0, 1.0, 1)]), "t.json")
    with pytest.raises(InputError, match="its steps hold no work"):
        step_times(outside)


def test_products_of_a_trace_price_themselves(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "t.json").write_bytes(trace(step(2, 1000.0)))
    shipped = device_costs("h100-sxm")
    assert run(["import", "kineto", "t.json"]) == 0
    text = capsys.readouterr().out
    assert "matrix products" in text
    assert "launch-bound" in text
    assert run(["import", "kineto", "t.json", "--device", "h100-sxm"]) == 0
    assert load_device("h100-sxm").tables.gemm[1].provenance.method == "imported"
    cost = device_costs("h100-sxm").cost(Gemm(m=4096, n=64, k=1024, dtype="bf16"))
    assert cost.seconds == pytest.approx(220e-6, rel=1e-3)
    # One shape bends nothing else, not even beside it.
    for m, n, k in ((4096, 128, 1024), (4096, 64, 2048), (2048, 64, 1024), (300, 5000, 700), (8192, 8192, 8192)):
        other = Gemm(m=m, n=n, k=k, dtype="bf16")
        assert device_costs("h100-sxm").cost(other).seconds == pytest.approx(shipped.cost(other).seconds, rel=0.02)
    capsys.readouterr()
    assert run(["import", "kineto", "t.json", "--json", "--out", "g.csv"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["products"] == [
        {"dtype": "bf16", "m": 4096, "n": 64, "k": 1024, "count": 1, "median_s": pytest.approx(220e-6)}
    ]
    assert (here / "g.csv").read_text(encoding="utf-8").splitlines()[1:] == [
        "dtype,m,n,k,time_us",
        "bf16,4096,64,1024,220",
    ]
    assert run(["import", "kineto", "t.json", "--device", "v100-sxm2-32g"]) == 3
    assert "which v100-sxm2-32g cannot run" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ fabrics


def listed(leaves: int, hosts: int, spines: int, up: int, rails: bool = False, both_ends: bool = True) -> str:
    """A fabric of NDR hosts and uplinks as ibnetdiscover lists it."""
    switches: dict[str, list[str]] = {}
    adapters = []
    for leaf in range(leaves):
        lines = []
        for host in range(hosts):
            name = f"node{host if rails else leaf * hosts + host} mlx5_{leaf if rails else 0}"
            key = f"H-{leaf * hosts + host:016x}"
            lines.append(f'[{host + 1}]\t"{key}"[1](aa) \t\t# "{name}" lid {host + 9} 4xNDR')
            head = f'Ca\t1 "{key}"\t\t# "{name}"\n[1](aa) \t"S-{leaf:016x}"[{host + 1}]\t\t'
            adapters.append(head + f'# lid 3 lmc 0 "leaf{leaf}" lid 2 4xNDR')
        for number in range(spines * up):
            spine, port = number % spines, hosts + number + 1
            there = leaf * up + number // spines + 1
            lines.append(f'[{port}][ext {port}]\t"S-{1000 + spine:016x}"[{there}]\t\t# "spine{spine}" lid 1 4xNDR')
            switches.setdefault(f"{1000 + spine:016x} spine{spine}", []).append(
                f'[{there}]\t"S-{leaf:016x}"[{port}]\t\t# "leaf{leaf}" lid 2 4xNDR'
            )
        switches[f"{leaf:016x} leaf{leaf}"] = lines
    text = "#\n# Topology file: generated on a day\n#\n\n"
    for key, lines in switches.items():
        guid, name = key.split()
        if not both_ends and name.startswith("spine"):
            continue
        text += (
            f'vendid=0x2c9\nswitchguid=0x{guid}({guid})\nSwitch\t64 "S-{guid}"\t\t# "{name}" enhanced port 0 lid 1\n'
        )
        text += "\n".join(lines) + "\n\n"
    return text + ("\n\n".join(adapters) if both_ends else "")


@pytest.mark.parametrize("both_ends", [True, False])
def test_leaves_and_spines(both_ends: bool) -> None:
    found = read_ibnetdiscover(listed(leaves=4, hosts=8, spines=2, up=2, both_ends=both_ends), "f.txt")
    assert found.kind == "leaf-spine"
    assert (len(found.switches), len(found.adapters), len(found.cables)) == (6, 32, 48)
    levels = {switch.name: found.levels()[switch.key] for switch in found.switches}
    assert levels == {**{f"leaf{number}": 1 for number in range(4)}, "spine0": 2, "spine1": 2}
    assert {cable.rate_bytes_per_s for cable in found.cables} == {50e9}
    shares = found.oversubscription()
    assert shares is not None
    assert set(shares.values()) == {2.0}
    profile = fabric_profile(found, None, None, FROM)
    assert (profile.kind, profile.nodes_per_leaf, profile.oversubscription) == ("leaf-spine", 8, 2.0)
    kinds = [kind for _, kind in fabric_graph(found).nodes(data="kind")]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"nic": 32, "leaf": 4, "spine": 2}


def test_rails() -> None:
    found = read_ibnetdiscover(listed(leaves=4, hosts=8, spines=4, up=2, rails=True), "f.txt")
    assert found.kind == "rail-optimized"
    assert len({adapter.host for adapter in found.adapters}) == 8
    assert fabric_profile(found, None, None, FROM).oversubscription == 1.0


def test_one_switch_with_cut_identifiers() -> None:
    text = """\
Switch\t129 "S-9c<cut>"\t\t# "Q:MQM9700/U1" enhanced port 0 lid 1 lmc 0
[1]\t"H-94<cut>"[1](94<cut>) \t\t# "node5 mlx5_2" lid 22 2xNDR
[2]\t"H-94<cut>"[1](94<cut>) \t\t# "node4 mlx5_2" lid 27 2xNDR
[3]\t"H-95<cut>"[1](94<cut>) \t\t# "Mellanox Technologies Aggregation Node" lid 9 4xNDR
"""
    found = read_ibnetdiscover(text, "f.txt")
    assert found.kind == "one-switch"
    assert [(adapter.host, adapter.card) for adapter in found.adapters] == [("node5", "mlx5_2"), ("node4", "mlx5_2")]
    assert {cable.rate_bytes_per_s for cable in found.cables} == {25e9}
    assert found.oversubscription() is None


def test_ends_that_disagree_and_switches_without_a_spine() -> None:
    text = """\
Switch  24 "S-00000000000000aa"         # "A" base port 0 lid 6 lmc 0
[10]    "S-00000000000000bb"[1]         # "B" lid 3 4xSDR
[22]    "H-00000000000000cc"[1](cd)     # "MT23108 InfiniHost Mellanox Technologies" lid 4 4xFDR

Switch  8 "S-00000000000000bb"          # "B" base port 0 lid 3 lmc 0
[1]     "S-00000000000000aa"[10]        # "A" lid 6 1xSDR
[2]     "H-00000000000000dd"[1](de)     # "MT23108 InfiniHost Mellanox Technologies" lid 4
"""
    found = read_ibnetdiscover(text, "f.txt")
    rates = [cable.rate_bytes_per_s for cable in found.cables]
    assert rates == [2.5e8, pytest.approx(54.545e9 / 8, rel=1e-3), None]
    assert found.notes == ("lines 2 and 6 call one cable 4xSDR and 1xSDR; the slower is taken",)
    assert found.kind == "not stated"
    assert found.oversubscription() is None
    with pytest.raises(ProfileError, match="neither one switch nor leaves below spines"):
        fabric_profile(found, None, None, FROM)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "f.txt: lists no switch"),
        ('[1] "H-1"[1] # "a" 4xNDR\n', "f.txt:1: cannot read this port"),
        ('Switch 4 "S-1" # "a"\n[1] H-1\n', "f.txt:2: cannot read this port"),
        ('Switch 4 "S-1" # "a"\n[1] "H-1"[1] # "a" lid 1 4xWDR\n', "f.txt:2: the speed WDR is not known; known: SDR"),
    ],
)
def test_mistakes_in_a_listing(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_ibnetdiscover(text, "f.txt")


def test_import_of_a_fabric(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "f.txt").write_text(listed(leaves=4, hosts=8, spines=2, up=2), encoding="utf-8")
    assert run(["import", "ibnetdiscover", "f.txt", "--name", "mine"]) == 0
    assert "leaf-spine" in capsys.readouterr().out
    assert load_fabric("mine").oversubscription == 2.0
    assert run(["import", "ibnetdiscover", "f.txt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fabric"] == "leaf-spine"


# ------------------------------------------------------------------------------------------------------------- models


def test_import_of_a_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100,
        "intermediate_size": 128,
    }  # fmt: skip
    (here / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    assert run(["import", "hf", "config.json"]) == 0
    assert "In a scenario: model: config.json" in capsys.readouterr().out
    assert run(["import", "hf", "config.json", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    attention, ffn, norms = 4 * 64 * 64, 3 * 64 * 128, 2 * 64
    assert document["parameters"] == 2 * 100 * 64 + 2 * (attention + ffn + norms) + 64
    assert run(["import", "hf", "none.json"]) == 3


def test_collective_csv_reads_back(here: Path) -> None:
    (here / "a.log").write_text(log(), encoding="utf-8")
    assert run(["import", "nccl-tests", "a.log", "--out", "c.csv"]) == 0
    from clustersim.hardware.device import TableRef

    table = collective_table([TableRef(file="c.csv", provenance=FROM)], here)
    assert table.seconds("all_reduce", 8, 2**26) == pytest.approx(20e-6 + 2**26 / 1e11, rel=1e-3)
