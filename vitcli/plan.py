"""What a recipe would take, without training: `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass

from vitcli import footprint
from vitcli import runtime as runtimes
from vitcli.errors import DataError
from vitcli.model import ViTConfig
from vitcli.processes import ALONE, Processes
from vitcli.recipe import Recipe
from vitcli.training.update import at_a_time

UTILISATION = 0.4  # share of the matrix products' own speed that training reaches, as a rule of thumb


@dataclass(frozen=True)
class Plan:
    """The size of a training run. GFLOPs are 2 for each multiply-add of the matrix products and convolutions.

    Of each of the `processes`, `at_a_time` images go through the model together and `memory` is an estimate of the peak
    in bytes; `seconds` is one of the training time, from a measurement of a few matrix products on this device.
    """

    parameters: int
    gflops: float
    tokens: int
    classes: int
    images: int
    steps: int
    epochs: float
    processes: int
    at_a_time: int
    memory: float
    seconds: float
    device: str


def plan(recipe: Recipe, processes: Processes = ALONE) -> Plan:
    """The plan of a recipe. The data need not be there if the recipe says `data.classes` and `data.images`.

    Raises DataError if it is not there and the recipe does not say; RecipeError if the processes cannot share a batch.
    """
    runtime = runtimes.start(recipe.runtime)
    classes, images = _data(recipe)
    parameters, flops = cost(recipe.model, classes, recipe.data.res)
    per_epoch, steps, _ = recipe.length(images)
    return Plan(
        parameters=parameters,
        gflops=flops / 1e9,
        tokens=footprint.tokens(recipe.model, recipe.data.res),
        classes=classes,
        images=images,
        steps=steps,
        epochs=steps / per_epoch,
        processes=processes.count,
        at_a_time=at_a_time(recipe, processes),
        memory=footprint.peak(recipe, runtime, parameters, classes, processes),
        seconds=3 * flops * recipe.batch * steps / (UTILISATION * runtime.matmul_speed() * processes.count),
        device=str(runtime.describe()["device"]),
    )


def _data(recipe: Recipe) -> tuple[int, int]:
    """Classes and training images: as the recipe says, else as they are."""
    if recipe.data.classes and recipe.data.images:
        return recipe.data.classes, recipe.data.images
    try:
        dataset = recipe.data.source.open("train")
    except DataError as error:
        raise DataError(str(error), f"{error.hint}; or, for --dry-run, set data.classes and data.images") from None
    return recipe.data.classes or len(dataset.classes), recipe.data.images or len(dataset)


def cost(config: ViTConfig, classes: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Parameters, and floating-point operations of one image forward, of a model without memory.

    All tokens are counted through all blocks, as published numbers are; the forward pass itself may need fewer.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = config.build(classes, image_size).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tokens = model.encode(model.embed(torch.empty(1, 3, *image_size)))
            model.head(model.pre_logits(model.pool(tokens)))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()
