"""Image towers of CLIP, against transformers' CLIPVisionModelWithProjection with its weights renamed."""

import json
import re
from pathlib import Path

import pytest
import torch
from command import TINY, Vit, sets
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vitcli import checkpoint
from vitcli.errors import CheckpointError
from vitcli.weights import Foreign, load

TEXT = {
    "positional_embedding": torch.zeros(77, 8),
    "text_projection": torch.zeros(8, 20),
    "logit_scale": torch.tensor(4.6),
    "token_embedding.weight": torch.zeros(100, 8),
    "ln_final.weight": torch.zeros(8),
    "ln_final.bias": torch.zeros(8),
    "transformer.resblocks.0.ln_1.weight": torch.zeros(8),
    "transformer.resblocks.0.attn.in_proj_weight": torch.zeros(24, 8),
}
NUMBERS = {
    "input_resolution": torch.tensor(32),
    "context_length": torch.tensor(77),
    "vocab_size": torch.tensor(100),
}
RENAMES = (
    (r"^vision_model\.embeddings\.class_embedding", "class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding", "conv1"),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^vision_model\.pre_layrnorm", "ln_pre"),
    (r"^vision_model\.post_layernorm", "ln_post"),
    (r"^vision_model\.encoder\.layers", "transformer.resblocks"),
    (r"\.layer_norm([12])", r".ln_\1"),
    (r"\.self_attn\.out_proj", ".attn.out_proj"),
    (r"\.mlp\.fc1", ".mlp.c_fc"),
    (r"\.mlp\.fc2", ".mlp.c_proj"),
)


@pytest.fixture
def vit(capsys, monkeypatch) -> Vit:
    return Vit(capsys, monkeypatch)


