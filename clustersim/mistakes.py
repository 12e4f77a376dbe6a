"""What is wrong with a file, in one line: where it stands, which key, what is wrong, and what to write instead."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

Path = tuple[str | int, ...]
# (line, column) of the value at every path; `key_of(path)` is the place of the key itself.
Located = Mapping[Path, tuple[int, int]]

_YAML_MENDS = (
    ("\\t", "indent with spaces, not with tabs"),
    ("mapping values are not allowed", "quote a value that contains ': '"),
    ("duplicate key", "remove one of the two"),
    ("another document", "write one document, without ---"),
    ("expected ',' or", "close the bracket that was opened before"),
    ("undefined alias", "define it with & before, or quote a value that begins with *"),
    ("expected <block end>", "indent the keys of a block equally"),
    ("could not find expected ':'", "write key: value"),
    ("unexpected end of stream", "close the quote that was opened before"),
    ("while scanning", "quote the value"),
    ("cannot start any token", "quote the value"),
)


_JSON_MENDS = (
    ("Expecting property name", "write the key in double quotes, and no comma after the last one"),
    ("Illegal trailing comma", "remove it"),
    ("Expecting ',' delimiter", "write a comma between two values, and close every bracket"),
    ("Expecting ':' delimiter", 'write "key": value'),
    ("Expecting value", "write a value: a number, true, false, null, or text in double quotes"),
    ("Extra data", "write one document"),
    ("Invalid control character", "write \\n for a line break within quotes"),
    ("Invalid \\escape", "write \\\\ for a backslash"),
    ("BOM", "save it without a byte order mark"),
)


def key_of(path: Path) -> Path:
    """Where `Located` holds the place of a key, as opposed to that of its value."""
    return ("", *path)


def yaml_mend(problem: str) -> str:
    """What the YAML parser found, and what to write instead where that is known."""
    mend = next((mend for sign, mend in _YAML_MENDS if sign in problem), None)
    return f"{problem}; {mend}" if mend is not None else problem


def json_mend(problem: str) -> str:
    """What the JSON parser found, and what to write instead where that is known."""
    mend = next((mend for sign, mend in _JSON_MENDS if sign in problem), None)
    found = problem[:1].lower() + problem[1:]
    return f"{found}; {mend}" if mend is not None else found


def coerced(tree: Any, schema: Mapping[str, Any], path: Path = ()) -> tuple[Path, str] | None:
    """The first true or false of `tree` where the schema has a number: pydantic would read it as 1 or 0."""
    if isinstance(tree, bool):
        kinds = {str(kind) for one in _schemas_at(schema, path) for kind in _kinds(one)}
        if kinds & {"integer", "number"} and "boolean" not in kinds:
            mend = _what_to_write(path[-1], _schemas_at(schema, path), schema)
            return path, f"{str(tree).lower()} is not a number{mend}"
        return None
    inner = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    return next((found for key, value in inner if (found := coerced(value, schema, (*path, key)))), None)


def _kinds(schema: Mapping[str, Any]) -> Sequence[str]:
    kind = schema.get("type", ())
    return [kind] if isinstance(kind, str) else kind


def near(word: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?` where something that is known looks like `word`."""
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def located(name: str, places: Located, path: Path, message: str, *, key: bool = False) -> str:
    """`message` behind the file, the line and column of `path` (or of the nearest block around it), and the path.

    `key`: the key itself is to blame, not its value.
    """
    if key and key_of(path) in places:
        spot: tuple[int, int] | None = places[key_of(path)]
    else:
        spot = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), None)
    where = f"{name}:{spot[0]}:{spot[1]}" if spot else (f"{name}:1:1" if places else name)
    return f"{where}: {'.'.join(map(str, path))}: {message}" if path else f"{where}: {message}"


def explain(error: ValidationError, tree: Any, name: str, places: Located, schema: Mapping[str, Any], at: Path) -> str:
    """One line for the mistake that stands deepest in the file, and the mend.

    A union reports the mistakes of every member: the member with the fewest is the one that was meant. `schema` is the
    JSON schema of the type; `at` is where in the file `tree` stands.
    """
    details = error.errors(include_url=False)
    branches = Counter(_branch(detail["loc"], tree) for detail in details)

    def rank(detail: ErrorDetails) -> tuple[int, int, int]:
        path = _file_path(detail, tree)
        return len(path), -branches[_branch(detail["loc"], tree)], _weight(detail)

    worst = max(details, key=rank)
    path = _file_path(worst, tree)
    if worst["type"] == "unexpected_keyword_argument":
        known = _keys_at(schema, path[:-1])
        mend = near(str(path[-1]), known) or (f"; known here: {', '.join(sorted(known))}" if known else "")
        return located(name, places, (*at, *path), f"unknown key{mend}", key=True)
    if worst["type"] == "value_error":
        path, message = _narrowed(path, str(worst.get("ctx", {}).get("error", worst["msg"])), tree)
        return located(name, places, (*at, *path), message)
    same = [detail for detail in details if _file_path(detail, tree) == path]
    return located(name, places, (*at, *path), _message(worst, same, path, schema))


