"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, part of the package, offline."""

from __future__ import annotations

from typing import Literal

from vitcli.data.sources import Dataset, Source, Split


class Digits(Source):
    """The built-in digits. Every fifth image is held out."""

    name: Literal["digits"] = "digits"

    def open(self, split: Split) -> Dataset:
        raise NotImplementedError
