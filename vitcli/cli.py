"""The commands: read, call, print.

stdout holds the answer only; all else goes to stderr. torch is loaded inside a command, not with this module.
"""

from __future__ import annotations

import json as jsons
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from vitcli import __version__
from vitcli.commands import console
from vitcli.commands.bench import bench
from vitcli.commands.console import answer, err, out, print_error
from vitcli.commands.data import data_commands
from vitcli.commands.export import export
from vitcli.commands.recipes import recipe_names, recipes
from vitcli.commands.runs import runs
from vitcli.errors import CheckpointError, DataError, RecipeError

if TYPE_CHECKING:
    from vitcli.data.sources import Dataset
    from vitcli.recipe import Recipe
    from vitcli.train import Outcome

app = typer.Typer(
    help="Plain Vision Transformers: pretrain, fine-tune, evaluate, export, predict.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(recipes, name="recipes", rich_help_panel="Look")
app.add_typer(data_commands, name="data", rich_help_panel="Look")
app.add_typer(runs, name="runs", rich_help_panel="Look")
app.add_typer(bench, name="bench", rich_help_panel="Look")

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Annotated[
    Literal["fp32", "bf16"], Option(help="Of a checkpoint: fp32 is the reference, bf16 the fastest on a GPU.")
]
Provider = Annotated[Literal["auto", "cuda", "tensorrt", "cpu"], Option(help="ONNX Runtime's, for .onnx files.")]
RESULT, TRAIN, INPUT = "Result", "Training", "Input"


def _recipe_keys(incomplete: str) -> list[str]:
    from vitcli.recipe import keys

    return [f"{key.dotted}=" for key in keys() if key.dotted.startswith(incomplete)]


Set = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=_recipe_keys,
        help="Override a key of the recipe, as optim.lr=3e-4.",
    ),
]
RunFolder = Annotated[
    Path | None, Option("--run", help="Folder of the run. [dim]runs/RECIPE[/]", rich_help_panel=RESULT)
]
Resume = Annotated[
    Path | None, Option(metavar="RUN", help="Continue the run in this folder, to the same bits.", rich_help_panel=TRAIN)
]
Gpus = Annotated[
    int | None, Option(min=1, help="Train on so many GPUs of this machine, a process each.", rich_help_panel=TRAIN)
]
Profile = Annotated[
    int,
    Option(
        metavar="N",
        min=0,
        help="Record N updates: Chrome trace and slowest kernels in the run's profile/.",
        rich_help_panel=TRAIN,
    ),
]
DryRun = Annotated[bool, Option("--dry-run", help="Print size, cost and time of the training, and train nothing.")]
Json = Annotated[bool, Option("--json", help="One JSON object on stdout.", rich_help_panel=RESULT)]
Checkpoint = Annotated[
    Path | None,
    Option("--ckpt", help="Run folder, checkpoint, .npz, .safetensors, .pth or .onnx. [dim]The newest finished run[/]"),
]


@app.callback(invoke_without_command=True)
def _vit(version: Annotated[bool, Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"vitcli {__version__}")
        raise typer.Exit


@app.command(rich_help_panel="Train")
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
        _refuse_with_resume(recipe=recipe, set=sets, run=run)
        _resume(resume, json, gpus, profile)
        return
    if recipe is None:
        raise RecipeError("no recipe given", "vit pretrain quickstart, or `vit recipes` for the others")
    loaded = loader.load(recipe, sets or ())
    if dry_run:
        _print_plan(loaded, json, gpus or 1)
        return
    if gpus:
        _launch(gpus)
    from vitcli.commands import launch  # loads torch, which a wrong recipe need not wait for

    _finish(launch.begin(loaded, recipe, run, profile=profile), json)


@app.command(rich_help_panel="Train")
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
        str, Option(help="Name of a shipped recipe, or a .yaml file.", autocompletion=recipe_names)
    ] = "finetune",
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
        _refuse_with_resume(**given, keep_pre_logits=keep_pre_logits)
        _resume(resume, json, gpus, profile)
        return
    if ckpt is None:
        raise RecipeError("no --ckpt given", "vit finetune --ckpt WEIGHTS --data FOLDER; without weights: vit pretrain")
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
        return
    if gpus:
        _launch(gpus)
    from vitcli.commands import launch

    _finish(launch.begin(loaded, recipe, run, ckpt, trained, profile), json)


