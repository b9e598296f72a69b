"""Checkpoints: what a run saves, and what every command reads.

A checkpoint is a sealed folder (storage.py) that describes itself: config.json holds the architecture, the class
names, the preprocessing and the recipe; model.safetensors the weights to use; in a run's checkpoints/,
training.safetensors and state.json hold the rest of what training needs to go on to the same bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from vitcli import __version__, storage, weights
from vitcli.data import Preprocessing
from vitcli.data.imagenet import WNIDS, as_ids, in_words
from vitcli.errors import CheckpointError
from vitcli.model import ViTConfig
from vitcli.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from vitcli.model.vit import ViT


@dataclass(frozen=True)
class Trained:
    """A model that can be used: on the CPU, in fp32, in evaluation mode.

    `classes` are names in the order of the logits, () where there is no head or its outputs are no classes. Where an
    image may be of several classes, `thresholds` are the probabilities from which on each applies; None says that it is
    of one. `recipe` is None for a foreign file. `origin` says in a few words where it came from.
    """

    model: ViT
    config: ViTConfig
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    origin: str
    recipe: Recipe | None = None
    thresholds: tuple[float, ...] | None = None


def must_exist(path: Path) -> None:
    """Raises CheckpointError where nothing is."""
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist", "--ckpt takes a run folder, a checkpoint folder or a file of weights"
        )


def load(path: Path) -> Trained:
    """The model of a run folder, of one of its checkpoints, or of a foreign file.

    Of a run, the best weights, or the newest where nothing was scored. Raises CheckpointError for a missing, damaged
    or unknown file.
    """
    must_exist(path)
    if not (path.is_file() or path.is_dir()):
        raise CheckpointError(f"{path} is a device or a pipe, not a file")
    own = _own_folder(path)
    return _load_own(own) if own else _load_foreign(path)


def recipe_of(path: Path) -> Recipe | None:
    """The recipe of a run folder or of one of its checkpoints, without the weights; None for a foreign file."""
    own = _own_folder(path)
    return _facts_of(own)[1] if own else None


def held_out_of(path: Path) -> str | None:
    """The fingerprint of what a run held out when it began; None where that is not known."""
    own = _own_folder(path)
    for run in own.parents[:2] if own else ():  # of best/ and last/, and of checkpoints/step_N/
        if (run / "env.json").is_file():
            return json.loads((run / "env.json").read_text()).get("val")
    return None


def save_model(
    folder: Path,
    state: dict[str, Tensor],
    recipe: Recipe,
    classes: tuple[str, ...],
    step: int,
    thresholds: Sequence[float] | None = None,
) -> None:
    """Write best/ or last/: a model to use, from the whole of its state; transformers opens it if it has its like."""
    from vitcli.weights import huggingface

    def write(place: Path) -> None:
        pixels = recipe.data.preprocessing.model_dump(mode="json")
        words = in_words(classes)
        foreign = weights.Foreign(
            format="huggingface",
            config=recipe.model,
            state=state,
            head_classes=len(classes),
            image_size=recipe.data.res,
            preprocessing=pixels,
            classes=words,
            thresholds=None if thresholds is None else tuple(thresholds),
        )
        try:
            huggingface.write(foreign, place)
        except CheckpointError as error:
            write_model(place, state, recipe, classes, step, thresholds)
            (place / "README.md").write_text(f"A model for `vit`, not for transformers: {error}.\n")
        else:
            config = json.loads((place / "config.json").read_text())
            config["vitcli"] |= _facts(recipe, classes, step, thresholds)
            (place / "config.json").write_text(json.dumps(config, indent=1))

    storage.write_folder(folder, write)


def saved(checkpoints: Path) -> dict[Path, int]:
    """The checkpoints of a run and their steps, the oldest first; a copy beside them is none."""
    found = [folder for folder in sorted(checkpoints.glob("step_*")) if re.fullmatch(r"step_\d+", folder.name)]
    return {folder: int(folder.name.removeprefix("step_")) for folder in found}


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run whose every byte is as written, and why newer ones were passed over."""
    passed = []
    for folder in reversed(saved(checkpoints)):
        try:
            storage.verify(folder)
        except CheckpointError as error:
            passed.append(str(error))
        else:
            return folder, passed
    return None, passed


def write_model(
    place: Path,
    state: dict[str, Tensor],
    recipe: Recipe,
    classes: tuple[str, ...],
    step: int,
    thresholds: Sequence[float] | None,
) -> None:
    """The files of a model that is ours alone: config.json, preprocessor_config.json and model.safetensors."""
    from safetensors.torch import save_file

    (place / "config.json").write_text(json.dumps(_facts(recipe, classes, step, thresholds), indent=1))
    (place / "preprocessor_config.json").write_text(recipe.data.preprocessing.model_dump_json(indent=1))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, place / "model.safetensors")


def _facts(recipe: Recipe, classes: tuple[str, ...], step: int, thresholds: Sequence[float] | None) -> dict[str, Any]:
    """What a config.json says of the run: at its top, or under "vitcli" where transformers has the top."""
    return {
        "format": "vitcli",
        "version": __version__,
        "step": step,
        "classes": classes,
        "thresholds": thresholds,
        "recipe": recipe.model_dump(),
    }


