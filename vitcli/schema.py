"""The ground of every recipe section, and the rule that a folder is a registry.

Nothing here, and no module that defines a section, imports torch: a wrong recipe is answered at once,
and the shell can complete recipe keys.
"""

import pkgutil
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import ModuleType, NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Self, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


class Schema(BaseModel):
    """A frozen section of a recipe. Unknown keys are mistakes, and types are never converted in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, tree: Any) -> Self:
        """Check a tree of dicts, lists and scalars, as YAML and JSON give it. Raises pydantic's ValidationError."""
        return cls.model_validate(_frozen(tree))


def _frozen(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _frozen(value) for key, value in tree.items()}
    return tuple(_frozen(value) for value in tree) if isinstance(tree, list) else tree


def wrong(key: str, message: str) -> PydanticCustomError:
    """The error for a section's validator to raise when one key does not go with the others."""
    return PydanticCustomError("recipe", "{message}", {"key": key, "message": message})


def only_for(section: Schema, key: str, chosen: str, needs: Sequence[str]) -> None:
    """Refuse a key that was given where what is chosen makes no use of it."""
    if chosen not in needs and getattr(section, key) != type(section).model_fields[key].default:
        raise wrong(key, f"has no effect with {chosen}; it is for {' and '.join(needs)}")


def folder(package: str) -> dict[str, ModuleType]:
    """The modules of a package by name: a new file in the folder is a new entry, with no list to edit.

    A file whose name starts with an underscore is shared by the entries and is none itself.
    """
    names = [found.name for found in pkgutil.iter_modules(import_module(package).__path__)]
    return {name: import_module(f"{package}.{name}") for name in names if not name.startswith("_")}


class Choice(NamedTuple):
    """Stands in the type of a section of which there are several kinds, told apart by their `name`."""

    sections: tuple[type[Schema], ...]


def one_of(package: str, base: type[Schema]) -> Any:
    """The type of a recipe section whose `name` chooses one file of `package`.

    Each file defines one subclass of `base`, whose `name` is the file's. `source: digits` is short for
    `source: {name: digits}`.
    """
    choices: tuple[Any, ...] = tuple(
        value
        for module in folder(package).values()
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    )
    union: Any = Union[choices]
    if len(choices) > 1:
        union = Annotated[union, Field(discriminator="name")]
    names: Any = Literal[tuple(folder(package))]
    spelt = BeforeValidator(
        lambda value: {"name": value} if isinstance(value, str) else value, json_schema_input_type=Union[union, names]
    )
    return Annotated[union, Choice(choices), spelt]


class Key(NamedTuple):
    """One key of a schema. `choice` is the `name` of the kind of section that has it, where there are several."""

    path: tuple[str, ...]
    kind: str
    default: Any
    required: bool
    description: str
    choice: str

    @property
    def dotted(self) -> str:
        """As `--set` takes it."""
        return ".".join(self.path)


def keys(schema: type[Schema], path: tuple[str, ...] = (), choice: str = "") -> Iterator[Key]:
    """Every key of a schema in its order, a section before its own keys."""
    for name, field in schema.model_fields.items():
        at, default = (*path, name), field.get_default(call_default_factory=True, validated_data={})
        yield Key(at, kind(field), default, field.is_required(), field.description or "", choice)
        for section in sections(field):
            kinds = any(isinstance(mark, Choice) for mark in field.metadata)
            yield from keys(section, at, section.model_fields["name"].default if kinds else choice)


def sections(field: FieldInfo) -> tuple[type[Schema], ...]:
    """The schemas that a field's value may be of; none for a plain value."""
    found = [field.annotation, *get_args(field.annotation)]
    return tuple(part for part in found if isinstance(part, type) and issubclass(part, Schema))


def kind(field: FieldInfo) -> str:
    """What may stand in a field, in words: `a number > 0 or null`."""
    if any(isinstance(mark, Choice) for mark in field.metadata):
        return "a name, or a section with one"
    return _kind(field.annotation, field.metadata)


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
_BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", ">="), Lt: ("lt", "<"), Le: ("le", "<=")}


def _kind(annotation: Any, marks: Any) -> str:
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _kind(parts[0], parts[1:])
    bounds = [
        f"{_BOUNDS[type(mark)][1]} {getattr(mark, _BOUNDS[type(mark)][0])}" for mark in marks if type(mark) in _BOUNDS
    ]
    if get_origin(annotation) in (Union, UnionType):
        first, *others = [_kind(part, ()) for part in parts]
        return " or ".join([_bounded(first, bounds), *others])
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, parts))
    if get_origin(annotation) is tuple:
        items = ["..." if part is Ellipsis else _kind(part, ()) for part in parts]
        one = f"{items[0]} or " if any(isinstance(mark, BeforeValidator) for mark in marks) else ""
        return f"{one}[{', '.join(items)}]"
    return _bounded(_WORDS.get(annotation, "a section"), bounds)


def _bounded(words: str, bounds: list[str]) -> str:
    return " ".join([words, " and ".join(bounds)]) if bounds else words
