"""An .onnx in ONNX Runtime, fed and read where it computes: the next images go up while the present ones compute."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch
from torch import Tensor

from vitcli.errors import CheckpointError, UserError
from vitcli.onnx import providers
from vitcli.onnx.providers import Provider

NAMES = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider", "cpu": "CPUExecutionProvider"}
PIECE = 64  # images that compute at a time: enough to fill a large GPU, few enough that the next ones are in time


class Runner(Protocol):
    """What can run the graph of an .onnx. `inputs` and `outputs` are its ends: name and shape."""

    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]

    def run(self, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        """uint8 images -> the graph's float32 output on the CPU; `prepare` makes the graph's input of some of them."""
        ...


class Session:
    """The graph of an .onnx in ONNX Runtime.

    `provider` cuda and tensorrt compute on the GPU or raise UserError; auto takes CUDA where it is there, and warns
    where it does not load. Raises CheckpointError for a graph that ONNX Runtime refuses.
    """

    def __init__(self, path: Path, model: onnx.ModelProto, provider: Provider = "auto"):
        self._session, self._stream = _open(path, model, provider)
        self.provider: str = self._session.get_providers()[0]
        self.inputs = {end.name: end.shape for end in self._session.get_inputs()}
        self.outputs = {end.name: end.shape for end in self._session.get_outputs()}
        self._device = self._stream.device if self._stream else torch.device("cpu")
        self._upload = torch.cuda.Stream() if self._stream else None
        self._options = providers.runtime().RunOptions()
        if self._stream:  # torch waits on the stream for the answer; ONNX Runtime need not
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        """uint8 images -> the graph's float32 output on the CPU; `prepare` makes the graph's input of some of them,
        on the device.

        On a GPU nothing waits before the last piece: images go up through pinned memory and are prepared on a stream
        of their own. `given` outlives the kernels that read it, of which torch's allocator does not know.
        """
        given, answers = [], []
        for piece in images.split(PIECE):
            with torch.cuda.stream(self._upload), _one_thread():  # without a stream the first does nothing
                given.append(prepare(self._put(piece)).contiguous())
            with torch.cuda.stream(self._stream):
                answers.append(self._answer(given[-1]))
        with torch.cuda.stream(self._stream):
            return torch.cat(answers).cpu()

    def _put(self, images: Tensor) -> Tensor:
        return images.pin_memory().to(self._device, non_blocking=True) if self._stream else images

    def _answer(self, given: Tensor) -> Tensor:
        """The graph's output for one input, both where they are."""
        ((name, _),) = self.inputs.items()
        ((output, shape),) = self.outputs.items()
        answer = torch.empty(len(given), *shape[1:], device=self._device)
        if self._stream and self._upload:
            self._stream.wait_stream(self._upload)
        binding = self._session.io_binding()
        place = (self._device.type, self._device.index or 0)
        binding.bind_input(name, *place, _numpy(given.dtype), tuple(given.shape), given.data_ptr())
        binding.bind_output(output, *place, _numpy(answer.dtype), tuple(answer.shape), answer.data_ptr())
        self._session.run_with_iobinding(binding, self._options)
        return answer


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch by itself: its other threads would go on to wait in a loop, on the cores that ONNX Runtime needs next."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _numpy(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy().dtype.type


def _open(path: Path, model: onnx.ModelProto, provider: Provider) -> tuple[Any, torch.cuda.Stream | None]:
    """A session, and the stream that it computes on if it does so on a GPU."""
    wanted = provider if provider != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return _create(path, "cpu", {}), None
    if not torch.cuda.is_available():
        raise UserError(f"--provider {wanted}: no CUDA device is visible", "see vit doctor, or take --provider cpu")
    if NAMES[wanted] not in providers.runtime().get_available_providers():
        failure = f"this onnxruntime has no {wanted}", "pip install onnxruntime-gpu"
    else:
        stream = torch.cuda.Stream()  # ONNX Runtime takes none for torch's usual one
        options = {"device_id": str(stream.device_index), "user_compute_stream": str(stream.cuda_stream)}
        try:
            session = _create(path, wanted, options | _settings(model, wanted))
            refusal = None
        except CheckpointError as error:  # TensorRT's provider raises where CUDA's falls silent
            session, refusal = None, error
        if session and session.get_providers()[0] == NAMES[wanted]:
            return session, stream
        failure = providers.why_not(NAMES[wanted])
        if refusal and not failure:
            raise refusal
        failure = failure or ("it loads for another model, but not for this one", "")
    reason, remedy = failure
    if provider != "auto":
        raise UserError(f"--provider {provider}: {reason}", remedy)
    warnings.warn(f"ONNX Runtime computes on the CPU: {reason}. {remedy}", stacklevel=4)
    return _create(path, "cpu", {}), None


def _create(path: Path, provider: str, settings: dict[str, str]) -> Any:
    onnxruntime = providers.runtime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    chosen = [(NAMES[provider], settings)] + [(NAMES["cpu"], {})] * (provider != "cpu")
    try:  # its fallback would print on stdout and compute on the CPU
        return onnxruntime.InferenceSession(str(path), options, chosen, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's errors share no other class
        raise CheckpointError(f"{path}: ONNX Runtime cannot run it: {str(error).splitlines()[0][:300]}") from None


def _settings(model: onnx.ModelProto, provider: str) -> dict[str, str]:
    """What makes a provider answer as the checkpoint does, today as yesterday."""
    if provider == "cuda":  # its defaults are TF32, and convolutions chosen by a stopwatch
        return {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    end = model.graph.input[0]
    sizes = [dim.dim_value for dim in end.type.tensor_type.shape.dim[1:]]
    if 0 in sizes:
        raise UserError("--provider tensorrt: this file takes images of any size", "export without --preprocess full")
    shape = "x".join(map(str, sizes))
    batches = {"min": 1, "opt": PIECE, "max": PIECE}  # one engine for all of them
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    quantised = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    return {
        **{f"trt_profile_{bound}_shapes": f"{end.name}:{batch}x{shape}" for bound, batch in batches.items()},
        "trt_fp16_enable": str(int(half)),
        "trt_layer_norm_fp32_fallback": str(int(half)),
        "trt_int8_enable": str(int(quantised)),
    }