@app.command(name="eval", rich_help_panel="Use")
def evaluate(
    ckpt: Checkpoint = None,
    data: Annotated[
        str | None,
        Option(help="Class folders, shards or a table; or digits. [dim]The run's[/]", rich_help_panel=INPUT),
    ] = None,
    separator: Annotated[
        str | None, Option(help="What stands between several labels of a table's image.", rich_help_panel=INPUT)
    ] = None,
    batch: Annotated[int, Option(min=1)] = 64,
    device: Device = "auto",
    precision: Precision = "fp32",
    provider: Provider = "auto",
    allow_bad: Annotated[
        bool, Option("--allow-bad", help="Leave unreadable images out of the score.", rich_help_panel=INPUT)
    ] = False,
    min_top1: Annotated[
        float | None, Option(min=0, max=1, help="Exit 3 below this share.", rich_help_panel=RESULT)
    ] = None,
    min_map: Annotated[
        float | None,
        Option(min=0, max=1, help="Exit 3 below this mAP, of several labels an image.", rich_help_panel=RESULT),
    ] = None,
    json: Json = False,
) -> None:
    """Score a model on labelled images; classes meet by name.

    vit eval

    vit eval --ckpt ViT-B_16.npz --data imagenet/val --json
    """
    from vitcli.inference import open_predictor
    from vitcli.report import tables
    from vitcli.scoring import score

    ckpt = ckpt or _newest()
    predictor = open_predictor(ckpt, device=device, provider=provider, precision=precision)
    dataset = _images_to_score(ckpt, data, separator)
    if predictor.thresholds is not None and not dataset.multi_label:
        warning = "warning: the model finds several classes in an image, and these images have one label each"
        err.print(f"{warning}; of a table, --separator says otherwise", highlight=False, soft_wrap=True)
    if min_top1 is not None and dataset.multi_label:
        raise RecipeError("--min-top1 is for one label an image, and these have several", "take --min-map")
    if min_map is not None and not dataset.multi_label:
        raise RecipeError("--min-map is for several labels an image, and these have one", "take --min-top1")
    for note in dataset.notes:
        err.print(note, highlight=False, markup=False, soft_wrap=True)
    with err.status(f"scoring {len(dataset):,} images"):
        scores = score(predictor, dataset, batch=batch, workers=None, allow_bad=allow_bad)
    answer(
        json,
        lambda: tables.scores_json(scores, str(ckpt)),
        lambda: tables.scores_table(scores),
        lambda: tables.scores_lines(scores),
    )
    key, measure, value = scores.headline
    least = min_map if min_top1 is None else min_top1
    if least is not None and value < least:
        raise DataError(f"{measure} {value:.2%} is below --min-{key} {least:.2%}")


app.command(rich_help_panel="Use")(export)


@app.command(rich_help_panel="Use")
def predict(
    paths: Annotated[
        list[str], Argument(metavar="PATH...", help="Images, folders, patterns; - reads a list from stdin.")
    ],
    ckpt: Checkpoint = None,
    top: Annotated[int, Option(min=1, help="Classes for each image.", rich_help_panel=RESULT)] = 5,
    batch: Annotated[int, Option(min=1)] = 32,
    device: Device = "auto",
    precision: Precision = "fp32",
    provider: Provider = "auto",
    json: Json = False,
    jsonl: Annotated[bool, Option("--jsonl", help="A JSON object for each image.", rich_help_panel=RESULT)] = False,
    csv: Annotated[bool, Option("--csv", help="CSV, a line for each class.", rich_help_panel=RESULT)] = False,
) -> None:
    """Name what is in images.

    vit predict img.jpg

    vit predict photos/ --ckpt model.onnx --top 1 --csv
    """
    from vitcli import inference
    from vitcli.report import tables

    if json + jsonl + csv > 1:
        raise RecipeError("--json, --jsonl and --csv exclude one another")
    images = inference.find_images(paths)
    ckpt = ckpt or _newest()
    predictor = inference.open_predictor(ckpt, device=device, provider=provider, precision=precision)
    failed = 0

    def counted() -> Any:
        nonlocal failed
        for found in inference.predict(predictor, images, top=top, batch=batch):
            failed += found.error is not None
            yield found

    if jsonl or csv or not (json or out.is_terminal):
        form = tables.answers_jsonl if jsonl else tables.answers_lines
        answers = counted()
        for line in tables.answers_csv(answers, predictor.thresholds is not None) if csv else form(answers):
            print(line)
    elif json:
        print(tables.answers_json(counted(), str(ckpt)))
    else:
        out.print(tables.answers_table(counted()))
    if failed:
        print_error(f"{failed} of {len(images)} images could not be read")
        raise typer.Exit(1)


@app.command(rich_help_panel="Look")
def doctor(json: Json = False) -> None:
    """Versions, devices, and which ONNX Runtime providers really load, and why not."""
    from vitcli.report import doctor as examination
    from vitcli.report import tables

    with err.status("looking"):
        findings = examination.inspect()
    answer(
        json,
        lambda: tables.findings_json(findings),
        lambda: tables.findings_table(findings),
        lambda: tables.findings_lines(findings),
    )


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
    raise typer.Exit(processes.launch(words, processes.visible(gpus), lambda note: err.print(note, highlight=False)))


def _finish(outcome: Outcome, json: bool) -> None:
    """Say how training ended, and what to type next."""
    from vitcli.report import tables

    if not outcome.first:
        raise typer.Exit(128 + outcome.signal if outcome.signal else 0)
    if outcome.signal:
        print_error(f"stopped by signal {outcome.signal} after step {outcome.step} of {outcome.steps}, which is saved")
        err.print(f"hint: vit pretrain --resume {outcome.run}", highlight=False, soft_wrap=True)
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


def _images_to_score(ckpt: Path, data: str | None, separator: str | None) -> Dataset:
    """The images of --data, or else those that the run holds out."""
    from vitcli import checkpoint
    from vitcli.data.sources import described, parsed

    if data is not None:
        return parsed(described(data, separator)).open_for_scoring()
    if separator is not None:
        raise RecipeError("--separator goes with --data", "the run knows its own")
    trained = None if ckpt.suffix == ".onnx" else checkpoint.load(ckpt)
    if trained is None or trained.recipe is None:
        raise DataError("no --data given", f"{ckpt} does not say what it was trained on: --data FOLDER")
    return trained.recipe.data.source.open("val")


def _newest() -> Path:
    from vitcli import run

    path = run.newest_finished()
    err.print(f"using {path}", highlight=False)
    return path


def main() -> None:
    """The console command."""
    console.run(app)
