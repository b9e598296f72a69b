"""The account of memory against what autograd really saves, and against peaks measured on a GPU."""

import pytest
import torch
from command import Vit, sets
from torch.nn import functional as F

from vitcli import footprint, plan, recipe
from vitcli.model import ViTConfig
from vitcli.runtime import RuntimeConfig, start

SIDE = 64
THERE = {"device": "cpu", "precision": "bf16", "attention": "sdpa", "threads": 1}  # but for the device
BYTES = {"fp32": 4, "bf16": 2}
SIZE = {"width": 96, "depth": 3, "mlp_dim": 384, "heads": 3, "patch": 8, "pool": "gap"}


def saved(config: ViTConfig, precision: str, residual: str, attention: str, images: int) -> int:
    """Bytes of all tensors that the forward pass keeps for the backward pass, but the weights themselves."""
    how = {"precision": precision, "residual": residual, "attention": attention}
    runtime = start(RuntimeConfig.parse(how | {"device": "cpu", "threads": 1}))
    torch.manual_seed(0)
    model = runtime.prepare(config.build(10, (SIDE, SIDE))).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # which it keeps alive, so that no two share an address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with runtime.autocast():
            logits = model(torch.randn(images, 3, SIDE, SIDE))
        F.cross_entropy(logits.float(), torch.zeros(images, dtype=torch.long))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@pytest.mark.parametrize(("precision", "residual"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": "token", "registers": 4},
        {"pool": "token", "distilled": True},
        {"dropout": 0.1, "drop_path": 0.1},
        {"layerscale": 0.1, "qk_norm": True},
        {"activation": "swiglu"},
        {"activation": "quick_gelu"},
        {"stem": {"layers": [2, 2], "width": 32}, "patch": 2},
        {"depth": 1},
    ],
)
def test_autograd_saves_what_the_account_says(options, precision, residual, attention):
    config = ViTConfig.parse(SIZE | options)
    an_image = (saved(config, precision, residual, attention, 4) - saved(config, precision, residual, attention, 2)) / 2
    account = footprint.saved_by_autograd(
        config,
        (SIDE, SIDE),
        number=BYTES[precision],
        explicit=attention == "explicit",
        residual=BYTES[residual],
    )
    assert account == pytest.approx(an_image, rel=0.03)


def test_explicit_attention_with_dropout():
    config = ViTConfig.parse(SIZE | {"attention_dropout": 0.1})
    an_image = (saved(config, "bf16", "fp32", "explicit", 4) - saved(config, "bf16", "fp32", "explicit", 2)) / 2
    account = footprint.saved_by_autograd(config, (SIDE, SIDE), number=2, explicit=True)
    assert account == pytest.approx(an_image, rel=0.03)


@pytest.mark.parametrize(("batch", "gib"), [(256, 17.6), (512, 33.4)])
def test_the_peak_of_timms_training(batch, gib):
    """ViT-B/16 of timm at 224 px, bf16 autocast, AdamW, on one H200 with torch 2.11; it computes every last token."""
    loaded = recipe.load(
        "b16_in1k",
        [
            f"batch={batch}",
            "model={variant: B/16, pool: gap, class_token: true, dropout: 0, representation_size: null}",
        ],
    )
    parameters, _ = plan.cost(loaded.model, 1000, (224, 224))
    as_there = start(RuntimeConfig.parse(THERE | {"residual": "fp32"}))
    assert footprint.peak(loaded, as_there, parameters, 1000) / 2**30 == pytest.approx(gib, rel=0.03)


@pytest.mark.parametrize(("variant", "batch", "gib"), [("B/16", 512, 28.3), ("S/16", 1024, 28.2), ("L/16", 256, 40.5)])
def test_the_peak_of_our_training(variant, batch, gib):
    """As `vit bench train` measured it on one H200 with torch 2.11."""
    loaded = recipe.load(
        "b16_in1k", [f"batch={batch}", f"model={{variant: {variant}, dropout: 0, representation_size: null}}"]
    )
    parameters, _ = plan.cost(loaded.model, 1000, (224, 224))
    as_there = start(RuntimeConfig.parse(THERE))
    assert footprint.peak(loaded, as_there, parameters, 1000) / 2**30 == pytest.approx(gib, rel=0.03)


def test_checkpointed_blocks_take_much_less():
    loaded = recipe.load("b16_in1k", ["model={variant: L/16, dropout: 0}", "batch=256"])
    parameters, _ = plan.cost(loaded.model, 1000, (224, 224))
    whole, less = (
        footprint.peak(loaded, start(RuntimeConfig.parse(THERE | {"checkpoint": value})), parameters, 1000)
        for value in (False, True)
    )
    weights = 16 * parameters  # with gradients and two moments
    assert (less - weights) < (whole - weights) / 5


def test_what_memory_depends_on(capsys, monkeypatch):
    vit = Vit(capsys, monkeypatch)

    def takes(*values: str) -> float:
        said = vit(
            "pretrain", "b16_in1k", "--dry-run", "--json", *sets("runtime.device=cpu", "runtime.threads=1", *values)
        )
        assert said.code == 0, said.err
        return said.json["memory"]

    whole, half = takes("batch=512"), takes("batch=512", "runtime.micro_batch=256")
    assert 0.5 < half / whole < 0.6  # the weights, and with parts their gradients, stay
    assert takes("batch=512", "runtime.precision=fp32") > 1.6 * takes("batch=512", "runtime.precision=bf16")
    weights = 4 * 87_157_480
    assert takes("batch=1", "runtime.precision=fp32") >= 4 * weights  # with gradients and two moments
    average = takes("batch=1", "optim.ema=0.99") - takes("batch=1")
    assert average == pytest.approx(weights, rel=0.01)
