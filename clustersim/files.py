"""The only disk I/O: load(Type, path), save(value, path), digest(value), and the profiles and scenarios by name."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from clustersim.errors import InputError, Place, ProfileError, ScenarioError

T = TypeVar("T")

_LARGEST_YAML_BYTES = 2_000_000
_LARGEST_JSON_BYTES = 500_000_000
_MOST_VALUES = 200_000
Located = Mapping[tuple[str | int, ...], tuple[int, int]]


@functools.cache
def adapter(type_: Any) -> TypeAdapter[Any]:
    """The reader and writer of a type; built once a process, because building costs milliseconds."""
    return TypeAdapter(type_)


# ---------------------------------------------------------------------------------------------------- reading


def read_tree(path: Path) -> tuple[Any, Located]:
    """The plain data of a YAML or JSON file, and the (line, column) of every key path in it (YAML only)."""
    text = _read_text(path)
    if path.suffix == ".json":
        try:
            return json.loads(text, parse_constant=_refuse_constant), {}
        except json.JSONDecodeError as error:
            raise ScenarioError(
                f"{Place(file=str(path), line=error.lineno, column=error.colno)}: {error.msg}"
            ) from None
        except ValueError as error:
            raise ScenarioError(f"{path}: {error}") from None
    return parse_yaml(text, str(path))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; write a finite number")


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
        raise ScenarioError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}") from None


def parse_yaml(text: str, name: str) -> tuple[Any, Located]:
    """The plain data of YAML 1.2 text, and the (line, column) of every key path in it, 1-based."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="rt", pure=True)
    try:
        tree = yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(file=name, line=mark.line + 1, column=mark.column + 1) if mark else name
        problem = " ".join(str(error.problem or error.context or "is not YAML").split())
        raise ScenarioError(f"{place}: YAML: {problem}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise ScenarioError(f"{name}: YAML: {' '.join(str(error).split())[:200]}") from None
    _refuse_bomb(tree, name)
    places: dict[tuple[str | int, ...], tuple[int, int]] = {}
    return _plain(tree, (), places), places


def _refuse_bomb(tree: Any, name: str) -> None:
    """Aliases are shared objects until somebody walks them: count the walk first."""
    sizes: dict[int, int] = {}
    open_: set[int] = set()

    def size(node: Any) -> int:
        if not isinstance(node, (Mapping, list)):
            return 1
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_:
            raise ScenarioError(f"{name}: YAML: an alias contains itself; write the value out")
        open_.add(id(node))
        children = node.values() if isinstance(node, Mapping) else node
        sizes[id(node)] = 1 + sum(size(child) for child in children)
        open_.discard(id(node))
        return sizes[id(node)]

    try:
        total = size(tree)
    except RecursionError:
        raise ScenarioError(f"{name}: YAML: nested too deeply") from None
    if total > _MOST_VALUES:
        raise ScenarioError(f"{name}: YAML: {total} values after expanding aliases, {_MOST_VALUES} at most; write less")


def _plain(node: Any, path: tuple[str | int, ...], places: dict[tuple[str | int, ...], tuple[int, int]]) -> Any:
    if isinstance(node, Mapping):
        result: dict[str, Any] = {}
        for key, value in node.items():
            spelled = str(key)
            where = getattr(node, "lc", None)
            if where is not None:
                line, column = where.value(key) if not isinstance(value, (Mapping, list)) else where.key(key)
                places[(*path, spelled)] = (line + 1, column + 1)
            result[spelled] = _plain(value, (*path, spelled), places)
        return result
    if isinstance(node, list):
        items = []
        for index, value in enumerate(node):
            where = getattr(node, "lc", None)
            if where is not None:
                line, column = where.item(index)
                places[(*path, index)] = (line + 1, column + 1)
            items.append(_plain(value, (*path, index), places))
        return items
    if isinstance(node, bool) or node is None:
        return node
    if isinstance(node, int):
        return int(node)
    if isinstance(node, float):
        return float(node)
    return str(node)


def validated(type_: type[T] | Any, tree: Any, name: str, places: Located | None = None) -> T:
    """`tree` as a value of `type_`; the first mistake as one line with file, line, column, path and mend."""
    try:
        return adapter(type_).validate_python(tree)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise ScenarioError(explain(error, name, places or {})) from None


def explain(error: ValidationError, name: str, places: Located) -> str:
    """One line for the mistake that stands deepest in the file (a union reports one per member), and the mend."""
    details = error.errors(include_url=False)
    worst = max(details, key=lambda d: (_known_depth(d["loc"], places), _weight(d)))
    return located(name, places, _file_path(worst["loc"], places), _message(worst))


def located(name: str, places: Located, path: tuple[str | int, ...], message: str) -> str:
    """`message` behind the file, the line and column of `path` (or of the nearest block around it), and the path."""
    spot = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), None)
    where = f"{name}:{spot[0]}:{spot[1]}" if spot else (f"{name}:1:1" if places else name)
    return f"{where}: {'.'.join(map(str, path)) or 'file'}: {message}"


