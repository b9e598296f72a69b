"""Arrays in the layouts of Google's two ViT projects, and their answers, written down from the projects' Flax code.

Layouts and computation: vit_jax/models_vit.py, vit_jax/models_resnet.py and big_vision/models/vit.py. Nothing here
knows vitcli.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

RELEASED = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
CURRENT = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")

Arrays = dict[str, np.ndarray]


def shapes(
    *,
    names: tuple[str, ...] = RELEASED,
    width: int = 48,
    depth: int = 2,
    hidden: int = 96,
    heads: int = 3,
    patch: int = 8,
    rows: int = 17,
    table: str | None = "Transformer/posembed_input/pos_embedding",
    cls: bool = True,
    map_head: bool = False,
    representation: int | None = None,
    classes: int | None = 10,
    units: tuple[int, ...] | None = None,
    stem: int = 32,
) -> dict[str, tuple[int, ...]]:
    """Every array's name and shape. `units` are those of each stage of a hybrid's ResNet of width `stem`."""
    norm1, attention, norm2, mlp = names
    out: dict[str, tuple[int, ...]] = {}

    def dense(name: str, *kernel: int) -> None:
        out[f"{name}/kernel"], out[f"{name}/bias"] = kernel, kernel[-1:]

    def norm(name: str, *shape: int) -> None:
        out[f"{name}/scale"] = out[f"{name}/bias"] = shape

    def attend(name: str) -> None:
        for part in ("query", "key", "value"):
            out[f"{name}/{part}/kernel"], out[f"{name}/{part}/bias"] = (
                (width, heads, width // heads),
                (heads, width // heads),
            )
        dense(f"{name}/out", heads, width // heads, width)

    def feed_forward(name: str) -> None:
        dense(f"{name}/Dense_0", width, hidden)
        dense(f"{name}/Dense_1", hidden, width)

    channels = 3
    if units is not None:
        out["conv_root/kernel"], channels = (7, 7, 3, stem), stem
        norm("gn_root", 1, 1, 1, stem)
        for i, count in enumerate(units):
            inner = stem * 2**i
            for j in range(count):
                unit = f"block{i + 1}/unit{j + 1}"
                convs = {"1": (1, 1, channels, inner), "2": (3, 3, inner, inner), "3": (1, 1, inner, 4 * inner)}
                if j == 0:
                    convs["_proj"] = (1, 1, channels, 4 * inner)
                for which, shape in convs.items():
                    out[f"{unit}/conv{which}/kernel"] = shape
                    norm(f"{unit}/gn{which}", 1, 1, 1, shape[-1])
                channels = 4 * inner
    dense("embedding", patch, patch, channels, width)
    if cls:
        out["cls"] = (1, 1, width)
    if table:
        out[table] = (1, rows, width)
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        norm(f"{block}/{norm1}", width)
        attend(f"{block}/{attention}")
        norm(f"{block}/{norm2}", width)
        feed_forward(f"{block}/{mlp}")
    if depth:
        norm("Transformer/encoder_norm", width)
    if map_head:
        out["MAPHead_0/probe"] = (1, 1, width)
        attend("MAPHead_0/MultiHeadDotProductAttention_0")
        norm("MAPHead_0/LayerNorm_0", width)
        feed_forward("MAPHead_0/MlpBlock_0")
    if representation:
        dense("pre_logits", width, representation)
    if classes:
        dense("head", representation or width, classes)
    return out


def arrays(**layout) -> Arrays:
    """Random values, of deviation 0.2, in a layout of `shapes`."""
    random = np.random.default_rng(0)
    return {name: (0.2 * random.standard_normal(shape)).astype(np.float32) for name, shape in shapes(**layout).items()}


def stacked(arrays: Arrays) -> Arrays:
    """The blocks' arrays along a first axis of depth, as big_vision's `scan` keeps them."""
    blocks: dict[str, list[np.ndarray]] = {}
    others = {}
    for name, value in arrays.items():
        if name.startswith("Transformer/encoderblock_"):
            blocks.setdefault(name.split("/", 2)[2], []).append(value)
        else:
            others[name] = value
    return others | {f"Transformer/encoderblock/{name}": np.stack(values) for name, values in blocks.items()}


class Reference:
    """The Flax code's answers, in float64, for images (b, h, w, 3): any layout of `shapes`, with released names or new.

    `pool` is None where the class token or MAP's probe tells; else gap or none.
    """

    def __init__(self, arrays: Arrays, pool: str | None = None, exact_gelu: bool = False):
        self.p = {name: torch.from_numpy(value).double() for name, value in arrays.items()}
        self.names = RELEASED if any(RELEASED[1] in name for name in arrays) else CURRENT
        self.pool, self.approximate = pool, "none" if exact_gelu else "tanh"

    def __call__(self, images: Tensor) -> Tensor:
        x = images.double()
        if "conv_root/kernel" in self.p:
            x = self.resnet(x)
        kernel = self.p["embedding/kernel"]
        side = kernel.shape[0]
        b, h, w, c = x.shape
        patches = x.reshape(b, h // side, side, w // side, side, c).transpose(2, 3)
        x = torch.einsum("bhwijc,ijcd->bhwd", patches, kernel) + self.p["embedding/bias"]
        grid = x.shape[1:3]
        x = x.flatten(1, 2)
        if "Transformer/encoder_norm/scale" in self.p:
            x = self.encoder(self.embed(x, grid))
        x = self.pooled(x)
        if "pre_logits/kernel" in self.p:
            x = self.dense("pre_logits", x).tanh()
        return self.dense("head", x) if "head/kernel" in self.p else x

    def embed(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """vit_jax: class token, then positions for all. big_vision: positions for patches, then class token."""
        table = next((value for name, value in self.p.items() if name.endswith("pos_embedding")), None)
        cls = self.p.get("cls")
        if table is None:
            table = sincos2d(*grid, x.shape[-1])
        if cls is not None and table.shape[1] == x.shape[1] + 1:
            return torch.cat([cls.expand(len(x), -1, -1), x], dim=1) + table
        x = x + table[:, -x.shape[1] :]  # an older table may have a row that is not used
        return x if cls is None else torch.cat([cls.expand(len(x), -1, -1), x], dim=1)

    def encoder(self, x: Tensor) -> Tensor:
        norm1, attention, norm2, mlp = self.names
        i = 0
        while f"Transformer/encoderblock_{i}/{norm1}/scale" in self.p:
            block = f"Transformer/encoderblock_{i}"
            y = self.norm(f"{block}/{norm1}", x)
            x = x + self.attention(f"{block}/{attention}", y, y)
            x = x + self.feed_forward(f"{block}/{mlp}", self.norm(f"{block}/{norm2}", x))
            i += 1
        return self.norm("Transformer/encoder_norm", x)

    def pooled(self, x: Tensor) -> Tensor:
        if "MAPHead_0/probe" in self.p:
            probe = self.p["MAPHead_0/probe"].expand(len(x), -1, -1)
            x = self.attention("MAPHead_0/MultiHeadDotProductAttention_0", probe, x)
            x = x + self.feed_forward("MAPHead_0/MlpBlock_0", self.norm("MAPHead_0/LayerNorm_0", x))
            return x[:, 0]
        if "cls" in self.p:
            return x[:, 0]
        return x if self.pool == "none" else x.mean(dim=1)

    def attention(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        def heads(part: str, of: Tensor) -> Tensor:
            return torch.einsum("bnd,dhk->bnhk", of, self.p[f"{name}/{part}/kernel"]) + self.p[f"{name}/{part}/bias"]

        q, k, v = heads("query", x), heads("key", context), heads("value", context)
        weights = torch.einsum("bnhk,bmhk->bhnm", q / math.sqrt(q.shape[-1]), k).softmax(dim=-1)
        out = torch.einsum("bhnm,bmhk->bnhk", weights, v)
        return torch.einsum("bnhk,hkd->bnd", out, self.p[f"{name}/out/kernel"]) + self.p[f"{name}/out/bias"]

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        x = F.gelu(self.dense(f"{name}/Dense_0", x), approximate=self.approximate)
        return self.dense(f"{name}/Dense_1", x)

    def dense(self, name: str, x: Tensor) -> Tensor:
        return x @ self.p[f"{name}/kernel"] + self.p[f"{name}/bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt() * self.p[f"{name}/scale"] + self.p[f"{name}/bias"]

    def resnet(self, x: Tensor) -> Tensor:
        x = self.group_norm("gn_root", self.conv("conv_root", x, stride=2)).relu()
        x = same(x, 3, 2, -math.inf).permute(0, 3, 1, 2)
        x = F.max_pool2d(x, 3, 2).permute(0, 2, 3, 1)
        stage = 1
        while f"block{stage}/unit1/conv1/kernel" in self.p:
            unit = 1
            while f"block{stage}/unit{unit}/conv1/kernel" in self.p:
                x = self.unit(f"block{stage}/unit{unit}", x, stride=2 if stage > 1 and unit == 1 else 1)
                unit += 1
            stage += 1
        return x

    def unit(self, name: str, x: Tensor, stride: int) -> Tensor:
        y = self.group_norm(f"{name}/gn1", self.conv(f"{name}/conv1", x)).relu()
        y = self.group_norm(f"{name}/gn2", self.conv(f"{name}/conv2", y, stride)).relu()
        y = self.group_norm(f"{name}/gn3", self.conv(f"{name}/conv3", y))
        if f"{name}/conv_proj/kernel" in self.p:
            x = self.group_norm(f"{name}/gn_proj", self.conv(f"{name}/conv_proj", x, stride))
        return (x + y).relu()

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = self.p[f"{name}/kernel"]
        kernel = kernel - kernel.mean(dim=(0, 1, 2))
        kernel = kernel / (kernel.pow(2).mean(dim=(0, 1, 2)).sqrt() + 1e-5)
        x = same(x, kernel.shape[0], stride, 0.0).permute(0, 3, 1, 2)
        return F.conv2d(x, kernel.permute(3, 2, 0, 1), stride=stride).permute(0, 2, 3, 1)

    def group_norm(self, name: str, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        groups = x.reshape(b, h * w, 32, c // 32)
        mean, variance = groups.mean((1, 3), keepdim=True), groups.var((1, 3), correction=0, keepdim=True)
        x = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(b, h, w, c)
        return x * self.p[f"{name}/scale"].flatten() + self.p[f"{name}/bias"].flatten()


def same(x: Tensor, kernel: int, stride: int, value: float) -> Tensor:
    """TensorFlow's SAME padding of images (b, h, w, c)."""
    sides = []
    for n in (x.shape[2], x.shape[1]):
        total = max(0, (math.ceil(n / stride) - 1) * stride + kernel - n)
        sides += [total // 2, total - total // 2]
    return F.pad(x, (0, 0, *sides), value=value)


def sincos2d(h: int, w: int, width: int) -> Tensor:
    """big_vision's posemb_sincos_2d."""
    y, x = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    omega = 1.0 / 10_000 ** (torch.arange(width // 4).double() / (width // 4 - 1))
    y, x = y.flatten()[:, None] * omega, x.flatten()[:, None] * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None]
