"""Randomness as a pure function of where training stands, so that there is no state to save or lose.

Philox is counter-based: the key holds the seed and the stream, the counter the position. Two positions never
share numbers, whatever ran before, in however many processes.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What the random numbers are for. The values are part of a run's identity: append, never renumber."""

    SHUFFLE = 0  # (epoch, 0): the order of the images
    CROP = 1  # (epoch, index): which part of one image
    REPLACE = 2  # (epoch, index): the image taken in place of a broken one
    MIX = 3  # (step, 0): mixup and cutmix of one batch
    MODEL = 4  # (step, micro-batch): dropout and stochastic depth
    INIT = 5  # (0, 0): the model's first weights
    SPLIT = 6  # (0, 0): which images are held out
    PIXELS = 7  # (epoch, index): flip, RandAugment, colour, erasing of one image


def generator(seed: int, stream: Stream, a: int = 0, b: int = 0) -> np.random.Generator:
    """The generator of one position (a, b) in one stream of one seed."""
    return np.random.Generator(np.random.Philox(key=[seed, int(stream)], counter=[0, 0, a, b]))


def torch_seed(seed: int, stream: Stream, a: int = 0, b: int = 0) -> int:
    """A seed in [0, 2^63) for torch's own generators, distinct for each position."""
    return int(generator(seed, stream, a, b).integers(0, 2**63 - 1))


class Generators:
    """The generators of many positions (a, b[0]), (a, b[1]), … at once: to each the numbers of its own `generator`."""

    def __init__(self, seed: int, stream: Stream, a: int, b: np.ndarray):
        self._key = (seed, int(stream))
        self._a, self._b = np.uint64(a), np.asarray(b, dtype=np.uint64)
        self._block = 0

    def __len__(self) -> int:
        return len(self._b)

    def random(self, columns: int) -> np.ndarray:
        """The next uniform numbers in [0, 1) of each position, float64 (positions, columns).

        What is left of the last four is passed over, so that numbers that are drawn apart come from own blocks.
        """
        blocks = -(-columns // 4)
        numbers = np.arange(self._block + 1, self._block + 1 + blocks, dtype=np.uint64)  # numpy counts before it draws
        self._block += blocks
        counter = np.zeros((4, len(self._b), blocks), dtype=np.uint64)
        counter[0], counter[2], counter[3] = numbers, self._a, self._b[:, None]
        bits = np.stack(_philox(counter, self._key), axis=-1).reshape(len(self._b), -1)
        return (bits[:, :columns] >> np.uint64(11)) * 2.0**-53


def _philox(counter: np.ndarray, key: tuple[int, int]) -> list[np.ndarray]:
    """Philox4x64-10 of counters (4, …): four arrays of 64 random bits (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2E7470EE14C6C93, c0)
        high1, low1 = _multiply(0xCA5A826395121157, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % 2**64, (k1 + 0xBB67AE8584CAA73B) % 2**64
    return [c0, c1, c2, c3]


def _multiply(a: int, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The high and the low 64 bits of a product."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a_high, a_low = np.uint64(a >> 32), np.uint64(a & 0xFFFFFFFF)
    b_high, b_low = b >> half, b & low
    middle = a_high * b_low + (a_low * b_low >> half)
    other = a_low * b_high + (middle & low)
    return a_high * b_high + (middle >> half) + (other >> half), np.uint64(a) * b
