"""The samples of one shard: an image and its label, which share the key before the first dot of their names.

Layout of WebDataset: `key.jpg` with `key.cls`, or with `key.json`. Where `vit data pack` wrote the shard, its list
beside it says the same without reading the tar.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from vitcli.data.sources._tar import Damage, Member, members

MAX_IMAGE, MAX_LABEL = 1 << 28, 1 << 20  # bytes; a larger member is no image, or no label


@dataclass
class Samples:
    """The whole samples of a shard: names, places and labels, and what is wrong with the rest of it.

    `lost` samples are not whole; None where the damage hides how many. `ignored` counts members of other kinds.
    `digest` is the SHA-256 of the shard, where its list tells it.
    """

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)
    lost: int | None = 0
    ignored: Counter[str] = field(default_factory=Counter)
    digest: str | None = None

    def add(self, name: str, offset: int, size: int, label: str) -> None:
        """Another sample."""
        self.names.append(name)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.labels.append(label)


def scan(file: int, size: int, json_label: str, fixed: str | None = None) -> Samples:
    """The samples of a tar of `size` bytes, open as descriptor `file`. `fixed` is the label of all of them, if given.

    Members of a sample need not be neighbours.
    """
    found, images, labels, cut = Samples(), {}, {}, False
    for member in members(file, size):
        if isinstance(member, Damage):
            found.damage.append(member)
            cut |= member.final
            continue
        key, kind = _key(member.name)
        if not member.plain:
            found.ignored["no plain file"] += 1
        elif _is_image(kind) and member.size <= MAX_IMAGE:
            _once(images, key, member, found)
        elif kind in ("cls", "json") and fixed is None and member.size <= MAX_LABEL:
            _once(labels.setdefault(kind, {}), key, member, found)
        else:
            found.ignored[f".{kind}"] += 1
    own = labels.get("cls", {}), labels.get("json", {})
    for key, image in images.items():
        label = fixed or _label(file, own[0].get(key), own[1].get(key), json_label)
        if label is None:
            found.damage.append(Damage(image.offset, f"no label for {image.name!r}"))
            found.lost = (found.lost or 0) + 1
        else:
            found.add(image.name, image.offset, image.size, label)
    without = {key for part in own for key in part} - images.keys()
    found.damage += [Damage(offset, f"no image for {name!r}") for name, offset in _places(own, without)]
    found.lost = None if cut else (found.lost or 0) + len(without)
    return found


def listed(content: bytes, size: int) -> Samples | None:
    """The samples that the list of a shard of `size` bytes names; None where it is no such list.

    Samples that a shortened shard no longer holds are lost.
    """
    found = Samples()
    try:
        told = json.loads(content)
        for name, offset, length, label, *_ in told["samples"]:
            if not (isinstance(name, str) and int(offset) >= 0 and 0 <= int(length) <= MAX_IMAGE):
                return None
            if offset + length <= size:
                found.add(name, int(offset), int(length), str(label))
        if told["size"] != size:
            found.damage.append(Damage(min(size, told["size"]), f"{size} bytes, where its list says {told['size']}"))
        found.lost, found.digest = len(told["samples"]) - len(found.names), str(told["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found


def _once(known: dict[str, Member], key: str, member: Member, found: Samples) -> None:
    if key in known:
        found.damage.append(Damage(member.offset, f"{member.name!r} is there twice"))
    known.setdefault(key, member)


def _key(name: str) -> tuple[str, str]:
    """What stands before the first dot of the last part, with the folders, and after it in lower case."""
    path = PurePosixPath(name)
    base, _, kind = path.name.partition(".")
    return f"{path.parent}/{base}", kind.lower()


def _is_image(kind: str) -> bool:
    from vitcli.data.images import EXTENSIONS

    return f".{kind}" in EXTENSIONS


def _label(file: int, cls: Member | None, described: Member | None, key: str) -> str | None:
    """A label as text: that of the .cls, or else of the .json."""
    if cls:
        text = os.pread(file, cls.size, cls.offset).decode("utf-8", "replace").strip()
        return text or None
    try:
        value: Any = json.loads(os.pread(file, described.size, described.offset))[key] if described else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


def _places(own: tuple[dict[str, Member], ...], keys: set[str]) -> list[tuple[str, int]]:
    return [(part[key].name, part[key].offset) for part in own for key in part if key in keys]
