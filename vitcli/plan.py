"""What a recipe would take, without training: `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass

from vitcli import runtime as runtimes
from vitcli.errors import DataError
from vitcli.model import ViTConfig
from vitcli.recipe import Recipe
from vitcli.runtime import Runtime

UTILISATION = 0.4  # share of the matrix products' own speed that training reaches, as a rule of thumb


@dataclass(frozen=True)
class Plan:
    """The size of a training run. GFLOPs are 2 for each multiply-add of the matrix products and convolutions.

    `memory` is an estimate of the peak in bytes, `seconds` one of the training time from a measurement of a few
    matrix products on this device.
    """

    parameters: int
    gflops: float
    tokens: int
    classes: int
    images: int
    steps: int
    epochs: float
    memory: float
    seconds: float
    device: str


def plan(recipe: Recipe) -> Plan:
    """The plan of a recipe. The data need not be there if the recipe says `data.classes` and `data.images`.

    Raises DataError if it is not there and the recipe does not say.
    """
    runtime = runtimes.start(recipe.runtime)
    classes, images = _data(recipe)
    parameters, flops = cost(recipe.model, classes, recipe.data.res)
    per_epoch = max(1, images // recipe.batch)
    steps = recipe.steps or max(1, round((recipe.epochs or 0) * per_epoch))
    height, width = recipe.model.grid(recipe.data.res)
    tokens = height * width + recipe.model.class_token + recipe.model.registers
    return Plan(
        parameters=parameters,
        gflops=flops / 1e9,
        tokens=tokens,
        classes=classes,
        images=images,
        steps=steps,
        epochs=steps / per_epoch,
        memory=_memory(recipe, runtime, parameters, tokens),
        seconds=3 * flops * recipe.batch * steps / (UTILISATION * runtime.matmul_speed()),
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


def _memory(recipe: Recipe, runtime: Runtime, parameters: int, tokens: int) -> float:
    """Weights, gradients, moments and average in fp32, and what the backward pass keeps of each block and image."""
    moments = 2 if recipe.optim.name == "adam" else 1
    states = 4 * parameters * (2 + moments + bool(recipe.optim.ema))
    number = 2 if runtime.precision == "bf16" else 4
    a_block = tokens * number * (10 * recipe.model.width + 2 * recipe.model.mlp_dim)
    if runtime.attention == "explicit":
        a_block += 2 * number * recipe.model.heads * tokens**2
    return states + a_block * recipe.model.depth * min(recipe.batch, recipe.runtime.micro_batch or recipe.batch)
