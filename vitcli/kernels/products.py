"""Linear layers that are trained in bfloat16, by the fastest matrix product of cuBLASLt that gives the bits of torch's.

torch takes the algorithm that the library ranks first. Others of its first eight need up to a fifth less time for the
same bits (H200, torch 2.11, 2026-11-26). Which one, the clock tells, once for each shape; nothing else depends on it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache, partial
from itertools import product as every
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.nn import functional as F

# From cublasLt.h and library_types.h, which keep them from version to version.
BF16, FP32, COMPUTE_FP32 = 14, 0, 68
TRANSPOSE_A, MOST_WORKSPACE = 3, 1

WORKSPACE = 32 * 2**20  # bytes, NVIDIA's advice for Hopper
CANDIDATES = 16
ROUNDS, CALLS = 5, 3  # a candidate's time is that of its best round
ALIGNED = 256  # bytes


def biased(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x); in training the bias is added after the product, where a compiler joins it with what comes next."""
    if not torch.is_grad_enabled():
        return layer(x)
    y = linear(x, layer.weight)
    return y + layer.bias.to(y.dtype)


def unbiased(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x); in training without the bias, for a kernel that adds it."""
    return linear(x, layer.weight) if torch.is_grad_enabled() else layer(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, (…, width) -> (…, out). The bias gets no gradient here."""
    bias = bias if bias is None else bias.detach()
    dtype = torch.get_autocast_dtype("cuda")
    if not (x.is_cuda and torch.is_grad_enabled() and torch.is_autocast_enabled("cuda") and dtype == torch.bfloat16):
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2).to(dtype)
    return _Linear.apply(rows, weight.to(dtype), bias if bias is None else bias.to(dtype)).unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, True) if bias is None else torch.addmm(bias, x, weight.t())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        # For the weight's gradient what torch takes is the fastest.
        return product(gradient, weight, False), gradient.t() @ x, None


@custom_op("vitcli::product", mutates_args=())
def product(a: Tensor, b: Tensor, transposed: bool) -> Tensor:
    """a @ b, or a @ b.T."""
    a, b = _aligned(a), _aligned(b)
    out = a.new_empty(a.shape[0], b.shape[0 if transposed else 1])
    with torch.cuda.device(a.device):
        _way(_Shape(a.shape[0], a.shape[1], out.shape[1], transposed, a.device.index), a, b, out)(a, b, out)
    return out


@product.register_fake
def _(a: Tensor, b: Tensor, transposed: bool) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0 if transposed else 1])


class _Shape(NamedTuple):
    """Of (rows, inner) times (inner, columns), which may be transposed, on a device."""

    rows: int
    inner: int
    columns: int
    transposed: bool
    device: int


Way = Callable[[Tensor, Tensor, Tensor], None]  # from two matrices into a third
_ways: dict[_Shape, Way] = {}


def _way(shape: _Shape, a: Tensor, b: Tensor, out: Tensor) -> Way:
    """The fastest on these matrices, the first time; while a graph is recorded there is no time to try any."""
    usual = partial(_as_torch, shape.transposed)
    if shape not in _ways and not torch.cuda.is_current_stream_capturing():
        usual(a, b, out)
        expected, alike = out.clone(), [usual]
        for way in _candidates(shape):
            with suppress(RuntimeError):
                way(a, b, out.zero_())
                alike += [way] * torch.equal(out, expected)
        times = [_milliseconds(lambda way=way: way(a, b, out)) for _, way in every(range(ROUNDS), alike)]
        best = min(range(len(times)), key=times.__getitem__)
        _ways[shape] = alike[best % len(alike)]
    return _ways.get(shape, usual)


def _as_torch(transposed: bool, a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b.t() if transposed else b, out=out)


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", c_uint64 * 8),)


class _Result(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


def _candidates(shape: _Shape) -> list[Way]:
    """What cuBLASLt has for it, on the current device; nothing where torch comes without it."""
    try:
        library, handle = _library(), _handle(shape.device)
    except OSError:
        return []
    # The library counts by columns: to it all is transposed, and the factors change places.
    inner, columns = c_uint64(shape.inner), c_uint64(shape.columns)
    first, second, out = (
        _made(library.cublasLtMatrixLayoutCreate, BF16, *size)
        for size in (
            (inner, columns, c_int64(shape.inner)) if shape.transposed else (columns, inner, c_int64(shape.columns)),
            (inner, c_uint64(shape.rows), c_int64(shape.inner)),
            (columns, c_uint64(shape.rows), c_int64(shape.columns)),
        )
    )
    operation = _made(library.cublasLtMatmulDescCreate, COMPUTE_FP32, FP32)
    _set(library.cublasLtMatmulDescSetAttribute, operation, TRANSPOSE_A, c_int(shape.transposed))
    preference = _made(library.cublasLtMatmulPreferenceCreate)
    _set(library.cublasLtMatmulPreferenceSetAttribute, preference, MOST_WORKSPACE, c_size_t(WORKSPACE))
    results, count = (_Result * CANDIDATES)(), c_int()
    status = library.cublasLtMatmulAlgoGetHeuristic(
        handle, operation, first, second, out, out, preference, CANDIDATES, results, byref(count)
    )
    library.cublasLtMatmulPreferenceDestroy(preference)
    given = partial(_by_library, library.cublasLtMatmul, handle, operation, (first, second, out))
    return [partial(given, result) for result in results[: count.value] if not status and not result.status]


def _by_library(
    matmul: Callable[..., int],
    handle: c_void_p,
    operation: c_void_p,
    layouts: tuple[c_void_p, c_void_p, c_void_p],
    chosen: _Result,
    a: Tensor,
    b: Tensor,
    out: Tensor,
) -> None:
    first, second, third = layouts
    workspace = torch.empty(chosen.workspace, dtype=torch.uint8, device=out.device)
    status = matmul(
        handle, operation, byref(c_float(1)), _place(b), first, _place(a), second, byref(c_float(0)), _place(out),
        third, _place(out), third, byref(chosen.algorithm), _place(workspace), c_size_t(chosen.workspace),
        c_void_p(torch.cuda.current_stream().cuda_stream),
    )  # fmt: skip
    _check(status)


@cache
def _library() -> ctypes.CDLL:
    """The one that torch has loaded."""
    return ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).partition('.')[0]}")


@cache
def _handle(_device: int) -> c_void_p:
    """For the current device, which is this one."""
    return _made(_library().cublasLtCreate)


def _made(function: Callable[..., int], *values: object) -> c_void_p:
    """What a function makes; nothing frees it."""
    made = c_void_p()
    _check(function(byref(made), *values))
    return made


def _set(function: Callable[..., int], of: c_void_p, attribute: int, value: c_int | c_size_t) -> None:
    _check(function(of, attribute, byref(value), c_size_t(ctypes.sizeof(value))))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt: status {status}")


def _place(x: Tensor) -> c_void_p:
    return c_void_p(x.data_ptr())


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNED == 0 else x.clone()


def _milliseconds(call: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
