"""Learning rates against closed forms, updates against torch's own optimisers, the average against its formula."""

import math
from collections import OrderedDict

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from vitcli import optim
from vitcli.model import ViTConfig
from vitcli.muon import orthogonal
from vitcli.optim import OptimConfig

STEPS, WARMUP, LR, END = 100, 10, 1e-3, 1e-5
MIDDLE = (LR + END) / 2
FINITE = torch.tensor(True)

# schedule, further settings, {step: learning rate}
SCHEDULES = [
    ("cosine", {"end_lr": END}, {10: LR, 32.5: END + (LR - END) * (2 + math.sqrt(2)) / 4, 55: MIDDLE, 100: END}),
    ("cosine", {}, {10: LR, 40: LR * 3 / 4, 55: LR / 2, 70: LR / 4, 100: 0.0}),
    ("linear", {"end_lr": END}, {10: LR, 55: MIDDLE, 91: END + (LR - END) / 10, 100: END}),
    ("rsqrt", {"timescale": 30}, {10: LR, 40: LR / math.sqrt(2), 100: LR / 2}),
    (
        "rsqrt",
        {"timescale": 30, "cooldown_steps": 20, "end_lr": END},
        {40: LR / math.sqrt(2), 80: LR / math.sqrt(10 / 3), 85: END + (LR / math.sqrt(3.5) - END) * 3 / 4, 100: END},
    ),
    ("constant", {}, {10: LR, 50: LR, 100: LR}),
    ("constant", {"cooldown_steps": 20}, {79: LR, 80: LR, 85: LR * 3 / 4, 90: LR / 2, 99: LR / 20, 100: 0.0}),
]


@pytest.mark.parametrize(("schedule", "settings", "expected"), SCHEDULES)
def test_a_schedule_is_its_closed_form(schedule, settings, expected):
    config = OptimConfig.parse({"lr": LR, "schedule": schedule, **settings})
    for step, lr in expected.items():
        assert optim.learning_rate(config, step, STEPS, WARMUP) == pytest.approx(lr, rel=1e-12, abs=1e-18), step


@pytest.mark.parametrize("schedule", ["cosine", "linear", "rsqrt", "constant"])
def test_warm_up_is_a_straight_line_from_0(schedule):
    config = OptimConfig.parse({"lr": LR, "schedule": schedule})
    rates = [optim.learning_rate(config, step, STEPS, WARMUP) for step in range(WARMUP + 1)]
    assert rates == pytest.approx([LR * step / WARMUP for step in range(WARMUP + 1)], rel=1e-12)
    assert rates[0] == 0.0
    assert optim.learning_rate(config, 0, STEPS, 0) == LR


def test_the_length_of_warm_up_in_steps_or_epochs():
    assert OptimConfig().warmup(45) == 0
    assert OptimConfig(warmup_steps=7).warmup(45) == 7
    assert OptimConfig(warmup_epochs=2.5).warmup(45) == 112


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"end_lr": 0.1}, "0.1 is more than lr: 0.001"),
        ({"name": "sgd", "eps": 1e-6}, "has no effect with sgd; it is for adam and muon"),
        ({"name": "adam", "momentum": 0.5}, "has no effect with adam; it is for sgd and muon"),
        ({"timescale": 5}, "has no effect with cosine; it is for rsqrt"),
        ({"schedule": "constant", "end_lr": 1e-5}, "has no effect with constant; it is for cosine and linear"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        OptimConfig.parse(settings)


KERNELS = {
    "patch_embed.proj.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.attn.proj.weight",
    "blocks.0.mlp.fc1.weight",
    "blocks.0.mlp.fc2.weight",
    "pre_logits.fc.weight",
    "head.weight",
}


@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_weight_decay_shrinks_kernels_and_nothing_else(name):
    sizes = {"width": 16, "depth": 1, "mlp_dim": 32, "heads": 2, "patch": 4}
    rest = {"registers": 2, "qk_norm": True, "layerscale": 0.1, "representation_size": 8}
    model = ViTConfig.parse(sizes | rest).build(5, (8, 8))
    before = {}
    for key, parameter in model.named_parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.zeros_like(parameter)
        before[key] = parameter.detach().clone()
    assert before.keys() >= KERNELS | {"cls_token", "reg_token", "pos_embed", "norm.weight", "blocks.0.ls1.gamma"}

    optim.update(optim.build(OptimConfig.parse({"name": name, "weight_decay": 0.3}), model), 0.1, FINITE)
    for key, parameter in model.named_parameters():
        expected = before[key] * (1 - 0.1 * 0.3) if key in KERNELS else before[key]
        assert torch.equal(parameter, expected), key


def test_layer_decay_is_that_of_mae_which_counts_the_last_norm_to_the_head_and_else_of_timm():
    theirs = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", depth=3)
    groups = pytest.importorskip("timm.optim").param_groups_layer_decay(theirs, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    expected = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}

    ours = ViTConfig.parse({"width": 16, "depth": 3, "mlp_dim": 32, "heads": 2, "patch": 4}).build(5, (8, 8))
    names = {id(parameter): name for name, parameter in ours.named_parameters()}
    optimizer = optim.build(OptimConfig.parse({"name": "sgd", "momentum": 0.0, "layer_decay": 0.5}), ours)
    shares = {names[id(p)]: group["share"] for group in optimizer.param_groups for p in group["params"]}
    assert shares == expected | {"norm.weight": 1.0, "norm.bias": 1.0}
    assert (shares["pos_embed"], shares["blocks.0.norm1.weight"], shares["head.bias"]) == (0.0625, 0.125, 1.0)

    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    for parameter in ours.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.update(optimizer, 0.1, FINITE)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 0.1 * shares[name])


