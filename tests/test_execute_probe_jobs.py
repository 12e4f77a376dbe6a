"""A probe's jobs, and the command: what is repeated after an interruption, how the time is divided, what is told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from clustersim import files
from clustersim.app.door import run
from clustersim.errors import ExecutionError
from clustersim.execute import probe as probing
from clustersim.execute.launch import Launcher
from clustersim.execute.probe import FULL_S, QUICK_S, probe
from clustersim.execute.probe_host import Identity, identity
from clustersim.execute.probe_samples import Among, DeviceProbe, Probe, SharedSample, Timed, Whole


def at(seconds: float) -> Timed:
    return Timed(seconds=seconds, spread=0.0, samples=5)


@dataclass
class FakeLauncher:
    """Writes what a job would; raises where `breaks` is in the job's function."""

    cuda: bool = False
    breaks: str = ""
    ran: list[str] = field(default_factory=list)
    until_s: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> FakeLauncher:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(
        self, function: str, *, ranks: int, folder: Path, arguments: Mapping[str, Any],
        progress: Callable[[str], None], spawn: bool, threads: int,
    ) -> None:  # fmt: skip
        name = f"{function.rpartition(':')[2]} {ranks}"
        if self.breaks and self.breaks in name:
            raise ExecutionError("interrupted")
        self.ran.append(name)
        self.until_s[name] = arguments.get("until_s", 0.0)
        out = arguments["out"]
        if "whole" in name:
            files.save(Whole(reduce_bytes_per_s=1e9, gemm=(), cuda=self.cuda), out)
        elif "among" in name:
            shared = SharedSample(ranks=ranks, threads=threads, layer=at(0.01), call_s=0.0)
            files.save(Among(shared=shared, collectives=(), messages=()), out)
        else:
            files.save(self.device("gpu" if spawn else "cpu"), out)

    def device(self, kind: str) -> DeviceProbe:
        return DeviceProbe(
            kind=kind,  # type: ignore[arg-type]
            name=kind, memory_bytes=1, threads=1, floor_s=1e-6, launch_s=0.0, power_w=0.0, software={}, gemm=(),
            attention=(), memory=(), copies=(), layers=(),
        )  # fmt: skip


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    fake = FakeLauncher()
    monkeypatch.setattr(probing, "Launcher", lambda: fake)
    return fake


def test_finished_jobs_are_not_repeated_and_devices_go_on(launcher: FakeLauncher, tmp_path: Path) -> None:
    launcher.breaks = "among 2"
    told: list[str] = []
    with pytest.raises(ExecutionError, match="interrupted"):
        probe(50.0, (1, 2), told.append, tmp_path / "keep")
    assert launcher.ran == ["measure_whole 1", "measure_cpu 1", "measure_among 1", "measure_among 1"]
    launcher.breaks, launcher.ran = "", []
    found = probe(50.0, (1, 2), told.append, tmp_path / "keep")
    # A device's job reads its own record; it may now have time for what it missed.
    assert launcher.ran == ["measure_cpu 1", "measure_among 2"]
    assert [shared.ranks for shared in found.shared] == [1, 2]
    assert "an interrupted profile of this machine goes on" in told


def test_what_another_machine_left_is_thrown_away(launcher: FakeLauncher, tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    probe(50.0, (1,), lambda _: None, keep)
    me: Identity = files.load(Identity, keep / "identity.json")
    assert me == identity((1,))
    files.save(replace(me, cpu="another"), keep / "identity.json")
    (keep / "cpu.jsonl").write_text("not mine\n", encoding="utf-8")
    launcher.ran = []
    told: list[str] = []
    probe(50.0, (1,), told.append, keep)
    assert "measure_whole 1" in launcher.ran
    assert "an interrupted profile was of another machine; starting afresh" in told
    assert not (keep / "cpu.jsonl").exists()
    # Nor is what cannot be read.
    (keep / "identity.json").write_text("{", encoding="utf-8")
    probe(50.0, (1,), told.append, keep)
    assert files.load(Identity, keep / "identity.json") == me


def test_what_an_older_version_left_is_measured_again(launcher: FakeLauncher, tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    probe(50.0, (1,), lambda _: None, keep)
    (keep / "whole.json").write_text('{"reduce_bytes_per_s": 1.0}', encoding="utf-8")
    launcher.ran = []
    told: list[str] = []
    probe(50.0, (1,), told.append, keep)
    assert launcher.ran == ["measure_whole 1", "measure_cpu 1"]
    assert any("cannot be read" in line and "whole.json" in line for line in told)


@pytest.mark.parametrize("cuda", [False, True])
def test_the_jobs_share_the_budget(launcher: FakeLauncher, cuda: bool) -> None:
    launcher.cuda = cuda
    begin = time.monotonic()
    found = probe(100.0, (1, 2, 4), lambda _: None)
    end = {name: until_s - begin for name, until_s in launcher.until_s.items() if until_s}
    assert all(0.0 < until_s <= 100.0 for until_s in end.values())
    assert [device.kind for device in found.devices] == (["cpu", "gpu"] if cuda else ["cpu"])
    if cuda:
        assert end["measure_cuda 1"] > 4.0 * end["measure_cpu 1"]
    else:
        assert end["measure_cpu 1"] > 50.0
    assert found.quick
    assert QUICK_S < 120.0 < FULL_S < 900.0


# ---------------------------------------------------------------------------------------------------- the command


def test_the_command_keeps_what_was_measured_until_the_profile_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from test_execute_probe import made_up

    monkeypatch.setenv("CLUSTERSIM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    asked: list[float] = []
    fails = True

    def fake(budget_s: float, ranks: list[int], progress: Callable[[str], None], keep: Path) -> Probe:
        asked.append(budget_s)
        keep.mkdir(parents=True, exist_ok=True)
        (keep / "points").write_text("x", encoding="utf-8")
        if fails:
            raise ExecutionError("interrupted")
        return made_up()

    monkeypatch.setattr(probing, "probe", fake)
    partial = tmp_path / "out" / ".partial-mine"
    arguments = ["-q", "profile", "--out", str(tmp_path / "out"), "--name", "mine"]
    assert run([*arguments, "--quick"]) == 5
    assert (partial / "points").exists()
    assert not (tmp_path / "out" / "devices").exists()
    fails = False
    assert run(arguments) == 0
    assert not partial.exists()
    assert asked == [QUICK_S, FULL_S]
    assert (tmp_path / "out" / "devices" / "mine" / "device.yaml").is_file()
    assert "rows" in capsys.readouterr().out
    assert run([*arguments, "--within", "0s"]) == 2
    assert run([*arguments, "--within", "5 apples"]) == 2
    assert run([*arguments, "--within", "30s", "--quick"]) == 2
    capsys.readouterr()
    assert run([*arguments, "--within", "2min", "--fresh", "--json"]) == 0
    assert asked[2:] == [120.0]
    assert json.loads(capsys.readouterr().out)["cpu"] == "a CPU"


def test_the_launcher_is_what_the_fake_stands_for() -> None:
    import inspect

    real = inspect.signature(Launcher.run).parameters
    assert set(inspect.signature(FakeLauncher.run).parameters) == set(real)