def _weight(detail: ErrorDetails) -> int:
    return {"quantity": 3, "value_error": 3, "unexpected_keyword_argument": 2, "missing": 1}.get(detail["type"], 0)


def _walk(loc: Path, tree: Any) -> tuple[Path, Path]:
    """The parts of `loc` that are keys of the file, and all up to the last name of a union member between them."""
    path: Path = ()
    branch: Path = ()
    for index, part in enumerate(loc):
        inside = part in tree if isinstance(tree, Mapping) else isinstance(tree, list) and isinstance(part, int)
        if inside:
            tree = tree[part]
            path = (*path, part)
        elif index < len(loc) - 1 or not isinstance(tree, Mapping):
            branch = loc[: index + 1]
    return path, branch


def _branch(loc: Path, tree: Any) -> Path:
    return _walk(loc, tree)[1]


def _file_path(detail: ErrorDetails, tree: Any) -> Path:
    path = _walk(detail["loc"], tree)[0]
    return (*path, detail["loc"][-1]) if detail["type"] == "missing" else path


def _narrowed(path: Path, message: str, tree: Any) -> tuple[Path, str]:
    """A check of a whole block names the key that it is about first: point at that key."""
    for part in path:
        tree = tree[part]
    match = re.match(r"([A-Za-z_]\w*(?:\.\w+)*) ", message)
    keys = match.group(1).split(".") if match else []
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return path, message
        tree = tree[key]
    if match is None:
        return path, message
    about = message[match.end() :]
    return (*path, *keys), message if about.startswith("and ") else about


def _keys_at(schema: Mapping[str, Any], path: Path) -> set[str]:
    """The keys that a schema allows in the block at `path`, of every member of a union."""
    return {key for block in _schemas_at(schema, path) for key in block.get("properties", {})}


def _schemas_at(schema: Mapping[str, Any], path: Path) -> list[Mapping[str, Any]]:
    """What a schema allows at `path`: every member of a union, of the blocks around it too."""
    blocks = _members(schema, schema)
    for part in path:
        inner: list[Mapping[str, Any]] = []
        for block in blocks:
            if isinstance(part, int):
                found = [block["items"]] if isinstance(block.get("items"), Mapping) else block.get("prefixItems", [])
            elif part in block.get("properties", {}):
                found = [block["properties"][part]]
            else:
                found = (
                    [block["additionalProperties"]] if isinstance(block.get("additionalProperties"), Mapping) else []
                )
            inner += [member for one in found for member in _members(one, schema)]
        blocks = inner
    return blocks


