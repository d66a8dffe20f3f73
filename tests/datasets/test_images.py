"""uint8 <-> [-1, 1]."""

import torch

from stages.datasets.images import to_float, to_uint8

ALL = torch.arange(256, dtype=torch.uint8)


def test_all_256_values_survive_the_round_trip():
    assert torch.equal(to_uint8(to_float(ALL)), ALL)


def test_range_is_minus_one_to_one():
    x = to_float(ALL)
    assert x.dtype == torch.float32
    assert (x[0].item(), x[255].item()) == (-1.0, 1.0)
    assert (x.diff() > 0).all()


def test_values_outside_are_clipped_and_those_between_are_rounded():
    # One grey level is 1/127.5 wide: 0.4 of it above a level rounds back to the level, 0.6 to the next.
    level = to_float(ALL[100:101])
    x = torch.cat([torch.tensor([-7.0, 7.0]), level + 0.4 / 127.5, level + 0.6 / 127.5])
    assert to_uint8(x).tolist() == [0, 255, 100, 101]
