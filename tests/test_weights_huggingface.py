"""transformers in and out: its models give the same logits here, and ours there."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from command import TINY, Vit, sets
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from torch import nn

from vitcli import checkpoint
from vitcli.checkpoint import Trained
from vitcli.data import Preprocessing, imagenet
from vitcli.data.preprocess import normalise, prepare
from vitcli.errors import CheckpointError
from vitcli.exporters import huggingface as to_huggingface
from vitcli.model import ViTConfig
from vitcli.model.vit import ViT
from vitcli.weights import Foreign, huggingface, load

MLP = {"intermediate_size": 96}
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
CLASSES = ("cat", "dog", "owl")
LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: index for index, name in enumerate(CLASSES)}}


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """transformers draws bars, and its SigLIP warns of its own defaults."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity_warning()


def peer(model: str, **numbers) -> transformers.PreTrainedModel:
    """A small model of transformers with random values everywhere."""
    kind = getattr(transformers, model)
    sections = {"vision_config": SIZES | MLP, "text_config": TEXT} if "vision_config" in numbers else SIZES
    torch.manual_seed(0)
    built = kind(kind.config_class(**{**sections, **{k: v for k, v in numbers.items() if k != "vision_config"}})).eval()
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.2)
    return built


def ours(foreign: Foreign) -> ViT:
    model = foreign.config.build(foreign.head_classes, foreign.image_size).eval()
    model.load_state_dict(foreign.state)
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def refusal(path: Path) -> str:
    """The message with which a folder is refused: one line, that says which folder."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{path}: ")


def rewrite(file: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# Reading: transformers' models, and which of their outputs ours is.

PEERS = {
    "ViT": (lambda: peer("ViTForImageClassification", **MLP, **LABELS), "logits"),
    "ViT with other numbers": (
        lambda: peer(
            "ViTForImageClassification",
            **MLP,
            **LABELS | {"num_attention_heads": 2, "image_size": [32, 48], "hidden_act": "quick_gelu"},
            layer_norm_eps=1e-2,
            qkv_bias=False,
        ),
        "logits",
    ),
    "ViT without head": (lambda: peer("ViTModel", **MLP), "pooler_output"),
    "DeiT with teacher": (lambda: peer("DeiTForImageClassificationWithTeacher", **MLP, **LABELS), "logits"),
    "DeiT without teacher": (lambda: peer("DeiTForImageClassification", **MLP, **LABELS), "logits"),
    "DINOv2": (lambda: peer("Dinov2ForImageClassification", mlp_ratio=2, **LABELS), "logits"),
    "DINOv2 without head": (lambda: peer("Dinov2Model", mlp_ratio=2), "pooler_output"),
    "DINOv2 with SwiGLU": (lambda: peer("Dinov2ForImageClassification", use_swiglu_ffn=True, **LABELS), "logits"),
    "DINOv2 with registers": (
        lambda: peer("Dinov2WithRegistersForImageClassification", mlp_ratio=2, num_register_tokens=3, **LABELS),
        "logits",
    ),
    "SigLIP": (lambda: peer("SiglipForImageClassification", vision_config=True, **LABELS), "logits"),
    "SigLIP's tower": (lambda: peer("SiglipVisionModel", **MLP), "pooler_output"),
    "CLIP's tower": (lambda: peer("CLIPVisionModel", **MLP), "pooler_output"),
    "CLIP's projection": (lambda: peer("CLIPVisionModelWithProjection", projection_dim=24, **MLP), "image_embeds"),
}
CLASSIFIERS = {name: make for name, (make, output) in PEERS.items() if output == "logits"}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("names", ["saved", "in memory"])
def test_logits_of_transformers(tmp_path, name, names):
    make, output = PEERS[name]
    reference = make()
    reference.save_pretrained(tmp_path)
    if names == "in memory":  # transformers 5 has other names there than in its files
        state = {name: value.contiguous() for name, value in reference.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
    foreign = load(tmp_path)
    x = images(2, 3, *foreign.image_size)
    with torch.no_grad():
        expected = reference(pixel_values=x)[output]
    assert_same(ours(foreign)(x), expected)
    assert foreign.format == "huggingface"
    assert foreign.classes == {"logits": CLASSES, "pooler_output": None, "image_embeds": ()}[output]


@pytest.mark.parametrize("model", ["CLIPModel", "SiglipModel"])
def test_image_tower_of_a_model_with_text(tmp_path, model):
    reference = peer(model, vision_config=True)
    reference.save_pretrained(tmp_path)
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        features = reference.vision_model(pixel_values=x).pooler_output
        expected = reference.visual_projection(features) if model == "CLIPModel" else features
    foreign = load(tmp_path)
    assert_same(ours(foreign)(x), expected)
    assert foreign.classes in ((), None)


def test_golden_file_of_transformers(shared):
    foreign = load(shared / "golden/hf_vit")
    io = np.load(shared / "golden/hf_vit_io.npz")
    logits = ours(foreign)(torch.from_numpy(io["images"]))
    np.testing.assert_allclose(logits.detach().numpy(), io["logits"], rtol=0, atol=1e-5)
    assert (foreign.config.norm_eps, foreign.config.activation, foreign.config.heads) == (1e-12, "gelu", 3)
    assert foreign.classes is None


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_bare_file_has_the_usual_numbers(tmp_path, suffix):
    reference = peer("ViTForImageClassification", **MLP | {"num_attention_heads": 3})
    file = tmp_path / f"vit.{suffix}"  # no name of a folder's file, so no config.json counts
    save_file(reference.state_dict(), file) if suffix == "safetensors" else torch.save(reference.state_dict(), file)
    (tmp_path / "config.json").write_text('{"hidden_act": "relu"}')
    foreign = load(file)
    x = images(2, 3, 32, 32)
    assert_same(ours(foreign)(x), reference(pixel_values=x).logits)
    assert foreign.config.norm_eps == 1e-12
    assert Preprocessing.parse(foreign.preprocessing) == Preprocessing(res=(32, 32))


def test_dinov2_at_the_size_of_its_preprocessing(tmp_path):
    """Its folders have tables for 518 pixels and preprocessing to 224, and transformers stretches at each image."""
    for model in ("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"):
        reference = peer(model, mlp_ratio=2, image_size=40)
        reference.save_pretrained(tmp_path)
        write_processor(tmp_path, size={"shortest_edge": 28}, crop_size={"height": 24, "width": 24})
        foreign = load(tmp_path)
        assert foreign.image_size == (24, 24)
        x = images(2, 3, 24, 24)
        assert_same(ours(foreign)(x), reference(pixel_values=x).logits)


def test_classes(tmp_path):
    words = tuple(map(imagenet.name, imagenet.WNIDS))
    reference = peer("ViTForImageClassification", **MLP, id2label=dict(enumerate(words)))
    reference.save_pretrained(tmp_path)
    assert load(tmp_path).classes == words
    assert checkpoint.load(tmp_path).classes == imagenet.WNIDS
    assert imagenet.as_ids(tuple(name.split(",")[0].upper() for name in words)) == imagenet.WNIDS
    assert imagenet.as_ids((*words[1:], words[0])) == (*words[1:], words[0])
    rewrite(tmp_path / "config.json", id2label={str(index): f"LABEL_{index}" for index in range(1000)})
    assert load(tmp_path).classes is None


# Reading: preprocessing


def write_processor(folder: Path, **content) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, {"resize": None, "interpolation": "bilinear", **HALVES}),
        ({"size": 32, "resample": 3}, {"resize": None, "interpolation": "bicubic", **HALVES}),
        ({"size": {"height": 32, "width": 32}, "resample": 0}, {"interpolation": "nearest", **HALVES}),
        (
            {"size": 36, "crop_size": 32, "do_center_crop": True, "feature_extractor_type": "DeiTFeatureExtractor"},
            {"resize": 36, **HALVES},
        ),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, {"resize": 40, **HALVES}),
        ({"size": {"height": 32, "width": 32}, "crop_size": 24, "do_center_crop": False}, {"resize": None, **HALVES}),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}, {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}),
        ({"do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]}, HALVES),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}, HALVES),
    ],
    ids=str,
)
def test_preprocessing(tmp_path, content, expected):
    peer("ViTForImageClassification", **MLP, **LABELS).save_pretrained(tmp_path)
    write_processor(tmp_path, **content)
    preprocessing = checkpoint.load(tmp_path).preprocessing
    found = {key: getattr(preprocessing, key) for key in expected}
    assert found == {key: pytest.approx(value) if key in HALVES else value for key, value in expected.items()}
    assert preprocessing.res == (32, 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"resample": 1}, "preprocessor_config.json: resample: Input should be 0, 2 or 3"),
        ({"size": "big"}, "preprocessor_config.json: size: "),
        ({"size": 0}, "preprocessor_config.json: size.height: Input should be greater than 0"),
        ({"size": 10**9}, "preprocessor_config.json: size.height: Input should be less than or equal to 4096"),
        ({"size": {"shortest_edge": 4}}, "images of 4x4 are smaller than a patch of 8"),
        ({"image_std": [0, 1, 1]}, "preprocessor_config.json: image_std.0: Input should be greater than 0"),
        ({"image_mean": [0, 1]}, "preprocessor_config.json: image_mean"),
        ({"size": 24, "crop_size": 32}, "a shorter side of 24 is too little for a crop of 32"),
    ],
    ids=str,
)
def test_preprocessing_that_cannot_be_used(tmp_path, content, message):
    peer("ViTForImageClassification", **MLP).save_pretrained(tmp_path)
    write_processor(tmp_path, **content)
    assert message in refusal(tmp_path)


# Reading: what is refused


def folder_with(tmp_path: Path, model: str = "ViTForImageClassification", **changes) -> Path:
    """A folder of transformers with some tensors changed, added or, by None, left out."""
    peer(model, **MLP, **LABELS).save_pretrained(tmp_path)
    state = {**load_file(tmp_path / "model.safetensors"), **changes}
    save_file({name: value for name, value in state.items() if value is not None}, tmp_path / "model.safetensors")
    return tmp_path


LAYER = "vit.encoder.layer.1."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({LAYER + "output.dense.bias": None}, "missing from what looks like a huggingface file: blocks.1.mlp.fc2.bias"),
        ({LAYER + "attention.attention.key.weight": None}, "tensor blocks.1.attn.k.weight is missing"),
        ({LAYER + "attention.attention.query.bias": None}, "blocks.1.attn.qkv.bias"),
        ({"vit.embeddings.cls_token": None}, "pos_embed has 17 rows"),
        ({"vit.embeddings.position_embeddings": None}, "its tensors are those of no known format"),
        ({"vit.surprise": torch.zeros(1)}, "unexpected in a huggingface file: surprise"),
        ({"layernorm.bias": torch.zeros(48)}, "unexpected in a huggingface file: vit.layernorm.bias"),
        ({"vit.layernorm.bias": torch.zeros(47)}, "norm.bias has shape (47,), expected (48,)"),
        ({"vit.layernorm.bias": torch.full((48,), torch.nan)}, "norm.bias holds NaN or infinity"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(tmp_path, changes, message):
    assert message in refusal(folder_with(tmp_path, **changes))


@pytest.mark.parametrize("shape", [(), (3, 5)], ids=str)
@pytest.mark.parametrize("model", ["ViTForImageClassification", "CLIPVisionModel", "SiglipVisionModel"])
def test_any_tensor_of_a_wrong_shape(tmp_path, model, shape):
    peer(model, **MLP, num_hidden_layers=1).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in state:
        save_file({**state, name: torch.zeros(shape)}, tmp_path / "model.safetensors")
        refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "config.json: hidden_act 'relu' is none of gelu, "),
        ({"num_attention_heads": 7}, "width 48 is not divisible by heads 7"),
        ({"num_attention_heads": "many"}, "config.json: num_attention_heads: Input should be a valid integer"),
        ({"layer_norm_eps": 0}, "config.json: layer_norm_eps: Input should be greater than 0"),
        ({"image_size": 64}, "pos_embed has 17 rows, which is not a grid of 8x8 patches"),
        ({"image_size": "large"}, "config.json: image_size"),
        ({"id2label": {"0": "cat"}}, "config.json names 1 classes, the head has 3"),
        ({"id2label": ["cat", "dog", "owl"]}, "config.json: id2label: Input should be a valid dictionary"),
        ({"vitcli": {"preprocessing": {"res": [1, 1]}}}, "config.json: vitcli.preprocessing.interpolation"),
        ({"vitcli": {"posemb_resize": "magic"}}, "Input should be 'bilinear'"),
    ],
    ids=str,
)
def test_config_that_does_not_fit(tmp_path, changes, message):
    folder = folder_with(tmp_path)
    rewrite(folder / "config.json", **changes)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: peer("DINOv3ViTModel", **MLP), "it is DINOv3, whose rotary positions no model here has"),
        (lambda: peer("CLIPForImageClassification", vision_config=True, **LABELS), "it is CLIPForImageClassification"),
        (lambda: peer("ViTModel", pooler_act="relu", **MLP), "its pooler ends with 'relu', not with tanh"),
        (lambda: peer("BeitModel", **MLP), "its tensors are those of no known format"),
    ],
    ids=["DINOv3", "CLIP's classifier", "pooler", "BEiT"],
)
def test_models_that_are_none_of_ours(tmp_path, make, message):
    make().save_pretrained(tmp_path)
    assert message in refusal(tmp_path)


# Reading: shards


def shards(folder: Path, suffix: str = "safetensors") -> Path:
    """A folder whose weights are in two files, and its index."""
    reference = peer("ViTForImageClassification", **MLP, **LABELS)
    reference.save_pretrained(folder)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    listed = {name: f"{stem}-0000{1 + index % 2}-of-00002.{suffix}" for index, name in enumerate(state)}
    for shard in set(listed.values()):
        part = {name: value for name, value in state.items() if listed[name] == shard}
        save_file(part, folder / shard) if suffix == "safetensors" else torch.save(part, folder / shard)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path, suffix):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    peer("ViTForImageClassification", **MLP, **LABELS).save_pretrained(whole)
    index = shards(parts, suffix)
    expected = load(whole)
    for path in (parts, index) if suffix == "safetensors" else (parts,):
        found = load(path)
        assert found.classes == CLASSES
        assert all(torch.equal(found.state[name], value) for name, value in expected.state.items())


def test_shards_in_the_cache_of_the_hub(tmp_path):
    """There every file is a link to one elsewhere."""
    index = shards(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in index.parent.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert load(tmp_path / "snapshot").classes == CLASSES


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../model.safetensors", "lists '../model.safetensors', which is no file beside it"),
        ("/etc/passwd", "lists '/etc/passwd', which is no file beside it"),
        ("..", "lists '..', which is no file beside it"),
        ("", "lists '', which is no file beside it"),
        ("a\0b", r"lists 'a\x00b', which is no file beside it"),
        ("model.safetensors.index.json", "differ over 'classifier.bias'"),
        ("model-00002-of-00002.safetensors", "differ over 'classifier.bias'"),
        (7, "has no weight_map of files by tensor"),
    ],
    ids=str,
)
def test_index_that_cannot_be_followed(tmp_path, shard, message):
    index = shards(tmp_path)
    save_file({"classifier.bias": torch.zeros(3)}, tmp_path.parent / "model.safetensors")
    listed = json.loads(index.read_text())["weight_map"]
    assert listed["classifier.bias"] == "model-00001-of-00002.safetensors"
    rewrite(index, weight_map=listed | {"classifier.bias": shard})
    assert message in refusal(tmp_path)


# Writing

SMALL = {"width": 48, "depth": 2, "mlp_dim": 96, "heads": 4, "patch": 8}
SCALED = {"layerscale": 0.1}
EXPRESSED = {
    "token": ("ViTForImageClassification", {}),
    "tanh": ("ViTForImageClassification", {"activation": "gelu", "norm_eps": 1e-3, "posemb_resize": "bicubic_corners"}),
    "not square": ("ViTForImageClassification", {"size": (32, 48), "activation": "quick_gelu"}),
    "no class row": ("ViTForImageClassification", {"posemb_class": False}),
    "sincos2d": ("ViTForImageClassification", {"posemb": "sincos2d"}),
    "sincos2d_mae": ("ViTForImageClassification", {"posemb": "sincos2d_mae", "posemb_class": True}),
    "no positions": ("ViTForImageClassification", {"posemb": "none"}),
    "distilled": ("DeiTForImageClassificationWithTeacher", {"distilled": True}),
    "distilled, no rows": ("DeiTForImageClassificationWithTeacher", {"distilled": True, "posemb_class": False}),
    "gap": ("SiglipForImageClassification", {"pool": "gap"}),
    "gap, sincos2d": ("SiglipForImageClassification", {"pool": "gap", "posemb": "sincos2d"}),
    "dinov2": ("Dinov2ForImageClassification", {"pool": "token_gap", **SCALED}),
    "registers": ("Dinov2WithRegistersForImageClassification", {"pool": "token_gap", "registers": 3, **SCALED}),
    "swiglu": (
        "Dinov2ForImageClassification",
        {"pool": "token_gap", "activation": "swiglu", "mlp_dim": 128, **SCALED},
    ),
    "features, no rows": ("ViTModel", {"classes": 0, "posemb_class": False}),
    "pre_logits": ("ViTModel", {"classes": 0, "representation_size": 24}),
    "features of gap": ("SiglipVisionModel", {"classes": 0, "pool": "gap"}),
    "features of map": ("SiglipVisionModel", {"classes": 0, "pool": "map"}),
    "features of dinov2": ("Dinov2Model", {"classes": 0, **SCALED}),
}
FIXED = ("sincos2d", "sincos2d_mae", "no positions", "gap, sincos2d")


def trained(classes: int = 3, size: tuple[int, int] = (32, 32), **config) -> Trained:
    """A model of ours with random values everywhere."""
    described = ViTConfig(**{**SMALL, **config})
    torch.manual_seed(0)
    model = described.build(classes, size).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    preprocessing = Preprocessing(res=size, interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    return Trained(model, described, CLASSES[:classes], size, preprocessing, "a random model")


def opened(folder: Path, model: ViT) -> transformers.PreTrainedModel:
    """The folder in transformers, which must find every tensor, and no other."""
    auto = transformers.AutoModelForImageClassification if model.classes else transformers.AutoModel
    bare = not model.classes and model.config.pool == "token" and not model.config.layerscale
    options = {"add_pooling_layer": False} if bare and not model.config.representation_size else {}
    found, report = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert {key for key, value in report.items() if value} == set()
    return found.eval()


def written(source: Trained, out: Path) -> Path:
    """The folder of a model, without the exporter's comparisons."""
    pixels = source.preprocessing.model_dump(mode="json")
    state, classes = source.model.state_dict(), source.classes
    huggingface.write(Foreign("", source.config, state, source.model.classes, source.image_size, pixels, classes), out)
    return out


