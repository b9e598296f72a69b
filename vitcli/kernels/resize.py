"""The resize of images that lie packed in memory, by tables of weights: whole numbers, and so the same levels anywhere.

Levels are rounded once the columns are done, and again after the rows, as in Pillow's Resample.c and torch's for uint8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

FACTS = tl.constexpr(9)  # of an image
AT_ONCE = 4  # rows


def resize(packed: Tensor, images: Tensor, rows: int) -> None:
    """Write the first images of `packed` uint8 (n,) to `images` uint8 (b, 3, height, width).

    `packed` begins with nine int32 for each: where its pixels (rows, columns, 3) begin, in bytes, their rows and their
    columns; then of rows and of columns where their table begins, in int32, its taps and its bits. A table has 1 + taps
    int32 for each pixel to be: the first that counts, and the weights, of which 2 ** bits is 1. `rows` are the most of
    an image.
    """
    count, _, height, width = images.shape
    between = torch.empty((count, rows, 3 * width), dtype=torch.uint8, device=images.device)
    lanes, facts = triton.next_power_of_2(3 * width), packed.view(torch.int32)
    _columns[(count, triton.cdiv(rows, AT_ONCE))](packed, facts, between, rows, width, AT_ONCE, lanes)
    _rows[(count, height)](facts, between, images, rows, width, height, lanes)


@triton.jit(do_not_specialize=["rows"])
def _columns(levels, facts, between, rows, count, ROWS: tl.constexpr, LANES: tl.constexpr):
    fact = facts + tl.program_id(0) * FACTS
    pixels, height, width = tl.load(fact), tl.load(fact + 1), tl.load(fact + 2)
    table, taps, bits = tl.load(fact + 6), tl.load(fact + 7), tl.load(fact + 8)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    inside = (lane < 3 * count) & (height > 0)  # an image that is broken has neither rows nor tables
    entry = facts + table + lane // 3 * (1 + taps)
    start = tl.load(entry, mask=inside, other=0)
    sums = tl.zeros((ROWS, LANES), dtype=tl.int32)
    for tap in range(taps):
        x = start + tap
        weight = tl.load(entry + 1 + tap, mask=inside, other=0)
        valid = (y < height)[:, None] & (inside & (x < width))[None, :]
        here = (y[:, None] * width + x[None, :]) * 3 + (lane % 3)[None, :]
        sums += tl.load(levels + pixels + here, mask=valid, other=0).to(tl.int32) * weight[None, :]
    place = between + (tl.program_id(0) * rows + y)[:, None] * 3 * count + lane[None, :]
    tl.store(place, _rounded(sums, bits), mask=(y < height)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def _rows(facts, between, images, rows, count, most, LANES: tl.constexpr):
    image, y = tl.program_id(0), tl.program_id(1)
    fact = facts + image * FACTS
    height = tl.load(fact + 1)
    table, taps, bits = tl.load(fact + 3), tl.load(fact + 4), tl.load(fact + 5)
    lane = tl.arange(0, LANES)
    inside = lane < 3 * count
    entry = facts + table + y * (1 + taps)
    start = tl.load(entry, mask=height > 0, other=0)
    sums = tl.zeros((LANES,), dtype=tl.int32)
    for tap in range(taps):
        row = start + tap
        here = between + (image * rows + row) * 3 * count + lane
        sums += tl.load(here, mask=inside & (row < height), other=0).to(tl.int32) * tl.load(entry + 1 + tap)
    place = images + ((image * 3 + lane % 3) * most + y) * count + lane // 3
    tl.store(place, _rounded(sums, bits), mask=inside)


@triton.jit
def _rounded(sums, bits):
    levels = (sums + (1 << (bits - 1))) >> bits
    return tl.minimum(tl.maximum(levels, 0), 255).to(tl.uint8)
