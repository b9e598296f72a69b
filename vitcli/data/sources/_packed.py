"""Images in tars, read at their places."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vitcli.data.index import Index
from vitcli.data.sources import Dataset
from vitcli.data.sources._remote import Cache, Shard
from vitcli.waiting import bar

if TYPE_CHECKING:
    from PIL import Image


class Packed(Dataset):
    """The images of `shards`. `index` says in which each is, where, under which name and label.

    `names` are the classes' by the numbers that `index` uses for them. Shards elsewhere are fetched through `cache`;
    an order mixes `window` of them at a time, or all. `lost` are lines on damaged shards, `ignored` on members of
    other kinds.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        index: Index,
        classes: Sequence[str],
        numbers: np.ndarray,
        window: int | None,
        cache: Cache | None,
        lost: Sequence[str],
        ignored: Sequence[str],
    ):
        self.shards, self.index, self.classes, self.numbers = shards, index, tuple(classes), numbers
        self.window, self.cache, self.lost = window, cache, tuple(lost)
        self.notes = (*(f"warning: {line}" for line in lost), *ignored)
        self.labels = numbers[index["codes"]]
        digest = hashlib.sha256(index["names"].data)
        digest.update(index["name_ends"].data)
        self.identity = digest.digest()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "labels"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.labels = self.numbers[self.index["codes"]]

    def image(self, index: int) -> Image.Image:
        """The decoded member."""
        from vitcli.data.images import decode

        return decode(self.read(index), self.path(index))

    def read(self, index: int) -> bytes:
        """The member. Raises DataError for a shard that cannot be fetched: its images are not broken, but elsewhere."""
        from vitcli.data.images import BadImage

        offset, size = int(self.index["offsets"][index]), int(self.index["sizes"][index])
        try:
            with os.fdopen(self._open(int(self.index["shards"][index])), "rb", buffering=0) as file:
                content, end = os.pread(file.fileno(), size, offset), os.fstat(file.fileno()).st_size
        except OSError as error:
            raise BadImage(self.path(index), error.strerror or str(error)) from None
        if len(content) < size:
            raise BadImage(self.path(index), f"the shard ends at byte {end}")
        return content

    def path(self, index: int) -> str:
        """The shard and the name in it."""
        return f"{self.shards[int(self.index['shards'][index])].name}/{self.index.names(index)}"

    def damage(self) -> list[str]:
        """Of shards whose headers, or whose SHA-256 in their list, say so."""
        found = list(self.lost)
        with bar("verifying shards", len(self.shards)) as advance:
            for number, (shard, digest) in enumerate(zip(self.shards, self.index.facts["digests"], strict=True)):
                if digest and not any(line.startswith(shard.name) for line in self.lost):
                    with os.fdopen(self._open(number), "rb") as file:
                        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                            found.append(f"{shard.name}: its SHA-256 is not the one in its list")
                advance(1)
        return found

    def order(self, rng: np.random.Generator, chosen: np.ndarray) -> np.ndarray:
        """The shards in random order, and the images of `window` neighbouring ones mixed, which slides over them."""
        if self.window is None:
            return super().order(rng, chosen)
        places = rng.permutation(len(self.shards))[self.index["shards"][chosen]]
        return chosen[np.argsort(places + self.window * rng.random(len(chosen)), kind="stable")]

    def _open(self, number: int) -> int:
        shard = self.shards[number]
        if self.cache:
            return self.cache.open(shard, self.index.facts["digests"][number])
        return os.open(shard.name, os.O_RDONLY)
