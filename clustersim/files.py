"""The only disk I/O: load(Type, path), save(value, path), digest(value), and the profiles and scenarios by name."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from clustersim.errors import InputError, ProfileError, ScenarioError
from clustersim.mistakes import Located, coerced, explain, located, near
from clustersim.syntax import parse_json, parse_yaml

__all__ = [
    "Located", "adapter", "check_writable", "digest", "json_text", "load", "located", "parse_yaml", "plain",
    "profile_folders", "profile_names", "profile_path", "read_csv", "read_tree", "save", "scenario_names",
    "scenario_path", "user_folder", "validated", "write_bytes", "write_text", "yaml_text",
]  # fmt: skip

T = TypeVar("T")

_LARGEST_YAML_BYTES = 2_000_000
_LARGEST_JSON_BYTES = 500_000_000
# What `clustersim profile` calls this machine, and (after the executor's name) the software on it.
_LOCAL = "local"


def adapter(type_: Any) -> TypeAdapter[Any]:
    """The reader and writer of a type; built once a process, because building costs milliseconds."""
    return _adapter(type_)


@functools.cache
def _adapter(type_: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, type_))


def _schema(type_: Any) -> dict[str, Any]:
    return _json_schema(type_)


@functools.cache
def _json_schema(type_: Hashable) -> dict[str, Any]:
    return adapter(type_).json_schema(by_alias=True)


# ---------------------------------------------------------------------------------------------------- reading


def read_tree(path: Path) -> tuple[Any, Located]:
    """The plain data of a YAML or JSON file, and the (line, column) of every key path in it (YAML only)."""
    text = _read_text(path)
    if path.suffix == ".json":
        return parse_json(text, str(path)), {}
    return parse_yaml(text, str(path))


def _read_text(path: Path) -> str:
    try:
        limit = _LARGEST_JSON_BYTES if path.suffix == ".json" else _LARGEST_YAML_BYTES
        if path.is_dir():
            raise ScenarioError(f"{path}: is a folder; name the file in it")
        if path.stat().st_size > limit:
            raise ScenarioError(f"{path}: is larger than {limit} bytes; that is no file of clustersim's")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ScenarioError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ScenarioError(f"{str(path)[:200]}: {error.strerror}") from None


def validated(
    type_: type[T] | Any, tree: Any, name: str, places: Located | None = None, at: tuple[str | int, ...] = ()
) -> T:
    """`tree` as a value of `type_`; the first mistake as one line with file, line, column, path and mend.

    `at` is where in the file `tree` stands, for a part of one.
    """
    if tree is None and not at:
        raise ScenarioError(f"{name}: is empty; `clustersim init` writes a scenario to start from")
    try:
        value = adapter(type_).validate_python(tree)
        wrong = coerced(tree, _schema(type_)) if places and _holds_bool(tree) else None
    except ValidationError as error:
        raise ScenarioError(explain(error, tree, name, places or {}, _schema(type_), at)) from None
    if wrong is not None:
        raise ScenarioError(located(name, places or {}, (*at, *wrong[0]), wrong[1]))
    return value  # type: ignore[no-any-return]


def _holds_bool(tree: Any) -> bool:
    inner = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ()
    return isinstance(tree, bool) or any(map(_holds_bool, inner))


def load(type_: type[T] | Any, path: str | Path) -> T:
    """The file at `path` as a value of `type_`; ScenarioError, one line, where it is not one."""
    path = Path(path)
    tree, places = read_tree(path)
    return validated(type_, tree, str(path), places)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------- writing


def plain(value: object, type_: Any = None) -> Any:
    """`value` as plain JSON data, with the keys and unit strings that files have."""
    return adapter(type_ or type(value)).dump_python(value, mode="json", by_alias=True)


def json_text(value: object, type_: Any = None) -> str:
    """`value` as indented JSON text."""
    return json.dumps(plain(value, type_), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def yaml_text(value: object, type_: Any = None) -> str:
    """`value` as YAML text."""
    import io

    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(plain(value, type_), stream)
    return stream.getvalue()


def save(value: object, path: str | Path, type_: Any = None) -> None:
    """Write `value` as JSON or YAML, by the suffix of `path`; whole or not at all."""
    path = Path(path)
    write_text(path, json_text(value, type_) if path.suffix == ".json" else yaml_text(value, type_))


def check_writable(*paths: Path | None) -> None:
    """InputError where one of `paths` cannot be written: told before the work, not after it."""
    for path in paths:
        if path is None or (_is_special(path) and os.access(path, os.W_OK)):
            continue
        if path.is_dir():
            raise InputError(f"{path}: cannot be written: is a folder; name a file in it")
        folder = path.parent
        if not folder.exists():
            raise InputError(f"{path}: cannot be written: there is no folder {folder}; make it, or name another place")
        if not folder.is_dir():
            raise InputError(f"{path}: cannot be written: {folder} is no folder; name another place")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{path}: cannot be written: no write access to {folder}; name another place")


def _is_special(path: Path) -> bool:
    """Whether `path` is a device or a pipe, such as /dev/null: to be written into, not to be replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to a temporary file beside `path`, then rename: nobody ever reads half a file."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Like `write_text`, for bytes."""
    path = Path(path)
    if _is_special(path):
        try:
            path.write_bytes(data)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def digest(value: object, type_: Any = None) -> str:
    """SHA-256 of the canonical JSON of `value`: sorted keys, no spaces; independent of the order of dicts."""
    text = json.dumps(plain(value, type_), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_csv(path: Path) -> dict[str, list[str]]:
    """The columns of a CSV by header name; lines that start with `#` are comments."""
    import csv

    lines = [line for line in _read_text(path).splitlines() if line and not line.startswith("#")]
    rows = list(csv.reader(lines))
    if not rows:
        raise ProfileError(f"{path}: has no rows; the first line must name the columns")
    header, body = rows[0], rows[1:]
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise ProfileError(f"{path}:{number}: {len(row)} cells, but the header names {len(header)}")
    return {name: [row[index] for row in body] for index, name in enumerate(header)}


# ----------------------------------------------------------------------------------- profiles and scenarios by name


def user_folder() -> Path:
    """Where a user's own profiles live, unless they lie in ./hwprofiles."""
    if "CLUSTERSIM_HOME" in os.environ:
        return Path(os.environ["CLUSTERSIM_HOME"])
    return Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local" / "share")) / "clustersim"


def shipped_folder(folder: str) -> Path:
    """The folder as the wheel carries it, or as the checkout has it."""
    package = Path(__file__).resolve().parent
    wheel = package / "builtin" / folder
    return wheel if wheel.is_dir() else package.parent / folder


def profile_folders() -> tuple[Path, ...]:
    """Where profiles are looked for, nearest first."""
    return (Path("hwprofiles"), user_folder() / "hwprofiles", shipped_folder("hwprofiles"))


def profile_path(kind: str, name: str) -> Path:
    """The file of profile `name` of `kind` (devices, links, nodes, fabrics, frameworks, tuners, calibrations)."""
    single = kind.rstrip("s")
    # A name is no path.
    for root in profile_folders() if Path(name).name == name else ():
        for candidate in (root / kind / name / f"{single}.yaml", root / kind / f"{name}.yaml"):
            # Unlike Path.is_file, no error where the text is too long for a name.
            if os.path.isfile(candidate):
                return candidate
    known = profile_names(kind)
    mend = near(name, known) or f"; known: {', '.join(sorted(known))}"
    if name in (_LOCAL, f"clustersim-{_LOCAL}"):
        mend = " yet: measure this machine first, once: clustersim profile"
    raise ProfileError(f"{name[:60]!r} is not a known {single}{mend}")


def profile_names(kind: str) -> set[str]:
    """Every profile of `kind` that can be named."""
    names: set[str] = set()
    for root in profile_folders():
        folder = root / kind
        if folder.is_dir():
            names |= {p.stem for p in folder.glob("*.yaml")}
            names |= {p.name for p in folder.iterdir() if (p / f"{kind.rstrip('s')}.yaml").is_file()}
    return names


def scenario_path(name: str) -> Path:
    """A scenario file by path, or a shipped scenario by name."""
    given = Path(name)
    if given.suffix in (".yaml", ".yml", ".json") or os.path.exists(given):
        return given
    shipped = shipped_folder("scenarios") / f"{name}.yaml"
    if os.path.isfile(shipped):
        return shipped
    known = sorted(scenario_names())
    mend = near(name, known) or f"; built in: {', '.join(known)}"
    raise ScenarioError(f"{name}: no such file, and no built-in scenario of that name{mend}")


def scenario_names() -> Iterator[str]:
    """The scenarios that ship with clustersim."""
    return (path.stem for path in shipped_folder("scenarios").glob("*.yaml"))
