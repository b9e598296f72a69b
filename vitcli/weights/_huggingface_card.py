"""README.md of a folder for transformers: what the model is, how to open it, its classes and its preprocessing."""

from vitcli import __version__
from vitcli.weights import Foreign
from vitcli.weights._huggingface_processor import note
from vitcli.weights._json import Pixels

SHOWN = 20  # classes by name


def card(foreign: Foreign, pixels: Pixels, class_name: str) -> str:
    """The text, in Markdown with the front matter of a model card."""
    c, (height, width) = foreign.config, foreign.image_size
    parameters = sum(value.numel() for value in foreign.state.values())
    task = ["pipeline_tag: image-classification"] if foreign.head_classes else []
    lines = [
        "---",
        "library_name: transformers",
        *task,
        "---",
        "",
        f"# Vision Transformer, {height}x{width}",
        "",
        f"{parameters / 1e6:.1f} million parameters: {c.depth} blocks of {c.heads} heads, {c.width} channels, patches "
        f"of {c.patch}x{c.patch} pixels. A `{class_name}` of transformers, written by vitcli {__version__}.",
        "",
        "## How to open it",
        "",
        *_opening(foreign, class_name),
        "",
        "`vit predict img.jpg --ckpt FOLDER` names what is in an image.",
        "",
        "## Preprocessing",
        "",
        *_preprocessing(pixels),
    ]
    if foreign.classes:
        lines += ["", f"## Its {len(foreign.classes)} classes", "", _classes(foreign.classes)]
    if foreign.thresholds:
        several = "An image may be of several: a class applies where the sigmoid of its logit reaches its threshold"
        lines += ["", f"{several}, the `vitcli.thresholds` in config.json."]
    return "\n".join(lines) + "\n"


def _opening(foreign: Foreign, class_name: str) -> list[str]:
    auto, result = (
        ("AutoModelForImageClassification", "logits") if foreign.head_classes else ("AutoModel", "last_hidden_state")
    )
    pooler = ", add_pooling_layer=False" if class_name in ("ViTModel", "DeiTModel") else ""
    if foreign.config.representation_size:
        pooler = ""
    return [
        "```python",
        f"from transformers import AutoImageProcessor, {auto}",
        'processor = AutoImageProcessor.from_pretrained("FOLDER", backend="pil")',
        f'model = {auto}.from_pretrained("FOLDER"{pooler})',
        f'{result} = model(**processor(image, return_tensors="pt")).{result}',
        "```",
    ]


def _preprocessing(pixels: Pixels) -> list[str]:
    height, width = pixels.res
    how = f"{pixels.interpolation}{'' if pixels.antialias else ', without antialias'}"
    resize = (
        f"shorter side to {pixels.resize} ({how}), then the central {height}x{width} pixels"
        if pixels.resize
        else f"the whole image stretched to {height}x{width} ({how})"
    )
    mean, std = _triple(pixels.mean), _triple(pixels.std)
    lines = [f"Images are RGB: {resize}; then (pixel / 255 - mean) / std with mean {mean} and std {std}."]
    if said := note(pixels):
        lines += ["", f"transformers answers a little otherwise than vit: {said}."]
    lines += [
        "",
        'With `backend="pil"` transformers rounds pixels as vit does; its usual one is up to 3 levels of 255 beside.',
    ]
    if pixels.resize:
        lines.append("Where the crop cannot be central to the pixel, it may lie a pixel beside that of vit.")
    return lines


def _triple(values: tuple[float, float, float]) -> str:
    return ", ".join(f"{value:g}" for value in values) if len(set(values)) > 1 else f"{values[0]:g}"


def _classes(names: tuple[str, ...]) -> str:
    """The first names as code, so that nothing in a name is Markdown."""
    shown = ", ".join(
        f"`{ascii(name)[1:-1] if not name.isprintable() else name.replace('`', chr(39))}`" for name in names[:SHOWN]
    )
    return shown + (f" and {len(names) - SHOWN} more, in config.json." if len(names) > SHOWN else ".")
