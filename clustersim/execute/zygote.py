"""The process that local ranks are forked from: it has imported torch and never runs any of it.

Importing torch and torch._dynamo takes seconds; a fork takes milliseconds. A process that has run a torch op, or
touched CUDA, cannot be forked safely (thread pools and driver state do not survive), so forking is done here only.

Protocol: one job per line of JSON on stdin; on stdout, `progress TEXT` lines that ranks write, and `done JSON` at the
end of each job, which lists the ranks that failed. When stdin ends, so does everything.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_PRELOAD = (
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "torch.nn.parallel",
    "clustersim.execute.worker",
)
_POLL_S = 0.02
# How long the other ranks get to say what went wrong after the first one failed.
_GRACE_S = 0.5


def main() -> None:
    """Serve jobs from stdin until it ends. `zygote rank JOB RANK` is one rank of a job that must not be forked."""
    if sys.argv[1:2] == ["rank"]:
        job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        os._exit(_rank(job, int(sys.argv[3]), os.dup(1)))
    for module in _PRELOAD:
        importlib.import_module(module)
    print("ready", flush=True)
    buffer = b""
    while True:
        line, ended, rest = buffer.partition(b"\n")
        if ended:
            buffer = rest
            failed = _run(json.loads(line))
            print("done " + json.dumps(failed), flush=True)
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            return
        buffer += chunk


def _run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Start the ranks of `job`, wait for all; on the first failure kill the others. The failures, first one first."""
    pids: dict[int, int] = {}
    for rank in range(job["ranks"]):
        pids[_spawn(job, rank) if job["spawn"] else _fork(job, rank)] = rank
    failed: list[dict[str, Any]] = []
    deadline = float("inf")
    try:
        while pids:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in pids:
                rank = pids.pop(pid)
                code = os.waitstatus_to_exitcode(status)
                if code != 0:
                    failed.append(_failure(job, rank, code))
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
            elif pid == 0:
                if time.monotonic() > deadline:
                    break
                readable, _, _ = select.select([0], [], [], _POLL_S)
                if readable:  # The parent speaks during a job only by going away.
                    _kill(pids)
                    os._exit(1)
    finally:
        _kill(pids)
    return sorted(failed, key=lambda failure: (failure["consequence"], failure["at_s"]))


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def _failure(job: dict[str, Any], rank: int, code: int) -> dict[str, Any]:
    """What rank `rank` said when it failed, or what its exit code says."""
    try:
        told = json.loads((Path(job["folder"]) / f"rank{rank}.error.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        last = _last_line(Path(job["folder"]) / f"rank{rank}.log")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "; memory may have run out" if code == -signal.SIGKILL else ""
        told = {"message": f"{how}{hint}{': ' + last if last else ''}", "at_s": time.monotonic(), "consequence": False}
    return {"rank": rank, **told}


def _last_line(path: Path) -> str:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line), "")[:300]


def _spawn(job: dict[str, Any], rank: int) -> int:
    path = Path(job["folder"]) / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "clustersim.execute.zygote", "rank", str(path), str(rank)]
    stdin = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    return os.posix_spawn(sys.executable, command, os.environ, file_actions=[stdin])


def _fork(job: dict[str, Any], rank: int) -> int:
    sys.stdout.flush()
    torch = sys.modules.get("torch")
    assert torch is None or not torch.cuda.is_initialized(), "a process that has touched CUDA cannot be forked"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_RDONLY)
            progress = os.dup(1)
            os.dup2(null, 0)
            code = _rank(job, rank, progress)
        finally:
            # No interpreter teardown: gloo's threads may abort in it after everything has been written.
            os._exit(code)
    return pid


def _rank(job: dict[str, Any], rank: int, progress: int) -> int:
    """The life of one rank: output to its log, its function, its error to a file. The exit code."""
    folder = Path(job["folder"])
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _die_with_parent()
    os.environ.update(job["environment"])
    try:
        import torch

        torch.set_num_threads(job["threads"])
        sys.path[:] = job["path"]
        module, _, name = job["function"].partition(":")
        function: Callable[..., None] = getattr(importlib.import_module(module), name)

        def tell(text: str) -> None:
            os.write(progress, f"progress {' '.join(text.split(chr(10)))}\n".encode())

        function(rank=rank, ranks=job["ranks"], folder=folder, tell=tell, **job["arguments"])
        sys.stdout.flush()
        return 0
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        told = {"message": explain(error), "at_s": time.monotonic(), "consequence": is_consequence(error)}
        target = folder / f"rank{rank}.error.json"
        part = target.with_suffix(".part")
        part.write_text(json.dumps(told), encoding="utf-8")
        part.replace(target)
        return 1


def explain(error: BaseException) -> str:
    """An exception in one line: our own as they are, others with their type and the line of ours that raised them."""
    from clustersim.errors import ClustersimError

    text = " ".join(str(error).split())[:600]
    if isinstance(error, ClustersimError):
        return text
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"


def is_consequence(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone."""
    signs = ("Connection closed by peer", "Connection reset", "Timed out waiting", "Broken pipe", "Read timeout")
    return any(sign in str(error) for sign in signs)


def _die_with_parent() -> None:
    """Let the kernel kill this rank when the process that started it dies (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main()