def _members(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A schema with references and unions opened."""
    if "$ref" in schema:
        return _members(root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root)
    choices = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    return [member for choice in choices for member in _members(choice, root)] if choices else [schema]


def _what_to_write(key: str | int, schemas: Sequence[Mapping[str, Any]], root: Mapping[str, Any]) -> str:
    """`; write KEY: VALUE`: the words that may stand there, or an example for each kind of value."""
    values = list(dict.fromkeys(text for one in schemas for text in _values(one, root)))
    if not values:
        return ""
    listed = any("enum" in one or "const" in one or one.get("type") == "boolean" for one in schemas)
    sign = "" if listed else "e.g. "
    return f"; write {sign}{key}: {', '.join(values[:-1])}{' or ' if values[1:] else ''}{values[-1]}"


def _values(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[str]:
    """The words that a member of a union accepts, or one example; nothing for null."""
    words = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if words:
        return [str(word) for word in words]
    if "e.g. " in schema.get("description", "") and "properties" not in schema:
        return [schema["description"].split("e.g. ", 1)[1]]
    match schema.get("type"):
        case "boolean":
            return ["true", "false"]
        case "integer":
            return ["8"]
        case "number":
            return ["1.5"]
        case "string":
            return ["NAME"]
        case "array":
            inner = schema.get("items")
            return [f"[{_example(inner, root)}]" if isinstance(inner, Mapping) else "[]"]
        case "object":
            return [_block(schema, root)]
    return []


def _example(schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """One value that a schema accepts, as YAML on one line."""
    return next((text for member in _members(schema, root) for text in _values(member, root)), "...")


def _block(schema: Mapping[str, Any], root: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> str:
    """The keys that a block needs, each with an example, on one line; `given` values stay as they are."""
    known = schema.get("properties", {})
    wanted = [key for key in known if key == "kind" or key in schema.get("required", ()) or key in (given or {})]
    texts = {key: str(given[key]) if given and key in given else _example(known[key], root) for key in wanted}
    if not known and isinstance(schema.get("additionalProperties"), Mapping):
        texts = {"NAME": _example(schema["additionalProperties"], root)}
    return "{" + ", ".join(f"{key}: {text}" for key, text in texts.items()) + "}" if texts else "{key: value}"


def _tags(schemas: Sequence[Mapping[str, Any]], tag: str) -> list[str]:
    """The values of `tag` that tell the members of a union."""
    return [str(one["properties"][tag]["const"]) for one in schemas if tag in one.get("properties", {})]


def _message(detail: ErrorDetails, same: Sequence[ErrorDetails], path: Path, schema: Mapping[str, Any]) -> str:
    """What is wrong and the mend; `same` are the mistakes at the same place, of all members of a union; `schema` is
    that of the whole type."""
    kind, context, given = detail["type"], detail.get("ctx", {}), detail.get("input")
    if kind == "missing":
        return f"this key is required and missing{_what_to_write(path[-1], _schemas_at(schema, path), schema)}"
    if given is None:
        return "has no value; write one, or remove the key"
    if kind == "quantity":
        return str(context["reason"])
    if kind in ("literal_error", "enum"):
        # pydantic spells them 'a', 'b' or 'c'.
        spelled = ", ".join(str(other["ctx"]["expected"]) for other in same if "expected" in other.get("ctx", {}))
        expected = list(dict.fromkeys(re.split(r", | or ", spelled)))
        if len(expected) == 1:
            return f"{_short(given)} is not accepted; write {expected[0]}"
        close = near(str(given), [word.strip("'") for word in expected])
        return f"{_short(given)} is not one of {', '.join(expected)}{close}"
    if kind == "union_tag_invalid":
        tags = str(context["expected_tags"])
        close = near(str(context["tag"]), [word.strip("'") for word in tags.split(", ")])
        return f"{str(context['discriminator']).strip(chr(39))} {context['tag']!r} is not one of {tags}{close}"
    if kind == "union_tag_not_found":
        tag = str(context["discriminator"]).strip("'")
        members = [one for one in _schemas_at(schema, path) if tag in one.get("properties", {})]
        keys = dict(given) if isinstance(given, Mapping) else {}
        # The member that was meant has most of the keys that stand there.
        meant = max(members, key=lambda one: len(keys.keys() & one["properties"].keys()))
        tags = ", ".join(_tags(members, tag))
        return f"{tag} is required and missing; it is one of {tags}; write e.g. {_block(meant, schema, keys)}"
    if kind in ("int_parsing", "int_type", "int_from_float"):
        return f"{_short(given)} is not a whole number; write e.g. 8"
    if kind in ("float_parsing", "float_type"):
        return f"{_short(given)} is not a number; write e.g. 1.5"
    if kind == "finite_number":
        return f"{_short(given)} is not a finite number; write e.g. 8"
    if kind in ("bool_parsing", "bool_type"):
        return f"{_short(given)} is not true or false; write one of these"
    if kind == "string_type":
        return f"{_short(given)} is not a name; write text, in quotes where it looks like something else"
    if kind in ("tuple_type", "list_type"):
        return f"{_short(given)} is not a list; write e.g. [{_short(given) if isinstance(given, str) else 'a, b'}]"
    if kind in ("dataclass_type", "dict_type", "model_type", "model_attributes_type"):
        blocks = [one for one in _schemas_at(schema, path) if one.get("properties") or one.get("additionalProperties")]
        example = _block(blocks[0], schema) if blocks and path else "key: value"
        return f"{_short(given)} is not a block of keys; write e.g. {example}"
    message = " ".join(detail["msg"].split())
    return f"{message[:1].lower()}{message[1:]}, not {_short(given)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
