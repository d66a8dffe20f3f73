import numpy as np
import pytest
import torch

from stages.diffusion import schedules
from stages.diffusion.process import logsnr
from stages.diffusion.spacings import SPACINGS, spaced


def table(name="cosine", T=100):
    return torch.from_numpy(schedules.find(name)(T))


# The levels of each spacing: T, steps -> indices.
@pytest.mark.parametrize(
    ("spacing", "T", "steps", "indices"),
    [
        ("trailing", 10, 4, [9, 7, 4, 2]),
        ("trailing", 1000, 4, [999, 749, 499, 249]),
        ("trailing", 7, 1, [6]),
        ("leading", 10, 4, [6, 4, 2, 0]),
        ("leading", 1000, 4, [750, 500, 250, 0]),
        ("linspace", 10, 4, [9, 6, 3, 0]),
        ("linspace", 7, 1, [6]),
    ],
)
def test_spacings_in_t(spacing, T, steps, indices):
    alpha_bar = table("cosine", T)
    assert spaced(alpha_bar, steps, spacing).tolist() == [*alpha_bar[indices].tolist(), 1.0]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("T", "steps"), [(1000, 25), (200, 25), (10, 10), (10, 7), (7, 1), (50, 49)])
def test_every_spacing_rises_to_1_inside_the_table(spacing, T, steps):
    alpha_bar = table("cosine", T)
    path = spaced(alpha_bar, steps, spacing)
    assert path.shape == (steps + 1,)
    assert path.dtype == torch.float64
    assert (path.diff() > 0).all()
    assert path[-1] == 1
    assert alpha_bar[-1] * (1 - 1e-9) <= path[0]
    assert path[-2] <= alpha_bar[0] * (1 + 1e-9)
    if spacing != "leading":
        assert path[0].item() == pytest.approx(alpha_bar[-1].item(), rel=1e-9)


def test_spacings_between_the_levels_are_even_in_what_they_say():
    path = spaced(table(), 9, "even_logsnr")[:-1]
    np.testing.assert_allclose(logsnr(path).diff(), logsnr(path).diff()[0], rtol=1e-9)
    root = ((1 / spaced(table(), 9, "karras")[:-1] - 1) ** 0.5) ** (1 / 7)
    np.testing.assert_allclose(root.diff(), root.diff()[0], rtol=1e-6)


@pytest.mark.parametrize("shift", [0.0, -1.7])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_shifted_cosine_is_about_the_same_on_every_schedule_and_for_every_size_of_the_images(schedule, shift):
    """A cosine schedule without ends has a log-SNR of -2 log tan(pi t / 2 T)."""
    path = spaced(torch.sigmoid(logsnr(table(schedule)) + shift), 12, "shifted_cosine")
    expected = -2 - 2 * np.log(np.tan(np.pi / 2 * (1 - np.arange(3, 11) / 12)))
    np.testing.assert_allclose(logsnr(path)[3:11], expected, atol=0.2)


@pytest.mark.parametrize("steps", [0, 11])
def test_more_steps_than_T_or_none_are_refused(steps):
    with pytest.raises(ValueError, match=rf"steps = {steps} must lie in 1..10"):
        spaced(table(T=10), steps, "trailing")
