"""Predicted against measured step times on one GPU: profile it, train small models on it, print both. One command:

    python benchmarks/gpu_accuracy.py [--json FILE] [--profile NAME] [--keep FOLDER] [--minutes 9.5] [--rehearse]

Without `--profile` (a host profile made by `clustersim profile`) the machine is profiled first; with `--keep` that
profile, what it was made of, and all runs are put into FOLDER as gpu_accuracy.zip. Then GPTs and Llamas of several
sizes, sequences and batches train a few steps each in bf16 on GPU 0, in an NCCL group of one rank, as `clustersim run`
runs them. None of these rows is used for any constant: `profiled` is predicted with the host's own profile, `as
shipped` with the profiles that come with clustersim, where these know the GPU. Three more checks are measured and not
predicted: what an all-reduce in a group of one NCCL rank costs, and two ranks that share the GPU over gloo, with
all-reduces behind the backward pass and beside it, whose losses must equal one rank's.

Every phase has its part of `--minutes`, is ended when it takes longer, and fails alone: what went wrong is told at the
end and stands in the JSON. All files are written anew after every phase. `--rehearse` runs tiny models on the CPU
instead, to see that everything works. Runs from a checkout, without being installed; needs torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_cases import Case

    from clustersim.execute.launch import Launcher

NAME = "gpu-benchmark"
GOAL = 0.05
NEEDED = ("pydantic", "ruamel.yaml", "simpy", "networkx", "numpy", "pandas", "typer", "rich", "torch")
# Nodes with profiles of their own, by what the driver calls their GPUs.
SHIPPED = {"H200": "hgx-h200", "H100 80GB HBM3": "hgx-h100", "A100-SXM4-80GB": "dgx-a100-80g", "B200": "hgx-b200"}
# How long the first start of PyTorch may take.
START_S = 120.0
# The profile's part of the whole time, and how much longer its start and end may take.
PROFILE_PART, PROFILE_SLACK_S = 0.35, 45.0
# A model's time, its start included; a check's; what the checks keep for themselves.
MODEL_S, CHECK_S, CHECKS_PART = 30.0, 40.0, 0.18


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def lacking() -> list[str]:
    """The packages that are missing here."""

    def there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # The package that it is in.
            return False

    return [name for name in NEEDED if not there(name)]


class OutOfTimeError(Exception):
    """A phase took longer than it may."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """OutOfTimeError after so many seconds, wherever the main thread then is; what it started is ended on the way out
    (a Launcher sees to its ranks)."""

    def ring(number: int, frame: object) -> None:
        raise OutOfTimeError(f"was ended after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    left_s, again_s = signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    begin = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        if left_s:
            signal.setitimer(signal.ITIMER_REAL, max(0.01, left_s - (time.monotonic() - begin)), again_s)


@dataclass
class Results:
    """What is known so far, and where it is written after every phase."""

    folder: Path
    target: Path | None
    archive: Path | None
    until_s: float
    begin_s: float = field(default_factory=time.monotonic)
    found: dict[str, Any] = field(default_factory=lambda: {"finished": False, "phases": [], "rows": [], "left_out": []})

    @property
    def left_s(self) -> float:
        return self.until_s - time.monotonic()

    def phase(self, name: str, limit_s: float, work: Callable[[], object]) -> bool:
        """Do `work` in at most `limit_s` seconds; whether it ended well. Its failure is its own."""
        begin = time.monotonic()
        error = None
        if limit_s <= 0.0:
            error = "no time"
        else:
            try:
                with limited(limit_s):
                    work()
            except Exception as failure:  # Whatever it is: the other phases shall be measured.
                error = " ".join(f"{type(failure).__name__}: {failure}".split())[:500]
        self.found["phases"].append({"phase": name, "took_s": time.monotonic() - begin, "error": error})
        if error is not None:
            say(f"{name}: {error}")
        self.write()
        return error is None

    def write(self) -> None:
        from clustersim import files

        self.found["took_s"] = time.monotonic() - self.begin_s
        # A phase that was tried again counts as it ended.
        last = {phase["phase"]: phase["error"] for phase in self.found["phases"]}
        self.found["left_out"] = [f"{name}: {error}" for name, error in last.items() if error is not None]
        for name in ("profiled", "shipped"):
            errors = [abs(row[f"{name}_error"]) for row in self.found["rows"] if f"{name}_error" in row]
            self.found[f"{name}_mean"] = statistics.mean(errors) if errors else None
        if self.target is not None:
            files.write_text(self.target, json.dumps(self.found, indent=1) + "\n")
        if self.archive is not None:
            data = io.BytesIO()
            with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as packed:
                for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
                    packed.write(path, path.relative_to(self.folder))
            files.write_bytes(self.archive, data.getvalue())


# -------------------------------------------------------------------------------------------------------- phases


def profile(results: Results, budget_s: float, cpu: bool) -> None:
    from clustersim import files
    from clustersim.errors import ExecutionError
    from clustersim.execute.probe import probe
    from clustersim.execute.profile_files import write_profiles
    from clustersim.hardware.device import Device

    found = probe(budget_s, (1, 2), say, results.folder / "partial")
    files.save(found, results.folder / "probe.json")
    if not cpu and not any(device.kind == "gpu" for device in found.devices):
        raise ExecutionError("PyTorch finds no GPU here; --rehearse tries everything on the CPU")
    written = write_profiles(found, NAME, results.folder / "hwprofiles")
    device: Device = files.load(Device, files.profile_path("devices", written.gpu or written.device))
    results.found.update(
        clock=device.provenance.clock, software=device.provenance.software, profile_notes=device.provenance.notes,
        missed={d.kind: d.missed for d in found.devices}, refused={d.kind: d.refused for d in found.devices},
    )  # fmt: skip
    say(f"profiled in {found.took_s:.0f} s; {device.provenance.notes}")


def train(results: Results, launcher: Launcher, case: Case, host: str, cpu: bool) -> None:
    from gpu_cases import (
        MEASURED_STEPS,
        WARMUP_STEPS,
        ask,
        laid_out,
        measured_row,
        memory_against,
        step_against,
        task_of,
    )

    from clustersim import files
    from clustersim.errors import ClustersimError
    from clustersim.execute.execute import run_task

    try:
        own = ask(case, host if cpu else f"{host}-gpu", f"clustersim-{host}")
    except ClustersimError as error:
        # What is measured without a profile can still be compared with what is shipped.
        say(f"{case.name}: no prediction with this machine's profile: {error}")
        own = None
    plain = own or ask(case, "hgx-h200", "clustersim")
    layout = laid_out(plain, case)
    task = task_of(plain, layout, cpu, warmup=WARMUP_STEPS, steps=MEASURED_STEPS)
    run = run_task(task, progress=lambda _: None, launcher=launcher)
    files.save(run, results.folder / "runs" / f"{case.name.replace(' ', '-')}.json")
    row = measured_row(case, run)
    results.found["rows"].append(row)
    near = next((name for known, name in SHIPPED.items() if known in run.device), None)
    if near is not None:
        step_against(row, "shipped", ask(case, near, "clustersim"), layout, run)
    if own is not None:
        step_against(row, "profiled", own, layout, run)
    memory_against(row, plain, case, run)
    say(f"{case.name}: {row['measured_s'] * 1e3:.1f} ms, error {row.get('profiled_error', float('nan')):+.1%}")


def alone_in_nccl(results: Results, launcher: Launcher) -> None:
    with tempfile.TemporaryDirectory(prefix="clustersim-nccl-") as name:
        out = Path(name) / "nccl.json"
        launcher.run(
            "gpu_cases:nccl_alone", ranks=1, folder=Path(name), arguments={"out": str(out)}, progress=say, spawn=True
        )
        results.found["nccl_alone"] = json.loads(out.read_text(encoding="utf-8"))


def together(results: Results, launcher: Launcher, case: Case, host: str, cpu: bool, dp: int, overlap: bool) -> None:
    """Some steps of `dp` ranks on one device; the losses of two must be those of one."""
    from gpu_cases import ask, laid_out, task_of

    from clustersim.execute.execute import run_task

    shipped = cpu or "clock" not in results.found
    asked = ask(case, "hgx-h200" if shipped else f"{host}-gpu", "clustersim")
    task = task_of(asked, laid_out(asked, case, dp, overlap), cpu, warmup=1, steps=4)
    run = run_task(task, progress=say, launcher=launcher)
    rows = results.found.setdefault("together", [])
    losses = rows[0]["losses"] if rows and rows[0]["ranks"] == 1 else None
    rows.append(
        {
            "model": case.name, "ranks": dp, "overlap": overlap, "step_s": statistics.median(run.step_s),
            "losses": list(run.losses), "backend": run.backend,
            "losses_apart": losses and max(abs(a / b - 1.0) for a, b in zip(losses, run.losses, strict=True)),
        }
    )  # fmt: skip


def benchmark(results: Results, given: argparse.Namespace) -> None:
    """All phases, the important ones first; models that were ended for want of time get what is left."""
    from gpu_cases import CASES, TINY, TINY_TOGETHER, TOGETHER

    from clustersim.errors import ExecutionError
    from clustersim.execute.execute import host_gpus
    from clustersim.execute.launch import Launcher

    cpu = bool(given.rehearse)
    whole_s = results.left_s
    with Launcher() as launcher:
        # The first start of PyTorch is the longest: no model's time goes into it.
        with limited(START_S), tempfile.TemporaryDirectory(prefix="clustersim-gpus-") as name:
            results.found["gpus"] = host_gpus(launcher, Path(name))
        if not (cpu or results.found["gpus"]):
            raise ExecutionError("PyTorch finds no GPU here; --rehearse tries everything on the CPU")
        host = given.profile or NAME
        if not given.profile:
            part_s = PROFILE_PART * whole_s
            results.phase("profile", part_s + PROFILE_SLACK_S, lambda: profile(results, part_s, cpu))

        def one(case: Case, limit_s: float) -> None:
            results.phase(case.name, limit_s, lambda: train(results, launcher, case, host, cpu))

        cases = TINY if cpu else CASES
        for case in cases:
            one(case, min(MODEL_S, results.left_s - CHECKS_PART * whole_s))
        if not cpu:
            results.phase("nccl alone", min(CHECK_S, results.left_s), lambda: alone_in_nccl(results, launcher))
        model = TINY_TOGETHER if cpu else TOGETHER
        for dp, overlap in ((1, False), (2, False), (2, True)):
            results.phase(
                f"{dp} rank{'s' * (dp > 1)} on one device{', overlapped' * overlap}", min(CHECK_S, results.left_s),
                lambda dp=dp, overlap=overlap: together(results, launcher, model, host, cpu, dp, overlap),  # type: ignore[misc]
            )  # fmt: skip
        measured = {row["model"] for row in results.found["rows"]}
        for case in cases:
            if case.name not in measured:
                one(case, results.left_s)
    results.found["finished"] = True


# ---------------------------------------------------------------------------------------------------------- text


def show(found: dict[str, Any]) -> None:
    """The results as text."""
    print(
        f"{'model':22} {'layers x hidden':>15} {'seq':>5} {'batch':>5} {'measured':>10} {'p90':>5} "
        f"{'profiled':>18} {'as shipped':>18}"
    )
    for row in found["rows"]:
        told = [
            f"{row[f'{name}_s'] * 1e3:7.1f} ms {row[f'{name}_error']:+7.1%}" if f"{name}_s" in row else "not stated"
            for name in ("profiled", "shipped")
        ]
        print(
            f"{row['model']:22} {row['layers']:>6} x {row['hidden']:<6} {row['sequence']:>5} "
            f"{row['batch']:>2}/{row['micro_batch']:<2} {row['measured_s'] * 1e3:7.1f} ms {row['repeat_p90']:5.1%} "
            f"{told[0]:>18} {told[1]:>18}"
        )
    print("phases of a step, predicted with this machine's profile/measured, in ms:")
    for row in found["rows"]:
        pairs = row.get("profiled_phases", {})
        print(f"  {row['model']:22} {'  '.join(f'{n} {a * 1e3:.2f}/{b * 1e3:.2f}' for n, (a, b) in pairs.items())}")
    for row in found["rows"]:
        pairs = row.get("memory_bytes", {})
        if pairs:
            told = [f"{level} {a / 2**30:.2f}/{b / 2**30:.2f} ({a / b - 1:+.1%})" for level, (a, b) in pairs.items()]
            print(f"memory of {row['model']}, predicted/measured in GiB: {'  '.join(told)}")
    for one in found.get("nccl_alone", {}).get("rows", ()):
        print(f"all-reduce of {one['bytes']} bytes in a group of one NCCL rank: host {one['host_s'] * 1e6:.1f} us, "
              f"device {one['device_s'] * 1e6:.1f} us")  # fmt: skip
    for one in found.get("together", ()):
        apart = "" if one["losses_apart"] is None else f", losses apart from one rank's {one['losses_apart']:.2e}"
        print(f"{one['model']}: {one['ranks']} rank(s) on one device over {one['backend']}, overlap {one['overlap']}: "
              f"{one['step_s'] * 1e3:.1f} ms (not predicted){apart}")  # fmt: skip
    for line in found["left_out"]:
        print(f"left out: {line}")
    print(f"{found.get('software', 'no profile was made')}; {found.get('clock', '')}")
    if found["shipped_mean"] is not None:
        print(f"mean |error| as shipped: {found['shipped_mean']:.1%}")
    if found["profiled_mean"] is not None:
        met = "met" if found["profiled_mean"] <= GOAL else "missed"
        print(
            f"mean |error| of {len(found['rows'])} models with the profile of this machine, no step time used: "
            f"{found['profiled_mean']:.1%}; goal {GOAL:.0%}: {met}"
        )


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything here, too")
    parser.add_argument("--profile", help="a host profile made by `clustersim profile`, instead of a fresh one")
    parser.add_argument("--keep", type=Path, help="keep the profile and all runs in this folder, as one archive")
    parser.add_argument("--minutes", type=float, default=9.4, help="end everything after so many minutes")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parsed(arguments)
    begin = time.monotonic()
    missing = lacking()
    if missing:
        print(f"error: not installed here: {', '.join(missing)}; pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent)]
    try:
        from clustersim import files
        from clustersim.errors import ClustersimError
    except ImportError as error:  # What one of the packages needs itself, or an older version of it.
        print(f"error: a package is missing or too old: {error}", file=sys.stderr)
        return 2

    target = given.json.resolve() if given.json else None
    archive = given.keep.resolve() / "gpu_accuracy.zip" if given.keep else None
    cwd = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="clustersim-benchmark-") as name:
        results = Results(
            folder=Path(name), target=target, archive=archive, until_s=begin + 60.0 * given.minutes, begin_s=begin
        )
        try:
            files.check_writable(target, archive)
            # Profiles of this run go before the user's own, and nothing is written among them.
            os.chdir(name)
            benchmark(results, given)
        except (ClustersimError, OutOfTimeError) as failure:
            print(f"error: {failure}", file=sys.stderr)
            return getattr(failure, "exit_code", 5)
        finally:
            os.chdir(cwd)
            results.write()
    show(results.found)
    say(f"took {results.found['took_s']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
