"""Chance as a function of the position."""

import numpy as np
import pytest

from vitcli import rng
from vitcli.rng import Generators, Stream


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_many_positions_draw_what_each_would_draw_alone(seed):
    places = np.array([0, 1, 77, 2**31, 2**62])
    together = Generators(seed, Stream.PIXELS, 12, places)
    found = np.concatenate([together.random(8), together.random(4), together.random(400)], axis=1)
    for place, row in zip(places, found, strict=True):
        assert (row == rng.generator(seed, Stream.PIXELS, 12, int(place)).random(412)).all()
    assert len(together) == 5


def test_what_is_left_of_four_is_passed_over():
    together, alone = Generators(3, Stream.CROP, 1, np.arange(2)), rng.generator(3, Stream.CROP, 1, 1)
    found = np.concatenate([together.random(2), together.random(5)], axis=1)[1]
    assert found.tolist() == [*alone.random(4)[:2], *alone.random(8)[:5]]


def test_positions_seeds_and_streams_differ():
    drawn = [
        Generators(seed, stream, a, np.arange(3)).random(1)[:, 0]
        for seed in (0, 1)
        for stream in (Stream.CROP, Stream.PIXELS)
        for a in (0, 1)
    ]
    assert len(np.unique(np.concatenate(drawn))) == 24
