"""`vit bench`: the options of each measurement, and who takes part."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer
from typer import Argument, Option

from vitcli import runtime
from vitcli.commands.console import answer, err, tell
from vitcli.commands.options import RESULT, Json, Set
from vitcli.commands.recipes import recipe_names
from vitcli.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vitcli.bench.measure import Contender
    from vitcli.model import ViTConfig
    from vitcli.recipe import Recipe
    from vitcli.runtime import Runtime

FORMS = (".png", ".svg", ".pdf", ".md")
MEASURE = "Measuring"

bench = typer.Typer(help="Measure speed on this machine, beside other libraries.", no_args_is_help=True)

RecipeName = Annotated[str, Argument(help="Name of a shipped recipe, or a .yaml file.", autocompletion=recipe_names)]
Batch = Annotated[
    str | None,
    Option(
        metavar="N,N",
        help="Images at a time; of several each takes its best. [dim]256, on a CPU 32[/]",
        rich_help_panel=MEASURE,
    ),
]
Against = Annotated[
    list[str] | None,
    Option(
        metavar="PEER,PEER",
        help="timm, torchvision, transformers, at their best settings; plain: this model in fp32, eager.",
        rich_help_panel=MEASURE,
    ),
]
Blocks = Annotated[int, Option(min=1, help="Rounds in which each runs once.", rich_help_panel=MEASURE)]
Seconds = Annotated[float, Option(min=0.001, help="About the length of a block.", rich_help_panel=MEASURE)]
Output = Annotated[
    list[Path] | None,
    Option("-o", "--output", help="A chart (.png, .svg, .pdf) or a table (.md).", rich_help_panel=RESULT),
]


@bench.command()
def train(
    recipe: RecipeName = "b16_in1k",
    sets: Set = None,
    batch: Batch = None,
    against: Against = None,
    from_disk: Annotated[
        bool,
        Option(
            "--from-disk",
            help="Load the recipe's images in each step, as training does; peers with their own loaders.",
            rich_help_panel=MEASURE,
        ),
    ] = False,
    blocks: Blocks = 7,
    seconds: Seconds = 2.0,
    output: Output = None,
    json: Json = False,
) -> None:
    """Training steps: forward, backward and update, on a batch that is already on the device.

    vit bench train --batch 256,512 --against timm,torchvision -o speed.png

    vit bench train b16_in1k --set data.source.path=/data/imagenet --from-disk --against timm

    vit bench train cifar10 --set runtime.device=cpu --against plain
    """
    how = _How(_batches(batch), blocks, seconds, _places(output), json)
    loaded = _recipe(recipe, sets)
    names = _peers(against)
    if names and loaded.objective.name != "classify":
        raise RecipeError(f"no peer trains with objective {loaded.objective.name}", "leave out --against")
    from vitcli.bench import contenders

    started = runtime.start(loaded.runtime)
    entered = contenders.training(loaded, started, names, from_disk)
    flops = _flops(loaded.model, contenders.classes(loaded), loaded.data.res)
    model = f"{_described(loaded.model, loaded.data.res)}, {recipe}"
    _finish("training", model, 3 * flops, started, entered, how)


@bench.command()
def infer(
    recipe: Annotated[
        str | None,
        Argument(help="Name of a shipped recipe, or a .yaml file. [dim]b16_in1k[/]", autocompletion=recipe_names),
    ] = None,
    ckpt: Annotated[
        list[Path] | None,
        Option("--ckpt", help="Run folder, checkpoint, .npz, .safetensors, .pth or .onnx in its stead; or several."),
    ] = None,
    sets: Set = None,
    device: Annotated[Literal["cpu", "cuda", "mps"] | None, Option(help="[dim]The recipe's, or the fastest[/]")] = None,
    precision: Annotated[
        runtime.Precision | None, Option(help="vit predict answers in fp32. [dim]The recipe's, or the faster[/]")
    ] = None,
    threads: Annotated[int | None, Option(min=1, help="CPU threads. [dim]The physical cores[/]")] = None,
    batch: Batch = None,
    against: Against = None,
    blocks: Blocks = 7,
    seconds: Seconds = 2.0,
    output: Output = None,
    json: Json = False,
) -> None:
    """Answers for images in memory: upload, normalising, the model, and its logits back.

    vit bench infer --batch 256 --against timm,transformers

    vit bench infer --ckpt model.pth --ckpt model.onnx --device cpu
    """
    how = _How(_batches(batch), blocks, seconds, _places(output), json)
    if ckpt and (recipe or sets):
        what = "--set" if sets else "a recipe"
        raise RecipeError(
            f"{what} does not go with --ckpt: a checkpoint has its model already", "leave one of them out"
        )
    loaded = None if ckpt else _recipe(recipe or "b16_in1k", sets)
    names = _peers(against)
    from vitcli.bench import contenders
    from vitcli.runtime import RuntimeConfig

    given = {"device": device, "precision": precision, "threads": threads}
    config = loaded.runtime.model_dump() if loaded else {}
    started = runtime.start(RuntimeConfig.parse(config | {key: value for key, value in given.items() if value}))
    subjects = [contenders.of_recipe(loaded)] if loaded else []
    subjects += [contenders.of_checkpoint(path, started) for path in ckpt or ()]
    subjects.sort(key=lambda one: one.config is None)  # the first one's architecture is what the peers build
    first = subjects[0]
    if names and not first.config:
        raise CheckpointError(f"{first.name} does not say its architecture", "give --ckpt its checkpoint too")
    res = first.preprocessing.res
    flops = _flops(first.config, first.classes, res) if first.config else None
    model = ", ".join([_described(first.config, res) if first.config else "ViT", *(path.name for path in ckpt or ())])
    entered = contenders.inference(subjects, started, names)
    _finish("inference", model, flops, started, entered, how)


@bench.command()
def data(
    recipe: RecipeName = "quickstart",
    sets: Set = None,
    batch: Batch = None,
    against: Annotated[
        list[str] | None,
        Option(metavar="PEER,PEER", help="timm, torchvision, with their own loaders.", rich_help_panel=MEASURE),
    ] = None,
    blocks: Blocks = 7,
    seconds: Seconds = 2.0,
    output: Output = None,
    json: Json = False,
) -> None:
    """The recipe's training images: read, decoded and augmented, with no model to wait for.

    vit bench data b16_in1k --set data.source.path=/data/imagenet --against timm,torchvision
    """
    how = _How(_batches(batch), blocks, seconds, _places(output), json)
    loaded = _recipe(recipe, sets)
    names = _peers(against)
    from vitcli.bench import contenders

    started = runtime.start(loaded.runtime)
    height, width = loaded.data.res
    model = f"{loaded.data.source.name} at {height}x{width}, {recipe}"
    entered = contenders.loading(loaded, started, names)
    _finish("loading", model, None, started, entered, how._replace(batches=how.batches or [loaded.batch]))


class _How(NamedTuple):
    """How to measure, and where the results go."""

    batches: list[int]
    blocks: int
    seconds: float
    output: list[Path]
    json: bool


def _recipe(name: str, sets: list[str] | None) -> Recipe:
    from vitcli import recipe

    return recipe.load(name, sets or ())


def _batches(text: str | None) -> list[int]:
    """The sizes of --batch. Raises RecipeError."""
    if text is None:
        return []
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise RecipeError(f"--batch {text}: expected numbers of images", "as in --batch 256,512")
    return sizes


def _places(output: list[Path] | None) -> list[Path]:
    """Where to write. Raises RecipeError, before anything is measured."""
    for path in output or ():
        if path.suffix not in FORMS:
            raise RecipeError(f"-o {path}: not a known form", f"take a name that ends in {', '.join(FORMS)}")
        if not path.parent.is_dir():
            raise RecipeError(f"-o {path}: no such folder", "make it first")
    return output or []


def _peers(against: list[str] | None) -> list[str]:
    """The peers that are installed; a warning for each other one. Raises RecipeError for an unknown name."""
    from vitcli.bench import peers

    found = []
    for name in dict.fromkeys(name for text in against or () for name in text.split(",")):
        try:
            peers.check(name)
        except peers.PeerError as error:
            tell(f"warning: {error}, so it is left out ({error.hint})")
        else:
            found.append(name)
    return found


def _flops(config: ViTConfig, classes: int, res: tuple[int, int]) -> int:
    from vitcli.plan import cost

    return cost(config, classes, res)[1]


def _described(config: ViTConfig, res: tuple[int, int]) -> str:
    name = config.variant or f"ViT of width {config.width} and depth {config.depth}"
    return f"{name} at {res[0]}x{res[1]}"


def _finish(
    task: str, model: str, flops: float | None, runtime: Runtime, entered: Sequence[Contender], how: _How
) -> None:
    """Measure, print, and write what was asked for."""
    from vitcli import storage
    from vitcli.bench import contenders
    from vitcli.bench.measure import Bench, measure
    from vitcli.report import bench as report
    from vitcli.report.stages import Stages

    batches = how.batches or [32 if runtime.device.type == "cpu" else 256]
    with Stages(err) as stages, contenders.each_compiled_alone(runtime):
        stages.begin("speed of a large matrix product")
        ceiling = runtime.matmul_speed() if flops else None
        results = measure(
            entered, batches, runtime.device, blocks=how.blocks, seconds=how.seconds, on_stage=stages.begin
        )
        if ceiling:  # again, lest what disturbed the first time be taken for the ceiling
            stages.begin("speed of a large matrix product, once more")
            ceiling = max(ceiling, runtime.matmul_speed())
    command = shlex.join(["vit", *sys.argv[1:]])
    made = Bench(task, model, flops, ceiling, report.machine(runtime), command, results)
    answer(how.json, lambda: report.as_json(made), lambda: report.table(made), lambda: report.lines(made))
    for path in how.output:
        content = report.markdown(made).encode() if path.suffix == ".md" else report.chart(made, path.suffix[1:])
        storage.write_file(path, content)
