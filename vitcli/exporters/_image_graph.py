"""The way from an image to the model's input, as nodes in front of an ONNX graph.

A resize is one matrix product for each side, with weights that the graph computes from the image's size: ONNX Runtime's
own Resize is up to 12 levels of 255 away from PIL. Weights are in PIL's or torch's fixed point, products in float64,
levels are rounded where they round, so the answer is theirs to the bit: Pillow's since version 13, torch's on x86.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from vitcli.data import Preprocessing

PIL_BITS = 22  # of a weight in Pillow's Resample.c
TORCH_BITS = 15  # of a weight in torch's UpSampleKernelAVXAntialias.h, one less where the largest is about 1
ALMOST_ONE = 1 - 2.0**-16
ROWS, COLUMNS = 1, 2  # axes of `images`


def prepend(
    model: onnx.ModelProto, preprocessing: Preprocessing, mode: Literal["normalise", "full"]
) -> onnx.ModelProto:
    """The model with an input `images`, uint8 (batch, height, width, 3), in place of its normalised one.

    `normalise` takes images of the model's resolution. `full` takes images of any size, alike within a batch, and
    resizes, crops and normalises; it is for ONNX Runtime, as TensorRT has neither float64 nor sizes without bounds.
    """
    p = preprocessing
    graph = _Graph("preprocess", {})
    images = graph.given("images")
    floats = np.float32  # TensorRT takes uint8, but cannot move it
    levels = _resized(images, p).cast(floats) if mode == "full" else _channels_first(images.cast(floats))
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (p.mean, p.std))
    graph.name(((levels / np.float32(255)) - mean) / std, model.graph.input[0].name)

    joined = onnx.ModelProto()
    joined.CopyFrom(model)
    joined.graph.ClearField("input")
    shape = ["batch", *(p.res if mode == "normalise" else ("height", "width")), 3]
    joined.graph.input.append(helper.make_tensor_value_info("images", TensorProto.UINT8, shape))
    joined.graph.ClearField("node")
    joined.graph.node.extend([*graph.nodes, *model.graph.node])
    joined.graph.initializer.extend(graph.constants.values())
    return joined


class _Graph:
    """Nodes in the making: a call adds one. Numbers and arrays among its inputs become initialisers."""

    def __init__(self, prefix: str, constants: dict[tuple[Any, ...], TensorProto]):
        self.prefix, self.constants = prefix, constants
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, kind: str, *inputs: _Value | np.ndarray | np.generic | float, **attributes: Any) -> _Value:
        names = [value.text if isinstance(value, _Value) else self._constant(np.asarray(value)) for value in inputs]
        text = f"{self.prefix}.{len(self.nodes)}.{kind}"
        self.nodes.append(helper.make_node(kind, names, [text], name=text, **attributes))
        return _Value(text, self)

    def _constant(self, array: np.ndarray) -> str:
        key = (array.dtype.str, array.shape, array.tobytes())
        tensor = numpy_helper.from_array(array, f"preprocess.constant.{len(self.constants)}")
        return self.constants.setdefault(key, tensor).name

    def given(self, text: str) -> _Value:
        return _Value(text, self)

    def name(self, value: _Value, text: str) -> None:
        """Call the latest value so."""
        assert self.nodes[-1].output[0] == value.text
        self.nodes[-1].output[0] = text


@dataclass(frozen=True)
class _Value:
    """What a node gives; arithmetic with it adds nodes. Numbers are float64, whole ones int64."""

    text: str
    graph: _Graph

    def __add__(self, other: Any) -> _Value:
        return self.graph("Add", self, other)

    def __sub__(self, other: Any) -> _Value:
        return self.graph("Sub", self, other)

    def __mul__(self, other: Any) -> _Value:
        return self.graph("Mul", self, other)

    def __truediv__(self, other: Any) -> _Value:
        return self.graph("Div", self, other)

    def __lt__(self, other: Any) -> _Value:
        return self.graph("Less", self, other)

    def __gt__(self, other: Any) -> _Value:
        return self.graph("Greater", self, other)

    def __matmul__(self, other: _Value) -> _Value:
        return self.graph("MatMul", self, other)

    def cast(self, dtype: Any) -> _Value:
        return self.graph("Cast", self, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


@dataclass(frozen=True)
class _Side:
    """Rows or columns of an image: how many are given, how many it is resized to (scalars, float64), and which of
    those the crop keeps (float64, one for each of the model's pixels)."""

    given: _Value
    whole: _Value | np.float64
    kept: _Value | np.ndarray


def _resized(images: _Value, p: Preprocessing) -> _Value:
    """uint8 (batch, height, width, 3) -> float64 or uint8 (batch, 3, *p.res), levels from 0 to 255."""
    rows, columns = _sides(images, p)
    if p.interpolation == "nearest":
        some = images.graph("Gather", images, _nearest(rows), axis=ROWS)
        return _channels_first(images.graph("Gather", some, _nearest(columns), axis=COLUMNS))
    planes = _channels_first(images)
    if p.interpolation == "area":
        across, down = (_normalised(_overlap(side)) for side in (columns, rows))
        return _levels(down @ (planes.cast(np.float64) @ _transposed(across)))
    if not p.antialias:
        across, down = (_torch_weights(side, p.interpolation) for side in (columns, rows))
        return _levels(down @ _levels(planes.cast(np.float64) @ _transposed(across)))
    across, down = (_pil_weights(side, p.interpolation) for side in (columns, rows))
    return _in_pil_order(planes.cast(np.float64), rows, columns, down, _transposed(across), p)


def _sides(images: _Value, p: Preprocessing) -> tuple[_Side, _Side]:
    graph = images.graph
    shape = graph("Shape", images)
    rows, columns = (graph("Gather", shape, axis) for axis in (ROWS, COLUMNS))
    shorter = graph("Min", rows, columns) if p.resize is not None else None
    return _side(rows, shorter, p.resize, p.res[0]), _side(columns, shorter, p.resize, p.res[1])


def _side(given: _Value, shorter: _Value | None, resize: int | None, res: int) -> _Side:
    kept = np.arange(res, dtype=np.float64)
    if shorter is None or resize is None:
        return _Side(given.cast(np.float64), np.float64(res), kept)
    whole = (given * resize / shorter).cast(np.float64)
    margin = given.graph("Round", (whole - float(res)) * 0.5)  # to even, as Python
    return _Side(given.cast(np.float64), whole, margin + kept)


def _nearest(side: _Side) -> _Value:
    """Indices of the nearest pixels, whose places PIL adds up one by one, rounding errors included."""
    graph, scale = side.given.graph, side.given / side.whole
    steps = graph("Range", 0.0, side.whole, 1.0)
    places = graph("CumSum", graph("Where", steps < 0.5, scale * 0.5, scale), 0)
    return graph("Gather", places, _whole_numbers(side.kept)).cast(np.int64)


def _whole_numbers(kept: _Value | np.ndarray) -> _Value | np.ndarray:
    return kept.cast(np.int64) if isinstance(kept, _Value) else kept.astype(np.int64)


def _centres(side: _Side) -> tuple[_Value, _Value]:
    """Centres of the kept pixels (kept, 1), and how many given pixels there are to a resized one."""
    graph, scale = side.given.graph, side.given / side.whole
    centres = graph("Mul", side.kept + 0.5, scale)
    return graph("Unsqueeze", centres, np.array([1])), scale


def _distances(side: _Side) -> tuple[_Value, _Value]:
    """Of the kept pixels' centres from the given ones' (kept, given), and the same scale."""
    centres, scale = _centres(side)
    return scale.graph("Abs", scale.graph("Range", 0.5, side.given, 1.0) - centres), scale


def _overlap(side: _Side) -> _Value:
    """How much of each given pixel a kept one covers."""
    distance, scale = _distances(side)
    graph = distance.graph
    return graph("Relu", graph("Min", (scale + 1.0) * 0.5 - distance, scale, 1.0))


def _pil_weights(side: _Side, interpolation: str) -> _Value:
    distance, scale = _distances(side)
    away = distance / distance.graph("Max", scale, 1.0)
    weights = _normalised(_hat(away) if interpolation == "bilinear" else _cubic(away, -0.5))
    return _fixed_point(weights, 2.0**PIL_BITS)


def _torch_weights(side: _Side, interpolation: str) -> _Value:
    """Where torch reads beyond an edge, it takes the pixel at the edge. Its fixed point depends on the largest weight,
    which the crop may leave out."""
    graph = side.given.graph
    centres, _ = _centres(_Side(side.given, side.whole, graph("Range", 0.0, side.whole, 1.0)))

    def shares(pixels: _Value | np.ndarray) -> _Value:
        away = graph("Abs", graph("Sub", pixels, centres))
        return _hat(away) if interpolation == "bilinear" else _cubic(away, -0.75)

    pixels = graph("Range", 0.5, side.given, 1.0)
    before = _sum(shares(np.array([-1.5, -0.5]))) * (pixels < 1.0).cast(np.float64)
    after = _sum(shares(side.given + np.array([0.5, 1.5]))) * (pixels > side.given - 1.0).cast(np.float64)
    weights = shares(pixels) + before + after
    largest = graph("ReduceMax", weights, keepdims=0)
    unit = graph("Where", largest > ALMOST_ONE, 2.0 ** (TORCH_BITS - 1), 2.0**TORCH_BITS)
    return graph("Gather", _fixed_point(weights, unit), _whole_numbers(side.kept))


def _hat(away: _Value) -> _Value:
    return away.graph("Relu", away.graph("Sub", 1.0, away))


def _cubic(away: _Value, a: float) -> _Value:
    """Keys' cubic convolution of a distance in pixels."""
    t, graph = away, away.graph
    near = (t * (a + 2) - (a + 3)) * t * t + 1.0
    far = (((t - 5.0) * t + 8.0) * t - 4.0) * a
    return graph("Where", t < 1.0, near, graph("Where", t < 2.0, far, 0.0))


def _normalised(weights: _Value) -> _Value:
    return weights / _sum(weights)


def _sum(weights: _Value) -> _Value:
    return weights.graph("ReduceSum", weights, np.array([1]))


def _fixed_point(weights: _Value, unit: _Value | float) -> _Value:
    return weights.graph("Round", weights * unit) / unit


def _in_pil_order(
    planes: _Value, rows: _Side, columns: _Side, down: _Value, across: _Value, p: Preprocessing
) -> _Value:
    """Columns first, but rows first where they shrink by more than twice as many as the columns do."""
    graph = planes.graph
    fewer_rows, fewer_columns = rows.given - rows.whole, columns.given - columns.whole
    rows_first = fewer_rows > graph("Max", fewer_columns * 2.0, 0.0)
    branches = {}
    for name, columns_first in (("then_branch", False), ("else_branch", True)):
        branch = _Graph(f"{graph.prefix}.{name}", graph.constants)
        x, a, d = (branch.given(value.text) for value in (planes, across, down))
        y = _levels(d @ _levels(x @ a)) if columns_first else _levels(_levels(d @ x) @ a)
        end = helper.make_tensor_value_info(y.text, TensorProto.DOUBLE, ["batch", 3, *p.res])
        branches[name] = helper.make_graph(branch.nodes, name, [], [end])
    return graph("If", rows_first, **branches)


def _levels(x: _Value) -> _Value:
    return x.graph("Clip", x.graph("Floor", x + 0.5), 0.0, 255.0)


def _channels_first(images: _Value) -> _Value:
    return images.graph("Transpose", images, perm=[0, 3, 1, 2])


def _transposed(weights: _Value) -> _Value:
    return weights.graph("Transpose", weights, perm=[1, 0])
