"""YAML as plain dicts, lists and scalars that know where they were written.

A recipe is the small, unsurprising part of YAML 1.2: one document of mappings, lists and scalars of the core schema.
Tags, anchors, aliases and merge keys are refused, and so is a scalar that programs read as different numbers. Size,
depth and count are bounded before anything is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from vitcli.errors import RecipeError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 20
MAX_VALUES = 2000

Path = tuple[str | int, ...]


class Place(NamedTuple):
    """Where something was written. Line 0 means that the source has no lines: an option, a checkpoint."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


class Mistake(NamedTuple):
    """What is wrong with one key or value."""

    path: Path
    place: Place
    message: str


@dataclass(frozen=True)
class Tree:
    """Plain data, the places of its keys and values by path, and the mistakes met while reading it."""

    data: Any
    keys: dict[Path, Place] = field(default_factory=dict)
    values: dict[Path, Place] = field(default_factory=dict)
    mistakes: tuple[Mistake, ...] = ()

    def place(self, path: Path, *, key: bool = False) -> Place:
        """Where a value, or its key, is written.

        For a section that only its keys are written of, where the first of them is; for what nobody wrote, where its
        section is.
        """
        places = self.keys if key else self.values
        while path and path not in places and isinstance(path[-1], int):
            path = path[:-1]  # an item of a list that is written as one value
        while path not in places:
            for below, place in self.keys.items():
                if below[: len(path)] == path:
                    return place
            path, places = path[:-1], self.keys
        return places[path]


def plain(data: Any, place: Place, path: Path = ()) -> Tree:
    """Plain data of one origin, set down at `path`."""
    places = dict.fromkeys(_paths(data, ()), place)
    return moved(Tree(data, places, places), path)


def moved(tree: Tree, path: Path) -> Tree:
    """A tree set down at `path`; the sections above it have no place of their own."""
    data = tree.data
    for key in reversed(path):
        data = {key: data}
    keys, values = ({(*path, *at): place for at, place in places.items()} for places in (tree.keys, tree.values))
    return Tree(data, keys, values, tuple(each._replace(path=(*path, *each.path)) for each in tree.mistakes))


def _paths(data: Any, path: Path) -> Iterator[Path]:
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list | tuple) else ()
    for key, value in items:
        yield from _paths(value, (*path, key))


def read(text: str, place: Place) -> Tree:
    """The one YAML document of a text.

    A `place` with a line is the start of a file, and each key gets its own; any other holds for the whole text.
    Raises RecipeError where the text is no such document. What is wrong with single keys and values is collected in
    the tree's `mistakes`, so that they can be told all at once.
    """
    found = re.search(r"^[^#\n\t]*\t", text, re.MULTILINE) or _UNPRINTABLE.search(text)
    if found:
        at, what = found.end() - 1, text[found.end() - 1]
        if place.line:
            place = Place(place.source, text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at))
        message = "a tab; YAML is indented with spaces" if what == "\t" else f"the character U+{ord(what):04X}"
        raise RecipeError(f"{place}: {message}", "save the file as plain UTF-8 text" if what != "\t" else "")
    try:
        return _Reader(text, place).tree()
    except RecipeError:
        raise
    except yaml.MarkedYAMLError as error:
        if place.line and (mark := error.problem_mark):
            place = Place(place.source, mark.line + 1, mark.column + 1)
        hint = "text with special characters needs quotes" if "token" in str(error) else ""
        raise RecipeError(f"{place}: not YAML: {error.problem}", hint) from None
    except (ValueError, OverflowError):  # PyYAML's chr() of an escape such as \\UFFFFFFFF
        raise RecipeError(f"{place}: not YAML: an escape that is no character") from None


# What YAML forbids, and the line ends that editors do not count: next line, line and paragraph separator.
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


