"""What a runtime puts in place of the model's own parts is the same function."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from interpreter import interpreted, run
from torch import nn
from torch.nn import functional as F

from vitcli import runtime
from vitcli.cuda_graph import Recorded
from vitcli.data import Preprocessing
from vitcli.errors import RecipeError
from vitcli.fast_paths import _join
from vitcli.inference import TorchPredictor
from vitcli.model import ViTConfig
from vitcli.model.attention import Attention
from vitcli.model.stem import project_as_rows
from vitcli.runtime import RuntimeConfig

TINY = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "patch": 4}

GELU = """
import torch
from torch import nn
from torch.nn import functional as F
from vitcli.kernels import gelu as module
from vitcli.kernels.gelu import linear_gelu

module.CHUNKS = 20  # each is interpreted
torch.manual_seed(0)
for rows, width, hidden in ((70, 24, 300), (1100, 16, 40)):
    linear = nn.Linear(width, hidden)
    nn.init.normal_(linear.bias)
    x, weights = torch.randn(2, rows, width, requires_grad=True), torch.randn(2, rows, hidden)
    gradients = []
    for answer in (linear_gelu(linear, x), F.gelu(linear(x), approximate="tanh")):
        gradients.append((answer, *torch.autograd.grad((answer * weights).sum(), (x, linear.weight, linear.bias))))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
print("equal")
"""
ATTENTION = """
import copy
import torch
from torch import nn
from torch.nn import functional as F
from vitcli.kernels.attention import self_attention

def plain(qkv, x, heads):
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv(x).chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

def results(attention, qkv, x, weights, heads):
    answer = attention(qkv, x, heads)
    return answer, *torch.autograd.grad((answer * weights).sum(), (x, qkv.weight, qkv.bias))

torch.manual_seed(0)
for batch, tokens, width, heads in ((1, 197, 64, 1), (1, 131, 64, 2), (2, 50, 64, 1), (1, 7, 32, 1)):
    qkv = nn.Linear(width, 3 * width)
    nn.init.normal_(qkv.bias)
    x, weights = 3 * torch.randn(batch, tokens, width), torch.randn(batch, tokens, width)
    found = results(self_attention, qkv, x.requires_grad_(), weights, heads)
    exact = results(plain, copy.deepcopy(qkv).double(), x.detach().double().requires_grad_(), weights.double(), heads)
    for ours, right in zip(found, exact, strict=True):
        assert (ours - right).norm() < 2e-6 * right.norm(), ((ours - right).norm() / right.norm()).item()
print("equal")
"""

NORM = """
import copy
import torch
from torch import nn
from vitcli.fast_paths import _join
from vitcli.kernels import norm as module
from vitcli.kernels.norm import add_norm
from vitcli.model import ViTConfig

TINY = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "patch": 4}

def plain(norm, bias, later, x, branch):
    total = x + branch + bias
    return total + later, norm(total)

def results(way, norm, bias, later, x, branch, weights):
    answers = way(norm, bias, later, x, branch)
    loss = sum((answer * weight).sum() for answer, weight in zip(answers, weights))
    return *answers, *torch.autograd.grad(loss, (x, branch, bias, later, norm.weight, norm.bias))

