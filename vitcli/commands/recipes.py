"""`vit recipes`: look at the shipped recipes, and at what a recipe may hold. None of it loads torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from vitcli import recipe_files

recipes = typer.Typer(help="The recipes that come with vitcli.", invoke_without_command=True)


def recipe_names(incomplete: str) -> list[str]:
    """For the shell's completion."""
    return [name for name in recipe_files.shipped() if name.startswith(incomplete)]


@recipes.callback()
def _recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_recipes()


@recipes.command("list")
def list_recipes() -> None:
    """The shipped recipes, a line each."""
    for summary in recipe_files.summaries():
        print(f"{summary.name:<22} {summary.model:<12} {summary.data:<18} {summary.length:<12} {summary.title}")


RecipeName = Annotated[str, Argument(help="Name of a shipped recipe.", autocompletion=recipe_names)]


@recipes.command()
def show(name: RecipeName) -> None:
    """Print a recipe."""
    print(recipe_files.text(name), end="")


@recipes.command()
def copy(
    name: RecipeName, to: Annotated[Path | None, Argument(help="File or folder. [dim]NAME.yaml[/]")] = None
) -> None:
    """Write a recipe to a file of your own."""
    print(recipe_files.copy(name, to))


@recipes.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from vitcli import recipe

    print(json.dumps(recipe.json_schema(), indent=1))


@recipes.command("keys")
def list_keys() -> None:
    """Every key of a recipe, with its type, default and meaning."""
    from vitcli.recipe import keys
    from vitcli.recipe_errors import shown

    for key in keys():
        default = key.default if isinstance(key.default, str) else shown(key.default)
        default = "required" if key.required else "" if key.kind == "a section" else default
        print(f"{key.dotted:<30} {key.kind:<40} {default:<20} {key.description}")