class _Loader(yaml.SafeLoader):
    """Parses into events only. Looks ahead no deeper than a recipe may be."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803
        if self.flow_level > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_DEPTH} levels", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)


class _Reader:
    """Builds the tree from PyYAML's events, which come before tags and types have any meaning."""

    def __init__(self, text: str, place: Place):
        self.events = yaml.parse(text, Loader=_Loader)
        self.origin = place
        self.keys: dict[Path, Place] = {}
        self.values: dict[Path, Place] = {}
        self.mistakes: list[Mistake] = []
        self.count = 0

    def tree(self) -> Tree:
        next(self.events)  # the stream
        start = next(self.events)
        if isinstance(start, yaml.StreamEndEvent):
            return Tree(None, {(): self.origin}, {(): self.origin})
        if start.version or start.tags:
            self.stop(start, "directives (%) are not used in a recipe")
        data = self.node(next(self.events), ())
        next(self.events)  # the end of the document
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            self.stop(after, "a second document; a recipe is one")
        return Tree(data, self.keys, self.values, tuple(self.mistakes))

    def node(self, event: Any, path: Path) -> Any:
        """The value that starts with an event."""
        self.count += 1
        if self.count > MAX_VALUES:
            self.stop(event, f"more than {MAX_VALUES} values")
        if len(path) > MAX_DEPTH:
            self.stop(event, f"more than {MAX_DEPTH} levels")
        place = self.at(event)
        block = isinstance(event, yaml.CollectionStartEvent) and not event.flow_style
        self.values[path] = self.keys.setdefault(path, place) if block else place
        self.keys.setdefault(path, place)
        if isinstance(event, yaml.AliasEvent):
            self.wrong(path, event, f"aliases (*{event.anchor}) are not used in a recipe")
            return None
        if event.anchor:
            self.wrong(path, event, f"anchors (&{event.anchor}) are not used in a recipe")
        if event.tag:
            self.wrong(path, event, "tags (!) are not used in a recipe")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, path)
        return self.mapping(path) if isinstance(event, yaml.MappingStartEvent) else self.sequence(path)

    def scalar(self, event: yaml.ScalarEvent, path: Path) -> Any:
        if event.style:
            if any("\ud800" <= letter <= "\udfff" for letter in event.value):
                self.wrong(path, event, "half a character (a surrogate)")
            return event.value
        try:
            return scalar(event.value)
        except ValueError as error:
            self.wrong(path, event, str(error))
            return event.value

    def sequence(self, path: Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, (*path, len(items))))
        return items

    def mapping(self, path: Path) -> dict[str, Any]:
        items: dict[str, Any] = {}
        event: Any
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            place, mistaken = self.at(event), len(self.mistakes)
            name = self.node(event, (*path, ""))
            del self.mistakes[mistaken:]
            text = event.value if isinstance(event, yaml.ScalarEvent) else None
            if text == "<<" and not event.style:
                self.wrong((*path, "<<"), event, "merge keys (<<) are not used in a recipe")
            elif text is None or not isinstance(name, str) or event.tag or event.anchor:
                self.wrong((*path, str(name)), event, "a key is a plain name")
            elif text in items:
                first = self.keys[(*path, text)]
                also = f"; the first is on line {first.line}" if first.line else ""
                self.wrong((*path, text), event, f"given twice{also}")
            else:
                self.keys[(*path, text)] = place
                items[text] = self.node(next(self.events), (*path, text))
                continue
            self.node(next(self.events), (*path, ""))  # read, so that what follows is read too
        return items

    def at(self, event: Any) -> Place:
        mark = event.start_mark
        return Place(self.origin.source, mark.line + 1, mark.column + 1) if self.origin.line else self.origin

    def wrong(self, path: Path, event: Any, message: str) -> None:
        self.mistakes.append(Mistake(path, self.at(event), message))

    def stop(self, event: Any, message: str) -> None:
        raise RecipeError(f"{self.at(event)}: {message}")


_WORDS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False} | dict.fromkeys(
    ("", "~", "null", "Null", "NULL")
)


def scalar(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar is in YAML 1.2's core schema: so 1e-3 is a number, and no and 1:30 are text.

    Raises ValueError for infinity, not-a-number, and whole numbers that YAML 1.1 reads as another number or as text.
    """
    if text in _WORDS:
        return _WORDS[text]
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        raise ValueError(f"{text} is not a number to train with")
    if re.fullmatch(r"[-+]?0[0-9]{1,30}|0o[0-7]{1,30}", text):
        number = int(text, 8) if "o" in text else int(text)
        raise ValueError(f"programs differ over {text}: write {number}, or '{text}' for text")
    if re.fullmatch(r"0x[0-9a-fA-F]{1,30}", text):
        return int(text, 16)
    if re.fullmatch(r"[-+]?[0-9]{1,30}", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        if not math.isfinite(number := float(text)):
            raise ValueError(f"{text[:30]} is too large")
        return number
    return text


class _Dumper(yaml.SafeDumper):
    """Block mappings, lists on one line, no anchors, and quotes wherever `scalar` would not give the text back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def list_(self, items: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)

    def text(self, text: str) -> yaml.Node:
        try:
            same = scalar(text) == text and text.isprintable()
        except ValueError:
            same = False
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if same else '"')


_Dumper.add_representer(list, _Dumper.list_)
_Dumper.add_representer(str, _Dumper.text)


def dump(data: Any) -> str:
    """YAML that `read` gives back as the same data, in the same order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=False)