def _weight(detail: ErrorDetails) -> int:
    return {"quantity": 3, "value_error": 3, "unexpected_keyword_argument": 2, "missing": 1}.get(detail["type"], 0)


def _known_depth(loc: tuple[str | int, ...], places: Located) -> int:
    return len(_file_path(loc, places)) if places else len(loc)


def _file_path(loc: tuple[str | int, ...], places: Located) -> tuple[str | int, ...]:
    """`loc` without the names of union members that pydantic puts between the keys."""
    if not places:
        return loc
    path: tuple[str | int, ...] = ()
    for index, part in enumerate(loc):
        if (*path, part) in places or index == len(loc) - 1:
            path = (*path, part)
    return path


def _message(detail: ErrorDetails) -> str:
    kind, context, given = detail["type"], detail.get("ctx", {}), detail.get("input")
    if kind == "quantity":
        return str(context["reason"])
    if kind == "unexpected_keyword_argument":
        return "unknown key; see `clustersim schema` for the keys allowed here"
    if kind == "missing":
        return "this key is required and missing"
    if kind == "value_error":
        return str(context.get("error", detail["msg"]))
    if kind in ("literal_error", "enum"):
        return f"{given!r} is not one of {context.get('expected')}"
    if kind == "union_tag_invalid":
        return f"{context.get('tag')!r} is not one of {context.get('expected_tags')}"
    if kind in ("int_parsing", "int_type", "int_from_float"):
        return f"{given!r} is not a whole number; write e.g. 8"
    if kind in ("dataclass_type", "dict_type", "model_type"):
        return f"{_short(given)} is not a block of keys; write e.g. {{key: value}}"
    message = " ".join(detail["msg"].split())
    return message[:1].lower() + message[1:] + (f", not {_short(given)}" if given is not None else "")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def load(type_: type[T] | Any, path: str | Path) -> T:
    """The file at `path` as a value of `type_`; ScenarioError, one line, where it is not one."""
    path = Path(path)
    tree, places = read_tree(path)
    return validated(type_, tree, str(path), places)


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


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to a temporary file beside `path`, then rename: nobody ever reads half a file."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Like `write_text`, for bytes."""
    path = Path(path)
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


def _shipped(folder: str) -> Path:
    """The folder as the wheel carries it, or as the checkout has it."""
    package = Path(__file__).resolve().parent
    wheel = package / "builtin" / folder
    return wheel if wheel.is_dir() else package.parent / folder


def profile_folders() -> tuple[Path, ...]:
    """Where profiles are looked for, nearest first."""
    return (Path("hwprofiles"), user_folder() / "hwprofiles", _shipped("hwprofiles"))


def profile_path(kind: str, name: str) -> Path:
    """The file of profile `name` of `kind` (devices, links, nodes, fabrics, frameworks, calibrations)."""
    single = kind.rstrip("s")
    for root in profile_folders():
        for candidate in (root / kind / name / f"{single}.yaml", root / kind / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    known = ", ".join(sorted(profile_names(kind)))
    raise ProfileError(f"{name!r} is not a known {single}; known: {known}{_nearest(name, profile_names(kind))}")


def profile_names(kind: str) -> set[str]:
    """Every profile of `kind` that can be named."""
    names: set[str] = set()
    for root in profile_folders():
        folder = root / kind
        if folder.is_dir():
            names |= {p.stem for p in folder.glob("*.yaml")}
            names |= {p.name for p in folder.iterdir() if (p / f"{kind.rstrip('s')}.yaml").is_file()}
    return names


def _nearest(name: str, known: Sequence[str] | set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def scenario_path(name: str) -> Path:
    """A scenario file by path, or a shipped scenario by name."""
    given = Path(name)
    if given.suffix in (".yaml", ".yml", ".json") or given.exists():
        return given
    shipped = _shipped("scenarios") / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    known = sorted(scenario_names())
    raise ScenarioError(
        f"{name}: no such file, and no built-in scenario of that name; built in: {', '.join(known)}{_nearest(name, known)}"
    )


def scenario_names() -> Iterator[str]:
    """The scenarios that ship with clustersim."""
    return (path.stem for path in _shipped("scenarios").glob("*.yaml"))
