"""PyTorch files. Their pickles are parsed as data (`_pickle.py`); torch reads no part of them.

Two layouts: since torch 1.6 an archive of `data.pkl` and a part for each storage; before, five pickles one after
another, and all storages behind them. Of several sets of weights in one file the averaged one (EMA) is taken.
"""

import struct
import zipfile
from io import BufferedReader, BytesIO
from math import prod
from typing import Any

import torch
from torch import Tensor

from vitcli.weights._pickle import NotWeightsError, View, parse

WRAPPERS = ("state_dict_ema", "model_ema", "target_encoder", "teacher", "state_dict", "model", "encoder", "student")
PICKLE_LIMIT = 4 << 20  # bytes that list the tensors; a real file has some hundred kB of them, with its optimiser's
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the older layout
LOCAL_HEADER = struct.Struct("<4s22xHH")  # before each part of an archive: signature, lengths of name and extra field
COUNT = struct.Struct("<q")  # before each storage of the older layout


def read_archive(file: BufferedReader, limit: int) -> dict[str, Tensor]:
    """The tensors of an uncompressed archive, if they take `limit` bytes of memory at most.

    Raises NotWeightsError, and various other exceptions for a damaged file.
    """
    archive = zipfile.ZipFile(file)
    parts = {entry.filename: entry for entry in archive.infolist()}
    listed = [name for name in parts if name.endswith("/data.pkl")]
    if len(listed) != 1:
        raise NotWeightsError(f"holds {len(listed)} files data.pkl, not one")
    folder = listed[0].removesuffix("data.pkl")
    if parts[listed[0]].file_size > PICKLE_LIMIT:
        raise NotWeightsError(f"takes {parts[listed[0]].file_size} bytes to list its tensors; a model takes few")
    if f"{folder}byteorder" in parts and archive.read(f"{folder}byteorder") != b"little":
        raise NotWeightsError("is of a big-endian machine")
    views = state_dict(parse(BytesIO(archive.read(listed[0]))).value)

    starts = {}
    for storage in {view.storage for view in views.values()}:
        part = parts[f"{folder}data/{storage.key}"]
        if storage.nbytes > part.file_size:
            raise NotWeightsError("has a storage that is larger than its part of the archive")
        file.seek(part.header_offset)
        signature, *lengths = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        if signature != b"PK\3\4":
            raise zipfile.BadZipFile
        starts[storage.key] = part.header_offset + LOCAL_HEADER.size + sum(lengths)
    return _read(file, views, starts, limit)


def read_older(file: BufferedReader, limit: int) -> dict[str, Tensor]:
    """The tensors of a file in the older layout, as `read_archive`."""
    beginning = BytesIO(file.read(PICKLE_LIMIT))
    magic, protocol, machine, content, keys = (parse(beginning) for _ in range(5))
    if (magic.value, protocol.value) != (MAGIC, PROTOCOL) or not machine.value["little_endian"]:
        raise NotWeightsError("is none of torch's, or of a big-endian machine")
    views = state_dict(content.value)

    starts, end = {}, beginning.tell()
    for key in keys.value:
        storage = content.storages[key]
        file.seek(end)
        if COUNT.unpack(file.read(COUNT.size)) != (storage.count,):
            raise NotWeightsError("has a storage of another length than it says")
        starts[key] = end + COUNT.size
        end = starts[key] + storage.nbytes
    return _read(file, views, starts, limit)


def state_dict(loaded: Any) -> dict[str, View]:
    """The tensors by name, out of the usual wrappers; numbers and the like beside them are left."""
    for _ in range(3):  # deep enough for real files; a hostile one may hold itself
        if isinstance(loaded, dict):
            loaded = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), dict)), loaded)
    found = loaded.items() if isinstance(loaded, dict) else ()
    views = {name: value for name, value in found if isinstance(value, View)}
    if not views:
        raise NotWeightsError("holds no tensors by name")
    return views


def _read(file: BufferedReader, views: dict[str, View], starts: dict[str, int], limit: int) -> dict[str, Tensor]:
    """The tensors of storages that begin at `starts` in the file."""
    if sum(view.storage.dtype.itemsize * max(view.extent, prod(view.shape)) for view in views.values()) > limit:
        raise NotWeightsError("would take far more memory than a file of its size holds")
    tensors = {}
    for name, view in views.items():
        numbers = torch.empty(view.extent, dtype=view.storage.dtype)
        content = numbers.view(torch.uint8).numpy().data
        file.seek(starts[view.storage.key] + view.offset * numbers.itemsize)
        if file.readinto(content) < len(content):
            raise EOFError
        tensors[name] = numbers.as_strided(view.shape, view.strides)
    return tensors
