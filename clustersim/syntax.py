"""JSON and YAML text as plain data, with the place of every key; what is no such text told in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from clustersim.errors import Place, ScenarioError
from clustersim.mistakes import Located, json_mend, key_of, located, yaml_mend

_MOST_VALUES = 200_000
# Floats count whole numbers exactly up to here.
_LARGEST_WHOLE = 2**53
_MOST_DIGITS = 20
# What may be left of a JSON text that ends within a value.
_JSON_WORDS = ("", "true", "false", "null", "-")


def parse_json(text: str, name: str) -> Any:
    """The plain data of JSON text; ScenarioError where it is none, cut off, or says something twice."""
    try:
        tree = json.loads(text, parse_constant=_refuse_constant, parse_int=_whole, object_pairs_hook=_block_of_pairs)
        # Escapes are the one way to a half of a character, and rare.
        if "\\ud" in text.lower() and not _is_text(json.dumps(tree, ensure_ascii=False)):
            raise ValueError("JSON: holds a half of a character (\\ud...); remove it")
        return tree
    except json.JSONDecodeError as error:
        rest = text[error.pos :].strip()
        place = Place(file=name, line=error.lineno, column=error.colno)
        if not text.strip():
            raise ScenarioError(f"{name}: is empty; `clustersim init` writes a scenario to start from") from None
        if error.msg.startswith("Unterminated string") or any(word.startswith(rest) for word in _JSON_WORDS):
            raise ScenarioError(
                f"{place}: JSON: the file is cut off here; write it again, a plan with `clustersim plan`, "
                "a run with `clustersim run`"
            ) from None
        raise ScenarioError(f"{place}: JSON: {json_mend(error.msg)}") from None
    except RecursionError:
        raise ScenarioError(f"{name}: JSON: nested too deeply; write less") from None
    except ValueError as error:
        raise ScenarioError(f"{name}: {error}") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; write a finite number")


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS or abs(int(digits)) > _LARGEST_WHOLE:
        raise ValueError(f"{digits[:_MOST_DIGITS]} is too large; write at most {_LARGEST_WHOLE}")
    return int(digits)


def _block_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    block = dict(pairs)
    if len(block) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"JSON: {twice!r} stands twice in one block; remove one of the two")
    return block


def parse_yaml(text: str, name: str) -> tuple[Any, Located]:
    """The plain data of YAML 1.2 text, and the (line, column) of every key path in it, 1-based."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.reader import ReaderError

    yaml = YAML(typ="rt", pure=True)
    try:
        if "*" in text:
            _refuse_loop(text, name)
        tree = yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(file=name, line=mark.line + 1, column=mark.column + 1) if mark else name
        problem = " ".join(str(error.problem or error.context or "is not YAML").split())
        raise ScenarioError(f"{place}: YAML: {yaml_mend(problem)}") from None
    except RecursionError:
        raise ScenarioError(f"{name}: YAML: nested too deeply; write less") from None
    except ReaderError as error:
        place = Place(file=name, line=text.count("\n", 0, error.position) + 1, column=1)
        raise ScenarioError(f"{place}: YAML: holds the character U+{error.character:04X}; remove it") from None
    except (YAMLError, ValueError) as error:
        raise ScenarioError(f"{name}: YAML: {' '.join(str(error).split())[:200]}") from None
    _refuse_bomb(tree, name)
    places: dict[tuple[str | int, ...], tuple[int, int]] = {}
    return _plain(tree, (), places, name), places


def _refuse_loop(text: str, name: str) -> None:
    """An alias inside of what it stands for has no end."""
    from ruamel.yaml import YAML
    from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

    open_: list[str | None] = []
    for event in YAML(typ="rt", pure=True).parse(text):
        if isinstance(event, CollectionStartEvent):
            open_.append(event.anchor)
        elif isinstance(event, CollectionEndEvent):
            open_.pop()
        elif isinstance(event, AliasEvent) and event.anchor in open_:
            place = Place(file=name, line=event.start_mark.line + 1, column=event.start_mark.column + 1)
            raise ScenarioError(f"{place}: YAML: the alias *{event.anchor} contains itself; write the value out")


def _refuse_bomb(tree: Any, name: str) -> None:
    """Aliases are shared objects until somebody walks them: count the walk first."""
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if not isinstance(node, (Mapping, list)):
            return 1
        if id(node) not in sizes:
            children = node.values() if isinstance(node, Mapping) else node
            sizes[id(node)] = 1 + sum(size(child) for child in children)
        return sizes[id(node)]

    total = size(tree)
    if total > _MOST_VALUES:
        raise ScenarioError(f"{name}: YAML: {total} values after expanding aliases, {_MOST_VALUES} at most; write less")


def _plain(
    node: Any, path: tuple[str | int, ...], places: dict[tuple[str | int, ...], tuple[int, int]], name: str
) -> Any:
    where = getattr(node, "lc", None)
    if isinstance(node, Mapping):
        result: dict[str, Any] = {}
        for key, value in node.items():
            inner = (*path, str(key))
            # A key that a merge (<<) brought has no place here.
            if where is not None and key in (where.data or ()):
                line, column = where.key(key)
                places[key_of(inner)] = places[inner] = (line + 1, column + 1)
                if value is not None and not isinstance(value, (Mapping, list)):
                    line, column = where.value(key)
                    places[inner] = (line + 1, column + 1)
            result[str(key)] = _plain(value, inner, places, name)
        return result
    if isinstance(node, list):
        items = []
        for index, value in enumerate(node):
            inner = (*path, index)
            if where is not None:
                line, column = where.item(index)
                places[inner] = (line + 1, column + 1)
            items.append(_plain(value, inner, places, name))
        return items
    if isinstance(node, bool) or node is None:
        return node
    if isinstance(node, int):
        if abs(node) > _LARGEST_WHOLE:
            raise ScenarioError(located(name, places, path, f"{node} is too large; write at most {_LARGEST_WHOLE}"))
        return int(node)
    if isinstance(node, float):
        return float(node)
    text = str(node)
    if not _is_text(text):
        raise ScenarioError(located(name, places, path, f"{text!r} holds a half of a character (\\ud...); remove it"))
    return text


def _is_text(text: str) -> bool:
    """Whether a file can hold `text`: UTF-8 has no surrogates."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
