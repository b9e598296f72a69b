"""Losses against torch's and against plain formulas."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitcli.model import ViTConfig
from vitcli.objectives._module import ObjectiveModule
from vitcli.objectives.classify import Classify

IMAGES, CLASSES = 12, 5


def build(pool: str = "gap", **settings: object) -> ObjectiveModule:
    sizes = {"width": 16, "depth": 1, "mlp_dim": 32, "heads": 2, "patch": 4, "pool": pool}
    torch.manual_seed(0)
    model = ViTConfig.parse(sizes).build(CLASSES, (8, 8))
    nn.init.normal_(model.head.weight)
    return Classify.parse(settings).build(model)


def batch() -> dict[str, Tensor]:
    """Images with labels as after mixup: two classes each, in different shares."""
    chance = torch.Generator().manual_seed(1)
    shares = torch.rand(IMAGES, 1, generator=chance)
    labels = torch.arange(IMAGES) % CLASSES
    targets = shares * F.one_hot(labels, CLASSES) + (1 - shares) * F.one_hot(labels.roll(1), CLASSES)
    return {"images": torch.randn(IMAGES, 3, 8, 8, generator=chance), "targets": targets}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_is_cross_entropy(smoothing):
    module, data = build(label_smoothing=smoothing), batch()
    losses = module(data)
    assert losses.keys() == {"loss"}
    expected = F.cross_entropy(module.model(data["images"]), data["targets"], label_smoothing=smoothing)
    torch.testing.assert_close(losses["loss"], expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_is_summed_over_the_classes(smoothing):
    module, data = build(loss="sigmoid", label_smoothing=smoothing), batch()
    p = module.model(data["images"]).double().sigmoid()
    t = data["targets"].double() * (1 - smoothing) + smoothing / CLASSES
    expected = -(t * p.log() + (1 - t) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(module(data)["loss"].double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_without_pooling_each_token_is_held_to_the_target(loss):
    module, data = build("none", loss=loss, label_smoothing=0.1), batch()
    logits = module.model(data["images"])
    assert logits.shape == (IMAGES, 4, CLASSES)
    smooth = data["targets"] * 0.9 + 0.1 / CLASSES
    if loss == "softmax":
        each = [F.cross_entropy(logits[:, n], smooth) for n in range(4)]
    else:
        each = [F.binary_cross_entropy_with_logits(logits[:, n], smooth) * CLASSES for n in range(4)]
    torch.testing.assert_close(module(data)["loss"], torch.stack(each).mean())


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", [4, 5, 1])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(loss, size):
    whole, parts = build(loss=loss), build(loss=loss)
    loss_of_all = whole(batch())["loss"]
    loss_of_all.backward()
    total = 0.0
    for images, targets in zip(*(tensor.split(size) for tensor in batch().values()), strict=True):
        share = len(images) / IMAGES
        part = parts({"images": images, "targets": targets})["loss"] * share
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss_of_all.item(), rel=1e-6)
    one, other = ({name: p.grad for name, p in module.named_parameters()} for module in (whole, parts))
    torch.testing.assert_close(other, one)
    assert all(gradient.any() for gradient in one.values())


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_loss_of_bf16_logits_is_taken_in_fp32(loss):
    module, data = build(loss=loss).bfloat16(), batch()
    data["images"] = data["images"].bfloat16()
    logits = module.model(data["images"])
    assert logits.dtype == torch.bfloat16
    if loss == "softmax":
        expected = F.cross_entropy(logits.float(), data["targets"])
    else:
        expected = F.binary_cross_entropy_with_logits(logits.float(), data["targets"]) * CLASSES
    torch.testing.assert_close(module(data)["loss"], expected)