module.PROGRAMS, module.CHUNKS = 30, 20  # each is interpreted
torch.manual_seed(0)
for rows, width in ((5, 24), (300, 40), (41, 600)):
    norm = nn.LayerNorm(width, 1e-6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, branch, *weights = (torch.randn(2, rows, width) for _ in range(4))
    given = [value.requires_grad_() for value in (torch.randn(width), torch.randn(width), x, branch)]
    found = results(add_norm, norm, *given, weights)
    double = [value.detach().double().requires_grad_() for value in given]
    exact = results(plain, copy.deepcopy(norm).double(), *double, [weight.double() for weight in weights])
    for ours, right in zip(found, exact, strict=True):
        assert (ours - right).norm() < 2e-6 * right.norm(), ((ours - right).norm() / right.norm()).item()

def gradients(model, images):
    loss = (model(images) * torch.arange(10)).sum()
    return loss, *torch.autograd.grad(loss, list(model.parameters()))

model = ViTConfig.parse(TINY).build(10, (8, 8))
for parameter in model.parameters():
    nn.init.normal_(parameter, std=0.3)
joined, images = copy.deepcopy(model), torch.randn(3, 3, 8, 8)
for block in joined.blocks:
    _join(block)
    assert "between" in vars(block)
for ours, right in zip(gradients(joined, images), gradients(model, images), strict=True):
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4 * right.abs().max().item())
print("equal")
"""


@interpreted
@pytest.mark.parametrize("script", [GELU, ATTENTION, NORM], ids=["gelu", "attention", "norm"])
def test_our_kernels_and_their_gradients_are_torchs(script):
    run(script)


@interpreted
@pytest.mark.parametrize("between", [{}, {"dropout": 0.1}, {"drop_path": 0.1}, {"layerscale": 0.1}])
def test_an_addition_joins_the_norm_only_where_nothing_is_between(between):
    last = ViTConfig.parse(TINY | between).build(10, (8, 8)).blocks[-1]
    _join(last)
    assert ("between" in vars(last)) == (not between)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU torch's fused activation is GELU's exact form")
def test_the_gelu_of_a_matrix_product_is_torchs():
    from vitcli.kernels.gelu import linear_gelu

    linear = nn.Linear(64, 256).cuda()
    x = torch.randn(3, 50, 64, device="cuda")
    started = runtime.start(RuntimeConfig.parse({"device": "cuda", "precision": "bf16"}))
    with torch.no_grad(), started.autocast():
        found = linear_gelu(linear, x)
        expected = F.gelu(linear(x), approximate="tanh")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels as a GPU runs them")
@pytest.mark.parametrize(("rows", "width", "hidden"), [(70, 24, 300), (5000, 192, 768)])
def test_the_gelu_trains_as_torchs_does(rows, width, hidden):
    from vitcli.kernels.gelu import linear_gelu

    linear = nn.Linear(width, hidden).cuda()
    nn.init.normal_(linear.bias)
    x = torch.randn(2, rows, width, device="cuda", requires_grad=True)
    weights = torch.randn(2, rows, hidden, device="cuda")
    started = runtime.start(RuntimeConfig.parse({"device": "cuda", "precision": "bf16"}))
    results = []
    for answer in (lambda: linear_gelu(linear, x), lambda: F.gelu(linear(x), approximate="tanh")):
        with started.autocast():
            y = answer()
        results.append((y, *torch.autograd.grad((y * weights).sum(), (x, linear.weight, linear.bias))))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuBLASLt's algorithms as a GPU runs them")
@pytest.mark.parametrize(("rows", "inner", "columns"), [(5000, 192, 768), (37 * 197, 768, 3072), (333, 40, 24)])
def test_the_chosen_products_have_torchs_bits(rows, inner, columns):
    from vitcli.kernels.products import product

    a, b = (torch.randn(*shape, dtype=torch.bfloat16, device="cuda") for shape in ((rows, inner), (inner, columns)))
    for _ in range(2):  # as they are tried, and as they are chosen
        assert torch.equal(product(a, b, False), a @ b)
        assert torch.equal(product(a, b.t().contiguous(), True), a @ b.t().contiguous().t())


@pytest.mark.filterwarnings("default")  # the compiler has its own, which differ by version
@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU other parts are put in place")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_what_a_gpu_compiles_has_the_plain_models_gradients(unchecked, precision, tolerance):
    started = runtime.start(RuntimeConfig.parse({"device": "cuda", "precision": precision}))
    plain = ViTConfig.parse(TINY | {"width": 64, "mlp_dim": 128}).build(10, (32, 32)).cuda()
    nn.init.normal_(plain.head.weight)
    images, labels = torch.randn(64, 3, 32, 32, device="cuda"), torch.randint(10, (64,), device="cuda")
    compiled, gradients = started.prepare(copy.deepcopy(plain)), []
    for model in (compiled, plain):
        with started.autocast() if model is compiled else nullcontext():
            loss = F.cross_entropy(model(images).float(), labels)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() < tolerance * expected.norm()


def test_weights_that_stay_in_bf16_answer_the_same(unchecked):
    started = runtime.start(RuntimeConfig.parse({"device": "cpu", "precision": "bf16", "compile": False}))
    plain = ViTConfig.parse(TINY | {"stem": {"layers": [1], "width": 32}, "patch": 1}).build(10, (16, 16)).eval()
    nn.init.normal_(plain.head.weight)
    frozen = started.frozen(copy.deepcopy(plain))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), started.autocast():
        assert torch.equal(frozen(images), plain(images))
    types = {name.rpartition(".")[0].rpartition(".")[2]: p.dtype for name, p in frozen.named_parameters()}
    assert (types["qkv"], types["head"], types["norm1"]) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_patches_as_rows_are_the_convolution():
    conv = nn.Conv2d(3, 10, 4, stride=4)
    images = torch.randn(2, 3, 8, 12)
    expected = conv(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(project_as_rows(conv, images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("residual", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_tokens_between_blocks_are_as_the_recipe_says(unchecked, residual, dtype):
    started = runtime.start(RuntimeConfig.parse({"device": "cpu", "precision": "bf16", "residual": residual}))
    model, seen = ViTConfig.parse(TINY).build(10, (16, 16)), []
    nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)
    started.prepare(model)
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, tokens: seen.append(tokens.dtype))
    with started.autocast():
        logits = model(images).float()
    assert seen == [dtype] * 2
    assert F.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > 0.999


@pytest.mark.parametrize(("instructions", "precision"), [(["amx_bf16"], "bf16"), ([], "fp32")])
def test_a_cpu_computes_in_bf16_if_it_has_instructions_for_it(monkeypatch, instructions, precision):
    monkeypatch.setattr(runtime.cpu, "bf16_instructions", lambda: instructions)
    started = runtime.start(RuntimeConfig.parse({"device": "cpu"}))
    assert (started.precision, started.residual) == (precision, precision)


def test_packed_attention_is_for_gpus():
    with pytest.raises(RecipeError, match="packed is for CUDA in bf16"):
        runtime.start(RuntimeConfig.parse({"device": "cpu", "attention": "packed"}))
    earlier = {"precision": "bf16", "attention": "packed", "compile": True}
    resumed = runtime.start(RuntimeConfig.parse({"device": "cpu"}), earlier)
    assert (resumed.precision, resumed.attention) == ("bf16", "sdpa")


@pytest.mark.parametrize(
    ("capability", "reason", "chosen"),
    [((9, 0), None, "packed"), ((9, 0), "no C compiler", "sdpa"), ((8, 0), None, "sdpa"), ((10, 0), None, "sdpa")],
)
def test_packed_attention_is_chosen_where_it_was_measured_and_can_be_built(monkeypatch, capability, reason, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(runtime.kernels, "why_not", lambda _: reason)
    assert runtime._attention(torch.device("cuda"), "bf16") == chosen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels as a GPU runs them")
@pytest.mark.parametrize(
    ("tokens", "width", "heads"),
    [(197, 768, 12), (64, 256, 4), (128, 64, 1), (129, 384, 6), (256, 128, 2), (257, 1280, 20), (50, 96, 3)],
)
def test_packed_attention_trains_as_torchs_does(tokens, width, heads):
    started = runtime.start(RuntimeConfig.parse({"device": "cuda", "precision": "bf16", "compile": False}))
    images, found = torch.randn(4, tokens, width, device="cuda"), []
    for attention in ("packed", "sdpa"):
        torch.manual_seed(0)
        part = Attention(width, heads, qk_norm=False, norm_eps=1e-6, attention_dropout=0.0, dropout=0.0)
        replace(started, attention=attention).prepare(part)
        with started.autocast():
            answer = part(images)
        found.append((answer, *torch.autograd.grad(answer.float().square().sum(), list(part.parameters()))))
    for packed, plain in zip(*found, strict=True):
        assert (packed - plain).norm() < 0.01 * plain.norm()


def test_checkpointed_blocks_have_the_same_gradients_and_keep_less():
    config = ViTConfig.parse(TINY | {"depth": 6, "dropout": 0.2, "drop_path": 0.3})
    images, gradients, kept = torch.randn(8, 3, 16, 16), [], []
    for checkpoint in (False, True):
        started = runtime.start(RuntimeConfig.parse({"device": "cpu", "precision": "fp32", "checkpoint": checkpoint}))
        torch.manual_seed(0)
        model, storages = started.prepare(config.build(10, (16, 16))).train(), {}
        nn.init.normal_(model.head.weight)

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(images).square().mean()
        kept.append(sum(storage.nbytes() for storage in storages.values()))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a GPU")


@pytest.mark.parametrize(
    ("device", "compiled"),
    [("cpu", False), pytest.param("cuda", False, marks=on_gpu), pytest.param("cuda", True, marks=on_gpu)],
)
def test_answers_that_are_asked_for_early_are_those_of_their_images(unchecked, device, compiled):
    model = ViTConfig.parse(TINY).build(10, (16, 16)).eval()
    nn.init.normal_(model.head.weight)
    started = runtime.start(RuntimeConfig.parse({"device": device, "precision": "fp32", "compile": compiled}))
    classes = tuple(map(str, range(10)))
    predictor = TorchPredictor(started.prepare(model), classes, Preprocessing.parse({"res": 16}), started, "test")
    batches = torch.randint(0, 256, (70, 3, 16, 16), dtype=torch.uint8).split(8)
    expected = [predictor.logits(images) for images in batches]
    asked = predictor.ask(batches[0])
    for number, images in enumerate(batches[1:]):
        earlier, asked = asked, predictor.ask(images)
        assert torch.equal(earlier(), expected[number])
    assert torch.equal(asked(), expected[-1])
    assert not torch.equal(expected[0], expected[1])


def test_batches_that_are_filled_up_answer_the_same():
    model = ViTConfig.parse(TINY).build(10, (16, 16)).eval()
    nn.init.normal_(model.head.weight)
    started = runtime.start(RuntimeConfig.parse({"device": "cpu", "precision": "fp32"}))
    pixels = Preprocessing.parse({"res": 16})
    plain, filled = (
        TorchPredictor(model, tuple(map(str, range(10))), pixels, replace(started, compile=compiled), "test")
        for compiled in (False, True)
    )
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    for count in (4, 2, 9, 1, 4):
        torch.testing.assert_close(filled.logits(images[:count]), plain.logits(images[:count]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_recorded_function_goes_on_as_if_it_were_called():
    device = torch.device("cuda")
    weight = torch.zeros(3, device=device)

    def step(x, share):
        weight.add_(x * share + torch.rand(3, device=device))
        return {"sum": weight.sum()}

    def run(function):
        weight.zero_()
        found = []
        for number in range(8):
            torch.manual_seed(number)
            found.append(function(torch.full((3,), float(number), device=device), 0.5)["sum"].clone())
        return torch.stack(found), weight.clone()

    for found, expected in zip(run(Recorded(step, device)), run(step), strict=True):
        torch.testing.assert_close(found, expected)
