"""main(): runs one command and turns what went wrong into one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from clustersim.app import calibrating, collective, importing, looking, machine, planning, running, validating
from clustersim.app.screen import end_progress, settings
from clustersim.errors import ClustersimError, InputError

app = typer.Typer(
    name="clustersim",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

# Exit codes besides those of clustersim.errors.
_BUG, _INTERRUPTED = 1, 130
# These may stand anywhere on the command line.
_EVERYWHERE = {"--quiet": "--quiet", "-q": "--quiet", "--debug": "--debug"}


def _show_version(wanted: bool) -> None:
    if wanted:
        from clustersim import __version__

        typer.echo(f"clustersim {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; may stand anywhere.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Plan a training cluster, simulate it, run the plan, and see how wrong the prediction was.

    Start with [bold]clustersim demo[/bold], or [bold]clustersim plan gpt3-175b-dgx-a100[/bold].

    Exit codes: 0 ok, 1 bug in clustersim, 2 usage, 3 invalid input, 4 no layout fits, 5 run failed,
    6 tolerance exceeded, 130 interrupted.
    """
    settings.quiet, settings.debug = quiet, debug


planning.add_to(app)
collective.add_to(app)
running.add_to(app)
machine.add_to(app)
calibrating.add_to(app)
validating.add_to(app)
looking.add_to(app)
importing.add_to(app)


def main() -> NoReturn:
    """The console script. Exits with the codes that `clustersim --help` lists."""
    # Closed by who started us: nobody reads.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; its exit code. Prints at most one line on stderr about what went wrong."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    front = [_EVERYWHERE[argument] for argument in arguments[:end] if argument in _EVERYWHERE]
    rest = [argument for argument in arguments[:end] if argument not in _EVERYWHERE] + arguments[end:]
    settings.quiet, settings.debug = "--quiet" in front, "--debug" in front
    try:
        code = app([*front, *rest], prog_name="clustersim", standalone_mode=False)
        sys.stdout.flush()
    except ClustersimError as error:
        return _told(" ".join(str(error).split()), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _told("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe has seen enough: end like any Unix tool, and let nothing be flushed at exit.
        _drop_output()
        return 128 + signal.SIGPIPE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _drop_output()
            return _told(f"the output cannot be written: {error.strerror}", InputError.exit_code)
        usage = getattr(error, "format_message", None)
        if usage is not None:
            return _usage(error, usage())
        return _told(_bug(error), _BUG)
    if code == _INTERRUPTED:
        return _told("interrupted", _INTERRUPTED)
    return code if isinstance(code, int) else 0


def _drop_output() -> None:
    """What is left to print goes nowhere."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(error: Exception, message: str) -> int:
    """A mistake in the command line, which the parser found."""
    if not message:
        # No arguments at all: the help is on the screen already.
        return 2
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "clustersim"
    line = " ".join(message.split()).rstrip(".").replace(": Value error, ", ": ", 1)
    return _told(f"{line[:1].lower()}{line[1:]}; see {command} --help", 2)


def _bug(error: Exception) -> str:
    words = " ".join(str(error).split())
    told = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return f"internal error: {told}; please report with --debug output"


def _told(message: str, code: int) -> int:
    end_progress()
    if settings.debug:
        import traceback

        traceback.print_exc()
    prefix = "" if message.startswith(("internal error", "interrupted")) else "error: "
    print(prefix + message, file=sys.stderr)
    return code
