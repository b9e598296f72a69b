"""The recipe's training images as other libraries load them, for `vit bench`. Nothing else needs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from vitcli.bench.peers import PeerError
from vitcli.data import DataConfig
from vitcli.data.parallel import METHOD, MOST_LOADERS, cores, follow_parent
from vitcli.data.prefetch import put

if TYPE_CHECKING:
    from vitcli.data.sources import Dataset

Batches = Iterator[tuple[Tensor, Tensor]]


def workers(data: DataConfig) -> int:
    """Loader processes of a peer: as the recipe says, else a core each."""
    return min(cores(), MOST_LOADERS) if data.workers is None else data.workers


def batches(name: str, data: DataConfig, dataset: Dataset, batch: int, device: torch.device) -> Batches:
    """Images (b, 3, h, w), augmented and normalised, and labels int64 (b,), on the device, without end.

    Each peer loads them as its own training does: decoded and augmented by PIL in loader processes, one by one. Raises
    PeerError where a peer has no such loader.
    """
    makers = {"timm": _timm, "torchvision": _torchvision}
    how = data.augment
    path = dataset.path(0)
    for lacking in (
        f"{name} has no loader of its own" if name not in makers else "",
        f"{name} has no crop like {how.crop}" if how.crop != "inception_crop" else "",
        f"{name} does not sample as {data.sampling}" if data.sampling != "uniform" else "",
        f"{name} knows one label an image" if dataset.multi_label else "",
        f"{name} reads files, and {path} is none" if not os.path.isfile(path) else "",
    ):
        if lacking:
            raise PeerError(lacking, "leave it out of --against")
    return _endless(makers[name](data, _Files(dataset), batch, device), device)


def _endless(loader: Any, device: torch.device) -> Batches:
    while True:
        for images, labels in loader:
            yield put(images, device), put(labels, device)


class _Files(torch.utils.data.Dataset):
    """What both peers' class folders are: a path and a label each, opened by PIL."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.labels = dataset, dataset.labels
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        assert self.transform, "set by the peer"
        with open(self.dataset.path(index), "rb") as file:
            image = Image.open(file).convert("RGB")
        return self.transform(image), int(self.labels[index])


def _timm(data: DataConfig, files: _Files, batch: int, device: torch.device) -> Any:
    """As timm's train.py: collated as uint8, normalised and erased on the device."""
    from timm.data.loader import create_loader

    how = data.augment
    loader: Any = create_loader(
        files,  # pyright: ignore[reportArgumentType] (any data set with a transform will do)
        input_size=(3, *data.res),
        batch_size=batch,
        is_training=True,
        re_prob=how.random_erasing,
        re_mode="pixel",
        scale=how.area,
        ratio=how.aspect,
        hflip=0.5 if how.flip else 0.0,
        color_jitter=how.color_jitter,
        auto_augment=f"rand-m{how.randaugment.m:g}-n{how.randaugment.n}" if how.randaugment else None,
        interpolation=how.interpolation,
        mean=data.mean,
        std=data.std,
        num_workers=workers(data),
        pin_memory=device.type == "cuda",
        device=device,
        persistent_workers=workers(data) > 0,
    )
    loader.loader.multiprocessing_context = METHOD if workers(data) else None
    loader.loader.worker_init_fn = partial(_settle, loader.loader.worker_init_fn)
    return loader


def _torchvision(data: DataConfig, files: _Files, batch: int, device: torch.device) -> Any:
    """As references/classification: normalised in the loader processes."""
    from torchvision import transforms as T

    how = data.augment
    interpolation = T.InterpolationMode(how.interpolation)
    steps: list[Any] = [T.RandomResizedCrop(data.res, how.area, how.aspect, interpolation)]
    if how.flip:
        steps.append(T.RandomHorizontalFlip())
    if how.randaugment:
        steps.append(
            T.RandAugment(how.randaugment.n, round(min(10, how.randaugment.m) * 3), interpolation=interpolation)
        )
    if how.color_jitter:
        steps.append(T.ColorJitter(how.color_jitter, how.color_jitter, how.color_jitter))
    steps += [T.PILToTensor(), T.ConvertImageDtype(torch.float), T.Normalize(data.mean, data.std)]
    if how.random_erasing:
        steps.append(T.RandomErasing(how.random_erasing, value="random"))  # pyright: ignore[reportArgumentType]
    files.transform = T.Compose(steps)
    return torch.utils.data.DataLoader(
        files,
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers(data),
        pin_memory=device.type == "cuda",
        persistent_workers=workers(data) > 0,
        multiprocessing_context=METHOD if workers(data) else None,
        worker_init_fn=partial(_settle, None),
    )


def _settle(usual: Callable[[int], None] | None, worker: int) -> None:
    """The first act of a loader process, which would else outlive a killed parent."""
    follow_parent()
    if usual:
        usual(worker)
