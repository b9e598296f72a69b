"""Class folders."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vitcli.data.sources import Dataset, Source, Split


class Folder(Source):
    """A folder with a folder for each class, or with such folders under train and val."""

    name: Literal["folder"] = "folder"
    path: str = Field(description="the folder")
    val: float | None = Field(None, gt=0, lt=1, description="share held out where there is no val folder")

    def open(self, split: Split) -> Dataset:
        raise NotImplementedError
