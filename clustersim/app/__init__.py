"""The command line: `main()` is the door; one file for each group of commands."""

from __future__ import annotations

from clustersim.app.door import main

__all__ = ["main"]