def reference(activation: str = "gelu", heads: int = 3, size: int = 32) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=heads,
        image_size=size,
        patch_size=8,
        projection_dim=20,
        hidden_act=activation,
    )
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def tower(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under the names of OpenAI and open_clip, without `visual.`."""
    state = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    state["proj"] = state.pop("visual_projection.weight").t()
    for i in range(2):
        for part in ("weight", "bias"):
            block = f"transformer.resblocks.{i}."
            qkv = [state.pop(f"{block}self_attn.{name}_proj.{part}") for name in "qkv"]
            state[f"{block}attn.in_proj_{part}"] = torch.cat(qkv)
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def both(model: nn.Module) -> dict[str, Tensor]:
    """Image and text tower."""
    return {f"visual.{name}": value for name, value in tower(model).items()} | TEXT


def embedding(foreign: Foreign, images: Tensor) -> Tensor:
    model = foreign.config.build(foreign.head_classes, foreign.image_size).eval()
    model.load_state_dict(foreign.state)
    return model(images)


@torch.no_grad()
def assert_same(path: Path, model: nn.Module, rtol: float = 1e-5) -> Foreign:
    foreign = load(path)
    images = torch.randn(3, 3, *foreign.image_size, generator=torch.Generator().manual_seed(1))
    expected = model(images).image_embeds
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(embedding(foreign, images), expected, rtol=0, atol=rtol * scale)
    assert (foreign.format, foreign.classes, foreign.head_classes) == ("clip", (), 20)
    assert (foreign.config.pre_norm, foreign.config.norm_eps, foreign.config.pool) == (True, 1e-5, "token")
    return foreign


def test_open_clip(tmp_path):
    model = reference()
    save_file(both(model), tmp_path / "model.safetensors")
    foreign = assert_same(tmp_path / "model.safetensors", model)
    assert foreign.config.activation == "gelu"
    found = checkpoint.load(tmp_path / "model.safetensors").preprocessing
    assert (found.res, found.resize, found.interpolation, found.antialias) == ((32, 32), 32, "bicubic", True)
    assert found.mean == (0.48145466, 0.4578275, 0.40821073)
    assert found.std == (0.26862954, 0.26130258, 0.27577711)


def test_a_bare_tower(tmp_path):
    model = reference()
    save_file(tower(model), tmp_path / "model.safetensors")
    assert_same(tmp_path / "model.safetensors", model)


def test_openai_in_half_precision(tmp_path):
    model = reference("quick_gelu").half().float()
    state = {name: value.half() for name, value in both(model).items()} | NUMBERS
    torch.save(state, tmp_path / "model.pt")
    foreign = assert_same(tmp_path / "model.pt", model)
    assert foreign.config.activation == "quick_gelu"
    assert {value.dtype for value in foreign.state.values()} == {torch.float32}


def test_a_folder_of_open_clip(tmp_path):
    model = reference("quick_gelu", heads=4)
    save_file(both(model), tmp_path / "open_clip_model.safetensors")
    config = {
        "model_cfg": {"quick_gelu": True, "embed_dim": 20, "vision_cfg": {"image_size": 32, "head_width": 12}},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "resize_mode": "squash", "interpolation": "bilinear"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    foreign = assert_same(tmp_path, model)
    assert (foreign.config.heads, foreign.config.activation) == (4, "quick_gelu")
    found = checkpoint.load(tmp_path / "open_clip_model.safetensors").preprocessing
    assert (found.mean, found.resize, found.interpolation) == ((0.1, 0.2, 0.3), None, "bilinear")
    assert found.std == (0.26862954, 0.26130258, 0.27577711)


@torch.no_grad()
@pytest.mark.parametrize("after", [False, True])
def test_average_pooling_without_first_norm(tmp_path, after):
    """CLIPA's towers; the mean is taken outside of the reference."""
    model = reference()
    model.vision_model.pre_layrnorm = nn.Identity()
    save_file(both(model), tmp_path / "open_clip_model.safetensors")
    vision = {"pool_type": "avg", "final_ln_after_pool": after, "no_ln_pre": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
    foreign = load(tmp_path)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens, norm = model.vision_model(images).last_hidden_state[:, 1:], model.vision_model.post_layernorm
    expected = model.visual_projection(norm(tokens.mean(1)) if after else norm(tokens).mean(1))
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(embedding(foreign, images), expected, rtol=0, atol=1e-5 * scale)
    assert (foreign.config.pre_norm, foreign.config.pool, foreign.config.norm_after_pool) == (False, "gap", after)


@torch.no_grad()
def test_layer_scale(tmp_path):
    model = reference()
    state = both(model)
    for i in range(2):
        for n, layer in ((1, "self_attn.out_proj"), (2, "mlp.fc2")):
            gamma = torch.rand(48, generator=torch.Generator().manual_seed(i + n))
            state[f"visual.transformer.resblocks.{i}.ls_{n}.gamma"] = gamma
            linear = model.get_submodule(f"vision_model.encoder.layers.{i}.{layer}")
            linear.weight *= gamma[:, None]  # what the factor after a layer amounts to
            linear.bias *= gamma
    save_file(state, tmp_path / "model.safetensors")
    foreign = assert_same(tmp_path / "model.safetensors", model, rtol=1e-5)
    assert foreign.config.layerscale is not None


# What is refused


def refusal(path: Path, state: dict[str, Tensor]) -> str:
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix(f"{path}: ")


def test_other_towers_are_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    resnet = {"conv1.weight": torch.zeros(4), "attnpool.c_proj.weight": torch.zeros(4)}
    assert "ModifiedResNet" in refusal(path, resnet)
    assert "ModifiedResNet" in refusal(path, {f"visual.{name}": value for name, value in resnet.items()} | TEXT)
    assert "visual.trunk" in refusal(path, {"visual.trunk.pos_embed": torch.zeros(4), **TEXT})
    assert "attentional_pool" in refusal(path, {**both(reference()), "visual.attn_pool.query": torch.zeros(4)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual.transformer.resblocks.1.ln_2.bias": None}, "missing from what looks like a clip file"),
        ({"visual.conv1.weight": None}, "its tensors are those of no known format"),
        ({"visual.surprise": torch.zeros(1)}, "unexpected in a clip file: surprise"),
        ({"surprise": torch.zeros(1)}, "unexpected in a clip file: surprise"),
        ({"visual.proj": torch.zeros(47, 20)}, "head.weight has shape (20, 47), expected (20, 48)"),
        ({"visual.positional_embedding": torch.zeros(19, 48)}, "pos_embed has 19 rows"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(tmp_path, changes, message):
    state = both(reference()) | changes
    state = {name: value for name, value in state.items() if value is not None}
    assert message in refusal(tmp_path / "model.safetensors", state)


@pytest.mark.parametrize("shape", [(), (3,), (3, 5), (2, 3, 4), (1, 1, 1, 1, 1)], ids=str)
def test_any_tensor_of_a_wrong_shape(tmp_path, shape):
    state = tower(reference())
    for name in state:
        refusal(tmp_path / "model.safetensors", {**state, name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_cfg": {"vision_cfg": {"pool_type": "none"}}}, "model_cfg.vision_cfg.pool_type"),
        ({"model_cfg": 3}, "model_cfg"),
        ({"model_cfg": {"vision_cfg": {"image_size": 48}}}, "a grid of 6x6 patches"),
        ({"preprocess_cfg": {"resize_mode": "longest"}}, "preprocess_cfg.resize_mode"),
        ({"preprocess_cfg": {"std": [0, 0, 0]}}, "its preprocessing cannot be used"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(tmp_path, config, message):
    save_file(both(reference()), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_openais_own_files_are_programs_and_the_hint_says_what_to_do(tmp_path):
    program, saved = tmp_path / "ViT-B-32.pt", tmp_path / "saved.pt"
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(program)
    with pytest.raises(CheckpointError) as caught:
        load(program)
    assert "it is a program (TorchScript), and only tensors are read" in str(caught.value)
    assert 'torch.save(torch.jit.load(FILE, "cpu").state_dict(), NEW_FILE)' in caught.value.hint
    torch.save(torch.jit.load(program, "cpu").state_dict(), saved)  # what the hint says
    with pytest.raises(CheckpointError, match="those of no known format: bias, weight"):
        load(saved)


# An embedding is no class


def test_predict_and_eval_say_that_there_are_no_classes(tmp_path, vit):
    save_file(both(reference()), tmp_path / "clip.safetensors")
    Image.new("RGB", (40, 40)).save(tmp_path / "img.png")
    for command in (("predict", tmp_path / "img.png"), ("eval", "--data", "digits")):
        said = vit(*command, "--ckpt", tmp_path / "clip.safetensors")
        assert said.code == 4
        assert "names no classes" in said.err
        assert "vit finetune --ckpt" in said.err


def test_it_is_fine_tuned(tmp_path, vit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(both(reference("quick_gelu")) | NUMBERS, tmp_path / "clip.safetensors")
    short = ("steps=2", "optim.warmup_steps=1", "batch=16", "data.classes=10", "data.workers=0")
    given = ("--data", "digits", "--res", 16, *sets(*short, *TINY[3:4]), "--run", "run")
    said = vit("finetune", "--ckpt", "clip.safetensors", *given)
    assert said.code == 0, said.err
    assert "old head dropped (20 features)" in said.err
    assert "position table stretched 4x4 -> 2x2 (bicubic_antialias)" in said.err
    trained = checkpoint.load(tmp_path / "run")
    assert (trained.config.activation, trained.config.pre_norm, len(trained.classes)) == ("quick_gelu", True, 10)
    assert trained.preprocessing.mean == (0.48145466, 0.4578275, 0.40821073)