@pytest.mark.parametrize("name", EXPRESSED)
def test_transformers_opens_what_is_written(tmp_path, name):
    expected_class, config = EXPRESSED[name]
    source = trained(**config)
    found = opened(written(source, tmp_path / "model"), source.model)
    assert type(found).__name__ == expected_class
    x = images(2, 3, *source.image_size)
    with torch.no_grad():
        answer = found(pixel_values=x)
        expected = source.model(x)
    if source.classes:
        assert_same(answer.logits, expected)
        assert tuple(found.config.id2label[index] for index in range(3)) == CLASSES
    elif source.config.pool == "map" or source.config.representation_size:
        assert_same(answer.pooler_output, expected)
    else:
        tokens = answer.last_hidden_state
        assert_same(tokens[:, 0] if source.config.class_token else tokens.mean(1), expected)


@pytest.mark.parametrize("name", EXPRESSED)
def test_round_trip_to_the_bit(tmp_path, name):
    source = trained(**EXPRESSED[name][1])
    back = checkpoint.load(written(source, tmp_path / "model"))
    state = back.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in source.model.state_dict().items())
    assert back.classes == source.classes
    assert (back.image_size, back.preprocessing) == (source.image_size, source.preprocessing)
    learned = {"posemb": "learned"} if name in FIXED else {}
    assert back.config == source.config.model_copy(update=learned)
    written(back, tmp_path / "again")
    for file in ("model.safetensors", "config.json", "preprocessor_config.json", "README.md"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_export(tmp_path):
    report = to_huggingface.export(trained(), tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md",
    }  # fmt: skip
    assert report.parity.agreement == 1
    assert report.details == {"tensors": 32}


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name != "DeiT without teacher"])
def test_files_of_transformers_come_back_to_the_bit(tmp_path, name):
    CLASSIFIERS[name]().save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    huggingface.write(load(tmp_path), tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    lost = {name for name in before if name not in after}
    assert all(name.startswith("vision_model.head.") for name in lost)  # which no classifier reads
    for key, value in after.items():
        same = value if key in before else torch.zeros_like(value)  # biases that were left out
        assert torch.equal(before.get(key, same), value) or key.endswith("mask_token")


REFUSED = {
    "a ResNet before the patches": {"patch": 1, "stem": {"layers": (1,), "width": 32}},
    "qk_norm": {"qk_norm": True},
    "a norm before the blocks (pre_norm)": {"pre_norm": True},
    "the last norm after pooling (norm_after_pool)": {"norm_after_pool": True},
    "pool: none": {"pool": "none"},
    "pool: map with a head": {"pool": "map"},
    "pool: token_gap without LayerScale": {"pool": "token_gap"},
    "pool: gap beside a class token": {"pool": "gap", "class_token": True},
    "registers without LayerScale": {"registers": 2},
    "swiglu without LayerScale": {"activation": "swiglu"},
    "representation_size": {"representation_size": 24},
    "LayerScale and pool: token": SCALED,
    "LayerScale and a distillation token": {"distilled": True, **SCALED},
    "LayerScale and an MLP of 100 channels": {"pool": "token_gap", "mlp_dim": 100, **SCALED},
    "images of 32x48 and pool: gap": {"pool": "gap", "size": (32, 48)},
    "depth: 0": {"depth": 0, "pool": "gap", "posemb": "none"},
}


@pytest.mark.parametrize("part", REFUSED)
def test_what_transformers_has_no_word_for_is_named(tmp_path, part):
    with pytest.raises(CheckpointError) as caught:
        to_huggingface.export(trained(**REFUSED[part]), tmp_path / "model")
    assert str(caught.value) == f"transformers has no model with {part}"
    assert list(tmp_path.iterdir()) == []


def photographs() -> list[Image.Image]:
    return [Image.fromarray(photo) for photo in load_sample_images().images]


@pytest.mark.parametrize(
    "how",
    [
        {"interpolation": "bilinear"},
        {"interpolation": "bicubic", "res": (32, 48)},
        {"interpolation": "nearest"},
        {"interpolation": "bicubic", "resize": 42},  # 62 wide, so the crop begins at a whole pixel
    ],
    ids=str,
)
def test_processor_of_transformers_makes_the_same_pixels(tmp_path, how):
    source = trained(size=how.get("res", (32, 32)))
    preprocessing = Preprocessing(**{"res": (32, 32), **how, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)})
    written(Trained(**{**vars(source), "preprocessing": preprocessing}), tmp_path / "model")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    found = processor(photographs(), return_tensors="pt").pixel_values
    expected = normalise(torch.stack([prepare(photo, preprocessing) for photo in photographs()]), preprocessing)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert "otherwise" not in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"interpolation": "area", "resize": 40}, "it cannot average the covered pixels (interpolation: area)"),
        ({"interpolation": "bilinear", "antialias": False}, "this model was made for bilinear without"),
    ],
)
def test_preprocessing_beyond_transformers_is_said_and_kept(tmp_path, how, said):
    source = trained()
    preprocessing = Preprocessing(**{"res": (32, 32), **how})
    report = to_huggingface.export(Trained(**{**vars(source), "preprocessing": preprocessing}), tmp_path / "model")
    assert said in (tmp_path / "model" / "README.md").read_text()
    assert said in report.details["in transformers"]
    assert checkpoint.load(tmp_path / "model").preprocessing == preprocessing
    # Once somebody has changed the file that transformers obeys, it decides here too.
    rewrite(tmp_path / "model" / "preprocessor_config.json", resample=3)
    changed = checkpoint.load(tmp_path / "model").preprocessing
    assert (changed.interpolation, changed.antialias) == ("bicubic", True)


