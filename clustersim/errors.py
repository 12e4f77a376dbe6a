"""One exception tree: what a user can mend. Anything else that escapes is our bug."""

from __future__ import annotations

from dataclasses import dataclass


class ClustersimError(Exception):
    """A mistake or a limit that the user can act on; the message is one line and says what to do."""

    exit_code = 3


class InputError(ClustersimError):
    """An input that cannot be used as it stands."""


class ScenarioError(InputError):
    """A scenario, plan or run file that is wrong."""


class ProfileError(InputError):
    """A hardware or framework profile that is wrong, missing, or does not cover what is asked."""


class UsageError(ClustersimError):
    """A command line that asks for something contradictory."""

    exit_code = 2


class NoFeasibleLayout(ClustersimError):
    """The scenario is sound, and nothing that it allows fits; `path` is the key of it to blame, where it is one."""

    exit_code = 4

    def __init__(self, message: str, path: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.path = path


class ExecutionError(ClustersimError):
    """A real run could not start or did not finish."""

    exit_code = 5


class ToleranceExceeded(ClustersimError):
    """A comparison is further off than the user allows."""

    exit_code = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a file something stands: 1-based line and column."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"