def test_the_blocks_of_a_hybrids_stem_are_none_of_the_encoder():
    sizes = {"width": 16, "depth": 2, "mlp_dim": 32, "heads": 2, "patch": 1, "stem": {"layers": [1, 1], "width": 32}}
    model = ViTConfig.parse(sizes).build(5, (16, 16))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    config = OptimConfig.parse({"name": "muon", "layer_decay": 0.5})
    optimizer = optim.build(config, model)
    stem = {name for name in names.values() if name.startswith("patch_embed.backbone.stages.")}
    assert len(stem) > 10
    for group in optimizer.param_groups:
        for name in {names[id(parameter)] for parameter in group["params"]} & stem:
            assert (group["share"], group["matrices"]) == (0.125, 0), name
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optim.update(optimizer, 0.1, FINITE)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    return nn.Sequential(OrderedDict(blocks=block, head=nn.Linear(8, 3))).double()


def gradients(module: nn.Module, step: int) -> None:
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    F.cross_entropy(module(x), torch.arange(10) % 3).backward()


RATES = [0.0, 1e-2, 3e-2, 2e-2, 1e-2, 3e-3]


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_updates_are_those_of_torch(name):
    ours, theirs = network(), network()
    kernels = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim == 1]
    if name == "adam":
        config = OptimConfig.parse({"weight_decay": 0.5, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6})
        groups = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
        reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.5)
    else:
        config = OptimConfig.parse({"name": "sgd", "momentum": 0.7})
        reference = torch.optim.SGD(theirs.parameters(), lr=0.0, momentum=0.7)
    optimizer = optim.build(config, ours)
    for step, lr in enumerate(RATES):
        gradients(ours, step)
        gradients(theirs, step)
        optim.update(optimizer, lr, FINITE)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        reference.zero_grad()
        assert all(p.grad is None for p in ours.parameters())
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)
    assert not torch.equal(ours.blocks[0].weight, network().blocks[0].weight)


def test_muons_updates_are_those_of_torch_to_the_rounding_of_its_bfloat16():
    """Queries, keys and values each as a matrix of its own; what is not a matrix of a block is AdamW's."""
    sizes = {"width": 24, "depth": 2, "mlp_dim": 40, "heads": 2, "patch": 4}
    torch.manual_seed(0)
    model = ViTConfig.parse(sizes).build(5, (8, 8))
    nn.init.normal_(model.head.weight)
    config = OptimConfig.parse({"name": "muon", "momentum": 0.9, "weight_decay": 0.2, "beta2": 0.95})
    optimizer = optim.build(config, model)

    theirs = {name: p.detach().clone() for name, p in model.named_parameters()}
    matrices, decayed, others = {}, [], []
    for name, p in theirs.items():
        if name.startswith("blocks.") and p.ndim == 2:
            for part, matrix in enumerate(p.chunk(3) if "qkv" in name else [p]):
                matrices[name, part] = nn.Parameter(matrix.clone())
        else:
            theirs[name] = nn.Parameter(p)
            (decayed if optim.is_kernel(name, p) else others).append(theirs[name])
    muon = torch.optim.Muon(matrices.values(), lr=0.0, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for lr in (1e-2, 3e-2, 2e-2):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            for (key, part), matrix in matrices.items():
                if key == name:
                    matrix.grad = p.grad.chunk(3)[part].clone() if "qkv" in name else p.grad.clone()
            theirs[name].grad = p.grad.clone()
        optim.update(optimizer, lr, FINITE)
        for reference in (muon, adamw):
            for group in reference.param_groups:
                group["lr"] = lr
            reference.step()
    for name, p in model.named_parameters():
        parts = [matrix for (key, _), matrix in matrices.items() if key == name]
        if parts:  # changed by 0.012 rms
            torch.testing.assert_close(p, torch.cat(parts), rtol=0, atol=6e-4)
        else:
            torch.testing.assert_close(p, theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 40), (1, 1, 7)])