def test_a_folder_that_transformers_trained_on(tmp_path):
    """What it changes counts, though what we wrote for ourselves stays in its config.json."""
    source = trained(posemb_class=False)
    written(source, tmp_path / "model")
    theirs = opened(tmp_path / "model", source.model)
    with torch.no_grad():
        theirs.vit.embeddings.position_embeddings += 1
    theirs.save_pretrained(tmp_path / "tuned")
    assert "posemb_class" in json.loads((tmp_path / "tuned" / "config.json").read_text())["vitcli"]
    foreign = load(tmp_path / "tuned")
    assert foreign.config.posemb_class
    x = images(2, 3, 32, 32)
    assert_same(ours(foreign)(x), theirs(pixel_values=x).logits)


def test_card_shows_names_as_they_are(tmp_path):
    source = trained()
    named = Trained(**{**vars(source), "classes": ("`a`", "<b>\n# c", "Glühwürmchen")})
    written(named, tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "`'a'`, `<b>\\n# c`, `Glühwürmchen`." in text
    assert checkpoint.load(tmp_path / "model").classes == named.classes


# The commands, and the folders of a run


@pytest.fixture
def vit(capsys, monkeypatch) -> Vit:
    return Vit(capsys, monkeypatch)


def test_deit_goes_through_transformers_unchanged(vit, shared, tmp_path):
    weights = shared / "data/deit_tiny_patch16_224.pth"
    said = vit("export", "--to", "huggingface", "--ckpt", weights, "-o", tmp_path / "deit", "--json")
    assert said.code == 0, said.err
    photos = sorted((shared / "data/imagenet200").glob("*/*.JPEG"))[::60]
    answers = [
        vit("predict", *photos, "--ckpt", ckpt, "--json").json["images"] for ckpt in (weights, tmp_path / "deit")
    ]
    assert answers[0] == answers[1]

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "deit", backend="pil")
    pipe = transformers.pipeline(
        "image-classification", str(tmp_path / "deit"), image_processor=processor, device="cpu"
    )
    central = [image for image in answers[0] if crop_is_central(image["path"])]
    assert len(central) > 2
    for image in central:
        for theirs, mine in zip(pipe(image["path"], top_k=5), image["top"], strict=True):
            assert theirs["label"] == imagenet.name(mine["class"])
            assert theirs["score"] == pytest.approx(mine["probability"], abs=1e-5)


