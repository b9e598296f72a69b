"""From another project's names to ours, and back, by a table."""

import re
from collections.abc import Mapping

from torch import Tensor


def rename(tensors: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Take out of `tensors` what `names` lists, under its new name.

    An entry is a whole name, or what stands before `weight` or `bias`; # is the number of a block: `layers.#.ln_1.` to
    `blocks.#.norm1.`. What is not listed stays behind, and so does a second tensor for one name.
    """
    state: dict[str, Tensor] = {}
    for old, new in names.items():
        pattern = re.compile(re.escape(old).replace(r"\#", "(?P<block>[0-9]+)") + "(?P<part>weight|bias|)")
        for name in list(tensors):
            if found := pattern.fullmatch(name):
                renamed = new.replace("#", found["block"] if "#" in old else "") + found["part"]
                if renamed not in state:
                    state[renamed] = tensors.pop(name)
    return state
