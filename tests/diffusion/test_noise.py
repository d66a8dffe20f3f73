import numpy as np
import pytest
import scipy.stats
import torch

from stages.diffusion import noise
from stages.diffusion.noise import gaussian

SHAPE = (1, 7, 9)  # odd: the last pair is cut


def test_image_i_depends_on_nothing_but_seed_index_and_draw():
    whole = gaussian(3, torch.arange(10), [5, 8, 0], SHAPE)
    assert whole.shape == (3, 10, *SHAPE)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(gaussian(3, torch.tensor([7]), [5], SHAPE)[0, 0], whole[0, 7], rtol=0, atol=0)
    torch.testing.assert_close(gaussian(3, torch.tensor([9, 2]), [0, 5], SHAPE), whole[[2, 0]][:, [9, 2]], rtol=0, atol=0)


def test_it_is_made_in_parts_of_any_size_to_the_same_bits(monkeypatch):
    whole = gaussian(3, torch.arange(10), [5, 8, 0], SHAPE)
    for rows in (1, 7):
        monkeypatch.setattr(noise, "_IN_CACHE", rows * 32)
        assert torch.equal(gaussian(3, torch.arange(10), [5, 8, 0], SHAPE), whole)


def test_every_word_gives_a_finite_normal_and_a_zero_the_widest(monkeypatch):
    words = torch.tensor([[0, -(2**63), -1, 2**63 - 1, 1, 2**31, 2**32 - 1]])
    monkeypatch.setattr(noise, "_mix", lambda z: words if z.shape[-1] > 1 else z)
    x = gaussian(0, torch.tensor([0]), [0], (14,))[0, 0]
    assert x.isfinite().all()
    # The first word is a zero: uniform 2^-31, the radius sqrt(62 log 2).
    assert x[[0, 7]].norm().item() == pytest.approx(6.5555, abs=1e-3)


@pytest.mark.parametrize("other", [(4, 0, 5), (3, 1, 5), (3, 0, 6)])
def test_another_seed_index_or_draw_is_other_noise(other):
    seed, index, draw = other
    a = gaussian(3, torch.tensor([0]), [5], (1, 64, 64)).flatten()
    b = gaussian(seed, torch.tensor([index]), [draw], (1, 64, 64)).flatten()
    # Correlation of 4,096 independent pairs has standard deviation 1/64; five of them.
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / 64


def test_it_is_standard_normal():
    x = gaussian(0, torch.arange(2000), [1], (1, 16, 16)).flatten().double().numpy()
    # 512,000 draws; a p-value below 1e-4 would be worse luck than this fixed seed has.
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-4
    assert abs(scipy.stats.kurtosis(x)) < 5 * np.sqrt(24 / len(x))
    assert scipy.stats.kstest(x * 1.02, "norm").pvalue < 1e-4  # two per cent too wide is noticed


def test_pixels_draws_and_indices_are_uncorrelated():
    x = gaussian(1, torch.arange(512), range(8), (1, 4, 4))  # (draw, index, 1, 4, 4)
    rows = x.permute(0, 2, 3, 4, 1).reshape(8 * 16, 512)
    off = np.corrcoef(rows) - np.eye(len(rows))
    # Each of the 8,128 correlations has standard deviation 1/sqrt(512); the largest should stay below 5.5 of them.
    assert np.abs(off).max() < 5.5 / np.sqrt(512)
