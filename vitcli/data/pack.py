"""From any source to tar shards in WebDataset's layout: `vit data pack`.

A shard is written beside its place, synced and renamed; then its list, NAME.json, which says that it is whole. A pack
that was killed goes on behind the shards that have theirs. The images are shuffled, the same way each time, so that
neighbouring shards hold all classes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vitcli import rng, storage
from vitcli.data.images import BadImage, decode
from vitcli.data.parallel import each
from vitcli.data.sources import Dataset, Source, Split
from vitcli.data.sources.shards import CONTENTS
from vitcli.errors import DataError, LockedError, StorageError
from vitcli.rng import Stream
from vitcli.waiting import bar

# How the first bytes of a file tell its format.
_KINDS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}


@dataclass(frozen=True)
class Packing:
    """What was packed. `images` and `shards` are all there are, `found` of the shards were there already; `bad` names
    the images that could not be read and are left out.
    """

    path: str
    images: int
    classes: int
    shards: int
    found: int
    megabytes: float
    bad: tuple[str, ...]
    seconds: float
    images_per_second: float


class Shrink(NamedTuple):
    """Images whose longer side is more than this are made smaller and written as JPEG."""

    max_side: int
    quality: int


class Written(NamedTuple):
    """A shard that is there, whole."""

    size: int
    images: int
    bad: list[str]


class Part(NamedTuple):
    """A shard to write: its images, in their order, the first of which has the number `first` in the split."""

    split: Split
    number: int
    first: int
    images: np.ndarray

    @property
    def name(self) -> str:
        """Of the tar."""
        return f"{self.split}-{self.number:06d}.tar"


def pack(source: Source, out: Path, *, shrink: Shrink | None, per_shard: int, jobs: int) -> Packing:
    """Write the images of a source as shards into the folder `out`, or go on where an earlier call was stopped.

    Bytes are copied as they are, unless `shrink` says otherwise: then each image is decoded. Raises DataError if an
    image may be of several classes or `out` holds other shards, LockedError if another process writes there,
    StorageError if the disk refuses.
    """
    begin = time.monotonic()
    datasets: dict[Split, Dataset] = {split: source.open(split) for split in source.splits()}
    if any(dataset.multi_label for dataset in datasets.values()):
        raise DataError("a shard holds one label an image, and these images have several", "train from the table")
    plans: dict[Split, str] = {split: _plan(dataset, shrink, per_shard) for split, dataset in datasets.items()}
    parts = [part for split, dataset in datasets.items() for part in _parts(split, dataset, per_shard)]
    classes = next(iter(datasets.values())).classes
    with _locked(out):
        done = {part.name: found for part in parts if (found := _found(out, part, plans[part.split]))}
        there, missing = len(done), [part for part in parts if part.name not in done]
        written = sum(len(part.images) for part in missing)
        with bar("packing images", sum(map(len, datasets.values()))) as advance:
            advance(sum(map(len, datasets.values())) - written)
            for part, shard in each(partial(_write, out, datasets, plans, shrink), missing, jobs):
                done[part.name] = shard
                advance(len(part.images))
        shards = [done[part.name] for part in parts]
        images = sum(shard.images for shard in shards)
        settings = {"shrink": shrink._asdict() if shrink else None, "per_shard": per_shard}
        contents = {
            "format": 1,
            "classes": classes,
            "images": images,
            "shards": [part.name for part in parts],
            **settings,
        }
        storage.write_file(out / CONTENTS, json.dumps(contents, indent=1).encode())
    seconds = time.monotonic() - begin
    return Packing(
        path=str(out),
        images=images,
        classes=len(classes),
        shards=len(parts),
        found=there,
        megabytes=round(sum(shard.size for shard in shards) / 1e6, 1),
        bad=tuple(line for shard in shards for line in shard.bad),
        seconds=round(seconds, 2),
        images_per_second=round(written / seconds, 1),
    )


def _plan(dataset: Dataset, shrink: Shrink | None, per_shard: int) -> str:
    """What tells the shards of one pack from those of another."""
    digest = hashlib.sha256(json.dumps([dataset.classes, shrink, per_shard]).encode())
    digest.update(dataset.labels.astype("<i8").tobytes() + dataset.identity)
    return digest.hexdigest()


def _parts(split: Split, dataset: Dataset, per_shard: int) -> Iterator[Part]:
    order = rng.generator(0, Stream.SHUFFLE).permutation(len(dataset))
    for number, first in enumerate(range(0, len(order), per_shard)):
        yield Part(split, number, first, order[first : first + per_shard])


def _found(out: Path, part: Part, plan: str) -> Written | None:
    """A shard that an earlier call wrote."""
    tar = out / part.name
    listing = tar.with_suffix(".json")
    try:
        told = json.loads(listing.read_bytes())
        same, shard = told["plan"] == plan, Written(told["size"], len(told["samples"]), told["bad"])
        whole = tar.stat().st_size == shard.size
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{listing} is not a list of `vit data pack`", "choose another folder") from None
    if not same:
        raise DataError(f"{out} holds shards of other images or settings", "choose another folder, or empty it")
    return shard if whole else None


def _write(
    out: Path, datasets: dict[Split, Dataset], plans: dict[Split, str], shrink: Shrink | None, part: Part
) -> tuple[Part, Written]:
    """Write a shard and its list."""
    dataset, tar = datasets[part.split], out / part.name
    temporary = tar.with_name(f".tmp-{tar.name}")
    samples, bad = [], []
    try:
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for place, index in enumerate(map(int, part.images), start=part.first):
                    try:
                        content = _content(dataset, index, shrink)
                    except BadImage as error:
                        bad.append(str(error))
                        continue
                    name, label = f"{place:09d}.{_kind(content)}", int(dataset.labels[index])
                    offset = _add(archive, name, content)
                    _add(archive, f"{place:09d}.cls", str(label).encode())
                    origin = "/".join(dataset.path(index).split(os.sep)[-2:])  # for people
                    samples.append([name, offset, len(content), label, origin])
            file.flush()
            os.fsync(file.fileno())
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        temporary.replace(tar)
        size = tar.stat().st_size
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {tar}: {error.strerror}", "free space; then the same command goes on"
        ) from error
    told = {"plan": plans[part.split], "size": size, "sha256": digest, "bad": bad, "samples": samples}
    storage.write_file(tar.with_suffix(".json"), json.dumps(told).encode())
    return part, Written(size, len(samples), bad)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> int:
    """Add a member, the same to the bit whoever writes it and when. Where its bytes begin."""
    begin, header = archive.offset, tarfile.TarInfo(name)
    header.size = len(content)
    archive.addfile(header, BytesIO(content))
    return begin + tarfile.BLOCKSIZE


def _content(dataset: Dataset, index: int, shrink: Shrink | None) -> bytes:
    content = dataset.read(index)
    if content is None:
        return _encoded(dataset.image(index), "PNG")
    if shrink is None:
        return content
    image = decode(content, dataset.path(index))
    scale = shrink.max_side / max(image.size)
    if scale >= 1:
        return content
    width, height = (max(1, round(side * scale)) for side in image.size)
    return _encoded(image.resize((width, height), Image.Resampling.BICUBIC), "JPEG", quality=shrink.quality)


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    into = BytesIO()
    image.save(into, kind, **options)
    return into.getvalue()


def _kind(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    return next((kind for magic, kind in _KINDS.items() if content.startswith(magic)), "jpg")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror}", "choose another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LockedError(f"another process packs into {out}", "wait for it") from None
        yield
