"""A recipe: everything that decides a training run, as one typed and frozen value.

A recipe is laid together from layers: what a checkpoint brings, the file, the command's options, and `--set`. Each is
laid over the one before: sections are merged key by key, anything else is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, PositiveInt, ValidationError, model_validator
from pydantic.json_schema import GenerateJsonSchema

from vitcli import recipe_errors, recipe_files, schema, yaml_tree
from vitcli.data import DataConfig
from vitcli.errors import DataError, RecipeError
from vitcli.model import ViTConfig
from vitcli.objectives import AnyObjective
from vitcli.objectives.classify import Classify
from vitcli.optim import OptimConfig
from vitcli.runtime import RuntimeConfig
from vitcli.schema import Schema, wrong
from vitcli.trackers import TrackerName
from vitcli.yaml_tree import Place, Tree


class Length(NamedTuple):
    """Updates in an epoch, which goes without its last partial batch; in all; and in the warm-up."""

    per_epoch: int
    steps: int
    warmup: int


class Recipe(Schema):
    """The sum of its sections. Length, batch and rhythm of a run stand at the top."""

    model: ViTConfig
    data: DataConfig
    objective: AnyObjective = Classify.parse({})  # pyright: ignore[reportInvalidTypeForm]
    optim: OptimConfig = OptimConfig.parse({})
    runtime: RuntimeConfig = RuntimeConfig.parse({})

    epochs: float | None = Field(None, gt=0, description="length of training; or `steps`")
    steps: PositiveInt | None = Field(None, description="length of training in updates")
    batch: PositiveInt = Field(256, description="images in an update, whatever the device holds at a time")
    seed: int = Field(0, ge=0, lt=2**63)

    log_every: PositiveInt = Field(50, description="steps between lines of metrics.jsonl")
    eval_every: PositiveInt | None = Field(None, description="steps between evaluations; null: each epoch")
    save_every: PositiveInt | None = Field(None, description="steps between checkpoints; null: with each evaluation")
    keep_last: PositiveInt = Field(2, description="checkpoints to keep")
    keep_every: PositiveInt | None = Field(None, description="also keep the checkpoints of every so many steps")
    track: tuple[TrackerName, ...] = Field(  # pyright: ignore[reportInvalidTypeForm]
        (), description="where else the lines of metrics.jsonl go"
    )

    def length(self, images: int) -> Length:
        """How long training on so many images is. Raises DataError if they do not fill a batch."""
        if self.batch > images:
            message = f"a batch of {self.batch} is more than the {images} training images"
            raise DataError(message, f"take at most --set batch={images}")
        per_epoch = images // self.batch
        steps = self.steps or max(1, round((self.epochs or 0) * per_epoch))
        return Length(per_epoch, steps, self.optim.warmup(per_epoch))

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if (self.epochs is None) == (self.steps is None):
            raise wrong("epochs", "give epochs or steps, one of them")
        try:
            self.model.grid(self.data.res)
        except ValueError as error:
            raise wrong("data.res", str(error)) from None
        for key, length, limit in (
            ("warmup_steps", self.optim.warmup_steps, self.steps),
            ("warmup_epochs", self.optim.warmup_epochs, self.epochs),
            ("cooldown_steps", self.optim.cooldown_steps, self.steps),
        ):
            if limit and (length or 0) > limit:
                raise wrong(f"optim.{key}", f"{length} is more than {key.split('_')[1]}: {limit}")
        if (self.runtime.micro_batch or 0) > self.batch:
            raise wrong("runtime.micro_batch", f"{self.runtime.micro_batch} is more than batch: {self.batch}")
        if self.optim.name == "muon" and self.runtime.shard == "fsdp":
            raise wrong("runtime.shard", "fsdp cuts the matrices that optim.name: muon needs whole; ddp goes with it")
        return self


# A key that a layer gives takes these keys of the same section away from the layers under it, which it contradicts.
_REPLACES = {
    ("model", "variant"): ("width", "depth", "mlp_dim", "heads", "patch", "stem"),
    ("epochs",): ("steps",),
    ("steps",): ("epochs",),
    ("optim", "warmup_steps"): ("warmup_epochs",),
    ("optim", "warmup_epochs"): ("warmup_steps",),
}
_CHOICES = {key.path[:-1] for key in schema.keys(Recipe) if key.choice}


def load(
    name_or_path: str | Path,
    sets: Iterable[str] = (),
    *,
    under: Mapping[str, Any] | None = None,
    origin: str = "checkpoint",
    options: Iterable[tuple[str, str, Any]] = (),
) -> Recipe:
    """The recipe of a file, or of a shipped name, with everything that the command line lays under and over it.

    `under` is a tree beneath the recipe, which `origin` brings: for fine-tuning, the checkpoint's `model`. `options`
    are other flags of the command as (flag, key, value): ("--res", "data.res", 384). `sets` are `key=value`, the value
    in YAML; they are laid on top, and the last of two for one key holds. Setting `model.variant` replaces the sizes
    that the recipe spells out; setting `steps` replaces `epochs`, and so on.

    Raises RecipeError with one line for each mistake.
    """
    tree = read(name_or_path)
    if under is not None:
        tree = _over(tree, yaml_tree.plain(dict(under), Place(origin)))
    flags = [yaml_tree.plain(value, Place(flag), tuple(key.split("."))) for flag, key, value in options]
    for layer in (flags, [_set(text) for text in sets]):
        tree = _over(_together(layer), tree)
    return check(tree)


def check(tree: Tree) -> Recipe:
    """The recipe that a tree spells. Raises RecipeError with one line for each mistake."""
    found = list(tree.mistakes)
    try:
        recipe = Recipe.parse(tree.data)
    except ValidationError as error:
        known = {mistake.path for mistake in found}
        explained = recipe_errors.explain(error, Recipe, tree)
        found += [new for new in explained if not any(new.path[:n] in known for n in range(len(new.path) + 1))]
        recipe = None
    if recipe is None or found:
        lacking = {mistake.path for mistake in found if "missing" in mistake.message}
        raise RecipeError(recipe_errors.lines(found), "; ".join(_HINTS[path] for path in _HINTS if path in lacking))
    return recipe


_HINTS = {
    ("model",): "a recipe for fine-tuning takes its model from --ckpt",
    ("data", "source"): "give the images by --data, or as data.source",
}


def read(name_or_path: str | Path) -> Tree:
    """A recipe's YAML, before it is checked. Raises RecipeError where there is none."""
    path = recipe_files.find(name_or_path)
    tree = yaml_tree.read(recipe_files.text(path), Place(path.as_posix(), 1, 1))
    if not isinstance(tree.data, dict | None):
        raise RecipeError(f"{tree.place(())}: expected keys and values, got {recipe_errors.shown(tree.data)}")
    return Tree(tree.data or {}, tree.keys, tree.values, tree.mistakes)


