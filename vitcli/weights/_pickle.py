"""A pickle taken as data: it is parsed and never loaded, so that nothing it names is imported or called.

Numbers, strings, lists and dicts are made; of what torch's own constructors would make of them there is a record. Any
other name is refused. The opcodes are those that torch.save writes, as pickletools reads them.
"""

import pickletools
import re
from typing import Any, BinaryIO, NamedTuple

import torch

STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
    "torch ComplexFloatStorage": torch.complex64,
    "torch ComplexDoubleStorage": torch.complex128,
}
TENSOR = re.compile(r"torch\._utils _rebuild_tensor(_v2)?")
PARAMETER = re.compile(r"torch\._utils _rebuild_parameter(_with_state)?")
DICT = re.compile(r"collections (OrderedDict|Counter|defaultdict)")
# What often stands beside the weights. Nothing of it is kept.
BESIDE = re.compile(
    r"torch (Size|device|Tensor|bool|b?float\d+|u?int\d+|complex\d+)|torch\.nn\.parameter Parameter|argparse Namespace|"
    r"_codecs encode|(builtins|__builtin__) (set|list|dict|int|float|complex|bytearray)|numpy dtype|"
    r"numpy\._?core\.multiarray scalar"
)
NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class NotWeightsError(Exception):
    """The file holds something else. The message goes on after `it`."""


class Name(NamedTuple):
    """What a pickle asks for, as `module name`."""

    text: str


class Storage(NamedTuple):
    """`count` numbers that lie in the file under `key`."""

    dtype: torch.dtype
    key: str
    count: int

    @property
    def nbytes(self) -> int:
        """Its length in the file."""
        return self.count * self.dtype.itemsize


class View(NamedTuple):
    """A tensor: where it begins in its storage, its shape, and how far its numbers lie apart along each side."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Numbers of the storage from its first to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((side - 1) * stride for side, stride in zip(self.shape, self.strides, strict=True))


class Pickle(NamedTuple):
    """What a pickle makes, and all storages that it speaks of, by their keys."""

    value: Any
    storages: dict[str, Storage]


def parse(file: BinaryIO) -> Pickle:
    """The pickle that begins here; `file` is left behind its end.

    Raises NotWeightsError for what no file of tensors needs, and various other exceptions for what is no pickle.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stack under each mark
    memo: dict[int, Any] = {}
    storages: dict[str, Storage] = {}
    for opcode, argument, _ in pickletools.genops(file):
        given: Any = argument
        match opcode.name:
            case name if name in NUMBERS or name in TEXTS:
                stack.append(given)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "BINPUT" | "LONG_BINPUT":
                memo[given] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[given])
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                items = [stack.pop()]
                _extend(stack[-1], items)
            case "APPENDS":
                items, stack = stack, below.pop()
                _extend(stack[-1], items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                stack, items = stack[:-2], stack[-2:]
                _update(stack[-1], items)
            case "SETITEMS":
                items, stack = stack, below.pop()
                _update(stack[-1], items)
            case "GLOBAL":
                stack.append(_name(given))
            case "STACK_GLOBAL":
                module, name = stack.pop(-2), stack.pop()
                stack.append(_name(f"{module} {name}"))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(_made(stack.pop(), arguments))
            case "BUILD":  # attributes of an object, which no tensor needs
                stack.pop()
            case "BINPERSID":
                storage = _storage(*stack.pop())
                if storages.setdefault(storage.key, storage) != storage:
                    raise NotWeightsError("has two kinds of numbers in one place")
                stack.append(storage)
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return Pickle(stack.pop(), storages)
            case name:
                raise NotWeightsError(f"has a {name}, which torch does not write")
    raise EOFError


def _name(text: str) -> Name:
    if text not in STORAGES and not any(known.fullmatch(text) for known in (TENSOR, PARAMETER, DICT, BESIDE)):
        raise NotWeightsError(f"asks for {text.replace(' ', '.')[:100]}, and only plain tensors are read")
    return Name(text)


def _made(maker: Any, arguments: Any) -> Any:
    """What stands for the object that would be made."""
    if not isinstance(maker, Name) or not isinstance(arguments, tuple):
        raise NotWeightsError("calls what has no name")
    if TENSOR.fullmatch(maker.text):
        return _view(*arguments[:4])
    if PARAMETER.fullmatch(maker.text):
        return arguments[0]
    return {} if DICT.fullmatch(maker.text) else None


def _storage(kind: Any, maker: Any, key: Any, device: Any, count: Any, view: Any = None) -> Storage:
    dtype = STORAGES.get(maker.text) if isinstance(maker, Name) else None
    if kind != "storage" or dtype is None or not isinstance(key, str) or not _is_count(count) or view is not None:
        raise NotWeightsError("keeps numbers otherwise than torch does")
    return Storage(dtype, key, count)


def _view(storage: Any, offset: Any, shape: Any, strides: Any) -> View:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(map(_is_count, numbers)):
        raise NotWeightsError("has a tensor without numbers")
    view = View(storage, offset, tuple(shape), tuple(strides))
    if offset + view.extent > storage.count:
        raise NotWeightsError("has a tensor that is larger than its storage")
    return view


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _extend(value: Any, items: list[Any]) -> None:
    if not isinstance(value, list):
        raise NotWeightsError("appends to what is no list")
    value.extend(items)


def _update(value: Any, items: list[Any]) -> None:
    """Of keys only strings are kept: names of tensors and wrappers. Another may take for ever to hash."""
    if not isinstance(value, dict):
        raise NotWeightsError("sets items of what is no dict")
    value.update((key, item) for key, item in zip(items[::2], items[1::2], strict=True) if isinstance(key, str))
