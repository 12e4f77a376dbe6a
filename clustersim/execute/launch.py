"""Ranks on this host: started, watched, and ended together. No torch here."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from clustersim.errors import ExecutionError


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_rank(ranks: int) -> int:
    """Compute threads of each of `ranks` ranks: an equal share of the cores. More would slow all of them down."""
    return max(1, cores() // ranks)


class Launcher:
    """Starts ranks on this host, from a process that has torch imported; several jobs one after the other.

    The first job waits for that process (seconds), the others take milliseconds to start. A context manager.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.gpus: list[str] | None = None
        """The names of this host's GPUs, once somebody has asked a rank for them."""

    def __enter__(self) -> Launcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process and every rank."""
        process, self._process = self._process, None
        if process is None:
            return
        # It leads a session of its own: one signal reaches it and all of its ranks.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def run(
        self,
        function: str,
        *,
        ranks: int,
        folder: Path,
        arguments: Mapping[str, Any],
        progress: Callable[[str], None],
        spawn: bool = False,
        threads: int | None = None,
    ) -> None:
        """Call `function` ("module:name") on `ranks` ranks and wait for all of them.

        It is called with rank, ranks, folder, tell (a function that sends one line to `progress`) and `arguments`
        (plain JSON data); what it finds out it writes into `folder`. `spawn`: start ranks as processes of their own
        instead of forking (CUDA). ExecutionError, one line, with the cause on the first rank that failed; the others
        are killed then.
        """
        job = {
            "function": function,
            "ranks": ranks,
            "folder": str(folder.resolve()),
            "arguments": dict(arguments),
            "spawn": spawn,
            "threads": threads or threads_per_rank(ranks),
            "environment": _rank_environment(threads or threads_per_rank(ranks)),
            "path": sys.path,
        }
        try:
            failed = self._exchange(job, progress)
        except BaseException:
            self.close()
            raise
        if failed:
            first = failed[0]
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise ExecutionError(f"rank {first['rank']}{others}: {first['message']}")

    def _exchange(self, job: dict[str, Any], progress: Callable[[str], None]) -> list[dict[str, Any]]:
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            word, _, rest = line.rstrip("\n").partition(" ")
            if word == "progress":
                progress(rest)
            elif word == "done":
                return json.loads(rest)  # type: ignore[no-any-return]
        code = process.wait()
        self._process = None
        raise ExecutionError(f"the process that starts ranks ended with exit code {code}; its own message stands above")

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            if importlib.util.find_spec("torch") is None:
                raise ExecutionError("torch is not installed, and runs need it; pip install 'clustersim[run]'")
            environment = dict(os.environ)
            # The forking process must not start a CUDA context when torch asks for devices.
            environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
            environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "clustersim.execute.zygote"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,
            )
        return self._process


def _rank_environment(threads: int) -> dict[str, str]:
    """One thread count for every library, and gloo on loopback only."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": loopback}