def _set(text: str) -> Tree:
    """One `key=value` of --set."""
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise RecipeError(f"--set {recipe_errors.shown(text)}: expected key=value", "as in --set optim.lr=3e-4")
    place = Place(f"--set {recipe_errors.shown('.'.join(path))[1:-1]}")
    if len(value) > yaml_tree.MAX_BYTES or len(path) > yaml_tree.MAX_DEPTH:
        raise RecipeError(f"{place}: too long")
    return yaml_tree.moved(yaml_tree.read(value, place), path)


def _together(layer: list[Tree]) -> Tree:
    """The trees of one layer as one, the last of two for one key winning."""
    whole = Tree({})
    for tree in layer:
        whole = _over(tree, whole, replaces={})
    return whole


def _over(upper: Tree, lower: Tree, replaces: Mapping[tuple[str, ...], tuple[str, ...]] = _REPLACES) -> Tree:
    """One layer laid over another."""
    data = _merge(upper.data, lower.data, (), replaces)
    return Tree(data, lower.keys | upper.keys, lower.values | upper.values, lower.mistakes + upper.mistakes)


def _merge(upper: Any, lower: Any, path: tuple[str, ...], replaces: Mapping[tuple[str, ...], tuple[str, ...]]) -> Any:
    if path in _CHOICES:
        upper, lower = ({"name": part} if isinstance(part, str) else part for part in (upper, lower))
    if not isinstance(upper, dict) or not isinstance(lower, dict):
        return upper
    if path in _CHOICES and {"name"} <= upper.keys() & lower.keys() and upper["name"] != lower["name"]:
        return upper  # a section of another kind shares nothing with this one
    gone = {name for key in upper if upper[key] is not None for name in replaces.get((*path, key), ())}
    merged = {key: value for key, value in lower.items() if key not in gone}
    for key, value in upper.items():
        merged[key] = _merge(value, merged[key], (*path, key), replaces) if key in merged else value
    return merged


def dump(recipe: Recipe) -> str:
    """YAML with every default spelt out, in the schema's order; it loads back as the same recipe."""
    return yaml_tree.dump(recipe.model_dump(mode="json"))


def keys() -> list[schema.Key]:
    """Every key of a recipe, with its type, default and description."""
    return list(schema.keys(Recipe))


def json_schema() -> dict[str, Any]:
    """A JSON schema of recipes, for editors."""
    described = Recipe.model_json_schema(schema_generator=_Described)
    for part in ("ViTConfig", "DataConfig"):  # `variant` and `pool`, a checkpoint or --data bring what is required
        described["$defs"][part].pop("required")
    described["required"].remove("model")
    return {"$schema": GenerateJsonSchema.schema_dialect, **described}


class _Described(GenerateJsonSchema):
    """Tells editors that one number may stand for a list of equal ones, as `Size` and `PerChannel` take it."""

    def function_before_schema(self, schema: Any) -> dict[str, Any]:
        described = super().function_before_schema(schema)
        items = described.get("prefixItems")
        return {"anyOf": [items[0], described]} if items else described
