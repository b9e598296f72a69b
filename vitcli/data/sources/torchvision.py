"""Published data sets as torchvision keeps them on disk, by its classes' names."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from vitcli.data.sources import Dataset, Source, Split
from vitcli.errors import DataError
from vitcli.schema import wrong

# What each set calls the images to train on and those held out. EuroSAT has no split: every fifth is held out.
SPLITS: dict[str, dict[str, Any]] = {
    "CIFAR10": {"train": {"train": True}, "val": {"train": False}},
    "CIFAR100": {"train": {"train": True}, "val": {"train": False}},
    "FashionMNIST": {"train": {"train": True}, "val": {"train": False}},
    "Flowers102": {"train": {"split": "train"}, "val": {"split": "test"}},
    "OxfordIIITPet": {"train": {"split": "trainval"}, "val": {"split": "test"}},
    "Food101": {"train": {"split": "train"}, "val": {"split": "test"}},
    "EuroSAT": {"train": {}, "val": {}},
    "Imagenette": {"train": {"split": "train"}, "val": {"split": "val"}},
    "ImageNet": {"train": {"split": "train"}, "val": {"split": "val"}},
}

Name = Literal[
    "CIFAR10", "CIFAR100", "FashionMNIST", "Flowers102", "OxfordIIITPet", "Food101", "EuroSAT", "Imagenette", "ImageNet"
]


class Torchvision(Source):
    """A data set of torchvision. Nothing is fetched from the network unless `download` is true.

    CIFAR is published as pickle; torchvision compares its MD5 with the published one before it reads a byte of it.
    """

    name: Literal["torchvision"] = "torchvision"
    dataset: Name = Field(description="torchvision's name of it")
    root: str = Field("data", description="the folder that holds it")
    download: bool = Field(False, description="fetch it if it is missing")

    @model_validator(mode="after")
    def _check(self) -> Torchvision:
        if self.download and self.dataset == "ImageNet":
            raise wrong("download", "ImageNet cannot be downloaded: get its archives from image-net.org into root")
        return self

    def open(self, split: Split) -> Dataset:
        """A split, its classes named by WordNet ids for ImageNet and Imagenette, else as torchvision does."""
        from vitcli.data.sources._arrays import Arrays
        from vitcli.data.sources._files import Files

        root = os.path.abspath(os.path.expanduser(self.root))
        found = self._find(root, split)
        if self.dataset in ("CIFAR10", "CIFAR100", "FashionMNIST"):
            return Arrays(f"{self.dataset}/{split}", np.asarray(found.data), np.asarray(found.targets), found.classes)
        samples = self._samples(found)
        if self.dataset == "EuroSAT":
            samples = [sample for i, sample in enumerate(samples) if (i % 5 == 4) == (split == "val")]
        names = [os.fspath(path)[len(root) + 1 :] for path, _ in samples]
        return Files.of(root, names, [label for _, label in samples], getattr(found, "wnids", found.classes))

    def _find(self, root: str, split: Split) -> Any:
        """torchvision's own object."""
        from torchvision import datasets

        download = {} if self.dataset == "ImageNet" else {"download": self.download}
        try:
            with redirect_stdout(sys.stderr):
                return getattr(datasets, self.dataset)(root, **SPLITS[self.dataset][split], **download)
        except (OSError, RuntimeError) as error:
            if self.download:
                raise DataError(f"{self.dataset} cannot be fetched into {root!r}: {error}") from error
            hint = "fetch it with --set data.source.download=true"
            if self.dataset == "ImageNet":
                hint = "put the archives of image-net.org there; for class folders use the source folder"
            raise DataError(f"{self.dataset} is missing in {root!r}, or damaged", hint) from error

    def _samples(self, found: Any) -> list[tuple[str, int]]:
        """File and label of each image. torchvision's interface would decode the images to tell."""
        match self.dataset:
            case "Flowers102" | "Food101":
                return list(zip(found._image_files, found._labels, strict=True))
            case "OxfordIIITPet":
                return list(zip(found._images, found._labels, strict=True))
            case "Imagenette":
                return found._samples
            case _:
                return found.samples
