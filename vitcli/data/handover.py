"""How images get from the process that loads them to their places in a batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vitcli.data import Preprocessing
from vitcli.data.preprocess import prepare, to_image
from vitcli.data.resampling import Part, Side, sides, unchanged

CHUNK = 16  # images that a process is asked for at a time
USUAL = 3 * 2**18  # bytes of a decoded image: 512x512, where ImageNet's usual 500x375 are 433x433
MOST_ROWS = 4096  # of an image, which all in its chunk have memory for on the device
WORD = 4  # bytes of an int32
HEADER = WORD * CHUNK * len(Part._fields)


class Decoded(NamedTuple):
    """Pixels uint8 (3, h, w) of an image, which may have more rows `below` them that do not count."""

    pixels: Tensor
    below: int = 0


class Handover(Protocol):
    """The two ends of the memory that the processes share, for a chunk at a time; it goes to them by pickle."""

    @property
    def room(self) -> tuple[int, ...]:
        """The shape of the memory, uint8, that a chunk needs between two processes."""
        ...

    def empty(self, count: int) -> Tensor:
        """The places of so many images, uint8 (count, 3, h, w)."""
        ...

    def give(self, room: Tensor, number: int, image: Decoded | None) -> None:
        """By the one who loads: a chunk's images, or none, in the order of their numbers."""
        ...

    def take(self, room: Tensor, images: Tensor) -> None:
        """By the caller: as many of them as there are places for."""
        ...


@dataclass(frozen=True)
class Ready:
    """The `Handover` of images that are of the right size; `pinned` ones are in memory that a GPU reads by itself."""

    res: tuple[int, int]
    pinned: bool = False

    @property
    def room(self) -> tuple[int, ...]:
        return CHUNK, 3, *self.res

    def empty(self, count: int) -> Tensor:
        return torch.empty((count, 3, *self.res), dtype=torch.uint8, pin_memory=self.pinned)

    def give(self, room: Tensor, number: int, image: Decoded | None) -> None:
        if image is not None:
            room[number].copy_(image.pixels)

    def take(self, room: Tensor, images: Tensor) -> None:
        np.copyto(images.numpy(), room.numpy()[: len(images)])  # torch would call all its threads together


@dataclass(frozen=True)
class Deferred:
    """The `Handover` of decoded images, of which the caller's GPU makes what `prepare` does.

    A chunk is a `Part` for each image and then, for one after the other, its tables and the pixels that the crop needs:
    large ones have the room that small ones leave. What has none, as photographs of many megapixels, is prepared by the
    process that loads it, as is what is not resized by columns and then rows.
    """

    p: Preprocessing
    device: torch.device

    @property
    def room(self) -> tuple[int]:
        """Bytes of a chunk."""
        return (HEADER + CHUNK * max(USUAL, self._least),)

    def empty(self, count: int) -> Tensor:
        """The places of so many images on the device, uint8 (count, 3, *res)."""
        return torch.empty((count, 3, *self.p.res), dtype=torch.uint8, device=self.device)

    def give(self, room: Tensor, number: int, image: Decoded | None) -> None:
        """Put an image behind the one before it, or none."""
        memory = room.numpy()  # whose small steps cost less than torch's
        parts = _parts(memory)
        begin = _end(parts[number - 1]) if number else HEADER
        if image is None:
            parts[number] = Part(begin, 0, 0, 0, 0, 1, 0, 0, 1)
        else:
            parts[number] = self._put(image, memory, begin, len(memory) - self._least * (CHUNK - 1 - number))

    def take(self, room: Tensor, images: Tensor) -> None:
        """Resize as many of the images as there are places for."""
        from vitcli.kernels.resize import resize

        memory = room.numpy()
        parts = _parts(memory)[: len(images)]
        used, rows = _end(parts[-1]), int(parts[:, Part._fields.index("height")].max())
        packed = torch.empty(used, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        packed.numpy()[:] = memory[:used]  # torch would call all its threads together
        resize(packed.to(self.device, non_blocking=True), images, rows)

    @cached_property
    def _least(self) -> int:
        """Bytes that suffice for a prepared image."""
        return _bytes(unchanged(self.p.res))

    def _put(self, image: Decoded, memory: np.ndarray, begin: int, end: int) -> Part:
        """An image between two places, prepared if it takes up more as it is."""
        x, below = image
        found = sides((x.shape[1] + below, x.shape[2]), self.p)
        if found is None or begin + _bytes(found) > end or found[0].length > MOST_ROWS:
            x = torch.nn.functional.pad(x, (0, 0, 0, below))
            x, found = prepare(to_image(x), self.p), unchanged(self.p.res)
        rows, columns = found
        places = []
        for _, _, table, bits in found:
            places += [begin // WORD, table.shape[1] - 1, bits]
            memory[begin : begin + table.nbytes].view(np.int32)[:] = table.ravel()
            begin += table.nbytes
        pixels = x.permute(1, 2, 0).numpy()[rows.begin : rows.end, columns.begin : columns.end]
        memory[begin : begin + pixels.size].reshape(pixels.shape)[:] = pixels
        return Part(begin, *pixels.shape[:2], *places)


def _parts(memory: np.ndarray) -> np.ndarray:
    """The parts of a chunk, int32 (CHUNK, 9)."""
    return memory[:HEADER].view(np.int32).reshape(CHUNK, -1)


def _end(part: np.ndarray) -> int:
    """Where what follows a part may begin."""
    pixels, height, width, *_ = part.tolist()
    return pixels + _whole_words(3 * height * width)


def _bytes(of: tuple[Side, Side]) -> int:
    """What tables and pixels take up."""
    rows, columns = of
    return rows.table.nbytes + columns.table.nbytes + _whole_words(3 * rows.length * columns.length)


def _whole_words(count: int) -> int:
    return -(-count // WORD) * WORD
