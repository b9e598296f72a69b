"""Randomness as a pure function of where training stands, so that there is no state to save or lose.

Philox is counter-based: the key holds the seed and the stream, the counter the position. Two positions never
share numbers, whatever ran before, in however many processes.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What the random numbers are for. The values are part of a run's identity: append, never renumber."""

    SHUFFLE = 0  # (epoch, 0): the order of the images
    AUGMENT = 1  # (epoch, index): crop, flip, RandAugment of one image
    REPLACE = 2  # (epoch, index): the image taken in place of a broken one
    MIX = 3  # (step, 0): mixup and cutmix of one batch
    MODEL = 4  # (step, micro-batch): dropout and stochastic depth
    INIT = 5  # (0, 0): the model's first weights
    SPLIT = 6  # (0, 0): which images are held out


def generator(seed: int, stream: Stream, a: int = 0, b: int = 0) -> np.random.Generator:
    """The generator of one position (a, b) in one stream of one seed."""
    return np.random.Generator(np.random.Philox(key=[seed, int(stream)], counter=[0, 0, a, b]))


def torch_seed(seed: int, stream: Stream, a: int = 0, b: int = 0) -> int:
    """A seed in [0, 2^63) for torch's own generators, distinct for each position."""
    return int(generator(seed, stream, a, b).integers(0, 2**63 - 1))
