"""From images to a row of tokens: patches, for the hybrids after a ResNet (vit_jax/models_resnet.py)."""

import math
from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbed(nn.Module):
    """Cuts an image, or the feature map of `backbone`, into patches and maps each to a token."""

    def __init__(self, channels: int, patch: int, width: int, backbone: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone or nn.Identity()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        lecun_normal(self.proj)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        return self.project(self.backbone(images))

    def project(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """The convolution, which a runtime may replace by `project_as_rows`."""
        return self.proj(images).flatten(2).transpose(1, 2)


def project_as_rows(conv: nn.Conv2d, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
    """A convolution whose windows do not overlap, as one matrix product: what it is, and faster on a GPU."""
    side = conv.kernel_size[0]
    windows = images.unflatten(2, (-1, side)).unflatten(4, (-1, side))  # b c y p x q
    return F.linear(windows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), conv.weight.flatten(1), conv.bias)


def resize_patches(kernel: Float[Tensor, "d c p p"], patch: int) -> Float[Tensor, "d c q q"]:
    """A patch kernel for patches of another side, by FlexiViT's pseudo-inverse (arXiv 2212.08013).

    If B resizes a patch x bilinearly to the new side, w* = pinv(Bᵀ) w brings <Bx, w*> nearest to <x, w>, and for
    larger patches equal. B is that of one side for rows and for columns, and so is its pseudo-inverse.
    """
    basis = torch.eye(kernel.shape[-1], dtype=torch.float64, device=kernel.device)
    side = torch.linalg.pinv(F.interpolate(basis[None], patch, mode="linear", align_corners=False)[0])
    return (side @ kernel.double() @ side.T).to(kernel.dtype)


class ResNet(nn.Module):
    """A 7x7 root of stride 4 and bottleneck stages, each but the first of stride 2; sizes must divide evenly.

    `layers` are the units of each stage, () the root alone; `channels` come out.
    """

    def __init__(self, layers: tuple[int, ...], width: int):
        super().__init__()
        self.stem = nn.Sequential(OrderedDict(conv=StdConv(3, width, 7, stride=2), norm=group_norm(width)))
        self.stages = nn.Sequential()
        self.channels = width
        for i, units in enumerate(layers):
            blocks = nn.Sequential()
            for j in range(units):
                inner = width * 2**i
                blocks.append(Bottleneck(self.channels, inner, stride=2 if i > 0 and j == 0 else 1))
                self.channels = 4 * inner
            self.stages.append(nn.Sequential(OrderedDict(blocks=blocks)))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h2 w2"]:
        x = self.stem(images).relu()
        x = F.max_pool2d(F.pad(x, same_padding(3, 2), value=-math.inf), 3, stride=2)
        return self.stages(x)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions to 4 x `inner` channels, added to the input, then ReLU. The branch starts at zero."""

    def __init__(self, channels: int, inner: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = StdConv(channels, inner, 1), group_norm(inner)
        self.conv2, self.norm2 = StdConv(inner, inner, 3, stride), group_norm(inner)
        self.conv3, self.norm3 = StdConv(inner, 4 * inner, 1), group_norm(4 * inner)
        nn.init.zeros_(self.norm3.weight)
        self.downsample = nn.Identity()
        if channels != 4 * inner or stride > 1:
            conv = StdConv(channels, 4 * inner, 1, stride)
            self.downsample = nn.Sequential(OrderedDict(conv=conv, norm=group_norm(4 * inner)))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y)).relu()
        y = self.norm3(self.conv3(y))
        return (self.downsample(x) + y).relu()


class StdConv(nn.Conv2d):
    """A convolution without bias whose filters are standardised first (arXiv 1903.10520), padded as SAME."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1):
        super().__init__(channels, out, kernel, stride, bias=False)
        lecun_normal(self)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5)
        return F.conv2d(F.pad(input, same_padding(self.kernel_size[0], self.stride[0])), weight, stride=self.stride)


def group_norm(channels: int) -> nn.GroupNorm:
    """Flax's GroupNorm: 32 groups, epsilon 1e-6."""
    return nn.GroupNorm(32, channels, eps=1e-6)


def same_padding(kernel: int, stride: int) -> tuple[int, int, int, int]:
    """TensorFlow's SAME padding of sides that the stride divides: left, right, top, bottom; the larger part last."""
    total = max(0, kernel - stride)
    first, last = total // 2, total - total // 2
    return first, last, first, last


def lecun_normal(layer: nn.Linear | nn.Conv2d) -> None:
    """Weights of variance 1 / fan-in from a normal cut at two deviations, widened to make up for the cut; bias 0.

    The default of flax's layers; 0.8796... is the deviation of a standard normal that is cut there.
    """
    std = layer.weight[0].numel() ** -0.5 / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