def _own_folder(path: Path) -> Path | None:
    """The folder that a run or one of its checkpoints, or the weights in it, is read from; None for a foreign file."""
    folder = path.parent if path.name == "model.safetensors" else path
    if (folder / storage.MANIFEST).exists():
        return folder
    return None if path.is_file() or weights.is_folder(path) else _usable(path)


def _usable(path: Path) -> Path:
    """The folder to read in a run folder, or `path` itself if it is one."""
    if (path / "config.json").exists():
        return path
    for folder in (path / "best", path / "last"):
        if folder.is_dir():
            return folder
    folder, passed = newest(path / "checkpoints")
    if folder is None:
        raise CheckpointError(
            "; ".join(passed) or f"{path} holds no checkpoint", "give a run folder or a file of weights"
        )
    return folder


def _load_own(folder: Path) -> Trained:
    from safetensors.torch import load_file

    storage.verify(folder)
    facts, recipe, at_top = _facts_of(folder)
    try:
        classes = tuple(facts["classes"])
        thresholds = checked_thresholds(facts.get("thresholds"), len(classes))  # older files do not say
        step = int(facts["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise _not_ours(folder, error) from None
    if at_top:
        state = load_file(folder / "model.safetensors") | _averaged(folder)
        for name, tensor in state.items():
            if tensor.is_floating_point() and not weights.is_finite(tensor):
                raise CheckpointError(f"{folder}: {name} holds NaN or infinity")
    else:
        state = weights.load(folder).state
        if recipe.model.posemb != "learned":  # transformers has a fixed table among the weights
            del state["pos_embed"]
    return Trained(
        model=_build(recipe.model, len(classes), recipe.data.res, state, str(folder)),
        config=recipe.model,
        classes=classes,
        image_size=recipe.data.res,
        preprocessing=recipe.data.preprocessing,
        origin=f"{folder} (step {step})",
        recipe=recipe,
        thresholds=thresholds,
    )


def _facts_of(folder: Path) -> tuple[dict[str, Any], Recipe, bool]:
    """What a config.json says of the run, its recipe, and whether it stands at its top, not under transformers' own."""
    try:
        config = json.loads((folder / "config.json").read_text())
        facts = config.get("vitcli", config)
        return facts, Recipe.parse(facts["recipe"]), facts is config
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ValidationError) as error:
        raise _not_ours(folder, error) from None


def _not_ours(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder / 'config.json'} is not a vitcli checkpoint's: {error}".splitlines()[0])


def checked_thresholds(found: Any, classes: int) -> tuple[float, ...] | None:
    """Thresholds as a file holds them, a list or None, for so many classes. Raises ValueError."""
    if found is None:
        return None
    thresholds = TypeAdapter(tuple[Annotated[float, Field(ge=0, le=1)], ...]).validate_python(found)
    if len(thresholds) != classes:
        raise ValueError(f"{len(thresholds)} thresholds for {classes} classes")
    return thresholds


def _averaged(folder: Path) -> dict[str, Tensor]:
    """The averaged weights in a checkpoint to resume from; best/ and last/ hold them already."""
    from safetensors import safe_open

    if not (folder / "training.safetensors").exists():
        return {}
    with safe_open(folder / "training.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("average/model.")]  # noqa: SIM118 (no mapping)
        return {name.removeprefix("average/model."): file.get_tensor(name) for name in names}


def _load_foreign(path: Path) -> Trained:
    foreign = weights.load(path)
    count, classes = foreign.head_classes, foreign.classes
    if classes is None:
        classes = WNIDS if count == len(WNIDS) else tuple(map(str, range(count)))
    classes = as_ids(classes)
    try:
        preprocessing = Preprocessing.parse(foreign.preprocessing)
    except ValidationError as error:
        raise CheckpointError(f"{path}: its preprocessing cannot be used: {error.errors()[0]['msg']}") from error
    if preprocessing.res != foreign.image_size:
        shown = " but ".join(f"{height}x{width}" for height, width in (preprocessing.res, foreign.image_size))
        raise CheckpointError(f"{path}: its preprocessing makes images of {shown} is what the model takes")
    return Trained(
        model=_build(foreign.config, count, foreign.image_size, foreign.state, str(path)),
        config=foreign.config,
        classes=classes,
        image_size=foreign.image_size,
        preprocessing=preprocessing,
        origin=f"{path} ({foreign.format})",
        thresholds=foreign.thresholds,
    )


def _build(config: ViTConfig, classes: int, image_size: tuple[int, int], state: dict[str, Tensor], origin: str) -> ViT:
    """A model in evaluation mode whose weights are `state` itself, not a copy; no other is ever made."""
    import torch

    with torch.device("meta"):
        model = config.build(classes, image_size)
    check_fit(model.state_dict(), state, origin)
    model.load_state_dict(state, assign=True)
    model.fix_positions()
    return model.eval()


def check_fit(expected: dict[str, Tensor], found: dict[str, Tensor], origin: str) -> None:
    """Names and shapes, before anything is loaded."""
    for problem, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            raise CheckpointError(f"{origin}: {len(names)} {problem} tensors, the first {min(names)}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{origin}: {name} has shape {list(tensor.shape)}, expected {list(expected[name].shape)}"
            )
