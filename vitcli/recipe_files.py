"""Recipes as files: where they are, their text, and the shelf of those that come with vitcli."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, NamedTuple

from vitcli import yaml_tree
from vitcli.errors import RecipeError
from vitcli.recipe_errors import shown


def shipped() -> dict[str, Path]:
    """The recipes that come with vitcli, by name: inside an installed package, or beside a checkout's."""
    inside, beside = Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes"
    return {path.stem: path for path in sorted((inside if inside.is_dir() else beside).glob("*.yaml"))}


def find(name_or_path: str | Path) -> Path:
    """The file of a shipped name, or of a path: what has a folder or an ending.

    Raises RecipeError where there is none.
    """
    name, names = str(name_or_path), shipped()
    if name in names:
        return names[name]
    path = Path(name)
    if os.sep in name or path.suffix in (".yaml", ".yml"):
        if "\0" not in name and path.is_file():
            return path
        kind = (
            "no such file" if "\0" in name or not path.exists() else "a folder" if path.is_dir() else "not a plain file"
        )
        hint = (
            f"{path.stem} is a shipped recipe: give the name alone" if path.stem in names else _near(path.stem, names)
        )
        raise RecipeError(f"{shown(name)[1:-1]}: {kind}", hint)
    raise RecipeError(f"no recipe is called {shown(name)}", _near(name, names))


def _near(name: str, names: dict[str, Path]) -> str:
    near = difflib.get_close_matches(name[:60], names, 3, cutoff=0.5)
    return (
        f"did you mean {' or '.join(near)}?" if near else "`vit recipes` lists the shipped ones; a file ends in .yaml"
    )


def text(name_or_path: str | Path) -> str:
    """A recipe's file as it stands, comments included. Raises RecipeError if it is too large or not UTF-8."""
    path = find(name_or_path)
    try:
        with path.open("rb") as file:
            raw = file.read(yaml_tree.MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    if len(raw) > yaml_tree.MAX_BYTES:
        raise RecipeError(f"{path}: more than {yaml_tree.MAX_BYTES // 1024} KiB", "a recipe is about 1 KiB of YAML")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise RecipeError(f"{path}:{line}:{column}: not UTF-8 text", "save the file as UTF-8") from None


class Summary(NamedTuple):
    """A shipped recipe in a line. `finetunes` ones take their model from a checkpoint."""

    name: str
    title: str
    model: str
    data: str
    length: str
    finetunes: bool


def summaries() -> list[Summary]:
    """What is on the shelf."""
    return [_summary(name, path.read_text()) for name, path in shipped().items()]


def _summary(name: str, text: str) -> Summary:
    tree = yaml_tree.read(text, yaml_tree.Place(name, 1, 1)).data
    model, source = tree.get("model", {}), tree.get("data", {}).get("source", "--data")
    finetunes = not {"variant", "width"} & model.keys()
    size = model.get("variant") or f"{model.get('width')} wide, {model.get('depth')} deep"
    length = f"{tree['epochs']} epochs" if "epochs" in tree else f"{tree['steps']} steps"
    title = text.partition("\n")[0].lstrip("# ")
    return Summary(name, title, "--ckpt" if finetunes else size, _source(source), length, finetunes)


def _source(source: Any) -> str:
    return source if isinstance(source, str) else str(source.get("dataset") or source.get("path") or source["name"])


def copy(name: str, to: Path | None = None) -> Path:
    """Write a shipped recipe to a file of your own, NAME.yaml by default. Raises RecipeError rather than overwrite."""
    content = text(name)
    path = Path(f"{Path(name).stem}.yaml") if to is None else to / f"{Path(name).stem}.yaml" if to.is_dir() else to
    try:
        with path.open("x") as file:
            file.write(content)
    except FileExistsError:
        raise RecipeError(f"{path} exists", "give another path; nothing is overwritten") from None
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}", "give a path in a folder that exists") from None
    return path
