"""Exported files at work: an .onnx as a predictor, ONNX Runtime, TensorRT."""
