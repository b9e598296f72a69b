"""Exported files at work: an .onnx as a predictor, ONNX Runtime, TensorRT."""

from typing import Literal

Preprocess = Literal["none", "normalise", "full"]  # what of the preparing the graph does itself
