"""The ground of every recipe section, and the rule that a folder is a registry.

Nothing here, and no module that defines a section, imports torch: a wrong recipe is answered at once,
and the shell can complete recipe keys.
"""

import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, Self, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
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


def folder(package: str) -> dict[str, ModuleType]:
    """The modules of a package by name: a new file in the folder is a new entry, with no list to edit.

    A file whose name starts with an underscore is shared by the entries and is none itself.
    """
    names = [found.name for found in pkgutil.iter_modules(import_module(package).__path__)]
    return {name: import_module(f"{package}.{name}") for name in names if not name.startswith("_")}


def one_of(package: str, base: type[Schema]) -> Any:
    """The type of a recipe section whose `name` chooses one file of `package`.

    Each file defines one subclass of `base`, whose `name` is the file's. `source: digits` is short for
    `source: {name: digits}`.
    """
    choices = [
        value
        for module in folder(package).values()
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    union = Annotated[Union[tuple(choices)], Field(discriminator="name")] if len(choices) > 1 else choices[0]
    return Annotated[union, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)]
