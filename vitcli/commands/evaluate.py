"""`vit eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from vitcli.commands.console import answer, tell
from vitcli.commands.options import INPUT, RESULT, Checkpoint, Json, Precision, Provider, newest
from vitcli.errors import DataError, RecipeError
from vitcli.runtime import Device
from vitcli.waiting import bar

if TYPE_CHECKING:
    from vitcli.data.sources import Dataset


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
    workers: Annotated[
        int | None, Option(min=0, help="Loader processes. [dim]By the source and the cores[/]", rich_help_panel=INPUT)
    ] = None,
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
    from vitcli import checkpoint
    from vitcli.data.parallel import expect_loaders, loaders

    ckpt = ckpt or newest()
    checkpoint.must_exist(ckpt)
    dataset = _images_to_score(ckpt, data, separator)
    if ckpt.suffix.lower() != ".onnx" and loaders(workers, dataset.in_memory, len(dataset)):
        expect_loaders()  # they import torch while this process does

    from vitcli.data.loader import fingerprint
    from vitcli.inference import open_predictor
    from vitcli.report import tables
    from vitcli.scoring import score

    predictor = open_predictor(ckpt, device=device, provider=provider, precision=precision)
    if predictor.thresholds is not None and not dataset.multi_label:
        warning = "warning: the model finds several classes in an image, and these images have one label each"
        tell(f"{warning}; of a table, --separator says otherwise")
    if data is None and checkpoint.held_out_of(ckpt) not in (None, fingerprint(dataset)):
        raise DataError(
            "these images are not those that the run held out when it began",
            "go to where its data lies, or name the images to score: --data FOLDER",
        )
    if min_top1 is not None and dataset.multi_label:
        raise RecipeError("--min-top1 is for one label an image, and these have several", "take --min-map")
    if min_map is not None and not dataset.multi_label:
        raise RecipeError("--min-map is for several labels an image, and these have one", "take --min-top1")
    for note in (f"scoring {predictor.origin}", *dataset.notes):
        tell(note)
    with bar("scoring images", len(dataset)) as advance:
        scores = score(predictor, dataset, batch=batch, workers=workers, allow_bad=allow_bad, on_batch=advance)
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


def _images_to_score(ckpt: Path, data: str | None, separator: str | None) -> Dataset:
    """The images of --data, or else those that the run holds out."""
    from vitcli import checkpoint
    from vitcli.data.sources import described, parsed

    if data is not None:
        tree = described(data, separator)
        recipe = checkpoint.recipe_of(ckpt) if tree["name"] == "table" else None
        if recipe and recipe.data.source.name == "table":  # whose columns have its names
            tree |= {"image": recipe.data.source.image, "label": recipe.data.source.label}
        return parsed(tree).open_for_scoring()
    if separator is not None:
        raise RecipeError("--separator goes with --data", "the run knows its own")
    recipe = checkpoint.recipe_of(ckpt)
    if recipe is None:
        raise DataError("no --data given", f"{ckpt} does not say what it was trained on: --data FOLDER")
    return recipe.data.source.open("val")