def crop_is_central(path: str) -> bool:
    """Whether both round the place of a crop to 224 from a shorter side of 256 to the same pixel."""
    with Image.open(path) as image:
        width, height = image.size
    longer = 256 * max(width, height) // min(width, height)
    return (longer - 224) % 4 != 3


@pytest.mark.parametrize(
    "model",
    ["pool: gap, posemb: sincos2d", "pool: token", "pool: gap, qk_norm: true"],
    ids=["gap", "token", "not in transformers"],
)
def test_best_and_last_of_a_run(vit, tmp_path, model):
    tiny = [value for value in TINY if not value.startswith(("model=", "optim="))]
    few = sets(*tiny, f"model={{width: 32, depth: 1, mlp_dim: 64, heads: 2, patch: 2, {model}}}", "steps=4")
    said = vit("pretrain", "quickstart", *few, "--set", "optim.warmup_steps=1", "--run", tmp_path / "run")
    assert said.code == 0, said.err
    last = checkpoint.load(tmp_path / "run" / "last")
    step = checkpoint.load(tmp_path / "run" / "checkpoints" / "step_00000004")
    for name, value in step.model.state_dict().items():
        assert torch.equal(last.model.state_dict()[name], value)
    assert (last.recipe, last.classes, last.config) == (step.recipe, step.classes, step.config)
    assert last.origin.endswith("(step 4)")

    card = (tmp_path / "run" / "last" / "README.md").read_text()
    if "qk_norm" in model:
        assert card == "A model for `vit`, not for transformers: transformers has no model with qk_norm.\n"
        return
    theirs = opened(tmp_path / "run" / "last", last.model)
    x = images(3, 3, 8, 8)
    assert_same(theirs(pixel_values=x).logits, last.model(x))
    (tmp_path / "run" / "last" / "manifest.json").unlink()  # as somebody hands it on
    handed_on = checkpoint.load(tmp_path / "run" / "last")
    assert handed_on.recipe is None
    assert (handed_on.classes, handed_on.preprocessing) == (last.classes, last.preprocessing)
    assert_same(handed_on.model(x), last.model(x))
