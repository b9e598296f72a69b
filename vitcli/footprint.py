"""What training keeps in memory: an account of every tensor, to be held against what autograd really saves."""

from __future__ import annotations

from functools import partial

from vitcli.model import ResNetStem, ViTConfig
from vitcli.processes import ALONE, Processes
from vitcli.recipe import Recipe
from vitcli.runtime import Runtime
from vitcli.training.update import at_a_time

FP32 = 4


def peak(recipe: Recipe, runtime: Runtime, parameters: int, classes: int, processes: Processes = ALONE) -> float:
    """Bytes on each process's device at the fullest moment of an update.

    It is the start of the backward pass, when everything saved is still there and the first gradients flow; or, for a
    small batch, its end, when all gradients of the weights are there.
    """
    number, explicit = (2 if runtime.precision == "bf16" else FP32), runtime.attention == "explicit"
    images = at_a_time(recipe, processes)
    held = parameters / processes.count if recipe.runtime.shard == "fsdp" else parameters
    moments = 2 if recipe.optim.name == "adam" else 1  # of Muon's few parameters that are Adam's, one is forgotten
    weights = FP32 * held * (1 + moments + bool(recipe.optim.ema))
    gradients = FP32 * held
    halved = number * parameters if number < FP32 else 0  # autocast's copy of the weights

    c, (height, width) = recipe.model, recipe.data.res
    residual = 2 if runtime.residual == "bf16" else FP32
    account = partial(saved_by_autograd, image_size=recipe.data.res, number=number, explicit=explicit)
    saved = account(c, residual=residual)
    if runtime.checkpoint and c.depth > 1:  # the inputs of all blocks, and all of the one that is computed again
        inputs = residual * tokens(c, recipe.data.res) * c.width * (c.depth - 1)
        saved = inputs + account(c.model_copy(update={"depth": 1, "pool": "gap"}), residual=residual)
    given = FP32 * (3 * height * width + classes)  # images, targets
    logits = 3 * FP32 * classes  # in fp32, their log-softmax, its gradient
    flowing = tokens(c, recipe.data.res) * (residual * c.width + number * c.mlp_dim)  # gradients in a block
    earlier = gradients if images < len(processes.share(recipe.batch)) else 0  # those of the micro-batches before
    start = images * (saved + given + logits + flowing) + halved + earlier
    end = 3 * gradients if recipe.optim.name == "muon" else gradients  # with what momentum makes of them, and its steps
    return weights + max(start, end)


def tokens(c: ViTConfig, image_size: tuple[int, int]) -> int:
    """Tokens of an image."""
    down, across = c.grid(image_size)
    return down * across + c.prefix


def saved_by_autograd(
    c: ViTConfig, image_size: tuple[int, int], *, number: int, explicit: bool, residual: int = FP32
) -> float:
    """Bytes that the forward pass of one image saves for its backward pass, without weights and their copies.

    Linear layers save what goes in, in `number` bytes; norms what goes in, which is the residual stream of `residual`
    bytes; attention queries, keys, values and its answer. `explicit` attention also saves its weights.
    """
    n, d, m = tokens(c, image_size), c.width, c.mlp_dim
    hidden = {"swiglu": 4, "quick_gelu": 3}.get(c.activation, 2) * m  # before and after the activation, and between
    numbers = 6 * d + hidden  # two norms' answers; queries, keys, values; attention's answer; the MLP
    numbers += 2 * d * bool(c.layerscale) + 3 * d * c.qk_norm
    numbers += (2 * d + m) * bool(c.dropout)  # masks
    scores = c.heads * n**2 * (3 if c.attention_dropout else 1) * explicit
    block = residual * 2 * n * d + number * (n * numbers + scores)
    last, normed = block, residual * n * d
    if c.pool == "token" and c.depth:  # it computes keys and values of all tokens, and the rest of the first only
        last, normed = n * d * (residual + 3 * number), 0
    stem = _stem(c.stem, image_size, number) if c.stem else number * 3 * image_size[0] * image_size[1]
    mask = number * n * d * bool(c.dropout)
    return stem + mask + block * max(0, c.depth - 1) + last * bool(c.depth) + normed


def _stem(stem: ResNetStem, image_size: tuple[int, int], number: int) -> int:
    """Bytes that the ResNet saves: of each convolution its padded input, of each norm its input, of each ReLU its
    output, and of the pooling its input and the places of the largest, as 8-byte integers.
    """
    height, width = (side // 2 for side in image_size)
    numbers = _padded(3, *image_size, 7, 2) + 2 * stem.width * height * width
    numbers += _padded(stem.width, height, width, 3, 2)
    height, width, channels = height // 2, width // 2, stem.width
    places = 8 * stem.width * height * width
    for index, units in enumerate(stem.layers):
        inner, out = stem.width * 2**index, 4 * stem.width * 2**index
        for unit in range(units):
            stride = 2 if index > 0 and unit == 0 else 1
            shortcut = stride > 1 or channels != out
            numbers += (1 + shortcut) * channels * height * width  # what the first convolutions are given
            numbers += 2 * inner * height * width + _padded(inner, height, width, 3, stride)
            height, width, channels = height // stride, width // stride, out
            numbers += (3 * inner + (2 + shortcut) * out) * height * width
    return number * numbers + places


def _padded(channels: int, height: int, width: int, kernel: int, stride: int) -> int:
    """Numbers that go into a convolution or pooling, padded as SAME."""
    more = max(0, kernel - stride)
    return channels * (height + more) * (width + more)
