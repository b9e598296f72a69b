"""GELU after a linear layer: without gradients as part of the matrix product; with them, its gradient and that of the
bias in one pass over memory, which a compiler does not find by itself.

tanh's form of GELU is written with a sigmoid, x sigmoid(2 k (x + 0.044715 x^3)) with k = sqrt(2 / pi): the same
function, and on a GPU much the faster one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton

from vitcli.kernels import products

# pyright: reportGeneralTypeIssues=false

SLOPE, CUBE = 1.5957691216057308, 0.044715  # 2 sqrt(2 / pi)
ROWS, COLUMNS = 8, 512  # of a tile
CHUNKS = 528  # parts of the rows that are summed apart: four for each of a large GPU's multiprocessors


def linear_gelu(linear: nn.Linear, x: Tensor) -> Tensor:
    """gelu_tanh(linear(x)), (…, width) -> (…, hidden)."""
    if torch.is_grad_enabled():
        return _BiasGELU.apply(products.linear(x, linear.weight), linear.bias)
    low = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if low else x.dtype
    bias, rows, weight = linear.bias.to(dtype), x.flatten(0, -2).to(dtype), linear.weight.to(dtype)
    return torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], -1)


class _BiasGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(z, bias)
        h = z.float() + bias.float()
        answer = h * torch.sigmoid(SLOPE * (h + CUBE * h * h * h))
        # Not converted for show: torch 2.11's compiler loses the gradient of what `to` gives back as it is.
        return answer if answer.dtype == z.dtype else answer.to(z.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        z, bias = ctx.saved_tensors
        width = z.shape[-1]
        dz, sums = bias_gelu_backward(gradient.reshape(-1, width).contiguous(), z.view(-1, width), bias)
        return dz.view_as(z), sums.sum(0).to(bias.dtype)


@triton_op("vitcli::bias_gelu_backward", mutates_args={})
def bias_gelu_backward(gradient: Tensor, z: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Of gelu_tanh(z + bias): the gradient of z (rows, width), and float32 sums (chunks, width) for the bias's."""
    rows, width = z.shape
    dz = torch.empty_like(z)
    sums = torch.empty(CHUNKS, width, dtype=torch.float32, device=z.device)
    grid = (triton.cdiv(width, COLUMNS), CHUNKS)
    wrap_triton(_bias_gelu_backward)[grid](
        gradient, z, bias, dz, sums, rows, width, triton.cdiv(triton.cdiv(rows, ROWS), CHUNKS), ROWS, COLUMNS
    )
    return dz, sums


@triton.jit
def _bias_gelu_backward(
    gradient, z, bias, dz, sums, rows, width, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.program_id(1)
    inside = columns < width
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tile in tl.range(tiles, num_stages=3):  # loads run ahead of what they are for
        row = (chunk * tiles + tile) * ROWS + tl.arange(0, ROWS)
        here = row.to(tl.int64)[:, None] * width + columns[None, :]
        valid = (row < rows)[:, None] & inside[None, :]
        h = tl.load(z + here, mask=valid, other=0.0).to(tl.float32) + b[None, :]
        g = tl.load(gradient + here, mask=valid, other=0.0).to(tl.float32)
        s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        d = g * (s + h * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * h * h))
        tl.store(dz + here, d.to(dz.dtype.element_ty), mask=valid)
        total += d
    tl.store(sums + chunk * width + columns, tl.sum(total, axis=0), mask=inside)
