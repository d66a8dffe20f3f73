import numpy as np
import pytest
import scipy.stats
import torch

from stages.diffusion.noise import gaussian

SHAPE = (1, 7, 9)  # odd: the last pair is cut


def test_image_i_depends_on_nothing_but_seed_index_and_step():
    whole = gaussian(3, torch.arange(10), 5, SHAPE)
    assert whole.shape == (10, *SHAPE)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(gaussian(3, torch.tensor([7]), 5, SHAPE)[0], whole[7], rtol=0, atol=0)
    torch.testing.assert_close(gaussian(3, torch.tensor([9, 2]), 5, SHAPE), whole[[9, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("other", [(4, 0, 5), (3, 1, 5), (3, 0, 6)])
def test_another_seed_index_or_step_is_other_noise(other):
    seed, index, step = other
    a = gaussian(3, torch.tensor([0]), 5, (1, 64, 64)).flatten()
    b = gaussian(seed, torch.tensor([index]), step, (1, 64, 64)).flatten()
    # Correlation of 4,096 independent pairs has standard deviation 1/64; five of them.
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / 64


def test_it_is_standard_normal():
    x = gaussian(0, torch.arange(2000), 1, (1, 16, 16)).flatten().double().numpy()
    # 512,000 draws; a p-value below 1e-4 would be worse luck than this fixed seed has.
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-4
    assert abs(scipy.stats.kurtosis(x)) < 5 * np.sqrt(24 / len(x))
    assert scipy.stats.kstest(x * 1.02, "norm").pvalue < 1e-4  # two per cent too wide is noticed


def test_pixels_steps_and_indices_are_uncorrelated():
    x = torch.stack([gaussian(1, torch.arange(512), step, (1, 4, 4)) for step in range(8)])  # (step, index, 1, 4, 4)
    rows = x.permute(0, 2, 3, 4, 1).reshape(8 * 16, 512)
    off = np.corrcoef(rows) - np.eye(len(rows))
    # Each of the 8,128 correlations has standard deviation 1/sqrt(512); the largest should stay below 5.5 of them.
    assert np.abs(off).max() < 5.5 / np.sqrt(512)
