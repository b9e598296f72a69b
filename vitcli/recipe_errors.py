"""What pydantic found wrong with a recipe, in words for the person who wrote it: where, which key, what to write."""

from __future__ import annotations

import difflib
import json
from functools import cache
from typing import Any

from pydantic import ValidationError

from vitcli.schema import Key, Schema, keys
from vitcli.yaml_tree import Mistake, Path, Tree

MAX_LINES = 20


def lines(mistakes: list[Mistake]) -> str:
    """One line a mistake: `FILE:LINE:COLUMN: key: message`, in the order of the file."""
    text = []
    for path, place, message in sorted(
        mistakes, key=lambda mistake: mistake.place[1:] if mistake.place.line else (1e9,)
    ):
        dotted = ".".join(_name(part) for part in path)
        told = not path or (not place.line and place.source.endswith(f" {dotted}"))
        text.append(": ".join([str(place), *([] if told else [dotted]), message]))
    text = list(dict.fromkeys(text))
    return "\n".join(text[:MAX_LINES] + ([f"and {len(text) - MAX_LINES} more"] if len(text) > MAX_LINES else []))


def explain(error: ValidationError, schema: type[Schema], tree: Tree) -> list[Mistake]:
    """Pydantic's findings about a tree, each at its place, without those that only follow from others."""
    found: list[Mistake] = []
    unwritten: list[Mistake] = []
    missing: dict[Path, list[str]] = {}
    meant: set[Path] = set()  # sections for which an unknown key may have been meant
    problems: list[Any] = error.errors(include_url=False)
    for problem in problems:
        path, kind = _path(problem["loc"], tree.data), problem["type"]
        if kind == "union_tag_invalid" and isinstance(_at(tree.data, path), dict):
            path = (*path, "name")
        if kind == "recipe":
            path += tuple(problem["ctx"]["key"].split("."))
            found.append(Mistake(path, tree.place(path), problem["ctx"]["message"]))
        elif kind == "extra_forbidden":
            sections, message = _unknown(schema, path, tree.data)
            meant |= sections
            found.append(Mistake(path, tree.place(path, key=True), message))
        elif kind == "union_tag_not_found" and (typo := difflib.get_close_matches("name", _at(tree.data, path), 1)):
            at = (*path, typo[0])
            found.append(Mistake(at, tree.place(at, key=True), "unknown key (did you mean name?)"))
        elif kind == "union_tag_not_found":
            missing[path] = ["name"]
        elif kind == "missing" and not isinstance(path[-1], int):
            missing.setdefault(path[:-1], []).append(str(path[-1]))
        else:
            mistake = Mistake(_key(schema, path, tree.data).path, tree.place(path), _value(problem, schema, path, tree))
            (found if _written(tree.data, path) else unwritten).append(mistake)
    for section, names in missing.items():
        if section not in meant:
            found.append(_missing(schema, section, names, tree))
    return found or unwritten


def _path(loc: tuple[str | int, ...], data: Any) -> Path:
    """Pydantic's location as a path in the tree: it also names the kind of a section of which there are several."""
    path: Path = ()
    for part in loc:
        if _has(data, part):
            data = data[part]
        elif isinstance(part, str) and part in (data, data.get("name") if isinstance(data, dict) else None):
            continue
        else:
            data = None
        path = (*path, part)
    return path


def _has(data: Any, part: str | int) -> bool:
    return part in (data if isinstance(data, dict) else range(len(data)) if isinstance(data, list | tuple) else ())


def _at(data: Any, path: Path) -> Any:
    for part in path:
        data = data[part] if _has(data, part) else None
    return data


