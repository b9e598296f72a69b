"""A few lines that run an exported file with onnxruntime, numpy and Pillow alone, for pasting."""

from __future__ import annotations

from vitcli.data import Preprocessing

START = """\
# pip install numpy onnxruntime pillow
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession({file!r}, providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
"""

CROP = """\
width, height = image.size
size = ({side}, {side} * height // width) if width <= height else ({side} * width // height, {side})
{resize}
left, top = round((image.width - {width}) / 2), round((image.height - {height}) / 2)
image = image.crop((left, top, left + {width}, top + {height}))
"""

# Resizing that Pillow does not have: a matrix for each side.
MATRIX = """\
def matrix(old, new):
    at = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    far = np.abs(at - np.arange(-2, old + 2))
    m = {kernel}
    m[:, 2] += m[:, :2].sum(1)
    m[:, -3] += m[:, -2:].sum(1)
    return m[:, 2:-2]
"""
AREA = """\
def matrix(old, new):
    edge = np.arange(new + 1)[:, None] * old / new
    pixel = np.arange(old)
    return np.clip(np.minimum(edge[1:], pixel + 1) - np.maximum(edge[:-1], pixel), 0, None) * new / old
"""
STRETCH = """\
levels = np.einsum("ij,jkc,lk->ilc", matrix(image.height, size[1]), np.asarray(image), matrix(image.width, size[0]))
image = Image.fromarray(np.clip(levels + 0.5, 0, 255).astype(np.uint8))"""
KERNELS = {
    "bilinear": "np.clip(1 - far, 0, None)",
    "bicubic": "np.where(far < 1, (1.25 * far - 2.25) * far**2 + 1, "
    "np.where(far < 2, ((-0.75 * far + 3.75) * far - 6) * far + 3, 0))",
}

NORMALISE = """\
pixels = (np.asarray(image, dtype=np.float32) / 255 - np.float32({mean})) / np.float32({std})
answer = session.run(None, {{"pixel_values": pixels.transpose(2, 0, 1)[None]}})[0][0]
"""
AS_IT_IS = """\
answer = session.run(None, {"images": np.asarray(image)[None]})[0][0]
"""


ONE = "print(classes[answer.argmax()])\n"
SEVERAL = """\
thresholds = json.loads(session.get_modelmeta().custom_metadata_map["thresholds"])
print([name for name, p, least in zip(classes, 1 / (1 + np.exp(-answer)), thresholds) if p >= least])
"""


def snippet(file: str, p: Preprocessing, mode: str, tokens: bool, multi_label: bool = False) -> str:
    """Python that prints the class of photo.jpg, or where it is `multi_label` its classes. `mode` is --preprocess;
    `tokens`: an answer for each token.
    """
    text = START.format(file=file)
    if mode != "full":
        text = _resize(text, p)
    text += AS_IT_IS if mode != "none" else NORMALISE.format(mean=list(p.mean), std=list(p.std))
    return text + ("answer = answer.mean(0)\n" if tokens else "") + (SEVERAL if multi_label else ONE)


def _resize(text: str, p: Preprocessing) -> str:
    height, width = p.res
    step = f"image = image.resize(size, Image.Resampling.{p.interpolation.upper()})"
    if p.interpolation == "area" or (p.interpolation in KERNELS and not p.antialias):
        matrix = AREA if p.interpolation == "area" else MATRIX.format(kernel=KERNELS[p.interpolation])
        text, step = text.replace("\nsession", f"\n\n{matrix}\n\nsession", 1), STRETCH
    if p.resize is None:
        return text + f"size = ({width}, {height})\n{step}\n"
    return text + CROP.format(side=p.resize, width=width, height=height, resize=step)
