"""`vit pretrain` and `vit finetune`."""

from __future__ import annotations

import json as jsons
import sys
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from vitcli.commands.console import print_error, tell
from vitcli.commands.options import INPUT, DryRun, Gpus, Json, Profile, Resume, RunFolder, Set
from vitcli.commands.recipes import recipe_names
from vitcli.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from vitcli.checkpoint import Trained
    from vitcli.recipe import Recipe
    from vitcli.train import Outcome


def pretrain(
    recipe: Annotated[
        str | None, Argument(help="Name of a shipped recipe, or a .yaml file.", autocompletion=recipe_names)
    ] = None,
    sets: Set = None,
    run: RunFolder = None,
    resume: Resume = None,
    gpus: Gpus = None,
    profile: Profile = 0,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train a ViT from scratch.

    vit pretrain quickstart

    vit pretrain recipes/b16_in21k.yaml --set data.source.path=/data/imagenet21k --dry-run

    vit pretrain --resume runs/b16_in21k
    """
    from vitcli import recipe as loader

    if resume:
        _refuse_with_resume(recipe=recipe, set=sets, run=run, dry_run=dry_run)
        _resume(resume, json, gpus, profile)
        return
    if recipe is None:
        raise RecipeError("no recipe given", "vit pretrain quickstart, or `vit recipes` for the others")
    loaded = loader.load(recipe, sets or ())
    if dry_run:
        _print_plan(loaded, json, gpus or 1)
    else:
        _begin(loaded, recipe, run, json, gpus, profile)


def finetune(
    ckpt: Annotated[
        Path | None, Option(help="Weights to start from: a run folder, .npz, .safetensors or .pth.")
    ] = None,
    data: Annotated[
        str | None, Option(help="Class folders, shards or a table; or digits.", rich_help_panel=INPUT)
    ] = None,
    classes: Annotated[
        int | None, Option(min=1, help="Number of classes, checked against the data.", rich_help_panel=INPUT)
    ] = None,
    res: Annotated[int | None, Option(min=1, help="Resolution in pixels.", rich_help_panel=INPUT)] = None,
    keep_pre_logits: Annotated[
        bool, Option("--keep-pre-logits", help="Keep the dense + tanh layer before the old head.")
    ] = False,
    recipe: Annotated[
        str | None,
        Option(help="Name of a shipped recipe, or a .yaml file.", show_default="finetune", autocompletion=recipe_names),
    ] = None,
    sets: Set = None,
    run: RunFolder = None,
    resume: Resume = None,
    gpus: Gpus = None,
    profile: Profile = 0,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train on from a checkpoint: new zero head, position table stretched to the resolution.

    vit finetune --ckpt ViT-B_16.npz --data flowers/ --classes 102 --res 384

    vit finetune --ckpt runs/b16_in21k --recipe finetune_cifar10 --set optim.lr=0.01
    """
    from vitcli import recipe as loader
    from vitcli.data.sources import described

    if resume:
        given = {"ckpt": ckpt, "data": data, "classes": classes, "res": res, "set": sets, "run": run}
        _refuse_with_resume(**given, keep_pre_logits=keep_pre_logits, recipe=recipe, dry_run=dry_run)
        _resume(resume, json, gpus, profile)
        return
    if ckpt is None:
        raise RecipeError("no --ckpt given", "vit finetune --ckpt WEIGHTS --data FOLDER; without weights: vit pretrain")
    recipe = recipe or "finetune"
    loader.read(recipe)  # a broken recipe is told before the weights are read
    from vitcli import checkpoint

    trained = checkpoint.load(ckpt)
    options: list[tuple[str, str, Any]] = []
    if data is not None:
        options.append(("--data", "data.source", described(data)))
    if classes is not None:
        options.append(("--classes", "data.classes", classes))
    if res is not None:
        options += [("--res", "data.res", res), ("--res", "data.resize", None)]
    layer = trained.config.representation_size if keep_pre_logits else None
    if keep_pre_logits and layer is None:
        raise CheckpointError(f"{trained.origin} has no pre_logits", "leave out --keep-pre-logits")
    under = {
        "model": trained.config.model_dump(mode="json") | {"representation_size": layer, "head_bias": 0.0},
        "data": {"mean": list(trained.preprocessing.mean), "std": list(trained.preprocessing.std)},
    }
    loaded = loader.load(recipe, sets or (), under=under, origin=str(ckpt), options=options)
    if dry_run:
        _print_plan(loaded, json, gpus or 1)
    else:
        _begin(loaded, recipe, run, json, gpus, profile, ckpt, trained)


def _begin(
    recipe: Recipe,
    name: str,
    run: Path | None,
    json: bool,
    gpus: int | None,
    profile: int,
    ckpt: Path | None = None,
    trained: Trained | None = None,
) -> None:
    if gpus:
        _launch(gpus)
    from vitcli.commands import launch  # loads torch, which a wrong recipe need not wait for

    _finish(launch.begin(recipe, name, run, ckpt, trained, profile), json)


def _resume(run: Path, json: bool, gpus: int | None, profile: int) -> None:
    from vitcli.commands import launch

    recipe = launch.recipe_of(run)
    if gpus:
        _launch(gpus)
    _finish(launch.resume(run, recipe, profile), json)


def _launch(gpus: int) -> None:
    """Run this command again, in a process for each GPU, and end as they do."""
    from vitcli import processes

    words = [word for word in sys.argv[1:] if not word.startswith("--gpus=")]
    if "--gpus" in words:
        at = words.index("--gpus")
        del words[at : at + 2]
    raise typer.Exit(processes.launch(words, processes.visible(gpus), tell))


def _finish(outcome: Outcome, json: bool) -> None:
    """Say how training ended, and what to type next."""
    from vitcli.report import tables

    if not outcome.first:
        raise typer.Exit(128 + outcome.signal if outcome.signal else 0)
    if outcome.signal:
        print_error(f"stopped by signal {outcome.signal} after step {outcome.step} of {outcome.steps}, which is saved")
        tell(f"hint: vit pretrain --resume {quote(str(outcome.run))}")
        raise typer.Exit(128 + outcome.signal)
    facts = {**asdict(outcome), "run": str(outcome.run)}
    print(jsons.dumps(facts) if json else "\n".join(tables.outcome_lines(outcome)))


def _refuse_with_resume(**given: object) -> None:
    for name, value in given.items():
        if value:
            shown = "a recipe" if name == "recipe" else f"--{name.replace('_', '-')}"
            raise RecipeError(f"{shown} does not go with --resume: a run keeps its recipe", "start a new run instead")


def _print_plan(recipe: Recipe, json: bool, processes: int) -> None:
    from vitcli.plan import plan
    from vitcli.processes import Processes
    from vitcli.report import tables

    made = plan(recipe, Processes(count=processes))
    print(jsons.dumps(asdict(made)) if json else "\n".join(tables.plan_lines(made, recipe)))
