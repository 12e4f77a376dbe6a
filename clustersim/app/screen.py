"""Where words go: results on stdout, progress on stderr."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 100


@dataclass(slots=True)
class Settings:
    """What the whole command line asks for."""

    quiet: bool = False
    debug: bool = False
    unfinished_line: bool = False


settings = Settings()


def console() -> Console:
    """Results. A terminal keeps its own width; a file or a pipe gets 100 columns and no control characters."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(file=sys.stdout, width=None if terminal else WIDTH, force_terminal=terminal, highlight=False)


def width() -> int:
    """The columns of the screen, or of a file that stands for one."""
    return console().width


def show(*renderables: Any) -> None:
    """Print results; a redirected screen has no spaces at the ends of its lines."""
    end_progress()
    screen = console()
    if screen.is_terminal:
        screen.print(*renderables, sep="\n")
        return
    with screen.capture() as captured:
        screen.print(*renderables, sep="\n")
    sys.stdout.write("\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n")


def show_json(document: Any) -> None:
    """Print exactly one JSON document."""
    import json

    end_progress()
    sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def progress() -> Callable[[str], None]:
    """A function that tells how far the work is, on stderr, with the seconds since the start.

    A terminal gets one line that is rewritten; a file gets a line a second at most of messages that differ only in
    their numbers.
    """
    if settings.quiet:
        return lambda message: None
    start = time.perf_counter()
    last = ("", -1.0)

    def tell(message: str) -> None:
        nonlocal last
        now = time.perf_counter() - start
        kind = re.sub(r"\d+", "", message)
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{f'[{now:5.1f} s] {message}'[:width]}")
            sys.stderr.flush()
            settings.unfinished_line = True
        elif kind != last[0] or now - last[1] >= 1.0:
            print(f"[{now:5.1f} s] {message}", file=sys.stderr, flush=True)
            last = (kind, now)

    return tell


def end_progress() -> None:
    """Clear the progress line of a terminal, before anything else is printed."""
    if settings.unfinished_line:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
        settings.unfinished_line = False


def show_text(text: str) -> None:
    """Print text as it stands."""
    end_progress()
    sys.stdout.write(text)