def _written(data: Any, path: Path) -> bool:
    """Whether somebody wrote the value: a section's validator may have put in another."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    section = _at(data, path[:-1])
    return not isinstance(section, dict) or not path or path[-1] in section


@cache
def _table(schema: type[Schema]) -> tuple[Key, ...]:
    return tuple(keys(schema))


def _fields(schema: type[Schema], section: Path, data: Any) -> list[Key]:
    """The keys that a section may have, by its `name` where there are several kinds."""
    found = [key for key in _table(schema) if key.path[:-1] == section]
    name = _at(data, section)
    name = name.get("name") if isinstance(name, dict) else name
    chosen = [key for key in found if key.choice == name]
    return chosen or found


def _key(schema: type[Schema], path: Path, data: Any) -> Key:
    """The schema's key for a path, or for the list or section that it is part of."""
    while path:
        for key in _fields(schema, path[:-1], data):
            if key.path == path:
                return key
        path = path[:-1]
    return Key((), "keys and values", None, True, "", "")


def _unknown(schema: type[Schema], path: Path, data: Any) -> tuple[set[Path], str]:
    """The sections for which an unknown key may have been meant, and what to say of it."""
    section, name = path[:-1], str(path[-1])
    here = list(dict.fromkeys(str(key.path[-1]) for key in _fields(schema, section, data)))
    there = [key for key in _table(schema) if key.path[-1] == name]
    if others := [key.choice for key in there if key.path == path]:
        return set(), f"unknown key here; it is for name: {' or '.join(others)}"
    if there:
        nearest = min(there, key=lambda key: len(key.path))
        return {key.path[:-1] for key in there}, f"unknown key here (it is {nearest.dotted})"
    if near := difflib.get_close_matches(name.lower().replace("-", "_")[:60], here, 1, cutoff=0.5):
        return {section}, f"unknown key (did you mean {near[0]}?)"
    return set(), f"unknown key; there is {', '.join(here)}" if here else "unknown key"


def _missing(schema: type[Schema], section: Path, names: list[str], tree: Tree) -> Mistake:
    """One line for all the keys that a section lacks."""
    place, hint = tree.place(section, key=True), ""
    if names == ["name"]:
        hint = f": {_choices(schema, section)}"
    elif "width" in names and (*section, "variant") in [key.path for key in _table(schema)]:
        hint = " (variant, such as B/16, gives them all)"
    if len(names) == 1:
        return Mistake((*section, names[0]), place, f"missing{hint}")
    return Mistake(section, place, f"{', '.join(names)} are missing{hint}")


def _choices(schema: type[Schema], section: Path) -> str:
    return " or ".join(key.choice for key in _table(schema) if key.path == (*section, "name"))


_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def _value(problem: Any, schema: type[Schema], path: Path, tree: Tree) -> str:
    """What to say of a value of the wrong type or size."""
    kind, got, key = problem["type"], problem["input"], _key(schema, path, tree.data)
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"must be {words} {problem['ctx'][bound]}, got {shown(got)}"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    got, expected = _at(tree.data, key.path), key.kind
    if kind == "union_tag_invalid":
        expected = _choices(schema, path[:-1] if path[-1] == "name" else path)
    return f"expected {expected}, got {shown(got)}{_advice(got, expected)}"


def _advice(got: Any, expected: str) -> str:
    """What was probably meant by a value."""
    if isinstance(got, str) and expected.startswith("["):
        return f" (write [{got}])"
    if isinstance(got, str) and "true or false" in expected:
        word = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}.get(got.lower())
        return f" (write {word})" if word else ""
    if isinstance(got, str) and "number" in expected:
        number = got.replace("_", "").replace(",", "")
        return f" (write {number})" if number != got and number.isascii() and number.isdigit() else ""
    if isinstance(got, float) and "whole number" in expected and got.is_integer():
        return f" (write {int(got)})"
    if isinstance(got, str):
        near = difflib.get_close_matches(got[:60], expected.split(" or "), 1)
        return f" (did you mean {near[0]}?)" if near else ""
    return f" (write '{got}')" if expected.startswith("text") and type(got) in (int, float) else ""


def shown(value: Any) -> str:
    """A value as it may be written, short and on one line."""
    if isinstance(value, str):
        text = repr(value[:60])
        return text if len(value) <= 60 else f"{text[:-1]}…'"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = json.dumps(value) if isinstance(value, dict | list | tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _name(part: str | int) -> str:
    text = str(part)
    return text if text.isprintable() and len(text) <= 60 and " " not in text else shown(text)