def test_a_matrix_made_orthogonal_keeps_its_singular_vectors_and_no_singular_value(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    left = u.mT @ orthogonal(x) @ v.mT
    values = left.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(left, values.diag_embed(), rtol=0, atol=1e-9)
    assert values.min() > 0.5
    assert values.max() < 1.25
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_a_restored_state_continues_to_the_same_bits(name):
    config = OptimConfig.parse({"name": name, "weight_decay": 0.1})

    def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            gradients(module, step)
            optim.update(optimizer, 1e-2, FINITE)

    whole = network()
    optimizer = optim.build(config, whole)
    train(whole, optimizer, range(3))
    weights = {key: value.clone() for key, value in whole.state_dict().items()}
    kept = {key: value.clone() for key, value in optim.state(optimizer, whole).items()}
    assert {key.partition("/")[0] for key in kept} == {"blocks.0.weight", "blocks.0.bias", "head.weight", "head.bias"}
    train(whole, optimizer, range(3, 6))

    def continued(state: dict[str, torch.Tensor]) -> nn.Module:
        module = network()
        module.load_state_dict(weights)
        optimizer = optim.build(config, module)
        optim.load_state(optimizer, module, state)
        train(module, optimizer, range(3, 6))
        return module

    without = continued({})
    restored = continued(kept)
    for key, value in whole.state_dict().items():
        assert torch.equal(restored.state_dict()[key], value), key
        assert not torch.equal(without.state_dict()[key], value), key


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_a_skipped_update_leaves_no_trace(name, at):
    """A gradient that is not finite at step `at`: everything is as if that step had not been."""

    def train(bad: int | None) -> dict[str, torch.Tensor]:
        module = network()
        optimizer = optim.build(OptimConfig.parse({"name": name, "weight_decay": 0.1}), module)
        average = optim.Average(module, decay=0.5)
        for step in range(5):
            if step == at and bad is None:
                continue
            gradients(module, step)
            if step == bad:
                module.blocks[0].weight.grad[2, 3] = torch.nan
            finite = optim.clip(module, 1.0).isfinite()
            assert bool(finite) is (step != bad)
            optim.update(optimizer, 1e-2, finite)
            average.update(average.share(step), finite)
        moments = {f"moment/{key}": value for key, value in optim.state(optimizer, module).items()}
        means = {f"average/{key}": value for key, value in average.tensors.items()}
        return {**module.state_dict(), **moments, **means}

    expected, found = train(None), train(at)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_the_average_follows_its_formula():
    module = nn.Linear(3, 2).double()
    average = optim.Average(module, decay=0.35)
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    for step, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 4 / 13, 0.35, 0.35]):
        for name, parameter in module.named_parameters():
            nn.init.normal_(parameter)
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
        average.update(average.share(step), FINITE)
    for name, value in expected.items():
        torch.testing.assert_close(average.tensors[name], value, rtol=1e-12, atol=1e-14)


def test_swapping_the_average_twice_changes_nothing():
    module = nn.Linear(3, 2)
    average = optim.Average(module, decay=0.9)
    nn.init.normal_(module.weight)
    live, mean = module.weight.detach().clone(), average.tensors["weight"].clone()
    assert not torch.equal(live, mean)
    average.swap()
    assert torch.equal(module.weight, mean)
    assert torch.equal(average.tensors["weight"], live)
    average.swap()
    assert torch.equal(module.weight, live)
    assert torch.equal(average.tensors["weight"], mean)
